// The causal sweep g_i = 1 / (A_i - t^2 g_{i-1}), psi_i = g_i (b_i + t psi_{i-1}) and its adjoint.
#pragma once

#include "tile.h"

namespace bkcore {
namespace {

// Re g, Im g, Re psi, Im psi of the previous site.
template <class T>
using CausalState = State<T, 4>;

template <class T>
BKCORE_INLINE typename Lanes<T>::Complex next_g(typename Lanes<T>::V v, typename Lanes<T>::V energy,
                                                typename Lanes<T>::V eta,
                                                typename Lanes<T>::V hopping,
                                                typename Lanes<T>::Complex before) {
  using L = Lanes<T>;
  const auto hop = hopping * hopping;
  return L::invert(L::madd(-hop, before.re, v - energy), L::madd(hop, before.im, eta));
}

// Where a row of the sweep is written. Streamed rows bypass the caches, so the state is kept
// separately; otherwise the row just written is the state for the next one.
enum class Output { kKept, kStreamed, kNone };

template <class T, Output kOutput>
BKCORE_INLINE void write(T *out, typename Simd<T>::V x, Whole place) {
  if constexpr (kOutput == Output::kStreamed) Simd<T>::stream(out, x);
  if constexpr (kOutput == Output::kKept) store(out, x, place);
}
template <class T, Output kOutput>
BKCORE_INLINE void write(T *out, typename Simd<T>::V x, Ragged place) {
  if constexpr (kOutput != Output::kNone) store(out, x, place);
}
template <class T, Output kOutput, class At>
BKCORE_INLINE void write(T *out, T *state, typename Simd<T>::V x, At place) {
  write<T, kOutput>(out, x, place);
  if constexpr (kOutput != Output::kKept) store(state, x, place);
}

// Data too large for the caches is prefetched a few hundred nanoseconds before it is needed, in
// ascending order: the hardware prefetcher follows neither rows of a few cache lines nor rows read
// backwards. While a sweep to the left works on a tile, it prefetches the one before it.
BKCORE_INLINE Index rows_ahead(Index width) { return 1 + 768 / width; }
constexpr Index kMirror = 32;
BKCORE_INLINE Index mirrored(Index k) { return k / kMirror * kMirror - 1 - k % kMirror; }

template <bool kPrefetch, class T>
BKCORE_INLINE void prefetch(const T *row) {
  if constexpr (kPrefetch) __builtin_prefetch(row);
}
template <bool kPrefetch, class T>
BKCORE_INLINE void prefetch_far(const T *row) {
  if constexpr (kPrefetch) __builtin_prefetch(row, 0, 2);
}

template <class T, Output kOutput, bool kPrefetch>
void sweep_tile(const Tile<T> &tile, T *g_re, T *g_im) {
  const T *re = g_re, *im = g_im, *energy = tile.energy[0];
  const Index ahead = rows_ahead(tile.width);
  for (Index k = 0; k < tile.sites; ++k) {
    const T *v = tile.v[k], *eta = tile.eta[k], *hopping = tile.bond(k);
    const T *next = tile.v[k + ahead];
    T *out_re = tile.parts[k], *out_im = out_re + tile.part;
    for_vectors<T>(tile.width, [&](Index h, auto at) {
      prefetch<kPrefetch>(next + h);
      const auto g = next_g<T>(load(v + h, at), load(energy + h, at), load(eta + h, at),
                               load(hopping + h, at), {load(re + h, at), load(im + h, at)});
      write<T, kOutput>(out_re + h, g_re + h, g.re, at);
      write<T, kOutput>(out_im + h, g_im + h, g.im, at);
    });
    if constexpr (kOutput == Output::kKept) re = out_re, im = out_im;
  }
  if constexpr (kOutput == Output::kKept) {
    std::memcpy(g_re, re, tile.width * sizeof(T));
    std::memcpy(g_im, im, tile.width * sizeof(T));
  }
}

template <class T, Output kOutput>
void sweep_tile_with_source(const Tile<T> &tile, T *const state[4]) {
  using L = Lanes<T>;
  const T *row[4] = {state[0], state[1], state[2], state[3]};
  const T *energy = tile.energy[0];
  const Index ahead = rows_ahead(tile.width);
  for (Index k = 0; k < tile.sites; ++k) {
    const T *v = tile.v[k], *source = tile.source[k], *eta = tile.eta[k], *hopping = tile.bond(k);
    const T *next_v = tile.v[k + ahead], *next_source = tile.source[k + ahead];
    T *out = tile.parts[k];
    const Index part = tile.part;
    for_vectors<T>(tile.width, [&](Index h, auto at) {
      prefetch<kOutput == Output::kStreamed>(next_v + h);
      prefetch<kOutput == Output::kStreamed>(next_source + h);
      const auto t = load(hopping + h, at);
      const auto g = next_g<T>(load(v + h, at), load(energy + h, at), load(eta + h, at), t,
                               {load(row[0] + h, at), load(row[1] + h, at)});
      const auto psi = L::mul(
          g, {L::madd(t, load(row[2] + h, at), load(source + h, at)), t * load(row[3] + h, at)});
      write<T, kOutput>(out + h, state[0] + h, g.re, at);
      write<T, kOutput>(out + part + h, state[1] + h, g.im, at);
      write<T, kOutput>(out + 2 * part + h, state[2] + h, psi.re, at);
      write<T, kOutput>(out + 3 * part + h, state[3] + h, psi.im, at);
    });
    if constexpr (kOutput == Output::kKept)
      for (int c = 0; c < 4; ++c) row[c] = out + c * part;
  }
  if constexpr (kOutput == Output::kKept)
    for (int c = 0; c < 4; ++c) std::memcpy(state[c], row[c], tile.width * sizeof(T));
}

template <class T>
void causal_tile(const Tile<T> &tile, CausalState<T> &state) {
  if (tile.source.data) {
    T *const rows[4] = {state[0], state[1], state[2], state[3]};
    tile.stream ? sweep_tile_with_source<T, Output::kStreamed>(tile, rows)
                : sweep_tile_with_source<T, Output::kKept>(tile, rows);
  } else {
    tile.stream ? sweep_tile<T, Output::kStreamed, true>(tile, state[0], state[1])
                : sweep_tile<T, Output::kKept, false>(tile, state[0], state[1]);
  }
}

template <class T, class Tiles>
void causal(Tiles &tiles, CausalState<T> &state) {
  const Index sites = tiles.sites(), length = tiles.length(sites);
  for (Index from = 0; from < sites; from += length) {
    const Tile<T> tile = tiles.load(from, least(from + length, sites));
    causal_tile(tile, state);
    tiles.done(tile, from);
  }
}

// Gradients of parameters that all sites share, summed in blocks of sites. The round-off then grows
// with the size and the number of the blocks, not with N.
template <class T>
class SharedSums {
 public:
  static constexpr Index kBlock = 64;
  enum { kEnergy, kEta, kHopping };

