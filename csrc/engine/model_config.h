// The configuration of a ResNet-BK model: config.json in its checkpoint folder.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <set>
#include <string>

#include "json.h"

namespace bkcore::engine {

using Index = std::int64_t;

struct Sizes {
  Index vocabulary, width, layers, experts, experts_per_token, hidden;
  Index heads, groups, keys, values, taps;
  float eps, embedding_multiplier;
  int core_bits;      // of the activations' codes; 0 if the model is not quantized
  Index group_size;   // of INT4 weights
  bool per_channel;   // scales of activations: one a channel, else one for all
  bool level_tables;  // activations have levels of their own

  Index value_width() const { return heads * values; }
  Index key_width() const { return groups * keys; }
  Index mixed() const { return value_width() + 2 * key_width(); }
  Index projected() const { return mixed() + value_width() + 2 * heads; }
  Index state() const { return 2 * keys * values; }
};

// Reads the fields of config.json.
class ConfigReader {
 public:
  ConfigReader(const Json &config, const std::string &path) : config_(config), path_(path) {
    if (!config.is_object()) fail("it is not an object");
  }

  Sizes sizes() const {
    const Json *type = config_.find("model_type");
    if (!type || !type->is_text() || type->text() != "resnet_bk")
      fail("model_type is not resnet_bk: this is another kind of model");
    const std::string mixer = choice(config_, "mixer", {"resolvent", "convolution", "green"});
    if (mixer != "resolvent")
      refuse("the mixer is not resolvent: such a model has no state to continue from");
    Sizes s{};
    s.vocabulary = size("vocab_size", 2048), s.width = size("d_model", 128);
    s.layers = size("n_layers", 3), s.experts = size("num_experts", 8);
    s.experts_per_token = size("experts_per_token", 2), s.hidden = size("expert_size", 256);
    s.heads = size("num_heads", 4), s.keys = size("key_size", 32), s.taps = size("conv_width", 4);
    s.groups = size_or_null("key_groups", s.heads);
    if (s.heads % s.groups) fail("key_groups does not divide num_heads");
    if (s.experts_per_token > s.experts) fail("experts_per_token exceeds num_experts");
    const Json *values = config_.find("value_size");
    if ((!values || values->is_null()) && s.width % s.heads)
      fail("num_heads does not divide d_model");
    s.values = size_or_null("value_size", s.width / s.heads);
    s.eps = number("norm_eps", 1e-6), s.embedding_multiplier = number("embedding_multiplier", 16);
    if (s.eps < 0) fail("norm_eps is negative");
    if (s.embedding_multiplier <= 0) fail("embedding_multiplier is not positive");
    check_memory(s);
    read_quantization(s);
    return s;
  }

 private:
  [[noreturn]] void fail(const std::string &what) const {
    throw CheckpointError(path_ + " is no configuration of a ResNet-BK model: " + what);
  }

  [[noreturn]] void refuse(const std::string &what) const {
    throw UnsupportedError("the engine does not read a model as in " + path_ + ": " + what);
  }

  Index size(const char *name, Index otherwise) const {
    constexpr Index kLargest = std::numeric_limits<std::int32_t>::max();
    const Json *found = config_.find(name);
    if (!found) return otherwise;
    if (!found->is_integer() || found->integer() < 1 || found->integer() > kLargest)
      fail(std::string(name) + " is not an integer from 1 to 2^31 - 1");
    return found->integer();
  }

  Index size_or_null(const char *name, Index otherwise) const {
    const Json *found = config_.find(name);
    return found && found->is_null() ? otherwise : size(name, otherwise);
  }

  // One of some words, of which the first is the default.
  std::string choice(const Json &object, const char *name,
                     std::initializer_list<const char *> words) const {
    const Json *found = object.find(name);
    if (!found) return *words.begin();
    std::string known;
    for (const char *word : words) {
      if (found->is_text() && found->text() == word) return word;
      known += (known.empty() ? "" : ", ") + std::string(word);
    }
    fail(std::string(name) + " is " + (found->is_text() ? shown(found->text()) : "no text") +
         ", and not one of " + known);
  }

  float number(const char *name, double otherwise) const {
    const Json *found = config_.find(name);
    if (!found) return static_cast<float>(otherwise);
    if (!found->is_number()) fail(std::string(name) + " is not a number");
    const auto value = static_cast<float>(found->number());
    if (!std::isfinite(value)) fail(std::string(name) + " is not finite");
    return value;
  }

  // The file holds only the factors of some products here, so that one of some kilobytes could ask
  // for any amount of memory. Two limits keep g and psi of a sequence's state below 1 GiB, and what
  // 256 tokens at a time take below about 2. The sites that convolutions keep are fewer numbers
  // than their weights, which the file does hold.
  void check_memory(const Sizes &s) const {
    const auto product = [](auto... sizes) { return (1.0 * ... * static_cast<double>(sizes)); };
    const double state = product(2, s.layers, s.heads, s.keys, s.values);
    const double token = product(s.heads, s.keys) + product(s.heads, s.values) +
                         product(s.experts_per_token + 1, s.width) + product(s.hidden) +
                         product(s.experts);
    if (state > 0x1p28 || token > 0x1p18)
      fail("it asks for a state of " + shown(state) + " numbers, of at most 2^28, or for " +
           shown(token) + " channels, of at most 2^18");
  }

  // As form_of and QuantizationConfig of bkcore: the same names, values and defaults.
  void read_quantization(Sizes &s) const {
    const Json *found = config_.find("quantization");
    if (!found || found->is_null()) return;
    if (!found->is_object()) fail("quantization is neither null nor an object");
    check_names(*found);
    const std::string mode =
        choice(*found, "mode", {"ptq_int8", "qat_int8", "ptq_int4", "qat_int4", "mixed_precision"});
    const std::string state =
        choice(*found, "state", {"float", "calibrated", "training", "quantized"});
    const Json *group = found->find("group_size"), *channels = found->find("per_channel"),
               *levels = found->find("nonuniform");
    if (group && (!group->is_integer() || group->integer() < 1))
      fail("group_size is not a positive integer");
    if (channels && !channels->is_boolean()) fail("per_channel is neither true nor false");
    if (levels && !levels->is_null() && !levels->is_boolean())
      fail("nonuniform is neither null, true nor false");
    if (state == "float") return;
    if (state != "quantized") refuse("the model is " + state + ", neither float nor quantized");
    s.core_bits = mode == "ptq_int4" || mode == "qat_int4" ? 4 : 8;
    s.group_size = group ? group->integer() : 128;
    s.per_channel = !channels || channels->boolean();
    s.level_tables = s.core_bits == 4 && (!levels || levels->is_null() || levels->boolean());
  }

  // A name that was misspelled would leave its default, which is another quantization.
  void check_names(const Json &quantization) const {
    static const std::set<std::string> known = {
        "state",      "mode",     "group_size",      "per_channel", "symmetric",  "observer",
        "percentile", "min_size", "weight_rounding", "nonuniform",  "tensor_bits"};
    for (const Json::Member &member : quantization.members())
      if (!known.count(member.first)) fail("quantization has no field " + shown(member.first));
  }

  const Json &config_;
  const std::string &path_;
};

}  // namespace bkcore::engine
