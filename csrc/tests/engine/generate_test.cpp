// Sequences of a batch get the tokens that they would get alone, however the others end.

#include "engine/generate.h"

#include <doctest/doctest.h>

#include <map>

#include "checkpoint.h"

namespace bkcore::engine {
namespace {

using Tokens = std::vector<std::int64_t>;

struct Opened {
  Folder folder;
  std::unique_ptr<Engine> engine;

  explicit Opened(Format format = Format::f32) {
    Checkpoint(small_sizes(), format, 3).save(folder.path());
    engine = std::make_unique<Engine>(folder.path(), 1, "");
  }
};

Generation settings(Index most, std::uint64_t seed = 5) {
  Generation out;
  out.most = most, out.seed = seed;
  out.sampling.temperature = 1.5, out.sampling.repetition_penalty = 1.2;
  return out;
}

// By sampling and reading one token after the other.
Tokens by_hand(Engine &engine, const Tokens &prompt, const Generation &wanted, State &state) {
  std::vector<float> logits(static_cast<std::size_t>(engine.sizes().vocabulary));
  Sampler sampler(engine.sizes().vocabulary, wanted.sampling, wanted.seed);
  sampler.see(prompt.data(), static_cast<Index>(prompt.size()));
  engine.read(state, static_cast<Index>(prompt.size()), prompt.data(), logits.data());
  Tokens out;
  while (true) {
    out.push_back(sampler.sample(logits.data()));
    const bool stops =
        std::find(wanted.stops.begin(), wanted.stops.end(), out.back()) != wanted.stops.end();
    if (stops || static_cast<Index>(out.size()) == wanted.most) return out;
    engine.read(state, 1, &out.back(), logits.data());
  }
}

void same_state(const State &all, Index sequence, const State &one) {
  const State picked = select(all, &sequence, 1);
  for (std::size_t l = 0; l < one.layers().size(); ++l) {
    CHECK(picked.layers()[l].taps == one.layers()[l].taps);
    CHECK(picked.layers()[l].g == one.layers()[l].g);
    CHECK(picked.layers()[l].psi == one.layers()[l].psi);
  }
  CHECK(picked.seen() == one.seen());
}

TEST_CASE("sequences that end at different times do not change each other") {
  for (const Format format : {Format::f32, Format::int4}) {
    Opened model(format);
    const std::vector<Tokens> prompts = {{1, 2, 3}, {4, 5, 6}, {7, 8, 9}, {1, 2, 3}};
    Tokens flat;
    for (const Tokens &prompt : prompts) flat.insert(flat.end(), prompt.begin(), prompt.end());
    Generation wanted = settings(12);
    State state(model.engine->sizes(), 4);
    std::map<Index, Tokens> found;
    // The first ends after 5 tokens, the third after 2.
    generate(*model.engine, state, 3, flat.data(), wanted, [&](Index b, std::int64_t token) {
      found[b].push_back(token);
      return found[b].size() < (b == 0 ? 5 : b == 2 ? 2 : 100);
    });
    for (Index b = 0; b < 4; ++b) {
      CAPTURE(b);
      Generation alone = wanted;
      alone.seed += static_cast<std::uint64_t>(b);
      alone.most = b == 0 ? 5 : b == 2 ? 2 : 12;
      State one(model.engine->sizes(), 1);
      CHECK(found[b] == by_hand(*model.engine, prompts[b], alone, one));
      same_state(state, b, one);
    }
    CHECK(state.seen() == Tokens{7, 14, 4, 14});
    CHECK(found[0] != found[3]);  // another seed
  }
}

TEST_CASE("a stop token ends its sequence, which gets it") {
  Opened model;
  const Tokens prompt = {1, 2, 1, 2};
  State one(model.engine->sizes(), 1);
  const Tokens long_one = by_hand(*model.engine, {1, 2}, settings(9), one);
  Generation wanted = settings(9);
  wanted.stops = {22, long_one[4]};
  State state(model.engine->sizes(), 2);
  std::map<Index, Tokens> found;
  generate(*model.engine, state, 2, prompt.data(), wanted, [&](Index b, std::int64_t token) {
    found[b].push_back(token);
    return true;
  });
  for (Index b = 0; b < 2; ++b) {
    Generation alone = wanted;
    alone.seed += static_cast<std::uint64_t>(b);
    State again(model.engine->sizes(), 1);
    CHECK(found[b] == by_hand(*model.engine, {1, 2}, alone, again));
    same_state(state, b, again);
  }
  CHECK(found[0].size() <= 5);
}

TEST_CASE("an exception of the callback leaves a state that goes on") {
  Opened model;
  const Tokens prompt = {1, 2, 3, 4};
  State state(model.engine->sizes(), 2);
  std::map<Index, Tokens> found;
  CHECK_THROWS_AS(generate(*model.engine, state, 2, prompt.data(), settings(20),
                           [&](Index b, std::int64_t token) {
                             found[b].push_back(token);
                             if (found[1].size() == 6) throw std::runtime_error("enough");
                             return b == 1 || found[b].size() < 3;
                           }),
                  std::runtime_error);
  CHECK(state.seen() == Tokens{4, 7});
  for (Index b = 0; b < 2; ++b) {
    Generation alone = settings(b == 0 ? 3 : 6, 5 + static_cast<std::uint64_t>(b));
    State one(model.engine->sizes(), 1);
    CHECK(found[b] == by_hand(*model.engine, {prompt[2 * b], prompt[2 * b + 1]}, alone, one));
    same_state(state, b, one);
  }
}

TEST_CASE("a token that cannot be chosen ends a round before anyone gets one") {
  Opened model;
  const Tokens prompt = {1, 2, 3, 4, 5, 6};
  for (const Index broken : {0, 1, 2}) {
    CAPTURE(broken);
    State state(model.engine->sizes(), 3);
    std::map<Index, Tokens> found;
    const auto on_token = [&](Index b, std::int64_t token) {
      found[b].push_back(token);
      return true;
    };
    // A round goes well, and then one sequence has NaN.
    Generation one = settings(1);
    generate(*model.engine, state, 2, prompt.data(), one, on_token);
    state.layers()[0].psi[broken * static_cast<Index>(state.layers()[0].psi.size()) / 3] = NAN;
    const Tokens last = {found[0][0], found[1][0], found[2][0]};
    CHECK_THROWS_WITH_AS(generate(*model.engine, state, 1, last.data(), settings(5), on_token),
                         doctest::Contains("is nan"), Error);
    for (Index b = 0; b < 3; ++b) {
      CHECK(found[b].size() == 1);
      CHECK(state.seen()[b] == 3);  // the prompt, and the token
    }
  }
}

TEST_CASE("after an exception, sequences without a token of the round have read all of theirs") {
  Opened model;
  const Tokens prompt = {1, 2, 3, 4};
  for (const Index last_row : {0, 1}) {
    State state(model.engine->sizes(), 2);
    std::map<Index, Tokens> found;
    CHECK_THROWS_AS(generate(*model.engine, state, 2, prompt.data(), settings(20),
                             [&](Index b, std::int64_t token) {
                               found[b].push_back(token);
                               if (found[b].size() == 3 && b == last_row)
                                 throw std::runtime_error("enough");
                               return true;
                             }),
                    std::runtime_error);
    CHECK(found[0].size() == 3);
    CHECK(found[1].size() == (last_row ? 3 : 2));
    CHECK(state.seen() == Tokens{4, 4});
    for (Index b = 0; b < 2; ++b) {
      Generation alone = settings(3, 5 + static_cast<std::uint64_t>(b));
      State one(model.engine->sizes(), 1);
      const Tokens wanted = by_hand(*model.engine, {prompt[2 * b], prompt[2 * b + 1]}, alone, one);
      CHECK(std::equal(found[b].begin(), found[b].end(), wanted.begin()));
      same_state(state, b, one);
    }
  }
}

TEST_CASE("the callback may use the engine") {
  Opened model;
  const Tokens prompt = {1, 2};
  State state(model.engine->sizes(), 1), other(model.engine->sizes(), 1);
  generate(*model.engine, state, 2, prompt.data(), settings(5), [&](Index, std::int64_t token) {
    model.engine->read(other, 1, &token, nullptr);
    return true;
  });
  CHECK(other.seen() == Tokens{5});
}

TEST_CASE("what cannot be generated is refused before anything is read") {
  Opened model;
  const Tokens prompt = {1, 2};
  State state(model.engine->sizes(), 1);
  const auto refused = [&](const Generation &wanted, Index sites = 2) {
    CHECK_THROWS_AS(generate(*model.engine, state, sites, prompt.data(), wanted,
                             [](Index, std::int64_t) { return true; }),
                    InputError);
    CHECK(state.seen() == Tokens{0});
  };
  refused(settings(0));
  refused(settings(5), 0);
  Generation wanted = settings(5);
  wanted.stops = {23};
  refused(wanted);
  wanted = settings(5);
  wanted.sampling.top_p = 2;
  refused(wanted);
}

}  // namespace
}  // namespace bkcore::engine
