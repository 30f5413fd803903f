// What all kernels on codes share: packing two INT4 codes into a byte, the even one in the low
// half.
#pragma once

#include "simd.h"

namespace bkcore {
namespace {

BKCORE_INLINE void unpack(const std::uint8_t *packed, Index count, std::int8_t *codes) {
  Index h = 0;
#if defined(__AVX2__)
  for (; h + 16 <= count; h += 16) {
    const __m128i bytes =
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed + h / 2)));
    const __m128i spread = _mm_or_si128(bytes, _mm_slli_epi16(bytes, 4));
    const __m128i nibbles = _mm_and_si128(spread, _mm_set1_epi8(0x0F));
    const __m128i sign = _mm_set1_epi8(8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + h),
                     _mm_sub_epi8(_mm_xor_si128(nibbles, sign), sign));
  }
#elif defined(__aarch64__)
  for (; h + 16 <= count; h += 16) {
    const uint8x8_t bytes = vld1_u8(packed + h / 2);
    const uint8x8_t even = vand_u8(bytes, vdup_n_u8(0x0F)), odd = vshr_n_u8(bytes, 4);
    const uint8x16_t nibbles = vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
    const int8x16_t sign = vdupq_n_s8(8);
    vst1q_s8(codes + h, vsubq_s8(veorq_s8(vreinterpretq_s8_u8(nibbles), sign), sign));
  }
#endif
  for (; h < count; ++h) {
    const int nibble = packed[h / 2] >> (h % 2 * 4) & 0xF;
    codes[h] = static_cast<std::int8_t>((nibble ^ 8) - 8);
  }
}

BKCORE_INLINE void pack(const std::int8_t *codes, Index count, std::uint8_t *packed) {
  Index h = 0;
#if defined(__AVX2__)
  for (; h + 16 <= count; h += 16) {
    const __m128i nibbles = _mm_and_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + h)), _mm_set1_epi8(0x0F));
    const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(packed + h / 2), _mm_packus_epi16(pairs, pairs));
  }
#elif defined(__aarch64__)
  for (; h + 16 <= count; h += 16) {
    const int8x16_t nibbles = vandq_s8(vld1q_s8(codes + h), vdupq_n_s8(0x0F));
    const uint16x8_t pairs = vreinterpretq_u16_s8(nibbles);
    vst1_u8(packed + h / 2, vmovn_u16(vorrq_u16(pairs, vshrq_n_u16(pairs, 4))));
  }
#endif
  for (; h < count; h += 2) {
    const int high = h + 1 < count ? codes[h + 1] & 0xF : 0;
    packed[h / 2] = static_cast<std::uint8_t>((codes[h] & 0xF) | high << 4);
  }
}

}  // namespace
}  // namespace bkcore
