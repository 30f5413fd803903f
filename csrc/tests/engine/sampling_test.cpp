// Tokens are chosen as the definitions say, which are written out here a second time, slowly.

#include "engine/sampling.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>

namespace bkcore::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_logits(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> all(count);
  for (float &x : all) x = normal(engine);
  return all;
}

// The probability of every token, in long double and by sorting all of them.
std::vector<double> probabilities(std::vector<float> logits, const Sampling &s,
                                  const std::set<std::int64_t> &seen) {
  const auto penalty = static_cast<float>(s.repetition_penalty);
  for (const std::int64_t t : seen)
    logits[t] = logits[t] < 0 ? logits[t] * penalty : logits[t] / penalty;
  std::vector<std::size_t> order;
  for (std::size_t t = 0; t < logits.size(); ++t)
    if (logits[t] > -kInfinity) order.push_back(t);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  if (s.temperature == 0) order.resize(1);
  if (s.top_k > 0 && s.top_k < static_cast<std::int64_t>(order.size())) order.resize(s.top_k);
  std::map<std::size_t, long double> chance;
  const auto normalize = [&] {
    long double total = 0;
    std::map<std::size_t, long double> kept;
    const long double temperature = s.temperature == 0 ? 1 : s.temperature;
    for (const std::size_t t : order)
      total += kept[t] =
          std::exp((static_cast<long double>(logits[t]) - logits[order[0]]) / temperature);
    for (auto &[t, p] : kept) p /= total;
    chance.swap(kept);
  };
  normalize();
  long double found = 0;
  for (std::size_t n = 0; n < order.size(); ++n) {
    found += chance[order[n]];
    if (found >= s.top_p) order.resize(n + 1);
  }
  normalize();
  const long double least = s.min_p * chance[order[0]];
  while (chance[order.back()] < least) order.pop_back();
  normalize();
  std::vector<double> out(logits.size());
  for (const auto &[t, p] : chance) out[t] = static_cast<double>(p);
  return out;
}

void same_as_the_definition(const Sampling &s, const std::set<std::int64_t> &seen, unsigned seed) {
  constexpr int kDraws = 4000;
  const std::vector<float> logits = random_logits(30, seed);
  const std::vector<double> wanted = probabilities(logits, s, seen);
  std::vector<int> found(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    Sampler sampler(30, s, 1000 * seed + i);
    const std::vector<std::int64_t> all(seen.begin(), seen.end());
    sampler.see(all.data(), static_cast<std::int64_t>(all.size()));
    ++found[sampler.sample(logits.data())];
  }
  for (std::size_t t = 0; t < logits.size(); ++t) {
    CAPTURE(t);
    const double p = wanted[t], deviation = std::sqrt(kDraws * p * (1 - p));
    if (p == 0) {
      CHECK(found[t] == 0);
    } else {
      CHECK(std::abs(found[t] - kDraws * p) <= 5 * deviation + 1);
    }
  }
}

TEST_CASE("tokens come as often as the definition says") {
  same_as_the_definition({}, {}, 1);
  same_as_the_definition({1, 0.5, 0, 1, 0}, {}, 2);
  same_as_the_definition({1, 3.0, 7, 1, 0}, {}, 3);
  same_as_the_definition({1, 1.5, 0, 0.7, 0}, {}, 4);
  same_as_the_definition({1, 1.5, 0, 1, 0.1}, {}, 5);
  same_as_the_definition({1.7, 1.2, 0, 1, 0}, {1, 2, 3, 5, 8, 13, 21}, 6);
  same_as_the_definition({0.8, 2.0, 12, 0.9, 0.05}, {0, 4, 29}, 7);
  same_as_the_definition({1.3, 0, 0, 1, 0}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 8);
  same_as_the_definition({1, 1, 0, 0, 0}, {}, 9);
  same_as_the_definition({1, 1, 0, 1, 1}, {}, 10);
}

TEST_CASE("of equal logits the lowest token comes first") {
  const std::vector<float> logits = {1, 3, 3, 0, 3, 2};
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    CHECK(Sampler(6, {1, 0, 0, 1, 0}, seed).sample(logits.data()) == 1);
    CHECK(Sampler(6, {1, 1, 1, 1, 0}, seed).sample(logits.data()) == 1);
    CHECK(Sampler(6, {1, 1, 2, 1, 0}, seed).sample(logits.data()) <= 2);
    CHECK(Sampler(6, {1, 1, 0, 0.01, 0}, seed).sample(logits.data()) == 1);
    CHECK(Sampler(6, {1, 1, 0, 0.5, 0}, seed).sample(logits.data()) <= 2);
  }
}

TEST_CASE("a token that was chosen is penalized, and once") {
  const std::vector<float> logits = {4, 3, -1};
  Sampler sampler(3, {2, 0, 0, 1, 0}, 0);
  CHECK(sampler.sample(logits.data()) == 0);
  CHECK(sampler.sample(logits.data()) == 1);  // 2, 3
  CHECK(sampler.sample(logits.data()) == 0);  // 2, 1.5
  CHECK(sampler.sample(logits.data()) == 0);  // still 2: not a quarter of 4
}

TEST_CASE("impossible tokens are never chosen") {
  std::vector<float> logits(20, -kInfinity);
  logits[7] = -100, logits[11] = -100.5F;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const std::int64_t token = Sampler(20, {}, seed).sample(logits.data());
    CHECK((token == 7 || token == 11));
  }
  logits[7] = 1e30F;  // e^(-1e30) is 0
  CHECK(Sampler(20, {}, 0).sample(logits.data()) == 7);
  CHECK(Sampler(20, {1, 1e-300, 0, 1, 0}, 0).sample(logits.data()) == 7);
}

