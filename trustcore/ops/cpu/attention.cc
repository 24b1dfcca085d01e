// Causal attention of T tokens over a key-value cache that the call first extends, in place: the CPU implementation of
// trustcore.ops.attention.cached_attention.
//
//   slots start[b] .. start[b] + T of keys and values take the tokens' own key and value
//   out[b, t, n] = sum over s of softmax(scale * q[b, t, n] . keys[b, n / G, :, s]) * values[b, n / G, s, :]
//
// Layout: query [B, T, N, H], key and value [B, T, K, H], keys [B, K, H, S], values [B, K, S, H], out [B, T, N, H]; with
// 8-bit codes (integers or float8 e4m3) a float scale for each (b, k, s). Codes of 4 bits lie two a byte, [B, K, H / 2, S]
// and [B, K, S, H / 2]: channels h and h + H / 2 in the low and the high half of byte h; their scale and minimum are
// bfloat16 [B, K, 2, S]. Keys lie with their positions innermost, so both products have the same form: a few rows (the G
// heads of some tokens) times a matrix whose columns lie side by side.
//
// One task is a tile of up to kTileRows rows of one (b, k). It walks the visible keys kKeys at a time: scores in
// registers, softmax kept online (Milakov and Gimelshein, arXiv 1805.02867), sums in the L1 cache. Only slots that hold
// tokens are read. A short call (decode) over a long cache is cut along the keys as well and merged at the end.
// Accumulation is float32. Memory: one tile a thread, and [parts, rows, H + 2] floats for a merge.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {
namespace {

constexpr int64_t kKeys = 4 * kLanes;                  // slots of a step: four vectors of scores a row
constexpr int kGroup = kLanes == 16 ? 6 : 3;           // rows whose sums the registers hold
constexpr int64_t kTileRows = 4 * kGroup;              // rows that share a decoded block of keys and values
constexpr int64_t kSpan = 256;                         // slots of a part when a short call is cut along the keys

enum class Store { kF32, kBF16, kS8, kF8, kU4 };

// A float scale multiplies each code.
constexpr bool scaled(Store f) { return f == Store::kS8 || f == Store::kF8; }

struct Call {
  int64_t B, T, N, K, H, S, G;
  const float* query;
  float* out;
  const void* keys;
  const void* values;
  const void* key_scale;
  const void* value_scale;
  const int32_t* start;
  float scale, soft_cap;
  int64_t window, chunk;  // 0: none

  // The first slot that a query at this position sees; it never falls as positions grow.
  int64_t first_seen(int64_t position) const {
    const int64_t near = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
    return chunk > 0 ? std::max(near, position / chunk * chunk) : near;
  }
};

// e ** x for x <= 0: 2 ** round(x / ln 2) times a polynomial on [-ln 2 / 2, ln 2 / 2] (relative error below 2e-7).
inline VecF exp_negative(VecF x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2 ** 23: adding it rounds to an integer, kept in the low bits
  const VecF shifted = x * 1.44269504f + magic;
  const VecF n = shifted - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI power = reinterpret_cast<VecI>(shifted) << 23;  // the low bits of `shifted` are n
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(p) + power);
}

// sums[R][4 vectors] = x[R, depth] @ w[depth, 4 vectors]
template <int R>
inline void product(const float* x, int64_t ldx, int64_t depth, const float* w, int64_t ldw, VecF (&sums)[R][4]) {
  for (int64_t i = 0; i < depth; ++i) {
    VecF column[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) column[c] = load(w + i * ldw + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF value = splat(x[r * ldx + i]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] += value * column[c];
    }
  }
}

// scores[R][kKeys] = scale * x[R, H] @ keys[H, kKeys]
template <int R = kGroup>
void scores_of(int64_t rows, const float* x, int64_t H, const float* keys, int64_t ldk, float scale, float* scores) {
  if constexpr (R > 1) {
    if (rows < R) return scores_of<R - 1>(rows, x, H, keys, ldk, scale, scores);
  }
  VecF sums[R][4] = {};
  product<R>(x, H, H, keys, ldk, sums);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) store(scores + r * kKeys + c * kLanes, sums[r][c] * scale);
}

