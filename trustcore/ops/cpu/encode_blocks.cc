// Encodes float weights as one of GGUF's simple formats or K-quants: trustcore/quant/encode in one pass over memory.
//
// Operands: weights float32 [K, N]; what an error in each row costs, float32 [K], or [0] for one; results: the fields of
// the format as trustcore/quant/array.py lays them out ([K / block, rows, N] and [K / block, N]), and the bits of the
// largest magnitude as one uint32 (NaN and infinities stand above all numbers there). The candidates of the search come
// from Python, and every step is that of trustcore/quant/encode/{search,plain,k_quants,ternary,block_floats}.py, the
// oracle: the same products and sums in the same order, row by row.
//
// Blocks of rows and runs of 1024 columns are what threads share.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "encode_k_quants.h"
#include "encode_search.h"
#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {
namespace {

// The order of ENCODED in trustcore/ops/cpu/__init__.py.
enum Kind : int64_t {
  kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ1_0, kTQ1_0, kTQ2_0, kMXFP4, kNVFP4, kF16, kBF16, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K,
  kKinds
};

constexpr int kMaxBlock = 256, kMaxFields = 5;
constexpr int64_t kRun = 1024;      // columns of a part
constexpr int64_t kPart = 1 << 15;  // weights of a part, if there are more

struct Layout {
  int block;
  int rows[kMaxFields];   // of each field, in the format's order; 0: none
  int bytes[kMaxFields];  // of an element
};
constexpr Layout kLayouts[kKinds] = {
    {32, {1, 16}, {2, 1}},                          // q4_0
    {32, {1, 1, 16}, {2, 2, 1}},                    // q4_1
    {32, {1, 4, 16}, {2, 1, 1}},                    // q5_0
    {32, {1, 1, 4, 16}, {2, 2, 1, 1}},              // q5_1
    {32, {1, 32}, {2, 1}},                          // q8_0
    {128, {1, 16}, {2, 1}},                         // q1_0
    {256, {48, 4, 1}, {1, 1, 2}},                   // tq1_0
    {256, {64, 1}, {1, 2}},                         // tq2_0
    {32, {1, 16}, {1, 1}},                          // mxfp4
    {64, {4, 32}, {1, 1}},                          // nvfp4
    {1, {1}, {2}},                                  // f16
    {1, {1}, {2}},                                  // bf16
    {256, {16, 64, 1, 1}, {1, 1, 2, 2}},            // q2_k
    {256, {32, 64, 12, 1}, {1, 1, 1, 2}},           // q3_k
    {256, {1, 1, 12, 128}, {2, 2, 1, 1}},           // q4_k
    {256, {1, 1, 12, 32, 128}, {2, 2, 1, 1, 1}},    // q5_k
    {256, {128, 64, 16, 1}, {1, 1, 1, 2}},          // q6_k
};

struct Task {
  Kind kind;
  const float* x;         // [K, N]
  const float* weight;    // [K] or null
  int64_t n;              // columns
  const float* candidates;
  int count, refits;
  uint8_t* fields[kMaxFields];
};

// ---- formats -------------------------------------------------------------------------------------------------------

// Where a vector of columns of a field begins: row r of block i.
inline uint8_t* place(const Task& t, int field, int64_t i, int r, int64_t column) {
  const Layout& layout = kLayouts[t.kind];
  return t.fields[field] + ((i * layout.rows[field] + r) * t.n + column) * layout.bytes[field];
}

inline void put_half(const Task& t, int field, int64_t i, int64_t column, VecF value) {
  to_half(value, reinterpret_cast<uint16_t*>(place(t, field, i, 0, column)));
}

// code(r) is the code of row r; of its bits four are kept.
template <typename Code>
inline void nibbles(const Task& t, int field, int64_t i, int64_t column, const Code& code) {
  for (int r = 0; r < 16; ++r) narrow((code(r) & 15) | code(r + 16) << 4, place(t, field, i, r, column));
}

// The fifth bits in one field, the others in the next.
template <typename Code>
inline void five_bits(const Task& t, int field, int64_t i, int64_t column, const Code& code) {
  VecI codes[32];
  for (int byte = 0; byte < 4; ++byte) {
    VecI bits = {};
    for (int j = 0; j < 8; ++j) {
      codes[byte * 8 + j] = code(byte * 8 + j);
      bits |= codes[byte * 8 + j] >> 4 << j;
    }
    narrow(bits, place(t, field, i, byte, column));
  }
  nibbles(t, field + 1, i, column, [&](int r) { return codes[r]; });
}

template <Kind F, bool W>
inline void symmetric(const Task& t, Block<32>& b, int64_t i, int64_t column) {
  constexpr float high = F == kQ4_0 ? 7 : F == kQ5_0 ? 15 : 127, low = F == kQ8_0 ? -127 : -high - 1;
  b.scaled();
  const VecF scale = half(Symmetric<32, W>{b.x, b.weight, b.largest, b.smallest, low, high}.search(t.candidates, t.count, t.refits) * b.unit);
  const VecF by = inverse(scale / b.unit);
  put_half(t, 0, i, column, scale);
  const auto code = [&](int r) {
    return to_nearest(clipped(b.x[r] * by, low, high)) - (F == kQ8_0 ? 0 : static_cast<int>(low));
  };
  if constexpr (F == kQ8_0) {
    for (int r = 0; r < 32; ++r) narrow(code(r), place(t, 1, i, r, column));
  } else if constexpr (F == kQ4_0) {
    nibbles(t, 1, i, column, code);
  } else {
    five_bits(t, 1, i, column, code);
  }
}

template <Kind F, bool W>
inline void affine(const Task& t, Block<32>& b, int64_t i, int64_t column) {
  constexpr float levels = F == kQ4_1 ? 15 : 31;
  b.scaled();
  Affine<32, W> found{b.x, b.weight, b.largest, b.smallest, levels};
  found.search(t.candidates, t.count / 2, t.refits);
  const VecF scale = half(found.scale * b.unit);
  put_half(t, 0, i, column, scale);
  put_half(t, 1, i, column, found.shift * b.unit);
  const VecF by = inverse(scale / b.unit);
  const VecF minimum = from_half(reinterpret_cast<const uint16_t*>(place(t, 1, i, 0, column))) / b.unit;
  const auto code = [&](int r) { return to_nearest(clipped((b.x[r] - minimum) * by, 0.0f, levels)); };
  F == kQ4_1 ? nibbles(t, 2, i, column, code) : five_bits(t, 2, i, column, code);
}

// See `_fractions` in ternary.py: digits of base 3, `step` rows apart, as the fraction they make.
inline void fractions(const Task& t, int field, int row, int64_t i, int64_t column, const VecI* digits, int count,
                      int rows) {
  for (int j = 0; j < rows; ++j) {
    VecI number = {};
    for (int d = 0; d < 5; ++d) {
      number *= 3;
      if (d < count) number += digits[d * rows + j];
    }
    narrow(number + (number * 3508 + 65535 >> 16), place(t, field, i, row + j, column));
  }
}

template <Kind F, bool W>
inline void ternary(const Task& t, Block<256>& b, int64_t i, int64_t column) {
  b.scaled();
  const VecF scale = half(Symmetric<256, W>{b.x, b.weight, b.largest, b.smallest, -1, 1}.search(t.candidates, t.count, t.refits) * b.unit);
  const VecF by = inverse(scale / b.unit);
  VecI codes[256];
  for (int r = 0; r < 256; ++r) codes[r] = to_nearest(clipped(b.x[r] * by, -1, 1)) + 1;
  put_half(t, F == kTQ1_0 ? 2 : 1, i, column, scale);
  if constexpr (F == kTQ1_0) {
    fractions(t, 0, 0, i, column, codes, 5, 32);
    fractions(t, 0, 32, i, column, codes + 160, 5, 16);
    fractions(t, 1, 0, i, column, codes + 240, 4, 4);
  } else {
    for (int c = 0; c < 2; ++c)
      for (int j = 0; j < 32; ++j) {
        const VecI* four = codes + c * 128 + j;
        narrow(four[0] | four[32] << 2 | four[64] << 4 | four[96] << 6, place(t, 0, i, c * 32 + j, column));
      }
  }
}

template <bool W>
inline void one_bit(const Task& t, Block<128>& b, int64_t i, int64_t column) {
  b.scaled();
  VecF sum = {}, count = {};
  for (int r = 0; r < 128; ++r) {
    const float w = weight_of<W>(b, r);
    add<W>(sum, vabs(b.x[r]), w);
    count += w;
  }
  put_half(t, 0, i, column, half(sum / count * b.unit));
  for (int byte = 0; byte < 16; ++byte) {
    VecI bits = {};
    for (int j = 0; j < 8; ++j) bits |= (b.x[byte * 8 + j] >= VecF{}) & (1 << j);
    narrow(bits, place(t, 1, i, byte, column));
  }
}

// ---- K-quants -------------------------------------------------------------------------------------------------------

// Rows [c * parts + p] * chunk + j of `code`, `bits` bits each from p * bits on, in byte c * chunk + j.
template <typename Code>
inline void fold(const Task& t, int field, int64_t i, int64_t column, int rows, int bits, int chunk, int first,
                 const Code& code) {
  const int parts = 8 / bits;
  for (int byte = 0; byte < rows * bits / 8; ++byte) {
    VecI packed = {};
    for (int p = 0; p < parts; ++p) packed |= code((byte / chunk * parts + p) * chunk + byte % chunk) << (p * bits);
    narrow(packed, place(t, field, i, first + byte, column));
  }
}

template <Kind F, bool W>
inline void under_scales(const Task& t, Block<256>& b, int64_t i, int64_t column) {
  constexpr float reach = F == kQ3K ? 4 : 32, top = F == kQ3K ? 32 : 128;
  b.scaled();
  UnderScale<W> found{b, reach, top};
  found.search(t.candidates, t.count, t.refits);
  constexpr int kSub = found.kSub;
  VecI codes[256];
  for (int sub = 0; sub < found.kSubs; ++sub) {
    const VecF by = inverse(found.scale * found.s[sub]);
    for (int r = sub * kSub; r < (sub + 1) * kSub; ++r) codes[r] = to_int(found.code(r, by)) + static_cast<int>(reach);
  }
  put_half(t, 3, i, column, found.scale * b.unit);
  if constexpr (F == kQ3K) {
    fold(t, 0, i, column, 256, 1, 32, 0, [&](int r) { return codes[r] >> 2; });
    fold(t, 1, i, column, 256, 2, 32, 0, [&](int r) { return codes[r] & 3; });
    const auto scale = [&](int sub) { return to_int(found.s[sub]) + 32; };
    fold(t, 2, i, column, 16, 4, 8, 0, [&](int sub) { return scale(sub) & 15; });
    fold(t, 2, i, column, 16, 2, 4, 8, [&](int sub) { return scale(sub) >> 4; });
  } else {
    fold(t, 0, i, column, 256, 4, 64, 0, [&](int r) { return codes[r] & 15; });
    fold(t, 1, i, column, 256, 2, 32, 0, [&](int r) { return codes[r] >> 4; });
    for (int sub = 0; sub < found.kSubs; ++sub) narrow(to_int(found.s[sub]), place(t, 2, i, sub, column));
  }
}

// See `_six_bits` in k_quants.py: eight s and eight m in 12 bytes.
inline void six_bits(const Task& t, int field, int64_t i, int64_t column, const VecI* s, const VecI* m) {
  for (int j = 0; j < 4; ++j) {
    narrow(s[j] | s[j + 4] >> 4 << 6, place(t, field, i, j, column));
    narrow(m[j] | m[j + 4] >> 4 << 6, place(t, field, i, j + 4, column));
    narrow((s[j + 4] & 15) | (m[j + 4] & 15) << 4, place(t, field, i, j + 8, column));
  }
}

template <Kind F, bool W>
inline void under_scales_and_minima(const Task& t, Block<256>& b, int64_t i, int64_t column) {
  constexpr int kSub = F == kQ2K ? 16 : 32, kSubs = 256 / kSub;
  constexpr float levels = F == kQ2K ? 3 : F == kQ4K ? 15 : 31, top = F == kQ2K ? 15 : 63;
  b.scaled();
  UnderScaleAndMinimum<kSub, W> found{b, levels, top};
  found.search(t.candidates, t.count / 2, t.refits);
  VecI codes[256], s[kSubs], m[kSubs];
  for (int sub = 0; sub < kSubs; ++sub) {
    const VecF by = inverse(found.scale * found.s[sub]), lower = found.minimum * found.m[sub];
    for (int r = sub * kSub; r < (sub + 1) * kSub; ++r) codes[r] = to_int(found.code(r, by, lower));
    s[sub] = to_int(found.s[sub]), m[sub] = to_int(found.m[sub]);
  }
  constexpr int kScale = F == kQ2K ? 2 : 0, kCodes = F == kQ2K ? 1 : F == kQ4K ? 3 : 4;
  put_half(t, kScale, i, column, found.scale * b.unit);
  put_half(t, kScale + 1, i, column, found.minimum * b.unit);
  if constexpr (F == kQ2K) {
    for (int sub = 0; sub < kSubs; ++sub) narrow(s[sub] | m[sub] << 4, place(t, 0, i, sub, column));
    fold(t, kCodes, i, column, 256, 2, 32, 0, [&](int r) { return codes[r]; });
  } else {
    six_bits(t, 2, i, column, s, m);
    if constexpr (F == kQ5K) fold(t, 3, i, column, 256, 1, 32, 0, [&](int r) { return codes[r] >> 4; });
    fold(t, kCodes, i, column, 256, 4, 32, 0, [&](int r) { return codes[r] & 15; });
  }
}

// ---- four-bit floats -----------------------------------------------------------------------------------------------

constexpr float kE2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

// The E2M1 number nearest to a magnitude, and its code.
inline VecF magnitude(VecF v) {
  VecF sum = {};
#pragma GCC unroll 7
  for (int i = 0; i < 7; ++i) sum += v > (kE2M1[i] + kE2M1[i + 1]) / 2 ? splat(kE2M1[i + 1] - kE2M1[i]) : VecF{};
  return sum;
}

inline VecI e2m1_code(VecF x) {
  const VecF v = vabs(x);
  VecI code = {};
#pragma GCC unroll 7
  for (int i = 0; i < 7; ++i) code -= v > (kE2M1[i] + kE2M1[i + 1]) / 2;
  return code | ((x < VecF{}) & (code > 0) & 8);
}

// The scale code `start + offset` of least error for rows [first, last); value_of gives the number of a code.
template <bool W, int R, typename Value>
inline VecF least(const Task& t, const Block<R>& b, const VecF* x, int first, int last, VecF start,
                  const Value& value_of) {
  VecF best = splat(INFINITY), kept = start;
  for (int c = 0; c < t.count; ++c) {
    const VecF code = start + t.candidates[c], value = value_of(code), by = inverse(value);
    VecF error = {};
    for (int r = first; r < last; ++r) {
      const VecF left = vabs(x[r]) - magnitude(vabs(x[r] * by)) * value;
      add<W>(error, left * left, weight_of<W>(b, r));
    }
    const auto better = error < best;
    best = better ? error : best, kept = better ? code : kept;
  }
  return kept;
}

// 2**(exponent - 127)
inline VecF power(VecF exponent) { return bits_to_float(reinterpret_cast<VecU>(to_int(exponent)) << 23); }

template <bool W>
inline void mxfp4(const Task& t, Block<32>& b, int64_t i, int64_t column) {
  const auto bits = reinterpret_cast<VecI>(reinterpret_cast<VecU>(b.size) >> 23);
  VecF rule = clipped(to_float(bits) - 2.0f, 2.0f, 252.0f);
  if (t.count > 0) {
    VecF x[32];
    const VecF by = power(254.0f - rule);
    for (int r = 0; r < 32; ++r) x[r] = b.x[r] * by;
    rule = clipped(least<W>(t, b, x, 0, 32, splat(127.0f), power) - 127.0f + rule, 2.0f, 252.0f);
  }
  const VecF by = power(254.0f - rule);
  narrow(to_int(rule), place(t, 0, i, 0, column));
  nibbles(t, 1, i, column, [&](int r) { return e2m1_code(b.x[r] * by); });
}

// The E4M3 number of a code, after clipping it to 0 ... 126.
inline VecF e4m3(VecF code) {
  code = clipped(code, 0.0f, 126.0f);
  const VecF normal = bits_to_float((reinterpret_cast<VecU>(to_int(code)) + 960u) << 20);
  return code < 8.0f ? code * 0x1p-9f : normal;
}

// The code of the E4M3 number nearest to a value; 126 for all beyond.
inline VecF e4m3_code(VecF value) {
  const VecU bits = reinterpret_cast<VecU>(vmin(value, splat(448.0f))) + (1u << 19);
  const VecF normal = to_float(reinterpret_cast<VecI>(bits >> 20)) - 960.0f;
  return value < 0x1p-6f ? vround(value * 512.0f) : normal;
}

template <bool W>
inline void nvfp4(const Task& t, Block<64>& b, int64_t i, int64_t column) {
  for (int s = 0; s < 4; ++s) {
    VecF largest = {};
    for (int r = 16 * s; r < 16 * s + 16; ++r) largest = vmax(largest, vabs(b.x[r]));
    VecF code = e4m3_code(largest / 6.0f);
    if (t.count > 0) code = clipped(least<W>(t, b, b.x, 16 * s, 16 * s + 16, code, e4m3), 0.0f, 126.0f);
    const VecF by = inverse(e4m3(code));
    narrow(to_int(code), place(t, 0, i, s, column));
    for (int r = 0; r < 8; ++r) {
      const VecI low = e2m1_code(b.x[16 * s + r] * by), high = e2m1_code(b.x[16 * s + r + 8] * by);
      narrow(low | high << 4, place(t, 1, i, 8 * s + r, column));
    }
  }
}

template <Kind F>
using BlockOf = Block<kLayouts[F].block>;

// Columns [first, last) of row i as 16-bit floats, to nearest, ties to even.
template <Kind F>
uint32_t floats(const Task& t, int64_t i, int64_t first, int64_t last) {
  VecU top = {};
  for (int64_t n = first; n < last; n += kLanes) {
    const int64_t column = std::min(n, last - kLanes);
    const VecF x = load(t.x + i * t.n + column);
    const VecU bits = reinterpret_cast<VecU>(x), size = bits & 0x7FFFFFFFu;
    top = larger(top, size);
    auto* out = reinterpret_cast<uint16_t*>(place(t, 0, i, 0, column));
    if constexpr (F == kF16)
      to_half(x, out);
    else
      narrow16(reinterpret_cast<VecI>(bits + 0x7FFFu + (bits >> 16 & 1u) >> 16), out);
  }
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max<uint32_t>(largest, top[lane]);
  return largest;
}

template <Kind F, bool W>
inline void encode(const Task& t, BlockOf<F>& b, int64_t i, int64_t column) {
  if constexpr (F == kQ4_0 || F == kQ5_0 || F == kQ8_0) symmetric<F, W>(t, b, i, column);
  if constexpr (F == kQ4_1 || F == kQ5_1) affine<F, W>(t, b, i, column);
  if constexpr (F == kTQ1_0 || F == kTQ2_0) ternary<F, W>(t, b, i, column);
  if constexpr (F == kQ1_0) one_bit<W>(t, b, i, column);
  if constexpr (F == kMXFP4) mxfp4<W>(t, b, i, column);
  if constexpr (F == kNVFP4) nvfp4<W>(t, b, i, column);
  if constexpr (F == kQ3K || F == kQ6K) under_scales<F, W>(t, b, i, column);
  if constexpr (F == kQ2K || F == kQ4K || F == kQ5K) under_scales_and_minima<F, W>(t, b, i, column);
}

// Columns [first, last) of block i; returns the bits of the largest magnitude.
template <Kind F, bool W>
uint32_t columns_of(const Task& t, int64_t i, int64_t first, int64_t last) {
  BlockOf<F> block;
  constexpr int R = kLayouts[F].block;
  const float* rows = t.x + i * R * t.n;
  VecU top = {};
  for (int64_t n = first; n < last; n += kLanes) {
    const int64_t column = std::min(n, last - kLanes);  // the last vector begins within the one before
    top = larger(top, block.copy(rows + column, t.n, W ? t.weight + i * R : nullptr));
    encode<F, W>(t, block, i, column);
  }
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max<uint32_t>(largest, top[lane]);
  return largest;
}

// ---- the call ------------------------------------------------------------------------------------------------------

using Columns = uint32_t (*)(const Task&, int64_t, int64_t, int64_t);
template <bool W>
constexpr Columns kColumns[kKinds] = {
    columns_of<kQ4_0, W>, columns_of<kQ4_1, W>,  columns_of<kQ5_0, W>,  columns_of<kQ5_1, W>,  columns_of<kQ8_0, W>,
    columns_of<kQ1_0, W>, columns_of<kTQ1_0, W>, columns_of<kTQ2_0, W>, columns_of<kMXFP4, W>, columns_of<kNVFP4, W>,
    floats<kF16>,         floats<kBF16>,         columns_of<kQ2K, W>,   columns_of<kQ3K, W>,  columns_of<kQ4K, W>,
    columns_of<kQ5K, W>,  columns_of<kQ6K, W>};

// Results are memory that nobody touched yet. In pages of 4 KiB the kernel's first visits would cost more than a cast.
inline void fault_in_large_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

ffi::Error EncodeBlocks(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight, ffi::RemainingRets results,
                        int64_t kind, ffi::Span<const float> candidates, int64_t refits) {
  const auto dims = x.dimensions();
  if (kind < 0 || kind >= kKinds) return ffi::Error::InvalidArgument("encode_blocks: no such format");
  const Layout& layout = kLayouts[kind];
  if (dims.size() != 2 || dims[0] % layout.block != 0 || dims[1] < kLanes)
    return ffi::Error::InvalidArgument("encode_blocks: weights must be [K, N], K of whole blocks, N of a vector or more");
  const int64_t weights = static_cast<int64_t>(weight.element_count());
  if (weights != 0 && weights != dims[0])
    return ffi::Error::InvalidArgument("encode_blocks: what errors cost must be one number for each row");
  const int64_t blocks = dims[0] / layout.block, n = dims[1];
  Task task{static_cast<Kind>(kind), x.typed_data(), weights ? weight.typed_data() : nullptr, n, candidates.begin(),
            static_cast<int>(candidates.size()), static_cast<int>(refits)};
  size_t fields = 0;
  for (; fields < kMaxFields && layout.rows[fields] != 0; ++fields) {
    auto field = results.get<ffi::AnyBuffer>(fields);
    if (!field.has_value() || static_cast<int64_t>((*field)->size_bytes()) !=
                                  blocks * layout.rows[fields] * layout.bytes[fields] * n)
      return ffi::Error::InvalidArgument("encode_blocks: a field does not hold K * N weights");
    task.fields[fields] = static_cast<uint8_t*>((*field)->untyped_data());
    fault_in_large_pages(task.fields[fields], (*field)->size_bytes());
  }
  auto largest = results.get<ffi::Buffer<ffi::U32>>(fields);
  if (!largest.has_value() || (*largest)->element_count() != 1)
    return ffi::Error::InvalidArgument("encode_blocks: the last result must be one uint32");
  const Columns columns = (weights ? kColumns<true> : kColumns<false>)[kind];
  const int64_t runs = std::max<int64_t>(1, n / kRun), pieces = blocks * runs;
  const int64_t together = std::max<int64_t>(1, kPart / (layout.block * std::min(n, kRun)));
  std::atomic<uint32_t> top{0};
  Pool::get().run((pieces + together - 1) / together, [&](int64_t part) {
    uint32_t found = 0;
    for (int64_t piece = part * together; piece < std::min(pieces, (part + 1) * together); ++piece) {
      const int64_t run = piece % runs, first = run * kRun, last = run + 1 == runs ? n : first + kRun;
      found = std::max(found, columns(task, piece / runs, first, last));
    }
    uint32_t seen = top.load(std::memory_order_relaxed);
    while (found > seen && !top.compare_exchange_weak(seen, found, std::memory_order_relaxed)) {
    }
  });
  (*largest)->typed_data()[0] = top.load();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tc

extern "C" int trustcore_vector_lanes() { return tc::kLanes; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_encode_blocks, tc::EncodeBlocks,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets()
                                  .Attr<int64_t>("kind")
                                  .Attr<ffi::Span<const float>>("candidates")
                                  .Attr<int64_t>("refits"));
