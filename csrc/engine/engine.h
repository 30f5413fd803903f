// What users of the engine hold: a model, its threads, and the states of sequences.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "float_mode.h"
#include "model.h"
#include "read.h"
#include "workers.h"

namespace bkcore::engine {
namespace {

class Engine {
 public:
  // Throws InputError if there are no threads, or this processor lacks the instruction set, where
  // "" stands for the best; and CheckpointError unless the folder holds a model that can be read.
  Engine(const std::string &folder, Index threads, const std::string &isa)
      : isa_(known_isa(isa)), workers_(checked(threads)), model_(folder) {}

  // As `Model` of tensors in memory.
  Engine(const Tensors &tensors, std::string_view config, Index threads, const std::string &isa)
      : isa_(known_isa(isa)), workers_(checked(threads)), model_(tensors, config) {}

  const Sizes &sizes() const { return model_.sizes(); }
  const std::string &isa() const { return isa_.name; }
  Index threads() const { return workers_.threads(); }

  bool is_current() const { return model_.is_current(); }

  // One reading at a time; other threads wait. Throws InputError if there are no tokens, more than
  // 2^40, or some that are none of the vocabulary.
  void read(const Reading &reading) {
    check_count(reading.batch, reading.sites);
    const std::lock_guard lock(mutex_);
    const DefaultFloats floats;
    reader_.read(reading);
  }

  // Reads tokens (batch, sites) and writes the logits after the last ones, (batch, vocabulary), or
  // after all, (batch, sites, vocabulary), unless null. Throws InputError also if the state is
  // another model's, or a sequence would have seen more tokens than are counted; it leaves the
  // state as it is.
  void read(State &state, Index sites, const std::int64_t *tokens, float *logits,
            bool of_all_sites = false) {
    check_count(state.batch(), sites);
    state.check_fits(sizes());
    for (const std::int64_t seen : state.seen())
      if (seen > State::kMostSeen - sites)
        throw InputError("a sequence that has seen " + std::to_string(seen) +
                         " tokens cannot read " + std::to_string(sites) +
                         ": at most 2^62 are counted");
    read(state.reading(sites, tokens, of_all_sites, logits));
    for (std::int64_t &seen : state.seen()) seen += sites;
  }

 private:
  // So that no product of sizes overflows.
  static void check_count(Index batch, Index sites) {
    constexpr Index kMost = Index{1} << 40;
    if (batch < 1 || sites < 1)
      throw InputError("there must be at least one token, not " + std::to_string(batch) +
                       " times " + std::to_string(sites));
    if (batch > kMost / sites)
      throw InputError("at most 2^40 tokens are read at once, not " + std::to_string(batch) +
                       " times " + std::to_string(sites));
  }

  static const Isa &known_isa(const std::string &name) {
    if (name.empty()) return isas().front();
    std::string known;
    for (const Isa &isa : isas()) {
      if (isa.name == name) return isa;
      known += (known.empty() ? "" : ", ") + isa.name;
    }
    throw InputError("instruction set " + shown(name) + " is not available; choose from " + known);
  }

  static Index checked(Index threads) {
    if (threads < 1 || threads > 1024)
      throw InputError("threads must be from 1 to 1024, not " + std::to_string(threads));
    return threads;
  }

  const Isa &isa_;
  Workers workers_;
  const Model model_;
  Reader reader_{model_, isa_, workers_};
  std::mutex mutex_;
};

}  // namespace
}  // namespace bkcore::engine
