// What users of the engine hold: a model, its threads, and the states of sequences.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "model.h"
#include "read.h"

namespace bkcore::engine {
namespace {

class Engine {
 public:
  // Throws CheckpointError unless the folder holds a model that can be read, and InputError if
  // there are no threads, or this processor lacks the instruction set; "" stands for the best.
  Engine(const std::string &folder, Index threads, const std::string &isa)
      : Engine(std::make_unique<Model>(folder), threads, isa) {}

  Engine(std::unique_ptr<const Model> model, Index threads, const std::string &isa)
      : model_(std::move(model)), isa_(known_isa(isa)), reader_(*model_, isa_, checked(threads)) {}

  const Sizes &sizes() const { return model_->sizes(); }
  const std::string &isa() const { return isa_.name; }
  Index threads() const { return reader_.threads(); }

  bool is_current() const { return model_->is_current(); }

  // One reading at a time; other threads wait.
  void read(const Reading &reading) {
    const std::lock_guard lock(mutex_);
    reader_.read(reading);
  }

  // Reads tokens (batch, sites) and writes the logits after the last ones, (batch, vocabulary), or
  // after all, (batch, sites, vocabulary), unless null. Throws InputError, and leaves the state as
  // it is, if a token is none of the vocabulary, there are none, or the state is another model's.
  void read(State &state, Index sites, const std::int64_t *tokens, float *logits,
            bool of_all_sites = false) {
    if (sites < 1)
      throw InputError("there must be at least one token, not " + std::to_string(sites));
    state.check_fits(sizes());
    read(state.reading(sites, tokens, of_all_sites, logits));
    for (std::int64_t &seen : state.seen()) seen += sites;
  }

 private:
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

  std::unique_ptr<const Model> model_;
  const Isa &isa_;
  Reader reader_;
  std::mutex mutex_;
};

}  // namespace
}  // namespace bkcore::engine
