// Tokens through the model: any number of sites of a batch of sequences, each of which continues
// from a state. A generated token is a reading of one site.
//
// Whatever the number of sites, sequences and threads, the result has the same bits: products of
// codes are exact, float functions and sums have a fixed order in each row, and the recurrences go
// from site to site.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "../functions.h"
#include "../isa.h"
#include "../run_codes.h"
#include "../scales.h"
#include "model.h"
#include "recall.h"
#include "workers.h"

namespace bkcore::engine {
namespace {

// What a layer remembers of a batch of sequences (bkcore.model.state.LayerState), before and after
// a reading, which may be the same memory.
struct Memory {
  const float *taps, *g, *psi;           // (batch, taps - 1, mixed), (batch, heads, 2),
  float *next_taps, *next_g, *next_psi;  // (batch, heads, 2, keys, values)
};

// Tokens (batch, sites), at least one of each, and where to write logits.
struct Reading {
  Index batch, sites;
  const std::int64_t *tokens;
  std::vector<Memory> layers;
  bool of_all_sites;  // logits (batch, sites, vocabulary); else of the last site, (batch,
                      // vocabulary)
  float *logits;      // null: not wanted
};

// The states of a batch of sequences, in memory of their own.
class State {
 public:
  static constexpr Index kMostSequences = Index{1} << 20;
  static constexpr std::int64_t kMostSeen = std::int64_t{1} << 62;  // tokens of a sequence

  // Throws InputError unless there are 1 to 2^20 sequences.
  State(const Sizes &s, Index batch)
      : sizes_(s), seen_(check_batch(batch)), layers_(static_cast<std::size_t>(s.layers)) {
    for (Layer &layer : layers_) {
      layer.taps.resize(batch * (s.taps - 1) * s.mixed());
      layer.g.resize(batch * s.heads * 2);
      layer.psi.resize(batch * s.heads * s.state());
    }
  }

  // Fields as in bkcore.model.state.LayerState.
  struct Layer {
    std::vector<float> taps, g, psi;
  };

  Index batch() const { return static_cast<Index>(seen_.size()); }
  const Sizes &sizes() const { return sizes_; }  // those of its model
  std::vector<Layer> &layers() { return layers_; }
  const std::vector<Layer> &layers() const { return layers_; }
  std::vector<std::int64_t> &seen() { return seen_; }
  const std::vector<std::int64_t> &seen() const { return seen_; }

  // Throws InputError if it is the state of a model of other sizes.
  void check_fits(const Sizes &s) const {
    const auto part = [](const Sizes &of) {
      return std::array{of.layers, of.taps, of.heads, of.groups, of.keys, of.values};
    };
    if (part(s) != part(sizes_)) throw InputError("the state is that of a model of other sizes");
  }

  // A reading that replaces this state.
  Reading reading(Index sites, const std::int64_t *tokens, bool of_all_sites, float *logits) {
    Reading r{};
    r.batch = batch(), r.sites = sites, r.tokens = tokens;
    r.of_all_sites = of_all_sites, r.logits = logits;
    for (Layer &layer : layers_)
      r.layers.push_back({layer.taps.data(), layer.g.data(), layer.psi.data(), layer.taps.data(),
                          layer.g.data(), layer.psi.data()});
    return r;
  }

  // The number of sequences. Throws InputError unless it is 1 to 2^20.
  static std::size_t check_batch(Index batch) {
    if (batch < 1 || batch > kMostSequences)
      throw InputError("a batch must have 1 to 2^20 sequences, not " + std::to_string(batch));
    return static_cast<std::size_t>(batch);
  }

 private:
  Sizes sizes_;
  std::vector<std::int64_t> seen_;  // tokens that each sequence has read
  std::vector<Layer> layers_;
};

// Reads with a model. Its scratch memory serves one call at a time.
class Reader {
 public:
  Reader(const Model &model, const Isa &isa, Workers &workers)
      : model_(model), s_(model.sizes()), isa_(isa), f_(isa.functions), workers_(workers) {}

  // Throws InputError, and reads nothing, if a token is none of the vocabulary.
  void read(const Reading &reading) {
    for (Index i = 0; i < reading.batch * reading.sites; ++i)
      if (reading.tokens[i] < 0 || reading.tokens[i] >= s_.vocabulary)
        throw InputError("token " + std::to_string(reading.tokens[i]) + " is not in [0, " +
                         std::to_string(s_.vocabulary) + ")");
    for (Index first = 0; first < reading.batch; first += kRows)
      read_sequences(part(reading, first, std::min(kRows, reading.batch - first)));
  }

