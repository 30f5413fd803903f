// Floats of 16 bits, by integers: the result does not depend on whether subnormal numbers are kept.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace bkcore {
namespace {

BKCORE_INLINE float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BKCORE_INLINE float from_bfloat16(std::uint16_t x) { return float_of_bits(std::uint32_t{x} << 16); }

BKCORE_INLINE float from_float16(std::uint16_t x) {
  const std::uint32_t sign = (x & 0x8000u) << 16, fraction = x & 0x3FFu, rest = (x & 0x7FFFu) << 13;
  // Exponents have a bias of 15 in float16 and of 127 in float.
  if (x & 0x7C00u) return float_of_bits(sign | (rest + ((rest < 0x0F800000u ? 112u : 224u) << 23)));
  if (fraction == 0) return float_of_bits(sign);
  // A subnormal number is its fraction times 2^-24.
  const auto whole = static_cast<float>(fraction);
  std::uint32_t bits;
  std::memcpy(&bits, &whole, sizeof bits);
  return float_of_bits(sign | (bits - (24u << 23)));
}

}  // namespace
}  // namespace bkcore
