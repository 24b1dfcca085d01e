// Codes that lie in the same bytes, read together: each byte is loaded and widened once, whatever runs its codes are of.
//
//   w[b * 32 + j] = scale * code + shift       as in formats.h, which reads one code at a time
//
// A group is as many runs of 32 weights as share bytes: four where a code has 2 bits or two more elsewhere, two for 4
// bits, one where the halves of a run share. In step j the codes `place(j, p)` of the group come out, p = 0 ... kCodes.
#pragma once

#include <cstdint>

#include "formats.h"

namespace tc {

template <Format F>
struct Shared {
  static constexpr bool kQuarters = F == kQ2K || F == kQ3K || F == kQ6K || F == kTQ2_0;
  static constexpr bool kPairs = F == kQ4K || F == kQ5K;
  static constexpr bool kHalves =
      F == kQ5_0 || F == kQ5_1 || F == kIQ4NL || F == kIQ4XS || F == kMXFP4 || F == kNVFP4;
  static constexpr bool kAny = kQuarters || kPairs || kHalves;
  static constexpr int kRuns = kQuarters ? 4 : kPairs ? 2 : 1;
  static constexpr int kCodes = kQuarters ? 4 : 2;
  static constexpr int kSteps = 32 * kRuns / kCodes;

  // Which weight of the group code p of step j is.
  static constexpr int place(int j, int p) {
    if (F == kNVFP4) return j / 8 * 16 + p * 8 + j % 8;
    return kHalves ? p * 16 + j : p * 32 + j;
  }
};

// `upper` placed on bit 4 and up of codes below 16, as floats from 0 to 31. Bits of `low` from 4 on are not looked at.
inline VecF with_fifth_bit(VecI low, VecI upper) { return to_float((low & 15) | (upper & 16)); }

// Row r of a field for one vector of columns.
inline VecI row_of(const uint8_t* field, const Weight& w, int64_t r, int64_t n) { return widen(field + r * w.n + n); }

// Brings the bytes of a group closer. Its rows are pages apart, too many streams for the processor to follow by itself.
template <Format F>
inline void prefetch_group(const Weight& w, int64_t b, int64_t n) {
  if (b >= w.blocks()) return;
  constexpr int kRows = kLayouts[F].codes * 32 / kLayouts[F].block;  // of a run
  const auto rows = [&](const uint8_t* field, int64_t first, int count) {
    for (int r = 0; r < count; ++r) __builtin_prefetch(field + (first + r) * w.n + n, 0, 2);
  };
  rows(w.codes, b * kRows, kRows * Shared<F>::kRuns);
  if constexpr (F == kQ6K) rows(w.high, b * 8, 32);
  if constexpr (F == kQ5K || F == kQ3K)
    if (b % 8 == 0) rows(w.high, b * 4, 32);
  if constexpr (F == kQ5_0 || F == kQ5_1) rows(w.high, b * 4, 4);
}

// The codes of step j of the group that begins with run b.
template <Format F>
inline void shared_codes(const Weight& w, int64_t b, int64_t n, int j, VecF (&code)[Shared<F>::kCodes]) {
  const int64_t super = b / 8;
  const int sub = static_cast<int>(b % 8);
  if constexpr (F == kQ4K) {
    const VecI both = row_of(w.codes, w, super * 128 + sub * 16 + j, n);
    code[0] = low_nibble(both), code[1] = high_nibble(both);
  }
  if constexpr (F == kQ5K) {
    const VecI both = row_of(w.codes, w, super * 128 + sub * 16 + j, n);
    const VecI bits = row_of(w.high, w, super * 32 + j, n) >> sub;
    code[0] = with_fifth_bit(both, bits << 4), code[1] = with_fifth_bit(both >> 4, bits << 3);
  }
  if constexpr (F == kQ6K) {
    const VecI first = row_of(w.codes, w, super * 128 + sub * 16 + j, n);
    const VecI second = row_of(w.codes, w, super * 128 + sub * 16 + 32 + j, n);
    const VecI bits = row_of(w.high, w, super * 64 + sub * 8 + j, n);
    code[0] = to_float((first & 15) | (bits << 4 & 48)), code[1] = to_float((second & 15) | (bits << 2 & 48));
    code[2] = to_float(first >> 4 | (bits & 48)), code[3] = to_float(second >> 4 | (bits >> 2 & 48));
  }
  if constexpr (F == kQ2K || F == kTQ2_0 || F == kQ3K) {
    const VecI four = row_of(w.codes, w, super * 64 + sub * 8 + j, n);
    if constexpr (F == kQ3K) {
      const VecI bits = row_of(w.high, w, super * 32 + j, n) >> sub;
      code[0] = to_float((four & 3) | (bits << 2 & 4)), code[1] = to_float((four >> 2 & 3) | (bits << 1 & 4));
      code[2] = to_float((four >> 4 & 3) | (bits & 4)), code[3] = to_float(four >> 6 | (bits >> 1 & 4));
    } else {
      for (int p = 0; p < 4; ++p) code[p] = to_float(four >> (2 * p) & 3);
    }
  }
  if constexpr (F == kQ5_0 || F == kQ5_1) {
    const VecI both = row_of(w.codes, w, b * 16 + j, n);
    const VecI low = row_of(w.high, w, b * 4 + j / 8, n), high = row_of(w.high, w, b * 4 + 2 + j / 8, n);
    code[0] = with_fifth_bit(both, low << 4 >> j % 8), code[1] = with_fifth_bit(both >> 4, high << 4 >> j % 8);
  }
  if constexpr (F == kIQ4NL || F == kIQ4XS || F == kMXFP4 || F == kNVFP4) {
    const float* values = F == kMXFP4 || F == kNVFP4 ? e2m1_values() : iq4_values();
    const VecI both = row_of(w.codes, w, b * 16 + j, n);  // iq4_xs: super * 128 + sub * 16 is the same
    code[0] = pick16(both, values), code[1] = pick16(both >> 4, values);
  }
}

}  // namespace tc
