// The Python module bkcore.kernels.backends.cpu._native. It reads the arguments of a call by name,
// checks that memory is as large as they say, and runs the kernels without Python's lock.

#include "arguments.h"
#include "run_attention.h"
#include "run_codes.h"
#include "run_functions.h"
#include "run_sweep.h"

namespace nb = nanobind;

namespace bkcore {
namespace {

using Unlocked = nb::gil_scoped_release;

// Add one whenever the arguments or results of a function here change, also in
// src/bkcore/kernels/backends/cpu/native.py, which refuses an extension with another number.
constexpr int kInterface = 2;

// Calls a function with a number of the type that the argument "double" selects.
template <class Call>
void with_float_type(Arguments &in, const Call &call) {
  in.flag("double") ? call(double()) : call(float());
}

// How a function of Arguments reads a tensor of any strides, or one with contiguous lanes.
template <class T>
using Read = Strided<T> (Arguments::*)(const char *name, const Sizes &wanted);

template <class T>
Sweep<T> read_chains(Arguments &in, Read<const T> read = &Arguments::strided<const T>) {
  Sweep<T> s{};
  s.batch = in.number("batch"), s.sites = in.number("sites"), s.lanes = in.number("lanes");
  if (s.sites < 1) refuse("there are " + std::to_string(s.sites) + " sites");
  s.energy = (in.*read)("energy", {s.batch, 1, 1, s.lanes});
  s.eta = (in.*read)("eta", {s.batch, s.sites, 1, s.lanes});
  // Even for a chain of one site, kernels read the first bond, and multiply it by zero.
  s.hopping = (in.*read)("hopping", {s.batch, std::max<Index>(s.sites - 1, 1), 1, s.lanes});
  return s;
}

// Only the causal form propagates a source.
bool reads_source(const Arguments &in, bool two_sided) {
  const bool has_source = in.has("source");
  if (two_sided && has_source) refuse("a two-sided sweep has no source");
  return has_source;
}

template <class T>
Sweep<T> read_sweep(Arguments &in, bool two_sided, bool needs_v) {
  Sweep<T> s = read_chains<T>(in);
  const Sizes site = {s.batch, s.sites, 1, s.lanes};
  s.v = needs_v ? in.strided<const T>("v", site) : in.strided_or_null<const T>("v", site);
  const bool has_source = reads_source(in, two_sided);
  s.source = in.strided_or_null<const T>("source", site);
  s.parts = in.strided<T>("parts", {s.batch, s.sites, has_source ? 4 : 2, s.lanes});
  return s;
}

void sweep(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), cache_bytes = in.number("cache_bytes");
  const bool two_sided = in.flag("two_sided"), sequential = in.flag("sequential");
  with_float_type(in, [&](auto zero) {
    const auto s = read_sweep<decltype(zero)>(in, two_sided, true);
    in.finish();
    const Unlocked unlocked;
    run_sweep(isa, threads, two_sided, sequential, cache_bytes, s);
  });
}

void sweep_backward(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), cache_bytes = in.number("cache_bytes");
  const bool two_sided = in.flag("two_sided");
  with_float_type(in, [&](auto zero) {
    using T = decltype(zero);
    const Sweep<T> s = read_sweep<T>(in, two_sided, two_sided);
    const bool has_source = in.has("source");
    const Sizes site = {s.batch, s.sites, 1, s.lanes};
    SweepBackward<T> a{s};
    a.grad = in.strided<const T>("grad", {s.batch, s.sites, has_source ? 4 : 2, s.lanes});
    a.dv = in.strided<T>("dv", site);
    in.together("source", "dsource");
    a.dsource = in.strided_or_null<T>("dsource", site);
    a.denergy = in.strided<T>("denergy", {s.batch, 1, 1, s.lanes});
    a.deta = in.strided<T>("deta", {s.batch, s.eta.site ? s.sites : 1, 1, s.lanes});
    a.dhopping = in.strided<T>("dhopping", {s.batch, s.hopping.site ? s.sites - 1 : 1, 1, s.lanes});
    in.finish();
    const Unlocked unlocked;
    run_sweep_backward(isa, threads, two_sided, cache_bytes, a);
  });
}

