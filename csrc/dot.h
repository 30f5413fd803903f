// Sums of products of codes in int32, with the instructions that each instruction set offers.
#pragma once

#include <cstring>

#include "scales.h"

namespace bkcore {
namespace {

using Word = std::uint32_t;
// A code in memory that is also read as words.
using Int16 = std::int16_t __attribute__((may_alias));

// The first n bytes from p on; the others are 0.
template <class Bytes>
BKCORE_INLINE Bytes first_bytes(const std::uint8_t *p, Index n) {
  Bytes x = {};
  std::memcpy(&x, p, n);
  return x;
}

// `Dot` wraps these instructions: vectors V of `lanes` int32 sums, to each of which the products of
// `depth` neighbouring codes are added at once. `offset` is added to the weights beforehand.
// A panel of a weight is multiplied with `rows` rows and `vectors` vectors of outputs at a time.
// Without a panel there are `outputs` outputs at a time. Then Bytes are what is in memory of a
// weight: `codes` makes one vector of 8-bit codes, `even` and `odd` two of packed 4-bit ones.
#if defined(__AVX512VNNI__)

struct Dot {
  using V = __m512i;
  using Bytes = __m512i;
  using Activation = std::int8_t;
  static constexpr int lanes = 16, depth = 4, offset = 128, vectors = 4, rows = 6, outputs = 16;
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
  // Lane i of the result is the sum of all lanes of sum[i].
  static BKCORE_INLINE V lane_sums(V *sum) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      sum[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[2 * i], sum[2 * i + 1]),
                                _mm512_unpackhi_epi32(sum[2 * i], sum[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      sum[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(sum[2 * i], sum[2 * i + 1]),
                                _mm512_unpackhi_epi64(sum[2 * i], sum[2 * i + 1]));
    const auto halved = [](V a, V b) {
      return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    return halved(halved(sum[0], sum[1]), halved(sum[2], sum[3]));
  }
  static BKCORE_INLINE Bytes bytes(const std::uint8_t *p) { return _mm512_loadu_si512(p); }
  // The first n; the others are 0.
  static BKCORE_INLINE Bytes bytes(const std::uint8_t *p, Index n) {
    return _mm512_maskz_loadu_epi8((std::uint64_t{1} << n) - 1, p);
  }
  static BKCORE_INLINE V codes(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  static BKCORE_INLINE V even(Bytes packed) { return level(packed); }
  static BKCORE_INLINE V odd(Bytes packed) { return level(_mm512_srli_epi16(packed, 4)); }
  // The levels plus 128 of the low halves of bytes.
  static BKCORE_INLINE V level(Bytes x) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kLevelOfNibble.of));
    const V all = codes(_mm512_broadcast_i32x4(table));
    return _mm512_shuffle_epi8(all, _mm512_and_si512(x, _mm512_set1_epi8(0x0F)));
  }
};

#elif defined(__AVX2__)

struct Dot {
  using V = __m256i;
  using Bytes = __m128i;
  using Activation = Int16;
  static constexpr int lanes = 8, depth = 2, offset = 0, vectors = 2, rows = 4, outputs = 8;
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
  static BKCORE_INLINE V lane_sums(const V *sum) {
    const auto four = [](const V *s) {
      return _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    };
    const V low = four(sum), high = four(sum + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
  }
  static BKCORE_INLINE Bytes bytes(const std::uint8_t *p, Index n = sizeof(Bytes)) {
    return first_bytes<Bytes>(p, n);
  }
  static BKCORE_INLINE V codes(Bytes x) { return _mm256_cvtepi8_epi16(x); }
  static BKCORE_INLINE V even(Bytes packed) { return level(packed); }
  static BKCORE_INLINE V odd(Bytes packed) { return level(_mm_srli_epi16(packed, 4)); }
  // The levels of the low halves of bytes.
  static BKCORE_INLINE V level(Bytes x) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kLevelOfNibble.of));
    return codes(_mm_shuffle_epi8(table, _mm_and_si128(x, _mm_set1_epi8(0x0F))));
  }
};

#elif defined(__aarch64__)

struct Dot {
  using V = int32x4_t;
  using Bytes = uint8x16_t;
  using Activation = std::int8_t;
  static constexpr int lanes = 4, depth = 4, offset = 0, vectors = 4, rows = 4, outputs = 8;
  static BKCORE_INLINE V load(const Word *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static BKCORE_INLINE void store(void *p, V x) { std::memcpy(p, &x, sizeof x); }
  static BKCORE_INLINE V everywhere(Word x) { return vreinterpretq_s32_u32(vdupq_n_u32(x)); }
  static BKCORE_INLINE V add(V sum, V weight, V x) {
    const int8x16_t a = vreinterpretq_s8_s32(weight), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    // Activations are at least -127, so that two products fit into 16 bits.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
  }
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    if constexpr (bit == 1) {
      const V first = vtrn1q_s32(a, b);
      b = vtrn2q_s32(a, b);
      a = first;
    } else {
      const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
      a = vreinterpretq_s32_s64(vtrn1q_s64(x, y));
      b = vreinterpretq_s32_s64(vtrn2q_s64(x, y));
    }
  }
  static BKCORE_INLINE V lane_sums(const V *sum) {
    return vpaddq_s32(vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3]));
  }
  static BKCORE_INLINE Bytes bytes(const std::uint8_t *p, Index n = sizeof(Bytes)) {
    return first_bytes<Bytes>(p, n);
  }
  static BKCORE_INLINE V codes(Bytes x) { return vreinterpretq_s32_u8(x); }
  static BKCORE_INLINE V even(Bytes packed) { return level(vandq_u8(packed, vdupq_n_u8(0x0F))); }
  static BKCORE_INLINE V odd(Bytes packed) { return level(vshrq_n_u8(packed, 4)); }
  static BKCORE_INLINE V level(uint8x16_t nibbles) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(kLevelOfNibble.of), nibbles));
  }
};

#else

struct Dot {
  struct V {
    std::int32_t of[4];
  };
  struct Bytes {
    std::uint8_t of[8];
  };
  using Activation = Int16;
  static constexpr int lanes = 4, depth = 2, offset = 0, vectors = 2, rows = 2, outputs = 4;
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
  static BKCORE_INLINE V lane_sums(const V *sum) {
    V all;
    for (int l = 0; l < lanes; ++l)
      all.of[l] = sum[l].of[0] + sum[l].of[1] + sum[l].of[2] + sum[l].of[3];
    return all;
  }
  static BKCORE_INLINE Bytes bytes(const std::uint8_t *p, Index n = sizeof(Bytes)) {
    return first_bytes<Bytes>(p, n);
  }
  static BKCORE_INLINE V codes(Bytes x) {
    return widened(x, [](std::uint8_t byte) { return static_cast<std::int8_t>(byte); });
  }
  static BKCORE_INLINE V even(Bytes packed) {
    return widened(packed, [](std::uint8_t byte) { return kLevelOfNibble.of[byte & 0x0F]; });
  }
  static BKCORE_INLINE V odd(Bytes packed) {
    return widened(packed, [](std::uint8_t byte) { return kLevelOfNibble.of[byte >> 4]; });
  }
  template <class Value>
  static BKCORE_INLINE V widened(Bytes x, const Value &value) {
    std::int16_t all[8];
    for (int k = 0; k < 8; ++k) all[k] = value(x.of[k]);
    V out;
    std::memcpy(&out, all, sizeof out);
    return out;
  }
};

#endif

}  // namespace
}  // namespace bkcore
