// Rows of matrices that are not quantized are their numbers, whatever their format.

#include "functions.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bkcore {
namespace {

double of_float16(std::uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(fraction + 1024, exponent - 25);
  return x >> 15 ? -size : size;
}

double of_bfloat16(std::uint16_t x) {
  const int exponent = x >> 7 & 255, fraction = x & 127;
  const double size = exponent == 255 ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -133)
                                      : std::ldexp(fraction + 128, exponent - 134);
  return x >> 15 ? -size : size;
}

bool same(float x, double wanted) {
  // By bits, as a program may have the processor take subnormal numbers for 0.
  const auto narrow = static_cast<float>(wanted);
  std::uint32_t a, b;
  std::memcpy(&a, &x, sizeof a), std::memcpy(&b, &narrow, sizeof b);
  return a == b || (std::isnan(wanted) && (a & 0x7FFFFFFFu) > 0x7F800000u);
}

void check_rows() {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  std::vector<double> wanted[2];
  for (const std::uint16_t x : all) {
    wanted[0].push_back(of_float16(x));
    wanted[1].push_back(of_bfloat16(x));
  }
  std::vector<float> row(64);
  for (const Isa &isa : isas())
    for (const bool is_bfloat : {false, true})
      for (const std::int64_t width : {1, 7, 64}) {  // less than a vector, and whole ones
        CAPTURE(isa.name);
        const auto kind = is_bfloat ? Dense::Kind::bf16 : Dense::Kind::f16;
        const Dense m{kind, 65536 / width, width, all.data()};
        std::int64_t wrong = 0;
        for (std::int64_t output = 0; output < m.outputs; ++output) {
          isa.functions.row(m, output, row.data());
          for (std::int64_t k = 0; k < width; ++k)
            wrong += !same(row[k], wanted[is_bfloat][output * width + k]);
        }
        CHECK(wrong == 0);
      }
}

TEST_CASE("every float16 and bfloat16 is its value") { check_rows(); }

#if defined(__x86_64__)
TEST_CASE("subnormal ones too, if the program takes subnormal floats for 0") {
  const unsigned before = _mm_getcsr();
  const float half = 0x1p-24F;
  const std::uint16_t smallest[3] = {1, 0x3FF, 0x8001};
  std::vector<float> found;
  _mm_setcsr(before | 0x8040);
  for (const Isa &isa : isas()) {
    float row[3], product;
    isa.functions.row({Dense::Kind::f16, 1, 3, smallest}, 0, row);
    found.insert(found.end(), row, row + 3);
    const float ones[3] = {1, 0, 0};
    isa.functions.multiply({Dense::Kind::f16, 1, 3, smallest}, ones, 1, 0, 1, &product);
    found.push_back(product);
  }
  _mm_setcsr(before);
  for (std::size_t i = 0; i < found.size(); i += 4) {
    CHECK(found[i] == half);
    CHECK(found[i + 1] == 1023 * half);
    CHECK(found[i + 2] == -half);
    CHECK(found[i + 3] == half);
  }
}
#endif

}  // namespace
}  // namespace bkcore