// out[R][C vectors of H] += weights[R, count] @ values[count, H]
template <int C, int R = kGroup>
void accumulate(int64_t rows, const float* weights, int64_t count, const float* values, int64_t H, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return accumulate<C, R - 1>(rows, weights, count, values, H, out);
  }
  VecF sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * H + c * kLanes);
  for (int64_t s = 0; s < count; ++s) {
    VecF row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load(values + s * H + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF weight = splat(weights[r * kKeys + s]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] += weight * row[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * H + c * kLanes, sums[r][c]);
}

// A block of the cache as floats, contiguous: keys [H][kKeys] with zeros beyond `count`, values [count][H].
struct Block {
  std::vector<float> keys, values;
};

// float8 e4m3: 4 bits of exponent over 7, 3 of fraction. Subnormals are computed, not shifted into place: the threads of
// XLA read subnormal floats as zero.
inline VecF from_float8(VecI codes) {
  const VecI magnitude = codes & 127;
  const VecI normal = (magnitude << 20) + (120 << 23);
  const VecF small = to_float(magnitude) * 0x1p-9f;
  const VecI bits = magnitude < 8 ? reinterpret_cast<VecI>(small) : normal;
  return reinterpret_cast<VecF>(bits | (codes & 128) << 24);
}

inline float scalar_from_float8(uint8_t code) {
  const int magnitude = code & 127;
  const uint32_t normal = (static_cast<uint32_t>(magnitude) << 20) + (120u << 23);
  float value;
  std::memcpy(&value, &normal, 4);
  if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-9f;
  return code & 128 ? -value : value;
}

template <Store F>
inline float element(const void* data, int64_t at) {
  if constexpr (F == Store::kF32) return static_cast<const float*>(data)[at];
  if constexpr (F == Store::kBF16) return scalar_from_bfloat16(static_cast<const uint16_t*>(data)[at]);
  if constexpr (F == Store::kS8) return static_cast<float>(static_cast<const int8_t*>(data)[at]);
  if constexpr (F == Store::kF8) return scalar_from_float8(static_cast<const uint8_t*>(data)[at]);
}

template <Store F>
inline VecF elements(const void* data, int64_t at) {
  if constexpr (F == Store::kF32) return load(static_cast<const float*>(data) + at);
  if constexpr (F == Store::kBF16) return from_bfloat16(static_cast<const uint16_t*>(data) + at);
  if constexpr (F == Store::kS8) return to_float(widen(static_cast<const int8_t*>(data) + at));
  if constexpr (F == Store::kF8) return from_float8(widen(static_cast<const uint8_t*>(data) + at));
}

template <Store F>
void read_keys(const Call& c, int64_t head, int64_t s, int64_t count, float* block) {
  if constexpr (F == Store::kU4) {
    const int64_t half = c.H / 2;
    const uint8_t* bytes = static_cast<const uint8_t*>(c.keys) + head * half * c.S + s;
    const uint16_t* scale = static_cast<const uint16_t*>(c.key_scale) + head * 2 * c.S + s;
    const uint16_t* minimum = scale + c.S;
    for (int64_t h = 0; h < half; ++h) {
      float *low = block + h * kKeys, *high = block + (h + half) * kKeys;
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const VecI pair = widen(bytes + h * c.S + i);
        const VecF step = from_bfloat16(scale + i), least = from_bfloat16(minimum + i);
        store(low + i, low_nibble(pair) * step + least);
        store(high + i, high_nibble(pair) * step + least);
      }
      for (; i < count; ++i) {
        const int pair = bytes[h * c.S + i];
        const float step = scalar_from_bfloat16(scale[i]), least = scalar_from_bfloat16(minimum[i]);
        low[i] = static_cast<float>(pair & 15) * step + least;
        high[i] = static_cast<float>(pair >> 4) * step + least;
      }
      for (; i < kKeys; ++i) low[i] = high[i] = 0;
    }
  } else {
    const int64_t base = head * c.H * c.S + s;
    const float* scale = static_cast<const float*>(c.key_scale) + head * c.S + s;
    for (int64_t h = 0; h < c.H; ++h) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        VecF v = elements<F>(c.keys, base + h * c.S + i);
        if constexpr (scaled(F)) v *= load(scale + i);
        store(block + h * kKeys + i, v);
      }
      for (; i < count; ++i) {
        float v = element<F>(c.keys, base + h * c.S + i);
        if constexpr (scaled(F)) v *= scale[i];
        block[h * kKeys + i] = v;
      }
      for (; i < kKeys; ++i) block[h * kKeys + i] = 0;
    }
  }
}

