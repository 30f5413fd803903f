// Rounding of a weight and its derivative, against plain float arithmetic one number at a time. All
// instruction sets must give the same bits.

#include "run_codes.h"
#include "support.h"

namespace bkcore {
namespace {

constexpr int kInt4[16] = {-127, -102, -81, -63, -47, -34, -22, -11,
                           0,    12,   25,  40,  56,  75,  99,  127};

struct WeightProblem {
  Index rows, columns, bits, group_size, groups;
  Buffer<float> weight, grad;
  Buffer<std::uint16_t> scale;

  WeightProblem(Index rows, Index columns, Index bits, Index group_size)
      : rows(rows),
        columns(columns),
        bits(bits),
        group_size(group_size),
        groups(groups_of(columns, group_size)) {
    Random random(9);
    const Place place = Place::kBeforePage;
    // Sometimes outside the range of the codes.
    weight = Buffer<float>::of(rows * columns, [&] { return random.normal(); }, place);
    grad = Buffer<float>::of(rows * columns, [&] { return random.normal(); }, place);
    scale = Buffer<std::uint16_t>::of(
        rows * groups, [&] { return bfloat16(float(random.uniform(1, 3) / 127)); }, place);
  }
  RoundWeight arguments() const {
    return {rows, columns, bits, groups, group_size, weight.data(), scale.data()};
  }
  float scale_of(Index at) const {
    return from_bits(scale[at / columns * groups + at % columns / group_size]);
  }

  // The value to which a ratio is rounded, and whether the ratio is outside the range of the codes.
  float nearest(float ratio, bool &outside) const {
    if (bits == 8) {
      const float code = std::nearbyint(ratio);
      outside = code < -128 || code > 127;
      return code != code ? -128 : std::max(-128.0f, std::min(127.0f, code));
    }
    outside = ratio < -127 || ratio > 127;
    int i = 0;
    while (i < 15 && ratio > 0.5f * static_cast<float>(kInt4[i] + kInt4[i + 1])) ++i;
    return static_cast<float>(kInt4[i]);
  }
};

struct WeightResults {
  Buffer<std::int8_t> codes;
  Buffer<float> values, dweight, dscale;

  explicit WeightResults(const WeightProblem &p)
      : codes(p.rows * p.columns, Place::kBeforePage),
        values(p.rows * p.columns, Place::kBeforePage),
        dweight(p.rows * p.columns, Place::kBeforePage),
        dscale(p.rows * p.groups, Place::kBeforePage) {}
  WeightResults(const Isa &isa, const WeightProblem &p, Index threads) : WeightResults(p) {
    run_round_weight(isa, threads, p.arguments(), codes.data(), values.data());
    run_round_weight_backward(isa, threads, p.arguments(), p.grad.data(), dweight.data(),
                              dscale.data());
  }

  // Every element of dscale is a sum; `terms` gets the largest sum of the absolute values of its
  // terms.
  static WeightResults expected(const WeightProblem &p, double &terms) {
    WeightResults r(p);
    std::vector<double> sums(r.dscale.size()), sizes(r.dscale.size());
    for (Index at = 0; at < p.rows * p.columns; ++at) {
      const float x = p.weight[at], scale = p.scale_of(at), ratio = x / scale;
      bool outside;
      const float level = p.nearest(ratio, outside);
      r.codes[at] = static_cast<std::int8_t>(level);
      r.values[at] = x == x ? scale * level : x;
      r.dweight[at] = outside ? 0 : p.grad[at];
      const float term = p.grad[at] * (level - (outside ? 0 : ratio));
      const Index group = at / p.columns * p.groups + at % p.columns / p.group_size;
      sums[group] += double{term};
      sizes[group] += std::abs(double{term});
    }
    for (Index i = 0; i < r.dscale.size(); ++i) {
      r.dscale[i] = static_cast<float>(sums[i]);
      terms = std::max(terms, sizes[i]);
    }
    return r;
  }
};

TEST_CASE("weights of all sizes and groups") {
  for (const Index bits : {4, 8})
    for (const Index rows : {1, 2, 65})
      for (const Index columns : {1, 2, 15, 16, 17, 33, 130})
        for (const Index group_size : {1, 2, 7, 32, 1000}) {
          CAPTURE(bits);
          CAPTURE(rows);
          CAPTURE(columns);
          CAPTURE(group_size);
          const WeightProblem p(rows, columns, bits, std::min(group_size, columns));
          double terms = 0;
          const WeightResults want = WeightResults::expected(p, terms);
          for_isas([&](const Isa &isa) {
            const WeightResults got(isa, p, 1);
            CHECK(same_bits(got.codes, want.codes));
            CHECK(distance(got.values, want.values) == 0);
            CHECK(distance(got.dweight, want.dweight) == 0);
            // A sum of n terms in any order has an error of n u times their absolute sum (Higham
            // 2002, 4.4).
            const double count = static_cast<double>(p.group_size);
            CHECK(distance(got.dscale, want.dscale) <= count * kUnit<float> * terms);
          });
        }
}

TEST_CASE("threads change no bit of a rounded weight") {
  const WeightProblem p(700, 33, 4, 8);
  for_isas([&](const Isa &isa) {
    const WeightResults want(isa, p, 1);
    for (const Index threads : {2, 5}) {
      const WeightResults got(isa, p, threads);
      CHECK(same_bits(got.codes, want.codes));
      CHECK(same_bits(got.values, want.values));
      CHECK(same_bits(got.dweight, want.dweight));
      CHECK(same_bits(got.dscale, want.dscale));
    }
  });
}

TEST_CASE("NaN and infinity in a weight") {
  for (const Index bits : {4, 8}) {
    const WeightProblem p(1, 19, bits, 19);
    p.weight[0] = kNaN, p.weight[18] = kNaN, p.weight[1] = kInfinity, p.weight[17] = -kInfinity;
    double terms = 0;
    const WeightResults want = WeightResults::expected(p, terms);
    for_isas([&](const Isa &isa) {
      const WeightResults got(isa, p, 1);
      CHECK(same_bits(got.codes, want.codes));
      CHECK(distance(got.values, want.values) == 0);
      CHECK(distance(got.dweight, want.dweight) == 0);
      CHECK(got.values[18] != got.values[18]);
      CHECK(got.dscale[0] != got.dscale[0]);
    });
  }
}

TEST_CASE("no rows and no columns of a weight") {
  for_isas([](const Isa &isa) {
    for (const Index bits : {4, 8}) {
      CHECK(WeightResults(isa, WeightProblem(0, 5, bits, 2), 2).values.size() == 0);
      CHECK(WeightResults(isa, WeightProblem(5, 0, bits, 2), 2).values.size() == 0);
    }
  });
}

}  // namespace
}  // namespace bkcore
