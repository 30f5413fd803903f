// Resolvent attention and its adjoint against the recurrence in complex<double>.

#include "reference.h"
#include "run_attention.h"
#include "support.h"

namespace bkcore {
namespace {

constexpr double kEta = 0.5;  // the smallest one

struct Shape {
  Index batch, sites, heads, keys, values;
};

// The inputs and outputs of one chain, in the order of the operator's tensors.
struct ChainOfMatrices {
  Index keys, values;
  std::vector<Dual> v, hopping, query, key, value, first_psi;
  Dual energy, eta, first_g;

  // g and the output of every site, then the last psi.
  std::vector<Dual> outputs() const {
    std::vector<Dual> out, psi = first_psi;
    Dual g = first_g;
    for (Index i = 0; i < static_cast<Index>(v.size()); ++i) {
      const Dual t = hopping[i];
      g = Dual(1) / (v[i] - energy - Dual(Complex(0, 1)) * eta - t * t * g);
      out.push_back(g);
      std::vector<Dual> found(values);
      for (Index k = 0; k < keys; ++k)
        for (Index u = 0; u < values; ++u) {
          Dual &x = psi[k * values + u];
          x = g * (key[i * keys + k] * value[i * values + u] + t * x);
          found[u] = found[u] + query[i * keys + k] * x;
        }
      out.insert(out.end(), found.begin(), found.end());
    }
    out.insert(out.end(), psi.begin(), psi.end());
    return out;
  }
};

template <class T>
struct AttentionProblem {
  Shape shape;
  Index chunk;
  Buffer<T> v, hopping, energy, eta, query, key, value, first_g, first_psi, dg, dout, dpsi;

  explicit AttentionProblem(const Shape &shape, bool first, Index chunk = 4)
      : shape(shape), chunk(chunk) {
    Random random(5);
    const auto [batch, sites, heads, keys, values] = shape;
    const auto normal = [&](Index count) {
      return Buffer<T>::of(count, [&] { return random.normal(); }, Place::kBeforePage);
    };
    const Index rows = batch * sites * heads, chains = batch * heads;
    v = normal(rows), hopping = normal(rows), energy = normal(heads);
    eta = Buffer<T>::of(heads, [&] { return random.uniform(kEta, 1.5); }, Place::kBeforePage);
    query = normal(rows * keys), key = normal(rows * keys), value = normal(rows * values);
    if (first) first_psi = normal(chains * 2 * keys * values);
    if (first) {
      first_g = normal(chains * 2);
      // Im g >= 0 keeps every denominator away from 0.
      for (Index i = 0; i < chains; ++i) first_g[2 * i + 1] = std::abs(first_g[2 * i + 1]);
    }
    dg = normal(rows * 2), dout = normal(rows * 2 * values);
    dpsi = normal(chains * 2 * keys * values);
  }

  Index chains() const { return shape.batch * shape.heads; }
  Index state() const { return 2 * shape.keys * shape.values; }

  ChainOfMatrices chain(Index b, Index h) const {
    const auto [batch, sites, heads, keys, values] = shape;
    ChainOfMatrices in{keys, values};
    const auto add = [](std::vector<Dual> &to, const T *from, Index count) {
      for (Index k = 0; k < count; ++k) to.push_back(double{from[k]});
    };
    in.energy = Dual(double{energy[h]}), in.eta = Dual(double{eta[h]});
    for (Index i = 0; i < sites; ++i) {
      const Index row = (b * sites + i) * heads + h;
      add(in.v, v.data() + row, 1);
      add(in.hopping, hopping.data() + row, 1);
      add(in.query, query.data() + row * keys, keys);
      add(in.key, key.data() + row * keys, keys);
      add(in.value, value.data() + row * values, values);
    }
    const Index at = b * heads + h, plane = keys * values;
    in.first_psi.resize(plane);
    if (!first_g.data()) return in;
    in.first_g = Dual(Complex(first_g[2 * at], first_g[2 * at + 1]));
    for (Index k = 0; k < plane; ++k)
      in.first_psi[k] =
          Dual(Complex(first_psi[at * 2 * plane + k], first_psi[at * 2 * plane + plane + k]));
    return in;
  }