void sweep_codes(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), bits = in.bits();
  const bool two_sided = in.flag("two_sided");
  SweepCodes s{read_chains<float>(in, &Arguments::rows<const float>), bits};
  const auto [batch, sites, lanes] = std::tuple(s.sweep.batch, s.sweep.sites, s.sweep.lanes);
  const Index inputs = reads_source(in, two_sided) ? 2 : 1, outputs = 2 * inputs;
  const Index levels = Index{1} << bits, row = ceil_divide(lanes, 8 / bits);
  const Sizes entering = {batch, sites, inputs, lanes}, leaving = {batch, sites, outputs, lanes};
  s.v = in.numbers<const std::uint8_t>("v", {batch, sites, row});
  s.source = in.numbers_or_null<const std::uint8_t>("source", {batch, sites, row});
  s.out = in.numbers<std::uint8_t>("codes", {batch, sites, outputs, row});
  s.in_scale = in.strided<const float>("in_scale", entering);
  s.in_zero = in.strided<const float>("in_zero", entering);
  s.out_scale = in.strided<const float>("out_scale", leaving);
  s.out_zero = in.strided<const float>("out_zero", leaving);
  s.in_levels = in.numbers_or_null<const float>("in_levels", {inputs, levels});
  s.out_bounds = in.numbers_or_null<const float>("out_bounds", {outputs, levels});
  in.finish();
  const Unlocked unlocked;
  run_sweep_codes(isa, threads, two_sided, s);
}

void sweep_rounded(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), bits = in.bits();
  const bool two_sided = in.flag("two_sided");
  SweepRounded s{read_chains<float>(in), bits};
  const Index batch = s.sweep.batch, sites = s.sweep.sites, lanes = s.sweep.lanes;
  s.sweep.v = in.strided<const float>("v", {batch, sites, 1, lanes});
  s.sweep.parts = in.strided<float>("parts", {batch, sites, 2, lanes});
  s.group_size = in.number("group_size");
  s.groups = groups_of(sites, s.group_size);
  s.scale = in.numbers<const float>("scale", {3, s.groups});
  s.zero = in.numbers<const float>("zero", {3, s.groups});
  in.together("levels", "bounds");
  s.levels = in.numbers_or_null<const float>("levels", {3, Index{1} << bits});
  s.bounds = in.numbers_or_null<const float>("bounds", {3, Index{1} << bits});
  in.finish();
  const Unlocked unlocked;
  run_sweep_rounded(isa, threads, two_sided, s);
}

// Keeps Python's lock: the step takes less time than releasing it.
void sweep_step(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  in.threads();  // a site is too little to share
  with_float_type(in, [&](auto zero) {
    using T = decltype(zero);
    Sweep<T> s{};
    s.batch = in.number("batch"), s.sites = 1, s.lanes = in.number("lanes");
    const Index parts = in.has("source") ? 4 : 2, lanes = s.lanes;
    const auto row = [](const T *p, Index by_batch) {
      return Strided<const T>{p, by_batch, 0, 0, 1};
    };
    s.v = row(in.numbers<const T>("v", {s.batch, lanes}), lanes);
    s.source = row(in.numbers_or_null<const T>("source", {s.batch, lanes}), lanes);
    s.energy = row(in.numbers<const T>("energy", {lanes}), 0);
    s.eta = row(in.numbers<const T>("eta", {lanes}), 0);
    s.hopping = row(in.numbers<const T>("hopping", {lanes}), 0);
    T *const state = in.numbers<T>("state", {s.batch, parts, lanes});
    in.finish();
    run_sweep_step(isa, s, state);
  });
}

