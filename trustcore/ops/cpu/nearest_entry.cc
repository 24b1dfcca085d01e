// Which entry of a grid costs least: the inner loop of the encoders of GGUF's IQ formats.
//
//     index[g] = argmin over entries e of sum over i of costs[level i of e][i][g]
//
// Operands: costs float32 [levels, d, G], not negative, d = 4 or 8 weights of an entry; grid uint16 [entries], level i of
// an entry in `bits` bits from i * bits on. Result: int32 [G], the sum's bits with the lowest ones replaced by the index,
// so that one minimum of integers finds both. The sums are those of trustcore/quant/encode/nearest_entry.py, which is
// the oracle, in the same order: additions alone, hence the same bits.
//
// Entries share halves: the sums of every combination of levels that occurs in the first and in the second half of an
// entry are made once for a vector of groups (at most 81 and 64 combinations). Entries with the same first half follow
// each other, so that one addition, one mask and one minimum are left for an entry. Four vectors of groups at a time
// (AVX2: two); the table of second halves takes up to 21 KB of the stack and stays in the L1 cache.
#include <cstdint>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {
namespace {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of groups in one pass
constexpr int64_t kWide = kVectors * kLanes;    // groups in one pass
constexpr int kMaxHalves = 256;                 // bits of half an entry: 4 times 2, or 2 times 3

typedef int32_t VecIU __attribute__((vector_size(kLanes * 4), aligned(4)));

inline VecI smaller(VecI a, VecI b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_min_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_min_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a < b ? a : b;
#endif
}

struct Entry {
  int32_t index, second;  // `second`: where its second half stands in the table
};

struct Grid {
  int d, bits;
  std::vector<int> halves[2];               // the levels of each half that occurs
  std::vector<std::vector<Entry>> entries;  // by first half
};

Grid prepared(const uint16_t* words, int64_t count, int d, int bits) {
  Grid grid{d, bits};
  const int half_bits = bits * d / 2;
  int slot[2][kMaxHalves];
  for (auto& side : slot)
    for (int& s : side) s = -1;
  for (int64_t e = 0; e < count; ++e) {
    int at[2];
    for (int side = 0; side < 2; ++side) {
      const int half = words[e] >> (side * half_bits) & ((1 << half_bits) - 1);
      if (slot[side][half] < 0) {
        slot[side][half] = static_cast<int>(grid.halves[side].size());
        grid.halves[side].push_back(half);
      }
      at[side] = slot[side][half];
    }
    grid.entries.resize(grid.halves[0].size());
    grid.entries[at[0]].push_back({static_cast<int32_t>(e), at[1]});
  }
  return grid;
}

// The groups [at, at + kWide).
void one_pass(const Grid& grid, const float* costs, int64_t groups, int64_t at, int32_t low_bits, int32_t* result) {
  const int count = grid.d / 2, mask = (1 << grid.bits) - 1;
  const auto half_sum = [&](int side, int half, int v) {
    const auto cost = [&](int i) {
      const int level = half >> (i * grid.bits) & mask;
      return load(costs + (static_cast<int64_t>(level) * grid.d + side * count + i) * groups + at + v * kLanes);
    };
    const VecF sum = cost(0) + cost(1);
    return count == 4 ? sum + (cost(2) + cost(3)) : sum;
  };
  VecF second[kMaxHalves / 2][kVectors];
  for (size_t h = 0; h < grid.halves[1].size(); ++h)
    for (int v = 0; v < kVectors; ++v) second[h][v] = half_sum(1, grid.halves[1][h], v);
  VecI best[kVectors];
  for (VecI& b : best) b = VecI{} + INT32_MAX;
  for (size_t h = 0; h < grid.halves[0].size(); ++h) {
    VecF first[kVectors];
    for (int v = 0; v < kVectors; ++v) first[v] = half_sum(0, grid.halves[0][h], v);
    for (const Entry entry : grid.entries[h]) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const VecI sum = reinterpret_cast<VecI>(first[v] + second[entry.second][v]);
        best[v] = smaller((sum & ~low_bits) | entry.index, best[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<VecIU*>(result + at + v * kLanes) = best[v];
}

ffi::Error NearestEntry(ffi::Buffer<ffi::F32> costs, ffi::Buffer<ffi::U16> words, ffi::ResultBuffer<ffi::S32> result,
                        int64_t bits) {
  const auto dims = costs.dimensions();
  const int64_t entries = static_cast<int64_t>(words.element_count());
  if (dims.size() != 3 || (dims[1] != 4 && dims[1] != 8) || dims[0] > (1 << bits) || bits * dims[1] > 16 ||
      static_cast<int64_t>(result->element_count()) != dims[2])
    return ffi::Error::InvalidArgument("nearest_entry: costs must be [levels, 4 or 8, G] and the result [G]");
  if (entries == 0 || (entries & (entries - 1)) != 0)
    return ffi::Error::InvalidArgument("nearest_entry: the entries must be a power of two");
  const int levels = static_cast<int>(dims[0]), d = static_cast<int>(dims[1]);
  const Grid grid = prepared(words.typed_data(), entries, d, static_cast<int>(bits));
  for (int side = 0; side < 2; ++side) {
    if (grid.halves[side].size() > kMaxHalves / 2)
      return ffi::Error::InvalidArgument("nearest_entry: too many different halves of entries");
    for (int half : grid.halves[side])
      for (int i = 0; i < d / 2; ++i)
        if ((half >> (i * bits) & ((1 << bits) - 1)) >= levels)
          return ffi::Error::InvalidArgument("nearest_entry: an entry names a level that costs do not have");
  }
  const int64_t groups = dims[2];
  const int32_t low_bits = static_cast<int32_t>(entries - 1);
  const float* in = costs.typed_data();
  int32_t* out = result->typed_data();
  if (groups < kWide) {  // padded to one pass
    std::vector<float> padded(levels * d * kWide, 0.0f);
    int32_t found[kWide];
    for (int64_t row = 0; row < levels * d; ++row)
      for (int64_t g = 0; g < groups; ++g) padded[row * kWide + g] = in[row * groups + g];
    one_pass(grid, padded.data(), kWide, 0, low_bits, found);
    for (int64_t g = 0; g < groups; ++g) out[g] = found[g];
    return ffi::Error::Success();
  }
  for (int64_t at = 0; at < groups; at += kWide)  // the last pass begins within the one before
    one_pass(grid, in, groups, at + kWide <= groups ? at : groups - kWide, low_bits, out);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tc

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_nearest_entry, tc::NearestEntry,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("bits"));
