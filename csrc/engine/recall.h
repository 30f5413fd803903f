// Resolvent attention with what a layer computes around it, over some sites of a batch of
// sequences. Formulas and layout: src/bkcore/kernels/recall.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../isa.h"
#include "../rounding.h"
#include "../sweep.h"
#include "../threads.h"
#include "workers.h"

namespace bkcore::engine {
namespace {

// All arrays are contiguous; rows are those of (batch, sites). `groups` counts groups of
// neighbouring heads, which share query and key.
struct Recall {
  Index batch, sites, heads, groups, keys, values;
  const float *gate, *barrier;       // (rows, heads)
  const float *query, *key;          // (rows, groups, keys)
  const float *value;                // (rows, heads, values)
  const float *rate, *height, *eta;  // (heads)
  const float *weight;               // (3, heads, values)
  const float *g, *psi;              // (batch, heads, 2), (batch, heads, 2, keys, values)
  // For gate, barrier, query, key, value, and Re and Im of what is found; or none.
  std::vector<RoundChannels> rounding;
  float *features;           // (rows, heads, values)
  float *next_g, *next_psi;  // as g and psi, and may be the same memory
};

// The steps of one call, in scratch memory of the calling thread.
class RecallRun {
 public:
  RecallRun(const Isa &isa, Workers &workers, const Recall &recall)
      : isa_(isa),
        workers_(workers),
        call_(recall),
        rows_(recall.batch * recall.sites),
        attention_{recall.batch, recall.sites, recall.heads, recall.keys, recall.values, 1} {
    const Index heads = call_.heads, width = heads * call_.values;
    const Index shared = call_.groups * call_.keys;
    const Index used =
        rows_ * (6 * heads + 2 * shared + 2 * heads * call_.keys + 7 * width) + heads;
    static thread_local std::vector<std::byte> memory;
    free_ = static_cast<float *>(aligned(memory, used * sizeof(float)));
  }

  void run() {
    prepare();
    const auto kernel = kernels<float>(isa_).attention;
    const Index products = rows_ * call_.heads * call_.keys * call_.values;
    workers_.each(products >= 8 * kElementsPerThread, call_.batch * call_.heads, [&](Index chain) {
      const Index batch = chain / call_.heads, head = chain % call_.heads;
      kernel(attention_, batch, head);
      for (Index i = 0; i < call_.sites; ++i)
        over_memory((batch * call_.sites + i) * call_.heads + head, call_.eta[head]);
    });
    keep_g();
    const Index width = call_.heads * call_.values;
    const float *real = rounded(5, real_), *imag = rounded(6, imag_);
    const float *a = call_.weight, *b = a + width, *c = b + width;
    for (Index row = 0; row < rows_; ++row)
      for (Index u = 0; u < width; ++u) {
        const Index at = row * width + u;
        call_.features[at] = a[u] * attention_.value[at] + b[u] * real[at] + c[u] * imag[at];
      }
  }

 private:
  // Rounds the inputs of the attention.
  void prepare() {
    const Index heads = call_.heads;
    const float *gate = rounded(0, call_.gate), *barrier = rounded(1, call_.barrier);
    attention_.query = for_every_head(rounded(2, call_.query));
    attention_.key = for_every_head(rounded(3, call_.key));
    attention_.value = rounded(4, call_.value);
    float *hopping = take(heads), *diagonal = take(heads), *energy = free_;
    std::fill_n(energy, heads, 0.0F);
    free_ += heads;
    for (Index at = 0; at < rows_ * heads; ++at)
      dynamics(at, gate[at], barrier[at], hopping + at, diagonal + at);
    attention_.v = diagonal, attention_.hopping = hopping, attention_.energy = energy;
    attention_.eta = call_.eta, attention_.first_g = call_.g, attention_.first_psi = call_.psi;
    attention_.g = take(2 * heads), attention_.psi = call_.next_psi;
    attention_.out = take(2 * heads * call_.values);
    real_ = take(heads * call_.values), imag_ = take(heads * call_.values);
  }

  float *take(Index channels) {
    float *const taken = free_;
    free_ += rows_ * channels;
    return taken;
  }

  const float *rounded(Index part, const float *x) {
    if (call_.rounding.empty()) return x;
    RoundChannels r = call_.rounding[part];
    r.x = x, r.out = take(r.channels);
    isa_.rounding.round_channels(r, 0, rows_, scratch);
    return r.out;
  }

  // Copies what groups of heads share to every head: (rows, groups, keys) -> (rows, heads, keys).
  const float *for_every_head(const float *x) {
    if (call_.groups == call_.heads) return x;
    const Index heads_of_a_group = call_.heads / call_.groups, keys = call_.keys;
    float *const out = take(call_.heads * keys);
    for (Index at = 0; at < rows_ * call_.heads; ++at)
      std::copy_n(x + at / heads_of_a_group * keys, keys, out + at * keys);
    return out;
  }

  void dynamics(Index at, double gate, double barrier, float *hopping, float *diagonal) const {
    const Index head = at % call_.heads, row = at / call_.heads;
    const double rate = call_.rate[head], height = call_.height[head];
    const double sigmoid = 1 / (1 + std::exp(-gate));
    const auto t = static_cast<float>(std::exp(-2 * rate * sigmoid));
    const double softplus = barrier > 20 ? barrier : std::log1p(std::exp(barrier));
    *hopping = t * (row % call_.sites || has_begun(row / call_.sites, head) ? 1.0F : 0.0F);
    *diagonal = 1 + *hopping * *hopping + static_cast<float>(height * softplus);
  }

  bool has_begun(Index batch, Index head) const {
    const float *g = call_.g + 2 * (batch * call_.heads + head);
    return g[0] != 0 || g[1] != 0;
  }

  void over_memory(Index at, float eta) {
    const Index values = call_.values;
    const float *found = attention_.out + 2 * at * values;
    const float w = attention_.g[2 * at + 1] / eta, root = std::sqrt(w);
    for (Index u = 0; u < values; ++u) {
      real_[at * values + u] = found[u] / root;
      imag_[at * values + u] = found[values + u] / eta / (w * root);
    }
  }

  // The last g of every sequence is part of its state.
  void keep_g() {
    const Index size = 2 * call_.heads;
    for (Index b = 0; b < call_.batch; ++b)
      std::copy_n(attention_.g + ((b + 1) * call_.sites - 1) * size, size, call_.next_g + b * size);
  }

  const Isa &isa_;
  Workers &workers_;
  const Recall &call_;
  Index rows_;
  Attention<float> attention_;
  float *free_, *real_, *imag_;
};

}  // namespace
}  // namespace bkcore::engine