template <class T>
Attention<T> read_attention(Arguments &in) {
  Attention<T> a{};
  a.batch = in.number("batch"), a.sites = in.number("sites"), a.heads = in.number("heads");
  a.keys = in.number("keys"), a.values = in.number("values"), a.chunk = in.number("chunk");
  if (a.chunk < 1) refuse("there are " + std::to_string(a.chunk) + " sites between two states");
  count({a.batch, a.sites, a.heads, a.keys, a.values});  // which must not overflow
  a.v = in.numbers<const T>("v", {a.batch, a.sites, a.heads});
  a.hopping = in.numbers<const T>("hopping", {a.batch, a.sites, a.heads});
  a.energy = in.numbers<const T>("energy", {a.heads});
  a.eta = in.numbers<const T>("eta", {a.heads});
  a.query = in.numbers<const T>("query", {a.batch, a.sites, a.heads, a.keys});
  a.key = in.numbers<const T>("key", {a.batch, a.sites, a.heads, a.keys});
  a.value = in.numbers<const T>("value", {a.batch, a.sites, a.heads, a.values});
  a.first_g = in.numbers_or_null<const T>("first_g", {a.batch, a.heads, 2});
  a.g = in.numbers<T>("g", {a.batch, a.sites, a.heads, 2});
  return a;
}

void attention(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  with_float_type(in, [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = read_attention<T>(in);
    a.first_psi = in.numbers_or_null<const T>("first_psi", {a.batch, a.heads, 2, a.keys, a.values});
    a.out = in.numbers<T>("out", {a.batch, a.sites, a.heads, 2, a.values});
    a.psi = in.numbers<T>("psi", {a.batch, a.heads, 2, a.keys, a.values});
    const Index chunks = in.flag("keep") ? chunks_of(a) : 0;
    T *const kept = in.numbers<T>("checkpoints", {a.batch, a.heads, chunks, 2, a.keys, a.values});
    a.checkpoints = chunks ? kept : nullptr;
    in.finish();
    const Unlocked unlocked;
    run_attention(isa, threads, a);
  });
}

void attention_backward(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  with_float_type(in, [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = read_attention<T>(in);
    a.checkpoints =
        in.numbers<T>("checkpoints", {a.batch, a.heads, chunks_of(a), 2, a.keys, a.values});
    AttentionBackward<T> d{};
    d.dg = in.numbers<const T>("dg", {a.batch, a.sites, a.heads, 2});
    d.dout = in.numbers<const T>("dout", {a.batch, a.sites, a.heads, 2, a.values});
    d.dpsi = in.numbers<const T>("dpsi", {a.batch, a.heads, 2, a.keys, a.values});
    d.dv = in.numbers<T>("dv", {a.batch, a.sites, a.heads});
    d.dhopping = in.numbers<T>("dhopping", {a.batch, a.sites, a.heads});
    d.denergy = in.numbers<T>("denergy", {a.batch, a.heads});
    d.deta = in.numbers<T>("deta", {a.batch, a.heads});
    d.dquery = in.numbers<T>("dquery", {a.batch, a.sites, a.heads, a.keys});
    d.dkey = in.numbers<T>("dkey", {a.batch, a.sites, a.heads, a.keys});
    d.dvalue = in.numbers<T>("dvalue", {a.batch, a.sites, a.heads, a.values});
    d.dfirst_g = in.numbers<T>("dfirst_g", {a.batch, a.heads, 2});
    d.dfirst_psi = in.numbers<T>("dfirst_psi", {a.batch, a.heads, 2, a.keys, a.values});
    in.finish();
    const Unlocked unlocked;
    run_attention_backward(isa, threads, a, d);
  });
}

// Scale, zero point and levels for rows of channels; the caller sets the numbers to round.
RoundChannels read_rounding(Arguments &in, Index rows, Index channels, Index bits) {
  RoundChannels r{};
  r.rows = rows, r.channels = channels, r.bits = bits, r.group_size = in.number("group_size");
  const Index groups = groups_of(channels, r.group_size);
  r.scale = in.numbers<const std::uint16_t>("scale", {groups});
  r.zero = in.numbers<const std::int8_t>("zero", {groups});
  r.levels = in.numbers_or_null<const float>("levels", {Index{1} << bits});
  return r;
}

