// Blocks of 256 weights in sub-blocks whose scales are codes under a scale of the block: the steps of
// trustcore/quant/encode/k_quants.py.
#pragma once

#include <cmath>

#include "encode_search.h"

namespace tc {

// The whole numbers that scales of sub-blocks may be.
struct Whole {
  float low, high;

  VecF nearest(VecF value, VecF by) const { return clipped(vround(value * by), low, high); }
};

// The unit whose multiples come closest to the values of the sub-blocks.
template <int Subs>
inline VecF scale_of_scales(const VecF* values, const VecF* weights, Whole range) {
  VecF largest = values[0], smallest = values[0];
  for (int s = 1; s < Subs; ++s) largest = vmax(largest, values[s]), smallest = vmin(smallest, values[s]);
  const VecF extreme = largest >= -smallest ? largest : smallest;
  const float end = range.low != 0 ? range.low : range.high;  // the side that has one code more
  VecF best = splat(INFINITY), kept = {};
  for (int i = 0; i < 8; ++i) {
    const VecF unit = extreme / static_cast<float>(end * (1 - i * 0.24 / 7)), by = inverse(unit);
    VecF error = {};
    for (int s = 0; s < Subs; ++s) {
      const VecF left = values[s] - unit * range.nearest(values[s], by);
      error += weights[s] * (left * left);
    }
    const auto better = error < best;
    best = better ? error : best, kept = better ? unit : kept;
  }
  return kept;
}

// A scale as a half holds it, in units of the block's.
inline VecF stored(VecF value, VecF unit) { return half(value * unit) / unit; }

// ---- w = scale * s * code ------------------------------------------------------------------------------------------

template <bool W>
struct UnderScale {
  static constexpr int kSub = 16, kSubs = 256 / kSub;

  const Block<256>& b;
  float reach, top;
  VecF s[kSubs] = {}, scale = {};  // of sub-blocks, and of the block in its units

  VecF code(int r, VecF by) const { return clipped(vround(b.x[r] * by), -reach, reach - 1); }

  VecF error(int sub, VecF factor) const {
    const VecF by = inverse(factor);
    VecF sum = {};
    for (int r = sub * kSub; r < (sub + 1) * kSub; ++r) {
      const VecF left = b.x[r] - factor * code(r, by);
      add<W>(sum, left * left, weight_of<W>(b, r));
    }
    return sum;
  }

  void products(int sub, VecF factor, VecF& product, VecF& square) const {
    const VecF by = inverse(factor);
    product = square = VecF{};
    for (int r = sub * kSub; r < (sub + 1) * kSub; ++r) {
      const VecF c = code(r, by);
      add<W>(product, b.x[r] * c, weight_of<W>(b, r)), add<W>(square, c * c, weight_of<W>(b, r));
    }
  }

  void search(const float* candidates, int count, int refits) {
    const Whole range{-top, top - 1};
    VecF scales[kSubs], squares[kSubs], product;
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF* x = b.x + sub * kSub;
      VecF largest = x[0], smallest = x[0];
      for (int r = 1; r < kSub; ++r) largest = vmax(largest, x[r]), smallest = vmin(smallest, x[r]);
      Symmetric<kSub, W> found{x, b.weight + sub * kSub, largest, smallest, -reach, reach - 1};
      scales[sub] = found.search(candidates, count, refits);
      products(sub, scales[sub], product, squares[sub]);
    }
    scale = stored(scale_of_scales<kSubs>(scales, squares, range), b.unit);
    const VecF by = inverse(scale);
    VecF before = {};
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF middle = range.nearest(scales[sub], by);
      VecF least = error(sub, scale * middle), kept = middle;
      for (float offset : {-1.0f, 1.0f}) {
        const VecF near = clipped(middle + offset, range.low, range.high), cost = error(sub, scale * near);
        const auto better = cost < least;
        least = better ? cost : least, kept = better ? near : kept;
      }
      s[sub] = kept, before += least;
    }
    VecF products_sum = {}, squares_sum = {};
    for (int sub = 0; sub < kSubs; ++sub) {
      VecF square;
      products(sub, scale * s[sub], product, square);
      products_sum += s[sub] * product, squares_sum += s[sub] * s[sub] * square;
    }
    const VecF found = stored(products_sum * inverse(squares_sum), b.unit);
    VecF after = {};
    for (int sub = 0; sub < kSubs; ++sub) after += error(sub, found * s[sub]);
    scale = after < before ? found : scale;
  }
};

// ---- w = scale * s * code - minimum * m ----------------------------------------------------------------------------

template <int Sub, bool W>
struct UnderScaleAndMinimum {
  static constexpr int kSubs = 256 / Sub, kNear = 3;

  const Block<256>& b;
  float levels, top;
  VecF s[kSubs] = {}, m[kSubs] = {}, scale = {}, minimum = {};  // the last two in units of the block's

  VecF code(int r, VecF by, VecF lower) const { return clipped(vround((b.x[r] + lower) * by), 0.0f, levels); }

  // visit(i, row, code) for each row of a sub-block under C pairs of a factor and what it lies lower, side by side.
  template <int C, typename Visit>
  void codes(int sub, const VecF* factor, const VecF* lower, const Visit& visit) const {
    VecF by[C];
    for (int i = 0; i < C; ++i) by[i] = inverse(factor[i]);
    for (int r = sub * Sub; r < (sub + 1) * Sub; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < C; ++i) visit(i, r, code(r, by[i], lower[i]));
  }

