// Calls random operators with random sizes, strides and numbers that arguments.h accepts. Nothing
// may be read or written beyond a tensor. Every tensor is in memory of exactly its size, and if a
// kernel goes beyond it, AddressSanitizer or a guard page ends the program.
//     fuzz [rounds [seed]]
//
// Round r of seed s is round 0 of seed s + r, so that a round that failed can be repeated alone.

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "engine/recall.h"
#include "memory.h"
#include "run_attention.h"
#include "run_codes.h"
#include "run_sweep.h"

namespace bkcore {
namespace {

unsigned long current_seed;

void report(int) {
  std::fprintf(stderr, "\nTo repeat this round alone: fuzz 1 %lu\n", current_seed);
}

class Fuzzer {
 public:
  explicit Fuzzer(unsigned long seed) : engine_(seed) {}

  void run() {
    const std::function<void()> operators[] = {
        [&] { sweep<float>(); },     [&] { sweep<double>(); },     [&] { sweep_codes(); },
        [&] { sweep_rounded(); },    [&] { sweep_step<float>(); }, [&] { sweep_step<double>(); },
        [&] { attention<float>(); }, [&] { attention<double>(); }, [&] { recall(); },
        [&] { product(); },          [&] { round_channels(); },    [&] { round_rows(); },
        [&] { round_weight(); },
    };
    operators[integer(0, std::size(operators) - 1)]();
  }

