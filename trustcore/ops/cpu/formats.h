// Formats that columns.h reads code by code: what a code is worth, and which scale and shift its run has.
//
//   w[b * 32 + j] = scale * code + shift       b counts runs of 32 weights, eight to a block of the K-quants
//
// Layouts are those of trustcore/quant/formats (bytes of a GGUF block, one array a field, columns contiguous):
// row r of a field of a block is `field[(block * rows + r) * n + column]`.
#pragma once

#include <cstdint>

#include "simd.h"

namespace tc {

// The order of FORMATS in trustcore/ops/cpu/__init__.py.
enum Format : int64_t {
  kQ4_0, kQ4_1, kQ8_0, kF16, kBF16,                            // row by row, see columns.h
  kQ5_0, kQ5_1, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K, kIQ4NL, kIQ4XS,  // code by code
  kTQ1_0, kTQ2_0, kMXFP4, kNVFP4,
  kQ1_0, kIQ3XXS, kIQ3S, kIQ2XXS, kIQ2XS, kIQ2S, kIQ1S, kIQ1M,  // eight codes at a time, see grids.h
  kFormats
};

constexpr bool is_nibbles(Format f) { return f == kQ4_0 || f == kQ4_1; }
constexpr bool is_float(Format f) { return f == kF16 || f == kBF16; }
constexpr bool by_code(Format f) { return f >= kQ5_0; }
constexpr bool by_eight(Format f) { return f >= kQ1_0; }
// Whether 16 weights share a scale, and not 32.
constexpr bool by_sixteen(Format f) {
  return f == kQ2K || f == kQ3K || f == kQ6K || f == kNVFP4 || f == kIQ2XS || f == kIQ2S || f == kIQ1M;
}

// Bytes a block of each operand has, in the order in which they are passed; 0 where there is none. Behind them comes
// the grid, as so many numbers of 32 bits.
struct Layout {
  int64_t block, codes, scale, minimum, scales, high, signs, grid;
};
constexpr Layout kLayouts[kFormats] = {
    {32, 16, 2, 0, 0, 0, 0, 0},     {32, 16, 2, 2, 0, 0, 0, 0},     {32, 32, 2, 0, 0, 0, 0, 0},
    {1, 2, 0, 0, 0, 0, 0, 0},       {1, 2, 0, 0, 0, 0, 0, 0},       {32, 16, 2, 0, 0, 4, 0, 0},
    {32, 16, 2, 2, 0, 4, 0, 0},     {256, 64, 2, 2, 16, 0, 0, 0},   {256, 64, 2, 0, 12, 32, 0, 0},
    {256, 128, 2, 2, 12, 0, 0, 0},  {256, 128, 2, 2, 12, 32, 0, 0}, {256, 128, 2, 0, 16, 64, 0, 0},
    {32, 16, 2, 0, 0, 0, 0, 0},     {256, 128, 2, 0, 4, 2, 0, 0},   {256, 48, 2, 0, 0, 4, 0, 0},
    {256, 64, 2, 0, 0, 0, 0, 0},    {32, 16, 0, 0, 1, 0, 0, 0},     {64, 32, 0, 0, 4, 0, 0, 0},
    {128, 16, 2, 0, 0, 0, 0, 0},    {256, 64, 2, 0, 0, 0, 32, 256}, {256, 64, 2, 0, 4, 8, 32, 512},
    {256, 64, 2, 0, 0, 0, 0, 256},  {256, 64, 2, 0, 8, 0, 0, 512},  {256, 32, 2, 0, 8, 8, 32, 1024},
    {256, 32, 2, 0, 0, 16, 0, 2048}, {256, 32, 0, 0, 8, 16, 0, 2048},
};

struct Weight {
  Format format;
  int64_t k, n;
  const uint8_t* codes;
  const uint16_t* scale;    // half floats, one a block
  const uint16_t* minimum;  // the same
  const uint8_t* scales;    // codes of the scales of sub-blocks
  const uint8_t* high;      // upper bits of codes, or of scales
  const uint8_t* signs;
  const int32_t* grid;  // what a code stands for, see grids.h
  float* y;             // [M, n]

