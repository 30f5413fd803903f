// States are saved and loaded bit for bit, and files that are no state of the model are refused.

#include "engine/state_file.h"

#include <doctest/doctest.h>

#include <functional>

#include "allocations.h"
#include "checkpoint.h"
#include "engine/engine.h"
#include "engine/sequences.h"

namespace bkcore::engine {
namespace {

struct Opened {
  Folder folder;
  std::unique_ptr<Engine> engine;

  explicit Opened(const Sizes &s = small_sizes()) {
    Checkpoint(s, Format::f32, 1).save(folder.path());
    engine = std::make_unique<Engine>(folder.path(), 1, "");
  }
  State read(const std::vector<std::int64_t> &tokens) {
    State state(engine->sizes(), 1);
    engine->read(state, static_cast<Index>(tokens.size()), tokens.data(), nullptr);
    return state;
  }
};

bool same(const State &a, const State &b) {
  for (std::size_t l = 0; l < a.layers().size(); ++l)
    if (a.layers()[l].taps != b.layers()[l].taps || a.layers()[l].g != b.layers()[l].g ||
        a.layers()[l].psi != b.layers()[l].psi)
      return false;
  return a.seen() == b.seen();
}

TEST_CASE("a state is loaded as it was saved") {
  for (const Index taps : {1, 3}) {
    Sizes s = small_sizes();
    s.taps = taps;
    Opened model(s);
    const State first = model.read({1, 2, 3}), second = model.read({4, 5});
    const State both = join({&first, &second});
    CHECK(both.seen() == std::vector<std::int64_t>{3, 2});
    const std::string path = model.folder.file("state");
    save_state(both, path);
    CHECK(same(load_state(s, path), both));
    const Index last[] = {1}, swapped[] = {1, 0, 1}, none[] = {2};
    CHECK(same(select(both, last, 1), second));
    CHECK(same(select(both, swapped, 3), join({&second, &first, &second})));
    CHECK_THROWS_AS(select(both, none, 1), InputError);
    CHECK_THROWS_AS(select(both, none, 0), InputError);
    CHECK_THROWS_AS(join({}), InputError);
  }
}

TEST_CASE("there is no memory for a selection that cannot be") {
  const State state(small_sizes(), 1);
  std::vector<Index> rows(10000);
  rows.back() = 1;
  Allocations::largest = 0;
  CHECK_THROWS_AS(select(state, rows.data(), 10000), InputError);
  CHECK(Allocations::largest < 10000);
}

TEST_CASE("a sequence that has read too much reads no more") {
  Opened model;
  const std::int64_t tokens[] = {1, 2, 3};
  State state = model.read({1, 2});
  state.seen() = {State::kMostSeen - 2};
  save_state(state, model.folder.file("state"));
  State again = load_state(model.engine->sizes(), model.folder.file("state"));
  CHECK_THROWS_WITH_AS(model.engine->read(again, 3, tokens, nullptr), doctest::Contains("2^62"),
                       InputError);
  CHECK(same(again, state));
  model.engine->read(again, 2, tokens, nullptr);
  CHECK(again.seen() == std::vector<std::int64_t>{State::kMostSeen});
  CHECK_THROWS_AS(model.engine->read(again, 1, tokens, nullptr), InputError);
}

TEST_CASE("states of models of other sizes are not joined") {
  Sizes other = small_sizes();
  other.taps = 4;
  const State a(small_sizes(), 1), b(other, 1);
  CHECK_THROWS_AS(join({&a, &b}), InputError);
}

TEST_CASE("a file that is no state of the model is refused") {
  Opened model;
  const Sizes &s = model.engine->sizes();
  const std::string path = model.folder.file("state");
  const auto refused = [&](const char *why, const Sizes &sizes) {
    CHECK_THROWS_WITH_AS(load_state(sizes, path), doctest::Contains(why), CheckpointError);
  };
  const auto damaged =
      [&](const char *why,
          const std::function<void(std::vector<std::pair<std::string, Tensor>> &)> &damage) {
        const State state = model.read({1, 2});
        save_state(state, path);
        std::vector<std::pair<std::string, Tensor>> tensors;
        {
          const Safetensors file(path);
          for (const auto &entry : file.tensors()) tensors.push_back(entry);
          damage(tensors);
          write_safetensors(path, tensors);  // the old file stays mapped
        }
        refused(why, s);
      };
  const auto named = [](auto &tensors, const char *name) -> Tensor & {
    return std::find_if(tensors.begin(), tensors.end(),
                        [&](const auto &each) { return each.first == name; })
        ->second;
  };
  const std::int64_t negative = -1, many[2] = {1, 1};
  const std::int64_t too_long[] = {State::kMostSeen + 1, INT64_MAX};
  damaged("no int64 seen", [&](auto &all) { all.pop_back(); });
  damaged("no int64 seen", [&](auto &all) { named(all, "seen").dtype = Dtype::f64; });
  damaged("no int64 seen", [&](auto &all) { named(all, "seen").shape = {}; });
  damaged("it has 0 sequences", [&](auto &all) { named(all, "seen").shape = {0}; });
  damaged("0.taps is not", [&](auto &all) {
    named(all, "seen") = {Dtype::i64, {2}, reinterpret_cast<const std::byte *>(many)};
  });
  damaged("negative", [&](auto &all) {
    named(all, "seen").data = reinterpret_cast<const std::byte *>(&negative);
  });
  for (const std::int64_t &seen : too_long)
    damaged("above 2^62", [&](auto &all) {
      named(all, "seen").data = reinterpret_cast<const std::byte *>(&seen);
    });
  damaged("it has 6 tensors, and not 7", [&](auto &all) { all.erase(all.begin()); });
  damaged("it lacks 1.psi", [&](auto &all) {
    for (auto &each : all)
      if (each.first == "1.psi") each.first = "2.psi";
  });
  damaged("1.psi is not float32 (1, 4, 2, 5, 3)",
          [&](auto &all) { named(all, "1.psi").shape = {1, 4, 2, 3, 5}; });
  const State state = model.read({1, 2});
  save_state(state, path);
  Sizes other = small_sizes();
  other.layers = 3;
  refused("tensors", other);
  other = small_sizes();
  other.heads = 2;
  refused("is not float32", other);
  write_file(path, "nothing");
  refused("too short", s);
  CHECK_THROWS_AS(load_state(s, model.folder.file("none")), CheckpointError);
}

}  // namespace
}  // namespace bkcore::engine
