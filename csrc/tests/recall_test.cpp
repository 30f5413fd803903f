// Resolvent attention with what a layer computes around it, against the formulas in double.

#include "engine/recall.h"

#include <complex>

#include "codes.h"
#include "support.h"

namespace bkcore {
namespace {

struct RecallShape {
  Index batch, heads, groups, keys, values;
};

enum class Rounding { kNone, kUniform, kLevels };

struct RecallProblem {
  RecallShape shape;
  Index bits;
  Rounding rounding;
  Buffer<float> gate, barrier, query, key, value, rate, height, eta, weight, g, psi;
  // For the seven parts: groups of two channels.
  std::vector<Buffer<std::uint16_t>> scale;
  std::vector<Buffer<std::int8_t>> zero;
  std::vector<std::vector<float>> levels;

  RecallProblem(const RecallShape &shape, Rounding rounding, Index bits = 8)
      : shape(shape), bits(bits), rounding(rounding) {
    Random random(10);
    const auto [batch, heads, groups, keys, values] = shape;
    const auto normal = [&](Index count) {
      return Buffer<float>::of(count, [&] { return random.normal(); }, Place::kBeforePage);
    };
    const auto between = [&](Index count, double low, double high) {
      return Buffer<float>::of(
          count, [&] { return random.uniform(low, high); }, Place::kBeforePage);
    };
    gate = normal(batch * heads), barrier = normal(batch * heads);
    query = normal(batch * groups * keys), key = normal(batch * groups * keys);
    value = normal(batch * heads * values);
    rate = between(heads, 0.1, 1), height = between(heads, 0.1, 1), eta = between(heads, 0.5, 1);
    weight = normal(3 * heads * values);
    g = between(batch * heads * 2, 0.1, 1), psi = normal(batch * heads * 2 * keys * values);
    for (Index h = 0; h < std::min<Index>(heads, 1) * 2; ++h)
      if (batch) g[h] = 0;  // the first chain has not begun
    if (rounding == Rounding::kNone) return;
    for (const Index count : channels()) {
      const double half = 1 << (bits - 1);
      scale.push_back(Buffer<std::uint16_t>::of(
          groups_of(count, 2), [&] { return bfloat16(float(random.uniform(2, 4) / half)); }));
      zero.push_back(
          Buffer<std::int8_t>::of(groups_of(count, 2), [&] { return random.integer(-2, 2); }));
      levels.push_back(rounding == Rounding::kLevels ? uneven_levels(random, 1, bits)
                                                     : std::vector<float>());
    }
  }

  std::array<Index, 7> channels() const {
    const auto [batch, heads, groups, keys, values] = shape;
    const Index width = heads * values, shared = groups * keys;
    return {heads, heads, shared, shared, width, width, width};
  }
  std::vector<RoundChannels> parts() const {
    std::vector<RoundChannels> all;
    for (std::size_t n = 0; n < scale.size(); ++n) {
      RoundChannels r{};
      r.rows = shape.batch, r.channels = channels()[n], r.bits = bits, r.group_size = 2;
      r.scale = scale[n].data(), r.zero = zero[n].data(), r.levels = data_or_null(levels[n]);
      all.push_back(r);
    }
    return all;
  }
  // Rounds a part, one number at a time.
  Buffer<float> rounded(std::size_t part, const Buffer<float> &x) const {
    const Buffer<float> out(x.size());
    for (Index i = 0; i < x.size(); ++i) {
      const Index group = i % channels()[part] / 2;
      out[i] =
          Codes{bits, from_bits(scale[part][group]), float(zero[part][group]), levels[part]}.round(
              x[i]);
    }
    return out;
  }
};

struct RecallResults {
  Buffer<float> features, next_g, next_psi;