 private:
  // Rows that are read at once: they share the weights while these are in the caches, and limit the
  // memory that a reading takes, and the pieces of work that there are.
  static constexpr Index kRows = 256;
  static constexpr Index kOutputs = 64;  // of a float product, that a thread takes at a time
  // Products of numbers from which on a second thread saves time; codes take less of it.
  static constexpr Index kSharedCodes = Index{1} << 17, kSharedFloats = Index{1} << 14;

  // The reading of some of its sequences.
  Reading part(const Reading &all, Index first, Index count) const {
    Reading r = all;
    r.batch = count, r.tokens += first * all.sites;
    if (r.logits) r.logits += first * (all.of_all_sites ? all.sites : 1) * s_.vocabulary;
    const Index taps = first * (s_.taps - 1) * s_.mixed(), g = first * s_.heads * 2;
    const Index psi = first * s_.heads * s_.state();
    for (Memory &m : r.layers) {
      m.taps += taps, m.g += g, m.psi += psi;
      m.next_taps += taps, m.next_g += g, m.next_psi += psi;
    }
    return r;
  }

  // Sequences of at most kRows, in blocks of sites.
  void read_sequences(Reading reading) {
    const Index block = kRows / reading.batch;
    for (Index first = 0; first < reading.sites; first += block) {
      read_block(reading, first, std::min(block, reading.sites - first));
      for (Memory &m : reading.layers) m.taps = m.next_taps, m.g = m.next_g, m.psi = m.next_psi;
    }
  }

  void read_block(const Reading &reading, Index first, Index sites) {
    const Index rows = reading.batch * sites, width = s_.width;
    resize(rows);
    for (Index row = 0; row < rows; ++row)
      embed(reading.tokens[row / sites * reading.sites + first + row % sites],
            hidden_.data() + row * width);
    for (Index l = 0; l < s_.layers; ++l)
      pass(model_.layers[l], reading.layers[l], reading.batch, sites);
    if (!reading.logits) return;
    if (reading.of_all_sites) {
      for (Index b = 0; b < reading.batch; ++b)
        write_logits(hidden_.data() + b * sites * width, sites,
                     reading.logits + (b * reading.sites + first) * s_.vocabulary);
    } else if (first + sites == reading.sites) {
      for (Index b = 0; b < reading.batch; ++b)  // the last of each, one after the other
        std::memmove(hidden_.data() + b * width, hidden_.data() + ((b + 1) * sites - 1) * width,
                     width * sizeof(float));
      write_logits(hidden_.data(), reading.batch, reading.logits);
    }
  }

  void write_logits(const float *hidden, Index rows, float *logits) {
    norm(hidden, model_.final_norm, rows);
    multiply(model_.embedding, rows, normed_.data(), logits);
  }

  void resize(Index rows) {
    hidden_.resize(rows * s_.width), normed_.resize(rows * s_.width);
    projected_.resize(rows * s_.projected()), mixed_.resize(rows * s_.mixed());
    gathered_.resize(rows * (2 * s_.heads + 2 * s_.key_width() + s_.value_width()));
    features_.resize(rows * s_.value_width()), update_.resize(rows * s_.width);
    scores_.resize(rows * s_.experts), chosen_.resize(rows * s_.experts_per_token);
    shares_.resize(rows * s_.experts_per_token);
    served_.resize(rows * s_.experts_per_token * s_.width);
    up_.resize(rows * s_.hidden), down_.resize(rows * s_.width);
  }

  void embed(std::int64_t token, float *out) const {
    const Matrix &m = model_.embedding;
    if (m.in_codes) {
      const Product &p = m.codes;
      const Index bytes = p.bits == 8 ? p.inputs : (p.inputs + 1) / 2;
      const std::uint8_t *codes = p.weight + token * bytes;
      for (Index k = 0; k < p.inputs; ++k) {
        const int nibble = codes[k / 2] >> (k % 2 * 4) & 0xF;
        const int code =
            p.bits == 8 ? static_cast<std::int8_t>(codes[k]) : kLevelOfNibble.of[nibble];
        const float scale = from_bfloat16(p.scales[token * p.groups + k / p.group_size]);
        out[k] = static_cast<float>(code) * scale * s_.embedding_multiplier;
      }
    } else {
      f_.row(m.dense, token, out);
      for (Index k = 0; k < s_.width; ++k) out[k] *= s_.embedding_multiplier;
    }
  }

