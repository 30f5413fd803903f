// Rounding of channels and its derivative, against plain float arithmetic one number at a time. All
// instruction sets must give the same bits.

#include "codes.h"
#include "run_codes.h"
#include "support.h"

namespace bkcore {
namespace {

struct ChannelsProblem {
  Index rows, channels, bits, group_size, groups;
  Buffer<float> x, grad;
  Buffer<std::uint16_t> scale;
  Buffer<std::int8_t> zero;
  std::vector<float> levels;

  ChannelsProblem(Index rows, Index channels, Index bits, Index group_size, bool with_levels)
      : rows(rows),
        channels(channels),
        bits(bits),
        group_size(group_size),
        groups(groups_of(channels, group_size)) {
    Random random(7);
    const double half = 1 << (bits - 1);
    const Place place = Place::kBeforePage;
    // Sometimes outside the range of the codes.
    x = Buffer<float>::of(rows * channels, [&] { return 1.5 * random.normal(); }, place);
    grad = Buffer<float>::of(rows * channels, [&] { return random.normal(); }, place);
    scale = Buffer<std::uint16_t>::of(
        groups, [&] { return bfloat16(float(random.uniform(0.5, 2) / half)); }, place);
    zero = Buffer<std::int8_t>::of(
        groups, [&] { return random.integer(Index(-half / 2), Index(half / 2)); }, place);
    if (with_levels) levels = uneven_levels(random, 1, bits);
  }

  RoundChannels arguments(float *out) const {
    return {rows,     channels,     bits,        group_size,
            x.data(), scale.data(), zero.data(), data_or_null(levels),
            out};
  }
  Codes codes(Index channel) const {
    const Index group = channel / group_size;
    return {bits, from_bits(scale[group]), static_cast<float>(zero[group]), levels};
  }

  Buffer<float> run(const Isa &isa, Index threads) const {
    const Buffer<float> out(rows * channels, Place::kBeforePage);
    run_round_channels(isa, threads, arguments(out.data()));
    return out;
  }
};

struct ChannelGradients {
  Buffer<float> dx, dscale, dlevels;

  // The kernels add to dscale and dlevels.
  explicit ChannelGradients(const ChannelsProblem &p)
      : dx(p.rows * p.channels, Place::kBeforePage),
        dscale(Buffer<float>::zeros(shares(p) * p.channels, Place::kBeforePage)),
        dlevels(
            Buffer<float>::zeros(p.levels.empty() ? 0 : shares(p) << p.bits, Place::kBeforePage)) {}
  ChannelGradients(const Isa &isa, const ChannelsProblem &p, Index threads) : ChannelGradients(p) {
    run_round_channels_backward(
        isa, threads,
        {p.arguments(nullptr), p.grad.data(), dx.data(), dscale.data(), dlevels.data()});
  }

  static Index shares(const ChannelsProblem &p) { return groups_of(p.rows, kRowsPerShare); }

