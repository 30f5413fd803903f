// Sequences that leave a batch and join others.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "read.h"

namespace bkcore::engine {
namespace {

// Copies what one sequence remembers to another one's place, in a state of the same sizes.
inline void copy_sequence(const State &from, Index sequence, State &to, Index place) {
  const auto copy = [&](const std::vector<float> &x, std::vector<float> &y) {
    const Index size = static_cast<Index>(x.size()) / from.batch();
    std::copy_n(x.begin() + sequence * size, size, y.begin() + place * size);
  };
  for (std::size_t l = 0; l < from.layers().size(); ++l) {
    const State::Layer &x = from.layers()[l];
    State::Layer &y = to.layers()[l];
    copy(x.taps, y.taps), copy(x.g, y.g), copy(x.psi, y.psi);
  }
  to.seen()[place] = from.seen()[sequence];
}

// A state of some sequences, in any order and possibly repeated. Throws InputError if there is no
// such sequence, none is selected, or more than a state may have.
inline State select(const State &state, const Index *sequences, Index count) {
  State::check_batch(count);
  for (Index i = 0; i < count; ++i)
    if (sequences[i] < 0 || sequences[i] >= state.batch())
      throw InputError("sequence " + std::to_string(sequences[i]) + " is not in [0, " +
                       std::to_string(state.batch()) + ")");
  State out(state.sizes(), count);
  for (Index i = 0; i < count; ++i) copy_sequence(state, sequences[i], out, i);
  return out;
}

// A state of all sequences of several ones. Throws InputError if there are none, more than a state
// may have, or some belong to a model of other sizes.
inline State join(const std::vector<const State *> &states) {
  if (states.empty()) throw InputError("there must be at least one state to join");
  Index count = 0;
  for (const State *state : states) {
    state->check_fits(states.front()->sizes());
    count += state->batch();
  }
  State out(states.front()->sizes(), count);
  Index place = 0;
  for (const State *state : states)
    for (Index i = 0; i < state->batch(); ++i) copy_sequence(*state, i, out, place++);
  return out;
}

}  // namespace
}  // namespace bkcore::engine
