// Gathered tiles whose potentials and outputs are rounded to the values of their codes.
// Float tensors go in and out, to simulate integer storage. A number x becomes scale * (round(x /
// scale) clamped to the range of codes minus the zero point). With levels it becomes scale * (level
// - zero), where level is the one nearest to x / scale + zero. NaN stays NaN. Potentials are
// rounded after they are gathered and outputs before they are scattered, both within the caches.
// The result equals, bit for bit, that of rounding, sweeping and rounding whole tensors, without
// going through memory three times.
#pragma once

#include "gather.h"
#include "sweep_codes.h"

namespace bkcore {
namespace {

// How numbers that share a scale are rounded.
struct Grid {
  float scale, zero, low, high;
  Levels levels, bounds;  // without tables: the codes themselves
};

BKCORE_INLINE float rounded(float x, const Grid &grid) {
  if (x != x) return x;
  if (!grid.levels.table) return grid.scale * code_of(x, grid.scale, grid.low, grid.high, 0.0f);
  return grid.scale * (grid.levels.of(grid.bounds.nearest(x / grid.scale + grid.zero)) - grid.zero);
}

// The outer loop is over lanes, so that nothing is set up again for each row.
BKCORE_INLINE void round_rows(Rows<float> rows, Index sites, Index count, const Grid &grid) {
  Index h = 0;
  using S = Simd<float>;
  const auto scale = S::set(grid.scale), inverse = S::set(1 / grid.scale), zero = S::set(grid.zero);
  const auto low = S::set(grid.low), high = S::set(grid.high), shift = S::set(kRound);
  S::Bounds bounds = {};
  if (grid.bounds.table) bounds = S::bounds(grid.bounds.table, grid.bounds.half);
  for (; h + S::width <= count; h += S::width) {
    for (Index k = 0; k < sites; ++k) {
      const auto x = S::load(rows[k] + h);
      const auto exact = S::quotient(x, scale, inverse);
      typename S::V step;
      if (grid.levels.table) {
        std::int8_t codes[S::width];
        S::search(codes, exact + zero, bounds);
        step = S::look_up(grid.levels.table, codes, grid.levels.half) - zero;
      } else {
        step = (S::clamp(exact, low, high) + shift) - shift;
      }
      S::store(rows[k] + h, S::keep_nan(scale * step, x));
    }
  }
  for (Index k = 0; k < sites; ++k)
    for (Index rest = h; rest < count; ++rest) rows[k][rest] = rounded(rows[k][rest], grid);
}

class RoundedTiles {
 public:
  using Gathered = GatheredTiles<float, float>;
  RoundedTiles(const SweepRounded &rounded, const Chain *chains, Index count, float *memory)
      : rounded_(rounded), tiles_(rounded.sweep, chains, count, memory) {}

  Index sites() const { return tiles_.sites(); }
  Index width() const { return tiles_.width(); }
  Index length(Index preferred) const { return tiles_.length(preferred); }

  Tile<float> load(Index from, Index to) {
    const Tile<float> tile = tiles_.load(from, to);
    round_tile(tile, from, 0, {tiles_.gathered_v(), tile.v.step});
    return tile;
  }

  void done(const Tile<float> &tile, Index from) {
    for (Index c = 0; c < 2; ++c)
      round_tile(tile, from, 1 + c, {tile.parts.data + c * tile.part, tile.parts.step});
    tiles_.done(tile, from);
  }

 private:
  // Part 0 is v, parts 1 and 2 are Re and Im of the output.
  void round_tile(const Tile<float> &tile, Index from, Index part, Rows<float> rows) const {
    for (Index k = 0, end; k < tile.sites; k = end) {
      const Index group = (from + k) / rounded_.group_size;
      end = least((group + 1) * rounded_.group_size - from, tile.sites);
      round_rows({rows[k], rows.step}, end - k, tile.width, grid(part, group));
    }
  }

  Grid grid(Index part, Index group) const {
    const Index row = part * rounded_.groups + group;
    const float scale = rounded_.scale[row], zero = rounded_.zero[row];
    const int half = 1 << (rounded_.bits - 1);
    const auto table = [&](const float *tables) {
      return Levels{tables ? tables + part * 2 * half : nullptr, half};
    };
    return {
        scale, zero, -half - zero, half - 1 - zero, table(rounded_.levels), table(rounded_.bounds)};
  }

  const SweepRounded &rounded_;
  Gathered tiles_;
};

}  // namespace
}  // namespace bkcore
