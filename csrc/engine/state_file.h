// Files of states, as `save` and `load` of bkcore.model.state.StreamState write and read them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "read.h"
#include "write.h"

namespace bkcore::engine {
namespace {

struct StateField {
  std::string name;
  std::vector<Index> shape;
  std::size_t layer;
  std::vector<float> State::Layer::*numbers;
};

inline std::vector<StateField> state_fields(const Sizes &s, Index batch) {
  std::vector<StateField> out;
  for (std::size_t l = 0; l < static_cast<std::size_t>(s.layers); ++l) {
    const std::string at = std::to_string(l) + ".";
    out.push_back({at + "taps", {batch, s.taps - 1, s.mixed()}, l, &State::Layer::taps});
    out.push_back({at + "g", {batch, s.heads, 2}, l, &State::Layer::g});
    out.push_back({at + "psi", {batch, s.heads, 2, s.keys, s.values}, l, &State::Layer::psi});
  }
  return out;
}

// Throws CheckpointError if the file cannot be written.
inline void save_state(const State &state, const std::string &path) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  const auto add = [&](const std::string &name, Dtype dtype, const std::vector<Index> &shape,
                       const void *data) {
    tensors.emplace_back(name, Tensor{dtype, shape, static_cast<const std::byte *>(data)});
  };
  add("seen", Dtype::i64, {state.batch()}, state.seen().data());
  for (const StateField &field : state_fields(state.sizes(), state.batch()))
    add(field.name, Dtype::f32, field.shape, (state.layers()[field.layer].*field.numbers).data());
  write_safetensors(path, tensors);
}

// Throws CheckpointError unless the file has a state in float32 of a model of these sizes. There is
// no memory for a state before all has been checked but the floats, which may be any.
inline State load_state(const Sizes &s, const std::string &path) {
  const Safetensors file(path);
  const auto fail = [&](const std::string &what) {
    throw CheckpointError(file.path() + " is no state of this model: " + what);
  };
  const Tensors &tensors = file.tensors();
  const auto seen = tensors.find("seen");
  if (seen == tensors.end() || seen->second.dtype != Dtype::i64 || seen->second.shape.size() != 1)
    fail("it has no int64 seen (sequences,)");
  const Index batch = seen->second.shape[0];
  if (batch < 1 || batch > State::kMostSequences)
    fail("it has " + std::to_string(batch) + " sequences, which must be 1 to 2^20");
  std::vector<std::int64_t> counts(static_cast<std::size_t>(batch));
  std::memcpy(counts.data(), seen->second.data, counts.size() * sizeof counts.front());
  for (const std::int64_t count : counts)
    if (count < 0 || count > State::kMostSeen)
      fail("a sequence has seen " + std::to_string(count) +
           " tokens, which is negative or above 2^62");
  const std::vector<StateField> fields = state_fields(s, batch);
  if (tensors.size() != fields.size() + 1)
    fail("it has " + std::to_string(tensors.size()) + " tensors, and not " +
         std::to_string(fields.size() + 1));
  for (const StateField &field : fields) {
    const auto found = tensors.find(field.name);
    if (found == tensors.end()) fail("it lacks " + field.name);
    if (found->second.shape != field.shape || found->second.dtype != Dtype::f32)
      fail(field.name + " is not float32 " + shown(field.shape));
  }
  State state(s, batch);
  state.seen() = counts;
  for (const StateField &field : fields) {
    std::vector<float> &numbers = state.layers()[field.layer].*field.numbers;
    if (!numbers.empty())
      std::memcpy(numbers.data(), tensors.at(field.name).data, numbers.size() * sizeof(float));
  }
  return state;
}

}  // namespace
}  // namespace bkcore::engine