  void norm(const float *x, const std::vector<float> &weight, Index rows) {
    for (Index row = 0; row < rows; ++row)
      f_.rms_norm(x + row * s_.width, weight.data(), s_.width, s_.eps,
                  normed_.data() + row * s_.width);
  }

  // Whether threads share a product. Helpers sleep if layers have nothing for them, and waking them
  // takes longer than half of the last product, so that a layer's first decides about that, too.
  bool shared(const Matrix &m, Index rows) const {
    const Index products = rows * std::min(m.outputs * m.inputs, s_.projected() * s_.width);
    return products >= (m.in_codes ? kSharedCodes : kSharedFloats);
  }

  void multiply(const Matrix &m, Index rows, const float *x, float *out) {
    const auto each = [&, share = shared(m, rows)](Index count, const auto &work) {
      workers_.each(share, count, work);
    };
    if (m.in_codes) {
      Product p = m.codes;
      p.rows = rows, p.x = x, p.out = out;
      multiply_codes(isa_, p, each);
    } else {
      each(ceil_divide(m.outputs, kOutputs), [&](Index piece) {
        const Index first = piece * kOutputs;
        f_.multiply(m.dense, x, rows, first, std::min(kOutputs, m.outputs - first), out);
      });
    }
  }

  void add(const std::vector<float> &update, Index rows) {
    for (Index i = 0; i < rows * s_.width; ++i) hidden_[i] += update[i];
  }

  void pass(const Layer &layer, const Memory &memory, Index batch, Index sites) {
    const Index rows = batch * sites;
    norm(hidden_.data(), layer.mixer_norm, rows);
    multiply(layer.in_proj, rows, normed_.data(), projected_.data());
    mix(layer, memory, batch, sites);
    multiply(layer.out_proj, rows, features_.data(), update_.data());
    add(update_, rows);
    norm(hidden_.data(), layer.experts_norm, rows);
    serve(layer, rows);
    add(update_, rows);
  }

  void mix(const Layer &layer, const Memory &memory, Index batch, Index sites) {
    const Index rows = batch * sites, mixed = s_.mixed(), width = s_.value_width();
    const Index keys = s_.key_width();
    convolve(layer, memory, batch, sites);
    float *gate = gathered_.data(), *barrier = gate + rows * s_.heads;
    float *query = barrier + rows * s_.heads, *key = query + rows * keys;
    float *value = key + rows * keys;
    for (Index row = 0; row < rows; ++row) {
      const float *x = projected_.data() + row * s_.projected() + mixed + width;
      const float *out = mixed_.data() + row * mixed;
      for (Index g = 0; g < 2 * s_.groups; ++g)
        f_.unit_length(out + width + g * s_.keys, s_.keys, s_.eps,
                       (g < s_.groups ? query : key) + row * keys + g % s_.groups * s_.keys);
      std::copy_n(out, width, value + row * width);
      std::copy_n(x, s_.heads, gate + row * s_.heads);
      std::copy_n(x + s_.heads, s_.heads, barrier + row * s_.heads);
    }
    Recall recall{};
    recall.batch = batch, recall.sites = sites, recall.heads = s_.heads, recall.groups = s_.groups;
    recall.keys = s_.keys, recall.values = s_.values;
    recall.gate = gate, recall.barrier = barrier;
    recall.query = query, recall.key = key, recall.value = value;
    recall.rate = layer.rate.data(), recall.height = layer.height.data();
    recall.eta = layer.eta.data(), recall.weight = layer.features.data();
    recall.g = memory.g, recall.psi = memory.psi;
    for (const Rounding &r : layer.rounding) recall.rounding.push_back(round_channels(r, rows));
    recall.features = features_.data();
    recall.next_g = memory.next_g, recall.next_psi = memory.next_psi;
    RecallRun(isa_, workers_, recall).run();
    for (Index row = 0; row < rows; ++row) {
      float *out = features_.data() + row * width;
      f_.gated(out, projected_.data() + row * s_.projected() + mixed, width, out);
    }
  }

  // x and out are left open.
  RoundChannels round_channels(const Rounding &rounding, Index rows) const {
    RoundChannels r{};
    r.rows = rows, r.channels = rounding.channels, r.bits = s_.core_bits;
    r.group_size = rounding.group_size;
    r.scale = rounding.scale.data(), r.zero = rounding.zero.data();
    r.levels = rounding.levels.empty() ? nullptr : rounding.levels.data();
    return r;
  }

