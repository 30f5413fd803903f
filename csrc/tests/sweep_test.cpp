// The sweep and its adjoint against textbook recurrences in complex<double>.

#include "reference.h"
#include "run_sweep.h"
#include "support.h"

namespace bkcore {
namespace {

constexpr double kEta = 0.5;  // the smallest one
constexpr Index kNoStream = Index{1} << 40;

enum class Form { kCausal, kSource, kTwoSided };

struct Shape {
  Index batch, sites, lanes;
};

// Lanes last; sites last; the parts of a complex number adjacent; gaps, so that nothing is
// contiguous.
const Layout kLayouts[] = {{}, {{0, 3, 2, 1}}, {{0, 3, 1, 2}}, {{1, 0, 3, 2}, 1}};

template <class T>
struct Problem {
  Shape shape;
  Form form;
  bool per_site;
  Tensor<T> v, source, energy, eta, hopping, grad;

  Problem(const Shape &shape, Form form, bool per_site, const Layout &layout, unsigned seed = 1)
      : shape(shape), form(form), per_site(per_site) {
    Random random(seed);
    const auto [batch, sites, lanes] = shape;
    const auto fill = [&](const Sizes &sizes, const Layout &how, const auto &make) {
      Tensor<T> x(sizes, how);
      for (T &number : x.numbers()) number = static_cast<T>(make());
      return x;
    };
    const auto normal = [&] { return random.normal(); };
    Layout shared = layout;
    shared.expanded[0] = true;
    Layout rows = shared;
    rows.expanded[1] = !per_site;
    v = fill({batch, sites, 1, lanes}, layout, normal);
    if (form == Form::kSource) source = fill({batch, sites, 1, lanes}, layout, normal);
    energy = fill({1, 1, 1, lanes}, shared, normal);
    eta =
        fill({1, per_site ? sites : 1, 1, lanes}, rows, [&] { return random.uniform(kEta, 1.5); });
    hopping = fill({1, per_site ? std::max<Index>(sites - 1, 1) : 1, 1, lanes}, rows, normal);
    grad = fill({batch, sites, parts(), lanes}, layout, normal);
  }

  Index parts() const { return form == Form::kSource ? 4 : 2; }
  bool two_sided() const { return form == Form::kTwoSided; }

  ChainInput chain(Index b, Index h) const {
    ChainInput in;
    in.energy = Dual(double{energy.at(0, 0, 0, h)});
    for (Index i = 0; i < shape.sites; ++i) {
      in.v.push_back(double{v.at(b, i, 0, h)});
      in.eta.push_back(double{eta.at(0, i, 0, h)});
      if (source) in.source.push_back(double{source.at(b, i, 0, h)});
      if (i) in.hopping.push_back(double{hopping.at(0, i - 1, 0, h)});
    }
    return in;
  }
  std::vector<Dual> outputs(const ChainInput &in) const {
    return two_sided() ? two_sided_chain(in) : causal_chain(in);
  }
  std::vector<Complex> cotangents(Index b, Index h) const {
    std::vector<Complex> all;
    for (Index i = 0; i < shape.sites; ++i)
      for (Index c = 0; c < parts(); c += 2)
        all.emplace_back(grad.at(b, i, c, h), grad.at(b, i, c + 1, h));
    return all;
  }
};

// In the order (batch, lane, ...), whatever the layout.
template <class T>
std::vector<T> listed(const Tensor<T> &x) {
  std::vector<T> all;
  const auto [batch, sites, parts, lanes] = x.sizes();
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < lanes; ++h)
      for (Index i = 0; i < sites; ++i)
        for (Index c = 0; c < parts; ++c) all.push_back(x.at(b, i, c, h));
  return all;
}

template <class T>
struct Results {
  Tensor<T> parts, dv, dsource, denergy, deta, dhopping;

