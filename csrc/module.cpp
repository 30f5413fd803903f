// The Python module bkcore.kernels._native: picks the instruction set and spreads the work over
// threads. Python has checked every tensor (src/bkcore/kernels/checks.py) and passes addresses, with
// how much memory is there (buffers.h).

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "buffers.h"
#include "product.h"
#include "sweep.h"

namespace nb = nanobind;

namespace bkcore {
namespace {

// Below this many elements per thread, starting the threads costs more than they save.
constexpr Index kElementsPerThread = 4096;
// Lanes of one unit of work are whole cache lines, so that no two threads write to the same one.
constexpr Index kLaneStep = 16;
// Chains are cut into blocks if there are at most so many, and blocks have at least so many sites.
constexpr Index kFewChains = 8, kSitesPerBlock = 64, kBlocks = 1024;

struct Isa {
  std::string name;
  KernelTable table;
  ProductKernels product;
};

std::vector<Isa> detect() {
  std::vector<Isa> found;
#ifdef BKCORE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    found.push_back({"avx512", sweep_kernels_avx512(),
                     vnni ? product_kernels_vnni() : product_kernels_avx2()});
  }
  if (avx2) found.push_back({"avx2", sweep_kernels_avx2(), product_kernels_avx2()});
#endif
  found.push_back({"baseline", sweep_kernels_baseline(), product_kernels_baseline()});
  return found;
}

const std::vector<Isa> &isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

const Isa &find_isa(const std::string &name) {
  for (const Isa &known : isas())
    if (known.name == name) return known;
  throw std::invalid_argument("this processor or build has no instruction set " + name);
}

template <class T>
const Kernels<T> &kernels(const std::string &isa) {
  const KernelTable &table = find_isa(isa).table;
  if constexpr (sizeof(T) == sizeof(float)) {
    return table.f32;
  } else {
    return table.f64;
  }
}

// Aligned memory in a vector that is kept for the next call: fresh pages cost more than a sweep.
void *aligned(std::vector<std::byte> &memory, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  if (memory.size() < bytes + kLine) memory.resize(bytes + kLine);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (kLine - address % kLine) % kLine;
}

// Memory of the calling thread, its own until its next call.
void *scratch(std::size_t bytes) {
  static thread_local std::vector<std::byte> memory;
  return aligned(memory, bytes);
}

Index ceil_divide(Index a, Index b) { return (a + b - 1) / b; }
Index round_up(Index a, Index b) { return ceil_divide(a, b) * b; }

Index worthwhile_threads(Index elements, Index allowed, Index each = kElementsPerThread) {
#ifdef _OPENMP
  return std::max<Index>(1, std::min(allowed, elements / each));
#else
  return 1;
#endif
}

// Calls work(i) for i in [0, count), the threads taking turns.
template <class Work>
void parallel_for(Index count, Index threads, const Work &work) {
#ifdef _OPENMP
  // Not even a region of one thread: a forked process must not touch its parent's thread pool.
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
    for (Index i = 0; i < count; ++i) work(i);
    return;
  }
#endif
  for (Index i = 0; i < count; ++i) work(i);
}

// Units of work. How they are cut changes no result: lanes do not depend on each other.
std::vector<Unit> units(Index batch, Index lanes, bool gathered, Index threads) {
  std::vector<Unit> list;
  if (gathered) {
    const Index chains = batch * lanes;
    const Index share = round_up(ceil_divide(chains, threads), kLaneStep);
    const Index count = std::min(share, kGatheredLanes);
    for (Index first = 0; first < chains; first += count)
      list.push_back({0, first, std::min(count, chains - first), true});
    return list;
  }
  // A batch that divides evenly, or is long, needs no split along the lanes.
  const Index splits = batch % threads == 0 || batch >= 4 * threads ? 1 : 2 * threads;
  const Index chunk = std::min(round_up(ceil_divide(lanes, splits), kLaneStep), kMaxLanes);
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
bool contiguous_lanes(const Adjoint<T> &a) {
  const bool source = !a.dsource.data || a.dsource.lane == 1;
  return contiguous_lanes(a.forward) && source && a.grad.lane == 1 && a.dv.lane == 1;
}

// Equal blocks of every chain but for the last, chosen from the shape alone.
std::vector<Chain> blocks(Index batch, Index sites, Index lanes) {
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
    kernels.forward_blocks(s, two_sided, &list[first], size(first), &ends[first], scratch);
  });
}

