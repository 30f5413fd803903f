// The library for C, include/bkcore.h: arguments are checked, and no exception leaves it.

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "generate.h"
#include "include/bkcore.h"
#include "sequences.h"
#include "state_file.h"

struct bkcore_engine {
  bkcore::engine::Engine engine;
};

struct bkcore_state {
  bkcore::engine::State state;
};

struct bkcore_sampler {
  bkcore::engine::Sampler sampler;
};

namespace bkcore::engine {
namespace {

// No std::string: that an error is reported must not fail for want of memory.
thread_local char last_error[1024] = "";

bkcore_status failed(bkcore_status status, const char *message) {
  std::strncpy(last_error, message, sizeof last_error - 1);
  return status;
}

template <class Work>
bkcore_status guarded(const Work &work) noexcept {
  try {
    work();
    return BKCORE_OK;
  } catch (const InputError &error) {
    return failed(BKCORE_INPUT_ERROR, error.what());
  } catch (const CheckpointError &error) {
    return failed(BKCORE_CHECKPOINT_ERROR, error.what());
  } catch (const std::bad_alloc &) {
    return failed(BKCORE_MEMORY_ERROR, "there is not enough memory");
  } catch (const std::exception &error) {
    return failed(BKCORE_ERROR, error.what());
  } catch (...) {
    return failed(BKCORE_ERROR, "a callback threw an exception");
  }
}

template <class T>
T *given(T *pointer, const char *name) {
  if (!pointer) throw InputError(std::string(name) + " is NULL");
  return pointer;
}

void check_equal(const char *name, Index found, Index wanted) {
  if (found != wanted)
    throw InputError(std::string(name) + " must be " + std::to_string(wanted) + ", not " +
                     std::to_string(found));
}

void check_least(const char *name, Index found, Index least) {
  if (found < least)
    throw InputError(std::string(name) + " must be at least " + std::to_string(least) + ", not " +
                     std::to_string(found));
}

bkcore_status read(bkcore_engine *engine, bkcore_state *state, const std::int64_t *tokens,
                   Index batch, Index sites, float *logits, Index count, bool of_all_sites) {
  return guarded([&] {
    const Index vocabulary = given(engine, "engine")->engine.sizes().vocabulary;
    check_equal("batch", batch, given(state, "state")->state.batch());
    given(tokens, "tokens");
    check_least("sites", sites, 1);
    if (logits || count != 0) {
      given(logits, "logits");
      Index wanted = batch * vocabulary;
      if (of_all_sites && __builtin_mul_overflow(wanted, sites, &wanted))
        throw InputError("there are too many logits");
      check_equal("count", count, wanted);
    }
    engine->engine.read(state->state, sites, tokens, logits, of_all_sites);
  });
}

Sampling settings(const bkcore_sampling &s) {
  return {s.repetition_penalty, s.temperature, s.top_k, s.top_p, s.min_p};
}

Index size_of(const Engine &engine, bkcore_quantity quantity) {
  const Sizes &s = engine.sizes();
  switch (quantity) {
    case BKCORE_VOCABULARY:
      return s.vocabulary;
    case BKCORE_THREADS:
      return engine.threads();
    case BKCORE_STATE_BYTES:
      return s.layers * 4 * ((s.taps - 1) * s.mixed() + s.heads * (2 + s.state())) + 8;
    case BKCORE_WIDTH:
      return s.width;
    case BKCORE_LAYERS:
      return s.layers;
    case BKCORE_HEADS:
      return s.heads;
    case BKCORE_KEY_GROUPS:
      return s.groups;
    case BKCORE_KEY_SIZE:
      return s.keys;
    case BKCORE_VALUE_SIZE:
      return s.values;
    case BKCORE_CONV_WIDTH:
      return s.taps;
    case BKCORE_EXPERTS:
      return s.experts;
    case BKCORE_EXPERTS_PER_TOKEN:
      return s.experts_per_token;
    default:
      throw InputError("there is no quantity " + std::to_string(quantity));
  }
}

}  // namespace
}  // namespace bkcore::engine

using namespace bkcore::engine;

const char *bkcore_version(void) { return BKCORE_VERSION; }

const char *bkcore_error_message(void) { return last_error; }

bkcore_status bkcore_open(const char *folder, int64_t threads, const char *isa,
                          bkcore_engine **engine) {
  return guarded([&] {
    given(folder, "folder"), given(engine, "engine");
    *engine = new bkcore_engine{{folder, threads, isa ? isa : ""}};
  });
}

void bkcore_close(bkcore_engine *engine) { delete engine; }

bkcore_status bkcore_size(const bkcore_engine *engine, bkcore_quantity quantity, int64_t *size) {
  return guarded([&] {
    given(engine, "engine"), given(size, "size");
    *size = size_of(engine->engine, quantity);
  });
}

const char *bkcore_isa(const bkcore_engine *engine) {
  return engine ? engine->engine.isa().c_str() : nullptr;
}

bkcore_status bkcore_state_new(const bkcore_engine *engine, int64_t batch, bkcore_state **state) {
  return guarded([&] {
    given(engine, "engine"), given(state, "state");
    *state = new bkcore_state{State(engine->engine.sizes(), batch)};
  });
}

