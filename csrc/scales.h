// Scales and levels, shared by products of codes and roundings.
#pragma once

#include <cstring>

#include "halves.h"
#include "packing.h"

namespace bkcore {
namespace {

constexpr float kSmallest = 1.17549435e-38f;  // normal number

// The values of the codes -8 to 7 of a 4-bit weight (src/bkcore/kernels/int4_levels.py).
constexpr int kLevels = 16;
alignas(16) constexpr std::int8_t kLevel[kLevels] = {-127, -102, -81, -63, -47, -34, -22, -11,
                                                     0,    12,   25,  40,  56,  75,  99,  127};

// The same by the four bits of a code: those of 0 to 7, then of -8 to -1.
struct LevelOfNibble {
  alignas(16) std::int8_t of[kLevels];
};
constexpr LevelOfNibble level_of_nibble() {
  LevelOfNibble table{};
  for (int i = 0; i < kLevels; ++i) table.of[i] = kLevel[i ^ 8];
  return table;
}
constexpr LevelOfNibble kLevelOfNibble = level_of_nibble();

// Converts 4-bit codes to their values.
BKCORE_INLINE void look_up(std::int8_t *codes, Index count) {
  Index k = 0;
#if defined(__AVX2__)
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i *>(kLevel));
  for (; k + 16 <= count; k += 16) {
    auto *place = reinterpret_cast<__m128i *>(codes + k);
    const __m128i number = _mm_add_epi8(_mm_loadu_si128(place), _mm_set1_epi8(8));
    _mm_storeu_si128(place, _mm_shuffle_epi8(table, number));
  }
#elif defined(__aarch64__)
  const int8x16_t table = vld1q_s8(kLevel);
  for (; k + 16 <= count; k += 16) {
    const int8x16_t number = vaddq_s8(vld1q_s8(codes + k), vdupq_n_s8(8));
    vst1q_s8(codes + k, vqtbl1q_s8(table, vreinterpretq_u8_s8(number)));
  }
#endif
  for (; k < count; ++k) codes[k] = kLevel[codes[k] + 8];
}

Index round_up(Index a, Index b) { return (a + b - 1) / b * b; }

// The scale of a row of activations, and the bits of its largest absolute value.
BKCORE_INLINE float row_scale(const float *x, Index count, std::uint32_t &bits) {
  // Read as integers, absolute values keep their order, and NaN comes after infinity.
  bits = 0;
  for (Index i = 0; i < count; ++i) {
    std::uint32_t one;
    std::memcpy(&one, x + i, sizeof one);
    one &= 0x7FFFFFFFu;
    bits = one > bits ? one : bits;
  }
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  scale /= 127.0f;
  return scale < kSmallest ? 1.0f : scale;
}

}  // namespace
}  // namespace bkcore