// Chains that are too few to fill vectors, and long enough to be cut into blocks instead.
bool few_and_long(Index chains, Index sites) {
  return chains <= kFewChains && sites >= 16 * kSitesPerBlock;
}

template <class T>
void run_forward(const std::string &isa, Index threads, bool two_sided, bool sequential,
                 const Sweep<T> &s) {
  const Index chains = s.batch * s.lanes;
  if (chains == 0) return;
  threads = worthwhile_threads(chains * s.sites, threads);
  if (few_and_long(chains, s.sites) && !sequential)
    return sweep_in_blocks(kernels<T>(isa), s, two_sided, threads);
  const std::vector<Unit> list = units(s.batch, s.lanes, !contiguous_lanes(s), threads);
  const auto kernel = kernels<T>(isa).forward;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

template <class T>
void run_backward(const std::string &isa, Index threads, bool two_sided, const Adjoint<T> &a) {
  const Sweep<T> &s = a.forward;
  threads = worthwhile_threads(s.batch * s.lanes * s.sites, threads);
  const std::vector<Unit> list = units(s.batch, s.lanes, !contiguous_lanes(a), threads);
  const auto kernel = kernels<T>(isa).backward;
  parallel_for(list.size(), threads, [&](Index i) { kernel(a, two_sided, list[i], scratch); });
}

using Shape = std::array<Index, 3>;  // batch, sites, lanes

// An output that the caches cannot hold anyway is written past them. Aligned, whole lines only.
template <class T>
bool should_stream(const Strided<T> &parts, Index bytes, Index cache_bytes) {
  constexpr Index kLine = 64 / sizeof(T);
  const bool aligned = reinterpret_cast<Address>(parts.data) % 64 == 0 &&
                       parts.batch % kLine == 0 && parts.site % kLine == 0 &&
                       parts.part % kLine == 0;
  return parts.lane == 1 && aligned && bytes > cache_bytes;
}

// A sweep of shared parameters; what is swept comes from elsewhere.
template <class T>
Sweep<T> describe(const Shape &shape, const Layout &energy, const Layout &eta,
                  const Layout &hopping) {
  const auto [batch, sites, lanes] = shape;
  Sweep<T> s{batch, sites, lanes};
  s.energy = strided<const T>(energy, {batch, 1, 1, lanes}, "energy");
  s.eta = strided<const T>(eta, {batch, sites, 1, lanes}, "eta");
  s.hopping = strided<const T>(hopping, {batch, sites - 1, 1, lanes}, "hopping");
  return s;
}

// The same with what is swept, of which a backward pass may need no v.
template <class T>
Sweep<T> describe(const Shape &shape, const Layout &v, const Layout &source, const Layout &energy,
                  const Layout &eta, const Layout &hopping, const Layout &parts) {
  const auto [batch, sites, lanes] = shape;
  Sweep<T> s = describe<T>(shape, energy, eta, hopping);
  s.v = strided_or_null<const T>(v, {batch, sites, 1, lanes}, "v");
  s.source = strided_or_null<const T>(source, {batch, sites, 1, lanes}, "source");
  s.parts = strided<T>(parts, {batch, sites, source == Layout{} ? 2 : 4, lanes}, "parts");
  return s;
}

void forward(const std::string &isa, Index threads, bool is_double, bool two_sided, bool sequential,
             Index cache_bytes, Shape shape, Layout v, Layout source, Layout energy, Layout eta,
             Layout hopping, Layout parts) {
  if (v == Layout{}) refuse("v is missing");
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Sweep<T> s = describe<T>(shape, v, source, energy, eta, hopping, parts);
    const Index channels = s.source.data ? 4 : 2, elements = s.batch * s.sites * s.lanes;
    s.stream = should_stream(s.parts, elements * channels * Index{sizeof(T)}, cache_bytes);
    run_forward<T>(isa, threads, two_sided, sequential, s);
  };
  is_double ? run(double()) : run(float());
}