template <Store F>
void read_values(const Call& c, int64_t head, int64_t s, int64_t count, float* block) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = head * c.S + s + i;
    float* row = block + i * c.H;
    if constexpr (F == Store::kU4) {
      const int64_t half = c.H / 2;
      const uint8_t* bytes = static_cast<const uint8_t*>(c.values) + token * half;
      const uint16_t* scale = static_cast<const uint16_t*>(c.value_scale) + head * 2 * c.S + s + i;
      const float step = scalar_from_bfloat16(scale[0]), least = scalar_from_bfloat16(scale[c.S]);
      for (int64_t h = 0; h < half; h += kLanes) {
        const VecI pair = widen(bytes + h);
        store(row + h, low_nibble(pair) * step + least);
        store(row + half + h, high_nibble(pair) * step + least);
      }
    } else {
      for (int64_t h = 0; h < c.H; h += kLanes) {
        VecF v = elements<F>(c.values, token * c.H + h);
        if constexpr (scaled(F)) v *= static_cast<const float*>(c.value_scale)[token];
        store(row + h, v);
      }
    }
  }
}

// The running softmax of a tile: top score, sum of weights, weighted sum of values.
struct Tile {
  std::vector<float> x, scores, out;
  float top[kTileRows], total[kTileRows];
};

// Adds slots [first, last) to the softmax of `rows` rows. Row r stands at position[r] and has its query in tile.x.
template <Store F>
void attend(const Call& c, int64_t head, int64_t rows, const int64_t* position, int64_t first, int64_t last, Tile& tile,
            Block& block) {
  const int64_t H = c.H;
  for (int64_t s = first; s < last; s += kKeys) {
    const int64_t count = std::min(kKeys, last - s);
    // One pass over a full float block needs no copy; more passes read the copy from the L1 cache.
    const bool direct = F == Store::kF32 && rows <= kGroup;
    const float* keys = static_cast<const float*>(c.keys) + head * H * c.S + s;
    const float* values = static_cast<const float*>(c.values) + (head * c.S + s) * H;
    int64_t ldk = c.S;
    if (!direct || count < kKeys) {
      read_keys<F>(c, head, s, count, block.keys.data());
      keys = block.keys.data();
      ldk = kKeys;
    }
    if constexpr (F != Store::kF32) {
      read_values<F>(c, head, s, count, block.values.data());
      values = block.values.data();
    }
    for (int64_t r = 0; r < rows; r += kGroup)
      scores_of(std::min<int64_t>(kGroup, rows - r), tile.x.data() + r * H, H, keys, ldk, c.scale,
                tile.scores.data() + r * kKeys);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = tile.scores.data() + r * kKeys;
      if (c.soft_cap > 0)
        for (int64_t i = 0; i < count; ++i) scores[i] = c.soft_cap * std::tanh(scores[i] / c.soft_cap);
      const int64_t end = std::min(count, position[r] + 1 - s);
      const int64_t begin = std::max<int64_t>(0, c.first_seen(position[r]) - s);
      if (begin >= end) {
        std::fill(scores, scores + kKeys, 0.0f);
        continue;
      }
      const float none = -std::numeric_limits<float>::infinity();
      std::fill(scores, scores + begin, none);
      std::fill(scores + end, scores + kKeys, none);
      VecF high = load(scores);
      for (int i = 1; i < 4; ++i) {
        const VecF v = load(scores + i * kLanes);
        high = v > high ? v : high;
      }
      float top = tile.top[r];
      for (int i = 0; i < kLanes; ++i) top = std::max(top, high[i]);
      if (top > tile.top[r]) {
        const float shrink = std::exp(tile.top[r] - top);  // 0 at the first block, where top is -inf
        tile.total[r] *= shrink;
        for (int64_t h = 0; h < H; h += kLanes) store(tile.out.data() + r * H + h, load(tile.out.data() + r * H + h) * shrink);
        tile.top[r] = top;
      }
      VecF sum = {};
      for (int i = 0; i < 4; ++i) {
        const VecF v = load(scores + i * kLanes);
        VecF e = exp_negative(v - top);
        e = v > none ? e : VecF{};
        sum += e;
        store(scores + i * kLanes, e);
      }
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      tile.total[r] += total;
    }
    for (int64_t r = 0; r < rows; r += kGroup) {
      const int64_t here = std::min<int64_t>(kGroup, rows - r);
      float* out = tile.out.data() + r * H;
      const float* weights = tile.scores.data() + r * kKeys;
      int64_t h = 0;
      for (; h + 4 * kLanes <= H; h += 4 * kLanes) accumulate<4>(here, weights, count, values + h, H, out + h);
      for (; h + kLanes <= H; h += kLanes) accumulate<1>(here, weights, count, values + h, H, out + h);
    }
  }
}