TEST_CASE("logits that are not finite are an error in words") {
  const auto error_of = [](std::vector<float> logits, const Sampling &s) -> std::string {
    Sampler sampler(3, s, 0);
    const std::int64_t seen = 1;
    sampler.see(&seen, 1);
    try {
      sampler.sample(logits.data());
    } catch (const InputError &) {
      return "of another kind";
    } catch (const Error &error) {
      return error.what();
    }
    return "none";
  };
  const auto has = [](const std::string &text, const char *part) {
    return text.find(part) != std::string::npos;
  };
  for (const double temperature : {0.0, 1.0}) {
    const Sampling s{1, temperature, 0, 1, 0};
    CHECK(has(error_of({1, kNaN, 2}, s), "token 1 is nan"));
    CHECK(has(error_of({1, 2, kInfinity}, s), "token 2 is inf"));
    CHECK(has(error_of({-kInfinity, -kInfinity, -kInfinity}, s), "no token is possible"));
    CHECK(error_of({1, -kInfinity, 2}, s) == "none");
  }
  CHECK(has(error_of({1, 1e38F, 2}, {1e-30, 1, 0, 1, 0}), "token 1 is inf"));
}

TEST_CASE("settings out of range are refused with the range and the value") {
  const double nan = std::nan(""), infinity = HUGE_VAL;
  const auto refused = [](const Sampling &s, const char *name) {
    CAPTURE(name);
    try {
      Sampler(3, s, 0);
      FAIL("it was accepted");
    } catch (const InputError &error) {
      CHECK(std::string(error.what()).find(name) == 0);
    }
  };
  for (const double x : {0.0, -1.0, nan, infinity, 1e-60, 1e60})
    refused({x, 1, 0, 1, 0}, "repetition_penalty must be");
  for (const double x : {-0.1, nan, infinity}) refused({1, x, 0, 1, 0}, "temperature must be");
  refused({1, 1, -1, 1, 0}, "top_k must be at least 0, not -1");
  for (const double x : {-0.1, 1.1, nan})
    refused({1, 1, 0, x, 0}, "top_p must be from 0 to 1, not ");
  for (const double x : {-0.1, 1.1, nan})
    refused({1, 1, 0, 1, x}, "min_p must be from 0 to 1, not ");
  for (const std::int64_t vocabulary : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 31})
    CHECK_THROWS_AS(Sampler(vocabulary, {}, 0), InputError);
  Sampler sampler(3, {}, 0);
  for (const std::int64_t token : {-1, 3}) CHECK_THROWS_AS(sampler.see(&token, 1), InputError);
}

TEST_CASE("the numbers are those of the published generators") {
  // Of xoshiro256** from the state 1, 2, 3, 4, and of SplitMix64 from 1234567.
  Generator generator(std::array<std::uint64_t, 4>{1, 2, 3, 4});
  for (const std::uint64_t wanted :
       {11520ULL, 0ULL, 1509978240ULL, 1215971899390074240ULL, 1216172134540287360ULL,
        607988272756665600ULL, 16172922978634559625ULL, 8476171486693032832ULL,
        10595114339597558777ULL, 2904607092377533576ULL})
    CHECK(generator.next() == wanted);
  Generator started(1234567),
      known(std::array<std::uint64_t, 4>{6457827717110365317ULL, 3203168211198807973ULL,
                                         9817491932198370423ULL, 4593380528125082431ULL});
  for (int i = 0; i < 10; ++i) CHECK(started.next() == known.next());
}

TEST_CASE("uniform numbers are in [0, 1) and even") {
  Generator generator(3);
  constexpr int kCount = 20000;
  int below[10] = {};
  for (int i = 0; i < kCount; ++i) {
    const double x = generator.uniform();
    REQUIRE((x >= 0 && x < 1));
    ++below[static_cast<int>(10 * x)];
  }
  for (const int count : below) CHECK(std::abs(count - kCount / 10) < 5 * std::sqrt(kCount * 0.09));
}

TEST_CASE("the exponential is right to 2 units in the last place") {
  for (int i = 0; i <= 70000; ++i) {
    const double x = -i * 0.0101;
    const long double wanted = std::exp(static_cast<long double>(x));
    REQUIRE(std::abs(exponential(x) - wanted) <= 2 * wanted * 0x1p-53L);
  }
  CHECK(exponential(0) == 1);
  CHECK(exponential(-1000) == 0);
  CHECK(exponential(-HUGE_VAL) == 0);
}

// So that another processor or library that gives other tokens is found out.
TEST_CASE("the same seed gives the same tokens everywhere") {
  const std::vector<float> logits = {0.5F, 1.25F, -0.75F, 2, 0, 1, -3, 0.125F};
  Sampler sampler(8, {1.2, 1.5, 6, 0.95, 0.02}, 42);
  std::vector<std::int64_t> tokens;
  for (int i = 0; i < 16; ++i) tokens.push_back(sampler.sample(logits.data()));
  CHECK(tokens == std::vector<std::int64_t>{0, 3, 4, 7, 7, 5, 4, 5, 5, 3, 4, 1, 5, 1, 4, 5});
}

}  // namespace
}  // namespace bkcore::engine
