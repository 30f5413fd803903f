// A ResNet-BK model as its checkpoint folder holds it: sizes, and tensors in the mapped file.
//
// Large weights stay where they are. Norms, taps, scales of activations and the like are copied, in
// float32 and in the order in which a step reads them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../functions.h"
#include "../product.h"
#include "../rounding.h"
#include "json.h"
#include "safetensors.h"

namespace bkcore::engine {

using Index = std::int64_t;

struct Sizes {
  Index vocabulary, width, layers, experts, experts_per_token, hidden;
  Index heads, groups, keys, values, taps;
  float eps, embedding_multiplier;
  Index group_size;  // of INT4 weights
  int core_bits;     // of the activations' codes; 0 if the model is not quantized

  Index value_width() const { return heads * values; }
  Index key_width() const { return groups * keys; }
  Index mixed() const { return value_width() + 2 * key_width(); }
  Index projected() const { return mixed() + value_width() + 2 * heads; }
  Index state() const { return 2 * keys * values; }
};

// A weight matrix, either in codes or dense.
struct Matrix {
  Product codes;  // rows, x and out are left open; without outputs if the matrix is dense
  Dense dense;
  bool in_codes;
  Index outputs, inputs;
};

struct Rounding {
  std::vector<std::uint16_t> scale;
  std::vector<std::int8_t> zero;
  std::vector<float> levels;
  Index channels, group_size;
};

struct Expert {
  Matrix up, down;
};

struct Layer {
  std::vector<float> mixer_norm, experts_norm;
  Matrix in_proj, out_proj;
  std::vector<float> taps;               // (taps, mixed)
  std::vector<float> rate, height, eta;  // (heads)
  std::vector<float> features;           // (3, value_width)
  std::vector<Rounding> rounding;        // 7 of them, or none
  std::vector<float> router;             // (experts, width), or nothing
  std::vector<Expert> experts;
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
    if (const Json *mixer = config_.find("mixer"))
      if (!mixer->is_text() || mixer->text() != "resolvent")
        refuse("the mixer is not resolvent: such a model has no state to continue from");
    Sizes s{};
    s.vocabulary = size("vocab_size", 2048), s.width = size("d_model", 128);
    s.layers = size("n_layers", 3), s.experts = size("num_experts", 8);
    s.experts_per_token = size("experts_per_token", 2), s.hidden = size("expert_size", 256);
    s.heads = size("num_heads", 4), s.keys = size("key_size", 32), s.taps = size("conv_width", 4);
    s.groups = size("key_groups", s.heads);
    if (s.heads % s.groups) fail("key_groups does not divide num_heads");
    if (s.experts_per_token > s.experts) fail("experts_per_token exceeds num_experts");
    const Json *values = config_.find("value_size");
    if ((!values || values->is_null()) && s.width % s.heads)
      fail("num_heads does not divide d_model");
    s.values = size("value_size", s.width / s.heads);
    s.eps = number("norm_eps", 1e-6), s.embedding_multiplier = number("embedding_multiplier", 16);
    if (s.eps < 0 || s.embedding_multiplier <= 0)
      fail("norm_eps or embedding_multiplier is negative");
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
    if (!found || found->is_null()) return otherwise;
    if (!found->is_integer() || found->integer() < 1 || found->integer() > kLargest)
      fail(std::string(name) + " is not an integer from 1 to 2^31 - 1");
    return found->integer();
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
  // for any amount of memory. Two limits keep a state below 1 GiB a sequence, and what 256 tokens
  // at a time take below about 2.
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

  void read_quantization(Sizes &s) const {
    const Json *found = config_.find("quantization");
    if (!found || found->is_null()) return;
    const Json *mode = found->find("mode"), *state = found->find("state"),
               *group = found->find("group_size");
    if (!mode || !mode->is_text() || !state || !state->is_text())
      fail("quantization has no mode or no state");
    if (state->text() == "float") return;
    if (state->text() != "quantized")
      refuse("the model is " + shown(state->text()) + ", neither float nor quantized");
    const std::string &name = mode->text();
    s.core_bits = name.size() > 4 && name.substr(name.size() - 4) == "int4" ? 4 : 8;
    s.group_size = 128;
    if (group && (!group->is_integer() || group->integer() < 1))
      fail("group_size is not a positive integer");
    if (group) s.group_size = group->integer();
  }

