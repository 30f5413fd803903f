// A ResNet-BK model as its checkpoint folder holds it: sizes, and tensors in the mapped file.
//
// Large weights stay where they are. Norms, taps, scales of activations and the like are copied, in
// float32 and in the order in which a step reads them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "float_mode.h"
#include "model_config.h"
#include "safetensors.h"
#include "tensor_reader.h"

namespace bkcore::engine {

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

class Model {
 public:
  // A checkpoint folder, whose weights stay in the mapped file.
  explicit Model(const std::string &folder)
      : file_(std::make_unique<Safetensors>(folder + "/model.safetensors")) {
    const std::string path = folder + "/config.json";
    constexpr std::size_t kMost = 16 << 20;  // as in bkcore.reading
    const MappedFile config(path, kMost);
    read(file_->tensors(), file_->path(), config.text(), shown_path(path));
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
    const DefaultFloats floats;  // an eta may be subnormal
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
      layer.rounding.push_back(reader.rounding(at + name, channels, s));
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
