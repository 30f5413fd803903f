// For few, long chains: a chain is cut into blocks of sites, and all blocks are swept in parallel.
// How a block changes what enters it depends on the block alone. Let G be the resolvent of the
// isolated block with first site s and last site e, and let g and psi enter over a bond t. Cutting
// this bond and putting it back (Dyson's equation; the self-energy of the chain to the left is t^2
// g) gives, with D = 1 - t^2 g G_ss,
//     g_e   = G_ee + t^2 g G_se^2 / D
//     psi_e = psi'_e + G_se (t^2 g sigma + t psi) / D,       sigma = sum_j G_sj b_j
//
// where psi' is that of the isolated block. From the right it is the same with s and e exchanged.
// Everything is bounded by powers of 1/eta, so nothing needs rescaling. One sweep computes G_ee,
// G_ss, G_se and sigma by adding one site i at a time, with q_i = G_si:
//     q_i = t q_{i-1} g_i,   G_ss += t q_{i-1} q_i,   sigma += q_i (b_i + t psi_{i-1})
//
// Then the maps of the blocks are composed one after the other, and a second sweep starts each
// block from what enters it. All this is done in float64. The end of a block then agrees with the
// beginning of the next to far below the round-off of float32, and the result is as backward stable
// as that of a single sweep.
#pragma once

#include "gather.h"
#include "two_sided.h"

namespace bkcore {
namespace {

// Re g, Im g, Re psi, Im psi of the isolated block; Re q, Im q; Re, Im of G_ss; of sigma.
using BlockState = State<double, 10>;

template <bool kSource>
void block_tile(const Tile<double> &tile, bool first, BlockState &state) {
  using L = Lanes<double>;
  using Complex = L::Complex;
  const double *energy = tile.energy[0];
  for (Index k = 0; k < tile.sites; ++k) {
    const bool alone = first && k == 0;  // no site of the block is to the left
    const double *v = tile.v[k], *source = kSource ? tile.source[k] : nullptr;
    const double *eta = tile.eta[k], *hopping = alone ? zeros<double> : tile.hopping[k];
    for_vectors<double>(tile.width, [&](Index h, auto at) {
      const auto part = [&](int row) {
        return Complex{load(state[row] + h, at), load(state[row + 1] + h, at)};
      };
      const auto keep = [&](int row, Complex x) {
        store(state[row] + h, x.re, at);
        store(state[row + 1] + h, x.im, at);
      };
      const auto t = load(hopping + h, at);
      const Complex g =
          next_g<double>(load(v + h, at), load(energy + h, at), load(eta + h, at), t, part(0));
      const Complex reach = alone ? Complex{L::set(1), L::set(0)} : L::scale(t, part(4));
      const Complex q = L::mul(reach, g);
      if constexpr (kSource) {
        const Complex psi = part(2);
        const Complex u = {L::madd(t, psi.re, load(source + h, at)), t * psi.im};
        keep(2, L::mul(g, u));
        keep(8, L::add(part(8), L::mul(q, u)));
      }
      keep(0, g);
      keep(4, q);
      keep(6, L::add(part(6), L::mul(reach, q)));
    });
  }
}

template <class S>
void block_maps(const Sweep<S> &sweep, const Chain *chains, Index count, double *memory,
                BlockEnds *ends) {
  GatheredTiles<S, double> tiles(sweep, chains, count, memory);
  BlockState state(count);
  for (Index from = 0; from < tiles.sites(); from += kGatheredSites) {
    const Tile<double> tile = tiles.load(from, least(from + kGatheredSites, tiles.sites()));
    sweep.source.data ? block_tile<true>(tile, from == 0, state)
                      : block_tile<false>(tile, from == 0, state);
  }
  for (Index l = 0; l < count; ++l)
    for (int row = 0; row < 10; ++row) ends[l].map[row] = state[row][l];
}

struct Scalar {
  double re, im;
};
BKCORE_INLINE Scalar operator+(Scalar a, Scalar b) { return {a.re + b.re, a.im + b.im}; }
BKCORE_INLINE Scalar operator*(double s, Scalar a) { return {s * a.re, s * a.im}; }
BKCORE_INLINE Scalar operator*(Scalar a, Scalar b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
BKCORE_INLINE Scalar divide(Scalar a, Scalar b) {
  const double scale = 1 / (b.re * b.re + b.im * b.im);
  return {scale * (a.re * b.re + a.im * b.im), scale * (a.im * b.re - a.re * b.im)};
}
BKCORE_INLINE Scalar at(const double *pair) { return {pair[0], pair[1]}; }

// G + t^2 g G_se^2 / (1 - t^2 g G_near): what leaves a block if g enters it.
BKCORE_INLINE Scalar passed(Scalar g, double t, Scalar near, Scalar far, Scalar across) {
  const Scalar self_energy = t * t * g;
  return far + divide(self_energy * across * across, Scalar{1, 0} + -1 * (self_energy * near));
}

template <class S>
double bond_before(const Sweep<S> &sweep, const Chain &chain) {
  const Strided<const S> &t = sweep.hopping;
  const Index bond = t.site ? chain.start - 1 : 0;
  return static_cast<double>(t.data[bond * t.site + chain.lane * t.lane]);
}

// Computes what enters each block of a chain.
template <class S>
void compose_blocks(const Sweep<S> &sweep, bool two_sided, const Chain *blocks, Index count,
                    BlockEnds *ends) {
  Scalar g = {0, 0}, psi = {0, 0};
  for (Index j = 0; j < count; ++j) {
    const double *map = ends[j].map;
    ends[j].left[0] = g.re, ends[j].left[1] = g.im;
    ends[j].left[2] = psi.re, ends[j].left[3] = psi.im;
    const double t = j ? bond_before(sweep, blocks[j]) : 0;
    const Scalar self_energy = t * t * g;
    const Scalar drive = self_energy * at(map + 8) + t * psi;
    psi =
        at(map + 2) + divide(at(map + 4) * drive, Scalar{1, 0} + -1 * (self_energy * at(map + 6)));
    g = passed(g, t, at(map + 6), at(map), at(map + 4));
  }
  Scalar r = {0, 0};
  for (Index j = count - 1; two_sided && j >= 0; --j) {
    const double *map = ends[j].map;
    ends[j].right[0] = r.re, ends[j].right[1] = r.im;
    const double t = j + 1 < count ? bond_before(sweep, blocks[j + 1]) : 0;
    r = passed(r, t, at(map), at(map + 6), at(map + 4));
  }
}

template <class S>
void sweep_blocks(const Sweep<S> &sweep, bool two_sided_form, const Chain *chains, Index count,
                  const BlockEnds *ends, double *memory) {
  GatheredTiles<S, double> tiles(sweep, chains, count, memory);
  if (!two_sided_form) {
    CausalState<double> state(count);
    for (Index l = 0; l < count; ++l)
      for (int row = 0; row < 4; ++row) state[row][l] = ends[l].left[row];
    causal(tiles, state);
    return;
  }
  State<double, 2> left(count);
  RightState<double> right(count);
  for (Index l = 0; l < count; ++l)
    for (int row = 0; row < 2; ++row) {
      left[row][l] = ends[l].left[row];
      right[row][l] = ends[l].right[row];
    }
  two_sided(tiles, left, right, kGatheredSites,
            reinterpret_cast<char *>(memory) + GatheredTiles<S, double>::kBytes);
}

}  // namespace
}  // namespace bkcore
