// The two-sided diagonal G_ii = 1 / (A_i - t_{i-1}^2 g_{i-1} - t_i^2 r_{i+1}) and its adjoint.
//
// While they sweep to the left, both need the results of a sweep to the right at every site.
// Keeping all of them would take twice the size of the output and go through memory. So the sweep
// to the right keeps only its state at the start of each tile, and is repeated tile by tile in the
// cache.
#pragma once

#include "causal.h"

namespace bkcore {
namespace {

// Memory of the calling thread, cut into rows of one width.
template <class T>
class RowStore {
 public:
  RowStore(void *memory, Index width) : data_(static_cast<T *>(memory)), step_(row_pitch(width)) {}
  BKCORE_INLINE T *operator[](Index row) const { return data_ + row * step_; }

 private:
  T *data_;
  Index step_;
};

// How many sites of `rows` rows each fit into half of a small second-level cache.
template <class T>
Index sites_in_cache(Index rows, Index width) {
  constexpr Index kBytes = 128 * 1024;
  const Index sites = kBytes / (rows * row_pitch(width) * static_cast<Index>(sizeof(T)));
  return sites < 8 ? 8 : sites;
}

// r_{i+1}, and for the adjoint X_{i+1} = S'_{i+1} + c_{i+1} and Y_{i+1} = G_{i+1}^2 X_{i+1}.
template <class T>
using RightState = State<T, 6>;

// left: the row g of the site before the tile, then one pair of rows (Re g, Im g) for every site.
template <class T, Output kOutput>
void meet_tile(const Tile<T> &tile, const RowStore<T> &left, RightState<T> &state) {
  using L = Lanes<T>;
  const T *energy = tile.energy[0];
  T *r_re = state[0], *r_im = state[1];
  for (Index k = tile.sites - 1; k >= 0; --k) {
    const T *v = tile.v[k], *eta = tile.eta[k], *t_left = tile.bond(k), *t_right = tile.bond(k + 1);
    const T *g_re = left[2 * k], *g_im = left[2 * k + 1];
    T *out_re = tile.parts[k], *out_im = out_re + tile.part;
    for_vectors<T>(tile.width, [&](Index h, auto at) {
      const auto tl = load(t_left + h, at), tr = load(t_right + h, at);
      const auto square_left = tl * tl, square_right = tr * tr;
      const auto x =
          L::madd(-square_right, load(r_re + h, at), load(v + h, at) - load(energy + h, at));
      const auto y = L::madd(square_right, load(r_im + h, at), load(eta + h, at));
      const auto r = L::invert(x, y);
      const auto center = L::invert(L::madd(-square_left, load(g_re + h, at), x),
                                    L::madd(square_left, load(g_im + h, at), y));
      store(r_re + h, r.re, at);
      store(r_im + h, r.im, at);
      write<T, kOutput>(out_re + h, center.re, at);
      write<T, kOutput>(out_im + h, center.im, at);
    });
  }
}

// The tile with its output redirected to rows 2, 3, 4, ... of the store; rows 0 and 1 are the state
// before it.
template <class T>
Tile<T> into_store(Tile<T> tile, const RowStore<T> &left) {
  tile.parts = {left[2], left[2] - left[0]};
  tile.part = left[1] - left[0];
  tile.stream = false;
  return tile;
}

// The sweep to the right over every tile but the last, whose end is not needed. Its state at the
// start of each tile goes to `checkpoints`, kRows rows per tile.
template <class T, int kRows, class Tiles, class Advance>
void checkpoint(Tiles &tiles, Index length, State<T, kRows> &state, const RowStore<T> &checkpoints,
                const Advance &advance) {
  const std::size_t bytes = tiles.width() * sizeof(T);
  Index row = 0;
  for (Index from = 0; from < tiles.sites(); from += length) {
    for (int r = 0; r < kRows; ++r) std::memcpy(checkpoints[row++], state[r], bytes);
    if (from + length < tiles.sites()) advance(tiles.load(from, from + length), state);
  }
}

template <class T, class Tiles>
void two_sided(Tiles &tiles, State<T, 2> &state, RightState<T> &right, Index length, void *memory) {
  const Index sites = tiles.sites(), width = tiles.width();
  const RowStore<T> left(memory, width), checkpoints(left[2 * length + 2], width);
  checkpoint<T, 2>(tiles, length, state, checkpoints, [](const Tile<T> &tile, State<T, 2> &g) {
    tile.stream ? sweep_tile<T, Output::kNone, true>(tile, g[0], g[1])
                : sweep_tile<T, Output::kNone, false>(tile, g[0], g[1]);
  });
  for (Index n = (sites - 1) / length; n >= 0; --n) {
    const Tile<T> tile = tiles.load(n * length, least(n * length + length, sites));
    for (int r = 0; r < 2; ++r) {
      std::memcpy(state[r], checkpoints[2 * n + r], width * sizeof(T));
      std::memcpy(left[r], state[r], width * sizeof(T));
    }
    Tile<T> repeated = into_store(tile, left);
    repeated.sites -= 1;  // the g of the last site is not needed
    repeated.ends = false;
    if (repeated.sites)
      tile.stream ? sweep_tile<T, Output::kKept, true>(repeated, state[0], state[1])
                  : sweep_tile<T, Output::kKept, false>(repeated, state[0], state[1]);
    tile.stream ? meet_tile<T, Output::kStreamed>(tile, left, right)
                : meet_tile<T, Output::kKept>(tile, left, right);
    tiles.done(tile, n * length);
  }
}

template <class T>
std::size_t two_sided_bytes(Index sites, Index width, Index length) {
  const Index rows = 2 * length + 2 + 2 * ((sites + length - 1) / length);
  return rows * row_pitch(width) * sizeof(T);
}

// Re g, Im g, Re S, Im S: before site i, g_{i-1} and S_i = t^2 g_{i-1}^2 (S_{i-1} + c_{i-1}).
template <class T>
using ReachState = State<T, 4>;

// At site i, rows 0 and 1 hold g_{i-1}, and rows 2 and 3 hold S_i. Moves on to the next site.
template <class T, bool kPrefetch>
BKCORE_INLINE void reach_row(const Tile<T> &tile, Index k, const T *const from[4], T *const to[4]) {
  using L = Lanes<T>;
  using Complex = typename L::Complex;
  const T *v = tile.v[k], *energy = tile.energy[0], *eta = tile.eta[k], *c = tile.grad[k];
  const T *t_left = tile.bond(k), *t_right = tile.bond(k + 1);
  const Index part = tile.grad_part, ahead = k + rows_ahead(tile.width);
  const T *next_v = tile.v[ahead], *next_grad = tile.grad[ahead], *next_parts = tile.parts[ahead];
  for_vectors<T>(tile.width, [&](Index h, auto at) {
    prefetch<kPrefetch>(next_v + h);
    prefetch<kPrefetch>(next_grad + h);
    prefetch<kPrefetch>(next_grad + part + h);
    prefetch_far<kPrefetch>(next_parts + h);
    prefetch_far<kPrefetch>(next_parts + tile.part + h);
    const Complex g =
        next_g<T>(load(v + h, at), load(energy + h, at), load(eta + h, at), load(t_left + h, at),
                  {load(from[0] + h, at), load(from[1] + h, at)});
    const Complex hop = L::scale(load(t_right + h, at), g);
    const Complex sum = {load(from[2] + h, at) + load(c + h, at),
                         load(from[3] + h, at) - load(c + part + h, at)};
    const Complex reach = L::mul(L::mul(hop, hop), sum);
    store(to[0] + h, g.re, at);
    store(to[1] + h, g.im, at);
    store(to[2] + h, reach.re, at);
    store(to[3] + h, reach.im, at);
  });
}

template <class T>
void reach_tile(const Tile<T> &tile, ReachState<T> &state) {
  const T *const from[4] = {state[0], state[1], state[2], state[3]};
  T *const to[4] = {state[0], state[1], state[2], state[3]};
  for (Index k = 0; k < tile.sites; ++k)
    tile.stream ? reach_row<T, true>(tile, k, from, to) : reach_row<T, false>(tile, k, from, to);
}

// left: for every site of the tile g_{i-1} and S_i; then g of the tile's last site, for its bond.
// Sites top, top - 1, ... of a tile.
template <class T, Output kOutput, Index kSites>
BKCORE_INLINE void two_sided_adjoint_sites(const Tile<T> &tile, Index top, const RowStore<T> &left,
                                           RightState<T> &state, SharedSums<T> &sums) {
  using L = Lanes<T>;
  using Complex = typename L::Complex;
  const T *energy = tile.energy[0];
  const bool leaves = tile.ends && top == tile.sites - 1;  // the first bond leaves the chain
  const Index part = tile.part, grad_part = tile.grad_part;
  const T *v[kSites], *eta[kSites], *bond[kSites], *center[kSites], *grad[kSites];
  const T *g_row[kSites][2], *reach[kSites][2];
  T *dv[kSites], *deta[kSites], *dt[kSites];
  for (Index u = 0; u < kSites; ++u) {
    const Index k = top - u;
    v[u] = tile.v[k];
    eta[u] = tile.eta[k];
    bond[u] = tile.bond(k + 1);
    center[u] = tile.parts[k];
    grad[u] = tile.grad[k];
    for (Index c = 0; c < 2; ++c) {
      g_row[u][c] = left[4 * k + 4 + c];
      reach[u][c] = left[4 * k + 2 + c];
    }
    dv[u] = tile.dv[k];
    deta[u] = tile.eta.step ? tile.deta[k] : nullptr;
    dt[u] = tile.hopping.step ? tile.dhopping[k + 1] : nullptr;
  }
  for_vectors<T>(tile.width, [&](Index h, auto at) {
    LaneSums<T, decltype(at)> lane(sums, h, at);
    const auto pair = [&](int row) {
      return Complex{load(state[row] + h, at), load(state[row + 1] + h, at)};
    };
    Complex r = pair(0), x = pair(2), y = pair(4);
#pragma GCC unroll 2
    for (Index u = 0; u < kSites; ++u) {
      const Complex c = {load(grad[u] + h, at), -load(grad[u] + grad_part + h, at)};
      const auto t = load(bond[u] + h, at);
      const Complex hop = L::scale(t, r);
      const Complex from_right = L::mul(L::mul(hop, hop), x);
      const Complex from_left = {load(reach[u][0] + h, at), load(reach[u][1] + h, at)};
      const Complex root = {load(center[u] + h, at), load(center[u] + part + h, at)};
      const Complex weight = L::mul(root, root);
      const Complex to_right = L::add(c, from_left);
      const Complex w = L::mul(weight, L::add(to_right, from_right));
      const Complex g = {load(g_row[u][0] + h, at), load(g_row[u][1] + h, at)};
      write<T, kOutput>(dv[u] + h, -w.re, at);
      lane.energy(w.re);
      lane.eta(-w.im, deta[u]);
      if (!(leaves && u == 0)) {
        const auto both = L::real_product(r, L::mul(weight, to_right)) + L::real_product(g, y);
        lane.hopping(L::set(2) * t * both, dt[u]);
      }
      x = L::add(from_right, c);
      y = L::mul(weight, x);
      const auto square = t * t;
      r = L::invert(L::madd(-square, r.re, load(v[u] + h, at) - load(energy + h, at)),
                    L::madd(square, r.im, load(eta[u] + h, at)));
    }
    const Complex kept[3] = {r, x, y};
    for (int n = 0; n < 3; ++n) {
      store(state[2 * n] + h, kept[n].re, at);
      store(state[2 * n + 1] + h, kept[n].im, at);
    }
    lane.finish();
  });
}

template <class T, Output kOutput>
void two_sided_adjoint_tile(const Tile<T> &tile, const RowStore<T> &left, RightState<T> &state,
                            SharedSums<T> &sums) {
  Index k = tile.sites - 1;
  for (; k + 1 >= kSitesAtOnce; k -= kSitesAtOnce) {
    two_sided_adjoint_sites<T, kOutput, kSitesAtOnce>(tile, k, left, state, sums);
    sums.passed(kSitesAtOnce, tile.width);
  }
  for (; k >= 0; --k) {
    two_sided_adjoint_sites<T, kOutput, 1>(tile, k, left, state, sums);
    sums.passed(1, tile.width);
  }
}

template <class T, class Tiles>
void two_sided_adjoint(Tiles &tiles, const SweepBackward<T> &a, Index length, void *memory) {
  const Index sites = tiles.sites(), width = tiles.width();
  const RowStore<T> left(memory, width), checkpoints(left[4 * length + 4], width);
  ReachState<T> state(width);
  checkpoint<T, 4>(tiles, length, state, checkpoints,
                   [](const Tile<T> &tile, ReachState<T> &s) { reach_tile(tile, s); });
  RightState<T> right(width);
  SharedSums<T> sums(width);
  for (Index n = (sites - 1) / length; n >= 0; --n) {
    const Tile<T> tile = tiles.load(n * length, least(n * length + length, sites));
    for (int r = 0; r < 4; ++r) std::memcpy(left[r], checkpoints[4 * n + r], width * sizeof(T));
    for (Index k = 0; k < tile.sites; ++k) {
      const T *const from[4] = {left[4 * k], left[4 * k + 1], left[4 * k + 2], left[4 * k + 3]};
      T *const to[4] = {left[4 * k + 4], left[4 * k + 5], left[4 * k + 6], left[4 * k + 7]};
      tile.stream ? reach_row<T, true>(tile, k, from, to) : reach_row<T, false>(tile, k, from, to);
    }
    tile.stream ? two_sided_adjoint_tile<T, Output::kStreamed>(tile, left, right, sums)
                : two_sided_adjoint_tile<T, Output::kKept>(tile, left, right, sums);
    tiles.done(tile, n * length);
  }
  sums.finish(tiles, a);
}

template <class T>
std::size_t two_sided_adjoint_bytes(Index sites, Index width, Index length) {
  const Index rows = 4 * length + 4 + 4 * ((sites + length - 1) / length);
  return rows * row_pitch(width) * sizeof(T);
}

}  // namespace
}  // namespace bkcore