// Row r of a (b, k): token r / G, head k * G + r % G.
const float* query_of(const Call& c, int64_t b, int64_t k, int64_t r) {
  return c.query + ((b * c.T + r / c.G) * c.N + k * c.G + r % c.G) * c.H;
}

template <Store F>
void attend_all(const Call& c) {
  const int64_t rows = c.T * c.G, tiles = (rows + kTileRows - 1) / kTileRows;
  Pool& pool = Pool::get();
  int64_t longest = 1;
  for (int64_t b = 0; b < c.B; ++b) longest = std::max<int64_t>(longest, std::min<int64_t>(c.S, c.start[b] + c.T));
  // Cut along the keys when there are too few tiles to keep the threads even.
  const int64_t whole = c.B * c.K * tiles;
  const int64_t spans = whole >= 4 * pool.size() ? 1 : std::max<int64_t>(1, (longest + kSpan - 1) / kSpan);
  const int64_t span = (longest + spans - 1) / spans;
  const int64_t width = c.H + 2;  // of a part's result: top, total, sums
  std::vector<float> parts(spans > 1 ? whole * spans * kTileRows * width : 0);

  pool.run(whole * spans, [&](int64_t part) {
    // Late tiles see the most keys: they go first.
    const int64_t tile_index = tiles - 1 - part / spans % tiles, head = part / spans / tiles, b = head / c.K;
    const int64_t r0 = tile_index * kTileRows, count = std::min(kTileRows, rows - r0);
    thread_local Tile tile;
    thread_local Block block;
    tile.x.resize(kTileRows * c.H);
    tile.out.assign(kTileRows * c.H, 0.0f);
    tile.scores.resize(kTileRows * kKeys);
    block.keys.resize(c.H * kKeys);
    block.values.resize(c.H * kKeys);
    int64_t position[kTileRows];
    for (int64_t r = 0; r < count; ++r) {
      position[r] = c.start[b] + (r0 + r) / c.G;
      std::memcpy(tile.x.data() + r * c.H, query_of(c, b, head % c.K, r0 + r), c.H * sizeof(float));
      tile.top[r] = -std::numeric_limits<float>::infinity();
      tile.total[r] = 0;
    }
    int64_t first = c.first_seen(position[0]) / kKeys * kKeys;
    int64_t last = std::min<int64_t>(c.S, position[count - 1] + 1);
    if (spans > 1) {
      first = std::max(first, part % spans * span);
      last = std::min(last, (part % spans + 1) * span);
    }
    if (first < last) attend<F>(c, head, count, position, first, last, tile, block);
    for (int64_t r = 0; r < count; ++r) {
      if (spans > 1) {
        float* result = parts.data() + (part * kTileRows + r) * width;
        result[0] = tile.top[r];
        result[1] = tile.total[r];
        std::memcpy(result + 2, tile.out.data() + r * c.H, c.H * sizeof(float));
      } else {
        float* out = c.out + (query_of(c, b, head % c.K, r0 + r) - c.query);
        const float share = tile.total[r] > 0 ? 1 / tile.total[r] : 0;
        for (int64_t h = 0; h < c.H; ++h) out[h] = tile.out[r * c.H + h] * share;
      }
    }
  });

  for (int64_t w = 0; spans > 1 && w < whole; ++w) {
    const int64_t r0 = (tiles - 1 - w % tiles) * kTileRows, head = w / tiles;
    for (int64_t r = 0; r < std::min(kTileRows, rows - r0); ++r) {
      const float* first = parts.data() + (w * spans * kTileRows + r) * width;
      const int64_t step = kTileRows * width;
      float top = first[0], total = 0;
      for (int64_t i = 1; i < spans; ++i) top = std::max(top, first[i * step]);
      float* out = c.out + (query_of(c, head / c.K, head % c.K, r0 + r) - c.query);
      std::fill(out, out + c.H, 0.0f);
      for (int64_t i = 0; i < spans; ++i) {
        const float* result = first + i * step;
        if (result[1] <= 0) continue;
        const float weight = std::exp(result[0] - top);
        total += weight * result[1];
        for (int64_t h = 0; h < c.H; ++h) out[h] += weight * result[2 + h];
      }
      for (int64_t h = 0; h < c.H; ++h) out[h] *= total > 0 ? 1 / total : 0;
    }
  }
}