  std::vector<Complex> cotangents(Index b, Index h) const {
    const auto [batch, sites, heads, keys, values] = shape;
    std::vector<Complex> all;
    const auto planes = [&](const T *x, Index count) {
      for (Index k = 0; k < count; ++k) all.emplace_back(x[k], x[count + k]);
    };
    for (Index i = 0; i < sites; ++i) {
      const Index row = (b * sites + i) * heads + h;
      planes(dg.data() + 2 * row, 1);
      planes(dout.data() + 2 * row * values, values);
    }
    planes(dpsi.data() + (b * heads + h) * state(), keys * values);
    return all;
  }
};

template <class T>
struct AttentionResults {
  Buffer<T> g, out, psi, checkpoints;
  Buffer<T> dv, dhopping, denergy, deta, dquery, dkey, dvalue, dfirst_g, dfirst_psi;

  AttentionResults(const Isa &isa, const AttentionProblem<T> &p, Index threads, bool keep = true) {
    const auto [batch, sites, heads, keys, values] = p.shape;
    const auto make = [](Index count) { return Buffer<T>(count, Place::kBeforePage); };
    const Index rows = batch * sites * heads;
    g = make(rows * 2), out = make(rows * 2 * values), psi = make(p.chains() * p.state());
    Attention<T> a{batch,
                   sites,
                   heads,
                   keys,
                   values,
                   p.chunk,
                   p.v.data(),
                   p.hopping.data(),
                   p.energy.data(),
                   p.eta.data(),
                   p.query.data(),
                   p.key.data(),
                   p.value.data(),
                   p.first_g.data(),
                   p.first_psi.data(),
                   g.data(),
                   out.data(),
                   psi.data(),
                   nullptr};
    if (keep) checkpoints = make(p.chains() * chunks_of(a) * p.state());
    a.checkpoints = checkpoints.data();
    run_attention(isa, threads, a);
    if (!keep) return;
    dv = make(rows), dhopping = make(rows), denergy = make(p.chains()), deta = make(p.chains());
    dquery = make(rows * keys), dkey = make(rows * keys), dvalue = make(rows * values);
    dfirst_g = make(p.chains() * 2), dfirst_psi = make(p.chains() * p.state());
    run_attention_backward<T>(isa, threads, a,
                              {p.dg.data(), p.dout.data(), p.dpsi.data(), dv.data(),
                               dhopping.data(), denergy.data(), deta.data(), dquery.data(),
                               dkey.data(), dvalue.data(), dfirst_g.data(), dfirst_psi.data()});
  }

  std::vector<T> forward() const { return joined({&g, &out, &psi}); }
  std::vector<T> backward() const {
    return joined(
        {&dv, &dhopping, &denergy, &deta, &dquery, &dkey, &dvalue, &dfirst_g, &dfirst_psi});
  }
  static std::vector<T> joined(std::initializer_list<const Buffer<T> *> parts) {
    std::vector<T> all;
    for (const Buffer<T> *part : parts) all.insert(all.end(), part->begin(), part->end());
    return all;
  }
};

// The expected results, each in its place.
template <class T>
struct ExpectedAttention {
  std::vector<double> forward, backward;
  // The largest inputs and intermediate states.
  double largest = 1, cotangent = 1, input = 1, hop = 1;

