// Checkpoints of every format open and are read to the same bits however the reading is divided;
// those that do not fit their configuration, or ask for too much, are refused.

#include "engine/model.h"

#include <doctest/doctest.h>

#include <functional>

#include "allocations.h"
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

TEST_CASE("threads that share all the work change no bit") {
  for (const Format format : kFormats) {
    CAPTURE(static_cast<int>(format));
    const Folder folder;
    Checkpoint(shared_sizes(), format, 2).save(folder.path());
    const Model model(folder.path());
    const Sizes &s = model.sizes();
    constexpr Index kSites = 128;
    const Tokens tokens = tokens_of(2 * kSites);
    for (const Isa &isa : isas()) {
      CAPTURE(isa.name);
      const auto read = [&](Workers &workers, State &state) {
        std::vector<float> logits(tokens.size() * static_cast<std::size_t>(s.vocabulary));
        Reader(model, isa, workers).read(state.reading(kSites, tokens.data(), true, logits.data()));
        return logits;
      };
      Workers alone(1), three(3);
      State state(s, 2), shared(s, 2);
      const std::vector<float> logits = read(alone, state);
      CHECK(read(three, shared) == logits);
      CHECK(alone.jobs() == 0);
      // Of each layer the two projections, the recall and two products of each expert; the logits,
      // of one sequence after the other.
      CHECK(three.jobs() == static_cast<std::uint32_t>(s.layers * (3 + 2 * s.experts) + 2));
      for (std::size_t l = 0; l < state.layers().size(); ++l) {
        CHECK(shared.layers()[l].psi == state.layers()[l].psi);
        CHECK(shared.layers()[l].g == state.layers()[l].g);
        CHECK(shared.layers()[l].taps == state.layers()[l].taps);
      }
    }
  }
}

