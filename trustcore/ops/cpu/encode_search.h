// Blocks of weights in registers, and the search for their scales: trustcore/quant/encode/search.py on vectors.
//
// One vector holds as many columns; a block of them (16 to 256 rows) lies in the L1 cache. Several candidates are tried
// side by side, which hides the latency of their sums. `W`: rows have weights of their own in the error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace tc {

constexpr int kSide = kLanes == 16 ? 8 : 4;        // symmetric candidates tried side by side
constexpr int kSideAffine = kLanes == 16 ? 4 : 2;  // affine ones, which need three sums and two numbers each
// ---- numbers -------------------------------------------------------------------------------------------------------

inline VecF inverse(VecF v) {
  const VecF zero = {};
  return v != zero ? 1.0f / (v != zero ? v : splat(1.0f)) : zero;
}

inline VecF clipped(VecF v, float low, float high) { return vmin(vmax(v, splat(low)), splat(high)); }

// See `power_of_two` in search.py.
inline VecF power_of_two(VecF largest) {
  const VecF kept = vmin(vmax(largest, splat(0x1p-100f)), splat(0x1p100f));
  return bits_to_float(reinterpret_cast<VecU>(kept) & 0x7F800000u);
}

// See `half` in search.py: the value that a half holds, to nearest, and up among the subnormals.
inline VecF half(VecF scale) {
  alignas(64) uint16_t bits[kLanes];
  to_half(clipped(scale, -65504.0f, 65504.0f), bits);
  VecF value = from_half(bits);
  if (!any(vabs(scale) < 0x1p-14f)) return value;
  for (int i = 0; i < kLanes; ++i)
    if (std::fabs(scale[i]) < 0x1p-14f) {
      const float steps = std::ceil(std::fabs(scale[i]) * static_cast<float>(0.999 * 0x1p24));
      value[i] = scale[i] == 0 ? 0.0f : std::copysign(steps * 0x1p-24f, scale[i]);
    }
  return value;
}

// ---- one block of a vector of columns ------------------------------------------------------------------------------

template <int R>
struct Block {
  VecF x[R];      // in units of `unit` after scaled()
  VecF unit, largest, smallest, size;
  float weight[R];

  // Returns the bits of the largest magnitude of the weights as they are.
  VecU copy(const float* from, int64_t stride, const float* weights) {
    VecU top = {};
    largest = splat(-INFINITY), smallest = splat(INFINITY);
    for (int r = 0; r < R; ++r) {
      const VecF v = load(from + r * stride);
      __builtin_prefetch(from + r * stride + 8 * kLanes);
      x[r] = v;
      largest = vmax(largest, v), smallest = vmin(smallest, v);
      const VecU bits = reinterpret_cast<VecU>(v) & 0x7FFFFFFFu;
      top = larger(top, bits);
    }
    for (int r = 0; weights && r < R; ++r) weight[r] = weights[r];
    size = vmax(largest, -smallest);
    return top;
  }

  void scaled() {
    unit = power_of_two(size);
    const VecF by = 1.0f / unit;
    for (VecF& v : x) v *= by;
    largest *= by, smallest *= by;
  }
};

// sum += weight * value; values first, as in `total` of search.py.
template <bool W>
inline void add(VecF& sum, VecF value, float weight) {
  if constexpr (W)
    sum += value * weight;
  else
    sum += value;
}

template <bool W, int R>
inline float weight_of(const Block<R>& b, int r) {
  return W ? b.weight[r] : 1.0f;
}

// R rows of a block, and their extremes.
template <int R, bool W>
struct Symmetric {
  const VecF* x;
  const float* weight;
  VecF largest, smallest;
  float low, high;
  VecF error = {}, scale = {};

  void take(VecF product, VecF square) {
    const VecF found = product * inverse(square), cost = -product * found;
    const auto better = cost < error;
    error = better ? cost : error, scale = better ? found : scale;
  }

  template <int C>
  void attempt(const VecF* by) {
    VecF product[C], square[C];
    for (int c = 0; c < C; ++c) product[c] = square[c] = VecF{};
    for (int r = 0; r < R; ++r) {
      const VecF v = x[r];
      const float w = W ? weight[r] : 1.0f;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const VecF code = clipped(vround(v * by[c]), low, high);
        add<W>(product[c], v * code, w), add<W>(square[c], code * code, w);
      }
    }
    for (int c = 0; c < C; ++c) take(product[c], square[c]);
  }

  // Returns the scale, in units of the block's.
  VecF search(const float* candidates, int count, int refits) {
    const VecF unit = inverse(largest >= -smallest ? largest : smallest);
    int at = 0;
    for (; at + kSide <= count; at += kSide) {
      VecF by[kSide];
      for (int c = 0; c < kSide; ++c) by[c] = candidates[at + c] * unit;
      attempt<kSide>(by);
    }
    for (; at < count; ++at) {
      const VecF by = candidates[at] * unit;
      attempt<1>(&by);
    }
    for (int i = 0; i < refits; ++i) {
      const VecF by = inverse(scale);
      attempt<1>(&by);
    }
    return scale;
  }
};