  explicit ExpectedAttention(const AttentionProblem<T> &p) {
    const auto [batch, sites, heads, keys, values] = p.shape;
    const Index rows = batch * sites * heads, plane = keys * values;
    std::vector<double> g(2 * rows), out(2 * rows * values), psi(p.chains() * 2 * plane);
    std::vector<double> dv(rows), dhopping(rows), denergy(p.chains()), deta(p.chains());
    std::vector<double> dquery(rows * keys), dkey(rows * keys), dvalue(rows * values);
    std::vector<double> dfirst_g(2 * p.chains()), dfirst_psi(p.chains() * 2 * plane);
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < heads; ++h) {
        ChainOfMatrices in = p.chain(b, h);
        const std::vector<Complex> c = p.cotangents(b, h);
        const std::vector<Dual> outputs = in.outputs();
        const auto planes = [](auto from, Index count, double *to) {
          for (Index k = 0; k < count; ++k)
            to[k] = from[k].value.real(), to[count + k] = from[k].value.imag();
        };
        for (const Dual &x : outputs) largest = std::max(largest, std::abs(x.value));
        for (const Complex &x : c) cotangent = std::max(cotangent, std::abs(x));
        for (const auto *many : {&in.v, &in.hopping, &in.query, &in.key, &in.value})
          for (const Dual &x : *many) input = std::max(input, std::abs(x.value));
        const auto by = [&](Dual &x) { return derivative(x, c, [&] { return in.outputs(); }); };
        // Both parts of a complex number.
        const auto both = [&](Dual &x, double &re, double &im) {
          re = by(x);
          x.slope = Complex(0, 1);
          im = slope_of_loss(in.outputs(), c);
          x.slope = 0;
        };
        auto from = outputs.begin();
        for (Index i = 0; i < sites; ++i) {
          const Index row = (b * sites + i) * heads + h;
          planes(from, 1, &g[2 * row]);
          planes(from + 1, values, out.data() + 2 * row * values);
          from += 1 + values;
          dv[row] = by(in.v[i]);
          dhopping[row] = by(in.hopping[i]);
          for (Index k = 0; k < keys; ++k) {
            dquery[row * keys + k] = by(in.query[i * keys + k]);
            dkey[row * keys + k] = by(in.key[i * keys + k]);
          }
          for (Index u = 0; u < values; ++u)
            dvalue[row * values + u] = by(in.value[i * values + u]);
        }
        const Index chain = b * heads + h;
        planes(from, plane, psi.data() + chain * 2 * plane);
        denergy[chain] = by(in.energy);
        deta[chain] = by(in.eta);
        both(in.first_g, dfirst_g[2 * chain], dfirst_g[2 * chain + 1]);
        for (Index k = 0; k < plane; ++k)
          both(in.first_psi[k], dfirst_psi[chain * 2 * plane + k],
               dfirst_psi[chain * 2 * plane + plane + k]);
      }
    for (const auto *part : {&g, &out, &psi})
      forward.insert(forward.end(), part->begin(), part->end());
    for (const auto *part :
         {&dv, &dhopping, &denergy, &deta, &dquery, &dkey, &dvalue, &dfirst_g, &dfirst_psi})
      backward.insert(backward.end(), part->begin(), part->end());
  }

