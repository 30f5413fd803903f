// Rounding to codes and back in plain C++, one number at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "support.h"

namespace bkcore {
namespace {

// How numbers become codes of some bits: evenly spaced, or the nearest of `levels` (2^bits).
struct Codes {
  Index bits;
  float scale, zero;
  std::vector<float> levels;

  int half() const { return 1 << (bits - 1); }
  float level(int code) const {
    return levels.empty() ? static_cast<float>(code) : levels[code + half()];
  }
  float decode(int code) const { return scale * (level(code) - zero); }
  // Ties go to even codes, or to the lower level; NaN gets the lowest code.
  int encode(float x) const {
    if (x != x) return -half();
    if (levels.empty()) {
      const float code = std::nearbyint(x / scale) + zero;
      return static_cast<int>(std::clamp<float>(code, -half(), half() - 1));
    }
    const float place = x / scale + zero;
    int code = -half();
    for (std::size_t i = 0; i + 1 < levels.size(); ++i)
      code += place > levels[i] + (levels[i + 1] - levels[i]) / 2;
    return code;
  }
  float round(float x) const { return x == x ? decode(encode(x)) : x; }
};

// Ascending, unevenly spaced levels for each of several parts, all in one row.
inline std::vector<float> uneven_levels(Random &random, Index parts, Index bits) {
  std::vector<float> all;
  for (Index part = 0; part < parts; ++part) {
    float level = static_cast<float>(-(1 << (bits - 1)));
    for (Index i = 0; i < Index{1} << bits; ++i) {
      all.push_back(level);
      level += static_cast<float>(random.uniform(0.5, 1.5));
    }
  }
  return all;
}

// Halfway between the levels of every part, and infinity at its end.
inline std::vector<float> bounds_of(const std::vector<float> &levels, Index bits) {
  std::vector<float> bounds = levels;
  const std::size_t count = std::size_t{1} << bits;
  for (std::size_t i = 0; i < levels.size(); ++i)
    bounds[i] = i % count + 1 < count ? levels[i] + (levels[i + 1] - levels[i]) / 2 : kInfinity;
  return bounds;
}

// The levels of one part; none if there are none at all.
inline std::vector<float> part_of(const std::vector<float> &levels, Index part, Index bits) {
  if (levels.empty()) return {};
  const auto first = levels.begin() + part * (Index{1} << bits);
  return {first, first + (Index{1} << bits)};
}

inline const float *data_or_null(const std::vector<float> &x) {
  return x.empty() ? nullptr : x.data();
}

// Puts a code in its place in a row of zeros.
inline void set_code(std::uint8_t *row, Index i, Index bits, int code) {
  if (bits == 8)
    row[i] = static_cast<std::uint8_t>(code);
  else
    row[i / 2] = static_cast<std::uint8_t>(i % 2 ? row[i / 2] | (code & 0xF) << 4 : code & 0xF);
}

}  // namespace
}  // namespace bkcore
