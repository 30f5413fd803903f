// How the next token is chosen from logits.
//
// The order is that of `generate` in transformers: repetition penalty, temperature, top-k, top-p,
// min-p, then the draw. Each filter sees the probabilities that the one before it left. Of equal
// logits the lowest token comes first. Only additions, multiplications and divisions are used, in a
// fixed order, and all of them round as IEEE 754 says: the same logits and the same seed give the
// same token on every processor.
#pragma once

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"
#include "float_mode.h"

namespace bkcore::engine {

struct Sampling {
  // Above 0. The logit of a token that was seen is divided by it if positive, else multiplied.
  double repetition_penalty = 1;
  double temperature = 1;  // at least 0, which takes the most probable token
  std::int64_t top_k = 0;  // keeps as many tokens; 0 keeps all
  double top_p = 1;        // 0 to 1: keeps the fewest tokens whose probability is at least this
  double min_p = 0;        // 0 to 1: keeps those at least this times as probable as the first
};

// Throws InputError, with the range and the remedy.
inline void check(const Sampling &s) {
  const auto refuse = [](const char *name, const char *range, const std::string &value,
                         const char *remedy) {
    throw InputError(std::string(name) + " must be " + range + ", not " + value + ": " + remedy);
  };
  if (!(s.repetition_penalty >= FLT_MIN && s.repetition_penalty <= FLT_MAX))
    refuse("repetition_penalty", "a number above 0", shown(s.repetition_penalty),
           "1 is none, 1.2 a strong one");
  if (!(s.temperature >= 0 && s.temperature <= DBL_MAX))
    refuse("temperature", "a number of at least 0", shown(s.temperature),
           "0 takes the most probable token, 1 draws as the model predicts");
  if (s.top_k < 0) refuse("top_k", "at least 0", std::to_string(s.top_k), "0 keeps all tokens");
  if (!(s.top_p >= 0 && s.top_p <= 1))
    refuse("top_p", "from 0 to 1", shown(s.top_p), "1 keeps all tokens");
  if (!(s.min_p >= 0 && s.min_p <= 1))
    refuse("min_p", "from 0 to 1", shown(s.min_p), "0 keeps all tokens");
}

// Random numbers by xoshiro256** 1.0 (Blackman and Vigna, "Scrambled linear pseudorandom number
// generators", 2021), started by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
// number generators", 2014) as its authors advise.
class Generator {
 public:
  explicit Generator(std::uint64_t seed) {
    for (std::uint64_t &word : state_) {
      seed += 0x9E3779B97F4A7C15;
      std::uint64_t z = seed;
      z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
      z = (z ^ z >> 27) * 0x94D049BB133111EB;
      word = z ^ z >> 31;
    }
  }
  explicit Generator(const std::array<std::uint64_t, 4> &state) : state_(state) {}

  std::uint64_t next() {
    auto &[a, b, c, d] = state_;
    const std::uint64_t result = rotated(b * 5, 7) * 9, t = b << 17;
    c ^= a, d ^= b, b ^= c, a ^= d, c ^= t;
    d = rotated(d, 45);
    return result;
  }

  // One of the multiples of 2^-53 in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  static std::uint64_t rotated(std::uint64_t x, int by) { return x << by | x >> (64 - by); }