// ---- extending the cache -------------------------------------------------------------------------------------------

inline uint16_t to_bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 64);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// x as float8 e4m3, to nearest, ties to even; |x| <= 448 but for rounding.
inline uint8_t to_float8(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint8_t sign = static_cast<uint8_t>(u >> 24 & 128);
  u &= 0x7fffffff;
  if (u < 121u << 23)  // below 2 ** -6: subnormal, and the smallest normal number where it rounds up to it
    return static_cast<uint8_t>(sign | static_cast<int>(std::nearbyint(std::fabs(x) * 0x1p9f)));
  u += 0x7ffff + (u >> 20 & 1);
  return static_cast<uint8_t>(sign | std::min<uint32_t>(126, (u >> 20) - (120 << 3)));
}

// Codes of one token of one head, and their scale: the largest magnitude becomes 127, or 448 in float8.
template <Store F>
float encode(const float* x, int64_t H, uint8_t* codes) {
  constexpr float kTop = F == Store::kF8 ? 448 : 127;
  float top = 0;
  for (int64_t h = 0; h < H; ++h) top = std::max(top, std::fabs(x[h]));
  const float inverse = top > 0 ? kTop / top : 0;
  for (int64_t h = 0; h < H; ++h) {
    if constexpr (F == Store::kF8)
      codes[h] = to_float8(x[h] * inverse);
    else
      codes[h] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x[h] * inverse)));
  }
  return top / kTop;
}

// Codes of 4 bits of one token of one head, two a byte, and where they lie: scale * code + minimum. Codes are chosen for
// scale and minimum as they are stored.
void encode_half(const float* x, int64_t H, uint8_t* bytes, uint16_t* scale, uint16_t* minimum) {
  const auto [low, high] = std::minmax_element(x, x + H);
  *minimum = to_bfloat16(*low);
  const float least = scalar_from_bfloat16(*minimum);
  *scale = to_bfloat16((*high - least) / 15);
  const float step = scalar_from_bfloat16(*scale), inverse = step > 0 ? 1 / step : 0;
  const auto code = [&](float v) {
    return static_cast<int>(std::min(15.0f, std::max(0.0f, std::nearbyint((v - least) * inverse))));
  };
  for (int64_t h = 0; h < H / 2; ++h) bytes[h] = static_cast<uint8_t>(code(x[h]) | code(x[h + H / 2]) << 4);
}

template <Store F>
void extend(const Call& c, const float* key, const float* value, void* const* data) {
  void *keys = data[0], *values = data[1], *key_scale = data[2], *value_scale = data[3];
  const int64_t width = F == Store::kU4 ? c.H / 2 : c.H;  // codes of a token
  Pool::get().run(c.B * c.K, [&](int64_t head) {
    const int64_t b = head / c.K, k = head % c.K;
    std::vector<uint8_t> codes(c.H);
    for (int64_t t = 0; t < c.T; ++t) {
      const int64_t s = c.start[b] + t;
      if (s < 0 || s >= c.S) continue;
      const float* from_key = key + ((b * c.T + t) * c.K + k) * c.H;
      const float* from_value = value + ((b * c.T + t) * c.K + k) * c.H;
      const int64_t to_key = head * width * c.S + s, to_value = (head * c.S + s) * width;
      if constexpr (F == Store::kU4 || scaled(F)) {
        uint8_t* value_codes = static_cast<uint8_t*>(values) + to_value;
        if constexpr (F == Store::kU4) {
          uint16_t* ks = static_cast<uint16_t*>(key_scale) + head * 2 * c.S + s;
          uint16_t* vs = static_cast<uint16_t*>(value_scale) + head * 2 * c.S + s;
          encode_half(from_key, c.H, codes.data(), ks, ks + c.S);
          encode_half(from_value, c.H, value_codes, vs, vs + c.S);
        } else {
          static_cast<float*>(key_scale)[head * c.S + s] = encode<F>(from_key, c.H, codes.data());
          static_cast<float*>(value_scale)[head * c.S + s] = encode<F>(from_value, c.H, value_codes);
        }
        for (int64_t h = 0; h < width; ++h) static_cast<uint8_t*>(keys)[to_key + h * c.S] = codes[h];
      } else {
        for (int64_t h = 0; h < c.H; ++h) {
          if constexpr (F == Store::kF32) {
            static_cast<float*>(keys)[to_key + h * c.S] = from_key[h];
            static_cast<float*>(values)[to_value + h] = from_value[h];
          } else {
            static_cast<uint16_t*>(keys)[to_key + h * c.S] = to_bfloat16(from_key[h]);
            static_cast<uint16_t*>(values)[to_value + h] = to_bfloat16(from_value[h]);
          }
        }
      }
    }
  });
}