void product(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  Product p{};
  p.rows = in.number("rows"), p.outputs = in.number("outputs"), p.inputs = in.number("inputs");
  p.bits = in.bits();
  p.group_size = in.number("group_size");
  p.groups = groups_of(p.inputs, p.group_size);
  const Index width = ceil_divide(p.inputs, 8 / p.bits);
  p.x = in.numbers<const float>("x", {p.rows, p.inputs});
  p.weight = in.numbers<const std::uint8_t>("weight", {p.outputs, width});
  p.scales = in.numbers<const std::uint16_t>("scales", {p.outputs, p.groups});
  p.out = in.numbers<float>("out", {p.rows, p.outputs});
  in.finish();
  const Unlocked unlocked;
  run_product(isa, threads, p);
}

void silu(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), count = in.number("count");
  const auto *x = in.numbers<const float>("x", {count});
  auto *out = in.numbers<float>("out", {count});
  in.finish();
  const Unlocked unlocked;
  run_silu(isa, threads, count, x, out);
}

void rms_norm(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const Index rows = in.number("rows"), channels = in.number("channels");
  const float eps = in.real("eps");
  const auto *x = in.numbers<const float>("x", {rows, channels});
  const auto *weight = in.numbers<const float>("weight", {channels});
  auto *out = in.numbers<float>("out", {rows, channels});
  in.finish();
  const Unlocked unlocked;
  run_rms_norm(isa, threads, rows, channels, x, weight, eps, out);
}

void unit_length(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const Index rows = in.number("rows"), channels = in.number("channels");
  const float eps = in.real("eps");
  const auto *x = in.numbers<const float>("x", {rows, channels});
  auto *out = in.numbers<float>("out", {rows, channels});
  in.finish();
  const Unlocked unlocked;
  run_unit_length(isa, threads, rows, channels, x, eps, out);
}

void softmax(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const Index rows = in.number("rows"), channels = in.number("channels");
  const auto *x = in.numbers<const float>("x", {rows, channels});
  auto *out = in.numbers<float>("out", {rows, channels});
  in.finish();
  const Unlocked unlocked;
  run_softmax(isa, threads, rows, channels, x, out);
}

void short_convolution(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const Index batch = in.number("batch"), sites = in.number("sites");
  const Index taps = in.number("taps"), channels = in.number("channels");
  if (taps < 1 || sites < 1) refuse("a convolution has no taps or no sites");
  const auto *x = in.numbers<const float>("x", {batch, sites + taps - 1, channels});
  const auto *weight = in.numbers<const float>("weight", {taps, channels});
  auto *out = in.numbers<float>("out", {batch, sites, channels});
  in.finish();
  const Unlocked unlocked;
  run_short_convolution(isa, threads, batch, sites, taps, channels, x, weight, out);
}

void dense_product(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), rows = in.number("rows"), kind = in.number("kind");
  if (kind < 0 || kind > 2) refuse("there is no kind of weight " + std::to_string(kind));
  Dense m{static_cast<Dense::Kind>(kind), in.number("outputs"), in.number("inputs"), nullptr};
  if (m.kind == Dense::Kind::f32)
    m.weight = in.numbers<const float>("weight", {m.outputs, m.inputs});
  else
    m.weight = in.numbers<const std::uint16_t>("weight", {m.outputs, m.inputs});
  const auto *x = in.numbers<const float>("x", {rows, m.inputs});
  auto *out = in.numbers<float>("out", {rows, m.outputs});
  in.finish();
  const Unlocked unlocked;
  run_dense_product(isa, threads, rows, m, x, out);
}

void round_channels(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), bits = in.bits();
  const Index rows = in.number("rows"), channels = in.number("channels");
  RoundChannels r = read_rounding(in, rows, channels, bits);
  r.x = in.numbers<const float>("x", {rows, channels});
  r.out = in.numbers<float>("out", {rows, channels});
  in.finish();
  const Unlocked unlocked;
  run_round_channels(isa, threads, r);
}

