// What all kernels on codes share: rounding numbers to codes, and packing two INT4 codes into a
// byte, the even one in the low half.
#pragma once

#include "simd.h"

namespace bkcore {
namespace {

#if defined(__AVX512F__) || defined(__AVX2__)
#define BKCORE_VECTOR_CODES 1
#endif

// 1.5 * 2^23: adding it to a small number rounds the number to an integer, ties to even, which is
// then in the low bits of the sum.
constexpr float kRound = 12582912.0f;

BKCORE_INLINE void unpack(const std::uint8_t *packed, Index count, std::int8_t *codes) {
  Index h = 0;
#ifdef BKCORE_VECTOR_CODES
  for (; h + 16 <= count; h += 16) {
    const __m128i bytes =
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed + h / 2)));
    const __m128i spread = _mm_or_si128(bytes, _mm_slli_epi16(bytes, 4));
    const __m128i nibbles = _mm_and_si128(spread, _mm_set1_epi8(0x0F));
    const __m128i sign = _mm_set1_epi8(8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + h),
                     _mm_sub_epi8(_mm_xor_si128(nibbles, sign), sign));
  }
#endif
  for (; h < count; ++h) {
    const int nibble = packed[h / 2] >> (h % 2 * 4) & 0xF;
    codes[h] = static_cast<std::int8_t>((nibble ^ 8) - 8);
  }
}

BKCORE_INLINE void pack(const std::int8_t *codes, Index count, std::uint8_t *packed) {
  Index h = 0;
#ifdef BKCORE_VECTOR_CODES
  for (; h + 16 <= count; h += 16) {
    const __m128i nibbles = _mm_and_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + h)), _mm_set1_epi8(0x0F));
    const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(packed + h / 2), _mm_packus_epi16(pairs, pairs));
  }
#endif
  for (; h < count; h += 2) {
    const int high = h + 1 < count ? codes[h + 1] & 0xF : 0;
    packed[h / 2] = static_cast<std::uint8_t>((codes[h] & 0xF) | high << 4);
  }
}

}  // namespace
}  // namespace bkcore
