// The Python module bkcore.kernels._native: picks the instruction set and spreads the work over
// threads. Python has checked every tensor (src/bkcore/kernels/ops.py) and passes addresses.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "product.h"
#include "sweep.h"

namespace nb = nanobind;

namespace bkcore {
namespace {

using Index = std::int64_t;
using Address = std::uintptr_t;

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

// Address and strides: batch, site, part, lane; as Python passes a tensor.
using Layout = std::tuple<Address, Index, Index, Index, Index>;
using Shape = std::tuple<Index, Index, Index>;  // batch, sites, lanes

template <class T>
Strided<T> strided(const Layout &x) {
  const auto [address, batch, site, part, lane] = x;
  return {reinterpret_cast<T *>(address), batch, site, part, lane};
}

// An output that the caches cannot hold anyway is written past them. Aligned, whole lines only.
template <class T>
bool should_stream(const Strided<T> &parts, Index bytes, Index cache_bytes) {
  constexpr Index kLine = 64 / sizeof(T);
  const bool aligned = reinterpret_cast<Address>(parts.data) % 64 == 0 &&
                       parts.batch % kLine == 0 && parts.site % kLine == 0 &&
                       parts.part % kLine == 0;
  return parts.lane == 1 && aligned && bytes > cache_bytes;
}

template <class T>
Sweep<T> describe(Shape shape, const Layout &v, const Layout &source, const Layout &energy,
                  const Layout &eta, const Layout &hopping, const Layout &parts) {
  const auto [batch, sites, lanes] = shape;
  return {batch, sites, lanes, strided<const T>(v), strided<const T>(source),
          strided<const T>(energy), strided<const T>(eta), strided<const T>(hopping),
          strided<T>(parts), false};
}

void forward(const std::string &isa, Index threads, bool is_double, bool two_sided, bool sequential,
             Index cache_bytes, Shape shape, Layout v, Layout source, Layout energy, Layout eta,
             Layout hopping, Layout parts) {
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
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Adjoint<T> a = {describe<T>(shape, v, source, energy, eta, hopping, parts),
                    strided<const T>(grad), strided<T>(dv), strided<T>(dsource),
                    strided<T>(denergy), strided<T>(deta), strided<T>(dhopping)};
    const Index channels = a.forward.source.data ? 4 : 2;
    const Index elements = a.forward.batch * a.forward.sites * a.forward.lanes;
    a.forward.stream = should_stream(a.dv, elements * channels * Index{sizeof(T)}, cache_bytes);
    run_backward<T>(isa, threads, two_sided, a);
  };
  is_double ? run(double()) : run(float());
}

void coded(const std::string &isa, Index threads, bool two_sided, Index bits, Shape shape,
           Address v, Address source, Address out, Layout energy, Layout eta, Layout hopping,
           Layout in_scale, Layout in_zero, Layout out_scale, Layout out_zero, Address in_levels,
           Address out_bounds) {
  const Layout none = {0, 0, 0, 0, 0};
  const CodedSweep s = {describe<float>(shape, none, none, energy, eta, hopping, none),
                        bits,
                        reinterpret_cast<const std::uint8_t *>(v),
                        reinterpret_cast<const std::uint8_t *>(source),
                        reinterpret_cast<std::uint8_t *>(out),
                        strided<const float>(in_scale),
                        strided<const float>(in_zero),
                        strided<const float>(out_scale),
                        strided<const float>(out_zero),
                        reinterpret_cast<const float *>(in_levels),
                        reinterpret_cast<const float *>(out_bounds)};
  const auto [batch, sites, lanes] = shape;
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, false, threads);
  const auto kernel = find_isa(isa).table.coded;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

void rounded(const std::string &isa, Index threads, bool two_sided, Index bits, Index groups,
             Index group_size, Shape shape, Layout v, Layout energy, Layout eta, Layout hopping, Layout parts,
             Address scale, Address zero, Address levels, Address bounds) {
  const Layout none = {0, 0, 0, 0, 0};
  const RoundedSweep s = {describe<float>(shape, v, none, energy, eta, hopping, parts),
                          bits,
                          groups,
                          group_size,
                          reinterpret_cast<const float *>(scale),
                          reinterpret_cast<const float *>(zero),
                          reinterpret_cast<const float *>(levels),
                          reinterpret_cast<const float *>(bounds)};
  const auto [batch, sites, lanes] = shape;
  threads = worthwhile_threads(batch * sites * lanes, threads);
  const std::vector<Unit> list = units(batch, lanes, true, threads);
  const auto kernel = find_isa(isa).table.rounded;
  parallel_for(list.size(), threads, [&](Index i) { kernel(s, two_sided, list[i], scratch); });
}

void step(const std::string &isa, bool is_double, Shape shape, Address v, Address source,
          Address energy, Address eta, Address hopping, Address state) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto [batch, sites, lanes] = shape;
    const auto row = [&](Address p, Index stride) { return Layout{p, stride, 0, 0, 1}; };
    const Sweep<T> s = describe<T>(shape, row(v, lanes), row(source, lanes), row(energy, 0),
                                   row(eta, 0), row(hopping, 0), {0, 0, 0, 0, 0});
    const Index channels = source ? 4 : 2;
    for (Index b = 0; b < batch; ++b)
      kernels<T>(isa).step(s, b, reinterpret_cast<T *>(state) + b * channels * lanes);
  };
  is_double ? run(double()) : run(float());
}

