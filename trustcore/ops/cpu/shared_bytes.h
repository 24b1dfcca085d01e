// Codes that lie in the same bytes, read together: each byte is loaded and widened once, whatever runs its codes are of.
//
//   w[b * 32 + j] = scale * code + shift       as in formats.h, which reads one code at a time
//
// A group is as many runs of 32 weights as share bytes: two for Q4_K, one where the halves of a run share. In step j the
// codes `place(j, p)` of the group come out, p = 0, 1. Measured where it pays: Q4_K, IQ4 and the four-bit floats decode
// 1.3 to 1.7 times as fast as code by code; formats of 2, 3, 5 and 6 bits, which share bytes as well, do not (random
// model of 107 M weights, two cores of an AMD EPYC with AVX-512, 2026-11-21).
#pragma once

#include <cstdint>

#include "formats.h"

namespace tc {

template <Format F>
struct Shared {
  static constexpr bool kHalves = F == kIQ4NL || F == kIQ4XS || F == kMXFP4 || F == kNVFP4;
  static constexpr bool kAny = F == kQ4K || kHalves;
  static constexpr int kRuns = kHalves ? 1 : 2;
  static constexpr int kCodes = 2;
  static constexpr int kSteps = 32 * kRuns / kCodes;

  // Which weight of the group code p of step j is.
  static constexpr int place(int j, int p) {
    if (F == kNVFP4) return j / 8 * 16 + p * 8 + j % 8;
    return kHalves ? p * 16 + j : p * 32 + j;
  }
};

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
  if constexpr (F == kIQ4NL || F == kIQ4XS || F == kMXFP4 || F == kNVFP4) {
    const float* values = F == kMXFP4 || F == kNVFP4 ? e2m1_values() : iq4_values();
    const VecI both = row_of(w.codes, w, b * 16 + j, n);  // iq4_xs: super * 128 + sub * 16 is the same
    code[0] = pick16(both, values), code[1] = pick16(both >> 4, values);
  }
}

}  // namespace tc