  const Json &config_;
  const std::string &path_;
};

// Takes tensors of a checkpoint, all of which must be taken.
class TensorReader {
 public:
  TensorReader(const Tensors &tensors, const std::string &path) : tensors_(tensors), path_(path) {}

  bool has(const std::string &name) const { return tensors_.count(name) != 0; }

  const Tensor &take(const std::string &name, const std::vector<Index> &shape) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("it lacks " + name + " " + shown(shape));
    if (found->second.shape != shape)
      fail(name + " is " + shown(found->second.shape) + ", but the configuration asks for " +
           shown(shape));
    taken_.insert(name);
    return found->second;
  }

  // A float tensor of any format as float32.
  std::vector<float> floats(const std::string &name, const std::vector<Index> &shape) {
    const Tensor &tensor = copied(take(name, shape));
    Index count = 1;
    for (const Index size : shape) count *= size;
    std::vector<float> out(static_cast<std::size_t>(count));
    for (Index i = 0; i < count; ++i) out[i] = element(tensor, i, name);
    return out;
  }

  Matrix matrix(const std::string &name, Index outputs, Index inputs, Index group_size) {
    Matrix m{};
    m.outputs = outputs, m.inputs = inputs;
    if (has(name)) {
      const Tensor &weight = take(name, {outputs, inputs});
      m.dense = {dense_kind(weight, name), outputs, inputs, aligned(weight, name)};
      return m;
    }
    if (group_size == 0) fail("it lacks " + name + ", and the configuration names no quantization");
    const std::string packed = name + ".packed";
    const auto found = tensors_.find(packed);
    if (found == tensors_.end()) fail("it lacks " + name);
    if (found->second.dtype == Dtype::f16) {
      const Tensor &weight = take(packed, {outputs, inputs});
      m.dense = {Dense::Kind::f16, outputs, inputs, aligned(weight, packed)};
      return m;
    }
    m.in_codes = true;
    const bool is_int4 = found->second.dtype == Dtype::u8;
    if (!is_int4 && found->second.dtype != Dtype::i8) fail(packed + " holds no codes");
    const Index size = is_int4 && group_size < inputs ? group_size : inputs;
    const Index groups = (inputs + size - 1) / size;
    constexpr Index kLargestGroup = std::numeric_limits<std::int32_t>::max() / (128 * 127);
    if (size > kLargestGroup) fail(name + " has groups whose sums may overflow");
    const Tensor &weight = take(packed, {outputs, is_int4 ? (inputs + 1) / 2 : inputs});
    const std::string scales = name + ".stored_scales";
    const Tensor &scale = take(scales, {outputs, groups});
    if (scale.dtype != Dtype::bf16) fail(scales + " is not bfloat16");
    m.codes = Product{0,
                      outputs,
                      inputs,
                      is_int4 ? 4 : 8,
                      groups,
                      size,
                      nullptr,
                      reinterpret_cast<const std::uint8_t *>(weight.data),
                      static_cast<const std::uint16_t *>(aligned(scale, scales)),
                      nullptr};
    return m;
  }

  Rounding rounding(const std::string &name, Index channels, int bits) {
    Rounding r{};
    r.channels = channels;
    const auto found = tensors_.find(name + ".stored_scales");
    if (found == tensors_.end()) fail("it lacks " + name + ".stored_scales");
    const bool shared = found->second.shape == std::vector<Index>{1};
    const Index groups = shared ? 1 : channels;
    r.group_size = shared ? channels : 1;
    const Tensor &scale = copied(take(name + ".stored_scales", {groups}));
    const Tensor &zero = copied(take(name + ".zero_points", {groups}));
    if (scale.dtype != Dtype::bf16 || zero.dtype != Dtype::i8) fail(name + " has wrong dtypes");
    r.scale.resize(groups), r.zero.resize(groups);
    std::memcpy(r.scale.data(), scale.data, groups * 2);
    std::memcpy(r.zero.data(), zero.data, groups);
    if (has(name + ".record")) take(name + ".record", {3});
    if (has(name + ".table.stored_levels")) r.levels = levels(name + ".table.stored_levels", bits);
    return r;
  }