  // The short convolutions, and the sites that those of the next reading will need.
  void convolve(const Layer &layer, const Memory &memory, Index batch, Index sites) {
    const Index mixed = s_.mixed(), kept = s_.taps - 1;
    places_.resize(s_.taps);
    for (Index b = 0; b < batch; ++b) {
      // Site i of a sequence, which may be one of the `kept` before the first.
      const auto site = [&](Index i) {
        return i < 0 ? memory.taps + (b * kept + kept + i) * mixed
                     : projected_.data() + (b * sites + i) * s_.projected();
      };
      for (Index i = 0; i < sites; ++i) {
        for (Index tap = 0; tap < s_.taps; ++tap) places_[tap] = site(i - kept + tap);
        f_.convolve(places_.data(), layer.taps.data(), s_.taps, mixed,
                    mixed_.data() + (b * sites + i) * mixed);
      }
      // In ascending order, so that memory which is replaced has been read.
      for (Index i = 0; i < kept; ++i)
        std::memmove(memory.next_taps + (b * kept + i) * mixed, site(sites - kept + i),
                     mixed * sizeof(float));
    }
  }

  void serve(const Layer &layer, Index rows) {
    if (layer.router.empty()) return run_expert(layer.experts[0], rows, normed_.data(), update_);
    const Index width = s_.width, chosen = s_.experts_per_token;
    const Dense router{Dense::Kind::f32, s_.experts, width, layer.router.data()};
    f_.multiply(router, normed_.data(), rows, 0, s_.experts, scores_.data());
    for (Index row = 0; row < rows; ++row) choose(row);
    for (Index e = 0; e < s_.experts; ++e) serve_with(layer.experts[e], e, rows);
    for (Index row = 0; row < rows; ++row)
      for (Index i = 0; i < chosen; ++i) {
        const float share = shares_[row * chosen + i];
        const float *served = served_.data() + (row * chosen + i) * width;
        float *out = update_.data() + row * width;
        for (Index k = 0; k < width; ++k)
          out[k] = i ? out[k] + served[k] * share : served[k] * share;
      }
  }

  // The experts of the highest probabilities, the first of equals first, and their shares.
  void choose(Index row) {
    float *const scores = scores_.data() + row * s_.experts;
    f_.softmax(scores, s_.experts, scores);
    const Index count = s_.experts_per_token;
    float total = 0;
    for (Index i = 0; i < count; ++i) {
      const Index best = best_of(scores);
      chosen_[row * count + i] = best, shares_[row * count + i] = scores[best];
      total = i ? total + scores[best] : scores[best];
      scores[best] = -1;  // below every probability
    }
    for (Index i = 0; i < count; ++i) shares_[row * count + i] /= total;
  }

  // The first of the largest probabilities that were not chosen yet; another one than before even
  // if they are NaN, so that no token chooses an expert twice.
  Index best_of(const float *scores) const {
    Index best = -1;
    for (Index e = 0; e < s_.experts; ++e)
      if (!(scores[e] < 0) && (best < 0 || scores[e] > scores[best])) best = e;
    return best;
  }

  // Serves the tokens that chose an expert.
  void serve_with(const Expert &expert, Index number, Index rows) {
    const Index width = s_.width;
    places_of_.clear();
    for (Index at = 0; at < rows * s_.experts_per_token; ++at)
      if (chosen_[at] == number) places_of_.push_back(at);
    const auto count = static_cast<Index>(places_of_.size());
    if (count == 0) return;
    chosen_rows_.resize(count * width);
    for (Index i = 0; i < count; ++i)
      std::copy_n(normed_.data() + places_of_[i] / s_.experts_per_token * width, width,
                  chosen_rows_.data() + i * width);
    run_expert(expert, count, chosen_rows_.data(), down_);
    for (Index i = 0; i < count; ++i)
      std::copy_n(down_.data() + i * width, width, served_.data() + places_of_[i] * width);
  }

  void run_expert(const Expert &expert, Index rows, const float *x, std::vector<float> &out) {
    multiply(expert.up, rows, x, up_.data());
    f_.silu(up_.data(), rows * s_.hidden, up_.data());
    multiply(expert.down, rows, up_.data(), out.data());
  }

  const Model &model_;
  const Sizes &s_;
  const Isa &isa_;
  const Functions &f_;
  Workers &workers_;
  std::vector<float> hidden_, normed_, projected_, mixed_, gathered_, features_, update_;
  std::vector<float> scores_, shares_, served_, chosen_rows_, up_, down_;
  std::vector<Index> chosen_, places_of_;
  std::vector<const float *> places_;
};

}  // namespace
}  // namespace bkcore::engine