  double largest_gradient() const {
    double most = cotangent;
    for (const double x : backward) most = std::max(most, std::abs(x));
    return most;
  }
};

TEST_CASE_TEMPLATE("attention and adjoint, all sizes", T, float, double) {
  const Shape shapes[] = {{1, 1, 1, 1, 1},  {2, 2, 3, 1, 2},  {1, 3, 1, 2, 15}, {1, 5, 2, 3, 16},
                          {1, 9, 1, 2, 17}, {2, 7, 1, 1, 33}, {1, 13, 2, 5, 3}, {1, 17, 1, 16, 1}};
  for (const Shape &shape : shapes)
    for (const bool first : {false, true}) {
      CAPTURE(shape.sites);
      CAPTURE(shape.keys);
      CAPTURE(shape.values);
      CAPTURE(first);
      const AttentionProblem<T> p(shape, first);
      const ExpectedAttention<T> want(p);
      // The roundings at a site change its diagonal by at most 8 u A, with A = |v| + |E| + eta + 2
      // t^2 / eta, and so an entry of the resolvent by A / eta times itself. A result is a sum over
      // `keys` of such entries times what is read. A gradient is a sum of N such sums, each with
      // two entries.
      const double a = 2 * want.input + 1.5 + 2 * want.input * want.input / kEta;
      const double relative = 8 * kUnit<T> * a / kEta * static_cast<double>(shape.keys + 1);
      const double forward = relative * want.largest * want.input;
      const double backward =
          2 * relative * static_cast<double>(shape.sites) * want.largest_gradient() * want.input;
      const AttentionResults<T> best(isas().front(), p, 1);
      for_isas([&](const Isa &isa) {
        const AttentionResults<T> got(isa, p, 1);
        CHECK(distance(got.forward(), want.forward) <= forward);
        CHECK(distance(got.backward(), want.backward) <= backward);
        CHECK(distance(got.forward(), best.forward()) == 0);
      });
    }
}

TEST_CASE_TEMPLATE("threads, chunks and what is kept change no bit of attention", T, float,
                   double) {
  const AttentionProblem<T> p({2, 40, 3, 8, 33}, true);
  // Longer than the sequence, and so long that memory for all of it would overflow 64 bits.
  const AttentionProblem<T> longer({2, 40, 3, 8, 33}, true, Index{1} << 62);
  for_isas([&](const Isa &isa) {
    const AttentionResults<T> want(isa, p, 1), other(isa, longer, 1);
    for (const Index threads : {2, 5}) {
      const AttentionResults<T> got(isa, p, threads);
      CHECK(distance(got.forward(), want.forward()) == 0);
      CHECK(distance(got.backward(), want.backward()) == 0);
    }
    CHECK(distance(other.forward(), want.forward()) == 0);
    CHECK(distance(other.backward(), want.backward()) == 0);
    CHECK(distance(AttentionResults<T>(isa, p, 1, false).forward(), want.forward()) == 0);
  });
}

TEST_CASE_TEMPLATE("NaN in a value reaches that value only, and no g", T, float, double) {
  const AttentionProblem<T> clean({1, 6, 2, 2, 18}, false), p({1, 6, 2, 2, 18}, false);
  p.value[(2 * 2 + 1) * 18 + 17] = static_cast<T>(kNaN);  // site 2, head 1
  for_isas([&](const Isa &isa) {
    const AttentionResults<T> want(isa, clean, 1), got(isa, p, 1);
    CHECK(same_bits(got.g, want.g));
    for (Index i = 0; i < 6; ++i)
      for (Index h = 0; h < 2; ++h)
        for (Index c = 0; c < 2; ++c)
          for (Index u = 0; u < 18; ++u) {
            const Index at = ((i * 2 + h) * 2 + c) * 18 + u;
            const bool reached = i >= 2 && h == 1 && u == 17;
            CHECK((reached ? got.out[at] != got.out[at] : got.out[at] == want.out[at]));
          }
    CHECK(got.denergy[1] != got.denergy[1]);
    CHECK(got.denergy[0] == want.denergy[0]);
  });
}

TEST_CASE_TEMPLATE("a memory that nothing is added to ends at 0", T, float, double) {
  const AttentionProblem<T> p({1, 5000, 1, 2, 18}, true);
  // |g| is 0.76, and to the nearest number that takes no subnormal number down to 0.
  std::fill(p.v.begin(), p.v.end(), T{1});
  std::fill(p.hopping.begin(), p.hopping.end(), T{1});
  std::fill(p.value.begin(), p.value.end(), T{0});
  p.energy[0] = 0, p.eta[0] = static_cast<T>(0.5);
  for_isas([&](const Isa &isa) {
    for (const T x : AttentionResults<T>(isa, p, 1).psi) CHECK(x == 0);
  });
}

TEST_CASE_TEMPLATE("attention without batch, sites, heads, keys or values", T, float, double) {
  for (const Shape &shape : {Shape{0, 3, 2, 2, 2}, Shape{2, 0, 2, 2, 2}, Shape{2, 3, 0, 2, 2},
                             Shape{2, 3, 2, 0, 2}, Shape{2, 3, 2, 2, 0}})
    for (const bool first : {false, true}) {
      const AttentionProblem<T> p(shape, first);
      const ExpectedAttention<T> want(p);
      for_isas([&](const Isa &isa) {
        const AttentionResults<T> got(isa, p, 2);
        CHECK(distance(got.forward(), want.forward) <= 100 * kUnit<T>);
        CHECK(distance(got.backward(), want.backward) <= 1000 * kUnit<T>);
      });
    }
}

}  // namespace
}  // namespace bkcore
