// Results do not depend on the mode that a program has set for floats, and it keeps its mode.

#include "engine/float_mode.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "checkpoint.h"
#include "engine/engine.h"
#include "engine/sampling.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bkcore::engine {
namespace {

// Sets a mode and goes back at the end.
class Upward {
 public:
  Upward() { std::fesetround(FE_UPWARD); }
  ~Upward() { std::fesetround(FE_TONEAREST); }
  static bool is_set() { return std::fegetround() == FE_UPWARD; }
};

#if defined(__x86_64__)
class WithoutSubnormals {
 public:
  WithoutSubnormals() { _mm_setcsr(_mm_getcsr() | kBits); }
  ~WithoutSubnormals() { _mm_setcsr(_mm_getcsr() & ~kBits); }
  static bool is_set() { return (_mm_getcsr() & kBits) == kBits; }

 private:
  static constexpr unsigned kBits = 0x8040;  // flush to zero, and take them for zero
};
#endif

// A model in whose way there are subnormal numbers: the embedding of token 1, and an eta.
Checkpoint checkpoint(Format format) {
  Checkpoint out(shared_sizes(), format, 1);
  for (Checkpoint::Part &part : out.parts) {
    const auto set = [&](Index at, float x) { std::memcpy(&part.data[at * 4], &x, sizeof x); };
    if (part.dtype == Dtype::f32 && part.name == "embedding.weight")
      for (Index k = 0; k < part.shape[1]; ++k)
        set(part.shape[1] + k, 1e-42F * static_cast<float>(k));
    if (part.dtype == Dtype::f32 && part.name == "layers.0.mixer.log_eta") set(0, -100);
  }
  return out;
}

std::vector<float> logits_of(const std::string &folder, Index threads) {
  Engine engine(folder, threads, "");
  const Sizes &s = engine.sizes();
  std::vector<std::int64_t> tokens(256);
  for (Index i = 0; i < 256; ++i) tokens[i] = i % 3 ? i % s.vocabulary : 1;
  State state(s, 2);
  std::vector<float> logits(static_cast<std::size_t>(256 * s.vocabulary));
  engine.read(state, 128, tokens.data(), logits.data(), true);
  return logits;
}

template <class Mode>
void changes_nothing() {
  for (const Format format : {Format::f32, Format::int8, Format::int4}) {
    CAPTURE(static_cast<int>(format));
    const Folder folder;
    checkpoint(format).save(folder.path());
    for (const Index threads : {1, 3}) {
      const std::vector<float> wanted = logits_of(folder.path(), threads);
      const Mode mode;
      CHECK(logits_of(folder.path(), threads) == wanted);
      CHECK(Mode::is_set());
    }
  }
}

TEST_CASE("rounding upward changes no logit") { changes_nothing<Upward>(); }

TEST_CASE("rounding upward changes no choice") {
  // The second logit is divided by 3 because it was seen, which gives the first one.
  const float logits[] = {5.0F / 3, 5};
  Sampling greedy;
  greedy.temperature = 0, greedy.repetition_penalty = 3;
  Sampler sampler(2, greedy, 0);
  const std::int64_t seen = 1;
  sampler.see(&seen, 1);
  const Upward mode;
  CHECK(sampler.sample(logits) == 0);
  CHECK(Upward::is_set());
}

TEST_CASE("helpers have a mode of their own") {
  const Upward mode;
  Workers workers(2);
  std::atomic<int> begun{0}, upward{0};
  workers.each(true, 2, [&](Index) {
    begun.fetch_add(1);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (begun.load() < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    upward.fetch_add(Upward::is_set());
  });
  CHECK(begun.load() == 2);
  CHECK(upward.load() == 1);
}

#if defined(__x86_64__)
TEST_CASE("subnormal numbers are kept") {
  changes_nothing<WithoutSubnormals>();
  const float logits[] = {0, 1e-39F};
  Sampling greedy;
  greedy.temperature = 0;
  const WithoutSubnormals mode;
  CHECK(Sampler(2, greedy, 0).sample(logits) == 1);
  CHECK(WithoutSubnormals::is_set());
}
#endif

}  // namespace
}  // namespace bkcore::engine
