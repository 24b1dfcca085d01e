// What an array holds, in one pass over memory: the CPU implementation of trustcore.ops.statistics.
//
// Operand: x [R, C], float32, bfloat16 or float16. Result: uint32 [80], the words that trustcore/ops/statistics.py names:
// six floats over finite values (least, greatest, mean, standard deviation, root of the mean square, norm), nine counts
// (zeros, NaN, +Inf, -Inf, subnormals, below 1e-7, above 1e6, columns and rows of zeros), one spare word, and 64 bins of
// magnitudes, each of four binary orders. Classes are told by bit patterns, which no flushing of subnormals changes.
//
// A block of rows stays in the L1 cache while it is read twice: once for all but the columns and rows of zeros, which a
// second reading finds. Sums are float32 in a vector for 1024 values, double beyond.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {
namespace {

constexpr uint32_t kInf = 0x7f800000u, kSign = 0x80000000u;
constexpr uint32_t kTiny = 0x33d6bf95u, kHuge = 0x49742400u;  // 1e-7f and 1e6f
constexpr int kBins = 64, kFloats = 6, kCounts = 9, kWords = kFloats + kCounts + 1 + kBins;
constexpr int64_t kBlock = 2048, kChunk = 1024, kPart = 1 << 17;  // values

struct Totals {
  float least = INFINITY, greatest = -INFINITY;
  double sum = 0, squares = 0;
  int64_t finite = 0, zeros = 0, nan = 0, inf = 0, negative_inf = 0, subnormal = 0, tiny = 0, huge = 0, zero_rows = 0;
  int64_t bins[kBins] = {};
  std::vector<uint32_t> columns;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float scalar(const float* p) { return *p; }
struct BF16 { uint16_t v; };
struct F16 { uint16_t v; };
inline float scalar(const BF16* p) { return scalar_from_bfloat16(p->v); }
inline float scalar(const F16* p) { return scalar_from_half(p->v); }
inline VecF vector(const float* p) { return load(p); }
inline VecF vector(const BF16* p) { return from_bfloat16(&p->v); }
inline VecF vector(const F16* p) { return from_half(&p->v); }

template <typename T>
void add_values(const T* x, int64_t n, uint32_t normal, Totals& t) {
  uint32_t bins[4][kBins] = {};
  int64_t at = 0;
  while (at + kLanes <= n) {
    const int64_t end = std::min(n - (n - at) % kLanes, at + kChunk);
    VecF least = splat(INFINITY), greatest = splat(-INFINITY), sum{}, squares{};
    VecI finite{}, zeros{}, nan{}, inf{}, negative{}, subnormal{}, tiny{}, huge{};
    for (; at < end; at += kLanes) {
      const VecF v = vector(x + at);
      const VecU u = reinterpret_cast<VecU>(v);
      const VecU a = u & ~kSign;
      const VecI ai = reinterpret_cast<VecI>(a);  // magnitudes are positive as signed integers, too
      const VecI is_finite = ai < static_cast<int32_t>(kInf), is_inf = ai == static_cast<int32_t>(kInf);
      const VecI is_zero = ai == 0;
      const VecF kept = reinterpret_cast<VecF>(reinterpret_cast<VecI>(v) & is_finite);
      const VecF low = is_finite ? v : splat(INFINITY), high = is_finite ? v : splat(-INFINITY);
      least = low < least ? low : least;
      greatest = high > greatest ? high : greatest;
      sum += kept;
      squares += kept * kept;
      finite -= is_finite;
      zeros -= is_zero;
      inf -= is_inf;
      negative -= is_inf & (reinterpret_cast<VecI>(u) < 0);
      nan -= ai > static_cast<int32_t>(kInf);
      subnormal -= (ai < static_cast<int32_t>(normal)) & ~is_zero;
      tiny -= (ai < static_cast<int32_t>(kTiny)) & ~is_zero;
      huge -= (ai > static_cast<int32_t>(kHuge)) & is_finite;
      const VecU bin = a >> 25;
      for (int i = 0; i < kLanes; ++i) ++bins[i & 3][bin[i]];
    }
    for (int i = 0; i < kLanes; ++i) {
      t.least = std::min(t.least, least[i]);
      t.greatest = std::max(t.greatest, greatest[i]);
      t.sum += sum[i];
      t.squares += squares[i];
      t.finite += finite[i];
      t.zeros += zeros[i];
      t.nan += nan[i];
      t.inf += inf[i] - negative[i];
      t.negative_inf += negative[i];
      t.subnormal += subnormal[i];
      t.tiny += tiny[i];
      t.huge += huge[i];
    }
  }
  for (; at < n; ++at) {
    const float v = scalar(x + at);
    const uint32_t u = bits_of(v), a = u & ~kSign;
    ++bins[0][a >> 25];
    if (a > kInf) {
      ++t.nan;
    } else if (a == kInf) {
      ++(u & kSign ? t.negative_inf : t.inf);
    } else {
      ++t.finite;
      t.least = std::min(t.least, v);
      t.greatest = std::max(t.greatest, v);
      t.sum += v;
      t.squares += static_cast<double>(v) * v;
      t.zeros += a == 0;
      t.subnormal += a != 0 && a < normal;
      t.tiny += a != 0 && a < kTiny;
      t.huge += a > kHuge;
    }
  }
  for (int b = 0; b < kBins; ++b) t.bins[b] += static_cast<int64_t>(bins[0][b]) + bins[1][b] + bins[2][b] + bins[3][b];
}

template <typename T>
void add_units(const T* x, int64_t rows, int64_t cols, Totals& t) {
  uint32_t* columns = t.columns.data();
  for (int64_t r = 0; r < rows; ++r, x += cols) {
    VecU any{};
    uint32_t rest = 0;
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      const VecU a = reinterpret_cast<VecU>(vector(x + c)) & ~kSign;
      VecU seen;
      std::memcpy(&seen, columns + c, sizeof seen);
      seen |= a;
      std::memcpy(columns + c, &seen, sizeof seen);
      any |= a;
    }
    for (; c < cols; ++c) {
      const uint32_t a = bits_of(scalar(x + c)) & ~kSign;
      columns[c] |= a;
      rest |= a;
    }
    for (int i = 0; i < kLanes; ++i) rest |= any[i];
    t.zero_rows += rest == 0;
  }
}

void merge(Totals& t, const Totals& o) {
  t.least = std::min(t.least, o.least);
  t.greatest = std::max(t.greatest, o.greatest);
  t.sum += o.sum;
  t.squares += o.squares;
  t.finite += o.finite;
  t.zeros += o.zeros;
  t.nan += o.nan;
  t.inf += o.inf;
  t.negative_inf += o.negative_inf;
  t.subnormal += o.subnormal;
  t.tiny += o.tiny;
  t.huge += o.huge;
  t.zero_rows += o.zero_rows;
  for (int b = 0; b < kBins; ++b) t.bins[b] += o.bins[b];
  for (size_t c = 0; c < t.columns.size(); ++c) t.columns[c] |= o.columns[c];
}

void write(const Totals& t, uint32_t* out) {
  const double n = static_cast<double>(std::max<int64_t>(t.finite, 1)), mean = t.sum / n, square = t.squares / n;
  const float floats[kFloats] = {t.least, t.greatest, static_cast<float>(mean),
                                 static_cast<float>(std::sqrt(std::max(square - mean * mean, 0.0))),
                                 static_cast<float>(std::sqrt(square)), static_cast<float>(std::sqrt(t.squares))};
  std::memcpy(out, floats, sizeof floats);
  const int64_t dead = std::count(t.columns.begin(), t.columns.end(), 0u);
  const int64_t counts[kCounts] = {t.zeros, t.nan, t.inf, t.negative_inf, t.subnormal, t.tiny, t.huge, dead, t.zero_rows};
  const auto clipped = [](int64_t c) { return static_cast<uint32_t>(std::min<int64_t>(c, UINT32_MAX)); };
  for (int i = 0; i < kCounts; ++i) out[kFloats + i] = clipped(counts[i]);
  out[kFloats + kCounts] = 0;
  for (int b = 0; b < kBins; ++b) out[kFloats + kCounts + 1 + b] = clipped(t.bins[b]);
}

template <typename T>
void measure(const T* x, int64_t rows, int64_t cols, uint32_t normal, uint32_t* out) {
  const bool units = rows > 1 && cols > 0;
  const int64_t step = std::max<int64_t>(1, cols > 0 ? kBlock / cols : rows);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(rows, rows * cols / kPart));
  std::vector<Totals> totals(parts);
  Pool::get().run(parts, [&](int64_t part) {
    Totals& t = totals[part];
    if (units) t.columns.assign(cols, 0);
    const int64_t end = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts; row < end; row += step) {
      const int64_t here = std::min(step, end - row);
      add_values(x + row * cols, here * cols, normal, t);
      if (units) add_units(x + row * cols, here, cols, t);
    }
  });
  for (int64_t part = 1; part < parts; ++part) merge(totals[0], totals[part]);
  write(totals[0], out);
}

ffi::Error Statistics(ffi::AnyBuffer x, ffi::ResultBuffer<ffi::U32> words) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || words->element_count() != kWords)
    return ffi::Error::InvalidArgument("statistics: x must be [R, C] and the result [80]");
  uint32_t* out = words->typed_data();
  switch (x.element_type()) {
    case ffi::F32:
      measure(static_cast<const float*>(x.untyped_data()), dims[0], dims[1], 0x00800000u, out);
      return ffi::Error::Success();
    case ffi::BF16:
      measure(static_cast<const BF16*>(x.untyped_data()), dims[0], dims[1], 0x00800000u, out);
      return ffi::Error::Success();
    case ffi::F16:
      measure(static_cast<const F16*>(x.untyped_data()), dims[0], dims[1], 0x38800000u, out);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("statistics: x must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace tc

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_statistics, tc::Statistics,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::U32>>());