  Results(const Problem<T> &p, const Layout &layout, Place place = Place::kHeap)
      : Results(p, layout, layout, place) {}
  Results(const Problem<T> &p, const Layout &layout, const Layout &sums, Place place) {
    const auto [batch, sites, lanes] = p.shape;
    const Index etas = p.per_site ? sites : 1;
    const Index bonds = p.per_site ? std::max<Index>(sites - 1, 1) : 1;
    Layout rows = sums;
    rows.expanded[1] = !p.per_site;
    parts = Tensor<T>({batch, sites, p.parts(), lanes}, layout, place);
    dv = Tensor<T>({batch, sites, 1, lanes}, layout, place);
    if (p.source) dsource = Tensor<T>({batch, sites, 1, lanes}, layout, place);
    denergy = Tensor<T>({batch, 1, 1, lanes}, sums);
    deta = Tensor<T>({batch, etas, 1, lanes}, rows);
    dhopping = Tensor<T>({batch, bonds, 1, lanes}, rows);
    for (const Tensor<T> *sum : {&denergy, &deta, &dhopping})  // which the kernels add to
      for (T &x : sum->numbers()) x = 0;
  }
  std::vector<T> all() const {
    std::vector<T> every;
    for (const Tensor<T> *x : {&parts, &dv, &dsource, &denergy, &deta, &dhopping})
      for (const T number : listed(*x)) every.push_back(number);
    return every;
  }
};

template <class T>
Sweep<T> arguments(const Problem<T> &p, const Results<T> &to) {
  return {p.shape.batch,       p.shape.sites,
          p.shape.lanes,       p.v.readable(),
          p.source.readable(), p.energy.readable(),
          p.eta.readable(),    p.hopping.readable(),
          to.parts.writable(), false};
}

template <class T>
void run(const Isa &isa, const Problem<T> &p, const Results<T> &to, Index threads,
         Index cache_bytes) {
  const Sweep<T> s = arguments(p, to);
  run_sweep(isa, threads, p.two_sided(), false, cache_bytes, s);
  run_sweep_backward<T>(isa, threads, p.two_sided(), cache_bytes,
                        {s, p.grad.readable(), to.dv.writable(), to.dsource.writable(),
                         to.denergy.writable(), to.deta.writable(), to.dhopping.writable()});
}
template <class T>
Results<T> run(const Isa &isa, const Problem<T> &p, const Layout &layout, Index threads = 1,
               Index cache_bytes = kNoStream, Place place = Place::kHeap) {
  const Results<T> to(p, layout, place);
  run(isa, p, to, threads, cache_bytes);
  return to;
}

// The expected `Results::all`, and how far round-off may take each number from it.
// The roundings at a site amount to a change of its diagonal by at most 8 u A, where A = |v| + |E|
// + eta + 2 t^2 / eta is the size of what is added up there. By Ward's identity such a change moves
// an entry of the resolvent by at most A / eta^2 times 8 u, and psi by that times |b|. Each
// derivative is a sum of at most N terms. A term is the product of the cotangent, at most four such
// entries (1 / eta each) and a hopping.
template <class T>
struct Expected {
  std::vector<double> forward, backward;
  double forward_bound, backward_bound;

  explicit Expected(const Problem<T> &p) {
    const auto [batch, sites, lanes] = p.shape;
    std::vector<double> dv, dsource, denergy, deta, dhopping;
    double size = 0, cotangent = 0, source = 1, hop = 1;
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < lanes; ++h) {
        ChainInput in = p.chain(b, h);
        const std::vector<Complex> c = p.cotangents(b, h);
        for (const Dual &x : p.outputs(in)) {
          forward.push_back(x.value.real());
          forward.push_back(x.value.imag());
        }
        const auto by = [&](Dual &x) { return derivative(x, c, [&] { return p.outputs(in); }); };
        const auto each = [&](std::vector<Dual> &inputs, std::vector<double> &into) {
          double sum = 0;
          for (Dual &x : inputs) sum += into.emplace_back(by(x));
          return sum;
        };
        each(in.v, dv);
        each(in.source, dsource);
        denergy.push_back(by(in.energy));
        for (auto [inputs, into] : {std::pair(&in.eta, &deta), std::pair(&in.hopping, &dhopping)}) {
          const std::size_t before = into->size();
          const double sum = each(*inputs, *into);
          if (p.per_site) {
            if (inputs->empty()) into->push_back(0);  // no bond, but dhopping has a row
          } else {
            into->resize(before);
            into->push_back(sum);
          }
        }
        double norm = 1;
        for (const Dual &x : in.source) norm += std::norm(x.value);
        source = std::max(source, std::sqrt(norm));
        for (const Complex &x : c) cotangent = std::max(cotangent, std::abs(x));
        for (const Dual &x : in.hopping) hop = std::max(hop, std::abs(x.value));
        for (const Dual &x : in.v)
          size = std::max(size, std::abs(x.value) + std::abs(in.energy.value) + 1.5);
      }
    size += 2 * hop * hop / kEta;
    for (const auto *part : {&dv, &dsource, &denergy, &deta, &dhopping})
      backward.insert(backward.end(), part->begin(), part->end());
    forward_bound = 8 * kUnit<T> * size / (kEta * kEta) * source;
    backward_bound =
        forward_bound * static_cast<double>(sites) * cotangent * hop * source / (kEta * kEta);
  }
};

