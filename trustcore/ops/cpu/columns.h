// The product of x with columns of one packed weight, for few rows and for many.
//
// Formats of 4 and 8 bits with one scale for 32 weights are read row by row here; the others code by code (formats.h)
// or eight codes at a time (grids.h).
// Few rows of x (decode): for each block, codes become floats in registers, are multiplied by x and summed, and the
// block's sum is scaled once: y += scale * sum(x * code) + shift * sum(x). A weight is read once for all rows.
// Many rows (prefill): a strip of w as wide as four vectors is decoded to floats that stay in the L2 cache, and a
// register-blocked product (6 rows by 4 vectors) runs over it.
// Accumulation is float32 throughout. Memory beyond the operands: one decoded strip a thread (16 * K * lanes bytes).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "formats.h"
#include "grids.h"
#include "shared_bytes.h"
#include "simd.h"

namespace tc {

constexpr int64_t kBlock = 32;         // weights that are summed before they are scaled
constexpr int64_t kStrip = 4 * kLanes;  // columns of a decoded strip
constexpr int kGemmRows = kLanes == 16 ? 6 : 3;  // rows by 4 vectors of sums that the registers hold
constexpr int kFewRows = 16;           // rows up to which codes are decoded in registers; above, into a strip
constexpr int64_t kTile = 2048;        // columns whose sums stay in the L1 cache
constexpr int kMaxRows = 8;            // rows that share one pass in registers

// Vectors of columns that M rows can sum at once without spilling.
constexpr int columns_for(int rows) {
  const int budget = (kLanes == 16 ? 24 : 12) / rows;
  return budget < 1 ? 1 : budget > 4 ? 4 : budget;
}

// Bytes from one code row to the next.
template <Format F>
constexpr int64_t kWidth = is_float(F) ? 2 : 1;

// Code rows of a block.
template <Format F>
constexpr int64_t kCodeRows = is_nibbles(F) ? kBlock / 2 : kBlock;

template <Format F>
inline VecF plain_value(const uint8_t* p) {
  if constexpr (F == kQ8_0) return to_float(widen(reinterpret_cast<const int8_t*>(p)));
  if constexpr (F == kF16) return from_half(reinterpret_cast<const uint16_t*>(p));
  if constexpr (F == kBF16) return from_bfloat16(reinterpret_cast<const uint16_t*>(p));
}

// ---- few rows ------------------------------------------------------------------------------------------------------

// sums[m][c] = sum over `depth` weights of x[m] * code[c], one block deep.
template <Format F, int M, int C>
inline void block_sums(const uint8_t* codes, int64_t n, int64_t depth, const float* x, int64_t ldx,
                       VecF (&sums)[M][C]) {
  constexpr int kChains = M * C < 8 ? 2 : 1;  // separate sums hide the latency of the additions
  VecF parts[kChains][M][C];
  for (auto& chain : parts)
    for (auto& row : chain)
      for (VecF& sum : row) sum = VecF{};
  if constexpr (is_nibbles(F)) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlock / 2; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const VecI both = widen(codes + j * n + c * kLanes);
        const VecF low = low_nibble(both), high = high_nibble(both);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          parts[0][m][c] += x[m * ldx + j] * low;
          parts[kChains - 1][m][c] += x[m * ldx + j + kBlock / 2] * high;
        }
      }
    }
  } else {
    const auto row = [&](int64_t j, auto& chain) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const VecF w = plain_value<F>(codes + (j * n + c * kLanes) * kWidth<F>);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) chain[m][c] += x[m * ldx + j] * w;
      }
    };
    int64_t j = 0;
    for (; j + 2 <= depth; j += 2) {
      row(j, parts[0]);
      row(j + 1, parts[kChains - 1]);
    }
    if (j < depth) row(j, parts[0]);
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) {
      sums[m][c] = parts[0][m][c];
      if constexpr (kChains == 2) sums[m][c] += parts[1][m][c];
    }
}

template <Format F>
inline void run_scale_and_shift(const Weight& w, int64_t b, int64_t n, int64_t half, VecF& scale, VecF& shift) {
  if constexpr (by_eight(F)) return scale_and_shift_of_grid<F>(w, b, n, half, scale, shift);
  else return scale_and_shift<F>(w, b, n, half, scale, shift);
}

