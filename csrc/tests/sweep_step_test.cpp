// One site at a time gives the same as the textbook recurrence and the sweep.

#include "reference.h"
#include "run_sweep.h"
#include "support.h"

namespace bkcore {
namespace {

template <class T>
struct Stream {
  Index batch, sites, lanes;
  Buffer<T> v, source, energy, eta, hopping;

  Stream(Index batch, Index sites, Index lanes, bool has_source)
      : batch(batch), sites(sites), lanes(lanes) {
    Random random(4);
    const auto normal = [&] { return random.normal(); };
    v = Buffer<T>::of(batch * sites * lanes, normal, Place::kBeforePage);
    if (has_source) source = Buffer<T>::of(batch * sites * lanes, normal, Place::kBeforePage);
    energy = Buffer<T>::of(lanes, normal, Place::kBeforePage);
    eta = Buffer<T>::of(lanes, [&] { return random.uniform(0.5, 1.5); }, Place::kBeforePage);
    hopping = Buffer<T>::of(lanes, normal, Place::kBeforePage);
  }

  Index parts() const { return source.data() ? 4 : 2; }

  // Of the sites from `first` on.
  Sweep<T> arguments(Index first, Index count) const {
    const auto row = [](const Buffer<T> &x) { return Strided<const T>{x.data(), 0, 0, 0, 1}; };
    const auto rows = [&](const Buffer<T> &x) {
      const Index by_site = count > 1 ? lanes : 0;
      return Strided<const T>{x.data() ? x.data() + first * lanes : nullptr, sites * lanes, by_site,
                              0, 1};
    };
    return {batch,       count,    lanes,        rows(v), rows(source),
            row(energy), row(eta), row(hopping), {},      false};
  }
};

TEST_CASE_TEMPLATE("steps are the recurrence", T, float, double) {
  for (const Index lanes : {1, 2, 15, 16, 17, 33})
    for (const bool has_source : {false, true}) {
      CAPTURE(lanes);
      const Index batch = 2, sites = 12;
      const Stream<T> p(batch, sites, lanes, has_source);
      // As in sweep_test.cpp: 8 u A / eta^2 |b|, with A and |b| below 40 and 10 here.
      const double bound = 8 * kUnit<T> * 40 / 0.25 * (has_source ? 10 : 1);
      Buffer<T> base;
      for_isas([&](const Isa &isa) {
        const auto state = Buffer<T>::zeros(batch * p.parts() * lanes, Place::kBeforePage);
        for (Index i = 0; i < sites; ++i) run_sweep_step(isa, p.arguments(i, 1), state.data());
        std::vector<double> want;
        for (Index b = 0; b < batch; ++b)
          for (Index c = 0; c < p.parts(); ++c)
            for (Index h = 0; h < lanes; ++h) {
              ChainInput in;
              in.energy = Dual(double{p.energy[h]});
              for (Index i = 0; i < sites; ++i) {
                const Index at = (b * sites + i) * lanes + h;
                in.v.push_back(double{p.v[at]});
                in.eta.push_back(double{p.eta[h]});
                in.hopping.push_back(double{p.hopping[h]});
                if (has_source) in.source.push_back(double{p.source[at]});
              }
              const std::vector<Dual> all = causal_chain(in);
              const Complex last = all[all.size() - (has_source && c < 2 ? 2 : 1)].value;
              want.push_back(c % 2 ? last.imag() : last.real());
            }
        CHECK(distance(state, want) <= bound);
        if (!base.data()) base = state;
        CHECK(same_bits(state, base));
      });
    }
}

TEST_CASE_TEMPLATE("steps are the sweep, to the bit", T, float, double) {
  for (const bool has_source : {false, true}) {
    const Index batch = 2, sites = 9, lanes = 21;
    const Stream<T> p(batch, sites, lanes, has_source);
    for_isas([&](const Isa &isa) {
      const Index parts = p.parts();
      const auto state = Buffer<T>::zeros(batch * parts * lanes);
      const Buffer<T> all(batch * sites * parts * lanes);
      Sweep<T> s = p.arguments(0, sites);
      s.parts = {all.data(), sites * parts * lanes, parts * lanes, lanes, 1};
      run_sweep(isa, 1, false, true, Index{1} << 40, s);
      for (Index i = 0; i < sites; ++i) {
        run_sweep_step(isa, p.arguments(i, 1), state.data());
        for (Index b = 0; b < batch; ++b)
          for (Index k = 0; k < parts * lanes; ++k)
            CHECK(state[b * parts * lanes + k] == all[(b * sites + i) * parts * lanes + k]);
      }
    });
  }
}

TEST_CASE("a step from NaN is NaN, and one of nothing does nothing") {
  for_isas([](const Isa &isa) {
    const Stream<float> p(1, 1, 3, true);
    const auto state = Buffer<float>::zeros(4 * 3);
    state[1] = kNaN;
    run_sweep_step(isa, p.arguments(0, 1), state.data());
    for (Index c = 0; c < 4; ++c) {
      CHECK(state[3 * c + 1] != state[3 * c + 1]);
      CHECK(state[3 * c] == state[3 * c]);
    }
    run_sweep_step<float>(isa, Stream<float>(0, 1, 3, true).arguments(0, 1), nullptr);
    run_sweep_step<float>(isa, Stream<float>(2, 1, 0, false).arguments(0, 1), nullptr);
  });
}

}  // namespace
}  // namespace bkcore
