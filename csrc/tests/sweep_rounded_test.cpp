// The rounded sweep equals, bit for bit, rounding, the float sweep and rounding.

#include "codes.h"
#include "run_sweep.h"
#include "support.h"

namespace bkcore {
namespace {

struct RoundedProblem {
  Index batch, sites, lanes, bits, group_size, groups;
  Layout layout;
  Tensor<float> v, energy, eta, hopping;
  Buffer<float> scale, zero;
  std::vector<float> levels, bounds;

  RoundedProblem(Index batch, Index sites, Index lanes, Index bits, Index group_size, bool per_site,
                 bool with_levels, const Layout &layout, unsigned seed = 3)
      : batch(batch),
        sites(sites),
        lanes(lanes),
        bits(bits),
        group_size(group_size),
        groups(groups_of(sites, group_size)),
        layout(layout) {
    Random random(seed);
    const auto fill = [&](const Sizes &sizes, const Layout &how, const auto &make) {
      Tensor<float> x(sizes, how, Place::kBeforePage);
      for (float &number : x.numbers()) number = static_cast<float>(make());
      return x;
    };
    Layout rows = layout;
    rows.expanded = {true, !per_site, false, false};
    const auto normal = [&] { return random.normal(); };
    v = fill({batch, sites, 1, lanes}, layout, normal);
    energy = fill({1, 1, 1, lanes}, rows, normal);
    eta = fill({1, sites, 1, lanes}, rows, [&] { return random.uniform(0.5, 1.5); });
    hopping = fill({1, std::max<Index>(sites - 1, 1), 1, lanes}, rows, normal);
    const double half = 1 << (bits - 1);
    scale = Buffer<float>::of(3 * groups, [&] { return random.uniform(0.5, 2) / half; });
    zero = Buffer<float>::of(3 * groups, [&] { return random.integer(-half / 2, half / 2); });
    if (!with_levels) return;
    levels = uneven_levels(random, 3, bits);
    bounds = bounds_of(levels, bits);
  }

  Sweep<float> chains(const Tensor<float> &potential, const Tensor<float> &parts) const {
    Sweep<float> s{batch, sites, lanes};
    s.energy = energy.readable(), s.eta = eta.readable(), s.hopping = hopping.readable();
    s.v = potential.readable(), s.parts = parts.writable();
    return s;
  }

  Buffer<float> run(const Isa &isa, Index threads, bool two_sided) const {
    const Tensor<float> parts({batch, sites, 2, lanes}, layout, Place::kBeforePage);
    const SweepRounded s{chains(v, parts),
                         bits,
                         groups,
                         group_size,
                         scale.data(),
                         zero.data(),
                         data_or_null(levels),
                         data_or_null(bounds)};
    run_sweep_rounded(isa, threads, two_sided, s);
    return parts.numbers();
  }

  Codes codes(Index part, Index site) const {
    const Index at = part * groups + site / group_size;
    return {bits, scale[at], zero[at], part_of(levels, part, bits)};
  }

  Buffer<float> expected(const Isa &isa, bool two_sided) const {
    const Tensor<float> rounded({batch, sites, 1, lanes}, layout);
    const Tensor<float> parts({batch, sites, 2, lanes}, layout);
    const auto each = [&](const auto &work) {
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < sites; ++i)
          for (Index h = 0; h < lanes; ++h) work(b, i, h);
    };
    each([&](Index b, Index i, Index h) {
      rounded.at(b, i, 0, h) = codes(0, i).round(v.at(b, i, 0, h));
    });
    run_sweep(isa, 1, two_sided, true, Index{1} << 40, chains(rounded, parts));
    each([&](Index b, Index i, Index h) {
      for (Index c = 0; c < 2; ++c)
        parts.at(b, i, c, h) = codes(1 + c, i).round(parts.at(b, i, c, h));
    });
    return parts.numbers();
  }
};

const Layout kPlain, kPairs = {{0, 3, 1, 2}}, kApart = {{1, 0, 3, 2}, 1};

TEST_CASE("rounded sweeps of all sizes, groups and layouts") {
  for (const Index bits : {4, 8})
    for (const Index sites : {1, 2, 15, 33, 66})
      for (const Index group_size : {1, 7, 64, 100})
        for (const Index lanes : {1, 5, 17, 33})
          for (const bool levels : {false, true})
            for (const Layout &layout : {kPlain, kPairs, kApart})
              for (const bool two_sided : {false, true}) {
                CAPTURE(bits);
                CAPTURE(sites);
                CAPTURE(group_size);
                CAPTURE(lanes);
                CAPTURE(levels);
                CAPTURE(two_sided);
                const RoundedProblem p(2, sites, lanes, bits, group_size, two_sided == levels,
                                       levels, layout);
                for_isas([&](const Isa &isa) {
                  CHECK(distance(p.run(isa, 1, two_sided), p.expected(isa, two_sided)) == 0);
                });
              }
}

TEST_CASE("threads change no bit of a rounded sweep") {
  const RoundedProblem p(40, 65, 9, 8, 16, true, false, kPlain);
  for_isas([&](const Isa &isa) {
    const auto want = p.run(isa, 1, true);
    for (const Index threads : {2, 5}) CHECK(same_bits(p.run(isa, threads, true), want));
  });
}

TEST_CASE("NaN stays NaN in a rounded sweep") {
  for (const bool levels : {false, true}) {
    const RoundedProblem p(1, 6, 18, 4, 2, false, levels, kPlain);
    for (const Index h : {0, 17}) p.v.at(0, 3, 0, h) = kNaN;
    for_isas([&](const Isa &isa) {
      const auto got = p.run(isa, 1, false);
      CHECK(distance(got, p.expected(isa, false)) == 0);
      for (const Index h : {0, 17}) {
        CHECK(got[2 * 18 * 2 + h] == got[2 * 18 * 2 + h]);
        CHECK(got[3 * 18 * 2 + h] != got[3 * 18 * 2 + h]);
      }
    });
  }
}

TEST_CASE("no chains to round") {
  for_isas([](const Isa &isa) {
    CHECK(RoundedProblem(0, 3, 5, 4, 2, false, true, kPlain).run(isa, 2, false).size() == 0);
    CHECK(RoundedProblem(2, 3, 0, 8, 2, true, false, kPlain).run(isa, 2, true).size() == 0);
  });
}

}  // namespace
}  // namespace bkcore
