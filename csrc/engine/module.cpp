// The Python module bkcore_runtime._engine: a model read and run without PyTorch, and without
// Python's lock.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "engine.h"
#include "sampling.h"
#include "snapshot.h"
#include "state_file.h"

namespace nb = nanobind;

namespace bkcore::engine {
namespace {

// Every change of the functions' arguments or results raises it, here and in
// bkcore_runtime/extension.py, so that an extension built for other Python code is recognized.
constexpr int kInterface = 1;

using Unlocked = nb::gil_scoped_release;
using Tokens = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Address = std::uintptr_t;

// The bytes of a path, in whatever encoding.
std::string text_of(const nb::bytes &path) { return std::string(path.c_str(), path.size()); }

std::size_t unsigned_of(Index x) { return static_cast<std::size_t>(x); }

// How many tokens each sequence of the state is to read.
Index sites_of(const State &state, const Tokens &tokens) {
  const auto batch = static_cast<Index>(tokens.shape(0));
  const auto sites = static_cast<Index>(tokens.shape(1));
  if (batch != state.batch() || sites < 1)
    throw InputError("tokens must be (" + std::to_string(state.batch()) + ", N), N >= 1, not (" +
                     std::to_string(batch) + ", " + std::to_string(sites) + ")");
  return sites;
}

// Writes logits (batch, vocabulary) after the last tokens, unless none are wanted.
void read_into(Engine &engine, State &state, const Tokens &tokens,
               const std::optional<Logits> &logits) {
  const Index sites = sites_of(state, tokens);
  if (logits && (static_cast<Index>(logits->shape(0)) != state.batch() ||
                 static_cast<Index>(logits->shape(1)) != engine.sizes().vocabulary))
    throw InputError("the logits are not (batch, vocabulary)");
  float *const out = logits ? logits->data() : nullptr;
  const Unlocked unlocked;
  engine.read(state, sites, tokens.data(), out);
}

// Reads, and chooses the next token of the only sequence.
std::int64_t next(Engine &engine, State &state, const Tokens &tokens, Sampler &sampler) {
  const Index sites = sites_of(state, tokens), vocabulary = engine.sizes().vocabulary;
  if (state.batch() != 1 || sampler.vocabulary() != vocabulary)
    throw InputError("one token is chosen for one sequence, by a sampler of the model's tokens");
  const Unlocked unlocked;
  std::vector<float> logits(unsigned_of(vocabulary));
  engine.read(state, sites, tokens.data(), logits.data());
  return sampler.sample(logits.data());
}

Dtype dtype_named(const std::string &name) {
  const Kind *const kind = kind_named(name);
  if (!kind) throw InputError("no tensor here can be " + shown(name));
  return kind->dtype;
}

// An engine for tensors that Python keeps alive and unchanged: {name: (dtype, shape, address)}.
std::unique_ptr<Engine> engine_of_tensors(const nb::dict &given, const std::string &config,
                                          Index threads, const std::string &isa) {
  Tensors tensors;
  for (const auto [name, entry] : given) {
    const auto [dtype, shape, address] =
        nb::cast<std::tuple<std::string, std::vector<Index>, Address>>(entry);
    tensors.emplace(
        nb::cast<std::string>(name),
        Tensor{dtype_named(dtype), shape, reinterpret_cast<const std::byte *>(address)});
  }
  return std::make_unique<Engine>(tensors, config, threads, isa);
}

// Reads tokens at an address into logits (batch, vocabulary) at another. `layers` has six addresses
// each: taps, g and psi, before and after.
void read_at(Engine &engine, Index batch, Index sites, Address tokens,
             const std::vector<std::array<Address, 6>> &layers, Address logits) {
  if (static_cast<Index>(layers.size()) != engine.sizes().layers)
    throw InputError("there are not as many states as layers");
  Reading reading{};
  reading.batch = batch, reading.sites = sites;
  reading.tokens = reinterpret_cast<const std::int64_t *>(tokens);
  reading.logits = reinterpret_cast<float *>(logits);
  const auto in = [](Address x) { return reinterpret_cast<const float *>(x); };
  const auto out = [](Address x) { return reinterpret_cast<float *>(x); };
  for (const auto &at : layers)
    reading.layers.push_back({in(at[0]), in(at[1]), in(at[2]), out(at[3]), out(at[4]), out(at[5])});
  const Unlocked unlocked;
  engine.read(reading);
}

// The fields of a state in the order of its layers, as arrays that share its memory.
nb::list fields(nb::handle_t<State> self) {
  State &state = nb::cast<State &>(self);
  const Sizes &s = state.sizes();
  const auto shared = [&](std::vector<float> &x, std::vector<std::size_t> shape) {
    return nb::ndarray<nb::numpy, float>(x.data(), shape.size(), shape.data(), self);
  };
  const auto n = unsigned_of;
  nb::list out;
  for (State::Layer &layer : state.layers())
    out.append(nb::make_tuple(
        shared(layer.taps, {n(state.batch()), n(s.taps - 1), n(s.mixed())}),
        shared(layer.g, {n(state.batch()), n(s.heads), 2}),
        shared(layer.psi, {n(state.batch()), n(s.heads), 2, n(s.keys), n(s.values)})));
  return out;
}

// How many tokens each sequence has read, as an array that shares the state's memory.
nb::ndarray<nb::numpy, std::int64_t> seen(nb::handle_t<State> self) {
  std::vector<std::int64_t> &counts = nb::cast<State &>(self).seen();
  return nb::ndarray<nb::numpy, std::int64_t>(counts.data(), {counts.size()}, self);
}

// Raises errors of the engine as the classes of bkcore_runtime.errors that have their names.
void translate(const std::exception_ptr &caught, void *errors) {
  const auto raise = [&](const char *name, const std::exception &error) {
    // A path may hold bytes that are no UTF-8.
    const char *const text = error.what();
    const auto length = static_cast<Py_ssize_t>(std::strlen(text));
    const auto shown = nb::steal(PyUnicode_DecodeUTF8(text, length, "backslashreplace"));
    const nb::object kind = nb::handle(static_cast<PyObject *>(errors)).attr(name);
    if (shown.is_valid()) PyErr_SetObject(kind.ptr(), shown.ptr());
  };
  try {
    std::rethrow_exception(caught);
  } catch (const UnsupportedError &error) {
    raise("UnsupportedError", error);
  } catch (const CheckpointError &error) {
    raise("CheckpointError", error);
  } catch (const InputError &error) {
    raise("InputError", error);
  } catch (const Error &error) {
    raise("EngineError", error);
  }
}

}  // namespace
}  // namespace bkcore::engine