  RecallResults(const Isa &isa, const RecallProblem &p, const std::vector<RoundChannels> &rounding,
                Index threads = 1)
      : features(p.value.size(), Place::kBeforePage),
        next_g(p.g.size(), Place::kBeforePage),
        next_psi(p.psi.size(), Place::kBeforePage) {
    const auto [batch, heads, groups, keys, values] = p.shape;
    engine::Recall recall{};
    recall.batch = batch, recall.sites = 1, recall.heads = heads, recall.groups = groups;
    recall.keys = keys, recall.values = values;
    recall.gate = p.gate.data(), recall.barrier = p.barrier.data();
    recall.query = p.query.data(), recall.key = p.key.data(), recall.value = p.value.data();
    recall.rate = p.rate.data(), recall.height = p.height.data(), recall.eta = p.eta.data();
    recall.weight = p.weight.data(), recall.g = p.g.data(), recall.psi = p.psi.data();
    recall.rounding = rounding, recall.features = features.data();
    recall.next_g = next_g.data(), recall.next_psi = next_psi.data();
    engine::Workers workers(threads);
    engine::RecallRun(isa, workers, recall).run();
  }
};

// In double, without rounding.
void check_formulas(const RecallProblem &p, const RecallResults &got) {
  using Complex = std::complex<double>;
  const auto [batch, heads, groups, keys, values] = p.shape;
  std::vector<double> features, next_g, next_psi;
  double size = 1;
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h) {
      const Index chain = b * heads + h, plane = keys * values;
      const double eta = p.eta[h];
      const Complex before(p.g[2 * chain], p.g[2 * chain + 1]);
      double t = std::exp(-2 * double{p.rate[h]} / (1 + std::exp(-double{p.gate[chain]})));
      if (before == 0.0) t = 0;
      const double v = double{p.height[h]} * std::log1p(std::exp(double{p.barrier[chain]}));
      const Complex g = 1.0 / (Complex(1 + t * t + v, -eta) - t * t * before);
      next_g.push_back(g.real());
      next_g.push_back(g.imag());
      const float *query = p.query.data() + (b * groups + h / (heads / groups)) * keys;
      const float *key = p.key.data() + (b * groups + h / (heads / groups)) * keys;
      std::vector<Complex> psi(plane), found(values);
      for (Index k = 0; k < keys; ++k)
        for (Index u = 0; u < values; ++u) {
          const Index at = k * values + u, from = chain * 2 * plane + at;
          psi[at] = g * (double{key[k]} * double{p.value[chain * values + u]} +
                         t * Complex(p.psi[from], p.psi[from + plane]));
          found[u] += double{query[k]} * psi[at];
        }
      for (const Complex &x : psi) next_psi.push_back(x.real());
      for (const Complex &x : psi) next_psi.push_back(x.imag());
      const double w = g.imag() / eta;
      for (Index u = 0; u < values; ++u) {
        const float *weight = p.weight.data() + h * values + u;
        const double terms[3] = {
            double{weight[0]} * double{p.value[chain * values + u]},
            double{weight[heads * values]} * found[u].real() / std::sqrt(w),
            double{weight[2 * heads * values]} * found[u].imag() / eta / (w * std::sqrt(w))};
        features.push_back(terms[0] + terms[1] + terms[2]);
        for (const double x : terms) size = std::max(size, std::abs(x));
      }
      for (const Complex &x : psi) size = std::max(size, std::abs(x));
    }
  // Every result is a sum of `keys` products of a few factors, each rounded. g has the condition
  // number |1 / g| |g| (1 + t^2 |g|) <= 8 at eta >= 0.5, and enters with a power of at most 5/2.
  const double bound = 100 * kUnit<float> * static_cast<double>(keys + 1) * size;
  CHECK(distance(got.next_g, next_g) <= 100 * kUnit<float>);
  CHECK(distance(got.next_psi, next_psi) <= bound);
  CHECK(distance(got.features, features) <= bound);
}

const RecallShape kRecallShapes[] = {
    {1, 1, 1, 1, 1}, {2, 3, 3, 2, 15}, {3, 4, 2, 3, 16}, {1, 6, 2, 5, 17}, {2, 2, 1, 16, 33}};

TEST_CASE("a recall step is its formulas, with the same bits everywhere") {
  for (const RecallShape &shape : kRecallShapes) {
    const RecallProblem p(shape, Rounding::kNone);
    const RecallResults best(isas().front(), p, {});
    for_isas([&](const Isa &isa) {
      const RecallResults got(isa, p, {});
      check_formulas(p, got);
      CHECK(same_bits(got.features, best.features));
      CHECK(same_bits(got.next_g, best.next_g));
      CHECK(same_bits(got.next_psi, best.next_psi));
    });
  }
}

TEST_CASE("a rounded recall step is one of rounded inputs, its outputs rounded") {
  for (const RecallShape &shape : kRecallShapes)
    for (const Index bits : {4, 8})
      for (const Rounding rounding : {Rounding::kUniform, Rounding::kLevels}) {
        RecallProblem p(shape, rounding, bits), q(shape, Rounding::kNone);
        q.gate = p.rounded(0, p.gate), q.barrier = p.rounded(1, p.barrier);
        q.query = p.rounded(2, p.query), q.key = p.rounded(3, p.key);
        q.value = p.rounded(4, p.value);
        const Index width = shape.heads * shape.values;
        for_isas([&](const Isa &isa) {
          // One of the three terms of the features at a time.
          for (Index part = 0; part < 3; ++part) {
            for (Index i = 0; i < 3 * width; ++i) p.weight[i] = i / width == part ? 1 : 0;
            q.weight = p.weight;
            const RecallResults got(isa, p, p.parts()), plain(isa, q, {});
            const auto want = part ? p.rounded(static_cast<std::size_t>(4 + part), plain.features)
                                   : plain.features;
            CHECK(distance(got.features, want) == 0);
            CHECK(same_bits(got.next_g, plain.next_g));
            CHECK(same_bits(got.next_psi, plain.next_psi));
          }
        });
      }
}

TEST_CASE("threads change no bit of a recall step") {
  const RecallProblem p({8, 4, 2, 32, 33}, Rounding::kLevels);
  for_isas([&](const Isa &isa) {
    const RecallResults want(isa, p, p.parts());
    for (const Index threads : {2, 5}) {
      const RecallResults got(isa, p, p.parts(), threads);
      CHECK(same_bits(got.features, want.features));
      CHECK(same_bits(got.next_psi, want.next_psi));
    }
  });
}

TEST_CASE("NaN goes through a recall step") {
  for (const Rounding rounding : {Rounding::kNone, Rounding::kUniform, Rounding::kLevels}) {
    const RecallProblem p({1, 3, 3, 2, 5}, rounding);
    p.value[2] = kNaN, p.gate[1] = kNaN;
    for_isas([&](const Isa &isa) {
      const RecallResults got(isa, p, p.parts());
      for (Index i = 0; i < 15; ++i)
        CHECK((got.features[i] != got.features[i]) == (i == 2 || i / 5 == 1));
    });
  }
}

TEST_CASE("recall steps without batch, heads, keys or values") {
  for (const RecallShape &shape : {RecallShape{0, 2, 1, 2, 2}, RecallShape{2, 0, 1, 2, 2},
                                   RecallShape{2, 2, 2, 0, 3}, RecallShape{2, 2, 1, 3, 0}})
    for (const Rounding rounding : {Rounding::kNone, Rounding::kUniform, Rounding::kLevels}) {
      const RecallProblem p(shape, rounding);
      for_isas([&](const Isa &isa) {
        const RecallResults got(isa, p, p.parts(), 2);
        if (rounding == Rounding::kNone) check_formulas(p, got);
      });
    }
}

}  // namespace
}  // namespace bkcore