// The same for the other formats, scaled, into sums that start at zero.
template <Format F, int M, int C>
inline void scaled_sums(const Weight& w, const float* x, const float* xsum, int64_t b, int64_t n, VecF (&sums)[M][C]) {
  constexpr int kRun = by_sixteen(F) ? 16 : 32;
#pragma GCC unroll 2
  for (int first = 0; first < 32; first += kRun) {
    VecF run[M][C] = {};
    if constexpr (by_eight(F)) {
      for (int g = first / 8; g < (first + kRun) / 8; ++g)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          VecF values[8];
          codes_of<F>(w, b, n + c * kLanes, g, values);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) run[m][c] += x[m * w.k + b * kBlock + g * 8 + i] * values[i];
        }
    } else
#pragma GCC unroll 2
    for (int j = first; j < first + kRun; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const VecF code = code_of<F>(w, b, n + c * kLanes, j);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) run[m][c] += x[m * w.k + b * kBlock + j] * code;
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      VecF scale, shift;
      run_scale_and_shift<F>(w, b, n + c * kLanes, first / 16, scale, shift);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* halves = xsum + (m * w.blocks() + b) * 2;
        const float total = kRun == 16 ? halves[first / 16] : halves[0] + halves[1];
        sums[m][c] += run[m][c] * scale + shift * total;
      }
    }
  }
}

// What a group of runs from b on adds to C vectors of columns of M rows of y, its bytes read once.
template <Format F, int M, int C>
inline void add_group(const Weight& w, const float* x, const float* xsum, int64_t b, int64_t n, float* y) {
  using S = Shared<F>;
  constexpr int kParts = by_sixteen(F) ? 2 : 1;  // of the steps, each with a scale of its own
  constexpr int kSteps = S::kSteps / kParts;
  VecF sums[M][C] = {};
  const float* at = x + b * kBlock;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    VecF run[S::kRuns][M][C] = {};
#pragma GCC unroll 2
    for (int j = part * kSteps; j < (part + 1) * kSteps; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        VecF code[2];
        shared_codes<F>(w, b, n + c * kLanes, j, code);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int p = 0; p < 2; ++p) run[p % S::kRuns][m][c] += at[m * w.k + S::place(j, p)] * code[p];
      }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int p = 0; p < S::kRuns; ++p) {
        VecF scale, shift;
        run_scale_and_shift<F>(w, b + p, n + c * kLanes, part, scale, shift);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float* halves = xsum + (m * w.blocks() + b + p) * 2;
          sums[m][c] += run[p][m][c] * scale;
          if constexpr (F == kQ4K) sums[m][c] += shift * (halves[0] + halves[1]);  // the others have none
        }
      }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) {
      float* out = y + m * w.n + n + c * kLanes;
      store(out, b == 0 ? sums[m][c] : load(out) + sums[m][c]);
    }
}

// What block b adds to C vectors of columns of M rows of y.
template <Format F, int M, int C>
inline void add_block(const Weight& w, const float* x, const float* xsum, int64_t b, int64_t n, float* y) {
  const int64_t depth = std::min(kBlock, w.k - b * kBlock);
  if constexpr (by_code(F)) {
    VecF sums[M][C] = {};
    scaled_sums<F, M, C>(w, x, xsum, b, n, sums);
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < C; ++c) {
        float* out = y + m * w.n + n + c * kLanes;
        store(out, b == 0 ? sums[m][c] : load(out) + sums[m][c]);
      }
    return;
  }
  VecF sums[M][C];
  block_sums<F, M, C>(w.codes + (b * kCodeRows<F> * w.n + n) * kWidth<F>, w.n, depth, x + b * kBlock, w.k, sums);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    const int64_t at = b * w.n + n + c * kLanes;
    VecF scale = {}, shift = {};
    if constexpr (!is_float(F)) scale = from_half(w.scale + at);
    if constexpr (F == kQ4_0) shift = -8.0f * scale;
    if constexpr (F == kQ4_1) shift = from_half(w.minimum + at);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      VecF sum = sums[m][c];
      if constexpr (!is_float(F)) sum *= scale;
      if constexpr (is_nibbles(F)) {
        const float* halves = xsum + (m * w.blocks() + b) * 2;
        sum += shift * (halves[0] + halves[1]);
      }
      float* out = y + m * w.n + n + c * kLanes;
      store(out, b == 0 ? sum : load(out) + sum);
    }
  }
}

