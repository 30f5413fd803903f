// Text from a model: reads a prompt, and then chooses token after token for each sequence of a
// batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"
#include "sampling.h"
#include "sequences.h"

namespace bkcore::engine {
namespace {

struct Generation {
  Index most = 1;                   // tokens of a sequence, at least 1
  std::vector<std::int64_t> stops;  // tokens that end a sequence, which get them, too
  Sampling sampling;
  std::uint64_t seed = 0;  // sequence b draws as if it was alone and the seed was seed + b
};

// One call. Sequences that have ended leave the batch: the others go on in a state of their own,
// and are put back when they end, too.
template <class OnToken>
class GenerationRun {
 public:
  GenerationRun(Engine &engine, State &state, const Generation &settings, const OnToken &on_token)
      : engine_(engine), all_(state), active_(&state), settings_(settings), on_token_(on_token) {
    const Index vocabulary = engine.sizes().vocabulary, batch = state.batch();
    state.check_fits(engine.sizes());
    if (settings.most < 1)
      throw InputError("at least one token is generated, not " + std::to_string(settings.most));
    for (const std::int64_t stop : settings.stops)
      if (stop < 0 || stop >= vocabulary)
        throw InputError("stop token " + std::to_string(stop) + " is not in [0, " +
                         std::to_string(vocabulary) + ")");
    for (Index b = 0; b < batch; ++b) {
      sequences_.push_back(b);
      samplers_.emplace_back(vocabulary, settings.sampling,
                             settings.seed + static_cast<std::uint64_t>(b));
    }
    logits_.resize(batch * vocabulary);
  }

  void run(Index sites, const std::int64_t *prompt) {
    engine_.read(all_, sites, prompt, logits_.data());
    for (Index b = 0; b < all_.batch(); ++b) samplers_[b].see(prompt + b * sites, sites);
    try {
      for (Index n = 1; choose(n == settings_.most); ++n)
        engine_.read(*active_, 1, tokens_.data(), logits_.data());
    } catch (...) {
      put_back();
      throw;
    }
  }

 private:
  // Chooses a token for each sequence, and gives them out. Says whether some go on.
  bool choose(bool last) {
    const auto rows = static_cast<Index>(sequences_.size());
    tokens_.clear();
    for (Index row = 0; row < rows; ++row)
      tokens_.push_back(
          samplers_[sequences_[row]].sample(logits_.data() + row * engine_.sizes().vocabulary));
    std::vector<Index> going;  // rows
    for (Index row = 0; row < rows; ++row) {
      const std::int64_t token = tokens_[row];
      const auto &stops = settings_.stops;
      const bool wanted = on_token_(sequences_[row], token);
      if (!wanted || last || std::find(stops.begin(), stops.end(), token) != stops.end()) continue;
      tokens_[static_cast<Index>(going.size())] = token;
      going.push_back(row);
    }
    if (going.size() < sequences_.size()) keep(going);
    return !going.empty();
  }

  // Goes on with some rows.
  void keep(const std::vector<Index> &rows) {
    std::vector<State> next;
    if (!rows.empty())
      next.push_back(select(*active_, rows.data(), static_cast<Index>(rows.size())));
    std::vector<Index> sequences;
    for (const Index row : rows) sequences.push_back(sequences_[row]);
    put_back();
    some_.swap(next);
    active_ = some_.empty() ? &all_ : &some_.front();
    sequences_.swap(sequences);
  }

  void put_back() {
    if (active_ == &all_) return;
    for (std::size_t row = 0; row < sequences_.size(); ++row)
      copy_sequence(*active_, static_cast<Index>(row), all_, sequences_[row]);
  }

  Engine &engine_;
  State &all_, *active_;
  const Generation &settings_;
  const OnToken &on_token_;
  std::vector<State> some_;       // those that go on, or none if all do
  std::vector<Index> sequences_;  // of the rows of the active state
  std::vector<Sampler> samplers_;
  std::vector<std::int64_t> tokens_;
  std::vector<float> logits_;
};

// Reads a prompt (batch, sites), at least one token each, and generates. on_token(sequence, token)
// is called for every token; if it returns false that sequence ends. Afterwards each sequence has
// read its prompt and its tokens but the last. The penalty applies to tokens of the prompt and to
// generated ones.
//
// Throws InputError for a setting or a token, before anything is read. The tokens of a round are
// all chosen before one is given out: if that throws an Error, because logits are not finite,
// sequences that had not ended have read all tokens that they got. If on_token throws, those that
// got a token in that round have not read it. If memory runs out, the state may have read a part.
template <class OnToken>
void generate(Engine &engine, State &state, Index sites, const std::int64_t *prompt,
              const Generation &settings, const OnToken &on_token) {
  GenerationRun<OnToken>(engine, state, settings, on_token).run(sites, prompt);
}

}  // namespace
}  // namespace bkcore::engine