void backward(const std::string &isa, Index threads, bool is_double, bool two_sided,
              Index cache_bytes, Shape shape, Layout v, Layout source, Layout energy, Layout eta,
              Layout hopping, Layout parts, Layout grad, Layout dv, Layout dsource, Layout denergy,
              Layout deta, Layout dhopping) {
  if (two_sided && v == Layout{}) refuse("v is missing");
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto [batch, sites, lanes] = shape;
    const Sweep<T> s = describe<T>(shape, v, source, energy, eta, hopping, parts);
    const Index channels = s.source.data ? 4 : 2, elements = batch * sites * lanes;
    const Sizes site = {batch, sites, 1, lanes};
    Adjoint<T> a = {s,
                    strided<const T>(grad, {batch, sites, channels, lanes}, "grad"),
                    strided<T>(dv, site, "dv"),
                    s.source.data ? strided<T>(dsource, site, "dsource") : Strided<T>{},
                    strided<T>(denergy, {batch, 1, 1, lanes}, "denergy"),
                    strided<T>(deta, {batch, s.eta.site ? sites : 1, 1, lanes}, "deta"),
                    strided<T>(dhopping, {batch, s.hopping.site ? sites - 1 : 1, 1, lanes},
                               "dhopping")};
    a.forward.stream = should_stream(a.dv, elements * channels * Index{sizeof(T)}, cache_bytes);
    run_backward<T>(isa, threads, two_sided, a);
  };
  is_double ? run(double()) : run(float());
}

void coded(const std::string &isa, Index threads, bool two_sided, Index bits, Shape shape, Buffer v,
           Buffer source, Buffer out, Layout energy, Layout eta, Layout hopping, Layout in_scale,
           Layout in_zero, Layout out_scale, Layout out_zero, Buffer in_levels,
           Buffer out_bounds) {
  require_bits(bits);
  const auto [batch, sites, lanes] = shape;
  const Index inputs = source == kNoBuffer ? 1 : 2, outputs = 2 * inputs, levels = Index{1} << bits;
  const Index row = (lanes * bits + 7) / 8;
  const Sizes entering = {batch, sites, inputs, lanes}, leaving = {batch, sites, outputs, lanes};
  const CodedSweep s = {describe<float>(shape, energy, eta, hopping),
                        bits,
                        numbers<const std::uint8_t>(v, {batch, sites, row}, "v"),
                        numbers_or_null<const std::uint8_t>(source, {batch, sites, row}, "source"),
                        numbers<std::uint8_t>(out, {batch, sites, outputs, row}, "out"),
                        strided<const float>(in_scale, entering, "in_scale"),
                        strided<const float>(in_zero, entering, "in_zero"),
                        strided<const float>(out_scale, leaving, "out_scale"),
                        strided<const float>(out_zero, leaving, "out_zero"),
                        numbers_or_null<const float>(in_levels, {inputs, levels}, "in_levels"),
                        numbers_or_null<const float>(out_bounds, {outputs, levels}, "out_bounds")};
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, false, threads);
  const auto kernel = find_isa(isa).table.coded;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

void rounded(const std::string &isa, Index threads, bool two_sided, Index bits, Index group_size,
             Shape shape, Layout v, Layout energy, Layout eta, Layout hopping, Layout parts,
             Buffer scale, Buffer zero, Buffer levels, Buffer bounds) {
  require_bits(bits);
  if (v == Layout{} || (levels == kNoBuffer) != (bounds == kNoBuffer))
    refuse("v is missing, or there are levels without bounds, or bounds without levels");
  const auto [batch, sites, lanes] = shape;
  const Index groups = groups_of(sites, group_size), codes = Index{1} << bits;
  const RoundedSweep s = {describe<float>(shape, v, Layout{}, energy, eta, hopping, parts),
                          bits,
                          groups,
                          group_size,
                          numbers<const float>(scale, {3, groups}, "scale"),
                          numbers<const float>(zero, {3, groups}, "zero"),
                          numbers_or_null<const float>(levels, {3, codes}, "levels"),
                          numbers_or_null<const float>(bounds, {3, codes}, "bounds")};
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, true, threads);
  const auto kernel = find_isa(isa).table.rounded;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

void step(const std::string &isa, bool is_double, std::array<Index, 2> shape, Buffer v,
          Buffer source, Buffer energy, Buffer eta, Buffer hopping, Buffer state) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto [batch, lanes] = shape;
    const Index channels = source == kNoBuffer ? 2 : 4;
    const auto row = [&](const T *p, Index stride) { return Strided<const T>{p, stride, 0, 0, 1}; };
    Sweep<T> s{batch, 1, lanes};
    s.v = row(numbers<const T>(v, {batch, lanes}, "v"), lanes);
    s.source = row(numbers_or_null<const T>(source, {batch, lanes}, "source"), lanes);
    s.energy = row(numbers<const T>(energy, {lanes}, "energy"), 0);
    s.eta = row(numbers<const T>(eta, {lanes}, "eta"), 0);
    s.hopping = row(numbers<const T>(hopping, {lanes}, "hopping"), 0);
    T *const rows = numbers<T>(state, {batch, channels, lanes}, "state");
    if (lanes == 0) return;
    for (Index b = 0; b < batch; ++b) kernels<T>(isa).step(s, b, rows + b * channels * lanes);
  };
  is_double ? run(double()) : run(float());
}

