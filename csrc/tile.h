// A tile: some consecutive sites of some lanes; each of its rows is contiguous over the lanes.
// The sweeps go tile by tile and do not know where the rows come from: from the tensors themselves
// (DirectTiles), or from a copy with the lanes moved last (gather.h).
#pragma once

#include "simd.h"
#include "sweep.h"

namespace bkcore {
namespace {

// Stands in for rows that do not exist: before the first site, and for bonds that leave the chain.
template <class T>
alignas(64) const T zeros[kMaxLanes] = {};

template <class T>
struct Rows {
  T *data = nullptr;
  Index step = 0;  // from one row to the next; 0 if all sites share one
  BKCORE_INLINE T *operator[](Index k) const { return data + k * step; }
};

template <class T>
struct Tile {
  Index sites, width;
  bool starts, ends;  // is the first (last) site that of the chain?
  bool stream;
  Rows<const T> v, source, energy, eta;
  Rows<const T> hopping;  // row k couples site k - 1 of this tile with site k
  Rows<T> parts;
  Index part;  // from Re g to Im g to Re psi to Im psi
  // Of the adjoint only.
  Rows<const T> grad;
  Index grad_part;
  Rows<T> dv, dsource, deta, dhopping;

  // The bond to the left of site k; none leaves the chain.
  BKCORE_INLINE const T *bond(Index k) const {
    const bool leaves = (starts && k == 0) || (ends && k == sites);
    return leaves ? zeros<T> : hopping[k];
  }
  // Component c of the output at site k - 1.
  BKCORE_INLINE const T *before(Index k, Index c) const {
    return starts && k == 0 ? zeros<T> : parts[k - 1] + c * part;
  }
};

// The distance from one row of scratch memory to the next. Processors first compare addresses
// modulo 4 KiB. With a power of two, a vector can only collide with vectors of other rows at the
// same lanes, so no load waits for a store of the previous vector.
BKCORE_INLINE Index row_pitch(Index width) {
  Index pitch = 16;
  while (pitch < width) pitch *= 2;
  return pitch;
}

// Rows of one lane chunk that outlive a tile, such as the state of a recurrence; zero at the start.
template <class T, int kRows>
class State {
 public:
  explicit State(Index width) : pitch_(row_pitch(width)) {
    std::memset(rows_, 0, kRows * pitch_ * sizeof(T));
  }
  BKCORE_INLINE T *operator[](int r) { return rows_ + r * pitch_; }
  BKCORE_INLINE const T *operator[](int r) const { return rows_ + r * pitch_; }

 private:
  Index pitch_;
  alignas(64) T rows_[kRows * kMaxLanes];
};

// Tiles that are the tensors' own memory.
template <class T>
class DirectTiles {
 public:
  DirectTiles(const Sweep<T> &sweep, Unit unit) : sweep_(sweep), unit_(unit) {}
  DirectTiles(const SweepBackward<T> &adjoint, Unit unit)
      : sweep_(adjoint.forward), adjoint_(&adjoint), unit_(unit) {}

  Index sites() const { return sweep_.sites; }
  Index width() const { return unit_.count; }
  // How many sites a tile should have, if the sweep prefers `preferred`.
  Index length(Index preferred) const { return preferred; }

  Tile<T> load(Index from, Index to) const {
    const Sweep<T> &s = sweep_;
    Tile<T> tile{};
    tile.sites = to - from;
    tile.width = unit_.count;
    tile.starts = from == 0;
    tile.ends = to == s.sites;
    tile.stream = s.stream;
    if (s.v.data) tile.v = rows(s.v, from);
    if (s.source.data) tile.source = rows(s.source, from);
    tile.energy = rows(s.energy, 0);
    tile.eta = rows(s.eta, from);
    tile.hopping = rows(s.hopping, from - 1);
    tile.parts = rows(s.parts, from);
    tile.part = s.parts.part;
    if (adjoint_) {
      tile.grad = rows(adjoint_->grad, from);
      tile.grad_part = adjoint_->grad.part;
      tile.dv = rows(adjoint_->dv, from);
      if (s.source.data) tile.dsource = rows(adjoint_->dsource, from);
      tile.deta = rows(adjoint_->deta, from);
      tile.dhopping = rows(adjoint_->dhopping, from - 1);
    }
    return tile;
  }
  // Called when a tile is computed; here its rows are already where they belong.
  void done(const Tile<T> &, Index) const {}

  // Adds the sum over a chunk to the gradient of a parameter that all sites share.
  void add(const Strided<T> &total, const T *sum) const {
    T *row = total.data + unit_.batch * total.batch + unit_.first;
    for (Index h = 0; h < unit_.count; ++h) row[h] += sum[h];
  }

 private:
  template <class U>
  Rows<U> rows(const Strided<U> &x, Index site) const {
    return {x.data + unit_.batch * x.batch + site * x.site + unit_.first, x.site};
  }

  const Sweep<T> &sweep_;
  const SweepBackward<T> *adjoint_ = nullptr;
  Unit unit_;
};

}  // namespace
}  // namespace bkcore