  std::array<std::uint64_t, 4> state_;
};

// exp(x) of x <= 0, at most 2 units in the last place from the truth; 0 below -708. The standard
// library's differs from system to system.
inline double exponential(double x) {
  if (!(x > -708)) return 0;
  // x = n ln 2 + r, |r| <= ln(2) / 2, with ln 2 in two parts, so that n times the first is exact.
  const double n = (x * 0x1.71547652b82fep0 + 0x1.8p52) - 0x1.8p52;
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  constexpr double kFactorials[] = {1,        1,         2,          6,          24,
                                    120,      720,       5040.,      40320.,     362880.,
                                    3628800., 39916800., 479001600., 6227020800.};
  double sum = 0;
  for (int k = 13; k >= 0; --k) sum = sum * r + 1 / kFactorials[k];
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// Chooses the tokens of one sequence.
class Sampler {
 public:
  // Throws InputError if a setting or the vocabulary is out of range.
  Sampler(std::int64_t vocabulary, const Sampling &sampling, std::uint64_t seed)
      : sampling_(sampling), generator_(seed) {
    check(sampling);
    if (vocabulary < 1 || vocabulary > INT32_MAX)
      throw InputError("a vocabulary has 1 to 2^31 - 1 tokens, not " + std::to_string(vocabulary));
    seen_.resize(static_cast<std::size_t>(vocabulary));
  }

  std::int64_t vocabulary() const { return static_cast<std::int64_t>(seen_.size()); }

  // Has the repetition penalty apply to tokens. Throws InputError, and notes none of them, if one
  // is none of the vocabulary.
  void see(const std::int64_t *tokens, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
      if (tokens[i] < 0 || tokens[i] >= vocabulary())
        throw InputError("token " + std::to_string(tokens[i]) + " is not in [0, " +
                         std::to_string(vocabulary()) + ")");
    for (std::int64_t i = 0; i < count; ++i) seen_[static_cast<std::size_t>(tokens[i])] = true;
  }

  // Chooses a token by logits (vocabulary), and sees it. A draw takes one number of the generator.
  // Throws Error if a logit is NaN or infinity, or all are -infinity, which means a probability of
  // 0.
  std::int64_t sample(const float *logits) {
    const DefaultFloats floats;
    if (sampling_.repetition_penalty != 1) logits = penalized(logits);
    check_possible(logits);
    const std::int64_t token = sampling_.temperature == 0 ? likeliest(logits) : draw(logits);
    see(&token, 1);
    return token;
  }

 private:
  struct Candidate {
    std::int64_t token;
    double weight;  // its logit, and then its probability relative to that of the first
  };

  static bool comes_before(const Candidate &a, const Candidate &b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  }
  static bool comes_after(const Candidate &a, const Candidate &b) { return comes_before(b, a); }

  const float *penalized(const float *logits) {
    const auto penalty = static_cast<float>(sampling_.repetition_penalty);
    penalized_.assign(logits, logits + vocabulary());
    for (std::size_t token = 0; token < seen_.size(); ++token)
      if (seen_[token]) {
        float &x = penalized_[token];
        x = x < 0 ? x * penalty : x / penalty;
      }
    return penalized_.data();
  }

  void check_possible(const float *logits) const {
    std::int64_t above = 0, possible = 0;  // sums, which compilers turn into vectors
    for (std::int64_t token = 0; token < vocabulary(); ++token) {
      above += !(logits[token] <= FLT_MAX);
      possible += logits[token] >= -FLT_MAX;
    }
    if (above) {
      const float *bad =
          std::find_if(logits, logits + vocabulary(), [](float x) { return !(x <= FLT_MAX); });
      throw Error("the logit of token " + std::to_string(bad - logits) + " is " + shown(*bad) +
                  ": the checkpoint or the state holds NaN or infinity, or the penalty is too "
                  "close to 0");
    }
    if (!possible) throw Error("all logits are -infinity, so that no token is possible");
  }

  std::int64_t likeliest(const float *logits) const {
    constexpr std::int64_t kParts = 16;  // maxima beside each other, in vectors
    float part[kParts];
    std::fill_n(part, kParts, -HUGE_VALF);
    std::int64_t token = 0;
    for (; token + kParts <= vocabulary(); token += kParts)
      for (std::int64_t i = 0; i < kParts; ++i)
        part[i] = logits[token + i] > part[i] ? logits[token + i] : part[i];
    float highest = *std::max_element(part, part + kParts);
    for (; token < vocabulary(); ++token) highest = std::max(highest, logits[token]);
    return std::find(logits, logits + vocabulary(), highest) - logits;
  }

  std::int64_t draw(const float *logits) {
    kept_.clear();
    for (std::int64_t token = 0; token < vocabulary(); ++token)
      if (logits[token] >= -FLT_MAX) kept_.push_back({token, logits[token]});
    keep_top_k();
    weigh();
    keep_top_p();
    keep_min_p();
    const double place = generator_.uniform() * sum();
    double below = 0;
    for (const Candidate &c : kept_) {
      below += c.weight;
      if (place < below) return c.token;
    }
    return kept_.back().token;  // the product was rounded up to the sum
  }

  void keep_top_k() {
    const std::int64_t count = sampling_.top_k;
    if (count == 0 || count >= static_cast<std::int64_t>(kept_.size())) return;
    std::nth_element(kept_.begin(), kept_.begin() + count, kept_.end(), comes_before);
    kept_.resize(static_cast<std::size_t>(count));
    put_in_order();
  }

  void weigh() {
    const double highest = std::min_element(kept_.begin(), kept_.end(), comes_before)->weight;
    for (Candidate &c : kept_) c.weight = exponential((c.weight - highest) / sampling_.temperature);
    keep([](const Candidate &c) { return c.weight > 0; });
  }

  void keep_top_p() {
    if (sampling_.top_p == 1) return;
    const double wanted = sampling_.top_p * sum();
    double found = 0;
    auto end = kept_.end();
    std::make_heap(kept_.begin(), end, comes_after);
    do {
      std::pop_heap(kept_.begin(), end, comes_after);
      found += (--end)->weight;
    } while (found < wanted && end != kept_.begin());
    kept_.erase(kept_.begin(), end);
    put_in_order();
  }

  void keep_min_p() {
    keep([&](const Candidate &c) { return c.weight >= sampling_.min_p; });
  }

  template <class Keeps>
  void keep(const Keeps &keeps) {
    const auto goes = [&](const Candidate &c) { return !keeps(c); };
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), goes), kept_.end());
  }

  void put_in_order() {
    std::sort(kept_.begin(), kept_.end(),
              [](const Candidate &a, const Candidate &b) { return a.token < b.token; });
  }

  double sum() const {
    double total = 0;
    for (const Candidate &c : kept_) total += c.weight;
    return total;
  }

  Sampling sampling_;
  Generator generator_;
  std::vector<char> seen_;        // whether a token was, by token
  std::vector<float> penalized_;  // scratch memory
  std::vector<Candidate> kept_;   // by token, from one step to the next
};

}  // namespace bkcore::engine