// ---- the call ------------------------------------------------------------------------------------------------------

template <Store F>
void run(Call& c, const float* key, const float* value, void* const* data) {
  extend<F>(c, key, value, data);
  attend_all<F>(c);
}

// Operands query, key, value, start, then the cache: keys, values and, for codes, their scales. Results out, then the
// cache again, which XLA places over the operands; where it does not, the cache is copied first.
ffi::Error CachedAttention(ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> key, ffi::Buffer<ffi::F32> value,
                           ffi::Buffer<ffi::S32> start, ffi::RemainingArgs cache, ffi::Result<ffi::Buffer<ffi::F32>> out,
                           ffi::RemainingRets updated, float scale, float soft_cap, int64_t window,
                           int64_t chunk) {
  const auto dims = query.dimensions(), kv = key.dimensions();
  if (dims.size() != 4 || kv.size() != 4 || (cache.size() != 2 && cache.size() != 4) || updated.size() != cache.size())
    return ffi::Error::InvalidArgument("cached_attention: operands do not fit");
  const auto first = cache.get<ffi::AnyBuffer>(0);
  const auto shape = first->dimensions();
  if (shape.size() != 4) return ffi::Error::InvalidArgument("cached_attention: keys must be [B, K, H, S]");
  Call c{dims[0], dims[1], dims[2], shape[1], dims[3], shape[3], dims[2] / std::max<int64_t>(1, shape[1])};
  const bool packed = first->element_type() == ffi::U8;  // two codes a byte
  if (shape[0] != c.B || shape[2] * (packed ? 2 : 1) != c.H || (packed && c.H % (2 * kLanes)) || c.G * c.K != c.N || c.H % kLanes || kv[0] != c.B || kv[1] != c.T ||
      kv[2] != c.K || kv[3] != c.H)
    return ffi::Error::InvalidArgument("cached_attention: shapes do not fit");
  const bool plain = first->element_type() == ffi::F32 || first->element_type() == ffi::BF16;
  if (plain != (cache.size() == 2)) return ffi::Error::InvalidArgument("cached_attention: codes come with their scales");
  void* data[4] = {};
  for (size_t i = 0; i < cache.size(); ++i) {
    const auto from = cache.get<ffi::AnyBuffer>(i);
    auto to = updated.get<ffi::AnyBuffer>(i);
    if (!from.has_value() || !to.has_value() || from->size_bytes() != (*to)->size_bytes())
      return ffi::Error::InvalidArgument("cached_attention: cache operands do not fit");
    data[i] = (*to)->untyped_data();
    if (data[i] != from->untyped_data()) std::memcpy(data[i], from->untyped_data(), from->size_bytes());
  }
  c.query = query.typed_data();
  c.out = out->typed_data();
  c.keys = data[0];
  c.values = data[1];
  c.key_scale = data[2];
  c.value_scale = data[3];
  c.start = start.typed_data();
  c.scale = scale;
  c.soft_cap = soft_cap;
  c.window = window;
  c.chunk = chunk;
  const float *k = key.typed_data(), *v = value.typed_data();
  switch (first->element_type()) {
    case ffi::F32: run<Store::kF32>(c, k, v, data); break;
    case ffi::BF16: run<Store::kBF16>(c, k, v, data); break;
    case ffi::S8: run<Store::kS8>(c, k, v, data); break;
    case ffi::F8E4M3FN: run<Store::kF8>(c, k, v, data); break;
    case ffi::U8: run<Store::kU4>(c, k, v, data); break;
    default: return ffi::Error::InvalidArgument("cached_attention: the cache must be f32, bf16, s8, f8e4m3fn or u8");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tc

extern "C" int trustcore_vector_lanes() { return tc::kLanes; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_cached_attention, tc::CachedAttention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk"));