// The sizes of a resolvent attention: batch, sites, heads, keys, values, and the sites between two
// states that it keeps for its adjoint.
using AttentionShape = std::array<Index, 6>;
// v, hopping, energy, eta, query, key, value, and the state before; then g, out, psi, checkpoints.
using AttentionInputs = std::array<Buffer, 9>;
using AttentionOutputs = std::array<Buffer, 4>;

template <class T>
Attention<T> describe_attention(const AttentionShape &shape, const AttentionInputs &in) {
  const auto [batch, sites, heads, keys, values, chunk] = shape;
  if (chunk < 1) refuse("there are " + std::to_string(chunk) + " sites between two states");
  Attention<T> a{batch, sites, heads, keys, values, chunk};
  a.v = numbers<const T>(in[0], {batch, sites, heads}, "v");
  a.hopping = numbers<const T>(in[1], {batch, sites, heads}, "hopping");
  a.energy = numbers<const T>(in[2], {heads}, "energy");
  a.eta = numbers<const T>(in[3], {heads}, "eta");
  a.query = numbers<const T>(in[4], {batch, sites, heads, keys}, "query");
  a.key = numbers<const T>(in[5], {batch, sites, heads, keys}, "key");
  a.value = numbers<const T>(in[6], {batch, sites, heads, values}, "value");
  a.first_g = numbers_or_null<const T>(in[7], {batch, heads, 2}, "first_g");
  a.first_psi = numbers_or_null<const T>(in[8], {batch, heads, 2, keys, values}, "first_psi");
  return a;
}

template <class T>
T *checkpoints(const Buffer &buffer, const Attention<T> &a) {
  return numbers<T>(buffer, {a.batch, a.heads, chunks_of(a), 2, a.keys, a.values}, "checkpoints");
}

template <class T, class Work>
void for_chains(const Attention<T> &a, Index threads, const Work &work) {
  const Index products = count({a.batch, a.sites, a.heads, a.keys, a.values});
  threads = worthwhile_threads(products, threads);
  const Index lanes = a.heads;
  parallel_for(a.batch * a.heads, threads, [&](Index i) { work(i / lanes, i % lanes); });
}

void attention(const std::string &isa, Index threads, bool is_double, AttentionShape shape,
               const AttentionInputs &in, const AttentionOutputs &out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = describe_attention<T>(shape, in);
    a.g = numbers<T>(out[0], {a.batch, a.sites, a.heads, 2}, "g");
    a.out = numbers<T>(out[1], {a.batch, a.sites, a.heads, 2, a.values}, "out");
    a.psi = numbers<T>(out[2], {a.batch, a.heads, 2, a.keys, a.values}, "psi");
    if (out[3] != kNoBuffer) a.checkpoints = checkpoints(out[3], a);
    const auto kernel = kernels<T>(isa).attention;
    for_chains(a, threads, [&](Index b, Index h) { kernel(a, b, h); });
  };
  is_double ? run(double()) : run(float());
}

// grads: of g, out and psi. results: in the order of AttentionAdjoint.
void attention_backward(const std::string &isa, Index threads, bool is_double, AttentionShape shape,
                        const AttentionInputs &in, const Buffer &g, const Buffer &states,
                        const std::array<Buffer, 3> &grads, const std::array<Buffer, 9> &results) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = describe_attention<T>(shape, in);
    a.g = numbers<T>(g, {a.batch, a.sites, a.heads, 2}, "g");
    a.checkpoints = checkpoints(states, a);
    AttentionAdjoint<T> d{};
    d.dg = numbers<const T>(grads[0], {a.batch, a.sites, a.heads, 2}, "dg");
    d.dout = numbers<const T>(grads[1], {a.batch, a.sites, a.heads, 2, a.values}, "dout");
    d.dpsi = numbers<const T>(grads[2], {a.batch, a.heads, 2, a.keys, a.values}, "dpsi");
    d.dv = numbers<T>(results[0], {a.batch, a.sites, a.heads}, "dv");
    d.dhopping = numbers<T>(results[1], {a.batch, a.sites, a.heads}, "dhopping");
    d.denergy = numbers<T>(results[2], {a.batch, a.heads}, "denergy");
    d.deta = numbers<T>(results[3], {a.batch, a.heads}, "deta");
    d.dquery = numbers<T>(results[4], {a.batch, a.sites, a.heads, a.keys}, "dquery");
    d.dkey = numbers<T>(results[5], {a.batch, a.sites, a.heads, a.keys}, "dkey");
    d.dvalue = numbers<T>(results[6], {a.batch, a.sites, a.heads, a.values}, "dvalue");
    d.dfirst_g = numbers<T>(results[7], {a.batch, a.heads, 2}, "dfirst_g");
    d.dfirst_psi = numbers<T>(results[8], {a.batch, a.heads, 2, a.keys, a.values}, "dfirst_psi");
    const auto kernel = kernels<T>(isa).attention_adjoint;
    for_chains(a, threads, [&](Index b, Index h) { kernel(a, d, b, h, scratch); });
  };
  is_double ? run(double()) : run(float());
}