void round_channels_backward(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads(), bits = in.bits();
  const Index rows = in.number("rows"), channels = in.number("channels");
  const Index shares = ceil_divide(rows, kRowsPerShare);
  RoundChannelsBackward a{read_rounding(in, rows, channels, bits)};
  a.forward.x = in.numbers<const float>("x", {rows, channels});
  a.grad = in.numbers<const float>("grad", {rows, channels});
  a.dx = in.numbers<float>("dx", {rows, channels});
  a.dscale = in.numbers<float>("dscale", {shares, channels});
  in.together("levels", "dlevels");
  a.dlevels = in.numbers_or_null<float>("dlevels", {shares, Index{1} << bits});
  in.finish();
  const Unlocked unlocked;
  run_round_channels_backward(isa, threads, a);
}

void round_rows(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const Index rows = in.number("rows"), columns = in.number("channels");
  const auto *x = in.numbers<const float>("x", {rows, columns});
  auto *out = in.numbers<float>("out", {rows, columns});
  in.finish();
  const Unlocked unlocked;
  run_round_rows(isa, threads, rows, columns, x, out);
}

RoundWeight read_weight(Arguments &in) {
  RoundWeight w{};
  w.rows = in.number("rows"), w.columns = in.number("columns"), w.bits = in.bits();
  w.group_size = in.number("group_size");
  w.groups = groups_of(w.columns, w.group_size);
  w.weight = in.numbers<const float>("weight", {w.rows, w.columns});
  w.scale = in.numbers<const std::uint16_t>("scale", {w.rows, w.groups});
  return w;
}

void round_weight(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const RoundWeight w = read_weight(in);
  auto *codes = in.numbers<std::int8_t>("codes", {w.rows, w.columns});
  auto *values = in.numbers<float>("values", {w.rows, w.columns});
  in.finish();
  const Unlocked unlocked;
  run_round_weight(isa, threads, w, codes, values);
}

void round_weight_backward(const nb::dict &given) {
  Arguments in(given);
  const Isa &isa = in.isa();
  const Index threads = in.threads();
  const RoundWeight w = read_weight(in);
  const auto *grad = in.numbers<const float>("grad", {w.rows, w.columns});
  auto *dweight = in.numbers<float>("dweight", {w.rows, w.columns});
  auto *dscale = in.numbers<float>("dscale", {w.rows, w.groups});
  in.finish();
  const Unlocked unlocked;
  run_round_weight_backward(isa, threads, w, grad, dweight, dscale);
}

nb::list supported_isas() {
  nb::list names;
  for (const Isa &isa : isas()) names.append(isa.name.c_str());
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
  m.attr("__interface__") = bkcore::kInterface;
  m.attr("rows_per_share") = bkcore::kRowsPerShare;
  m.def("supported_isas", &bkcore::supported_isas);
  m.def("few_and_long", &bkcore::few_and_long);
  m.def("sweep", &bkcore::sweep);
  m.def("sweep_backward", &bkcore::sweep_backward);
  m.def("sweep_codes", &bkcore::sweep_codes);
  m.def("sweep_rounded", &bkcore::sweep_rounded);
  m.def("sweep_step", &bkcore::sweep_step);
  m.def("attention", &bkcore::attention);
  m.def("attention_backward", &bkcore::attention_backward);
  m.def("product", &bkcore::product);
  m.def("silu", &bkcore::silu);
  m.def("rms_norm", &bkcore::rms_norm);
  m.def("unit_length", &bkcore::unit_length);
  m.def("softmax", &bkcore::softmax);
  m.def("short_convolution", &bkcore::short_convolution);
  m.def("dense_product", &bkcore::dense_product);
  m.def("round_channels", &bkcore::round_channels);
  m.def("round_channels_backward", &bkcore::round_channels_backward);
  m.def("round_rows", &bkcore::round_rows);
  m.def("round_weight", &bkcore::round_weight);
  m.def("round_weight_backward", &bkcore::round_weight_backward);
}
