// Codes that lie in the same bytes, read together: each byte is loaded and widened once, whatever runs its codes are of.
//
//   w[b * 32 + j] = scale * code + shift       as in formats.h, which reads one code at a time
//
// A group is as many runs of 32 weights as share bytes: two for Q4_K, one where the halves of a run share. In step j the
// codes `place(j, p)` of the group come out, p = 0, 1. Q4_K, IQ4 and the four-bit floats decode 1.5 to 2 times as fast as
// code by code (random model of 107 M weights, two cores of an AMD EPYC with AVX-512, 2026-11-21).
#pragma once

#include <cstdint>

#include "formats.h"

namespace tc {

template <Format F>
struct Shared {
  static constexpr bool kHalves = F == kIQ4NL || F == kIQ4XS || F == kMXFP4 || F == kNVFP4;
  static constexpr bool kAny = F == kQ4K || kHalves;
  static constexpr int kRuns = kHalves ? 1 : 2;
  static constexpr int kSteps = 16 * kRuns;

  // Which weight of the group code p of step j is.
  static constexpr int place(int j, int p) {
    if (F == kNVFP4) return j / 8 * 16 + p * 8 + j % 8;
    return kHalves ? p * 16 + j : p * 32 + j;
  }
};

// Brings the bytes of a group closer. Its rows are pages apart, too many streams for the processor to follow by itself.
// Inlined by force: to GCC a function that only prefetches has no effect, and a call of it is none.
template <Format F>
__attribute__((always_inline)) inline void prefetch_group(const Weight& w, int64_t b, int64_t n) {
  if (b >= w.blocks()) return;
  for (int r = 0; r < 16 * Shared<F>::kRuns; ++r) __builtin_prefetch(w.codes + (b * 16 + r) * w.n + n, 0, 2);
}

// The codes of step j of the group that begins with run b; a run has sixteen rows of bytes in each of these formats.
template <Format F>
inline void shared_codes(const Weight& w, int64_t b, int64_t n, int j, VecF (&code)[2]) {
  const VecI both = widen(w.codes + (b * 16 + j) * w.n + n);
  if constexpr (F == kQ4K) {
    code[0] = low_nibble(both), code[1] = high_nibble(both);
  } else {
    const float* values = F == kMXFP4 || F == kNVFP4 ? e2m1_values() : iq4_values();
    code[0] = pick16(both, values), code[1] = pick16(both >> 4, values);
  }
}

}  // namespace tc
