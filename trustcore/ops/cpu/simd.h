// One vector of floats, as wide as the machine's registers, and the few conversions that packed weights need.
//
// The arithmetic is written in the compiler's portable vector types, so one source serves AVX-512, AVX2 and NEON;
// only conversions, extremes, rounding and the 16-entry table look-up name instructions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace tc {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef float VecFU __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int8_t SBytes __attribute__((vector_size(kLanes), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(1)));

inline VecF load(const float* p) { return *reinterpret_cast<const VecFU*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecFU*>(p) = v; }
inline VecF splat(float x) { return x - VecF{}; }

// Bytes to 32-bit lanes. Named instructions: compilers turn the portable conversion into one insertion for each lane.
inline VecI widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), VecI);
#endif
}

inline VecI widen(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const SBytes*>(p), VecI);
#endif
}

inline VecU widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), VecU);
#endif
}

inline VecI load32(const uint32_t* p) {
  VecI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// table[index] of each lane.
inline VecI gather(const int32_t* table, VecI index) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_i32gather_epi32(reinterpret_cast<__m512i>(index), table, 4));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_i32gather_epi32(table, reinterpret_cast<__m256i>(index), 4));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i]];
  return v;
#endif
}

inline VecF to_float(VecI v) { return __builtin_convertvector(v, VecF); }
inline VecF bits_to_float(VecU v) { return reinterpret_cast<VecF>(v); }

inline VecF from_bfloat16(const uint16_t* p) { return bits_to_float(widen(p) << 16); }

inline float scalar_from_bfloat16(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float scalar_from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  __fp16 f;  // Arm's own half type
  std::memcpy(&f, &h, 2);
  return static_cast<float>(f);
#endif
}

inline VecF from_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = scalar_from_half(p[i]);
  return v;
#endif
}

// The low four bits of each lane as a float from 0 to 15.
inline VecF low_nibble(VecI v) {
#if defined(__AVX512F__)
  // A table look-up reads only the low four bits of its index: one instruction instead of mask and conversion.
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return reinterpret_cast<VecF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(v), table));
#else
  return to_float(v & 15);
#endif
}

// Bits 4 to 7 of each lane, where no higher bit is set, as a float from 0 to 15.
inline VecF high_nibble(VecI v) {
#if defined(__AVX512F__)
  return low_nibble(v >> 4);
#else
  return to_float(v >> 4);
#endif
}

// table[the low four bits of each lane]
inline VecF pick16(VecI v, const float* table) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(v), _mm512_loadu_ps(table)));
#else
  VecF picked;
  for (int i = 0; i < kLanes; ++i) picked[i] = table[v[i] & 15];
  return picked;
#endif
}

// ---- what encoders need --------------------------------------------------------------------------------------------

// Named instructions: of a comparison and a choice, which the portable form is, compilers make two.
inline VecF vmin(VecF a, VecF b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<VecF>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

inline VecF vmax(VecF a, VecF b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<VecF>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

inline VecU larger(VecU a, VecU b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_max_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_max_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

// Whether any lane of a comparison holds.
inline bool any(VecI v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(v)) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(v)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= v[i];
  return all != 0;
#endif
}

inline VecF vabs(VecF v) { return bits_to_float(reinterpret_cast<VecU>(v) & 0x7FFFFFFFu); }

// To the nearest whole number, ties to even.
inline VecF vround(VecF v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_roundscale_ps(reinterpret_cast<__m512>(v), 8));
#elif defined(__AVX__)
  return reinterpret_cast<VecF>(_mm256_round_ps(reinterpret_cast<__m256>(v), 8));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_roundevenf(v[i]);
  return v;
#endif
}

// Whole numbers to integers.
inline VecI to_int(VecF v) { return __builtin_convertvector(v, VecI); }

// To the nearest integers, ties to even.
inline VecI to_nearest(VecF v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<VecI>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(v)));
#else
  return to_int(vround(v));
#endif
}

// The low byte of each lane.
inline void narrow(VecI v, uint8_t* p) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// The low half of each lane.
inline void narrow16(VecI v, uint16_t* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(v[i]);
#endif
}

// To halves: nearest, ties to even.
inline void to_half(VecF v, uint16_t* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 8));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 8));
#else
  for (int i = 0; i < kLanes; ++i) {
    const __fp16 half = static_cast<__fp16>(v[i]);
    std::memcpy(p + i, &half, 2);
  }
#endif
}

}  // namespace tc