// How rows of channels are rounded: scale, zero point and levels (or none), and how many
// neighbouring channels share a scale.
using Quantizer = std::tuple<Buffer, Buffer, Buffer, Index>;

Rounding describe_rounding(Index rows, Index channels, Index bits, const Quantizer &quantizer) {
  require_bits(bits);
  const auto &[scale, zero, levels, group_size] = quantizer;
  const Index groups = groups_of(channels, group_size);
  Rounding r{rows, channels, bits, group_size};
  r.scale = numbers<const std::uint16_t>(scale, {groups}, "scale");
  r.zero = numbers<const std::int8_t>(zero, {groups}, "zero");
  r.levels = numbers_or_null<const float>(levels, {Index{1} << bits}, "levels");
  return r;
}

// Batch, heads, groups of them that share query and key, keys, values.
using RecallShape = std::array<Index, 5>;
// In the order of src/bkcore/kernels/recall.py; and the result, g and psi.
using RecallInputs = std::array<Buffer, 11>;
using RecallOutputs = std::array<Buffer, 3>;

// One site of resolvent attention with all that the language model does around it; formulas and
// layout: src/bkcore/kernels/recall.py. Threads share the chains; the rest is too little to share.
class RecallStep {
 public:
  RecallStep(const std::string &isa, Index bits, const RecallShape &shape, const RecallInputs &in,
             const std::vector<Quantizer> &quantizers, const RecallOutputs &out)
      : isa_(find_isa(isa)) {
    batch_ = shape[0], heads_ = shape[1], groups_ = shape[2], keys_ = shape[3], values_ = shape[4];
    if (groups_ < 1 || heads_ % groups_) refuse("heads do not share their keys evenly");
    const Index width = heads_ * values_, shared = groups_ * keys_;
    const std::array<Index, 7> channels = {heads_, heads_, shared, shared, width, width, width};
    if (!quantizers.empty() && quantizers.size() != channels.size())
      refuse("there are seven quantizers, or none");
    for (std::size_t part = 0; part < quantizers.size(); ++part)
      roundings_.push_back(describe_rounding(batch_, channels[part], bits, quantizers[part]));
    gate_ = read(in[0], {batch_, heads_}, "gate");
    barrier_ = read(in[1], {batch_, heads_}, "barrier");
    query_ = read(in[2], {batch_, shared}, "query"), key_ = read(in[3], {batch_, shared}, "key");
    value_ = read(in[4], {batch_, width}, "value");
    rate_ = read(in[5], {heads_}, "rate"), height_ = read(in[6], {heads_}, "height");
    weight_ = read(in[8], {3, width}, "weight");
    features_ = numbers<float>(out[0], {batch_, width}, "result");
    attention_ = {batch_, 1, heads_, keys_, values_, 1};
    attention_.eta = read(in[7], {heads_}, "eta");
    attention_.first_g = read(in[9], {batch_, heads_, 2}, "g");
    attention_.first_psi = read(in[10], {batch_, heads_, 2, keys_, values_}, "psi");
    attention_.g = numbers<float>(out[1], {batch_, heads_, 2}, "the new g");
    attention_.psi = numbers<float>(out[2], {batch_, heads_, 2, keys_, values_}, "the new psi");
  }

  // NaN goes through.
  bool has_positive_eta() const {
    return std::none_of(attention_.eta, attention_.eta + heads_, [](float x) { return x <= 0; });
  }

