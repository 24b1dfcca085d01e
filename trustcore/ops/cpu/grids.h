// Formats that columns.h reads eight codes at a time: one code, or two, names an entry of a grid.
//
//   w[b * 32 + 8 * g + i] = scale * codes_of(b, g)[i] + shift       b counts runs of 32 weights, g is 0 to 3
//
// An entry of a grid holds eight levels of two bits, or four of three, lowest first (trustcore/quant/formats/iq_grids).
// A look-up reads only the low four bits of its index, so tables of levels repeat until they have sixteen entries: one
// shift and one look-up take a level out of an entry and turn it into a number.
#pragma once

#include <cstdint>

#include "formats.h"
#include "simd.h"

namespace tc {

inline const float* iq2_magnitudes() {
  alignas(64) static const float values[16] = {8, 25, 43, 0, 8, 25, 43, 0, 8, 25, 43, 0, 8, 25, 43, 0};
  return values;
}
inline const float* iq3_xxs_magnitudes() {
  alignas(64) static const float values[16] = {4, 12, 20, 28, 36, 44, 52, 62, 4, 12, 20, 28, 36, 44, 52, 62};
  return values;
}
inline const float* iq3_s_magnitudes() {
  alignas(64) static const float values[16] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};
  return values;
}
inline const float* eight_ternary() {  // 8 t for the levels t + 1
  alignas(64) static const float values[16] = {-8, 0, 8, 0, -8, 0, 8, 0, -8, 0, 8, 0, -8, 0, 8, 0};
  return values;
}

// Each value negated where bit i of `signs` is set.
inline void negate(VecF (&values)[8], VecI signs) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    values[i] = reinterpret_cast<VecF>(reinterpret_cast<VecI>(values[i]) ^ (signs << (31 - i) & INT32_MIN));
}

// Seven bits, and an eighth on top that makes the number of set bits even.
inline VecI even_signs(VecI seven) {
  seven &= 127;
  VecI parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1) << 7;
}

inline void eight_levels(VecI entry, const float* table, VecF (&values)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) values[i] = pick16(entry >> (2 * i), table);
}

inline void four_and_four_levels(VecI first, VecI second, const float* table, VecF (&values)[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    values[i] = pick16(first >> (3 * i), table);
    values[4 + i] = pick16(second >> (3 * i), table);
  }
}

// The eight numbers of group g of run b for one vector of columns from n on, before scale and shift.
template <Format F>
inline void codes_of(const Weight& w, int64_t b, int64_t n, int64_t g, VecF (&values)[8]) {
  const auto bytes = [&](const uint8_t* field, int64_t r) { return widen(field + r * w.n + n); };
  const auto halves = [&](const uint8_t* field, int64_t r) {
    return reinterpret_cast<VecI>(widen(reinterpret_cast<const uint16_t*>(field) + r * w.n + n));
  };
  const auto words = [&](const uint8_t* field, int64_t r) {
    return load32(reinterpret_cast<const uint32_t*>(field) + r * w.n + n);
  };
  const int at = static_cast<int>(g);
  if constexpr (F == kQ1_0) {
    const VecI bits = bytes(w.codes, b * 4 + g);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) values[i] = to_float(bits >> i & 1);
  }
  if constexpr (F == kIQ3XXS) {
    const VecI first = bytes(w.codes, b * 8 + g * 2), second = bytes(w.codes, b * 8 + g * 2 + 1);
    four_and_four_levels(gather(w.grid, first), gather(w.grid, second), iq3_xxs_magnitudes(), values);
    negate(values, even_signs(words(w.signs, b) >> (7 * at)));
  }
  if constexpr (F == kIQ3S) {
    const VecI high = bytes(w.high, b) >> (2 * at);
    const VecI first = bytes(w.codes, b * 8 + g * 2) | (high & 1) << 8;
    const VecI second = bytes(w.codes, b * 8 + g * 2 + 1) | (high & 2) << 7;
    four_and_four_levels(gather(w.grid, first), gather(w.grid, second), iq3_s_magnitudes(), values);
    negate(values, bytes(w.signs, b * 4 + g));
  }
  if constexpr (F == kIQ2XXS) {
    eight_levels(gather(w.grid, words(w.codes, b * 2) >> (8 * at) & 255), iq2_magnitudes(), values);
    negate(values, even_signs(words(w.codes, b * 2 + 1) >> (7 * at)));
  }
  if constexpr (F == kIQ2XS) {
    const VecI code = halves(w.codes, b * 4 + g);
    eight_levels(gather(w.grid, code & 511), iq2_magnitudes(), values);
    negate(values, even_signs(code >> 9));
  }
  if constexpr (F == kIQ2S) {
    const VecI code = bytes(w.codes, b * 4 + g) | (bytes(w.high, b) >> (2 * at) & 3) << 8;
    eight_levels(gather(w.grid, code), iq2_magnitudes(), values);
    negate(values, bytes(w.signs, b * 4 + g));
  }
  if constexpr (F == kIQ1S) {
    const VecI code = bytes(w.codes, b * 4 + g) | (halves(w.high, b) >> (3 * at) & 7) << 8;
    eight_levels(gather(w.grid, code), eight_ternary(), values);
  }
  if constexpr (F == kIQ1M) {  // shifted by one up or down, eight weights together
    const VecI high = bytes(w.high, b * 2 + g / 2) >> (at % 2 ? 4 : 0);
    eight_levels(gather(w.grid, bytes(w.codes, b * 4 + g) | (high & 7) << 8), eight_ternary(), values);
    const VecF by = to_float(1 - (high >> 2 & 2));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) values[i] += by;
  }
}