NB_MODULE(_engine, m) {
  using namespace bkcore::engine;
  m.doc() = "Private: use bkcore_runtime.Engine.";
  m.attr("__interface__") = kInterface;
  // A program may end while it holds an engine.
  nb::set_leak_warnings(false);
  nb::register_exception_translator(translate,
                                    nb::module_::import_("bkcore_runtime.errors").release().ptr());
  m.def("isas", [] {
    nb::list names;
    for (const bkcore::Isa &isa : bkcore::isas()) names.append(isa.name.c_str());
    return names;
  });
  nb::class_<Snapshot>(m, "Snapshot")
      .def(nb::init<const nb::list &, nb::handle, nb::handle, const nb::set &>(),
           nb::arg("objects"), nb::arg("tensor"), nb::arg("exchange").none(), nb::arg("inner"))
      .def_prop_ro("sees_layouts", &Snapshot::sees_layouts)
      .def("hold", &Snapshot::hold);
  nb::class_<State>(m, "State")
      .def("__init__", [](State *self, const Engine &engine,
                          Index batch) { new (self) State(engine.sizes(), batch); })
      .def_prop_ro("batch", &State::batch)
      .def("seen", &seen)
      .def("fields", &fields)
      .def("copy", [](const State &state) { return State(state); })
      .def("save", [](const State &state, const nb::bytes &path) {
        const std::string text = text_of(path);
        const Unlocked unlocked;
        save_state(state, text);
      });
  nb::class_<Sampler>(m, "Sampler")
      .def("__init__",
           [](Sampler *self, Index vocabulary, std::uint64_t seed, double temperature, Index top_k,
              double top_p, double min_p, double repetition_penalty) {
             const Sampling sampling{repetition_penalty, temperature, top_k, top_p, min_p};
             new (self) Sampler(vocabulary, sampling, seed);
           })
      .def("see", [](Sampler &sampler, const Ids &ids) {
        sampler.see(ids.data(), static_cast<Index>(ids.shape(0)));
      });
  nb::class_<Engine>(m, "Engine")
      .def("__init__",
           [](Engine *self, const nb::bytes &folder, Index threads, const std::string &isa) {
             const std::string text = text_of(folder);
             const Unlocked unlocked;
             new (self) Engine(text, threads, isa);
           })
      .def_static("of_tensors", &engine_of_tensors)
      .def_prop_ro("isa", &Engine::isa)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("vocabulary", [](const Engine &engine) { return engine.sizes().vocabulary; })
      .def("is_current", &Engine::is_current)
      .def("check_fits",
           [](const Engine &engine, const State &state) { state.check_fits(engine.sizes()); })
      .def("read", &read_into, nb::arg("state"), nb::arg("tokens"), nb::arg("logits").none())
      .def("next", &next)
      .def("load_state",
           [](const Engine &engine, const nb::bytes &path) {
             const std::string text = text_of(path);
             const Unlocked unlocked;
             return load_state(engine.sizes(), text);
           })
      .def("read_at", &read_at);
}
