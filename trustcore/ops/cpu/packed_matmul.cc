// y = x @ decode(w), for weights that stay packed: the CPU implementation of trustcore.ops.linear's packed products.
//
// Layout (trustcore/quant/array.py): the contraction axis K is cut into blocks of 32; block and code row lead, the
// output axis N is contiguous: codes [K/32, rows, N], scale [K/32, N], minimum [K/32, N]; 16-bit floats are [K, N]. A
// row of codes feeds N independent sums: nothing is reduced across lanes, and memory is read in order.
//
// This file is the call: it checks the operands, sums x and shares the columns out among threads; columns.h computes
// them. Oracle: trustcore.ops.linear, implementation "dequantize". Memory beyond the operands: see columns.h, and the
// sums of x over 16 (M * K / 16 floats).
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "columns.h"
#include "formats.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {

Columns columns_by_code(Format f);  // packed_codes.cc

namespace {

Columns choose_columns(Format f) {
  constexpr Columns kRowByRow[] = {columns_of<kQ4_0>, columns_of<kQ4_1>, columns_of<kQ8_0>, columns_of<kF16>,
                                   columns_of<kBF16>};
  return by_code(f) ? columns_by_code(f) : kRowByRow[f];
}

// Products of one x with several weights in one call: operands x [M, K], then for each weight codes, scale, minimum,
// scales, high, signs and grid, those that its format has; results y [M, N] in the same order.
ffi::Error PackedMatmul(ffi::Buffer<ffi::F32> x, ffi::RemainingArgs fields, ffi::RemainingRets results,
                        ffi::Span<const int64_t> formats) {
  const auto dims = x.dimensions();
  if (dims.size() != 2) return ffi::Error::InvalidArgument("packed_matmul: x must be [M, K]");
  const int64_t M = dims[0], K = dims[1];
  std::vector<Weight> weights;
  size_t at = 0;
  for (size_t i = 0; i < formats.size(); ++i) {
    const int64_t f = formats[i];
    if (f < 0 || f >= kFormats || i >= results.size())
      return ffi::Error::InvalidArgument("packed_matmul: operands do not fit the formats");
    const Layout layout = kLayouts[f];
    Weight w{static_cast<Format>(f), K};
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!y.has_value()) return ffi::Error::InvalidArgument("packed_matmul: missing result");
    w.n = (*y)->dimensions().back();
    w.y = static_cast<float*>((*y)->untyped_data());
    if (static_cast<int64_t>((*y)->element_count()) != M * w.n)
      return ffi::Error::InvalidArgument("packed_matmul: a result is not [M, N]");
    if (K % layout.block != 0 || (by_code(w.format) && w.n % kLanes != 0))
      return ffi::Error::InvalidArgument("packed_matmul: K or N is not a multiple that the format needs");
    const int64_t bytes[] = {layout.codes, layout.scale, layout.minimum, layout.scales, layout.high, layout.signs};
    const void* data[6] = {};
    for (int part = 0; part < 6; ++part) {
      if (bytes[part] == 0) continue;
      const auto field = fields.get<ffi::AnyBuffer>(at++);
      if (!field.has_value() || static_cast<int64_t>(field->size_bytes()) != K / layout.block * bytes[part] * w.n)
        return ffi::Error::InvalidArgument("packed_matmul: a field does not hold K * N weights");
      data[part] = field->untyped_data();
    }
    w.codes = static_cast<const uint8_t*>(data[0]);
    w.scale = static_cast<const uint16_t*>(data[1]);
    w.minimum = static_cast<const uint16_t*>(data[2]);
    w.scales = static_cast<const uint8_t*>(data[3]);
    w.high = static_cast<const uint8_t*>(data[4]);
    w.signs = static_cast<const uint8_t*>(data[5]);
    if (layout.grid != 0) {
      const auto grid = fields.get<ffi::Buffer<ffi::S32>>(at++);
      if (!grid.has_value() || static_cast<int64_t>(grid->element_count()) != layout.grid)
        return ffi::Error::InvalidArgument("packed_matmul: a grid does not have the entries of its format");
      w.grid = grid->typed_data();
    }
    weights.push_back(w);
  }
  if (M == 0) return ffi::Error::Success();
  const float* input = x.typed_data();

  thread_local std::vector<float> xsum;
  const int64_t blocks = (K + kBlock - 1) / kBlock;
  if (M <= kFewRows) {
    xsum.resize(M * blocks * 2);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t half = 0; half < blocks * 2; ++half) {
        float sum = 0;
        for (int64_t k = half * 16; k < std::min(K, (half + 1) * 16); ++k) sum += input[m * K + k];
        xsum[m * blocks * 2 + half] = sum;
      }
  }
  const float* sums = xsum.data();

  // Columns of all weights side by side, cut into parts of whole strips; two parts a thread even out a slow core.
  Pool& pool = Pool::get();
  const int64_t unit = M <= kFewRows ? 2 * kLanes : kStrip;
  std::vector<int64_t> start;  // first unit of each weight
  int64_t units = 0;
  for (const Weight& w : weights) {
    start.push_back(units);
    units += (w.n + unit - 1) / unit;
  }
  const int64_t wanted = M <= kFewRows ? 2 * pool.size() : units;
  const int64_t size = std::max<int64_t>(1, (units + wanted - 1) / wanted);
  pool.run((units + size - 1) / size, [&](int64_t part) {
    const int64_t begin = part * size, end = std::min(units, begin + size);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Weight& w = weights[i];
      const int64_t first = std::max<int64_t>(0, begin - start[i]) * unit;
      const int64_t last = std::min(w.n, (end - start[i]) * unit);
      if (first < last) choose_columns(w.format)(w, input, sums, M, first, last);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tc

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_packed_matmul, tc::PackedMatmul,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("formats"));