  int64_t blocks() const { return (k + 31) / 32; }
};

// The sixteen values of IQ4's codes.
inline const float* iq4_values() {
  alignas(64) static const float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};
  return values;
}

// Twice the values of 4-bit floats.
inline const float* e2m1_values() {
  alignas(64) static const float values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return values;
}

// Half of unsigned 8-bit floats, four bits of exponent and three of mantissa; 127 stands for zero.
inline VecF half_of_e4m3(VecI v) {
  const VecI exponent = v >> 3 & 15, mantissa = v & 7;
  const VecF normal = reinterpret_cast<VecF>((exponent + 120 - 1) << 23 | mantissa << 20);
  const VecF value = exponent == 0 ? to_float(mantissa) * 0x1p-10f : normal;
  return v == 127 ? VecF{} : value;
}

// Code j of run b for one vector of columns from n on, before scale and shift.
template <Format F>
inline VecF code_of(const Weight& w, int64_t b, int64_t n, int64_t j) {
  const int64_t super = b / 8, sub = b % 8;
  const auto row = [&](const uint8_t* field, int64_t r) { return widen(field + r * w.n + n); };
  if constexpr (F == kQ5_0 || F == kQ5_1) {
    const VecI low = row(w.codes, b * 16 + j % 16) >> (j < 16 ? 0 : 4) & 15;
    const VecI bit = row(w.high, b * 4 + j / 8) >> static_cast<int>(j % 8) & 1;
    return to_float(low | bit << 4);
  }
  if constexpr (F == kIQ4NL) return pick16(row(w.codes, b * 16 + j % 16) >> (j < 16 ? 0 : 4), iq4_values());
  if constexpr (F == kIQ4XS)
    return pick16(row(w.codes, super * 128 + sub * 16 + j % 16) >> (j < 16 ? 0 : 4), iq4_values());
  if constexpr (F == kQ2K)
    return to_float(row(w.codes, super * 64 + sub / 4 * 32 + j) >> static_cast<int>(sub % 4 * 2) & 3);
  if constexpr (F == kQ3K) {
    const VecI low = row(w.codes, super * 64 + sub / 4 * 32 + j) >> static_cast<int>(sub % 4 * 2) & 3;
    const VecI bit = row(w.high, super * 32 + j) >> static_cast<int>(sub) & 1;
    return to_float(low | bit << 2);
  }
  if constexpr (F == kQ4K) return low_nibble(row(w.codes, super * 128 + sub / 2 * 32 + j) >> (sub % 2 ? 4 : 0));
  if constexpr (F == kQ5K) {
    const VecI low = row(w.codes, super * 128 + sub / 2 * 32 + j) >> (sub % 2 ? 4 : 0) & 15;
    const VecI bit = row(w.high, super * 32 + j) >> static_cast<int>(sub) & 1;
    return to_float(low | bit << 4);
  }
  if constexpr (F == kQ6K) {
    const int64_t half = sub / 4, quarter = sub % 4;
    const VecI low = row(w.codes, super * 128 + half * 64 + quarter % 2 * 32 + j) >> (quarter < 2 ? 0 : 4) & 15;
    const VecI top = row(w.high, super * 64 + half * 32 + j) >> static_cast<int>(quarter * 2) & 3;
    return to_float(low | top << 4);
  }
  if constexpr (F == kTQ2_0)
    return to_float(row(w.codes, super * 64 + sub / 4 * 32 + j) >> static_cast<int>(sub % 4 * 2) & 3);
  if constexpr (F == kTQ1_0) {  // digits of base 3: five of each code, four of each byte of `high`
    constexpr int kPowers[] = {1, 3, 9, 27, 81};
    const int64_t i = sub * 32 + j;
    VecI byte;
    int64_t digit;
    if (i < 160) {
      byte = row(w.codes, super * 48 + i % 32), digit = i / 32;
    } else if (i < 240) {
      byte = row(w.codes, super * 48 + 32 + i % 16), digit = (i - 160) / 16;
    } else {
      byte = row(w.high, super * 4 + i % 4), digit = (i - 240) / 4;
    }
    return to_float((byte * kPowers[digit] & 255) * 3 >> 8);
  }
  if constexpr (F == kMXFP4) return pick16(row(w.codes, b * 16 + j % 16) >> (j < 16 ? 0 : 4), e2m1_values());
  if constexpr (F == kNVFP4)
    return pick16(row(w.codes, b * 16 + j / 16 * 8 + j % 8) >> (j % 16 < 8 ? 0 : 4), e2m1_values());
}