// The sizes of a resolvent attention, and addresses in the order of the members of its structures.
using AttentionShape = std::tuple<Index, Index, Index, Index, Index>;

template <class T>
Attention<T> describe_attention(AttentionShape shape, const std::vector<Address> &in,
                                const std::vector<Address> &out) {
  const auto [batch, sites, heads, keys, values] = shape;
  const auto read = [&](int n) { return reinterpret_cast<const T *>(in[n]); };
  const auto write = [&](int n) { return reinterpret_cast<T *>(out[n]); };
  return {batch,   sites,   heads,    keys,     values,   read(0),  read(1), read(2), read(3),
          read(4), read(5), read(6),  read(7),  read(8),  write(0), write(1), write(2), write(3)};
}

template <class Work>
void for_chains(const AttentionShape &shape, Index threads, const Work &work) {
  const auto [batch, sites, heads, keys, values] = shape;
  threads = worthwhile_threads(batch * sites * heads * keys * values, threads);
  const Index lanes = heads;
  parallel_for(batch * heads, threads, [&](Index i) { work(i / lanes, i % lanes); });
}

void attention(const std::string &isa, Index threads, bool is_double, AttentionShape shape,
               const std::vector<Address> &in, const std::vector<Address> &out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Attention<T> a = describe_attention<T>(shape, in, out);
    const auto kernel = kernels<T>(isa).attention;
    for_chains(shape, threads, [&](Index b, Index h) { kernel(a, b, h); });
  };
  is_double ? run(double()) : run(float());
}

void attention_backward(const std::string &isa, Index threads, bool is_double, AttentionShape shape,
                        const std::vector<Address> &in, const std::vector<Address> &out,
                        const std::vector<Address> &grads, const std::vector<Address> &results) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Attention<T> a = describe_attention<T>(shape, in, out);
    const auto read = [&](int n) { return reinterpret_cast<const T *>(grads[n]); };
    const auto write = [&](int n) { return reinterpret_cast<T *>(results[n]); };
    const AttentionAdjoint<T> d = {read(0),  read(1),  read(2),  write(0), write(1), write(2),
                                   write(3), write(4), write(5), write(6), write(7), write(8)};
    const auto kernel = kernels<T>(isa).attention_adjoint;
    for_chains(shape, threads, [&](Index b, Index h) { kernel(a, d, b, h, scratch); });
  };
  is_double ? run(double()) : run(float());
}

// A quantizer of channels: addresses of scale, zero point and levels (or 0), and how many
// neighbouring channels share a scale.
using Quantizer = std::tuple<Address, Address, Address, Index>;

