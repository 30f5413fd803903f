// The sweeps. This file is compiled once per instruction set, with BKCORE_ISA naming it.
//
// Everything but the table at the end lives in an unnamed namespace, and no header with inline
// functions is included: the linker merges inline functions of equal name, and might keep a copy
// with AVX-512 instructions for a processor that has none.
//
// A sweep goes along the sites, and at every site over a contiguous row of lanes: memory is read
// and written in order, and a row of lanes is independent arithmetic that vectorizes. The previous
// row of the output serves as the state of the recurrence; it is still in the cache.
//
// Contraction by the compiler is off and every fused multiply-add is written down, so that a lane's
// result depends neither on its place in a vector nor on how lanes are split among threads.

#include "sweep.h"

// A call left in a loop would keep it from being vectorized.
#define BKCORE_INLINE inline __attribute__((always_inline))
// The iterations of the loop that follows touch different memory. (An OpenMP simd loop would say
// the same, but GCC then keeps structs such as Complex in arrays and does not vectorize.)
#if defined(__clang__)
#define BKCORE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BKCORE_INDEPENDENT _Pragma("GCC ivdep")
#endif
#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(sweep_kernels_, isa)

namespace bkcore {
namespace {

using Index = std::int64_t;

#if defined(__FMA__) || defined(__aarch64__)
BKCORE_INLINE float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
BKCORE_INLINE double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
// Without the instruction a fused multiply-add would be a slow library call.
template <class T>
BKCORE_INLINE T madd(T a, T b, T c) { return a * b + c; }
#endif

template <class T>
struct Complex {
  T re, im;
};

template <class T>
BKCORE_INLINE Complex<T> load(const T *re, const T *im, Index h) { return {re[h], im[h]}; }

template <class T>
BKCORE_INLINE Complex<T> mul(Complex<T> a, Complex<T> b) {
  return {madd(a.re, b.re, -(a.im * b.im)), madd(a.re, b.im, a.im * b.re)};
}

// a + s b
template <class T>
BKCORE_INLINE Complex<T> axpy(T s, Complex<T> b, Complex<T> a) {
  return {madd(s, b.re, a.re), madd(s, b.im, a.im)};
}

template <class T>
BKCORE_INLINE Complex<T> add(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }

// 1 / (x - i y), in the two real numbers that the recurrences are written in.
template <class T>
BKCORE_INLINE Complex<T> invert(T x, T y) {
  const T scale = T(1) / madd(x, x, y * y);
  return {x * scale, y * scale};
}

// Stands in for the rows before the first and after the last site.
template <class T>
alignas(64) const T zeros[kMaxLanes] = {};

// Rows of one chunk of lanes [first, last); every pointer below starts at lane `first`.
template <class T>
struct Rows {
  const Sweep<T> &s;
  Index channels, width, batch, first;

  Rows(const Sweep<T> &sweep, Index components, Index b, Index from, Index to)
      : s(sweep), channels(components), width(to - from), batch(b), first(from) {}

