// Sweeps, spread over threads. How the work is cut changes no result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace bkcore {
namespace {

// The lanes of a unit of work fill whole cache lines, so that no two threads write to the same one.
constexpr Index kLaneStep = 16;
// Chains are cut into blocks if there are at most kFewChains; blocks have at least kSitesPerBlock
// sites.
constexpr Index kFewChains = 8, kSitesPerBlock = 64, kBlocks = 1024;

// Units of work. How they are cut changes no result: lanes do not depend on each other.
inline std::vector<Unit> units(Index batch, Index lanes, bool gathered, Index threads) {
  std::vector<Unit> list;
  if (gathered) {
    const Index chains = batch * lanes;
    const Index share = round_up_to(ceil_divide(chains, threads), kLaneStep);
    const Index count = std::min(share, kGatheredLanes);
    for (Index first = 0; first < chains; first += count)
      list.push_back({0, first, std::min(count, chains - first), true});
    return list;
  }
  // A batch that divides evenly, or is long, needs no split along the lanes.
  const Index splits = batch % threads == 0 || batch >= 4 * threads ? 1 : 2 * threads;
  const Index chunk = std::min(round_up_to(ceil_divide(lanes, splits), kLaneStep), kMaxLanes);
  for (Index b = 0; b < batch; ++b)
    for (Index first = 0; first < lanes; first += chunk)
      list.push_back({b, first, std::min(chunk, lanes - first), false});
  return list;
}

template <class T>
bool contiguous_lanes(const Sweep<T> &s) {
  const bool source = !s.source.data || s.source.lane == 1;
  return s.lanes >= kLaneStep && (!s.v.data || s.v.lane == 1) && source && s.parts.lane == 1 &&
         s.energy.lane == 1 && s.eta.lane == 1 && s.hopping.lane == 1;
}

template <class T>
bool contiguous_lanes(const SweepBackward<T> &a) {
  const bool source = !a.dsource.data || a.dsource.lane == 1;
  return contiguous_lanes(a.forward) && source && a.grad.lane == 1 && a.dv.lane == 1 &&
         a.denergy.lane == 1 && a.deta.lane == 1 && a.dhopping.lane == 1;
}

// The blocks of a chain, all equal except the last; they depend only on the shape.
inline std::vector<Chain> blocks(Index batch, Index sites, Index lanes) {
  const Index wanted = std::min(kBlocks / (batch * lanes), sites / kSitesPerBlock);
  const Index length = ceil_divide(sites, wanted);
  std::vector<Chain> list;
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < lanes; ++h)
      for (Index start = 0; start < sites; start += length)
        list.push_back({b, h, start, std::min(length, sites - start)});
  return list;
}

template <class T>
void sweep_in_blocks(const Kernels<T> &kernels, const Sweep<T> &s, bool two_sided, Index threads) {
  const std::vector<Chain> list = blocks(s.batch, s.sites, s.lanes);
  std::vector<BlockEnds> ends(list.size());
  const Index count = static_cast<Index>(list.size()), groups = ceil_divide(count, kGatheredLanes);
  const auto size = [&](Index first) { return std::min(kGatheredLanes, count - first); };
  parallel_for(groups, threads, [&](Index group) {
    const Index first = group * kGatheredLanes;
    kernels.block_maps(s, &list[first], size(first), &ends[first], scratch);
  });
  const Index per_chain = count / (s.batch * s.lanes);
  for (Index first = 0; first < count; first += per_chain)
    kernels.compose_blocks(s, two_sided, &list[first], per_chain, &ends[first]);
  parallel_for(groups, threads, [&](Index group) {
    const Index first = group * kGatheredLanes;
    kernels.sweep_blocks(s, two_sided, &list[first], size(first), &ends[first], scratch);
  });
}

// An output that does not fit into the caches is written past them, if it consists of whole,
// aligned cache lines.
template <class T>
bool should_stream(const Strided<T> &out, Index numbers, Index cache_bytes) {
  constexpr Index kLine = 64 / sizeof(T);
  const bool aligned = reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0 &&
                       out.batch % kLine == 0 && out.site % kLine == 0 && out.part % kLine == 0;
  return out.lane == 1 && aligned && numbers * Index{sizeof(T)} > cache_bytes;
}

// How many numbers a sweep returns.
template <class T>
Index numbers_of(const Sweep<T> &s) {
  return s.batch * s.sites * s.lanes * (s.source.data ? 4 : 2);
}

// Chains that are too few to fill vectors, and long enough to be cut into blocks instead.
inline bool few_and_long(Index chains, Index sites) {
  return chains <= kFewChains && sites >= 16 * kSitesPerBlock;
}

template <class T>
void run_sweep(const Isa &isa, Index threads, bool two_sided, bool sequential, Index cache_bytes,
               Sweep<T> s) {
  const Index chains = s.batch * s.lanes;
  if (chains == 0) return;
  s.stream = should_stream(s.parts, numbers_of(s), cache_bytes);
  threads = worthwhile_threads(chains * s.sites, threads);
  if (few_and_long(chains, s.sites) && !sequential)
    return sweep_in_blocks(kernels<T>(isa), s, two_sided, threads);
  const std::vector<Unit> list = units(s.batch, s.lanes, !contiguous_lanes(s), threads);
  const auto kernel = kernels<T>(isa).sweep;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

template <class T>
void run_sweep_backward(const Isa &isa, Index threads, bool two_sided, Index cache_bytes,
                        SweepBackward<T> a) {
  Sweep<T> &s = a.forward;
  s.stream = should_stream(a.dv, numbers_of(s), cache_bytes) &&
             (!s.source.data || should_stream(a.dsource, numbers_of(s), cache_bytes));
  threads = worthwhile_threads(s.batch * s.lanes * s.sites, threads);
  const std::vector<Unit> list = units(s.batch, s.lanes, !contiguous_lanes(a), threads);
  const auto kernel = kernels<T>(isa).sweep_backward;
  parallel_for(list.size(), threads, [&](Index i) { kernel(a, two_sided, list[i], scratch); });
}

inline void run_sweep_codes(const Isa &isa, Index threads, bool two_sided, const SweepCodes &s) {
  const Index batch = s.sweep.batch, sites = s.sweep.sites, lanes = s.sweep.lanes;
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, false, threads);
  const auto kernel = isa.sweeps.sweep_codes;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

inline void run_sweep_rounded(const Isa &isa, Index threads, bool two_sided,
                              const SweepRounded &s) {
  const Index batch = s.sweep.batch, sites = s.sweep.sites, lanes = s.sweep.lanes;
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, true, threads);
  const auto kernel = isa.sweeps.sweep_rounded;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

// Moves `state` (batch, parts, lanes) one site ahead.
template <class T>
void run_sweep_step(const Isa &isa, const Sweep<T> &s, T *state) {
  const Index row = (s.source.data ? 4 : 2) * s.lanes;
  if (s.lanes == 0) return;
  for (Index b = 0; b < s.batch; ++b) kernels<T>(isa).sweep_step(s, b, state + b * row);
}

}  // namespace
}  // namespace bkcore