  explicit SharedSums(Index width) : block_(width), total_(width) {}

  BKCORE_INLINE T *operator[](int row) { return block_[row]; }
  void passed(Index sites, Index width) {
    sites_ += sites;
    if (sites_ >= kBlock) end_block(width);
  }
  template <class Tiles>
  void finish(const Tiles &tiles, const SweepBackward<T> &a) {
    end_block(tiles.width());
    tiles.add(a.denergy, total_[kEnergy]);
    if (!a.forward.eta.site) tiles.add(a.deta, total_[kEta]);
    if (!a.forward.hopping.site) tiles.add(a.dhopping, total_[kHopping]);
  }

 private:
  void end_block(Index width) {
    sites_ = 0;
    for (int row = 0; row < 3; ++row)
      for_vectors<T>(width, [&](Index h, auto at) {
        store(total_[row] + h, load(total_[row] + h, at) + load(block_[row] + h, at), at);
        store(block_[row] + h, typename Simd<T>::V{}, at);
      });
  }
  Index sites_ = 0;
  State<T, 3> block_, total_;
};

// Gradients of the parameters for one vector of lanes, over kSites sites.
template <class T, class At>
class LaneSums {
 public:
  using V = typename Simd<T>::V;
  BKCORE_INLINE LaneSums(SharedSums<T> &sums, Index h, At at) : sums_(sums), h_(h), at_(at) {
    for (int row = 0; row < 3; ++row) sum_[row] = load(sums[row] + h, at);
  }
  BKCORE_INLINE void energy(V x) {
    sum_[SharedSums<T>::kEnergy] = sum_[SharedSums<T>::kEnergy] + x;
  }
  // `own` is the row of the site (or bond) if it has a parameter of its own, else null.
  BKCORE_INLINE void eta(V x, T *own) { add(SharedSums<T>::kEta, x, own); }
  BKCORE_INLINE void hopping(V x, T *own) { add(SharedSums<T>::kHopping, x, own); }
  BKCORE_INLINE void finish() {
    for (int row = 0; row < 3; ++row) store(sums_[row] + h_, sum_[row], at_);
  }