template <Format F>
inline float scalar_value(const Weight& w, int64_t k, int64_t n) {
  const int64_t b = k / kBlock, j = k % kBlock;
  if constexpr (F == kF16) return scalar_from_half(reinterpret_cast<const uint16_t*>(w.codes)[k * w.n + n]);
  if constexpr (F == kBF16) return scalar_from_bfloat16(reinterpret_cast<const uint16_t*>(w.codes)[k * w.n + n]);
  if constexpr (is_float(F)) return 0;
  const float scale = scalar_from_half(w.scale[b * w.n + n]);
  if constexpr (F == kQ8_0) return scale * reinterpret_cast<const int8_t*>(w.codes)[k * w.n + n];
  const uint8_t both = w.codes[(b * (kBlock / 2) + j % (kBlock / 2)) * w.n + n];
  const int code = j < kBlock / 2 ? both & 15 : both >> 4;
  if constexpr (F == kQ4_0) return scale * static_cast<float>(code - 8);
  if constexpr (F == kQ4_1) return scale * static_cast<float>(code) + scalar_from_half(w.minimum[b * w.n + n]);
  return 0;
}

// Columns [first, last) of M rows of y; at most kTile of them, so that y stays in the L1 cache. Blocks are the outer
// loop: the code rows of a block are read side by side, in the order they lie in memory.
template <Format F, int M>
void few_rows(const Weight& w, const float* x, const float* xsum, int64_t first, int64_t last, float* y) {
  if constexpr (Shared<F>::kAny) {
    using S = Shared<F>;
    constexpr int kVectors = columns_for(M * S::kRuns);
    for (int64_t b = 0; b < w.blocks(); b += S::kRuns) {
      int64_t n = first;
      for (; n + kVectors * kLanes <= last; n += kVectors * kLanes) {
        prefetch_group<F>(w, b + S::kRuns, n);
        add_group<F, M, kVectors>(w, x, xsum, b, n, y);
      }
      for (; n < last; n += kLanes) add_group<F, M, 1>(w, x, xsum, b, n, y);
    }
    return;
  }
  constexpr int C = columns_for(M);
  const int64_t blocks = w.blocks(), vectors = first + (last - first) / kLanes * kLanes;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t n = first;
    for (; n + C * kLanes <= vectors; n += C * kLanes) {
      if (!by_code(F) && b + 1 < blocks) {
        const uint8_t* next = w.codes + ((b + 1) * kCodeRows<F> * w.n + n) * kWidth<F>;
        for (int64_t j = 0; j < kCodeRows<F>; ++j) __builtin_prefetch(next + j * w.n * kWidth<F>);
      }
      add_block<F, M, C>(w, x, xsum, b, n, y);
    }
    if constexpr (C > 2 && !by_code(F))
      for (; n + 2 * kLanes <= vectors; n += 2 * kLanes) add_block<F, M, 2>(w, x, xsum, b, n, y);
    for (; n + kLanes <= vectors; n += kLanes) add_block<F, M, 1>(w, x, xsum, b, n, y);
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = vectors; n < last; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < w.k; ++k) sum += x[m * w.k + k] * scalar_value<F>(w, k, n);
      y[m * w.n + n] = sum;
    }
}

// Rows of one pass: a few heights, since each is code of its own.
constexpr int lower_height(Format f, int rows) {
  return rows == 8 ? (by_code(f) ? 4 : 6) : rows == 6 ? 4 : rows == 4 ? (by_code(f) ? 2 : 3) : rows - 1;
}

// Computes the highest pass that `rows` rows fill, and returns its height.
template <Format F, int M = kMaxRows>
int64_t few_rows_of(int64_t rows, const Weight& w, const float* x, const float* xsum, int64_t first, int64_t last,
                    float* y) {
  if constexpr (M > 1) {
    if (rows < M) return few_rows_of<F, lower_height(F, M)>(rows, w, x, xsum, first, last, y);
  }
  few_rows<F, M>(w, x, xsum, first, last, y);
  return M;
}

template <Format F>
void columns_few(const Weight& w, const float* x, const float* xsum, int64_t M, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n += kTile) {
    const int64_t end = std::min(last, n + kTile);
    for (int64_t m = 0; m < M;)
      m += few_rows_of<F>(M - m, w, x + m * w.k, xsum + m * w.blocks() * 2, n, end, w.y + m * w.n);
  }
}

// ---- many rows -----------------------------------------------------------------------------------------------------