  // The first level and the steps above it, as bkcore.quantization.levels.LevelTable adds them up:
  // in float64, each sum rounded. Language models have tables at 4 bits only.
  std::vector<float> levels(const std::string &name, int bits) {
    if (bits != 4) fail(name + " is a table of levels, which codes of 8 bits do not have");
    const std::vector<float> parts = floats(name, {16});
    std::vector<float> out{parts[0]};
    double above = 0;
    for (Index i = 1; i < 16; ++i) {
      above += parts[i];
      out.push_back(parts[0] + static_cast<float>(above));
      if (!(out[i - 1] <= out[i])) fail(name + " does not ascend");
    }
    return out;
  }

  const std::vector<Tensor> &all_copied() const { return copied_; }

  void check_all_taken() const {
    for (const auto &entry : tensors_)
      if (!taken_.count(entry.first))
        fail("the model has no tensor " + shown(entry.first) +
             ": it is a checkpoint of another one");
  }

  [[noreturn]] void fail(const std::string &what) const {
    throw CheckpointError(path_ + " does not fit the configuration: " + what);
  }

  [[noreturn]] void refuse(const std::string &what) const {
    throw UnsupportedError("the engine does not read " + path_ + ": " + what);
  }

 private:
  const void *aligned(const Tensor &tensor, const std::string &name) const {
    const std::size_t size = tensor.dtype == Dtype::f32 ? 4 : 2;
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % size) fail(name + " is not aligned");
    return tensor.data;
  }

  Dense::Kind dense_kind(const Tensor &tensor, const std::string &name) const {
    switch (tensor.dtype) {
      case Dtype::f32:
        return Dense::Kind::f32;
      case Dtype::f16:
        return Dense::Kind::f16;
      case Dtype::bf16:
        return Dense::Kind::bf16;
      case Dtype::f64:
        refuse(name + " has dtype F64, and the engine reads F32, F16 and BF16");
      default:
        fail(name + " holds no floats");
    }
  }

  float element(const Tensor &tensor, Index i, const std::string &name) const {
    switch (tensor.dtype) {
      case Dtype::f32: {
        float x;
        std::memcpy(&x, tensor.data + 4 * i, sizeof x);
        return x;
      }
      case Dtype::bf16: {
        std::uint16_t half;
        std::memcpy(&half, tensor.data + 2 * i, sizeof half);
        const std::uint32_t bits = std::uint32_t{half} << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
      }
      case Dtype::f16: {
        std::uint16_t half;
        std::memcpy(&half, tensor.data + 2 * i, sizeof half);
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(fraction, -24)
                                            : std::ldexp(fraction + 1024, exponent - 25);
        return static_cast<float>(half >> 15 ? -size : size);
      }
      case Dtype::f64:
        refuse(name + " has dtype F64, and the engine reads F32, F16 and BF16");
      default:
        fail(name + " holds no floats");
    }
  }

  // Notes a tensor whose numbers are copied.
  const Tensor &copied(const Tensor &tensor) {
    copied_.push_back(tensor);
    return tensor;
  }

  const Tensors &tensors_;
  const std::string &path_;
  std::set<std::string> taken_;
  std::vector<Tensor> copied_;
};

class Model {
 public:
  // A checkpoint folder, whose weights stay in the mapped file.
  explicit Model(const std::string &folder)
      : file_(std::make_unique<Safetensors>(folder + "/model.safetensors")) {
    const std::string path = folder + "/config.json";
    constexpr std::size_t kMost = 16 << 20;  // as in bkcore.reading
    const MappedFile config(path, kMost);
    read(file_->tensors(), file_->path(), config.text(), path);
  }

  // Tensors in memory that somebody else keeps alive, named as in a checkpoint, and the text of its
  // config.json.
  Model(const Tensors &tensors, std::string_view config) {
    for (const Tensor &tensor : read(tensors, "the model", config, "its config"))
      copies_.push_back(
          {tensor.data, std::vector<std::byte>(tensor.data, tensor.data + tensor.bytes())});
  }

  // Whether the tensors in memory that were copied still hold the same bytes.
  bool is_current() const {
    return std::all_of(copies_.begin(), copies_.end(), [](const Copy &copy) {
      return std::memcmp(copy.source, copy.bytes.data(), copy.bytes.size()) == 0;
    });
  }

