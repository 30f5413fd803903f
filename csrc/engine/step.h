// One token of a batch of sequences through the model.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../isa.h"
#include "../recall_step.h"
#include "../run_codes.h"
#include "../scales.h"
#include "model.h"

namespace bkcore::engine {
namespace {

// What the layers remember of a batch of sequences: fields as in bkcore.model.state.LayerState.
struct LayerState {
  std::vector<float> taps;  // (batch, taps - 1, mixed)
  std::vector<float> g;     // (batch, heads, 2)
  std::vector<float> psi;   // (batch, heads, 2, keys, values)
};

struct State {
  Index batch;
  std::vector<LayerState> layers;
  std::vector<Index> seen;  // (batch)

  State(const Sizes &s, Index sequences) : batch(sequences), layers(s.layers), seen(sequences) {
    for (LayerState &layer : layers) {
      layer.taps.resize(batch * (s.taps - 1) * s.mixed());
      layer.g.resize(batch * s.heads * 2);
      layer.psi.resize(batch * s.heads * s.state());
    }
  }
};

class Stepper {
 public:
  Stepper(const Model &model, const Isa &isa, const Functions &functions, Index threads)
      : model_(model), s_(model.sizes()), isa_(isa), f_(functions), threads_(threads) {}

  // Reads one token of every sequence, and writes the logits of the next, (batch, vocabulary).
  void step(State &state, const std::int64_t *tokens, float *logits) {
    const Index batch = state.batch;
    resize(batch);
    for (Index b = 0; b < batch; ++b) embed(tokens[b], hidden_.data() + b * s_.width);
    for (Index l = 0; l < s_.layers; ++l) layer(model_.layers[l], state.layers[l], batch);
    for (Index b = 0; b < batch; ++b) {
      f_.rms_norm(row(hidden_, b, s_.width), model_.final_norm.data(), s_.width, s_.eps,
                  row(normed_, b, s_.width));
      ++state.seen[b];
    }
    multiply(model_.embedding, batch, normed_.data(), logits);
  }

 private:
  static float *row(std::vector<float> &x, Index b, Index width) { return x.data() + b * width; }

  void resize(Index batch) {
    hidden_.resize(batch * s_.width), normed_.resize(batch * s_.width);
    projected_.resize(batch * s_.projected()), mixed_.resize(batch * s_.mixed());
    gathered_.resize(batch * (2 * s_.heads + 2 * s_.key_width() + s_.value_width()));
    features_.resize(batch * s_.value_width()), scores_.resize(batch * s_.experts);
    update_.resize(batch * s_.width), up_.resize(batch * s_.hidden);
    down_.resize(batch * s_.width);
  }

  void embed(std::int64_t token, float *out) const {
    const Matrix &m = model_.embedding;
    if (m.in_codes) {
      const Product &p = m.codes;
      const Index bytes = p.bits == 8 ? p.inputs : (p.inputs + 1) / 2;
      const std::uint8_t *codes = p.weight + token * bytes;
      for (Index k = 0; k < p.inputs; ++k) {
        const int nibble = codes[k / 2] >> (k % 2 * 4) & 0xF;
        const int code = p.bits == 8 ? static_cast<std::int8_t>(codes[k])
                                     : kLevel[((nibble ^ 8) - 8) + 8];
        const float scale = from_bfloat16(p.scales[token * p.groups + k / p.group_size]);
        out[k] = static_cast<float>(code) * scale * s_.embedding_multiplier;
      }
    } else {
      f_.row(m.dense, token, out);
      for (Index k = 0; k < s_.width; ++k) out[k] *= s_.embedding_multiplier;
    }
  }

  void multiply(const Matrix &m, Index rows, const float *x, float *out) {
    if (m.in_codes) {
      Product p = m.codes;
      p.rows = rows, p.x = x, p.out = out;
      run_product(isa_, threads_, p);
    } else {
      for (Index b = 0; b < rows; ++b)
        f_.multiply(m.dense, x + b * m.inputs, 0, m.outputs, out + b * m.outputs);
    }
  }

  void layer(const Layer &layer, LayerState &state, Index batch) {
    for (Index b = 0; b < batch; ++b)
      f_.rms_norm(row(hidden_, b, s_.width), layer.mixer_norm.data(), s_.width, s_.eps,
                  row(normed_, b, s_.width));
    multiply(layer.in_proj, batch, normed_.data(), projected_.data());
    mix(layer, state, batch);
    multiply(layer.out_proj, batch, features_.data(), update_.data());
    for (Index i = 0; i < batch * s_.width; ++i) hidden_[i] += update_[i];
    for (Index b = 0; b < batch; ++b)
      f_.rms_norm(row(hidden_, b, s_.width), layer.experts_norm.data(), s_.width, s_.eps,
                  row(normed_, b, s_.width));
    serve(layer, batch);
  }

