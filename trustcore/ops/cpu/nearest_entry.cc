// Which entry of a grid costs least: the inner loop of the encoders of GGUF's IQ formats.
//
//     index[g] = argmin over entries e of sum over i of costs[level i of e][i][g]
//
// Operands: costs float32 [levels, d, G], not negative, d = 4 or 8 weights of an entry; grid uint16 [entries], level i of
// an entry in `bits` bits from i * bits on. Results: the index, int32 [G], and its cost, float32 [G]. The sums are those
// of trustcore/quant/encode/nearest_entry.py, which is the oracle, in the same order: additions alone, hence the same
// bits.
//
// Entries share halves: the sums of every combination of levels that occurs in the first and in the second half of an
// entry are made once for a vector of groups (at most 81 and 64 combinations). Those of second halves carry their number
// in the lowest bits; of the entries with the same first half the best is then one minimum of integers for each, and one
// addition and one comparison for all. Four vectors of groups at a time (AVX2: two); the table of second halves takes up
// to 21 KB of the stack and stays in the L1 cache.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <list>
#include <mutex>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tc {
namespace {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of groups in one pass
constexpr int64_t kWide = kVectors * kLanes;    // groups in one pass
constexpr int kMaxHalves = 128;                 // combinations of levels in half an entry
constexpr int kMaxCosts = 32;                   // levels times weights of an entry: 4 times 8, or 8 times 4
constexpr int32_t kNumber = kMaxHalves - 1;     // the lowest bits of a sum, where the number of its half stands

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

struct Grid {
  int d, bits;
  std::vector<int> halves[2];             // the levels of each half that occurs, in order
  std::vector<std::vector<int>> seconds;  // of each first half, the second halves that follow it, in order
  std::vector<int32_t> index;             // of the entry with a first and a second half: [firsts, kMaxHalves]
};

Grid prepared(const uint16_t* words, int64_t count, int d, int bits) {
  Grid grid{d, bits};
  const int half_bits = bits * d / 2, mask = (1 << half_bits) - 1;
  int number[2][1 << 8];
  for (int side = 0; side < 2; ++side) {
    std::vector<int>& halves = grid.halves[side];
    for (int64_t e = 0; e < count; ++e) halves.push_back(words[e] >> (side * half_bits) & mask);
    std::sort(halves.begin(), halves.end());
    halves.erase(std::unique(halves.begin(), halves.end()), halves.end());
    for (size_t h = 0; h < halves.size(); ++h) number[side][halves[h]] = static_cast<int>(h);
  }
  grid.seconds.resize(grid.halves[0].size());
  grid.index.assign(grid.halves[0].size() * kMaxHalves, 0);
  for (int64_t e = 0; e < count; ++e) {
    const int first = number[0][words[e] & mask], second = number[1][words[e] >> half_bits & mask];
    grid.seconds[first].push_back(second);
    if (second < kMaxHalves) grid.index[first * kMaxHalves + second] = static_cast<int32_t>(e);
  }
  for (std::vector<int>& seconds : grid.seconds) std::sort(seconds.begin(), seconds.end());
  return grid;
}

// Grids are few and prepared once: that takes as long as a thousand groups.
const Grid& prepared_once(const uint16_t* words, int64_t count, int d, int bits) {
  struct Known {
    std::vector<uint16_t> words;
    Grid grid;
  };
  static std::mutex mutex;
  static std::list<Known>* known = new std::list<Known>();  // never destroyed: XLA's threads may outlive it
  std::lock_guard<std::mutex> lock(mutex);
  for (const Known& one : *known)
    if (one.grid.d == d && one.grid.bits == bits && static_cast<int64_t>(one.words.size()) == count &&
        std::equal(words, words + count, one.words.begin()))
      return one.grid;
  known->push_back({std::vector<uint16_t>(words, words + count), prepared(words, count, d, bits)});
  return known->back().grid;
}

// The groups [at, at + kWide).
void one_pass(const Grid& grid, const float* costs, int levels, int64_t groups, int64_t at, int32_t* index,
              float* cost) {
  const int count = grid.d / 2, mask = (1 << grid.bits) - 1;
  VecF own[kMaxCosts][kVectors];  // rows of costs lie a power of two apart, where the cache would hold only a few
  for (int row = 0; row < levels * grid.d; ++row)
    for (int v = 0; v < kVectors; ++v) own[row][v] = load(costs + row * groups + at + v * kLanes);
  const auto half_sum = [&](int side, int half, int v) {
    const auto part = [&](int i) { return own[(half >> (i * grid.bits) & mask) * grid.d + side * count + i][v]; };
    const VecF sum = part(0) + part(1);
    return count == 4 ? sum + (part(2) + part(3)) : sum;
  };
  VecI second[kMaxHalves][kVectors];
  for (size_t h = 0; h < grid.halves[1].size(); ++h)
    for (int v = 0; v < kVectors; ++v)
      second[h][v] = (reinterpret_cast<VecI>(half_sum(1, grid.halves[1][h], v)) & ~kNumber) | static_cast<int32_t>(h);
  VecF least[kVectors];
  VecI kept[kVectors];
  for (int v = 0; v < kVectors; ++v) least[v] = splat(INFINITY), kept[v] = VecI{};
  for (size_t h = 0; h < grid.halves[0].size(); ++h) {
    VecI best[kVectors];
    for (VecI& b : best) b = VecI{} + INT32_MAX;
    for (const int s : grid.seconds[h]) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) best[v] = smaller(second[s][v], best[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const VecF sum = half_sum(0, grid.halves[0][h], v) + reinterpret_cast<VecF>(best[v] & ~kNumber);
      const auto better = sum < least[v];
      least[v] = better ? sum : least[v];
      kept[v] = better ? (best[v] & kNumber) + static_cast<int32_t>(h * kMaxHalves) : kept[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(cost + at + v * kLanes, least[v]);
    *reinterpret_cast<VecIU*>(index + at + v * kLanes) = gather(grid.index.data(), kept[v]);
  }
}

ffi::Error NearestEntry(ffi::Buffer<ffi::F32> costs, ffi::Buffer<ffi::U16> words, ffi::ResultBuffer<ffi::S32> index,
                        ffi::ResultBuffer<ffi::F32> cost, int64_t bits) {
  const auto dims = costs.dimensions();
  if (dims.size() != 3 || (dims[1] != 4 && dims[1] != 8) || dims[0] > (1 << bits) || bits * dims[1] > 16 ||
      static_cast<int64_t>(index->element_count()) != dims[2] || static_cast<int64_t>(cost->element_count()) != dims[2])
    return ffi::Error::InvalidArgument("nearest_entry: costs must be [levels, 4 or 8, G] and the results [G]");
  if (words.element_count() == 0) return ffi::Error::InvalidArgument("nearest_entry: the grid has no entry");
  const int levels = static_cast<int>(dims[0]), d = static_cast<int>(dims[1]);
  const Grid& grid = prepared_once(words.typed_data(), words.element_count(), d, static_cast<int>(bits));
  for (const auto& halves : grid.halves) {
    if (halves.size() > kMaxHalves)
      return ffi::Error::InvalidArgument("nearest_entry: too many different halves of entries");
    for (int half : halves)
      for (int i = 0; i < d / 2; ++i)
        if ((half >> (i * bits) & ((1 << bits) - 1)) >= levels)
          return ffi::Error::InvalidArgument("nearest_entry: an entry names a level that costs do not have");
  }
  const int64_t groups = dims[2];
  const float* in = costs.typed_data();
  if (groups < kWide) {  // padded to one pass
    std::vector<float> padded(levels * d * kWide, 0.0f);
    int32_t found[kWide];
    float least[kWide];
    for (int64_t row = 0; row < levels * d; ++row)
      for (int64_t g = 0; g < groups; ++g) padded[row * kWide + g] = in[row * groups + g];
    one_pass(grid, padded.data(), levels, kWide, 0, found, least);
    std::copy_n(found, groups, index->typed_data());
    std::copy_n(least, groups, cost->typed_data());
    return ffi::Error::Success();
  }
  for (int64_t at = 0; at < groups; at += kWide)  // the last pass begins within the one before
    one_pass(grid, in, levels, groups, std::min(at, groups - kWide), index->typed_data(), cost->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tc

XLA_FFI_DEFINE_HANDLER_SYMBOL(trustcore_nearest_entry, tc::NearestEntry,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));