// strip[k][0 .. kStrip) = decode(w)[k][first ..), zero beyond the last column.
template <Format F>
void decode_strip(const Weight& w, int64_t first, float* strip) {
  const int64_t columns = std::min(kStrip, w.n - first), vectors = columns / kLanes;
  for (int64_t b = 0; b < w.blocks(); ++b) {
    float* out = strip + b * kBlock * kStrip;
    const int64_t depth = std::min(kBlock, w.k - b * kBlock);
    for (int64_t c = 0; c < vectors; ++c) {
      const int64_t n = first + c * kLanes;
      VecF scale = {}, shift = {};
      if constexpr (by_code(F)) {
        VecF values[8];
        for (int64_t j = 0; j < kBlock; ++j) {
          if (j % 16 == 0) run_scale_and_shift<F>(w, b, n, j / 16, scale, shift);
          if constexpr (by_eight(F)) {
            if (j % 8 == 0) codes_of<F>(w, b, n, j / 8, values);
          } else {
            values[j % 8] = code_of<F>(w, b, n, j);
          }
          store(out + j * kStrip + c * kLanes, values[j % 8] * scale + shift);
        }
        continue;
      }
      const uint8_t* codes = w.codes + (b * kCodeRows<F> * w.n + n) * kWidth<F>;
      if constexpr (!is_float(F) && !by_code(F)) scale = from_half(w.scale + b * w.n + n);
      if constexpr (F == kQ4_0) shift = -8.0f * scale;
      if constexpr (F == kQ4_1) shift = from_half(w.minimum + b * w.n + n);
      if constexpr (is_nibbles(F)) {
        for (int64_t j = 0; j < kBlock / 2; ++j) {
          const VecI both = widen(codes + j * w.n);
          store(out + j * kStrip + c * kLanes, low_nibble(both) * scale + shift);
          store(out + (j + kBlock / 2) * kStrip + c * kLanes, high_nibble(both) * scale + shift);
        }
      } else {
        for (int64_t j = 0; j < depth; ++j) {
          VecF value = plain_value<F>(codes + j * w.n * kWidth<F>);
          if constexpr (!is_float(F)) value *= scale;
          store(out + j * kStrip + c * kLanes, value);
        }
      }
    }
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t n = vectors * kLanes; n < kStrip; ++n)
        out[j * kStrip + n] = n < columns ? scalar_value<F>(w, b * kBlock + j, first + n) : 0.0f;
  }
}

// R rows of y by one strip of columns.
template <int R>
void strip_rows(const float* x, int64_t k, const float* strip, float* y, int64_t ldy, int64_t columns) {
  VecF sums[R][4];
  for (auto& row : sums)
    for (VecF& sum : row) sum = VecF{};
  for (int64_t i = 0; i < k; ++i) {
    VecF w[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) w[c] = load(strip + i * kStrip + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF value = splat(x[r * k + i]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] += value * w[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    if (columns == kStrip) {
      for (int c = 0; c < 4; ++c) store(y + r * ldy + c * kLanes, sums[r][c]);
    } else {
      float out[kStrip];
      for (int c = 0; c < 4; ++c) store(out + c * kLanes, sums[r][c]);
      std::copy(out, out + columns, y + r * ldy);
    }
  }
}

template <int R = kGemmRows>
void strip_rows_of(int64_t rows, const float* x, int64_t k, const float* strip, float* y, int64_t ldy,
                   int64_t columns) {
  if constexpr (R > 1) {
    if (rows < R) return strip_rows_of<R - 1>(rows, x, k, strip, y, ldy, columns);
  }
  strip_rows<R>(x, k, strip, y, ldy, columns);
}

template <Format F>
void columns_many(const Weight& w, const float* x, int64_t M, int64_t first, int64_t last) {
  thread_local std::vector<float> strip;
  strip.resize(w.blocks() * kBlock * kStrip);
  for (int64_t n = first; n < last; n += kStrip) {
    decode_strip<F>(w, n, strip.data());
    for (int64_t m = 0; m < M; m += kGemmRows)
      strip_rows_of(std::min<int64_t>(kGemmRows, M - m), x + m * w.k, w.k, strip.data(), w.y + m * w.n + n, w.n,
                    std::min(kStrip, last - n));
  }
}

template <Format F>
void columns_of(const Weight& w, const float* x, const float* xsum, int64_t M, int64_t first, int64_t last) {
  M <= kFewRows ? columns_few<F>(w, x, xsum, M, first, last) : columns_many<F>(w, x, M, first, last);
}

using Columns = void (*)(const Weight&, const float*, const float*, int64_t, int64_t, int64_t);

}  // namespace tc
