// The columns of formats that are not read row by row: a file of its own, so that two cores compile at once.
#include "columns.h"

namespace tc {

Columns columns_by_code(Format f) {
  constexpr Columns kByCode[] = {
      columns_of<kQ5_0>,   columns_of<kQ5_1>,  columns_of<kQ2K>,   columns_of<kQ3K>,   columns_of<kQ4K>,
      columns_of<kQ5K>,    columns_of<kQ6K>,   columns_of<kIQ4NL>, columns_of<kIQ4XS>, columns_of<kTQ1_0>,
      columns_of<kTQ2_0>,  columns_of<kMXFP4>, columns_of<kNVFP4>, columns_of<kQ1_0>,  columns_of<kIQ3XXS>,
      columns_of<kIQ3S>,   columns_of<kIQ2XXS>, columns_of<kIQ2XS>, columns_of<kIQ2S>, columns_of<kIQ1S>,
      columns_of<kIQ1M>};
  static_assert(sizeof kByCode / sizeof *kByCode == kFormats - kQ5_0);
  return kByCode[f - kQ5_0];
}

}  // namespace tc