 private:
  Index integer(Index low, Index high) {
    return std::uniform_int_distribution<Index>(low, high)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <class Options>
  const auto &one_of(const Options &options) {
    return options[integer(0, static_cast<Index>(std::size(options)) - 1)];
  }

  // Often near the width of a vector or of a block; sometimes 0.
  Index size(Index most) {
    static constexpr Index kEdges[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130};
    const Index edge = one_of(kEdges);
    return chance(0.6) && edge <= most ? edge : integer(0, most);
  }
  Index at_least_one(Index most) { return std::max<Index>(1, size(most)); }

  const Isa &isa() { return isas()[integer(0, static_cast<Index>(isas().size()) - 1)]; }
  Index threads() {
    static constexpr Index kThreads[] = {1, 1, 2, 3, 5};
    return one_of(kThreads);
  }
  Index bits() { return chance(0.5) ? 4 : 8; }
  Place place() { return static_cast<Place>(integer(0, 4)); }
  Index group_size(Index channels) { return chance(0.2) ? 1000000 : at_least_one(channels + 2); }

  template <class T>
  T number() {
    using Limits = std::numeric_limits<T>;
    const T special[] = {0,
                         -T{0},
                         Limits::quiet_NaN(),
                         Limits::infinity(),
                         -Limits::infinity(),
                         Limits::denorm_min(),
                         -Limits::min(),
                         Limits::max(),
                         Limits::lowest(),
                         1};
    if (specials_ && chance(0.05)) return one_of(special);
    return static_cast<T>(std::normal_distribution<double>()(engine_));
  }
  template <class T>
  T any() {
    if constexpr (std::is_floating_point_v<T>)
      return number<T>();
    else
      return static_cast<T>(integer(std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
  }

  // The address of a contiguous tensor of random numbers; outputs overwrite them.
  template <class T>
  T *buffer(Index count) {
    const auto x = Buffer<T>::of(count, [&] { return any<T>(); }, place());
    return keep(x);
  }
  template <class T>
  T *maybe(Index count) {
    return chance(0.5) ? buffer<T>(count) : nullptr;
  }
  // Positive, normal numbers, most of the time.
  float *scales(Index count) {
    float *all = buffer<float>(count);
    if (chance(0.9))
      for (Index i = 0; i < count; ++i)
        all[i] = 0.01F + std::min(1.0F, std::abs(i % 2 ? all[i] : 0.1F));
    return all;
  }
  // Integers that are codes of this many bits.
  float *zeros(Index count, Index bits) {
    const Index half = Index{1} << (bits - 1);
    return keep(Buffer<float>::of(count, [&] { return integer(-half, half - 1); }, place()));
  }
  template <class T>
  T *keep(const Buffer<T> &x) {
    kept_.push_back(x.memory());
    return x.data();
  }

  Layout layout(bool input) {
    Layout how;
    std::shuffle(how.order.begin(), how.order.end(), engine_);
    if (chance(0.5)) how.order = {0, 1, 2, 3};
    how.gap = chance(0.2) ? integer(1, 20) : 0;
    for (bool &expanded : how.expanded) expanded = input && chance(0.1);
    return how;
  }
  template <class T>
  Strided<T> output(const Sizes &sizes, bool shares_sites = false) {
    Layout how = layout(false);
    how.expanded[1] = shares_sites;
    const Tensor<T> x(sizes, how, place());
    keep(x.numbers());
    return x.writable();
  }
  template <class T>
  Strided<const T> input(const Sizes &sizes, Layout how) {
    const Tensor<T> x(sizes, how, place());
    for (T &number : x.numbers()) number = any<T>();
    keep(x.numbers());
    return x.readable();
  }
  template <class T>
  Strided<const T> input(const Sizes &sizes) {
    return input<T>(sizes, layout(true));
  }
  // The same for every batch element, and for every site unless `per_site`.
  template <class T>
  Strided<const T> parameter(Index sites, Index parts, Index lanes, bool contiguous) {
    Layout how = contiguous ? Layout{} : layout(true);
    how.expanded[0] = true;
    how.expanded[1] = chance(0.5);
    return input<T>({1, sites, parts, lanes}, how);
  }

  struct Shape {
    Index batch, sites, lanes;
  };
  Shape shape() {
    if (chance(0.05)) return {integer(1, 2), integer(1024, 1300), integer(1, 4)};  // in blocks
    if (chance(0.05)) return {integer(1, 2), integer(1, 12), integer(1000, 1100)};
    return {size(4), at_least_one(chance(0.2) ? 300 : 70), size(130)};
  }
  template <class T>
  Sweep<T> chains(bool contiguous = false) {
    const auto [batch, sites, lanes] = shape();
    Sweep<T> s{batch, sites, lanes};
    s.energy = parameter<T>(1, 1, lanes, contiguous);
    s.eta = parameter<T>(sites, 1, lanes, contiguous);
    s.hopping = parameter<T>(std::max<Index>(sites - 1, 1), 1, lanes, contiguous);
    return s;
  }

  template <class T>
  void sweep() {
    const bool two_sided = chance(0.4), source = !two_sided && chance(0.5);
    Sweep<T> s = chains<T>();
    const Index parts = source ? 4 : 2;
    const bool plain = chance(0.5);
    const auto layout_of_inputs = [&] { return plain ? Layout{} : layout(true); };
    s.v = input<T>({s.batch, s.sites, 1, s.lanes}, layout_of_inputs());
    if (source) s.source = input<T>({s.batch, s.sites, 1, s.lanes}, layout_of_inputs());
    s.parts = output<T>({s.batch, s.sites, parts, s.lanes});
    const Index cache_bytes = chance(0.5) ? 0 : 1 << 20;
    run_sweep(isa(), threads(), two_sided, chance(0.5), cache_bytes, s);
    SweepBackward<T> a{s};
    if (!two_sided && chance(0.5)) a.forward.v = {};
    a.grad = input<T>({s.batch, s.sites, parts, s.lanes}, layout_of_inputs());
    a.dv = output<T>({s.batch, s.sites, 1, s.lanes});
    if (source) a.dsource = output<T>({s.batch, s.sites, 1, s.lanes});
    a.denergy = output<T>({s.batch, 1, 1, s.lanes});
    a.deta = output<T>({s.batch, s.eta.site ? s.sites : 1, 1, s.lanes}, !s.eta.site);
    a.dhopping =
        output<T>({s.batch, s.hopping.site ? s.sites - 1 : 1, 1, s.lanes}, !s.hopping.site);
    run_sweep_backward(isa(), threads(), two_sided, cache_bytes, a);
  }

  void sweep_codes() {
    const bool two_sided = chance(0.4);
    SweepCodes s{chains<float>(true), bits()};
    const Index batch = s.sweep.batch, sites = s.sweep.sites, lanes = s.sweep.lanes;
    const Index row = (lanes * s.bits + 7) / 8, levels = Index{1} << s.bits;
    s.v = buffer<std::uint8_t>(batch * sites * row);
    const bool source = !two_sided && chance(0.5);
    if (source) s.source = buffer<std::uint8_t>(batch * sites * row);
    const Index inputs = source ? 2 : 1;
    s.out = buffer<std::uint8_t>(batch * sites * 2 * inputs * row);
    s.in_scale = parameter<float>(sites, inputs, lanes, false);
    s.out_scale = parameter<float>(sites, 2 * inputs, lanes, false);
    const auto zero = [&](Index parts) {
      const bool shared = chance(0.5);
      const Index rows = shared ? 1 : sites;
      const Index by_site = rows > 1 ? parts * lanes : 0;
      return Strided<const float>{zeros(rows * parts * lanes, s.bits), 0, by_site, lanes, 1};
    };
    s.in_zero = zero(inputs);
    s.out_zero = zero(2 * inputs);
    s.in_levels = maybe<float>(inputs * levels);
    s.out_bounds = maybe<float>(2 * inputs * levels);
    run_sweep_codes(isa(), threads(), two_sided, s);
  }

  void sweep_rounded() {
    SweepRounded s{chains<float>(), bits()};
    const Index batch = s.sweep.batch, sites = s.sweep.sites, lanes = s.sweep.lanes;
    s.sweep.v = input<float>({batch, sites, 1, lanes});
    s.sweep.parts = output<float>({batch, sites, 2, lanes});
    s.group_size = group_size(sites);
    s.groups = ceil_divide(sites, s.group_size);
    s.scale = scales(3 * s.groups);
    s.zero = zeros(3 * s.groups, s.bits);
    if (chance(0.5)) {
      s.levels = buffer<float>(Index{3} << s.bits);
      s.bounds = buffer<float>(Index{3} << s.bits);
    }
    run_sweep_rounded(isa(), threads(), chance(0.5), s);
  }

  template <class T>
  void sweep_step() {
    Sweep<T> s{size(4), 1, size(130)};
    const auto rows = [&] {
      return Strided<const T>{buffer<T>(s.batch * s.lanes), s.lanes, 0, 0, 1};
    };
    const auto row = [&] { return Strided<const T>{buffer<T>(s.lanes), 0, 0, 0, 1}; };
    const bool source = chance(0.5);
    s.v = rows();
    if (source) s.source = rows();
    s.energy = row(), s.eta = row(), s.hopping = row();
    run_sweep_step(isa(), s, buffer<T>(s.batch * (source ? 4 : 2) * s.lanes));
  }

  template <class T>
  void attention() {
    Attention<T> a{size(3), size(70), size(5), size(20), size(70), at_least_one(40)};
    const Index rows = a.batch * a.sites * a.heads, chains = a.batch * a.heads;
    const Index state = 2 * a.keys * a.values;
    a.v = buffer<T>(rows), a.hopping = buffer<T>(rows);
    a.energy = buffer<T>(a.heads), a.eta = buffer<T>(a.heads);
    a.query = buffer<T>(rows * a.keys), a.key = buffer<T>(rows * a.keys);
    a.value = buffer<T>(rows * a.values);
    a.first_g = maybe<T>(chains * 2), a.first_psi = maybe<T>(chains * state);
    a.g = buffer<T>(rows * 2), a.out = buffer<T>(rows * 2 * a.values);
    a.psi = buffer<T>(chains * state);
    const bool keep = chance(0.8);
    if (keep) a.checkpoints = buffer<T>(chains * chunks_of(a) * state);
    run_attention(isa(), threads(), a);
    if (!keep) return;
    AttentionBackward<T> d{};
    d.dg = buffer<T>(rows * 2), d.dout = buffer<T>(rows * 2 * a.values);
    d.dpsi = buffer<T>(chains * state);
    d.dv = buffer<T>(rows), d.dhopping = buffer<T>(rows);
    d.denergy = buffer<T>(chains), d.deta = buffer<T>(chains);
    d.dquery = buffer<T>(rows * a.keys), d.dkey = buffer<T>(rows * a.keys);
    d.dvalue = buffer<T>(rows * a.values);
    d.dfirst_g = buffer<T>(chains * 2), d.dfirst_psi = buffer<T>(chains * state);
    run_attention_backward(isa(), threads(), a, d);
  }

  RoundChannels rounding(Index rows, Index channels, Index bits) {
    const Index size = group_size(channels), groups = ceil_divide(channels, size);
    return {rows,
            channels,
            bits,
            size,
            nullptr,
            buffer<std::uint16_t>(groups),
            buffer<std::int8_t>(groups),
            maybe<float>(Index{1} << bits),
            nullptr};
  }

  void recall() {
    const Index groups = integer(1, 4);
    engine::Recall s{size(3), integer(1, 5), groups * size(4), groups, size(33), size(70)};
    const Index chains = s.batch * s.heads, width = s.heads * s.values, shared = groups * s.keys;
    const Index rows = s.batch * s.sites;
    s.gate = buffer<float>(rows * s.heads), s.barrier = buffer<float>(rows * s.heads);
    s.query = buffer<float>(rows * shared), s.key = buffer<float>(rows * shared);
    s.value = buffer<float>(rows * width);
    s.rate = buffer<float>(s.heads), s.height = buffer<float>(s.heads);
    s.eta = scales(s.heads), s.weight = buffer<float>(3 * width);
    s.g = buffer<float>(chains * 2), s.psi = buffer<float>(chains * 2 * s.keys * s.values);
    s.features = buffer<float>(rows * width), s.next_g = buffer<float>(chains * 2);
    s.next_psi = buffer<float>(chains * 2 * s.keys * s.values);
    const Index width_of_codes = bits();
    if (chance(0.7))
      for (const Index channels : {s.heads, s.heads, shared, shared, width, width, width})
        s.rounding.push_back(rounding(rows, channels, width_of_codes));
    engine::Workers workers(threads());
    engine::RecallRun(isa(), workers, s).run();
  }

  void product() {
    Product p{chance(0.1) ? 400 : size(20), size(70), size(140), bits()};
    p.group_size = group_size(p.inputs);
    p.groups = ceil_divide(p.inputs, p.group_size);
    p.x = buffer<float>(p.rows * p.inputs);
    p.weight = buffer<std::uint8_t>(p.outputs * ceil_divide(p.inputs * p.bits, 8));
    p.scales = buffer<std::uint16_t>(p.outputs * p.groups);
    p.out = buffer<float>(p.rows * p.outputs);
    run_product(isa(), threads(), p);
  }

  void round_channels() {
    const Index rows = size(140), channels = size(140);
    RoundChannels r = rounding(rows, channels, bits());
    r.x = buffer<float>(rows * channels), r.out = buffer<float>(rows * channels);
    run_round_channels(isa(), threads(), r);
    const Index shares = ceil_divide(rows, kRowsPerShare);
    RoundChannelsBackward a{r};
    a.grad = buffer<float>(rows * channels), a.dx = buffer<float>(rows * channels);
    a.dscale = buffer<float>(shares * channels);
    if (r.levels) a.dlevels = buffer<float>(shares << r.bits);
    run_round_channels_backward(isa(), threads(), a);
  }

  void round_rows() {
    const Index rows = size(140), columns = size(140);
    run_round_rows(isa(), threads(), rows, columns, buffer<float>(rows * columns),
                   buffer<float>(rows * columns));
  }

  void round_weight() {
    RoundWeight w{size(140), size(140), bits()};
    w.group_size = group_size(w.columns);
    w.groups = ceil_divide(w.columns, w.group_size);
    const Index count = w.rows * w.columns;
    w.weight = buffer<float>(count);
    w.scale = buffer<std::uint16_t>(w.rows * w.groups);
    run_round_weight(isa(), threads(), w, buffer<std::int8_t>(count), buffer<float>(count));
    run_round_weight_backward(isa(), threads(), w, buffer<float>(count), buffer<float>(count),
                              buffer<float>(w.rows * w.groups));
  }

  std::mt19937_64 engine_;
  bool specials_ = chance(0.7);
  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace
}  // namespace bkcore

// So that every failure ends the program with SIGABRT.
extern "C" const char *__asan_default_options() { return "abort_on_error=1"; }
extern "C" const char *__ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

int main(int count, char **arguments) {
  const unsigned long rounds = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 2000;
  const unsigned long seed = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 1;
  std::signal(SIGABRT, bkcore::report);
  for (unsigned long round = 0; round < rounds; ++round) {
    bkcore::current_seed = seed + round;
    bkcore::Fuzzer(seed + round).run();
  }
  std::printf("fuzz: %lu rounds from seed %lu found nothing\n", rounds, seed);
}
