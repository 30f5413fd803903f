// Checkpoints of every format open and are read to the same bits however the reading is divided;
// those that do not fit their configuration, or ask for too much, are refused.

#include "engine/model.h"

#include <doctest/doctest.h>

#include <functional>

#include "checkpoint.h"
#include "engine/engine.h"

namespace bkcore::engine {
namespace {

constexpr Format kFormats[] = {Format::f32,  Format::f16,  Format::bf16,
                               Format::int8, Format::int4, Format::mixed};

using Tokens = std::vector<std::int64_t>;

std::vector<float> read_all(Engine &engine, State &state, Index sites, const Tokens &tokens) {
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(engine.sizes().vocabulary));
  engine.read(state, sites, tokens.data(), logits.data(), true);
  return logits;
}

Tokens tokens_of(Index count) {
  Tokens all;
  for (Index i = 0; i < count; ++i) all.push_back((7 * i * i + 3 * i) % 23);
  return all;
}

TEST_CASE("readings have the same bits however they are divided") {
  for (const Format format : kFormats) {
    CAPTURE(static_cast<int>(format));
    const Folder folder;
    Checkpoint(small_sizes(), format, 1).save(folder.path());
    for (const Isa &isa : isas()) {
      CAPTURE(isa.name);
      Engine engine(folder.path(), 1, isa.name), threaded(folder.path(), 3, isa.name);
      const Sizes &s = engine.sizes();
      constexpr Index kSites = 300;  // more than fit into a block
      const Tokens tokens = tokens_of(kSites);
      State whole(s, 1), one_by_one(s, 1), shared(s, 1);
      const std::vector<float> logits = read_all(engine, whole, kSites, tokens);
      for (const float x : logits) REQUIRE(std::isfinite(x));
      std::vector<float> steps;
      for (const std::int64_t token : tokens)
        for (const float x : read_all(engine, one_by_one, 1, {token})) steps.push_back(x);
      CHECK(logits == steps);
      CHECK(logits == read_all(threaded, shared, kSites, tokens));
      CHECK(whole.layers()[1].psi == one_by_one.layers()[1].psi);
      CHECK(whole.layers()[1].g == shared.layers()[1].g);
      CHECK(whole.layers()[0].taps == one_by_one.layers()[0].taps);
      CHECK(whole.seen() == Tokens{kSites});

      // Beside others, and only the last logits.
      State batch(s, 3);
      Tokens rows(tokens.begin(), tokens.begin() + 3);
      rows.insert(rows.end(), tokens.begin(), tokens.begin() + 3);
      rows.insert(rows.end(), {1, 2, 3});
      std::vector<float> last(static_cast<std::size_t>(3 * s.vocabulary));
      engine.read(batch, 3, rows.data(), last.data());
      const auto third = logits.begin() + 2 * s.vocabulary;
      CHECK(std::equal(third, third + s.vocabulary, last.begin()));
      CHECK(std::equal(third, third + s.vocabulary, last.begin() + s.vocabulary));
      CHECK_FALSE(std::equal(third, third + s.vocabulary, last.begin() + 2 * s.vocabulary));
    }
  }
}

TEST_CASE("a reading that cannot be leaves the state as it was") {
  const Folder folder, other_folder;
  Checkpoint(small_sizes(), Format::f32, 1).save(folder.path());
  Engine engine(folder.path(), 1, "");
  State state(engine.sizes(), 1);
  const Tokens tokens = {1, 2, 3};
  engine.read(state, 3, tokens.data(), nullptr);
  const State before = state;
  for (const std::int64_t token : {-1, 23}) {
    const Tokens wrong = {1, token};
    CHECK_THROWS_AS(engine.read(state, 2, wrong.data(), nullptr), InputError);
  }
  CHECK_THROWS_AS(engine.read(state, 0, tokens.data(), nullptr), InputError);
  CHECK(state.layers()[0].psi == before.layers()[0].psi);
  CHECK(state.seen() == before.seen());
  for (const Index batch : {Index{0}, Index{-1}, Index{1} << 21})
    CHECK_THROWS_AS(State(engine.sizes(), batch), InputError);

  // Keys and values exchanged: as many numbers.
  Sizes other = small_sizes();
  std::swap(other.keys, other.values);
  Checkpoint(other, Format::f32, 1).save(other_folder.path());
  CHECK_THROWS_AS(Engine(other_folder.path(), 1, "").read(state, 1, tokens.data(), nullptr),
                  InputError);
}

TEST_CASE("threads and instruction sets that cannot be are refused") {
  const Folder folder;
  Checkpoint(small_sizes(), Format::f32, 1).save(folder.path());
  for (const Index threads : {0, -1, 1025})
    CHECK_THROWS_AS(Engine(folder.path(), threads, ""), InputError);
  CHECK_THROWS_WITH_AS(Engine(folder.path(), 1, "mmx"),
                       doctest::Contains("instruction set mmx is not available; choose from"),
                       InputError);
}

void refused(const Checkpoint &checkpoint, const char *why) {
  CAPTURE(why);
  const Folder folder;
  checkpoint.save(folder.path());
  CHECK_THROWS_WITH_AS(Model{folder.path()}, doctest::Contains(why), CheckpointError);
}

void refused_config(const std::string &old, const std::string &now, const char *why,
                    Format format = Format::f32) {
  CAPTURE(now);
  Checkpoint checkpoint(small_sizes(), format, 1);
  const std::size_t at = checkpoint.config.find(old);
  REQUIRE(at != std::string::npos);
  checkpoint.config.replace(at, old.size(), now);
  refused(checkpoint, why);
}

TEST_CASE("a configuration of something else is refused") {
  refused_config("\"resnet_bk\"", "\"llama\"", "another kind of model");
  refused_config("\"resnet_bk\"", "3", "another kind of model");
  refused_config("\"quantization\": null", "\"mixer\": \"green\"", "no state to continue from");
  for (const char *size : {"0", "-1", "2147483648", "1.0", "\"12\"", "[]", "true"})
    refused_config("\"d_model\": 12", std::string("\"d_model\": ") + size, "d_model is not");
  refused_config("\"key_groups\": 2", "\"key_groups\": 3", "key_groups does not divide");
  refused_config("\"experts_per_token\": 2", "\"experts_per_token\": 4", "exceeds num_experts");
  refused_config("\"num_heads\": 4, \"key_size\": 5, \"key_groups\": 2, \"value_size\": 3",
                 "\"num_heads\": 5, \"value_size\": null", "num_heads does not divide");
  refused_config("\"norm_eps\": 1e-06", "\"norm_eps\": -1", "negative");
  refused_config("\"norm_eps\": 1e-06", "\"norm_eps\": 1e300", "not finite");
  refused_config("\"quantization\": null", "\"quantization\": 3", "no mode");
  refused_config("\"state\": \"quantized\"", "\"state\": \"training\\u001b\"", "training?",
                 Format::int8);
  refused_config("\"group_size\": 8", "\"group_size\": 0", "group_size is not", Format::int4);
  refused_config("\"quantized\"", "\"float\"", "names no quantization", Format::int4);
  refused_config("{", "[", "JSON");
  Checkpoint list(small_sizes(), Format::f32, 1);
  list.config = "[]";
  refused(list, "not an object");
  list.config = std::string((16 << 20) + 1, ' ');
  refused(list, "more than 16777216");
}

TEST_CASE("sizes that ask for too much memory are refused at once") {
  refused_config("\"n_layers\": 2", "\"n_layers\": 1048576", "it lacks layers");
  refused_config("\"n_layers\": 2", "\"n_layers\": 2147483647", "state of");
  refused_config("\"vocab_size\": 23", "\"vocab_size\": 2147483647",
                 "embedding.weight is (23, 12)");
  refused_config("\"num_experts\": 3", "\"num_experts\": 100000", "it lacks layers or experts");
  refused_config("\"num_experts\": 3", "\"num_experts\": 2147483647", "channels");
  refused_config("\"num_heads\": 4", "\"num_heads\": 2147483646", "channels");
  refused_config("\"key_size\": 5, \"key_groups\": 2, \"value_size\": 3",
                 "\"key_size\": 2147483647, \"key_groups\": 4, \"value_size\": 2147483647",
                 "channels");
  // The file itself holds what it says, and is small.
  Sizes s = small_sizes();
  s.width = s.layers = s.experts = s.experts_per_token = s.heads = s.groups = s.taps = 1;
  s.keys = s.values = 17000;
  refused(Checkpoint(s, Format::int8, 1), "a state of 578000000 numbers");
}

TEST_CASE("tensors that do not fit are refused by name") {
  using Parts = std::vector<Checkpoint::Part>;
  const auto damaged = [](Format format, const std::string &name, const char *why,
                          const std::function<void(Checkpoint::Part &)> &damage) {
    Checkpoint checkpoint(small_sizes(), format, 1);
    Parts &parts = checkpoint.parts;
    const auto found = std::find_if(parts.begin(), parts.end(), [&](const Checkpoint::Part &part) {
      return part.name == name;
    });
    REQUIRE(found != parts.end());
    damage(*found);
    refused(checkpoint, why);
  };
  const std::string up = "layers.1.experts.experts.2.up.weight";
  damaged(Format::f32, up, "it lacks layers.1.experts.experts.2.up.weight",
          [](auto &part) { part.name = "other"; });
  damaged(Format::f32, up, "(10, 12)", [](auto &part) { part.shape = {12, 10}; });
  damaged(Format::f32, up, "no floats", [](auto &part) {
    part.dtype = Dtype::i8;
    part.data.resize(120);
  });
  damaged(Format::int8, up + ".packed", "holds no codes", [](auto &part) {
    part.dtype = Dtype::bf16;
    part.data.resize(240);
  });
  damaged(Format::int8, up + ".stored_scales", "not bfloat16",
          [](auto &part) { part.dtype = Dtype::f16; });
  damaged(Format::f32, "layers.0.mixer.log_eta", "not positive", [](auto &part) {
    const float number = -1e30F;
    std::memcpy(part.data.data(), &number, sizeof number);
  });
  damaged(Format::int4, "layers.0.mixer.quantizers.gate.table.stored_levels", "does not ascend",
          [](auto &part) { part.data[7] = '\xC0'; });
  Checkpoint more(small_sizes(), Format::f32, 1);
  more.parts.push_back({"more", Dtype::f32, {1}, "1234"});
  refused(more, "the model has no tensor more");
}

}  // namespace
}  // namespace bkcore::engine