  template <int C>
  void errors(int sub, const VecF* factor, const VecF* lower, VecF* error) const {
    for (int i = 0; i < C; ++i) error[i] = VecF{};
    codes<C>(sub, factor, lower, [&](int i, int r, VecF c) {
      const VecF left = b.x[r] - factor[i] * c + lower[i];
      add<W>(error[i], left * left, weight_of<W>(b, r));
    });
  }

  void search(const float* candidates, int pairs, int refits) {
    const Whole range{0, top};
    const VecF side = b.smallest >= VecF{} ? splat(1.0f) : splat(-1.0f);  // the sign of -minimum
    VecF scales[kSubs], shifts[kSubs], sizes[kSubs], squares[kSubs], count[kSubs], sum_x[kSubs];
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF* x = b.x + sub * Sub;
      VecF largest = x[0], smallest = x[0];
      for (int r = 1; r < Sub; ++r) largest = vmax(largest, x[r]), smallest = vmin(smallest, x[r]);
      Affine<Sub, W, true> found{x, b.weight + sub * Sub, largest, smallest, levels, side};
      found.search(candidates, pairs, refits);
      scales[sub] = found.scale, shifts[sub] = found.shift, count[sub] = found.count;
      sizes[sub] = vabs(found.shift);
      squares[sub] = sum_x[sub] = VecF{};
      const VecF lower = -found.shift;
      codes<1>(sub, &found.scale, &lower, [&](int, int r, VecF c) {
        add<W>(squares[sub], c * c, weight_of<W>(b, r)), add<W>(sum_x[sub], b.x[r], weight_of<W>(b, r));
      });
    }
    scale = stored(scale_of_scales<kSubs>(scales, squares, range), b.unit);
    minimum = -side * stored(scale_of_scales<kSubs>(sizes, count, range), b.unit);
    const VecF by_scale = inverse(scale), by_minimum = inverse(minimum);
    VecF before = {};
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF middle = range.nearest(scales[sub], by_scale), shift = range.nearest(-shifts[sub], by_minimum);
      VecF factor = scale * middle, lower = minimum * shift, least;
      errors<1>(sub, &factor, &lower, &least);
      s[sub] = middle, m[sub] = shift;
      VecF near[kNear], factors[kNear], low[kNear], lowers[kNear], sums[kNear], costs[kNear];
      for (int i = 0; i < kNear; ++i) {
        near[i] = clipped(middle + static_cast<float>(i - 1), 0.0f, top), factors[i] = scale * near[i];
        lowers[i] = lower;
      }
      for (int round = 0; round < 2; ++round) {  // the m that fits the codes, the codes that fit the m
        for (int i = 0; i < kNear; ++i) sums[i] = VecF{};
        codes<kNear>(sub, factors, lowers, [&](int i, int r, VecF c) { add<W>(sums[i], c, weight_of<W>(b, r)); });
        for (int i = 0; i < kNear; ++i) {
          low[i] = range.nearest((factors[i] * sums[i] - sum_x[sub]) / count[sub], by_minimum);
          lowers[i] = minimum * low[i];
        }
      }
      errors<kNear>(sub, factors, lowers, costs);
      for (int i = 0; i < kNear; ++i) {
        const auto better = costs[i] < least;
        least = better ? costs[i] : least, s[sub] = better ? near[i] : s[sub], m[sub] = better ? low[i] : m[sub];
      }
      before += least;
    }
    fit(before, count, sum_x);
  }

  // Least squares for x ~ scale * (s codes) - minimum * m over the block, kept where the error is below `before`.
  void fit(VecF before, const VecF* count, const VecF* sum_x) {
    VecF aa = {}, ab = {}, bb = {}, ax = {}, bx = {};
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF factor = scale * s[sub], lower = minimum * m[sub];
      VecF sum = {}, square = {}, product = {};
      codes<1>(sub, &factor, &lower, [&](int, int r, VecF c) {
        const float w = weight_of<W>(b, r);
        add<W>(sum, c, w), add<W>(square, c * c, w), add<W>(product, b.x[r] * c, w);
      });
      aa += s[sub] * s[sub] * square, ab += s[sub] * m[sub] * sum, bb += m[sub] * m[sub] * count[sub];
      ax += s[sub] * product, bx += m[sub] * sum_x[sub];
    }
    const VecF determinant = aa * bb - ab * ab, zero = {};
    const VecF solvable = inverse(determinant > 1e-6f * aa * bb ? determinant : zero);
    const VecF found = stored((ax * bb - ab * bx) * solvable, b.unit);
    const VecF moved = stored((ab * ax - aa * bx) * solvable, b.unit);
    VecF after = {};
    for (int sub = 0; sub < kSubs; ++sub) {
      const VecF factor = found * s[sub], lower = moved * m[sub];
      VecF error;
      errors<1>(sub, &factor, &lower, &error);
      after += error;
    }
    const auto take = (after < before) & (found > zero);
    scale = take ? found : scale, minimum = take ? moved : minimum;
  }
};

}  // namespace tc
