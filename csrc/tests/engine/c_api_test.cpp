// The library for C: arguments that cannot be are errors with a message, and nothing else happens.
// tests/test_c_library.py compares its results with PyTorch's.

#include <doctest/doctest.h>

#include <cstring>
#include <thread>

#include "checkpoint.h"
#include "engine/include/bkcore.h"

namespace bkcore::engine {
namespace {

bool said(const char *part) { return std::strstr(bkcore_error_message(), part) != nullptr; }

struct Opened {
  Folder folder;
  bkcore_engine *engine = nullptr;
  bkcore_state *state = nullptr;

  Opened() {
    Checkpoint(small_sizes(), Format::f32, 3).save(folder.path());
    REQUIRE(bkcore_open(folder.path().c_str(), 1, nullptr, &engine) == BKCORE_OK);
    REQUIRE(bkcore_state_new(engine, 2, &state) == BKCORE_OK);
  }
  ~Opened() {
    bkcore_state_free(state);
    bkcore_close(engine);
  }
};

int go_on(void *context, std::int64_t, std::int64_t) {
  ++*static_cast<int *>(context);
  return 1;
}

#define REFUSED(call, part)              \
  do {                                   \
    CHECK((call) == BKCORE_INPUT_ERROR); \
    CHECK(said(part));                   \
  } while (false)

TEST_CASE("null is an error, and may be freed") {
  Opened model;
  bkcore_engine *const engine = model.engine;
  bkcore_state *const state = model.state;
  const char *const folder = model.folder.path().c_str();
  const std::int64_t tokens[] = {1, 2};
  std::int64_t number;
  float logits[46];
  bkcore_state *made = nullptr;
  bkcore_sampler *sampler = nullptr;
  const bkcore_sampling sampling = bkcore_default_sampling();
  bkcore_generation generation{};
  generation.most_tokens = 1, generation.sampling = sampling;
  int count = 0;
  REFUSED(bkcore_open(nullptr, 1, nullptr, &model.engine), "folder is NULL");
  REFUSED(bkcore_open(folder, 1, nullptr, nullptr), "engine is NULL");
  REFUSED(bkcore_size(nullptr, BKCORE_VOCABULARY, &number), "engine is NULL");
  REFUSED(bkcore_size(engine, BKCORE_VOCABULARY, nullptr), "size is NULL");
  REFUSED(bkcore_state_new(nullptr, 1, &made), "engine is NULL");
  REFUSED(bkcore_state_new(engine, 1, nullptr), "state is NULL");
  REFUSED(bkcore_state_copy(nullptr, &made), "state is NULL");
  REFUSED(bkcore_state_copy(state, nullptr), "copy is NULL");
  REFUSED(bkcore_state_select(nullptr, tokens, 1, &made), "state is NULL");
  REFUSED(bkcore_state_select(state, nullptr, 1, &made), "sequences is NULL");
  REFUSED(bkcore_state_select(state, tokens, 1, nullptr), "selected is NULL");
  const bkcore_state *const states[] = {state, nullptr};
  REFUSED(bkcore_state_join(nullptr, 1, &made), "states is NULL");
  REFUSED(bkcore_state_join(states, 2, &made), "one of states is NULL");
  REFUSED(bkcore_state_join(states, 1, nullptr), "joined is NULL");
  REFUSED(bkcore_state_batch(nullptr, &number), "state is NULL");
  REFUSED(bkcore_state_batch(state, nullptr), "batch is NULL");
  REFUSED(bkcore_state_seen(nullptr, &number, 1), "state is NULL");
  REFUSED(bkcore_state_seen(state, nullptr, 2), "seen is NULL");
  REFUSED(bkcore_state_save(nullptr, folder), "state is NULL");
  REFUSED(bkcore_state_save(state, nullptr), "path is NULL");
  REFUSED(bkcore_state_load(nullptr, folder, &made), "engine is NULL");
  REFUSED(bkcore_state_load(engine, nullptr, &made), "path is NULL");
  REFUSED(bkcore_state_load(engine, folder, nullptr), "state is NULL");
  for (const auto read : {bkcore_read, bkcore_read_all}) {
    REFUSED(read(nullptr, state, tokens, 2, 1, logits, 46), "engine is NULL");
    REFUSED(read(engine, nullptr, tokens, 2, 1, logits, 46), "state is NULL");
    REFUSED(read(engine, state, nullptr, 2, 1, logits, 46), "tokens is NULL");
    REFUSED(read(engine, state, tokens, 2, 1, nullptr, 46), "logits is NULL");
  }
  REFUSED(bkcore_sampler_new(3, nullptr, 0, &sampler), "sampling is NULL");
  REFUSED(bkcore_sampler_new(3, &sampling, 0, nullptr), "sampler is NULL");
  REQUIRE(bkcore_sampler_new(3, &sampling, 0, &sampler) == BKCORE_OK);
  REFUSED(bkcore_sampler_see(nullptr, tokens, 1), "sampler is NULL");
  REFUSED(bkcore_sampler_see(sampler, nullptr, 1), "tokens is NULL");
  REFUSED(bkcore_sampler_sample(nullptr, logits, 3, &number), "sampler is NULL");
  REFUSED(bkcore_sampler_sample(sampler, nullptr, 3, &number), "logits is NULL");
  REFUSED(bkcore_sampler_sample(sampler, logits, 3, nullptr), "token is NULL");
  const auto generate = [&](bkcore_engine *e, bkcore_state *s, const std::int64_t *prompt,
                            const bkcore_generation *g, bkcore_on_token on_token) {
    return bkcore_generate(e, s, prompt, 2, 1, g, on_token, &count);
  };
  REFUSED(generate(nullptr, state, tokens, &generation, go_on), "engine is NULL");
  REFUSED(generate(engine, nullptr, tokens, &generation, go_on), "state is NULL");
  REFUSED(generate(engine, state, nullptr, &generation, go_on), "tokens is NULL");
  REFUSED(generate(engine, state, tokens, nullptr, go_on), "generation is NULL");
  REFUSED(generate(engine, state, tokens, &generation, nullptr), "on_token is NULL");
  generation.stop_count = 1;
  REFUSED(generate(engine, state, tokens, &generation, go_on), "stops is NULL");
  CHECK(made == nullptr);
  CHECK(count == 0);
  CHECK(model.engine == engine);
  CHECK(bkcore_isa(nullptr) == nullptr);
  bkcore_sampler_free(sampler);
  bkcore_close(nullptr), bkcore_state_free(nullptr), bkcore_sampler_free(nullptr);
}

TEST_CASE("sizes are compared with what is needed") {
  Opened model;
  const std::int64_t tokens[] = {1, 2, 3, 4};
  std::vector<float> logits(2 * 2 * 23);
  const auto read = [&](std::int64_t batch, std::int64_t sites, std::int64_t count) {
    return bkcore_read(model.engine, model.state, tokens, batch, sites, logits.data(), count);
  };
  REFUSED(read(1, 2, 46), "batch must be 2, not 1");
  REFUSED(read(2, 0, 46), "sites must be at least 1, not 0");
  REFUSED(read(2, -1, 46), "sites must be at least 1, not -1");
  for (const std::int64_t count : {0, -1, 45, 47, 92})
    REFUSED(read(2, 2, count), "count must be 46");
  const auto read_all = [&](std::int64_t sites, std::int64_t count) {
    return bkcore_read_all(model.engine, model.state, tokens, 2, sites, logits.data(), count);
  };
  REFUSED(read_all(2, 46), "count must be 92, not 46");
  REFUSED(read_all(INT64_MAX, 46), "too many logits");
  // Twice these sites are no number of 64 bits, or too many.
  bkcore_generation generation{};
  generation.most_tokens = 1, generation.sampling = bkcore_default_sampling();
  int count = 0;
  for (const std::int64_t sites : {INT64_MAX, INT64_MAX / 2 + 1, (INT64_C(1) << 39) + 1}) {
    REFUSED(bkcore_read(model.engine, model.state, tokens, 2, sites, nullptr, 0), "2^40 tokens");
    REFUSED(bkcore_read_all(model.engine, model.state, tokens, 2, sites, nullptr, 0),
            "2^40 tokens");
    REFUSED(
        bkcore_generate(model.engine, model.state, tokens, 2, sites, &generation, go_on, &count),
        "2^40 tokens");
  }
  generation.stops = tokens, generation.stop_count = INT64_MAX;
  REFUSED(bkcore_generate(model.engine, model.state, tokens, 2, 1, &generation, go_on, &count),
          "stop_count must be below 2^31");
  CHECK(count == 0);
  std::int64_t seen[] = {-1, -1, -1};
  REFUSED(bkcore_state_seen(model.state, seen, 3), "batch must be 2, not 3");
  CHECK(bkcore_state_seen(model.state, seen, 2) == BKCORE_OK);
  CHECK((seen[0] == 0 && seen[1] == 0 && seen[2] == -1));
  CHECK(read(2, 2, 46) == BKCORE_OK);
  CHECK(read_all(2, 92) == BKCORE_OK);
  CHECK(bkcore_read(model.engine, model.state, tokens, 2, 2, nullptr, 0) == BKCORE_OK);
  CHECK(bkcore_state_seen(model.state, seen, 2) == BKCORE_OK);
  CHECK((seen[0] == 6 && seen[1] == 6));
  std::int64_t size = 0;
  for (const bkcore_quantity quantity : {-1, 12, 1 << 30})
    REFUSED(bkcore_size(model.engine, quantity, &size), "there is no quantity");
  const std::int64_t wanted[] = {23, 1, 0, 12, 2, 4, 2, 5, 3, 3, 3, 2};
  for (bkcore_quantity quantity = 0; quantity < 12; ++quantity) {
    CHECK(bkcore_size(model.engine, quantity, &size) == BKCORE_OK);
    CHECK(size == (quantity == BKCORE_STATE_BYTES ? 2 * 4 * (2 * 32 + 4 * (2 + 30)) + 8
                                                  : wanted[quantity]));
  }
  REFUSED(bkcore_state_select(model.state, tokens, -1, &model.state), "sequences, not -1");
  REFUSED(bkcore_state_join(&model.state, -1, &model.state), "count must be at least 0");
  REFUSED(bkcore_state_join(&model.state, INT64_MAX, &model.state), "1 to 2^20 sequences");
}

TEST_CASE("each kind of error has its number") {
  Opened model;
  bkcore_engine *engine = nullptr;
  bkcore_state *state = nullptr;
  CHECK(bkcore_open("no/folder", 1, nullptr, &engine) == BKCORE_CHECKPOINT_ERROR);
  CHECK(said("no/folder/model.safetensors cannot be read"));
  REFUSED(bkcore_open(model.folder.path().c_str(), 0, nullptr, &engine), "threads must be");
  REFUSED(bkcore_open(model.folder.path().c_str(), 1, "mmx", &engine), "instruction set mmx");
  CHECK(bkcore_state_load(model.engine, "no/state", &state) == BKCORE_CHECKPOINT_ERROR);
  CHECK(bkcore_state_save(model.state, "no/state") == BKCORE_CHECKPOINT_ERROR);
  REFUSED(bkcore_state_new(model.engine, 0, &state), "1 to 2^20 sequences");
  CHECK((engine == nullptr && state == nullptr));
  const bkcore_sampling sampling = bkcore_default_sampling();
  bkcore_sampler *sampler = nullptr;
  REQUIRE(bkcore_sampler_new(2, &sampling, 0, &sampler) == BKCORE_OK);
  const float logits[] = {1, NAN};
  std::int64_t token = -1;
  CHECK(bkcore_sampler_sample(sampler, logits, 2, &token) == BKCORE_ERROR);
  CHECK(said("token 1 is nan"));
  REFUSED(bkcore_sampler_sample(sampler, logits, 1, &token), "vocabulary must be 2, not 1");
  CHECK(token == -1);
  bkcore_sampler_free(sampler);
  CHECK(bkcore_open("no\nfolder\x1b[2J\xC3\xA9", 1, nullptr, &engine) == BKCORE_CHECKPOINT_ERROR);
  CHECK(said("no?folder?[2J\xC3\xA9/model.safetensors cannot be read"));
  CHECK(bkcore_state_load(model.engine, "no\nstate", &state) == BKCORE_CHECKPOINT_ERROR);
  CHECK(said("no?state"));
  CHECK(bkcore_state_save(model.state, "no\n/state") == BKCORE_CHECKPOINT_ERROR);
  CHECK(said("no?/state"));
  const std::string longer(5000, 'x');
  CHECK(bkcore_open(longer.c_str(), 1, nullptr, &engine) == BKCORE_CHECKPOINT_ERROR);
  CHECK(std::strlen(bkcore_error_message()) == 1023);
}

TEST_CASE("a message belongs to its thread") {
  REFUSED(bkcore_state_batch(nullptr, nullptr), "is NULL");
  std::thread([] {
    CHECK(std::strcmp(bkcore_error_message(), "") == 0);
    REFUSED(bkcore_state_save(nullptr, nullptr), "state is NULL");
  }).join();
  CHECK(said("is NULL"));
}

TEST_CASE("exceptions of a callback do not leave the library") {
  Opened model;
  const std::int64_t tokens[] = {1, 2};
  bkcore_generation generation{};
  generation.most_tokens = 3, generation.sampling = bkcore_default_sampling();
  const bkcore_on_token throws = [](void *, std::int64_t, std::int64_t) -> int { throw 3; };
  CHECK(bkcore_generate(model.engine, model.state, tokens, 2, 1, &generation, throws, nullptr) ==
        BKCORE_ERROR);
  CHECK(said("callback"));
  int count = 0;
  CHECK(bkcore_generate(model.engine, model.state, tokens, 2, 1, &generation, go_on, &count) ==
        BKCORE_OK);
  CHECK(count == 6);
}

TEST_CASE("a state goes on from where it was copied, saved, selected or joined") {
  Opened model;
  const std::int64_t tokens[] = {1, 2, 3, 4};
  std::vector<float> wanted(46), found(46);
  const std::string path = model.folder.file("state");
  REQUIRE(bkcore_read(model.engine, model.state, tokens, 2, 2, nullptr, 0) == BKCORE_OK);
  bkcore_state *copy, *loaded, *halves[2], *joined;
  const std::int64_t rows[] = {0, 1};
  REQUIRE(bkcore_state_copy(model.state, &copy) == BKCORE_OK);
  REQUIRE(bkcore_state_save(model.state, path.c_str()) == BKCORE_OK);
  REQUIRE(bkcore_state_load(model.engine, path.c_str(), &loaded) == BKCORE_OK);
  REQUIRE(bkcore_state_select(model.state, rows, 1, &halves[0]) == BKCORE_OK);
  REQUIRE(bkcore_state_select(model.state, rows + 1, 1, &halves[1]) == BKCORE_OK);
  REQUIRE(bkcore_state_join(halves, 2, &joined) == BKCORE_OK);
  REQUIRE(bkcore_read(model.engine, model.state, tokens, 2, 1, wanted.data(), 46) == BKCORE_OK);
  for (bkcore_state *const state : {copy, loaded, joined}) {
    CHECK(bkcore_read(model.engine, state, tokens, 2, 1, found.data(), 46) == BKCORE_OK);
    CHECK(found == wanted);
  }
  for (bkcore_state *const state : {copy, loaded, halves[0], halves[1], joined})
    bkcore_state_free(state);
}

}  // namespace
}  // namespace bkcore::engine
