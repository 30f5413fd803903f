// One site of resolvent attention with everything that the language model does around it. Formulas
// and layout: src/bkcore/kernels/recall.py and ops/recall_step.py. Threads share the chains; the
// rest is too little work to share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "isa.h"
#include "rounding.h"
#include "run_attention.h"
#include "sweep.h"
#include "threads.h"

namespace bkcore {
namespace {

// All tensors are contiguous. `groups` counts groups of neighbouring heads, which share query and
// key.
struct RecallStep {
  Index batch, heads, groups, keys, values;
  const float *gate, *barrier;       // (batch, heads)
  const float *query, *key;          // (batch, groups, keys)
  const float *value;                // (batch, heads, values)
  const float *rate, *height, *eta;  // (heads)
  const float *weight;               // (3, heads, values)
  const float *g, *psi;              // (batch, heads, 2), (batch, heads, 2, keys, values)
  // For gate, barrier, query, key, value, and Re and Im of the output of the attention; or none.
  std::vector<RoundChannels> rounding;
  float *features;           // (batch, heads, values)
  float *next_g, *next_psi;  // as g and psi
};

// The steps of one call, in scratch memory of the calling thread.
class RecallStepRun {
 public:
  RecallStepRun(const Isa &isa, const RecallStep &step)
      : isa_(isa),
        step_(step),
        chains_(step.batch * step.heads),
        attention_{step.batch, 1, step.heads, step.keys, step.values, 1} {
    const Index heads = step.heads, width = heads * step.values, shared = step.groups * step.keys;
    const Index used =
        step.batch * (4 * heads + 2 * shared + 2 * heads * step.keys + 7 * width) + heads;
    static thread_local std::vector<std::byte> memory;
    free_ = static_cast<float *>(aligned(memory, used * sizeof(float)));
  }

  void run(Index threads) {
    prepare();
    for_chains(attention_, threads, [&](Index b, Index h) {
      kernels<float>(isa_).attention(attention_, b, h);
      over_memory(b * step_.heads + h, step_.eta[h]);
    });
    const Index width = step_.heads * step_.values;
    const float *real = rounded(5, real_), *imag = rounded(6, imag_);
    const float *a = step_.weight, *b = a + width, *c = b + width;
    for (Index row = 0; row < step_.batch; ++row)
      for (Index u = 0; u < width; ++u) {
        const Index at = row * width + u;
        step_.features[at] = a[u] * attention_.value[at] + b[u] * real[at] + c[u] * imag[at];
      }
  }

 private:
  // Rounds the inputs of the attention.
  void prepare() {
    const float *gate = rounded(0, step_.gate), *barrier = rounded(1, step_.barrier);
    attention_.query = for_every_head(rounded(2, step_.query));
    attention_.key = for_every_head(rounded(3, step_.key));
    attention_.value = rounded(4, step_.value);
    float *hopping = take(step_.heads), *diagonal = take(step_.heads), *energy = free_;
    std::fill_n(energy, step_.heads, 0.0F);
    free_ += step_.heads;
    for (Index chain = 0; chain < chains_; ++chain)
      dynamics(chain, gate[chain], barrier[chain], hopping + chain, diagonal + chain);
    attention_.v = diagonal, attention_.hopping = hopping, attention_.energy = energy;
    attention_.eta = step_.eta, attention_.first_g = step_.g, attention_.first_psi = step_.psi;
    attention_.g = step_.next_g, attention_.psi = step_.next_psi;
    attention_.out = take(2 * step_.heads * step_.values);
    real_ = take(step_.heads * step_.values), imag_ = take(step_.heads * step_.values);
  }

  float *take(Index channels) {
    float *const taken = free_;
    free_ += step_.batch * channels;
    return taken;
  }

  const float *rounded(Index part, const float *x) {
    if (step_.rounding.empty()) return x;
    RoundChannels r = step_.rounding[part];
    r.x = x, r.out = take(r.channels);
    isa_.rounding.round_channels(r, 0, step_.batch, scratch);
    return r.out;
  }

  // Copies what groups of heads share to every head: (batch, groups, keys) -> (batch, heads, keys).
  const float *for_every_head(const float *x) {
    if (step_.groups == step_.heads) return x;
    const Index heads_of_a_group = step_.heads / step_.groups, keys = step_.keys;
    float *const out = take(step_.heads * keys);
    for (Index chain = 0; chain < chains_; ++chain)
      std::copy_n(x + chain / heads_of_a_group * keys, keys, out + chain * keys);
    return out;
  }

  void dynamics(Index chain, double gate, double barrier, float *hopping, float *diagonal) const {
    const Index head = chain % step_.heads;
    const double rate = step_.rate[head], height = step_.height[head];
    const bool begun = step_.g[2 * chain] != 0 || step_.g[2 * chain + 1] != 0;
    const double sigmoid = 1 / (1 + std::exp(-gate));
    const float t = static_cast<float>(std::exp(-2 * rate * sigmoid));
    const double softplus = barrier > 20 ? barrier : std::log1p(std::exp(barrier));
    *hopping = t * (begun ? 1.0F : 0.0F);
    *diagonal = 1 + *hopping * *hopping + static_cast<float>(height * softplus);
  }

  void over_memory(Index chain, float eta) {
    const Index values = step_.values;
    const float *found = attention_.out + 2 * chain * values;
    const float w = attention_.g[2 * chain + 1] / eta, root = std::sqrt(w);
    for (Index u = 0; u < values; ++u) {
      real_[chain * values + u] = found[u] / root;
      imag_[chain * values + u] = found[values + u] / eta / (w * root);
    }
  }

  const Isa &isa_;
  const RecallStep &step_;
  Index chains_;
  Attention<float> attention_;
  float *free_, *real_, *imag_;
};

// Returns false, without a result, if an eta is not positive. NaN is passed on.
inline bool run_recall_step(const Isa &isa, Index threads, const RecallStep &step) {
  if (std::any_of(step.eta, step.eta + step.heads, [](float x) { return x <= 0; })) return false;
  RecallStepRun(isa, step).run(threads);
  return true;
}

}  // namespace
}  // namespace bkcore