// One site of resolvent attention with all that the language model does around it; formulas and
// layout: src/bkcore/kernels/recall.py. Threads share the chains; the rest is too little to share.
class RecallStep {
 public:
  RecallStep(const std::string &isa, Index bits, AttentionShape shape,
             const std::vector<Address> &in, const std::vector<Quantizer> &quantizers,
             const std::vector<Address> &out)
      : isa_(find_isa(isa)), bits_(bits), quantizers_(quantizers) {
    std::tie(batch_, heads_, groups_, keys_, values_) = shape;
    const auto read = [&](int n) { return reinterpret_cast<const float *>(in[n]); };
    rate_ = read(5), height_ = read(6), weight_ = read(8), first_g_ = read(9);
    features_ = reinterpret_cast<float *>(out[0]);
    const Index width = heads_ * values_, shared = groups_ * keys_;
    const Index used = batch_ * (4 * heads_ + 2 * shared + 2 * heads_ * keys_ + 7 * width) + heads_;
    static thread_local std::vector<std::byte> memory;
    free_ = static_cast<float *>(aligned(memory, used * sizeof(float)));

    const float *gate = rounded(0, read(0), heads_), *barrier = rounded(1, read(1), heads_);
    const float *query = for_every_head(rounded(2, read(2), shared));
    const float *key = for_every_head(rounded(3, read(3), shared));
    const float *value = rounded(4, read(4), width);
    float *hopping = take(heads_), *diagonal = take(heads_), *energy = free_;
    std::fill_n(energy, heads_, 0.0F);
    free_ += heads_;
    for (Index chain = 0; chain < batch_ * heads_; ++chain)
      dynamics(chain, gate[chain], barrier[chain], hopping + chain, diagonal + chain);
    attention_ = {batch_, 1, heads_, keys_, values_, diagonal, hopping, energy, read(7), query, key,
                  value, first_g_, read(10), reinterpret_cast<float *>(out[1]), take(2 * width),
                  reinterpret_cast<float *>(out[2]), nullptr};
    real_ = take(width), imag_ = take(width);
  }

  void run(Index threads) {
    for_chains({batch_, 1, heads_, keys_, values_}, threads, [&](Index b, Index h) {
      isa_.table.f32.attention(attention_, b, h);
      over_memory(b * heads_ + h, attention_.eta[h]);
    });
    const Index width = heads_ * values_;
    const float *real = rounded(5, real_, width), *imag = rounded(6, imag_, width);
    const float *a = weight_, *b = a + width, *c = b + width;
    for (Index row = 0; row < batch_; ++row)
      for (Index u = 0; u < width; ++u) {
        const Index at = row * width + u;
        features_[at] = a[u] * attention_.value[at] + b[u] * real[at] + c[u] * imag[at];
      }
  }

 private:
  float *take(Index channels) {
    float *const taken = free_;
    free_ += batch_ * channels;
    return taken;
  }

