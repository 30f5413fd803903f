// The Python module bkcore_runtime._engine: a model read and run without PyTorch, and without
// Python's lock.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>

#include "engine.h"

namespace nb = nanobind;

namespace bkcore::engine {
namespace {

using Unlocked = nb::gil_scoped_release;
using Tokens = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig>;
using Address = std::uintptr_t;

Logits new_logits(Index rows, Index columns) {
  auto memory = std::make_unique<float[]>(static_cast<std::size_t>(rows * columns));
  float *const data = memory.release();
  const nb::capsule owner(data, [](void *p) noexcept { delete[] static_cast<float *>(p); });
  return Logits(data, {static_cast<std::size_t>(rows), static_cast<std::size_t>(columns)}, owner);
}

Logits read(Engine &engine, State &state, const Tokens &tokens) {
  const auto batch = static_cast<Index>(tokens.shape(0));
  const auto sites = static_cast<Index>(tokens.shape(1));
  if (batch != state.batch() || sites < 1)
    throw InputError("tokens must be (" + std::to_string(state.batch()) +
                     ", N), N >= 1, not (" + std::to_string(batch) + ", " + std::to_string(sites) +
                     ")");
  Logits logits = new_logits(batch, engine.sizes().vocabulary);
  const Unlocked unlocked;
  engine.read(state, sites, tokens.data(), logits.data());
  return logits;
}

Dtype dtype_named(const std::string &name) {
  const auto found = Safetensors::kinds().find(name);
  if (found == Safetensors::kinds().end()) throw InputError("no tensor here can be " + name);
  return found->second.first;
}

// An engine for tensors that Python keeps alive and unchanged: {name: (dtype, shape, address)}.
std::unique_ptr<Engine> engine_of_tensors(const nb::dict &given, const std::string &config,
                                          Index threads, const std::string &isa) {
  Tensors tensors;
  for (const auto [name, entry] : given) {
    const auto [dtype, shape, address] =
        nb::cast<std::tuple<std::string, std::vector<Index>, Address>>(entry);
    tensors.emplace(nb::cast<std::string>(name),
                    Tensor{dtype_named(dtype), shape, reinterpret_cast<const std::byte *>(address)});
  }
  return std::make_unique<Engine>(std::make_unique<Model>(tensors, config), threads, isa);
}

// Reads tokens at an address into logits (batch, vocabulary) at another. `layers` has six addresses
// each: taps, g and psi, before and after.
void read_at(Engine &engine, Index batch, Index sites, Address tokens,
             const std::vector<std::array<Address, 6>> &layers, Address logits) {
  if (batch < 1 || sites < 1 || static_cast<Index>(layers.size()) != engine.sizes().layers)
    throw InputError("there are no tokens, or not as many states as layers");
  Reading reading{batch, sites, reinterpret_cast<const std::int64_t *>(tokens), {}, false,
                  reinterpret_cast<float *>(logits)};
  const auto in = [](Address x) { return reinterpret_cast<const float *>(x); };
  const auto out = [](Address x) { return reinterpret_cast<float *>(x); };
  for (const auto &at : layers)
    reading.layers.push_back({in(at[0]), in(at[1]), in(at[2]), out(at[3]), out(at[4]), out(at[5])});
  const Unlocked unlocked;
  engine.read(reading);
}

// The fields of a state in the order of its layers, as arrays that share its memory.
nb::list fields(nb::handle_t<State> self, const Engine &engine) {
  State &state = nb::cast<State &>(self);
  const Sizes &s = engine.sizes();
  const auto shared = [&](std::vector<float> &x, std::vector<std::size_t> shape) {
    return nb::ndarray<nb::numpy, float>(x.data(), shape.size(), shape.data(), self);
  };
  const auto n = [](Index x) { return static_cast<std::size_t>(x); };
  nb::list out;
  for (State::Layer &layer : state.layers())
    out.append(nb::make_tuple(
        shared(layer.taps, {n(state.batch()), n(s.taps - 1), n(s.mixed())}),
        shared(layer.g, {n(state.batch()), n(s.heads), 2}),
        shared(layer.psi, {n(state.batch()), n(s.heads), 2, n(s.keys), n(s.values)})));
  return out;
}

}  // namespace
}  // namespace bkcore::engine

NB_MODULE(_engine, m) {
  using namespace bkcore::engine;
  m.doc() = "Private: use bkcore_runtime.Engine.";
  nb::exception<Error> error(m, "Error", PyExc_RuntimeError);
  nb::exception<CheckpointError>(m, "CheckpointError", error.ptr());
  nb::exception<InputError>(m, "InputError", error.ptr());
  nb::class_<State>(m, "State")
      .def(
          "__init__",
          [](State *self, const Engine &engine, Index batch) {
            if (batch < 1 || batch > (Index{1} << 20))
              throw InputError("a batch must have 1 to 2^20 sequences, not " +
                               std::to_string(batch));
            new (self) State(engine.sizes(), batch);
          })
      .def_prop_ro("batch", &State::batch)
      .def_prop_ro("seen", [](State &state) { return state.seen(); })
      .def("fields", &fields);
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<const std::string &, Index, const std::string &>())
      .def_static("of_tensors", &engine_of_tensors)
      .def_prop_ro("isa", &Engine::isa)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("vocabulary", [](const Engine &engine) { return engine.sizes().vocabulary; })
      .def("read", &read)
      .def("read_at", &read_at);
}
