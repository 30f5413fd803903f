// The sweeps. This file is compiled once per instruction set, which BKCORE_ISA names.
// Everything but the table at the end is in an unnamed namespace, and no header with inline
// functions is included. The linker merges inline functions of the same name, and might keep a copy
// with AVX-512 instructions for a processor that does not have them.
// A sweep loops over the sites, and at every site over a contiguous row of lanes. So memory is read
// and written in order, and the lanes of a row are independent, which suits vectors.

#include "attention.h"
#include "blocks.h"
#include "causal.h"
#include "gather.h"
#include "sweep.h"
#include "sweep_codes.h"
#include "sweep_rounded.h"
#include "two_sided.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(sweep_kernels_, isa)

namespace bkcore {
namespace {

template <class T>
using Scratch = typename Kernels<T>::Scratch;

// The chains first, first + 1, ... of all chains, numbered by batch and lane.
template <class T>
void list_chains(const Sweep<T> &s, Unit unit, Chain *chains) {
  for (Index l = 0; l < unit.count; ++l) {
    const Index chain = unit.first + l;
    chains[l] = {chain / s.lanes, chain % s.lanes, 0, s.sites};
  }
}

template <class T, class Tiles>
void run_forward(Tiles &tiles, bool two_sided_form, void *memory) {
  if (two_sided_form) {
    State<T, 2> left(tiles.width());
    RightState<T> right(tiles.width());
    two_sided(tiles, left, right, tiles.length(sites_in_cache<T>(2, tiles.width())), memory);
  } else {
    CausalState<T> state(tiles.width());
    causal(tiles, state);
  }
}

template <class T>
void sweep(const Sweep<T> &s, bool two_sided_form, Unit unit, Scratch<T> scratch) {
  using Gathered = GatheredTiles<T, T>;
  const Index length = unit.gathered ? kGatheredSites : sites_in_cache<T>(2, unit.count);
  const std::size_t rows = two_sided_form ? two_sided_bytes<T>(s.sites, unit.count, length) : 0;
  char *memory = static_cast<char *>(scratch(rows + (unit.gathered ? Gathered::kBytes : 0)));
  if (unit.gathered) {
    Chain chains[kGatheredLanes];
    list_chains(s, unit, chains);
    Gathered tiles(s, chains, unit.count, reinterpret_cast<T *>(memory));
    run_forward<T>(tiles, two_sided_form, memory + Gathered::kBytes);
  } else {
    DirectTiles<T> tiles(s, unit);
    run_forward<T>(tiles, two_sided_form, memory);
  }
}

template <class T, class Tiles>
void run_backward(Tiles &tiles, const SweepBackward<T> &a, bool two_sided_form, void *memory) {
  if (two_sided_form) {
    two_sided_adjoint(tiles, a, tiles.length(sites_in_cache<T>(4, tiles.width())), memory);
  } else {
    causal_adjoint(tiles, a);
  }
}

template <class T>
void sweep_backward(const SweepBackward<T> &a, bool two_sided_form, Unit unit, Scratch<T> scratch) {
  using Gathered = GatheredTiles<T, T>;
  const Index sites = a.forward.sites;
  const Index length = unit.gathered ? kGatheredSites : sites_in_cache<T>(4, unit.count);
  const std::size_t rows =
      two_sided_form ? two_sided_adjoint_bytes<T>(sites, unit.count, length) : 0;
  char *memory = static_cast<char *>(scratch(rows + (unit.gathered ? Gathered::kBytes : 0)));
  if (unit.gathered) {
    Chain chains[kGatheredLanes];
    list_chains(a.forward, unit, chains);
    Gathered tiles(a, chains, unit.count, reinterpret_cast<T *>(memory));
    if (two_sided_form) tiles.set_two_sided();
    run_backward<T>(tiles, a, two_sided_form, memory + Gathered::kBytes);
  } else {
    DirectTiles<T> tiles(a, unit);
    run_backward<T>(tiles, a, two_sided_form, memory);
  }
}

template <class T>
void maps_of_blocks(const Sweep<T> &s, const Chain *blocks, Index count, BlockEnds *ends,
                    Scratch<T> scratch) {
  block_maps(s, blocks, count, static_cast<double *>(scratch(GatheredTiles<T, double>::kBytes)),
             ends);
}

template <class T>
void run_blocks(const Sweep<T> &s, bool two_sided_form, const Chain *blocks, Index count,
                const BlockEnds *ends, Scratch<T> scratch) {
  const std::size_t rows =
      two_sided_form ? two_sided_bytes<double>(blocks[0].sites, count, kGatheredSites) : 0;
  sweep_blocks(s, two_sided_form, blocks, count, ends,
               static_cast<double *>(scratch(rows + GatheredTiles<T, double>::kBytes)));
}

void sweep_codes(const SweepCodes &s, bool two_sided_form, Unit unit, Scratch<float> scratch) {
  const Index length = CodedTiles::kSites;
  const std::size_t own = CodedTiles::bytes(unit.count);
  const std::size_t rows =
      two_sided_form ? two_sided_bytes<float>(s.sweep.sites, unit.count, length) : 0;
  char *memory = static_cast<char *>(scratch(own + rows));
  CodedTiles tiles(s, unit, memory);
  run_forward<float>(tiles, two_sided_form, memory + own);
}

void sweep_rounded(const SweepRounded &s, bool two_sided_form, Unit unit, Scratch<float> scratch) {
  const std::size_t rows =
      two_sided_form ? two_sided_bytes<float>(s.sweep.sites, unit.count, kGatheredSites) : 0;
  constexpr std::size_t own = RoundedTiles::Gathered::kBytes;
  char *memory = static_cast<char *>(scratch(own + rows));
  Chain chains[kGatheredLanes];
  list_chains(s.sweep, unit, chains);
  RoundedTiles tiles(s, chains, unit.count, reinterpret_cast<float *>(memory));
  run_forward<float>(tiles, two_sided_form, memory + own);
}

template <class T>
void sweep_step(const Sweep<T> &s, Index batch, T *state) {
  Tile<T> tile = DirectTiles<T>(s, {batch, 0, s.lanes, false}).load(0, 1);
  tile.starts = false;
  // Outputs have no memory of their own, and nothing is written to them. Steps from a null pointer
  // are not defined.
  tile.parts.data = state, tile.part = s.lanes;
  T *const rows[4] = {state, state + s.lanes, state + 2 * s.lanes, state + 3 * s.lanes};
  tile.source.data ? sweep_tile_with_source<T, Output::kNone>(tile, rows)
                   : sweep_tile<T, Output::kNone, false>(tile, rows[0], rows[1]);
}

template <class T>
void attention_backward(const Attention<T> &a, const AttentionBackward<T> &d, Index batch,
                        Index head, Scratch<T> scratch) {
  attention_adjoint(a, d, batch, head, static_cast<T *>(scratch(attention_adjoint_bytes(a))));
}

template <class T>
Kernels<T> kernels() {
  return {sweep_step<T>,     sweep<T>,      sweep_backward<T>, maps_of_blocks<T>,
          compose_blocks<T>, run_blocks<T>, attention<T>,      attention_backward<T>};
}

}  // namespace

KernelTable BKCORE_TABLE(BKCORE_ISA)() {
  return {sweep_codes, sweep_rounded, kernels<float>(), kernels<double>()};
}

}  // namespace bkcore