  // One row after the other. Every element of dlevels is a sum; `terms` gets the largest sum of the
  // absolute values of its terms.
  static ChannelGradients expected(const ChannelsProblem &p, double &terms) {
    ChannelGradients d(p);
    std::vector<double> dlevels(d.dlevels.size()), sizes(d.dlevels.size());
    for (Index row = 0; row < p.rows; ++row)
      for (Index c = 0; c < p.channels; ++c) {
        const Index at = row * p.channels + c, share = row / kRowsPerShare;
        const Codes codes = p.codes(c);
        const float ratio = p.x[at] / codes.scale, grad = p.grad[at];
        const float place =
            p.levels.empty() ? std::nearbyint(ratio) + codes.zero : ratio + codes.zero;
        const float low = codes.level(-codes.half()), high = codes.level(codes.half() - 1);
        const bool outside = place < low || place > high;
        const int code = codes.encode(p.x[at]);
        const float level = place != place && p.levels.empty() ? place : codes.level(code);
        // With levels the place already includes the zero point.
        const float inside = p.levels.empty() ? ratio : place - codes.zero;
        d.dx[at] = outside ? 0 : grad;
        d.dscale[share * p.channels + c] += grad * (level - codes.zero - (outside ? 0 : inside));
        if (p.levels.empty()) continue;
        const Index number = (share << p.bits) + code + codes.half();
        dlevels[number] += double{grad * codes.scale};
        sizes[number] += std::abs(double{grad * codes.scale});
      }
    for (Index i = 0; i < d.dlevels.size(); ++i) {
      d.dlevels[i] = static_cast<float>(dlevels[i]);
      terms = std::max(terms, sizes[i]);
    }
    return d;
  }
};

TEST_CASE("channels of all sizes and groups") {
  for (const Index bits : {4, 8})
    for (const Index rows : {1, 2, 15, 65, 130})
      for (const Index channels : {1, 2, 15, 16, 17, 33})
        for (const Index group_size : {1, 2, 7, 100})
          for (const bool levels : {false, true}) {
            CAPTURE(bits);
            CAPTURE(rows);
            CAPTURE(channels);
            CAPTURE(group_size);
            CAPTURE(levels);
            const ChannelsProblem p(rows, channels, bits, group_size, levels);
            const Buffer<float> want(rows * channels);
            for (Index i = 0; i < want.size(); ++i) want[i] = p.codes(i % channels).round(p.x[i]);
            double terms = 0;
            const ChannelGradients d = ChannelGradients::expected(p, terms);
            for_isas([&](const Isa &isa) {
              CHECK(distance(p.run(isa, 1), want) == 0);
              const ChannelGradients got(isa, p, 1);
              CHECK(distance(got.dx, d.dx) == 0);
              CHECK(distance(got.dscale, d.dscale) == 0);
              // A sum of n terms in any order has an error of n u times their absolute sum (Higham
              // 2002, 4.4).
              const double count = static_cast<double>(kRowsPerShare * channels);
              CHECK(distance(got.dlevels, d.dlevels) <= count * kUnit<float> * terms);
            });
          }
}

TEST_CASE("threads change no bit of rounded channels") {
  for (const bool levels : {false, true}) {
    const ChannelsProblem p(700, 33, 8, 4, levels);
    for_isas([&](const Isa &isa) {
      const Buffer<float> want = p.run(isa, 1);
      const ChannelGradients d(isa, p, 1);
      for (const Index threads : {2, 5}) {
        CHECK(same_bits(p.run(isa, threads), want));
        const ChannelGradients got(isa, p, threads);
        CHECK(same_bits(got.dx, d.dx));
        CHECK(same_bits(got.dscale, d.dscale));
        CHECK(same_bits(got.dlevels, d.dlevels));
      }
    });
  }
}

TEST_CASE("NaN and infinity in channels") {
  for (const Index bits : {4, 8})
    for (const bool levels : {false, true}) {
      const ChannelsProblem p(2, 19, bits, 3, levels);
      p.x[0] = kNaN, p.x[18] = kNaN, p.x[20] = kInfinity, p.x[21] = -kInfinity;
      double terms = 0;
      const ChannelGradients d = ChannelGradients::expected(p, terms);
      for_isas([&](const Isa &isa) {
        const Buffer<float> got = p.run(isa, 1);
        for (Index i = 0; i < got.size(); ++i) {
          const float want = p.codes(i % 19).round(p.x[i]);
          CHECK((got[i] == want || (got[i] != got[i] && want != want)));
        }
        CHECK(got[0] != got[0]);
        CHECK(distance(ChannelGradients(isa, p, 1).dx, d.dx) == 0);
        CHECK(distance(ChannelGradients(isa, p, 1).dscale, d.dscale) == 0);
      });
    }
}

TEST_CASE("no rows and no channels to round") {
  for (const bool levels : {false, true})
    for_isas([&](const Isa &isa) {
      for (const auto &[rows, channels] : {std::pair<Index, Index>(0, 5), {5, 0}, {0, 0}}) {
        const ChannelsProblem p(rows, channels, 4, 2, levels);
        CHECK(p.run(isa, 2).size() == 0);
        for (const float x : ChannelGradients(isa, p, 2).dlevels) CHECK(x == 0);
      }
    });
}

}  // namespace
}  // namespace bkcore
