// The interface between the kernels and their caller. Formulas, layout and derivation:
// src/bkcore/kernels/ops/sweep.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bkcore {

// The largest number of lanes of one unit of work: contiguous lanes, whose state has to stay in the
// innermost caches, and gathered lanes.
constexpr std::int64_t kMaxLanes = 1024, kGatheredLanes = 64;

// A tensor (batch, sites, parts, lanes) by the address of its first element and its strides in
// elements; 0 for an axis that it lacks or that is expanded.
template <class T>
struct Strided {
  T *data;
  std::int64_t batch, site, part, lane;
};

template <class T>
struct Sweep {
  std::int64_t batch, sites, lanes;
  Strided<const T> v, source, energy, eta, hopping;  // source.data may be null
  Strided<T> parts;
  bool stream;  // write past the caches: the output will not fit into them
};

template <class T>
struct SweepBackward {
  Sweep<T> forward;  // v.data may be null in the causal form; forward.parts is only read
  Strided<const T> grad;
  Strided<T> dv, dsource;  // dsource.data is null if there is no source
  // One partial sum per batch element; zero at the start where all sites share a row.
  Strided<T> denergy, deta, dhopping;
};

// A sweep from integer codes to integer codes; sweep.v, .source and .parts are not used.
struct SweepCodes {
  Sweep<float> sweep;
  std::int64_t bits;                       // 8, or 4: two codes per byte, the even lane low
  const std::uint8_t *v, *source;          // contiguous (batch, sites, lanes); source may be null
  std::uint8_t *out;                       // contiguous (batch, sites, parts, lanes)
  Strided<const float> in_scale, in_zero;  // part 0: v, part 1: source
  Strided<const float> out_scale, out_zero;
  // Null, or 2^bits ascending levels for each part, the values of the codes -2^(bits-1), ...; and
  // the bounds above which the next code is nearer, the last of them infinity.
  const float *in_levels, *out_bounds;
};

// A sweep without source whose potentials and outputs are rounded to the values of codes.
struct SweepRounded {
  Sweep<float> sweep;
  std::int64_t bits, groups, group_size;  // neighbouring sites that share a scale
  const float *scale, *zero;              // (3, groups), of v and of Re and Im of the output
  const float *levels, *bounds;           // (3, 2^bits) or null; as in SweepCodes
};

// Resolvent attention; all tensors contiguous. v, hopping: (batch, sites, heads). energy, eta:
// (heads). query, key: (batch, sites, heads, keys). value: (batch, sites, heads, values).
// first_g, first_psi: the state before the first site, or null for zeros.
template <class T>
struct Attention {
  std::int64_t batch, sites, heads, keys, values;
  std::int64_t chunk;  // sites between two states that are kept for the adjoint
  const T *v, *hopping, *energy, *eta, *query, *key, *value, *first_g, *first_psi;
  T *g;            // (batch, sites, heads, 2)
  T *out;          // (batch, sites, heads, 2, values)
  T *psi;          // (batch, heads, 2, keys, values), after the last site
  T *checkpoints;  // (batch, heads, chunks, 2, keys, values), before each chunk; null: not kept
};

namespace {

template <class T>
inline std::int64_t chunks_of(const Attention<T> &a) {
  return a.sites / a.chunk + (a.sites % a.chunk != 0);
}

}  // namespace

template <class T>
struct AttentionBackward {
  const T *dg, *dout, *dpsi;
  T *dv, *dhopping, *denergy, *deta, *dquery, *dkey, *dvalue, *dfirst_g, *dfirst_psi;
  // denergy and deta: one partial sum a chain, (batch, heads).
};

// A piece of work: contiguous lanes of one batch element, or gathered chains out of all chains (b,
// h), numbered in that order.
struct Unit {
  std::int64_t batch, first, count;
  bool gathered;
};

// A stretch of a chain (batch, lane).
struct Chain {
  std::int64_t batch, lane, start, sites;
};

// How a block of a chain changes what enters it, and what does enter it (blocks.h).
struct BlockEnds {
  double map[10], left[4], right[2];
};

template <class T>
struct Kernels {
  // Advances `state` (parts, lanes) of one batch element by one site, in place; sweep.sites is 1.
  void (*sweep_step)(const Sweep<T> &, std::int64_t batch, T *state);
  // Returns memory, aligned to cache lines, that belongs to the calling thread until its next call.
  using Scratch = void *(*)(std::size_t bytes);
  void (*sweep)(const Sweep<T> &, bool two_sided, Unit, Scratch);
  void (*sweep_backward)(const SweepBackward<T> &, bool two_sided, Unit, Scratch);
  // The three steps of a sweep over blocks: every block, then the blocks of each chain, then every
  // block again.
  void (*block_maps)(const Sweep<T> &, const Chain *blocks, std::int64_t count, BlockEnds *,
                     Scratch);
  void (*compose_blocks)(const Sweep<T> &, bool two_sided, const Chain *blocks, std::int64_t count,
                         BlockEnds *);
  void (*sweep_blocks)(const Sweep<T> &, bool two_sided, const Chain *blocks, std::int64_t count,
                       const BlockEnds *, Scratch);
  // One chain of a resolvent attention.
  void (*attention)(const Attention<T> &, std::int64_t batch, std::int64_t head);
  void (*attention_backward)(const Attention<T> &, const AttentionBackward<T> &, std::int64_t batch,
                             std::int64_t head, Scratch);
};

struct KernelTable {
  void (*sweep_codes)(const SweepCodes &, bool two_sided, Unit, Kernels<float>::Scratch);
  void (*sweep_rounded)(const SweepRounded &, bool two_sided, Unit, Kernels<float>::Scratch);
  Kernels<float> f32;
  Kernels<double> f64;
};

// One function per instruction set, from one source compiled several times.
KernelTable sweep_kernels_baseline();
KernelTable sweep_kernels_avx2();
KernelTable sweep_kernels_avx512();

}  // namespace bkcore