  void run(Index threads) {
    prepare();
    for_chains(attention_, threads, [&](Index b, Index h) {
      isa_.table.f32.attention(attention_, b, h);
      over_memory(b * heads_ + h, attention_.eta[h]);
    });
    const Index width = heads_ * values_;
    const float *real = rounded(5, real_), *imag = rounded(6, imag_);
    const float *a = weight_, *b = a + width, *c = b + width;
    for (Index row = 0; row < batch_; ++row)
      for (Index u = 0; u < width; ++u) {
        const Index at = row * width + u;
        features_[at] = a[u] * attention_.value[at] + b[u] * real[at] + c[u] * imag[at];
      }
  }

 private:
  static const float *read(const Buffer &buffer, std::initializer_list<Index> sizes,
                           const char *name) {
    return numbers<const float>(buffer, sizes, name);
  }

  // What enters the attention, rounded, in scratch memory.
  void prepare() {
    const Index width = heads_ * values_, shared = groups_ * keys_;
    const Index used = batch_ * (4 * heads_ + 2 * shared + 2 * heads_ * keys_ + 7 * width) + heads_;
    static thread_local std::vector<std::byte> memory;
    free_ = static_cast<float *>(aligned(memory, used * sizeof(float)));
    const float *gate = rounded(0, gate_), *barrier = rounded(1, barrier_);
    attention_.query = for_every_head(rounded(2, query_));
    attention_.key = for_every_head(rounded(3, key_));
    attention_.value = rounded(4, value_);
    float *hopping = take(heads_), *diagonal = take(heads_), *energy = free_;
    std::fill_n(energy, heads_, 0.0F);
    free_ += heads_;
    for (Index chain = 0; chain < batch_ * heads_; ++chain)
      dynamics(chain, gate[chain], barrier[chain], hopping + chain, diagonal + chain);
    attention_.v = diagonal, attention_.hopping = hopping, attention_.energy = energy;
    attention_.out = take(2 * width);
    real_ = take(width), imag_ = take(width);
  }

  float *take(Index channels) {
    float *const taken = free_;
    free_ += batch_ * channels;
    return taken;
  }

  const float *rounded(Index part, const float *x) {
    if (roundings_.empty()) return x;
    Rounding &r = roundings_[part];
    r.x = x, r.out = take(r.channels);
    isa_.product.round(r, 0, batch_, scratch);
    return r.out;
  }

  // What groups of heads share, (batch, groups, keys) -> (batch, heads, keys).
  const float *for_every_head(const float *x) {
    if (groups_ == heads_) return x;
    float *const out = take(heads_ * keys_);
    for (Index chain = 0; chain < batch_ * heads_; ++chain)
      std::copy_n(x + chain / (heads_ / groups_) * keys_, keys_, out + chain * keys_);
    return out;
  }

  void dynamics(Index chain, double gate, double barrier, float *hopping, float *diagonal) const {
    const Index head = chain % heads_;
    const double rate = rate_[head], height = height_[head];
    const bool begun = attention_.first_g[2 * chain] != 0 || attention_.first_g[2 * chain + 1] != 0;
    const double sigmoid = 1 / (1 + std::exp(-gate));
    const float t = static_cast<float>(std::exp(-2 * rate * sigmoid));
    const double softplus = barrier > 20 ? barrier : std::log1p(std::exp(barrier));
    *hopping = t * (begun ? 1.0F : 0.0F);
    *diagonal = 1 + *hopping * *hopping + static_cast<float>(height * softplus);
  }

  void over_memory(Index chain, float eta) {
    const float *found = attention_.out + 2 * chain * values_;
    const float w = attention_.g[2 * chain + 1] / eta, root = std::sqrt(w);
    for (Index u = 0; u < values_; ++u) {
      real_[chain * values_ + u] = found[u] / root;
      imag_[chain * values_ + u] = found[values_ + u] / eta / (w * root);
    }
  }

  const Isa &isa_;
  Index batch_, heads_, groups_, keys_, values_;
  std::vector<Rounding> roundings_;
  const float *gate_, *barrier_, *query_, *key_, *value_, *rate_, *height_, *weight_;
  float *features_, *free_, *real_, *imag_;
  Attention<float> attention_;
};

// Returns false, and gives no result, if an eta is not positive.
bool recall_step(const std::string &isa, Index threads, Index bits, RecallShape shape,
                 const RecallInputs &in, const std::vector<Quantizer> &quantizers,
                 const RecallOutputs &out) {
  RecallStep step(isa, bits, shape, in, quantizers, out);
  if (!step.has_positive_eta()) return false;
  step.run(threads);
  return true;
}