// Scale and shift of weights [16 * half, 16 * half + 16) of run b; formats with one scale for 32 ignore `half`.
template <Format F>
inline void scale_and_shift(const Weight& w, int64_t b, int64_t n, int64_t half, VecF& scale, VecF& shift) {
  constexpr int64_t kRuns = kLayouts[F].block / 32;
  const int64_t super = b / kRuns, sub = b % kRuns;
  shift = VecF{};
  if constexpr (F == kMXFP4) {  // a power of two, halved; below 2 the number is subnormal
    const VecI exponent = widen(w.scales + b * w.n + n);
    scale = reinterpret_cast<VecF>(exponent < 2 ? (VecI{} + (1 << 21)) << exponent : (exponent - 1) << 23);
  } else if constexpr (F == kNVFP4) {
    scale = half_of_e4m3(widen(w.scales + (b * 2 + half) * w.n + n));
  } else if constexpr (kLayouts[F].block == 32) {
    scale = from_half(w.scale + b * w.n + n);
    if constexpr (F == kQ5_0) shift = -16.0f * scale;
    if constexpr (F == kQ5_1) shift = from_half(w.minimum + b * w.n + n);
  } else if constexpr (F == kTQ1_0 || F == kTQ2_0) {
    scale = from_half(w.scale + super * w.n + n);
    shift = -scale;
  } else {
    const VecF whole = from_half(w.scale + super * w.n + n);
    const auto row = [&](int64_t r) { return widen(w.scales + (super * kLayouts[F].scales + r) * w.n + n); };
    if constexpr (F == kQ2K) {
      const VecI both = row(sub * 2 + half);
      scale = whole * to_float(both & 15);
      shift = -from_half(w.minimum + super * w.n + n) * to_float(both >> 4);
    }
    if constexpr (F == kQ3K) {  // low nibbles in bytes 0-7, upper pairs in bytes 8-11
      const int64_t s = sub * 2 + half;
      const VecI low = row(s % 8) >> (s < 8 ? 0 : 4) & 15;
      const VecI top = row(8 + s % 4) >> static_cast<int>(s / 4 * 2) & 3;
      scale = whole * to_float((low | top << 4) - 32);
      shift = -4.0f * scale;
    }
    if constexpr (F == kQ4K || F == kQ5K) {  // six bits each: whole in bytes 0-7, or nibbles of 8-11 under pairs of 0-7
      VecI s, m;
      if (sub < 4) {
        s = row(sub) & 63;
        m = row(sub + 4) & 63;
      } else {
        const VecI last = row(sub + 4);
        s = (last & 15) | (row(sub - 4) >> 6 & 3) << 4;
        m = (last >> 4 & 15) | (row(sub) >> 6 & 3) << 4;
      }
      scale = whole * to_float(s);
      shift = -from_half(w.minimum + super * w.n + n) * to_float(m);
    }
    if constexpr (F == kQ6K) {
      const int64_t r = super * 16 + sub / 4 * 8 + sub % 4 * 2 + half;
      scale = whole * to_float(widen(reinterpret_cast<const int8_t*>(w.scales) + r * w.n + n));
      shift = -32.0f * scale;
    }
    if constexpr (F == kIQ4XS) {
      const VecI low = row(sub / 2) >> (sub % 2 ? 4 : 0) & 15;
      const auto pairs = reinterpret_cast<VecI>(widen(reinterpret_cast<const uint16_t*>(w.high) + super * w.n + n));
      scale = whole * to_float((low | (pairs >> static_cast<int>(sub * 2) & 3) << 4) - 32);
    }
  }
}

}  // namespace tc