  Index site(Index i) const { return (batch * s.sites + i) * s.lanes + first; }
  Index part(Index i, Index c) const {
    return ((batch * s.sites + i) * channels + c) * s.lanes + first;
  }
  const T *energy() const { return s.energy + first; }
  const T *eta(Index i) const { return s.eta + i * s.eta_stride + first; }
  // The bond between sites i and i + 1; none leaves the chain.
  const T *bond(Index i) const {
    const bool inside = i >= 0 && i < s.sites - 1;
    return inside ? s.hopping + i * s.hopping_stride + first : zeros<T>;
  }
  const T *parts(Index i, Index c) const { return i < 0 ? zeros<T> : s.parts + part(i, c); }
};

template <class T>
void left_row(const Rows<T> &rows, Index i, const T *before_re, const T *before_im,
              T *__restrict re, T *__restrict im) {
  const T *v = rows.s.v + rows.site(i), *e = rows.energy(), *eta = rows.eta(i);
  const T *t = rows.bond(i - 1);
BKCORE_INDEPENDENT
  for (Index h = 0; h < rows.width; ++h) {
    const T hop = t[h] * t[h];
    const Complex<T> g =
        invert(madd(-hop, before_re[h], v[h] - e[h]), madd(hop, before_im[h], eta[h]));
    re[h] = g.re;
    im[h] = g.im;
  }
}

template <class T>
void left_and_source_row(const Rows<T> &rows, Index i) {
  const T *v = rows.s.v + rows.site(i), *b = rows.s.source + rows.site(i);
  const T *e = rows.energy(), *eta = rows.eta(i), *t = rows.bond(i - 1);
  const T *g_re = rows.parts(i - 1, 0), *g_im = rows.parts(i - 1, 1);
  const T *p_re = rows.parts(i - 1, 2), *p_im = rows.parts(i - 1, 3);
  T *__restrict out = rows.s.parts + rows.part(i, 0);
  const Index lanes = rows.s.lanes;
BKCORE_INDEPENDENT
  for (Index h = 0; h < rows.width; ++h) {
    const T hop = t[h] * t[h];
    const Complex<T> g = invert(madd(-hop, g_re[h], v[h] - e[h]), madd(hop, g_im[h], eta[h]));
    const Complex<T> psi = mul(g, {madd(t[h], p_re[h], b[h]), t[h] * p_im[h]});
    out[h] = g.re;
    out[h + lanes] = g.im;
    out[h + 2 * lanes] = psi.re;
    out[h + 3 * lanes] = psi.im;
  }
}

template <class T>
void causal(const Sweep<T> &s, Index batch, Index first, Index last) {
  const Rows<T> rows(s, s.source ? 4 : 2, batch, first, last);
  for (Index i = 0; i < s.sites; ++i) {
    if (s.source) {
      left_and_source_row(rows, i);
    } else {
      T *out = s.parts + rows.part(i, 0);
      left_row(rows, i, rows.parts(i - 1, 0), rows.parts(i - 1, 1), out, out + s.lanes);
    }
  }
}

// Replaces g_i, left in the output by the causal sweep, by G_ii, and moves r from i + 1 to i.
template <class T>
void meet_row(const Rows<T> &rows, Index i, T *r_re, T *r_im) {
  const T *v = rows.s.v + rows.site(i), *e = rows.energy(), *eta = rows.eta(i);
  const T *t_left = rows.bond(i - 1), *t_right = rows.bond(i);
  const T *g_re = rows.parts(i - 1, 0), *g_im = rows.parts(i - 1, 1);
  T *__restrict out = rows.s.parts + rows.part(i, 0);
  const Index lanes = rows.s.lanes;
BKCORE_INDEPENDENT
  for (Index h = 0; h < rows.width; ++h) {
    const T left = t_left[h] * t_left[h], right = t_right[h] * t_right[h];
    const T x = madd(-right, r_re[h], v[h] - e[h]), y = madd(right, r_im[h], eta[h]);
    const Complex<T> r = invert(x, y);
    const Complex<T> center = invert(madd(-left, g_re[h], x), madd(left, g_im[h], y));
    out[h] = center.re;
    out[h + lanes] = center.im;
    r_re[h] = r.re;
    r_im[h] = r.im;
  }
}

template <class T>
void two_sided(const Sweep<T> &s, Index batch, Index first, Index last) {
  causal(s, batch, first, last);
  const Rows<T> rows(s, 2, batch, first, last);
  alignas(64) T r_re[kMaxLanes] = {}, r_im[kMaxLanes] = {};
  for (Index i = s.sites - 1; i >= 0; --i) meet_row(rows, i, r_re, r_im);
}

// Gradients of the parameters of one batch element. A parameter shared by all sites is summed in
// blocks of sites: the round-off then grows with the block and the number of blocks, not with N.
template <class T>
class ParameterSums {
 public:
  ParameterSums(const Adjoint<T> &a, Index batch, Index first, Index last)
      : width_(last - first),
        eta_stride_(a.forward.eta_stride),
        hopping_stride_(a.forward.hopping_stride),
        energy_total_(a.denergy + batch * a.forward.lanes + first),
        eta_total_(a.deta + batch * rows(eta_stride_, a.forward.sites) * a.forward.lanes + first),
        hopping_total_(a.dhopping +
                       batch * rows(hopping_stride_, a.forward.sites - 1) * a.forward.lanes +
                       first) {}

  T *energy() { return energy_; }
  T *eta(Index i) { return eta_stride_ ? eta_total_ + i * eta_stride_ : eta_; }
  // What goes to a bond outside of the chain is thrown away; it is zero, or comes from NaN.
  T *bond(Index i, Index sites) {
    if (i < 0 || i >= sites - 1) return outside_;
    return hopping_stride_ ? hopping_total_ + i * hopping_stride_ : hopping_;
  }

  // To be called after every site, descending.
  void site_done(Index i) {
    if (i % kBlock) return;
    flush(energy_, energy_total_);
    if (!eta_stride_) flush(eta_, eta_total_);
    if (!hopping_stride_) flush(hopping_, hopping_total_);
  }

 private:
  static constexpr Index kBlock = 64;

  static Index rows(Index stride, Index count) { return stride ? count : 1; }

  void flush(T *block, T *total) {
BKCORE_INDEPENDENT
    for (Index h = 0; h < width_; ++h) {
      total[h] += block[h];
      block[h] = 0;
    }
  }

