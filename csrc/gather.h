// Tiles whose lanes are not contiguous in memory: sequences along the last axis, or few or ragged
// channels. A tile is copied so that its lanes are contiguous, swept, and copied back.
#pragma once

#include "tile.h"

namespace bkcore {
namespace {

constexpr Index kGatheredSites = 64;

template <class T>
struct FourOf;
template <>
struct FourOf<float> {
  using V = float __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
  using V = double __attribute__((vector_size(32)));
};
template <class T>
using Four = typename FourOf<T>::V;

template <class T>
BKCORE_INLINE Four<T> load_four(const T *p) {
  Four<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
BKCORE_INLINE void store_four(T *p, Four<T> x) {
  std::memcpy(p, &x, sizeof x);
}

template <class V>
BKCORE_INLINE void transpose(V (&r)[4]) {
  const V a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  const V b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const V c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const V d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Copies between rows of contiguous lanes, in T, and lanes[l][k * step], in S.
template <class S, class T>
struct Transfer {
  T *rows;
  Index pitch, lanes, sites;

  // If the sites are contiguous, it goes lane by lane with vectors, otherwise row by row.
  void gather(const S *const *from, Index step) const {
    Index l = 0;
    if (step == 1) {
      for (; l + 4 <= lanes; l += 4) gather_four(from + l, rows + l);
    }
    for (Index k = 0; k < sites; ++k)
      for (Index rest = l; rest < lanes; ++rest)
        rows[k * pitch + rest] = static_cast<T>(from[rest][k * step]);
  }
  void scatter(S *const *to, Index step) const {
    Index l = 0;
    if (step == 1) {
      for (; l + 4 <= lanes; l += 4) scatter_four(to + l, rows + l);
    }
    for (Index k = 0; k < sites; ++k)
      for (Index rest = l; rest < lanes; ++rest)
        to[rest][k * step] = static_cast<S>(rows[k * pitch + rest]);
  }

 private:
  void gather_four(const S *const *from, T *to) const {
    Index k = 0;
    for (; k + 4 <= sites; k += 4) {
      Four<T> x[4];
      for (int l = 0; l < 4; ++l) x[l] = __builtin_convertvector(load_four(from[l] + k), Four<T>);
      transpose(x);
      for (int i = 0; i < 4; ++i) store_four(to + (k + i) * pitch, x[i]);
    }
    for (; k < sites; ++k)
      for (int l = 0; l < 4; ++l) to[k * pitch + l] = static_cast<T>(from[l][k]);
  }
  void scatter_four(S *const *to, const T *from) const {
    Index k = 0;
    for (; k + 4 <= sites; k += 4) {
      Four<T> x[4];
      for (int i = 0; i < 4; ++i) x[i] = load_four(from + (k + i) * pitch);
      transpose(x);
      for (int l = 0; l < 4; ++l) store_four(to[l] + k, __builtin_convertvector(x[l], Four<S>));
    }
    for (; k < sites; ++k)
      for (int l = 0; l < 4; ++l) to[l][k] = static_cast<S>(from[k * pitch + l]);
  }
};

// S is the type of the tensors, T the type that the sweep computes in.
template <class S, class T>
class GatheredTiles {
 public:
  GatheredTiles(const Sweep<S> &sweep, const Chain *chains, Index count, T *memory)
      : GatheredTiles(sweep, nullptr, chains, count, memory) {}
  GatheredTiles(const SweepBackward<S> &adjoint, const Chain *chains, Index count, T *memory)
      : GatheredTiles(adjoint.forward, &adjoint, chains, count, memory) {}

  static constexpr std::size_t kBytes =
      // v, source, eta, hopping, output with the row before, energy; and the adjoint's.
      ((4 * kGatheredSites + 1 + 4 * (kGatheredSites + 1) + 1) +
       (4 * kGatheredSites + 4 * kGatheredSites + 1)) *
      kGatheredLanes * sizeof(T);

  Index sites() const { return sites_; }
  Index width() const { return count_; }
  // The rows that `load` gathers potentials in.
  T *gathered_v() { return v_; }
  Index length(Index) const { return kGatheredSites; }

  Tile<T> load(Index from, Index to) {
    Tile<T> tile{};
    tile.sites = to - from;
    tile.width = count_;
    const bool whole = chains_[0].start == 0 && chains_[0].sites == sweep_.sites;
    tile.starts = whole && from == 0;
    tile.ends = whole && to == sweep_.sites;
    if (sweep_.v.data) tile.v = gathered(sweep_.v, 0, v_, from, to, kGhost);
    if (sweep_.source.data) tile.source = gathered(sweep_.source, 0, source_, from, to);
    tile.energy = {energy_, 0};
    tile.eta =
        sweep_.eta.site ? gathered(sweep_.eta, 0, eta_, from, to, 1) : Rows<const T>{eta_, 0};
    tile.hopping = sweep_.hopping.site ? bonds(from, to) : Rows<const T>{hopping_, 0};
    tile.parts = {parts_ + parts() * kGatheredLanes, parts() * kGatheredLanes};
    tile.part = kGatheredLanes;
    if (adjoint_) load_adjoint(tile, from, to);
    return tile;
  }

  void done(const Tile<T> &tile, Index from) {
    if (!adjoint_) {
      scatter_parts(tile, from);
      return;
    }
    scatter(adjoint_->dv, dv_, kGatheredLanes, from, tile.sites);
    if (sweep_.source.data) scatter(adjoint_->dsource, dsource_, kGatheredLanes, from, tile.sites);
    if (sweep_.eta.site) scatter(adjoint_->deta, deta_, kGatheredLanes, from, tile.sites);
    if (!sweep_.hopping.site) return;
    // With a site, the causal adjoint gives the derivative of the bond to its left, the two-sided
    // one that to its right.
    const Index first = two_sided_ ? from : least_bond(from);
    const Index last = two_sided_ ? least(from + tile.sites, sites_ - 1) : from + tile.sites - 1;
    scatter(adjoint_->dhopping, dhopping_ + (first - from + 1) * kGatheredLanes, kGatheredLanes,
            first, last - first);
  }

  void set_two_sided() { two_sided_ = true; }

  void add(const Strided<S> &total, const T *sum) const {
    for (Index l = 0; l < count_; ++l) *address(total, chains_[l]) += static_cast<S>(sum[l]);
  }

 private:
  // A potential whose square overflows decouples everything beyond the end of a chain: g = r = 0
  // there.
  static constexpr T kGhost = static_cast<T>(sizeof(T) == 8 ? 1e200 : 1e30);

  GatheredTiles(const Sweep<S> &sweep, const SweepBackward<S> *adjoint, const Chain *chains,
                Index count, T *memory)
      : sweep_(sweep), adjoint_(adjoint), chains_(chains), count_(count) {
    for (Index l = 0; l < count; ++l)
      if (chains[l].sites > sites_) sites_ = chains[l].sites;
    const auto take = [&](Index rows) {
      T *taken = memory;
      memory += rows * kGatheredLanes;
      return taken;
    };
    v_ = take(kGatheredSites);
    source_ = take(kGatheredSites);
    eta_ = take(kGatheredSites);
    hopping_ = take(kGatheredSites + 1);
    parts_ = take(4 * (kGatheredSites + 1));
    energy_ = take(1);
    if (adjoint) {
      grad_ = take(4 * kGatheredSites);
      dv_ = take(kGatheredSites);
      dsource_ = take(kGatheredSites);
      deta_ = take(kGatheredSites);
      dhopping_ = take(kGatheredSites + 1);
    }
    for (Index l = 0; l < count; ++l) {
      energy_[l] = static_cast<T>(*address(sweep.energy, chains[l]));
      if (!sweep.eta.site) eta_[l] = static_cast<T>(*address(sweep.eta, chains[l]));
      if (!sweep.hopping.site) hopping_[l] = static_cast<T>(*address(sweep.hopping, chains[l]));
    }
  }

  Index parts() const { return sweep_.source.data ? 4 : 2; }
  static Index least_bond(Index from) { return from > 0 ? from - 1 : 0; }

  template <class U>
  static U *address(const Strided<U> &x, const Chain &chain) {
    return x.data + chain.batch * x.batch + chain.lane * x.lane + chain.start * x.site;
  }

  // Rows [from, to) of one part; `beyond` fills sites after the end of a chain.
  template <class U>
  Rows<const T> gathered(const Strided<U> &x, Index part, T *rows, Index from, Index to,
                         T beyond = 0, Index row_step = 1) {
    const S *lanes[kGatheredLanes];
    Index present = to - from;
    for (Index l = 0; l < count_; ++l) {
      lanes[l] = address(x, chains_[l]) + part * x.part + from * x.site;
      const Index left = chains_[l].sites - from;
      present = least(present, left < 0 ? 0 : left);
    }
    const Index pitch = row_step * kGatheredLanes;
    Transfer<S, T>{rows, pitch, count_, present}.gather(lanes, x.site);
    for (Index k = present; k < to - from; ++k)
      for (Index l = 0; l < count_; ++l)
        rows[k * pitch + l] =
            from + k < chains_[l].sites ? static_cast<T>(lanes[l][k * x.site]) : beyond;
    return {rows, pitch};
  }

  template <class U>
  void scatter(const Strided<U> &x, T *rows, Index pitch, Index from, Index sites) {
    S *lanes[kGatheredLanes];
    Index present = sites;
    for (Index l = 0; l < count_; ++l) {
      lanes[l] = address(x, chains_[l]) + from * x.site;
      const Index left = chains_[l].sites - from;
      present = least(present, left < 0 ? 0 : left);
    }
    Transfer<S, T>{rows, pitch, count_, present}.scatter(lanes, x.site);
    for (Index k = present; k < sites; ++k)
      for (Index l = 0; l < count_; ++l)
        if (from + k < chains_[l].sites) lanes[l][k * x.site] = static_cast<S>(rows[k * pitch + l]);
  }

  // Row k holds the bond to the left of site from + k; none leaves the chain.
  Rows<const T> bonds(Index from, Index to) {
    for (Index k = 0; k <= to - from; ++k)
      for (Index l = 0; l < count_; ++l) {
        const Index bond = chains_[l].start + from + k - 1;
        const bool inside = bond >= 0 && bond < sweep_.sites - 1;
        const Chain whole = {chains_[l].batch, chains_[l].lane, 0, 0};
        hopping_[k * kGatheredLanes + l] =
            inside ? static_cast<T>(address(sweep_.hopping, whole)[bond * sweep_.hopping.site]) : 0;
      }
    return {hopping_, kGatheredLanes};
  }

  void load_adjoint(Tile<T> &tile, Index from, Index to) {
    const Index pitch = parts() * kGatheredLanes;
    for (Index c = 0; c < parts(); ++c) {
      const bool halo = from > 0;
      gathered(sweep_.parts, c, parts_ + (halo ? 0 : pitch) + c * kGatheredLanes, from - halo, to,
               0, parts());
      gathered(adjoint_->grad, c, grad_ + c * kGatheredLanes, from, to, 0, parts());
    }
    tile.grad = {grad_, pitch};
    tile.grad_part = kGatheredLanes;
    tile.dv = {dv_, kGatheredLanes};
    tile.dsource = {dsource_, kGatheredLanes};
    tile.deta = {deta_, kGatheredLanes};
    tile.dhopping = {dhopping_, kGatheredLanes};
  }

  // Complex numbers with adjacent parts are treated as one lane of twice as many sites.
  void scatter_parts(const Tile<T> &tile, Index from) {
    const Strided<S> &x = sweep_.parts;
    if (x.part == 1 && x.site == parts()) {
      const Strided<S> pairs = {x.data, x.batch, 1, 0, x.lane};
      scatter_interleaved(pairs, tile, from);
      return;
    }
    for (Index c = 0; c < parts(); ++c) {
      const Strided<S> one = {x.data + c * x.part, x.batch, x.site, 0, x.lane};
      scatter(one, parts_ + (parts() + c) * kGatheredLanes, parts() * kGatheredLanes, from,
              tile.sites);
    }
  }
  void scatter_interleaved(const Strided<S> &pairs, const Tile<T> &tile, Index from) {
    S *lanes[kGatheredLanes];
    Index present = tile.sites;
    for (Index l = 0; l < count_; ++l) {
      const Chain &chain = chains_[l];
      lanes[l] = pairs.data + chain.batch * pairs.batch + chain.lane * pairs.lane +
                 (chain.start + from) * parts();
      const Index left = chain.sites - from;
      present = least(present, left < 0 ? 0 : left);
    }
    T *rows = parts_ + parts() * kGatheredLanes;
    Transfer<S, T>{rows, kGatheredLanes, count_, present * parts()}.scatter(lanes, 1);
    for (Index k = present; k < tile.sites; ++k)
      for (Index l = 0; l < count_; ++l)
        if (from + k < chains_[l].sites)
          for (Index c = 0; c < parts(); ++c)
            lanes[l][k * parts() + c] =
                static_cast<S>(rows[(k * parts() + c) * kGatheredLanes + l]);
  }

  const Sweep<S> &sweep_;
  const SweepBackward<S> *adjoint_;
  const Chain *chains_;
  Index count_, sites_ = 0;
  bool two_sided_ = false;
  T *v_, *source_, *eta_, *hopping_, *parts_, *energy_;
  T *grad_ = nullptr, *dv_ = nullptr, *dsource_ = nullptr, *deta_ = nullptr, *dhopping_ = nullptr;
};

}  // namespace
}  // namespace bkcore