 private:
  BKCORE_INLINE void add(int row, V x, T *own) {
    if (own) {
      store(own + h_, x, at_);
    } else {
      sum_[row] = sum_[row] + x;
    }
  }

  SharedSums<T> &sums_;
  Index h_;
  At at_;
  V sum_[3];
};

// How many sites a vector of lanes processes before its state is written back to memory. With more
// of them, too few vectors would be in flight to hide the latency of the recurrence.
constexpr Index kSitesAtOnce = 2;

// P_{i+1} and Q_{i+1}.
template <class T>
using CausalAdjointState = State<T, 4>;

// Sites top, top - 1, ... of a tile.
template <class T, bool kSource, Output kOutput, Index kSites>
BKCORE_INLINE void causal_adjoint_sites(const Tile<T> &tile, Index top,
                                        CausalAdjointState<T> &state, SharedSums<T> &sums) {
  using L = Lanes<T>;
  using Complex = typename L::Complex;
  constexpr int kParts = kSource ? 4 : 2;
  const bool leaves = tile.starts && top + 1 == kSites;  // the last bond leaves the chain
  const Index part = tile.part, grad_part = tile.grad_part;
  const T *bond[kSites + 1], *here[kSites], *before[kParts], *grad[kSites], *source[kSites];
  const T *next_parts[kSites], *next_grad[kSites], *next_source[kSites];
  T *dv[kSites], *dsource[kSites], *deta[kSites], *dt[kSites];
  for (Index u = 0; u < kSites; ++u) {
    const Index k = top - u;
    next_parts[u] = tile.parts[mirrored(k)];
    next_grad[u] = tile.grad[mirrored(k)];
    next_source[u] = kSource ? tile.source[mirrored(k)] : nullptr;
    bond[u] = tile.bond(k + 1);
    here[u] = tile.parts[k];
    grad[u] = tile.grad[k];
    dv[u] = tile.dv[k];
    source[u] = kSource ? tile.source[k] : nullptr;
    dsource[u] = kSource ? tile.dsource[k] : nullptr;
    deta[u] = tile.eta.step ? tile.deta[k] : nullptr;
    dt[u] = tile.hopping.step ? tile.dhopping[k] : nullptr;
  }
  bond[kSites] = tile.bond(top + 1 - kSites);
  for (int c = 0; c < kParts; ++c) before[c] = tile.before(top + 1 - kSites, c);
  for_vectors<T>(tile.width, [&](Index h, auto at) {
    LaneSums<T, decltype(at)> lane(sums, h, at);
    Complex p = {load(state[0] + h, at), load(state[1] + h, at)}, q{};
    if constexpr (kSource) q = {load(state[2] + h, at), load(state[3] + h, at)};
    Complex g = {load(here[0] + h, at), load(here[0] + part + h, at)};
    auto right = load(bond[0] + h, at);
#pragma GCC unroll 2
    for (Index u = 0; u < kSites; ++u) {
      const bool last = u + 1 == kSites;
      const auto previous = [&](int c) {
        return load((last ? before[c] : here[last ? u : u + 1] + c * part) + h, at);
      };
      const Complex g_before = {previous(0), previous(1)};
      const auto left = load(bond[u + 1] + h, at);
      const T *c = grad[u] + h;
      for (int n = 0; n < kParts; ++n) {
        prefetch_far<kOutput == Output::kStreamed>(next_grad[u] + n * grad_part + h);
        prefetch_far<kOutput == Output::kStreamed>(next_parts[u] + n * part + h);
      }
      if constexpr (kSource) prefetch_far<kOutput == Output::kStreamed>(next_source[u] + h);
      Complex lambda = {load(c, at), -load(c + grad_part, at)};
      auto of_bond = L::set(0);
      if constexpr (kSource) {
        const Complex psi = {previous(2), previous(3)};
        const Complex mu =
            L::axpy(right, q, {load(c + 2 * grad_part, at), -load(c + 3 * grad_part, at)});
        q = L::mul(mu, g);
        const Complex driven = {L::madd(left, psi.re, load(source[u] + h, at)), left * psi.im};
        lambda = L::add(L::mul(mu, driven), lambda);
        of_bond = L::real_product(q, psi);
        write<T, kOutput>(dsource[u] + h, q.re, at);
      }
      lambda = L::axpy(right * right, p, lambda);
      p = L::mul(lambda, L::mul(g, g));
      write<T, kOutput>(dv[u] + h, -p.re, at);
      lane.energy(p.re);
      lane.eta(-p.im, deta[u]);
      if (!(leaves && last))
        lane.hopping(L::madd(L::set(2) * left, L::real_product(p, g_before), of_bond), dt[u]);
      g = g_before;
      right = left;
    }
    store(state[0] + h, p.re, at);
    store(state[1] + h, p.im, at);
    if constexpr (kSource) {
      store(state[2] + h, q.re, at);
      store(state[3] + h, q.im, at);
    }
    lane.finish();
  });
}

template <class T, bool kSource, Output kOutput>
void causal_adjoint_tile(const Tile<T> &tile, CausalAdjointState<T> &state, SharedSums<T> &sums) {
  Index k = tile.sites - 1;
  for (; k + 1 >= kSitesAtOnce; k -= kSitesAtOnce) {
    causal_adjoint_sites<T, kSource, kOutput, kSitesAtOnce>(tile, k, state, sums);
    sums.passed(kSitesAtOnce, tile.width);
  }
  for (; k >= 0; --k) {
    causal_adjoint_sites<T, kSource, kOutput, 1>(tile, k, state, sums);
    sums.passed(1, tile.width);
  }
}

template <class T, class Tiles>
void causal_adjoint(Tiles &tiles, const SweepBackward<T> &a) {
  const Index sites = tiles.sites(), length = tiles.length(sites);
  CausalAdjointState<T> state(tiles.width());
  SharedSums<T> sums(tiles.width());
  for (Index from = (sites - 1) / length * length; from >= 0; from -= length) {
    const Tile<T> tile = tiles.load(from, least(from + length, sites));
    if (tile.source.data) {
      tile.stream ? causal_adjoint_tile<T, true, Output::kStreamed>(tile, state, sums)
                  : causal_adjoint_tile<T, true, Output::kKept>(tile, state, sums);
    } else {
      tile.stream ? causal_adjoint_tile<T, false, Output::kStreamed>(tile, state, sums)
                  : causal_adjoint_tile<T, false, Output::kKept>(tile, state, sums);
    }
    tiles.done(tile, from);
  }
  sums.finish(tiles, a);
}

}  // namespace
}  // namespace bkcore