// Rows that share a panel, and the fewest products of codes that are worth a thread.
constexpr Index kRowsPerPanel = 384, kProductsPerThread = Index{1} << 18;

EncodedRows encoded_rows(const Product &p, Index words) {
  static thread_local std::vector<std::byte> memory;
  const std::size_t bytes = p.rows * (words + p.groups + 1) * sizeof(std::uint32_t);
  auto *start = static_cast<std::uint32_t *>(aligned(memory, bytes));
  auto *sums = reinterpret_cast<std::int32_t *>(start + p.rows * words);
  return {reinterpret_cast<float *>(sums + p.rows * p.groups), sums, start};
}

void product(const std::string &isa, Index allowed, Index bits, std::array<Index, 4> shape,
             const std::array<Buffer, 4> &tensors) {
  require_bits(bits);
  const auto [rows, inputs, outputs, group_size] = shape;
  const Index groups = groups_of(inputs, group_size);
  const Index width = bits == 8 ? inputs : ceil_divide(inputs, 2);
  const Product p = {rows,
                     outputs,
                     inputs,
                     bits,
                     groups,
                     group_size,
                     numbers<const float>(tensors[0], {rows, inputs}, "x"),
                     numbers<const std::uint8_t>(tensors[1], {outputs, width}, "weight"),
                     numbers<const std::uint16_t>(tensors[2], {outputs, groups}, "scales"),
                     numbers<float>(tensors[3], {rows, outputs}, "out")};
  const ProductKernels &kernels = find_isa(isa).product;
  const EncodedRows encoded = encoded_rows(p, words_of(p, kernels.depth));
  const Index threads = worthwhile_threads(rows * outputs * inputs, allowed, kProductsPerThread);
  const Index panels = ceil_divide(outputs, kernels.panel), chunks = ceil_divide(rows, kRowsPerPanel);
  parallel_for(chunks, threads, [&](Index chunk) {
    const Index first = chunk * kRowsPerPanel, end = std::min(rows, first + kRowsPerPanel);
    for (Index row = first; row < end; ++row) kernels.encode(p, row, encoded);
  });
  parallel_for(panels * chunks, threads, [&](Index i) {
    const Index first = i / panels * kRowsPerPanel;
    kernels.multiply(p, encoded, i % panels * kernels.panel, first,
                     std::min(kRowsPerPanel, rows - first), scratch);
  });
}

void round_channels(const std::string &isa, Index threads, Index bits, std::array<Index, 2> shape,
                    const Quantizer &quantizer, const Buffer &x, const Buffer &out) {
  const auto [rows, channels] = shape;
  Rounding r = describe_rounding(rows, channels, bits, quantizer);
  r.x = numbers<const float>(x, {rows, channels}, "x");
  r.out = numbers<float>(out, {rows, channels}, "out");
  threads = worthwhile_threads(rows * channels, threads);
  const Index share = ceil_divide(std::max<Index>(rows, 1), threads);
  const auto kernel = find_isa(isa).product.round;
  parallel_for(ceil_divide(rows, share), threads, [&](Index i) {
    kernel(r, i * share, std::min(share, rows - i * share), scratch);
  });
}

// tensors: grad, x, dx, dscale and dlevels.
void round_channels_backward(const std::string &isa, Index threads, Index bits,
                             std::array<Index, 2> shape, const Quantizer &quantizer,
                             const std::array<Buffer, 5> &tensors) {
  const auto [rows, channels] = shape;
  const Index shares = ceil_divide(rows, kRowsPerShare);
  RoundingAdjoint a{describe_rounding(rows, channels, bits, quantizer)};
  a.forward.x = numbers<const float>(tensors[1], {rows, channels}, "x");
  a.grad = numbers<const float>(tensors[0], {rows, channels}, "grad");
  a.dx = numbers<float>(tensors[2], {rows, channels}, "dx");
  a.dscale = numbers<float>(tensors[3], {shares, channels}, "dscale");
  if (a.forward.levels)
    a.dlevels = numbers<float>(tensors[4], {shares, Index{1} << bits}, "dlevels");
  threads = worthwhile_threads(rows * channels, threads);
  const auto kernel = find_isa(isa).product.round_adjoint;
  parallel_for(shares, threads, [&](Index share) { kernel(a, share, scratch); });
}