// Scale and shift of weights [16 * half, 16 * half + 16) of run b, as in formats.h.
template <Format F>
inline void scale_and_shift_of_grid(const Weight& w, int64_t b, int64_t n, int64_t half, VecF& scale, VecF& shift) {
  constexpr int64_t kRuns = kLayouts[F].block / 32;
  const int64_t super = b / kRuns;
  const int sub = static_cast<int>(b % kRuns);
  shift = VecF{};
  if constexpr (F == kIQ1M) {  // the block's half float lies in the upper four bits of its four words
    const auto* scales = reinterpret_cast<const uint16_t*>(w.scales) + super * 4 * w.n + n;
    Halves spread[4], whole = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      spread[i] = *reinterpret_cast<const Halves*>(scales + i * w.n);
      whole |= (spread[i] & 0xF000) >> (12 - 4 * i);
    }
    uint16_t halves[kLanes];
    std::memcpy(halves, &whole, sizeof whole);
    const int s = sub * 2 + static_cast<int>(half);
    const VecI three = reinterpret_cast<VecI>(widen(scales + s / 4 * w.n)) >> (3 * (s % 4)) & 7;
    scale = from_half(halves) * to_float(2 * three + 1) * 0.125f;
    return;
  } else {
    const VecF whole = from_half(w.scale + super * w.n + n);
    if constexpr (F == kQ1_0) {
      scale = 2.0f * whole;
      shift = -whole;
    }
    if constexpr (F == kIQ3XXS || F == kIQ2XXS) {
      const uint8_t* field = F == kIQ3XXS ? w.signs : w.codes;
      const int64_t r = F == kIQ3XXS ? b : b * 2 + 1;
      const VecI word = load32(reinterpret_cast<const uint32_t*>(field) + r * w.n + n);
      scale = whole * (to_float(word >> 28 & 15) + 0.5f) * (F == kIQ3XXS ? 0.5f : 0.25f);
    }
    if constexpr (F == kIQ3S) {
      const VecI both = widen(w.scales + (super * 4 + sub / 2) * w.n + n);
      scale = whole * to_float(2 * (both >> (sub % 2 ? 4 : 0) & 15) + 1);
    }
    if constexpr (F == kIQ2XS || F == kIQ2S) {
      const VecI both = widen(w.scales + b * w.n + n);
      scale = whole * (to_float(both >> (half ? 4 : 0) & 15) + 0.5f) * 0.25f;
    }
    if constexpr (F == kIQ1S) {
      const auto high = reinterpret_cast<VecI>(widen(reinterpret_cast<const uint16_t*>(w.high) + b * w.n + n));
      scale = whole * to_float(2 * (high >> 12 & 7) + 1) * 0.125f;
      shift = high >> 15 != 0 ? -scale : scale;
    }
  }
}

}  // namespace tc
