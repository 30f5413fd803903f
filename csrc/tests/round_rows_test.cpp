// Rounding of rows to INT8 and back, against plain float. All instruction sets must give the same
// bits.

#include "run_codes.h"
#include "support.h"

namespace bkcore {
namespace {

Buffer<float> rounded(const Isa &isa, const Buffer<float> &x, Index rows, Index columns,
                      Index threads = 1) {
  const Buffer<float> out(rows * columns, Place::kBeforePage);
  run_round_rows(isa, threads, rows, columns, x.data(), out.data());
  return out;
}

Buffer<float> expected(const Buffer<float> &x, Index rows, Index columns) {
  const Buffer<float> out(rows * columns);
  for (Index row = 0; row < rows; ++row) {
    float largest = 0;
    for (Index c = 0; c < columns; ++c) {
      const float size = std::abs(x[row * columns + c]);
      largest = size != size || largest != largest ? kNaN : std::max(largest, size);
    }
    float scale = largest / 127;
    if (scale < std::numeric_limits<float>::min()) scale = 1;
    for (Index at = row * columns; at < (row + 1) * columns; ++at)
      out[at] = std::isfinite(scale) ? scale * std::nearbyint(x[at] / scale) : kNaN;
  }
  return out;
}

Buffer<float> normal(Index count) {
  Random random(8);
  return Buffer<float>::of(count, [&] { return random.normal(); }, Place::kBeforePage);
}

TEST_CASE("rows of all sizes") {
  for (const Index rows : {0, 1, 2, 65})
    for (const Index columns : {1, 2, 15, 16, 17, 33, 130}) {
      const Buffer<float> x = normal(rows * columns);
      for_isas([&](const Isa &isa) {
        CHECK(distance(rounded(isa, x, rows, columns), expected(x, rows, columns)) == 0);
      });
    }
  for_isas([](const Isa &isa) { CHECK(rounded(isa, {}, 5, 0).size() == 0); });
}

TEST_CASE("threads change no bit of rounded rows") {
  const Buffer<float> x = normal(700 * 33);
  for_isas([&](const Isa &isa) {
    for (const Index threads : {2, 5})
      CHECK(same_bits(rounded(isa, x, 700, 33, threads), rounded(isa, x, 700, 33)));
  });
}

TEST_CASE("rows with NaN and infinity are NaN, those of the smallest numbers 0") {
  const Buffer<float> x = normal(4 * 19);
  x[18] = kNaN;
  x[19] = -kInfinity;
  for (Index c = 0; c < 19; ++c) x[2 * 19 + c] = 1e-40f;
  for_isas([&](const Isa &isa) {
    const Buffer<float> got = rounded(isa, x, 4, 19);
    CHECK(distance(got, expected(x, 4, 19)) == 0);
    for (Index c = 0; c < 2 * 19; ++c) CHECK(got[c] != got[c]);
    for (Index c = 2 * 19; c < 3 * 19; ++c) CHECK(got[c] == 0);
  });
}

}  // namespace
}  // namespace bkcore