void round_rows(const std::string &isa, Index threads, Index rows, Index columns, Buffer x,
                Buffer out) {
  const auto *from = numbers<const float>(x, {rows, columns}, "x");
  auto *to = numbers<float>(out, {rows, columns}, "out");
  threads = worthwhile_threads(rows * columns, threads);
  const auto kernel = find_isa(isa).product.round_row;
  constexpr Index kShare = 64;
  parallel_for(ceil_divide(rows, kShare), threads, [&](Index i) {
    for (Index row = i * kShare; row < std::min(rows, (i + 1) * kShare); ++row)
      kernel(from + row * columns, columns, to + row * columns);
  });
}

// rows, columns, group size; weight, scale.
WeightRounding weight_rounding(Index bits, const Shape &shape, const Buffer &weight,
                               const Buffer &scale) {
  require_bits(bits);
  const auto [rows, columns, group_size] = shape;
  const Index groups = groups_of(columns, group_size);
  return {rows,
          columns,
          bits,
          groups,
          group_size,
          numbers<const float>(weight, {rows, columns}, "weight"),
          numbers<const std::uint16_t>(scale, {rows, groups}, "scale")};
}

// Calls a kernel with every row of a weight.
template <class Kernel>
void each_row(const WeightRounding &w, Index threads, Kernel kernel) {
  threads = worthwhile_threads(w.rows * w.columns, threads);
  constexpr Index kShare = 64;
  parallel_for(ceil_divide(w.rows, kShare), threads, [&](Index i) {
    for (Index row = i * kShare; row < std::min(w.rows, (i + 1) * kShare); ++row) kernel(row);
  });
}

// tensors: weight, scale, codes and values.
void round_weight(const std::string &isa, Index threads, Index bits, Shape shape,
                  const std::array<Buffer, 4> &tensors) {
  const WeightRounding w = weight_rounding(bits, shape, tensors[0], tensors[1]);
  auto *codes = numbers<std::int8_t>(tensors[2], {w.rows, w.columns}, "codes");
  auto *values = numbers<float>(tensors[3], {w.rows, w.columns}, "values");
  const auto kernel = find_isa(isa).product.round_weight;
  each_row(w, threads, [&](Index row) {
    kernel(w, row, codes + row * w.columns, values + row * w.columns);
  });
}

// tensors: weight, scale, and the gradients of the values, the weight and the scale.
void round_weight_backward(const std::string &isa, Index threads, Index bits, Shape shape,
                           const std::array<Buffer, 5> &tensors) {
  const WeightRounding w = weight_rounding(bits, shape, tensors[0], tensors[1]);
  const Index groups = w.groups;
  const auto *grad = numbers<const float>(tensors[2], {w.rows, w.columns}, "grad");
  auto *dweight = numbers<float>(tensors[3], {w.rows, w.columns}, "dweight");
  auto *dscale = numbers<float>(tensors[4], {w.rows, groups}, "dscale");
  const auto kernel = find_isa(isa).product.round_weight_adjoint;
  each_row(w, threads, [&](Index row) {
    kernel(w, row, grad + row * w.columns, dweight + row * w.columns, dscale + row * groups);
  });
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa &isa : isas()) names.push_back(isa.name);
  return names;
}

}  // namespace
}  // namespace bkcore

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of bkcore. Private: the functions take raw addresses.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("supported_isas", &bkcore::supported_isas);
  m.def("sweep", &bkcore::forward, Unlocked());
  m.def("sweep_codes", &bkcore::coded, Unlocked());
  m.def("few_and_long", &bkcore::few_and_long);
  m.def("sweep_rounded", &bkcore::rounded, Unlocked());
  m.def("attention", &bkcore::attention, Unlocked());
  m.def("attention_backward", &bkcore::attention_backward, Unlocked());
  m.def("recall_step", &bkcore::recall_step, Unlocked());
  m.def("product", &bkcore::product, Unlocked());
  m.def("round_channels", &bkcore::round_channels, Unlocked());
  m.def("round_channels_backward", &bkcore::round_channels_backward, Unlocked());
  m.def("round_weight", &bkcore::round_weight, Unlocked());
  m.def("round_weight_backward", &bkcore::round_weight_backward, Unlocked());
  m.attr("rows_per_share") = bkcore::kRowsPerShare;
  m.def("round_rows", &bkcore::round_rows, Unlocked());
  m.def("step", &bkcore::step);  // shorter than letting go of the interpreter
  m.def("sweep_backward", &bkcore::backward, Unlocked());
}