template <class T>
void check(const Problem<T> &p, const Layout &layout, const Expected<T> &want, Index threads) {
  std::vector<T> base;
  for_isas([&](const Isa &isa) {
    const Results<T> got = run(isa, p, layout, threads);
    CHECK(distance(listed(got.parts), want.forward) <= want.forward_bound);
    const std::vector<T> all = got.all();
    const std::vector<T> gradients(all.begin() + static_cast<Index>(want.forward.size()),
                                   all.end());
    CHECK(distance(gradients, want.backward) <= want.backward_bound);
    if (base.empty()) base = all;
    CHECK(distance(all, base) == 0);
  });
}

const Shape kShapes[] = {{1, 1, 1},  {2, 2, 2},  {1, 3, 15},  {2, 5, 16},  {1, 16, 17},
                         {3, 7, 33}, {2, 33, 5}, {1, 65, 31}, {1, 67, 16}, {2, 130, 3}};

TEST_CASE_TEMPLATE("sweep and adjoint, all forms, layouts and sizes", T, float, double) {
  for (const Shape &shape : kShapes)
    for (const Form form : {Form::kCausal, Form::kSource, Form::kTwoSided})
      for (const bool per_site : {false, true})
        for (const Layout &layout : kLayouts) {
          CAPTURE(shape.batch);
          CAPTURE(shape.sites);
          CAPTURE(shape.lanes);
          CAPTURE(static_cast<int>(form));
          CAPTURE(per_site);
          CAPTURE(layout.order[3]);
          const Problem<T> p(shape, form, per_site, layout);
          check(p, layout, Expected<T>(p), 1);
        }
}

TEST_CASE_TEMPLATE("outputs and inputs may have layouts of their own", T, float, double) {
  for (const Layout &in : kLayouts)
    for (const Layout &out : kLayouts) {
      const Problem<T> p({2, 9, 19}, Form::kSource, true, in);
      check(p, out, Expected<T>(p), 1);
    }
}

TEST_CASE_TEMPLATE("sums over sites may lie apart, whatever the rest does", T, float, double) {
  for (const bool per_site : {false, true})
    for (const Form form : {Form::kSource, Form::kTwoSided}) {
      const Problem<T> p({2, 9, 19}, form, per_site, kLayouts[0]);
      for_isas([&](const Isa &isa) {
        const Results<T> apart(p, kLayouts[0], kLayouts[3], Place::kHeap);
        run(isa, p, apart, 1, kNoStream);
        // Gathered or not, the same numbers are added, but in different vectors.
        const double size = static_cast<double>(9 * p.parts());
        CHECK(distance(apart.all(), run(isa, p, kLayouts[0]).all()) <= 1e3 * kUnit<T> * size);
      });
    }
}