  Index width_, eta_stride_, hopping_stride_;
  T *energy_total_, *eta_total_, *hopping_total_;
  alignas(64) T energy_[kMaxLanes] = {};
  alignas(64) T eta_[kMaxLanes] = {};
  alignas(64) T hopping_[kMaxLanes] = {};
  alignas(64) T outside_[kMaxLanes] = {};
};

// P_{i+1} and Q_{i+1}.
template <class T>
struct CausalState {
  alignas(64) T p_re[kMaxLanes] = {};
  alignas(64) T p_im[kMaxLanes] = {};
  alignas(64) T q_re[kMaxLanes] = {};
  alignas(64) T q_im[kMaxLanes] = {};
};

template <class T>
void causal_adjoint_row(const Adjoint<T> &a, const Rows<T> &rows, Index i, CausalState<T> &state,
                        ParameterSums<T> &sums) {
  const T *t = rows.bond(i);
  const T *t_before = rows.bond(i - 1);
  const T *g = rows.parts(i, 0), *g_re = rows.parts(i - 1, 0), *g_im = rows.parts(i - 1, 1);
  const T *c = a.grad + rows.part(i, 0);
  T *__restrict dv = a.dv + rows.site(i);
  T *__restrict de = sums.energy(), *__restrict deta = sums.eta(i);
  T *__restrict dt = sums.bond(i - 1, rows.s.sites);
  const Index lanes = rows.s.lanes;
BKCORE_INDEPENDENT
  for (Index h = 0; h < rows.width; ++h) {
    const Complex<T> here = {g[h], g[h + lanes]};
    const Complex<T> lambda = axpy(t[h] * t[h], load(state.p_re, state.p_im, h),
                                   Complex<T>{c[h], -c[h + lanes]});
    const Complex<T> p = mul(lambda, mul(here, here));
    dv[h] = -p.re;
    de[h] += p.re;
    deta[h] -= p.im;
    dt[h] = madd(2 * t_before[h], madd(p.re, g_re[h], -(p.im * g_im[h])), dt[h]);
    state.p_re[h] = p.re;
    state.p_im[h] = p.im;
  }
}

template <class T>
void causal_source_adjoint_row(const Adjoint<T> &a, const Rows<T> &rows, Index i,
                               CausalState<T> &state, ParameterSums<T> &sums) {
  const T *t = rows.bond(i);
  const T *t_before = rows.bond(i - 1);
  const T *g = rows.parts(i, 0), *g_re = rows.parts(i - 1, 0), *g_im = rows.parts(i - 1, 1);
  const T *psi_re = rows.parts(i - 1, 2), *psi_im = rows.parts(i - 1, 3);
  const T *b = rows.s.source + rows.site(i);
  const T *c = a.grad + rows.part(i, 0);
  T *__restrict dv = a.dv + rows.site(i), *__restrict db = a.dsource + rows.site(i);
  T *__restrict de = sums.energy(), *__restrict deta = sums.eta(i);
  T *__restrict dt = sums.bond(i - 1, rows.s.sites);
  const Index lanes = rows.s.lanes;
BKCORE_INDEPENDENT
  for (Index h = 0; h < rows.width; ++h) {
    const Complex<T> here = {g[h], g[h + lanes]};
    const Complex<T> mu = axpy(t[h], load(state.q_re, state.q_im, h),
                               Complex<T>{c[h + 2 * lanes], -c[h + 3 * lanes]});
    const Complex<T> q = mul(mu, here);
    const Complex<T> u = {madd(t_before[h], psi_re[h], b[h]), t_before[h] * psi_im[h]};
    const Complex<T> lambda =
        axpy(t[h] * t[h], load(state.p_re, state.p_im, h),
             add(mul(mu, u), Complex<T>{c[h], -c[h + lanes]}));
    const Complex<T> p = mul(lambda, mul(here, here));
    dv[h] = -p.re;
    db[h] = q.re;
    de[h] += p.re;
    deta[h] -= p.im;
    dt[h] += madd(2 * t_before[h], madd(p.re, g_re[h], -(p.im * g_im[h])),
                  madd(q.re, psi_re[h], -(q.im * psi_im[h])));
    state.p_re[h] = p.re;
    state.p_im[h] = p.im;
    state.q_re[h] = q.re;
    state.q_im[h] = q.im;
  }
}

template <class T>
void causal_backward(const Adjoint<T> &a, Index batch, Index first, Index last, T *) {
  const Sweep<T> &s = a.forward;
  const Rows<T> rows(s, s.source ? 4 : 2, batch, first, last);
  ParameterSums<T> sums(a, batch, first, last);
  CausalState<T> state;
  for (Index i = s.sites - 1; i >= 0; --i) {
    if (s.source) {
      causal_source_adjoint_row(a, rows, i, state, sums);
    } else {
      causal_adjoint_row(a, rows, i, state, sums);
    }
    sums.site_done(i);
  }
}

// S_i from row i - 1 of the workspace, whose rows hold Re g, Im g, Re S, Im S.
template <class T>
void reach_row(const Adjoint<T> &a, const Rows<T> &rows, Index i, T *__restrict out) {
  if (i == 0) {
    for (Index h = 0; h < rows.width; ++h) out[2 * rows.width + h] = out[3 * rows.width + h] = 0;
    return;
  }
  const Index width = rows.width, lanes = rows.s.lanes;
  const T *before = out - 4 * width, *t = rows.bond(i - 1), *c = a.grad + rows.part(i - 1, 0);
BKCORE_INDEPENDENT
  for (Index h = 0; h < width; ++h) {
    const Complex<T> hop = {t[h] * before[h], t[h] * before[h + width]};
    const Complex<T> sum = {before[h + 2 * width] + c[h], before[h + 3 * width] - c[h + lanes]};
    const Complex<T> reach = mul(mul(hop, hop), sum);
    out[h + 2 * width] = reach.re;
    out[h + 3 * width] = reach.im;
  }
}

// Of site i + 1: r, X = S' + c, Y = G^2 (c + S').
template <class T>
struct TwoSidedState {
  alignas(64) T r_re[kMaxLanes] = {};
  alignas(64) T r_im[kMaxLanes] = {};
  alignas(64) T x_re[kMaxLanes] = {};
  alignas(64) T x_im[kMaxLanes] = {};
  alignas(64) T y_re[kMaxLanes] = {};
  alignas(64) T y_im[kMaxLanes] = {};
};

template <class T>
void two_sided_adjoint_row(const Adjoint<T> &a, const Rows<T> &rows, Index i, const T *work,
                           TwoSidedState<T> &state, ParameterSums<T> &sums) {
  const T *v = rows.s.v + rows.site(i), *e = rows.energy(), *eta = rows.eta(i);
  const T *t = rows.bond(i), *center = rows.parts(i, 0), *grad = a.grad + rows.part(i, 0);
  T *__restrict dv = a.dv + rows.site(i);
  T *__restrict de = sums.energy(), *__restrict deta = sums.eta(i);
  T *__restrict dt = sums.bond(i, rows.s.sites);
  const Index width = rows.width, lanes = rows.s.lanes;
BKCORE_INDEPENDENT
  for (Index h = 0; h < width; ++h) {
    const Complex<T> c = {grad[h], -grad[h + lanes]};
    const Complex<T> r = load(state.r_re, state.r_im, h);
    const Complex<T> hop = {t[h] * r.re, t[h] * r.im};
    const Complex<T> from_right = mul(mul(hop, hop), load(state.x_re, state.x_im, h));
    const Complex<T> from_left = {work[h + 2 * width], work[h + 3 * width]};
    const Complex<T> root = {center[h], center[h + lanes]};
    const Complex<T> weight = mul(root, root);
    const Complex<T> w = mul(weight, add(add(c, from_left), from_right));
    dv[h] = -w.re;
    de[h] += w.re;
    deta[h] -= w.im;
    const Complex<T> right = mul(r, mul(weight, add(c, from_left)));
    const Complex<T> left = mul({work[h], work[h + width]}, load(state.y_re, state.y_im, h));
    dt[h] = madd(2 * t[h], right.re + left.re, dt[h]);
    const Complex<T> x = add(from_right, c);
    const Complex<T> y = mul(weight, x);
    const T square = t[h] * t[h];
    const Complex<T> r_here =
        invert(madd(-square, r.re, v[h] - e[h]), madd(square, r.im, eta[h]));
    state.r_re[h] = r_here.re;
    state.r_im[h] = r_here.im;
    state.x_re[h] = x.re;
    state.x_im[h] = x.im;
    state.y_re[h] = y.re;
    state.y_im[h] = y.im;
  }
}

template <class T>
void two_sided_backward(const Adjoint<T> &a, Index batch, Index first, Index last, T *work) {
  const Sweep<T> &s = a.forward;
  const Rows<T> rows(s, 2, batch, first, last);
  const Index row = 4 * rows.width;
  for (Index i = 0; i < s.sites; ++i) {
    T *here = work + i * row;
    const T *before = i ? here - row : zeros<T>;
    left_row(rows, i, before, i ? before + rows.width : zeros<T>, here, here + rows.width);
    reach_row(a, rows, i, here);
  }
  ParameterSums<T> sums(a, batch, first, last);
  TwoSidedState<T> state;
  for (Index i = s.sites - 1; i >= 0; --i) {
    two_sided_adjoint_row(a, rows, i, work + i * row, state, sums);
    sums.site_done(i);
  }
}

template <class T>
Kernels<T> kernels() {
  return {causal<T>, two_sided<T>, causal_backward<T>, two_sided_backward<T>};
}

}  // namespace

KernelTable BKCORE_TABLE(BKCORE_ISA)() { return {kernels<float>(), kernels<double>()}; }

}  // namespace bkcore