// R rows of a block, their extremes, and, where `Sided`, the sign that the shift must have, if it is not zero.
template <int R, bool W, bool Sided = false>
struct Affine {
  const VecF* x;
  const float* weight;
  VecF largest, smallest;
  float levels;
  VecF side = {};
  VecF y[R] = {};
  VecF count = {}, share = {}, mean = {}, error = {}, scale = {}, shift = {};

  void take(VecF sum, VecF product, VecF square) {
    const VecF spread = square - sum * sum * share, zero = {};
    VecF found = (product - mean * sum) * inverse(spread > 1e-6f * square ? spread : zero);
    VecF moved = mean - found * sum * share;
    if constexpr (Sided) {
      const auto beyond = (moved + smallest) * side < zero;
      moved = beyond ? -smallest : moved;
      found = beyond ? (product - moved * sum) * inverse(square) : found;
    }
    VecF cost = found * (found * square - 2.0f * product) + moved * (moved * count + 2.0f * found * sum);
    cost = cost - 2.0f * moved * mean * count;
    const auto better = (found > zero) & (cost < error);
    error = better ? cost : error, scale = better ? found : scale, shift = better ? moved : shift;
  }

  // Codes are the nearest to y * by - below. Where no `below` is above a half, none rounds to less than zero.
  template <int C, bool Low>
  void attempt(const VecF* by, const VecF* below) {
    VecF sum[C], product[C], square[C];
    for (int c = 0; c < C; ++c) sum[c] = product[c] = square[c] = VecF{};
    for (int r = 0; r < R; ++r) {
      const VecF v = y[r];
      const float w = W ? weight[r] : 1.0f;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        VecF code = vround(v * by[c] - below[c]);
        if constexpr (Low) code = vmax(code, VecF{});
        code = vmin(code, splat(levels));
        add<W>(sum[c], code, w), add<W>(product[c], v * code, w), add<W>(square[c], code * code, w);
      }
    }
    for (int c = 0; c < C; ++c) take(sum[c], product[c], square[c]);
  }

  template <int C, bool Low>
  void attempt_some(int some, const VecF* by, const VecF* below) {
    if (some == C) return attempt<C, Low>(by, below);
    if constexpr (C > 1) attempt_some<C - 1, Low>(some, by, below);
  }

  // Candidates are pairs (span, below). Leaves scale and shift, in units of the block's.
  void search(const float* candidates, int pairs, int refits) {
    if constexpr (Sided) smallest = side < VecF{} ? vmin(smallest, VecF{}) : vmax(smallest, VecF{});
    const VecF unit = inverse(vmax(largest - smallest, VecF{}));
    VecF total[4] = {};
    float weights = 0;
    for (int r = 0; r < R; ++r) {
      y[r] = x[r] - smallest;
      const float w = W ? weight[r] : 1.0f;
      add<W>(total[r % 4], y[r], w);
      weights += w;
    }
    count = splat(weights);
    share = 1.0f / count;
    mean = ((total[0] + total[1]) + (total[2] + total[3])) * share;
    shift = mean, scale = VecF{};
    if constexpr (Sided) shift = (mean + smallest) * side < VecF{} ? -smallest : mean;
    error = shift * (shift - 2.0f * mean) * count;
    VecF by[kSideAffine], below[kSideAffine];
    for (int at = 0; at < pairs; at += kSideAffine) {
      const int some = std::min(kSideAffine, pairs - at);
      bool low = false;
      for (int c = 0; c < some; ++c) {
        by[c] = candidates[2 * (at + c)] * unit;
        below[c] = splat(candidates[2 * (at + c) + 1]);
        low |= !(candidates[2 * (at + c) + 1] <= 0.5f);
      }
      low ? attempt_some<kSideAffine, true>(some, by, below) : attempt_some<kSideAffine, false>(some, by, below);
    }
    for (int i = 0; i < refits; ++i) refit();
    shift += smallest;
  }

  void refit() {
    const VecF by = inverse(scale);
    VecF sum = {}, product = {}, square = {};
    for (int r = 0; r < R; ++r) {
      const VecF code = clipped(vround((y[r] - shift) * by), 0.0f, levels);
      const float w = W ? weight[r] : 1.0f;
      add<W>(sum, code, w), add<W>(product, y[r] * code, w), add<W>(square, code * code, w);
    }
    take(sum, product, square);
  }
};

}  // namespace tc