TEST_CASE("a batch of any size has the same bits, and takes the memory of 256 rows") {
  for (const Format format : {Format::f32, Format::int4}) {
    const Folder folder;
    Checkpoint(small_sizes(), format, 1).save(folder.path());
    Engine engine(folder.path(), 1, "");
    const Sizes &s = engine.sizes();
    constexpr Index kBatch = 2000, kSites = 2;
    const Tokens tokens = tokens_of(kBatch * kSites);
    State state(s, kBatch), last(s, kBatch);
    std::vector<float> logits(static_cast<std::size_t>(kBatch * s.vocabulary));
    Allocations::largest = 0;
    engine.read(last, kSites, tokens.data(), logits.data());
    CHECK(Allocations::largest < 1 << 20);  // of a row, some kilobytes at most
    const std::vector<float> all = read_all(engine, state, kSites, tokens);
    for (const Index b : {Index{0}, Index{255}, Index{256}, Index{511}, Index{1999}}) {
      CAPTURE(b);
      State one(s, 1);
      const Tokens row(tokens.begin() + b * kSites, tokens.begin() + (b + 1) * kSites);
      const std::vector<float> wanted = read_all(engine, one, kSites, row);
      CHECK(std::equal(wanted.begin(), wanted.end(), all.begin() + b * kSites * s.vocabulary));
      CHECK(std::equal(wanted.begin() + s.vocabulary, wanted.end(),
                       logits.begin() + b * s.vocabulary));
      for (std::size_t l = 0; l < one.layers().size(); ++l) {
        const auto same = [&](const std::vector<float> &x, const std::vector<float> &of_all) {
          return std::equal(x.begin(), x.end(), of_all.begin() + b * static_cast<Index>(x.size()));
        };
        CHECK(same(one.layers()[l].psi, state.layers()[l].psi));
        CHECK(same(one.layers()[l].g, state.layers()[l].g));
        CHECK(same(one.layers()[l].taps, state.layers()[l].taps));
      }
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
  // Before the folder is read.
  CHECK_THROWS_AS(Engine("no/folder", 0, ""), InputError);
  CHECK_THROWS_AS(Engine("no/folder", 1, "mmx"), InputError);
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
  refused_config("\"norm_eps\": 1e-06", "\"norm_eps\": null", "norm_eps is not a number");
  refused_config("\"embedding_multiplier\": 5", "\"embedding_multiplier\": 0",
                 "embedding_multiplier is not positive");
  for (const char *size : {"vocab_size\": 23", "d_model\": 12", "n_layers\": 2", "num_experts\": 3",
                           "experts_per_token\": 2", "expert_size\": 10", "num_heads\": 4",
                           "key_size\": 5", "conv_width\": 3"}) {
    const std::string given = size, name = given.substr(0, given.find('"'));
    refused_config("\"" + given, "\"" + name + "\": null", "is not an integer");
  }
  refused_config("\"quantization\": null", "\"quantization\": null, \"mixer\": null",
                 "mixer is no text, and not one of resolvent, convolution, green");
  refused_config("\"quantization\": null", "\"quantization\": 3", "neither null nor an object");
  refused_config("\"state\": \"quantized\"", "\"state\": \"training\\u001b\"", "training?",
                 Format::int8);
  for (const char *mode : {"\"ptq_int4 \"", "\"int4\"", "\"ptq_int2\"", "\"PTQ_INT4\"", "\"\"",
                           "\"banana_int4\"", "null", "4"})
    for (const Format format : {Format::int4, Format::int8}) {
      const std::string old = format == Format::int4 ? "\"ptq_int4\"" : "\"ptq_int8\"";
      refused_config(old, mode, "and not one of ptq_int8, qat_int8", format);
    }
  refused_config("\"state\": \"quantized\"", "\"state\": \"calibrating\"", "not one of float",
                 Format::int8);
  refused_config("\"state\": \"quantized\"", "\"state\": null", "state is no text", Format::int8);
  refused_config("\"mode\"", "\"mod\"", "no field mod", Format::int4);
  refused_config("\"per_channel\": true", "\"per_channel\": 1", "per_channel is neither",
                 Format::int8);
  refused_config("\"per_channel\": true", "\"nonuniform\": 0", "nonuniform is neither",
                 Format::int8);
  refused_config("\"group_size\": 8", "\"group_size\": null", "group_size is not", Format::int4);
  refused_config("\"group_size\": 8", "\"group_size\": 0", "group_size is not", Format::int4);
  refused_config("\"quantized\"", "\"float\"", "names no quantization", Format::int4);
  refused_config("{", "[", "JSON");
  Checkpoint list(small_sizes(), Format::f32, 1);
  list.config = "[]";
  refused(list, "not an object");
  list.config = std::string((16 << 20) + 1, ' ');
  refused(list, "more than 16777216");
}

// A checkpoint whose configuration has one text instead of another.
Checkpoint changed(Format format, const std::string &old, const std::string &now) {
  Checkpoint out(small_sizes(), format, 1);
  const std::size_t at = out.config.find(old);
  REQUIRE(at != std::string::npos);
  out.config.replace(at, old.size(), now);
  return out;
}

Sizes opened(const Checkpoint &checkpoint) {
  const Folder folder;
  checkpoint.save(folder.path());
  return Model(folder.path()).sizes();
}

TEST_CASE("what a configuration leaves out is as in bkcore") {
  // Null: each head has a group of its own, and values share the width.
  Sizes s = small_sizes();
  s.groups = s.heads;
  Checkpoint nulls(s, Format::f32, 1);
  for (const auto &[old, now] :
       {std::pair<std::string, std::string>{"\"key_groups\": 4", "\"key_groups\": null"},
        {"\"value_size\": 3", "\"value_size\": null"}})
    nulls.config.replace(nulls.config.find(old), old.size(), now);
  CHECK(opened(nulls).groups == 4);
  CHECK(opened(nulls).values == 3);
  // Without a state it is float, and without a mode ptq_int8.
  const std::string mode = "\"mode\": \"ptq_int8\", ", state = "\"state\": \"quantized\", ";
  CHECK(opened(changed(Format::f32, "\"quantization\": null", "\"quantization\": {}")).core_bits ==
        0);
  CHECK(opened(changed(Format::f32, "\"quantization\": null",
                       "\"quantization\": {\"mode\": \"qat_int4\"}"))
            .core_bits == 0);
  CHECK(opened(changed(Format::int8, mode, "")).core_bits == 8);
  refused(changed(Format::int8, state, ""), "names no quantization");
  refused(changed(Format::int4, "\"mode\": \"ptq_int4\", ", ""), "no tensor");
  for (const char *name : {"qat_int8", "mixed_precision"})
    CHECK(opened(changed(Format::int8, "ptq_int8", name)).core_bits == 8);
  CHECK(opened(changed(Format::int4, "ptq_int4", "qat_int4")).core_bits == 4);
  CHECK(opened(changed(Format::int8, "\"group_size\": 8, ", "")).group_size == 128);
}

TEST_CASE("tensors are there exactly if the configuration says so") {
  using Part = Checkpoint::Part;
  const auto without_tables = [](Checkpoint checkpoint) {
    auto &parts = checkpoint.parts;
    parts.erase(std::remove_if(parts.begin(), parts.end(),
                               [](const Part &part) {
                                 return part.name.find(".table.") != std::string::npos;
                               }),
                parts.end());
    return checkpoint;
  };
  const std::string some = "\"per_channel\": true";
  const Checkpoint uniform = changed(Format::int4, some, some + ", \"nonuniform\": false");
  CHECK_FALSE(opened(without_tables(uniform)).level_tables);
  refused(uniform, "no tensor layers.0.mixer.quantizers.barrier.table.stored_levels");
  for (const char *nonuniform : {"", ", \"nonuniform\": true", ", \"nonuniform\": null"}) {
    const Checkpoint uneven = changed(Format::int4, some, some + nonuniform);
    CHECK(opened(uneven).level_tables);
    refused(without_tables(uneven), "it lacks layers.0.mixer.quantizers.gate.table.stored_levels");
  }
  CHECK_FALSE(opened(changed(Format::int8, some, some + ", \"nonuniform\": true")).level_tables);
  // Scales of activations, and weights in codes.
  refused(changed(Format::int8, some, "\"per_channel\": false"), "gate.stored_scales is (4,)");
  Checkpoint shared(small_sizes(), Format::int8, 2);
  CHECK_FALSE(opened(shared).per_channel);
  shared.config.replace(shared.config.find("\"per_channel\": false"), 20, "\"per_channel\": true");
  refused(shared, "gate.stored_scales is (1,)");
  const Checkpoint floats(small_sizes(), Format::f32, 1);
  Checkpoint mixture(small_sizes(), Format::int8, 1);
  for (Part &part : mixture.parts)
    if (part.name == "embedding.weight.packed") part = floats.parts.front();
  refused(mixture, "it lacks embedding.weight.packed");
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
  const std::string record = "layers.0.mixer.quantizers.gate.record";
  damaged(Format::int8, record, "gate has wrong dtypes",
          [](auto &part) { part.dtype = Dtype::f64; });
  damaged(Format::int8, record, "it lacks layers.0.mixer.quantizers.gate.record (3,)",
          [](auto &part) { part.name = "other"; });
  Checkpoint more(small_sizes(), Format::f32, 1);
  more.parts.push_back({"more", Dtype::f32, {1}, "1234"});
  refused(more, "the model has no tensor more");
}

}  // namespace
}  // namespace bkcore::engine