TEST_CASE_TEMPLATE("long chains in blocks", T, float, double) {
  for (const Form form : {Form::kCausal, Form::kSource, Form::kTwoSided})
    for (const bool per_site : {false, true}) {
      const Problem<T> p({2, 1057, 1}, form, per_site, kLayouts[0]);
      REQUIRE(few_and_long(2, 1057));
      std::vector<double> want;
      for (Index b = 0; b < 2; ++b)
        for (const Dual &x : p.outputs(p.chain(b, 0))) {
          want.push_back(x.value.real());
          want.push_back(x.value.imag());
        }
      double size = 0;
      for (Index b = 0; b < 2; ++b)
        for (const Dual &x : p.chain(b, 0).v) size = std::max(size, std::abs(x.value));
      const double t = p.per_site ? 4 : std::abs(p.hopping.at(0, 0, 0, 0));
      const double bound = 8 * kUnit<T> * (size + 5 + 2 * t * t / kEta) / (kEta * kEta) * 35;
      for_isas([&](const Isa &isa) {
        const Results<T> to(p, kLayouts[0]);
        run_sweep(isa, 1, p.two_sided(), false, kNoStream, arguments(p, to));
        CHECK(distance(listed(to.parts), want) <= bound);
      });
    }
}

TEST_CASE_TEMPLATE("threads and streaming change no bit", T, float, double) {
  for (const Form form : {Form::kCausal, Form::kSource, Form::kTwoSided})
    for (const Shape &shape : {Shape{3, 40, 160}, Shape{1, 90, 112}, Shape{200, 65, 1}}) {
      const Problem<T> p(shape, form, true, kLayouts[0]);
      for_isas([&](const Isa &isa) {
        const std::vector<T> want = run(isa, p, kLayouts[0]).all();
        CHECK(distance(run(isa, p, kLayouts[0], 3).all(), want) == 0);
        CHECK(distance(run(isa, p, kLayouts[0], 2, 0, Place::kLine).all(), want) == 0);
      });
    }
}

// For streaming, the memory of every output has to be aligned.
TEST_CASE_TEMPLATE("a gradient that is not aligned is not streamed to", T, float, double) {
  const Problem<T> p({1, 40, 64}, Form::kSource, false, kLayouts[0]);
  for_isas([&](const Isa &isa) {
    Results<T> to(p, kLayouts[0], Place::kLine);
    to.dsource = Tensor<T>({1, 40, 1, 64}, {}, Place::kOffLine);
    run(isa, p, to, 1, 0);
    CHECK(distance(to.all(), run(isa, p, kLayouts[0]).all()) == 0);
  });
}

TEST_CASE_TEMPLATE("NaN goes through, to where it reaches", T, float, double) {
  for (const Form form : {Form::kCausal, Form::kSource, Form::kTwoSided})
    for (const Index lanes : {3, 20}) {
      const Problem<T> clean({1, 9, lanes}, form, false, kLayouts[0]);
      const Problem<T> p({1, 9, lanes}, form, false, kLayouts[0]);
      p.v.at(0, 4, 0, 1) = kNaN;
      for_isas([&](const Isa &isa) {
        const Results<T> want = run(isa, clean, kLayouts[0]), got = run(isa, p, kLayouts[0]);
        for (Index i = 0; i < 9; ++i)
          for (Index c = 0; c < p.parts(); ++c)
            for (Index h = 0; h < lanes; ++h) {
              const T x = got.parts.at(0, i, c, h), y = want.parts.at(0, i, c, h);
              const bool reached = h == 1 && (i >= 4 || form == Form::kTwoSided);
              CHECK((reached ? x != x : x == y));
            }
        CHECK(got.denergy.at(0, 0, 0, 1) != got.denergy.at(0, 0, 0, 1));
        CHECK(got.denergy.at(0, 0, 0, 0) == want.denergy.at(0, 0, 0, 0));
      });
    }
}

TEST_CASE_TEMPLATE("no chains at all", T, float, double) {
  for (const Shape &shape : {Shape{0, 4, 3}, Shape{2, 4, 0}, Shape{0, 2000, 0}, Shape{0, 4, 40}})
    for (const Form form : {Form::kCausal, Form::kSource, Form::kTwoSided}) {
      const Problem<T> p(shape, form, true, kLayouts[0]);
      for_isas([&](const Isa &isa) { run(isa, p, kLayouts[0], 2); });
    }
}

}  // namespace
}  // namespace bkcore
