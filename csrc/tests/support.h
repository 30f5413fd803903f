// What the tests of all operators share.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace bkcore {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The unit round-off.
template <class T>
constexpr double kUnit = std::numeric_limits<T>::epsilon() / 2;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  Index integer(Index low, Index high) {
    return std::uniform_int_distribution<Index>(low, high)(engine_);
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

// Calls a function with every instruction set that this processor has.
template <class Work>
void for_isas(const Work &work) {
  for (const Isa &isa : isas()) {
    CAPTURE(isa.name);
    work(isa);
  }
}

// The largest difference between two rows of numbers. It is infinite if NaN or infinity is in one
// row and not in the same place of the other.
template <class Got, class Want>
double distance(const Got &got, const Want &want) {
  REQUIRE(got.size() == want.size());
  double worst = 0;
  for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
    const double x = static_cast<double>(got[i]), y = static_cast<double>(want[i]);
    if (x == y || (x != x && y != y)) continue;
    const double off = std::abs(x - y);
    worst = off <= std::numeric_limits<double>::max() ? std::max(worst, off) : kInfinity;
    if (worst == kInfinity) return worst;
  }
  return worst;
}

// Whether two rows of numbers are equal to the bit; any NaN equals any NaN.
template <class T>
bool same_bits(const Buffer<T> &a, const Buffer<T> &b) {
  if (a.size() != b.size()) return false;
  for (Index i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(T)) && !(a[i] != a[i] && b[i] != b[i])) return false;
  return true;
}

// The 16 bits of x as bfloat16, rounded towards 0.
inline std::uint16_t bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}
inline float from_bits(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Index groups_of(Index size, Index group_size) {
  return (size + group_size - 1) / group_size;
}

// Codes of one row, one or two per byte, the even one in the low half.
inline int code_at(const std::uint8_t *row, Index i, Index bits) {
  if (bits == 8) return static_cast<std::int8_t>(row[i]);
  const int nibble = row[i / 2] >> (i % 2 * 4) & 0xF;
  return nibble < 8 ? nibble : nibble - 16;
}

}  // namespace
}  // namespace bkcore
