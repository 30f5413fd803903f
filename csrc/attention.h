// Resolvent attention: a source with a matrix for every site, read by a query. Formulas, layout and
// derivation: src/bkcore/kernels/ops/attention.py.
//
// One unit of work is one chain (batch, head). Its state psi (2, keys, values), real parts before
// imaginary ones, stays in the first-level cache; vectors go along the values. The rows of all
// other heads lie between two rows of a chain. Processors do not predict such strides, so rows are
// prefetched.
#pragma once

#include "simd.h"
#include "sweep.h"

namespace bkcore {
namespace {

template <class T>
struct Pair {
  T re, im;
};

template <class T>
BKCORE_INLINE Pair<T> product(Pair<T> a, Pair<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// The rows of one chain.
template <class T>
struct ChainRows {
  const Attention<T> &a;
  Index batch, head;
  BKCORE_INLINE Index site(Index i) const { return (batch * a.sites + i) * a.heads + head; }
  BKCORE_INLINE Index chain() const { return batch * a.heads + head; }
  BKCORE_INLINE Index state() const { return 2 * a.keys * a.values; }
  BKCORE_INLINE const T *query(Index i) const { return a.query + site(i) * a.keys; }
  BKCORE_INLINE const T *key(Index i) const { return a.key + site(i) * a.keys; }
  BKCORE_INLINE const T *value(Index i) const { return a.value + site(i) * a.values; }
  BKCORE_INLINE Pair<T> g(Index i) const { return {a.g[2 * site(i)], a.g[2 * site(i) + 1]}; }
  BKCORE_INLINE Pair<T> g_before(Index i) const {
    if (i > 0) return g(i - 1);
    if (!a.first_g) return {0, 0};
    return {a.first_g[2 * chain()], a.first_g[2 * chain() + 1]};
  }
};

constexpr Index kAhead = 12;  // sites: far enough for memory, near enough for the first-level cache

template <int kWrite, class T>
BKCORE_INLINE void prefetch(const T *row, Index count) {
  constexpr Index line = 64 / sizeof(T);
  for (Index at = 0; at < count; at += line) __builtin_prefetch(row + at, kWrite);
  if (count > 0) __builtin_prefetch(row + count - 1, kWrite);
}

template <class T>
BKCORE_INLINE void prefetch_inputs(const ChainRows<T> &rows, Index i) {
  prefetch<0>(rows.query(i), rows.a.keys);
  prefetch<0>(rows.key(i), rows.a.keys);
  prefetch<0>(rows.value(i), rows.a.values);
  prefetch<0>(rows.a.hopping + rows.site(i), 1);
}

// Part of the state before a site. A memory that nothing is added to decays until its numbers are
// subnormal, and they would stay so.
template <class T, class Place>
BKCORE_INLINE typename Simd<T>::V remembered(const T *p, Place place) {
  return without_tiny<T>(load<T>(p, place));
}

// psi := g (key value^T + t psi), from one array to another or in place. Writes query^T psi to
// `out` unless that is null.
template <class T>
BKCORE_INLINE void propagate_site(const ChainRows<T> &rows, Index i, const T *from, T *to, T *out) {
  using S = Simd<T>;
  const Index keys = rows.a.keys, values = rows.a.values, plane = keys * values;
  const T *query = rows.query(i), *key = rows.key(i), *value = rows.value(i);
  const Pair<T> g = rows.g(i);
  const T t = rows.a.hopping[rows.site(i)];
  const auto p_re = S::set(g.re * t), p_im = S::set(g.im * t);
  for_vectors<T>(values, [&](Index u, auto place) {
    const auto source = load<T>(value + u, place);
    auto sum_re = S::set(0), sum_im = S::set(0);
    for (Index k = 0; k < keys; ++k) {
      const Index at = k * values + u;
      const auto re = remembered(from + at, place), im = remembered(from + plane + at, place);
      const auto moved_re = S::madd(p_re, re, -(p_im * im));
      const auto moved_im = S::madd(p_re, im, p_im * re);
      const auto new_re = S::madd(S::set(g.re * key[k]), source, moved_re);
      const auto new_im = S::madd(S::set(g.im * key[k]), source, moved_im);
      store<T>(to + at, new_re, place);
      store<T>(to + plane + at, new_im, place);
      sum_re = S::madd(S::set(query[k]), new_re, sum_re);
      sum_im = S::madd(S::set(query[k]), new_im, sum_im);
    }
    if (out) {
      store<T>(out + u, sum_re, place);
      store<T>(out + values + u, sum_im, place);
    }
  });
}

template <class T>
BKCORE_INLINE void copy_row(T *to, const T *from, Index count) {
  if (count == 0 || to == from) return;  // without a count neither may have an address
  if (from) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    std::memset(to, 0, count * sizeof(T));
  }
}

template <class T>
void attention(const Attention<T> &a, Index batch, Index head) {
  const ChainRows<T> rows{a, batch, head};
  const Index chain = rows.chain(), size = rows.state(), chunks = chunks_of(a);
  T *const psi = a.psi + chain * size;
  const T *before = a.first_psi ? a.first_psi + chain * size : nullptr;
  if (!before || a.sites == 0) {
    copy_row(psi, before, size);
    before = psi;
  }
  Pair<T> g = rows.g_before(0);
  for (Index i = 0; i < a.sites; ++i) {
    const Index site = rows.site(i);
    if (const Index next = i + kAhead; next < a.sites) {
      prefetch_inputs(rows, next);
      prefetch<0>(a.v + rows.site(next), 1);
      prefetch<1>(a.out + rows.site(next) * 2 * a.values, 2 * a.values);
    }
    if (a.checkpoints && i % a.chunk == 0)
      copy_row<T>(a.checkpoints + (chain * chunks + i / a.chunk) * size, before, size);
    const T t = a.hopping[site], tt = t * t;
    const T x = a.v[site] - a.energy[head] - tt * g.re, y = a.eta[head] + tt * g.im;
    const T inverse = 1 / (x * x + y * y);
    g = {x * inverse, y * inverse};
    a.g[2 * site] = g.re;
    a.g[2 * site + 1] = g.im;
    propagate_site<T>(rows, i, before, psi, a.out + site * 2 * a.values);
    before = psi;
  }
}

template <class T>
BKCORE_INLINE void prefetch_outputs(const ChainRows<T> &rows, const AttentionBackward<T> &d,
                                    Index i) {
  const Index site = rows.site(i), keys = rows.a.keys, values = rows.a.values;
  prefetch_inputs(rows, i);
  prefetch<0>(d.dout + site * 2 * values, 2 * values);
  prefetch<1>(d.dquery + site * keys, keys);
  prefetch<1>(d.dkey + site * keys, keys);
  prefetch<1>(d.dvalue + site * values, values);
}

// The part of the adjoint of one site that loops over the matrix. `m` holds M' = t' g' M of the
// site above; this site adds query c^T to get its own M, and leaves t g M in `m`.
template <class T>
struct SiteSums {
  Pair<T> before;  // <M, psi of the site before>
  Pair<T> source;  // key^T M value
};

// `partial` has partial sums for the query and for the key, for every key.
template <class T>
BKCORE_INLINE SiteSums<T> adjoint_site(const ChainRows<T> &rows, const AttentionBackward<T> &d,
                                       Index i, const T *before, const T *now, T *m, T *partial) {
  using S = Simd<T>;
  const Index keys = rows.a.keys, values = rows.a.values, plane = keys * values;
  const Index site = rows.site(i);
  const T *query = rows.query(i), *key = rows.key(i), *value = rows.value(i);
  const T *grad = d.dout + site * 2 * values;
  const Pair<T> g = rows.g(i);
  const T t = rows.a.hopping[site];
  const auto g_re = S::set(g.re), g_im = S::set(g.im);
  const auto p_re = S::set(g.re * t), p_im = S::set(g.im * t), none = S::set(0);
  // Two sums each, so that no product waits for the previous one.
  enum { kReRe, kImIm, kReIm, kImRe, kSourceRe, kSourceIm, kSums };
  T sums[kSums][kPartialSums<T>] = {};
  for_vectors<T>(values, [&](Index u, auto place) {
    const auto so_far = [&](int n) { return S::load(partial_sums(sums[n], u)); };
    const auto keep = [&](int n, auto x) { S::store(partial_sums(sums[n], u), x); };
    auto re_re = so_far(kReRe), im_im = so_far(kImIm);
    auto re_im = so_far(kReIm), im_re = so_far(kImRe);
    const auto c_re = load<T>(grad + u, place), c_im = -load<T>(grad + values + u, place);
    const auto w = load<T>(value + u, place);
    auto value_re = none, value_im = none;
    const bool begun = u >= kPartialSums<T>;
    for (Index k = 0; k < keys; ++k) {
      const Index at = k * values + u;
      T *of_query = partial_sums(partial + 2 * k * kPartialSums<T>, u);
      T *of_key = of_query + kPartialSums<T>;
      const auto q = S::set(query[k]), kk = S::set(key[k]);
      const auto m_re = S::madd(q, c_re, load<T>(m + at, place));
      const auto m_im = S::madd(q, c_im, load<T>(m + plane + at, place));
      const auto psi_re = load<T>(now + at, place), psi_im = load<T>(now + plane + at, place);
      const auto b_re = remembered(before + at, place);
      const auto b_im = remembered(before + plane + at, place);
      re_re = S::madd(m_re, b_re, re_re);
      im_im = S::madd(m_im, b_im, im_im);
      re_im = S::madd(m_re, b_im, re_im);
      im_re = S::madd(m_im, b_re, im_re);
      const auto query_sum = S::madd(psi_re, c_re, -(psi_im * c_im));
      const auto moved = S::madd(g_re, m_re, -(g_im * m_im));
      S::store(of_query, begun ? S::load(of_query) + query_sum : query_sum);
      S::store(of_key, begun ? S::madd(moved, w, S::load(of_key)) : moved * w);
      value_re = S::madd(kk, m_re, value_re);
      value_im = S::madd(kk, m_im, value_im);
      store<T>(m + at, S::madd(p_re, m_re, -(p_im * m_im)), place);
      store<T>(m + plane + at, S::madd(p_re, m_im, p_im * m_re), place);
    }
    keep(kReRe, re_re), keep(kImIm, im_im), keep(kReIm, re_im), keep(kImRe, im_re);
    keep(kSourceRe, S::madd(w, value_re, so_far(kSourceRe)));
    keep(kSourceIm, S::madd(w, value_im, so_far(kSourceIm)));
    store<T>(d.dvalue + site * values + u, S::madd(g_re, value_re, -(g_im * value_im)), place);
  });
  for (Index k = 0; k < keys; ++k) {
    const T *of_query = partial + 2 * k * kPartialSums<T>;
    d.dquery[site * keys + k] = sum_of(of_query);
    d.dkey[site * keys + k] = sum_of(of_query + kPartialSums<T>);
  }
  const auto sum = [&](int n) { return sum_of(sums[n]); };
  return {{sum(kReRe) - sum(kImIm), sum(kReIm) + sum(kImRe)}, {sum(kSourceRe), sum(kSourceIm)}};
}

// The states of a chunk, plus the one before it.
template <class T>
BKCORE_INLINE Index kept_states(const Attention<T> &a) {
  return least(a.chunk, a.sites) + 1;
}

template <class T>
Index attention_adjoint_bytes(const Attention<T> &a) {
  const Index state = 2 * a.keys * a.values, partial = 2 * a.keys * kPartialSums<T>;
  return ((kept_states(a) + 1) * state + partial) * static_cast<Index>(sizeof(T));
}

template <class T>
void attention_adjoint(const Attention<T> &a, const AttentionBackward<T> &d, Index batch,
                       Index head, T *memory) {
  const ChainRows<T> rows{a, batch, head};
  const Index chain = rows.chain(), size = rows.state(), plane = size / 2;
  const Index chunks = chunks_of(a);
  T *states = memory, *m = memory + kept_states(a) * size, *partial = m + size;
  // Sums that no value reaches stay 0.
  std::memset(partial, 0, 2 * a.keys * kPartialSums<T> * sizeof(T));
  copy_row(m, d.dpsi + chain * size, size);
  for (Index j = plane; j < size; ++j) m[j] = -m[j];  // a cotangent is dL/dRe - i dL/dIm
  Pair<T> carry = {0, 0};
  T denergy = 0, deta = 0;
  for (Index chunk = chunks - 1; chunk >= 0; --chunk) {
    const Index start = chunk * a.chunk, end = start + least(a.sites - start, a.chunk);
    copy_row<T>(states, a.checkpoints + (chain * chunks + chunk) * size, size);
    for (Index i = start; i < end; ++i) {
      if (i + kAhead < end) prefetch_inputs(rows, i + kAhead);
      T *from = states + (i - start) * size;
      propagate_site<T>(rows, i, from, from + size, nullptr);
    }
    for (Index i = end - 1; i >= start; --i) {
      const Index site = rows.site(i);
      if (i >= kAhead) prefetch_outputs(rows, d, i - kAhead);
      const T *before = states + (i - start) * size;
      const SiteSums<T> s = adjoint_site<T>(rows, d, i, before, before + size, m, partial);
      const T t = a.hopping[site];
      const Pair<T> g = rows.g(i), last = rows.g_before(i);
      const Pair<T> lambda = {d.dg[2 * site] + s.source.re + t * s.before.re + carry.re,
                              -d.dg[2 * site + 1] + s.source.im + t * s.before.im + carry.im};
      const Pair<T> p = product(product(lambda, g), g);
      d.dv[site] = -p.re;
      denergy += p.re;
      deta -= p.im;
      d.dhopping[site] =
          g.re * s.before.re - g.im * s.before.im + 2 * t * (p.re * last.re - p.im * last.im);
      carry = {t * t * p.re, t * t * p.im};
    }
  }
  d.denergy[chain] = denergy;
  d.deta[chain] = deta;
  d.dfirst_g[2 * chain] = carry.re;
  d.dfirst_g[2 * chain + 1] = -carry.im;
  T *dfirst_psi = d.dfirst_psi + chain * size;
  for (Index j = 0; j < plane; ++j) dfirst_psi[j] = m[j];
  for (Index j = plane; j < size; ++j) dfirst_psi[j] = -m[j];
}

}  // namespace
}  // namespace bkcore