bkcore_status bkcore_state_copy(const bkcore_state *state, bkcore_state **copy) {
  return guarded([&] {
    given(state, "state"), given(copy, "copy");
    *copy = new bkcore_state(*state);
  });
}

bkcore_status bkcore_state_select(const bkcore_state *state, const int64_t *sequences,
                                  int64_t count, bkcore_state **selected) {
  return guarded([&] {
    given(state, "state"), given(sequences, "sequences"), given(selected, "selected");
    *selected = new bkcore_state{select(state->state, sequences, count)};
  });
}

bkcore_status bkcore_state_join(const bkcore_state *const *states, int64_t count,
                                bkcore_state **joined) {
  return guarded([&] {
    given(states, "states"), given(joined, "joined");
    check_least("count", count, 0);
    if (count > 0) State::check_batch(count);  // each has a sequence
    std::vector<const State *> all;
    for (Index i = 0; i < count; ++i) all.push_back(&given(states[i], "one of states")->state);
    *joined = new bkcore_state{join(all)};
  });
}

void bkcore_state_free(bkcore_state *state) { delete state; }

bkcore_status bkcore_state_batch(const bkcore_state *state, int64_t *batch) {
  return guarded([&] {
    given(state, "state"), given(batch, "batch");
    *batch = state->state.batch();
  });
}

bkcore_status bkcore_state_seen(const bkcore_state *state, int64_t *seen, int64_t batch) {
  return guarded([&] {
    given(state, "state"), given(seen, "seen");
    check_equal("batch", batch, state->state.batch());
    std::copy_n(state->state.seen().begin(), batch, seen);
  });
}

bkcore_status bkcore_state_save(const bkcore_state *state, const char *path) {
  return guarded([&] {
    given(state, "state"), given(path, "path");
    save_state(state->state, path);
  });
}

bkcore_status bkcore_state_load(const bkcore_engine *engine, const char *path,
                                bkcore_state **state) {
  return guarded([&] {
    given(engine, "engine"), given(path, "path"), given(state, "state");
    *state = new bkcore_state{load_state(engine->engine.sizes(), path)};
  });
}

bkcore_status bkcore_read(bkcore_engine *engine, bkcore_state *state, const int64_t *tokens,
                          int64_t batch, int64_t sites, float *logits, int64_t count) {
  return read(engine, state, tokens, batch, sites, logits, count, false);
}

bkcore_status bkcore_read_all(bkcore_engine *engine, bkcore_state *state, const int64_t *tokens,
                              int64_t batch, int64_t sites, float *logits, int64_t count) {
  return read(engine, state, tokens, batch, sites, logits, count, true);
}

bkcore_sampling bkcore_default_sampling(void) {
  const Sampling s;
  return {s.repetition_penalty, s.temperature, s.top_k, s.top_p, s.min_p};
}

bkcore_status bkcore_sampler_new(int64_t vocabulary, const bkcore_sampling *sampling, uint64_t seed,
                                 bkcore_sampler **sampler) {
  return guarded([&] {
    given(sampling, "sampling"), given(sampler, "sampler");
    *sampler = new bkcore_sampler{{vocabulary, settings(*sampling), seed}};
  });
}

void bkcore_sampler_free(bkcore_sampler *sampler) { delete sampler; }

bkcore_status bkcore_sampler_see(bkcore_sampler *sampler, const int64_t *tokens, int64_t count) {
  return guarded([&] {
    given(sampler, "sampler"), given(tokens, "tokens");
    check_least("count", count, 0);
    sampler->sampler.see(tokens, count);
  });
}

bkcore_status bkcore_sampler_sample(bkcore_sampler *sampler, const float *logits,
                                    int64_t vocabulary, int64_t *token) {
  return guarded([&] {
    given(sampler, "sampler"), given(logits, "logits"), given(token, "token");
    check_equal("vocabulary", vocabulary, sampler->sampler.vocabulary());
    *token = sampler->sampler.sample(logits);
  });
}

bkcore_status bkcore_generate(bkcore_engine *engine, bkcore_state *state, const int64_t *tokens,
                              int64_t batch, int64_t sites, const bkcore_generation *generation,
                              bkcore_on_token on_token, void *context) {
  return guarded([&] {
    given(engine, "engine"), given(tokens, "tokens"), given(generation, "generation");
    check_equal("batch", batch, given(state, "state")->state.batch());
    if (!on_token) throw InputError("on_token is NULL");
    const bkcore_generation &g = *generation;
    check_least("stop_count", g.stop_count, 0);
    if (g.stop_count > INT32_MAX)
      throw InputError("stop_count must be below 2^31, not " + std::to_string(g.stop_count));
    if (g.stop_count > 0) given(g.stops, "stops");
    const Generation wanted{
        g.most_tokens, {g.stops, g.stops + g.stop_count}, settings(g.sampling), g.seed};
    generate(engine->engine, state->state, sites, tokens, wanted,
             [&](Index sequence, std::int64_t token) {
               return on_token(context, sequence, token) != 0;
             });
  });
}
