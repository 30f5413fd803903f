// Sums of products of codes in int32, with the instructions that each instruction set offers.
#pragma once

#include <cstring>

#include "simd.h"

namespace bkcore {
namespace {

using Word = std::uint32_t;

// `Dot` wraps these instructions: vectors of `lanes` int32 sums, to each of which the products of
// `depth` neighbouring codes are added at once. `offset` is added to the weights beforehand.
#if defined(__AVX512VNNI__)

struct Dot {
  using V = __m512i;
  using Activation = std::int8_t;
  using Weight = std::uint8_t;
  static constexpr int lanes = 16, depth = 4, offset = 128, vectors = 4, rows = 6;
  static BKCORE_INLINE V load(const Word *p) { return _mm512_loadu_si512(p); }
  static BKCORE_INLINE void store(void *p, V x) { _mm512_storeu_si512(p, x); }
  static BKCORE_INLINE V everywhere(Word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static BKCORE_INLINE V add(V sum, V weight, V x) { return _mm512_dpbusd_epi32(sum, weight, x); }
  // Exchanges the lanes of a whose index has `bit` set with the lanes of b whose index has not.
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    const V lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const V other = _mm512_xor_si512(lane, _mm512_set1_epi32(bit));
    const __mmask16 high = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    const V first = _mm512_mask_permutexvar_epi32(a, high, other, b);
    b = _mm512_mask_permutexvar_epi32(b, static_cast<__mmask16>(~high), other, a);
    a = first;
  }
};

#elif defined(__AVX2__)

struct Dot {
  using V = __m256i;
  using Activation = std::int16_t;
  using Weight = std::int16_t;
  static constexpr int lanes = 8, depth = 2, offset = 0, vectors = 2, rows = 4;
  static BKCORE_INLINE V load(const Word *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  }
  static BKCORE_INLINE void store(void *p, V x) {
    _mm256_storeu_si256(static_cast<__m256i *>(p), x);
  }
  static BKCORE_INLINE V everywhere(Word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  // Pairs of 8-bit codes would overflow the 16 bits of _mm256_maddubs_epi16.
  static BKCORE_INLINE V add(V sum, V weight, V x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x));
  }
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    constexpr int high = bit == 1 ? 0xAA : bit == 2 ? 0xCC : 0xF0;
    const V lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const V other = _mm256_xor_si256(lane, _mm256_set1_epi32(bit));
    const V first = _mm256_blend_epi32(a, _mm256_permutevar8x32_epi32(b, other), high);
    b = _mm256_blend_epi32(b, _mm256_permutevar8x32_epi32(a, other), ~high & 0xFF);
    a = first;
  }
};

#else

struct Dot {
  struct V {
    std::int32_t of[4];
  };
  using Activation = std::int16_t;
  using Weight = std::int16_t;
  static constexpr int lanes = 4, depth = 2, offset = 0, vectors = 2, rows = 2;
  static BKCORE_INLINE V load(const Word *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static BKCORE_INLINE void store(void *p, V x) { std::memcpy(p, &x, sizeof x); }
  static BKCORE_INLINE V everywhere(Word x) {
    const auto value = static_cast<std::int32_t>(x);
    return {{value, value, value, value}};
  }
  static BKCORE_INLINE V add(V sum, V weight, V x) {
    std::int16_t w[8], codes[8];
    std::memcpy(w, &weight, sizeof w);
    std::memcpy(codes, &x, sizeof codes);
    for (int l = 0; l < lanes; ++l)
      sum.of[l] += w[2 * l] * codes[2 * l] + w[2 * l + 1] * codes[2 * l + 1];
    return sum;
  }
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    for (int l = 0; l < lanes; ++l)
      if (l & bit) {
        const std::int32_t kept = a.of[l];
        a.of[l] = b.of[l ^ bit];
        b.of[l ^ bit] = kept;
      }
  }
};

#endif

}  // namespace
}  // namespace bkcore