  const float *rounded(Index part, const float *x, Index channels) {
    if (quantizers_.empty()) return x;
    const auto [scale, zero, levels, group_size] = quantizers_[part];
    float *const out = take(channels);
    const Rounding r = {batch_,
                        channels,
                        bits_,
                        group_size,
                        x,
                        reinterpret_cast<const std::uint16_t *>(scale),
                        reinterpret_cast<const std::int8_t *>(zero),
                        reinterpret_cast<const float *>(levels),
                        out};
    isa_.product.round(r, 0, batch_, scratch);
    return out;
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
    const bool begun = first_g_[2 * chain] != 0 || first_g_[2 * chain + 1] != 0;
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
  Index bits_, batch_, heads_, groups_, keys_, values_;
  const std::vector<Quantizer> &quantizers_;
  const float *rate_, *height_, *weight_, *first_g_;
  float *features_, *free_, *real_, *imag_;
  Attention<float> attention_;
};

// Returns false, and computes nothing, if an eta is not positive; NaN goes through.
bool recall_step(const std::string &isa, Index threads, Index bits, AttentionShape shape,
                 const std::vector<Address> &in, const std::vector<Quantizer> &quantizers,
                 const std::vector<Address> &out) {
  const auto *eta = reinterpret_cast<const float *>(in[7]);
  if (std::any_of(eta, eta + std::get<1>(shape), [](float x) { return x <= 0; })) return false;
  RecallStep(isa, bits, shape, in, quantizers, out).run(threads);
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

void product(const std::string &isa, Index allowed, Index bits,
             std::tuple<Index, Index, Index, Index> shape, const std::vector<Address> &tensors) {
  const auto [rows, inputs, outputs, group_size] = shape;
  const Product p = {rows,
                     outputs,
                     inputs,
                     bits,
                     ceil_divide(inputs, group_size),
                     group_size,
                     reinterpret_cast<const float *>(tensors[0]),
                     reinterpret_cast<const std::uint8_t *>(tensors[1]),
                     reinterpret_cast<const std::uint16_t *>(tensors[2]),
                     reinterpret_cast<float *>(tensors[3])};
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

void round_channels(const std::string &isa, Index threads, Index bits, Shape shape,
                    const std::vector<Address> &tensors) {
  const auto [rows, channels, group_size] = shape;
  const Rounding r = {rows,
                      channels,
                      bits,
                      group_size,
                      reinterpret_cast<const float *>(tensors[0]),
                      reinterpret_cast<const std::uint16_t *>(tensors[1]),
                      reinterpret_cast<const std::int8_t *>(tensors[2]),
                      reinterpret_cast<const float *>(tensors[3]),
                      reinterpret_cast<float *>(tensors[4])};
  threads = worthwhile_threads(rows * channels, threads);
  const Index share = ceil_divide(std::max<Index>(rows, 1), threads);
  const auto kernel = find_isa(isa).product.round;
  parallel_for(ceil_divide(rows, share), threads, [&](Index i) {
    kernel(r, i * share, std::min(share, rows - i * share), scratch);
  });
}

void round_channels_backward(const std::string &isa, Index threads, Index bits, Shape shape,
                             const std::vector<Address> &tensors) {
  const auto [rows, channels, group_size] = shape;
  const RoundingAdjoint a = {{rows, channels, bits, group_size,
                              reinterpret_cast<const float *>(tensors[1]),
                              reinterpret_cast<const std::uint16_t *>(tensors[2]),
                              reinterpret_cast<const std::int8_t *>(tensors[3]),
                              reinterpret_cast<const float *>(tensors[4]), nullptr},
                             reinterpret_cast<const float *>(tensors[0]),
                             reinterpret_cast<float *>(tensors[5]),
                             reinterpret_cast<float *>(tensors[6]),
                             reinterpret_cast<float *>(tensors[7])};
  threads = worthwhile_threads(rows * channels, threads);
  const auto kernel = find_isa(isa).product.round_adjoint;
  parallel_for(ceil_divide(rows, kRowsPerShare), threads,
               [&](Index share) { kernel(a, share, scratch); });
}

void round_rows(const std::string &isa, Index threads, Index rows, Index count, Address x,
                Address out) {
  threads = worthwhile_threads(rows * count, threads);
  const auto kernel = find_isa(isa).product.round_row;
  constexpr Index kShare = 64;
  parallel_for(ceil_divide(rows, kShare), threads, [&](Index i) {
    for (Index row = i * kShare; row < std::min(rows, (i + 1) * kShare); ++row)
      kernel(reinterpret_cast<const float *>(x) + row * count, count,
             reinterpret_cast<float *>(out) + row * count);
  });
}

WeightRounding weight_rounding(Index bits, Shape shape, const std::vector<Address> &tensors) {
  const auto [rows, columns, group_size] = shape;
  return {rows,
          columns,
          bits,
          group_size,
          reinterpret_cast<const float *>(tensors[0]),
          reinterpret_cast<const std::uint16_t *>(tensors[1])};
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

void round_weight(const std::string &isa, Index threads, Index bits, Shape shape,
                  const std::vector<Address> &tensors) {
  const WeightRounding w = weight_rounding(bits, shape, tensors);
  auto *codes = reinterpret_cast<std::int8_t *>(tensors[2]);
  auto *values = reinterpret_cast<float *>(tensors[3]);
  const auto kernel = find_isa(isa).product.round_weight;
  each_row(w, threads, [&](Index row) {
    kernel(w, row, codes + row * w.columns, values + row * w.columns);
  });
}

void round_weight_backward(const std::string &isa, Index threads, Index bits, Shape shape,
                           const std::vector<Address> &tensors) {
  const WeightRounding w = weight_rounding(bits, shape, tensors);
  const Index groups = ceil_divide(w.columns, w.group_size);
  const auto *grad = reinterpret_cast<const float *>(tensors[2]);
  auto *dweight = reinterpret_cast<float *>(tensors[3]);
  auto *dscale = reinterpret_cast<float *>(tensors[4]);
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
  m.attr("attention_chunk") = bkcore::kAttentionChunk;
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