  void mix(const Layer &layer, LayerState &state, Index batch) {
    const Index mixed = s_.mixed(), width = s_.value_width(), keys = s_.key_width();
    float *gate = gathered_.data(), *barrier = gate + batch * s_.heads;
    float *query = barrier + batch * s_.heads, *key = query + batch * keys;
    float *value = key + batch * keys;
    for (Index b = 0; b < batch; ++b) {
      const float *x = row(projected_, b, s_.projected());
      float *before = state.taps.data() + b * (s_.taps - 1) * mixed, *out = row(mixed_, b, mixed);
      f_.convolve(before, x, layer.taps.data(), s_.taps, mixed, out);
      if (s_.taps > 1) {
        std::memmove(before, before + mixed, (s_.taps - 2) * mixed * sizeof(float));
        std::memcpy(before + (s_.taps - 2) * mixed, x, mixed * sizeof(float));
      }
      for (Index g = 0; g < 2 * s_.groups; ++g)
        f_.unit_length(out + width + g * s_.keys, s_.keys, s_.eps);
      std::copy_n(out, width, value + b * width);
      std::copy_n(out + width, keys, query + b * keys);
      std::copy_n(out + width + keys, keys, key + b * keys);
      std::copy_n(x + mixed + width, s_.heads, gate + b * s_.heads);
      std::copy_n(x + mixed + width + s_.heads, s_.heads, barrier + b * s_.heads);
    }
    RecallStep step{batch, s_.heads, s_.groups, s_.keys, s_.values, gate, barrier, query, key,
                    value, layer.rate.data(), layer.height.data(), layer.eta.data(),
                    layer.features.data(), state.g.data(), state.psi.data(), {},
                    features_.data(), state.g.data(), state.psi.data()};
    for (const Rounding &r : layer.rounding)
      step.rounding.push_back({batch, r.channels, s_.core_bits, r.group_size, nullptr,
                               r.scale.data(), r.zero.data(),
                               r.levels.empty() ? nullptr : r.levels.data(), nullptr});
    run_recall_step(isa_, threads_, step);
    for (Index b = 0; b < batch; ++b) {
      float *out = row(features_, b, width);
      f_.gated(out, row(projected_, b, s_.projected()) + mixed, width, out);
    }
  }

  void serve(const Layer &layer, Index batch) {
    if (layer.router.empty()) {
      run_expert(layer.experts[0], batch, normed_.data(), update_.data());
      for (Index i = 0; i < batch * s_.width; ++i) hidden_[i] += update_[i];
      return;
    }
    const Dense router{Dense::Kind::f32, s_.experts, s_.width, layer.router.data()};
    for (Index b = 0; b < batch; ++b) {
      float *scores = row(scores_, b, s_.experts);
      const float *x = row(normed_, b, s_.width);
      f_.multiply(router, x, 0, s_.experts, scores);
      f_.softmax(scores, s_.experts);
      choose(scores);
      float *out = row(update_, b, s_.width);
      for (Index i = 0; i < s_.experts_per_token; ++i) {
        run_expert(layer.experts[chosen_[i]], 1, x, down_.data());
        for (Index k = 0; k < s_.width; ++k) {
          const float term = down_[k] * weights_[i];
          out[k] = i ? out[k] + term : term;
        }
      }
      for (Index k = 0; k < s_.width; ++k) hidden_[b * s_.width + k] += out[k];
    }
  }

  // The experts of the highest probabilities, the first of equals first, and their shares.
  void choose(float *probabilities) {
    chosen_.resize(s_.experts_per_token), weights_.resize(s_.experts_per_token);
    float total = 0;
    for (Index i = 0; i < s_.experts_per_token; ++i) {
      float *const best = std::max_element(probabilities, probabilities + s_.experts);
      chosen_[i] = best - probabilities, weights_[i] = *best;
      total = i ? total + *best : *best;
      *best = -1;
    }
    for (float &weight : weights_) weight /= total;
  }

  void run_expert(const Expert &expert, Index rows, const float *x, float *out) {
    multiply(expert.up, rows, x, up_.data());
    f_.silu(up_.data(), rows * s_.hidden, up_.data());
    multiply(expert.down, rows, up_.data(), out);
  }

  const Model &model_;
  const Sizes &s_;
  const Isa &isa_;
  const Functions &f_;
  Index threads_;
  std::vector<float> hidden_, normed_, projected_, mixed_, gathered_, features_, scores_, update_;
  std::vector<float> up_, down_, weights_;
  std::vector<Index> chosen_;
};

}  // namespace
}  // namespace bkcore::engine