  const Sizes &sizes() const { return sizes_; }

 private:
  struct Copy {
    const std::byte *source;
    std::vector<std::byte> bytes;
  };

  // Returns the tensors that it copied.
  std::vector<Tensor> read(const Tensors &tensors, const std::string &path, std::string_view config,
                           const std::string &config_path) {
    const Json fields = Json::parse(config, config_path);
    sizes_ = ConfigReader(fields, config_path).sizes();
    TensorReader reader(tensors, path);
    const Sizes &s = sizes_;
    embedding = reader.matrix("embedding.weight", s.vocabulary, s.width, s.group_size);
    final_norm = reader.floats("final_norm.weight", {s.width});
    // Each layer and each expert has tensors of its own, so that more of them than tensors are not
    // there.
    const auto most = static_cast<Index>(tensors.size());
    if (s.layers > most || s.experts > most) reader.fail("it lacks layers or experts");
    for (Index l = 0; l < s.layers; ++l)
      layers.push_back(read_layer(reader, "layers." + std::to_string(l) + "."));
    reader.check_all_taken();
    return reader.all_copied();
  }

  static std::vector<float> exponentials(std::vector<float> x) {
    for (float &each : x) each = static_cast<float>(std::exp(static_cast<double>(each)));
    return x;
  }

  Layer read_layer(TensorReader &reader, const std::string &at) const {
    const Sizes &s = sizes_;
    const std::string mixer = at + "mixer.", experts = at + "experts.";
    Layer layer;
    layer.mixer_norm = reader.floats(at + "mixer_norm.weight", {s.width});
    layer.experts_norm = reader.floats(at + "experts_norm.weight", {s.width});
    layer.in_proj = reader.matrix(mixer + "in_proj.weight", s.projected(), s.width, s.group_size);
    layer.out_proj =
        reader.matrix(mixer + "out_proj.weight", s.width, s.value_width(), s.group_size);
    const std::vector<float> conv = reader.floats(mixer + "conv.weight", {s.mixed(), 1, s.taps});
    layer.taps.resize(conv.size());
    for (Index c = 0; c < s.mixed(); ++c)
      for (Index t = 0; t < s.taps; ++t) layer.taps[t * s.mixed() + c] = conv[c * s.taps + t];
    layer.rate = exponentials(reader.floats(mixer + "log_rate", {s.heads}));
    layer.height = exponentials(reader.floats(mixer + "log_barrier", {s.heads}));
    layer.eta = exponentials(reader.floats(mixer + "log_eta", {s.heads}));
    for (const float eta : layer.eta)
      if (!(eta > 0)) reader.fail(mixer + "log_eta gives an eta that is not positive");
    layer.features = reader.floats(mixer + "features.weight", {3, s.value_width()});
    if (s.core_bits) read_roundings(reader, mixer + "quantizers.", layer);
    if (s.experts > 1)
      layer.router = reader.floats(experts + "router.weight", {s.experts, s.width});
    for (Index e = 0; e < s.experts; ++e) {
      const std::string name = experts + "experts." + std::to_string(e) + ".";
      layer.experts.push_back(
          {reader.matrix(name + "up.weight", s.hidden, s.width, s.group_size),
           reader.matrix(name + "down.weight", s.width, s.hidden, s.group_size)});
    }
    return layer;
  }

  void read_roundings(TensorReader &reader, const std::string &at, Layer &layer) const {
    const Sizes &s = sizes_;
    const std::pair<const char *, Index> parts[] = {{"gate", s.heads},
                                                    {"barrier", s.heads},
                                                    {"query", s.key_width()},
                                                    {"key", s.key_width()},
                                                    {"value", s.value_width()},
                                                    {"found.real", s.value_width()},
                                                    {"found.imag", s.value_width()}};
    for (const auto &[name, channels] : parts)
      layer.rounding.push_back(reader.rounding(at + name, channels, s.core_bits));
  }

  std::unique_ptr<const Safetensors> file_;
  std::vector<Copy> copies_;
  Sizes sizes_{};

 public:
  Matrix embedding;
  std::vector<float> final_norm;
  std::vector<Layer> layers;
};

}  // namespace bkcore::engine
