// The operators in plain complex numbers, as in a textbook, and their derivatives by dual numbers:
// every number carries its derivative along one direction.
#pragma once

#include <complex>
#include <vector>

#include "memory.h"

namespace bkcore {
namespace {

using Complex = std::complex<double>;

struct Dual {
  Complex value, slope;
  Dual(Complex value = 0, Complex slope = 0) : value(value), slope(slope) {}
  Dual(double value) : value(value) {}
};
inline Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
inline Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.slope - b.slope}; }
inline Dual operator*(Dual a, Dual b) {
  return {a.value * b.value, a.slope * b.value + a.value * b.slope};
}
inline Dual operator/(Dual a, Dual b) {
  const Complex ratio = a.value / b.value;
  return {ratio, (a.slope - ratio * b.slope) / b.value};
}

// One chain of a sweep. hopping[i] couples the sites i and i + 1.
struct ChainInput {
  std::vector<Dual> v, source, eta, hopping;
  Dual energy;
  Dual diagonal(Index i) const { return v[i] - energy - Dual(Complex(0, 1)) * eta[i]; }
};

// g, and psi if there is a source.
inline std::vector<Dual> causal_chain(const ChainInput &in) {
  std::vector<Dual> out;
  Dual g, psi;
  for (Index i = 0; i < static_cast<Index>(in.v.size()); ++i) {
    const Dual t = i ? in.hopping[i - 1] : Dual();
    g = Dual(1) / (in.diagonal(i) - t * t * g);
    out.push_back(g);
    if (in.source.empty()) continue;
    psi = g * (in.source[i] + t * psi);
    out.push_back(psi);
  }
  return out;
}

inline std::vector<Dual> two_sided_chain(const ChainInput &in) {
  const Index sites = static_cast<Index>(in.v.size());
  const std::vector<Dual> g = causal_chain({in.v, {}, in.eta, in.hopping, in.energy});
  std::vector<Dual> out(sites);
  Dual from_right;  // t_i^2 r_{i+1}
  for (Index i = sites - 1; i >= 0; --i) {
    const Dual t = i ? in.hopping[i - 1] : Dual();
    const Dual alone = in.diagonal(i) - from_right;
    out[i] = Dual(1) / (alone - (i ? t * t * g[i - 1] : Dual()));
    from_right = t * t * (Dual(1) / alone);
  }
  return out;
}

// The derivative of sum_i Re(conj(cotangent_i) output_i) along the direction given by the slopes.
inline double slope_of_loss(const std::vector<Dual> &outputs,
                            const std::vector<Complex> &cotangents) {
  double sum = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i)
    sum += (std::conj(cotangents[i]) * outputs[i].slope).real();
  return sum;
}

// The derivative of the loss with respect to one number, which is restored afterwards.
template <class Outputs>
double derivative(Dual &by, const std::vector<Complex> &cotangents, const Outputs &outputs) {
  by.slope = 1;
  const double result = slope_of_loss(outputs(), cotangents);
  by.slope = 0;
  return result;
}

}  // namespace
}  // namespace bkcore
