// Checkpoints of random numbers, for tests: valid ones, of any sizes and in any format.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "engine/write.h"

namespace bkcore::engine {
namespace {

// A folder of its own, which is removed at the end.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "bkcore-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("there is no temporary folder");
    path_ = name;
  }
  Folder(const Folder &) = delete;
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::string &path() const { return path_; }
  std::string file(const std::string &name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::string read_file(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

inline void write_file(const std::string &path, const std::string &content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

// How weights are stored: floats; codes; or a mixture, as in bkcore's mode mixed_precision.
enum class Format { f32, f16, bf16, int8, int4, mixed };

inline Sizes small_sizes() {
  Sizes s{};
  s.vocabulary = 23, s.width = 12, s.layers = 2, s.experts = 3, s.experts_per_token = 2;
  s.hidden = 10, s.heads = 4, s.groups = 2, s.keys = 5, s.values = 3, s.taps = 3;
  s.eps = 1e-6F, s.embedding_multiplier = 5, s.group_size = 8;
  return s;
}

// Sizes with which threads share every product and the recall of 256 rows. Every token goes to
// every expert, so that none has too few.
inline Sizes shared_sizes() {
  Sizes s = small_sizes();
  s.experts_per_token = s.experts, s.vocabulary = 150, s.width = 72, s.hidden = 144, s.keys = 8,
  s.values = 18;
  return s;
}

class Checkpoint {
 public:
  struct Part {
    std::string name;
    Dtype dtype;
    std::vector<Index> shape;
    std::string data;
  };

  Checkpoint(const Sizes &sizes, Format format, unsigned seed)
      : s_(sizes), format_(format), per_channel_(seed % 2), engine_(seed) {
    config = configuration();
    matrix("embedding.weight", s_.vocabulary, s_.width, format == Format::mixed ? 16 : bits());
    floats("final_norm.weight", {s_.width}, 0.5, 1.5);
    for (Index l = 0; l < s_.layers; ++l) add_layer("layers." + std::to_string(l) + ".");
  }

  void save(const std::string &folder) const {
    write_file(folder + "/config.json", config);
    std::vector<std::pair<std::string, Tensor>> tensors;
    for (const Part &part : parts)
      tensors.emplace_back(
          part.name,
          Tensor{part.dtype, part.shape, reinterpret_cast<const std::byte *>(part.data.data())});
    // Larger numbers first, so that all are aligned, as the library of the format does it.
    std::stable_sort(tensors.begin(), tensors.end(), [](const auto &a, const auto &b) {
      return kind_of(a.second.dtype).bytes > kind_of(b.second.dtype).bytes;
    });
    write_safetensors(folder + "/model.safetensors", tensors);
  }

  std::string config;
  std::vector<Part> parts;

 private:
  int bits() const {
    return format_ == Format::int4                               ? 4
           : format_ == Format::int8 || format_ == Format::mixed ? 8
                                                                 : 0;
  }

  std::string configuration() const {
    std::ostringstream out;
    out << "{\"model_type\": \"resnet_bk\", \"vocab_size\": " << s_.vocabulary
        << ", \"d_model\": " << s_.width << ", \"n_layers\": " << s_.layers
        << ", \"num_experts\": " << s_.experts
        << ", \"experts_per_token\": " << s_.experts_per_token << ", \"expert_size\": " << s_.hidden
        << ", \"num_heads\": " << s_.heads << ", \"key_size\": " << s_.keys
        << ", \"key_groups\": " << s_.groups << ", \"value_size\": " << s_.values
        << ", \"conv_width\": " << s_.taps << ", \"norm_eps\": " << s_.eps
        << ", \"embedding_multiplier\": " << s_.embedding_multiplier << ", \"quantization\": ";
    if (bits() == 0) return out.str() + "null}";
    out << "{\"mode\": \""
        << (format_ == Format::mixed ? "mixed_precision"
            : bits() == 4            ? "ptq_int4"
                                     : "ptq_int8")
        << "\", \"state\": \"quantized\", \"group_size\": " << s_.group_size
        << ", \"per_channel\": " << (per_channel_ ? "true" : "false") << "}}";
    return out.str();
  }

  void add_layer(const std::string &at) {
    const std::string mixer = at + "mixer.", experts = at + "experts.";
    floats(at + "mixer_norm.weight", {s_.width}, 0.5, 1.5);
    floats(at + "experts_norm.weight", {s_.width}, 0.5, 1.5);
    matrix(mixer + "in_proj.weight", s_.projected(), s_.width, bits());
    matrix(mixer + "out_proj.weight", s_.width, s_.value_width(), bits());
    floats(mixer + "conv.weight", {s_.mixed(), 1, s_.taps}, -1, 1);
    floats(mixer + "log_rate", {s_.heads}, -3, 0);
    floats(mixer + "log_barrier", {s_.heads}, -3, 0);
    floats(mixer + "log_eta", {s_.heads}, -7, -2);
    floats(mixer + "features.weight", {3, s_.value_width()}, -1, 1);
    if (bits()) add_roundings(mixer + "quantizers.");
    if (s_.experts > 1) floats(experts + "router.weight", {s_.experts, s_.width}, -1, 1);
    for (Index e = 0; e < s_.experts; ++e) {
      const std::string name = experts + "experts." + std::to_string(e) + ".";
      const int of_experts = format_ == Format::mixed ? 4 : bits();
      matrix(name + "up.weight", s_.hidden, s_.width, of_experts);
      matrix(name + "down.weight", s_.width, s_.hidden, of_experts);
    }
  }

  void add_roundings(const std::string &at) {
    const std::pair<const char *, Index> all[] = {{"gate", s_.heads},
                                                  {"barrier", s_.heads},
                                                  {"query", s_.key_width()},
                                                  {"key", s_.key_width()},
                                                  {"value", s_.value_width()},
                                                  {"found.real", s_.value_width()},
                                                  {"found.imag", s_.value_width()}};
    for (const auto &[part, channels] : all) {
      const std::string name = at + part;
      const Index groups = per_channel_ ? channels : 1;
      halves(name + ".stored_scales", Dtype::bf16, {groups}, bits() == 4 ? 0.2 : 0.01,
             bits() == 4 ? 0.4 : 0.03);
      bytes(name + ".zero_points", Dtype::i8, {groups}, [&] { return uniform(-3, 3); });
      parts.push_back({name + ".record", Dtype::i64, {3}, std::string(24, '\0')});
      if (bits() == 4) {
        floats(name + ".table.stored_levels", {16}, 0.5, 1.5);
        const float lowest = -8;
        std::memcpy(parts.back().data.data(), &lowest, sizeof lowest);
      }
    }
  }

  void matrix(const std::string &name, Index outputs, Index inputs, int bits) {
    const double size = 1 / std::sqrt(static_cast<double>(inputs));
    if (bits == 0) return floats(name, {outputs, inputs}, -size, size);
    if (bits == 16) return halves(name + ".packed", Dtype::f16, {outputs, inputs}, -size, size);
    const Index columns = bits == 8 ? inputs : (inputs + 1) / 2;
    const Index group = bits == 8 ? inputs : std::min(s_.group_size, inputs);
    bytes(name + ".packed", bits == 8 ? Dtype::i8 : Dtype::u8, {outputs, columns},
          [&] { return uniform(-128, 128); });
    halves(name + ".stored_scales", Dtype::bf16, {outputs, (inputs + group - 1) / group},
           size / 200, size / 100);
  }

  // Floats in the format of the checkpoint.
  void floats(const std::string &name, const std::vector<Index> &shape, double low, double high) {
    if (format_ == Format::f16) return halves(name, Dtype::f16, shape, low, high);
    if (format_ == Format::bf16) return halves(name, Dtype::bf16, shape, low, high);
    std::string data;
    for (Index i = 0; i < count(shape); ++i) {
      const auto x = static_cast<float>(uniform(low, high));
      data.append(reinterpret_cast<const char *>(&x), sizeof x);
    }
    parts.push_back({name, Dtype::f32, shape, data});
  }

  void halves(const std::string &name, Dtype dtype, const std::vector<Index> &shape, double low,
              double high) {
    std::string data;
    for (Index i = 0; i < count(shape); ++i) {
      const auto x = static_cast<float>(uniform(low, high));
      std::uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      // Rounded towards 0; numbers below 2^-14 become 0 in float16.
      const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 127 + 15;
      const std::uint32_t f16 =
          exponent > 0 ? (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3FF) : 0;
      const auto half = static_cast<std::uint16_t>(dtype == Dtype::f16 ? f16 : bits >> 16);
      data.append(reinterpret_cast<const char *>(&half), sizeof half);
    }
    parts.push_back({name, dtype, shape, data});
  }

  template <class Make>
  void bytes(const std::string &name, Dtype dtype, const std::vector<Index> &shape,
             const Make &make) {
    std::string data;
    for (Index i = 0; i < count(shape); ++i) data += static_cast<char>(std::floor(make()));
    parts.push_back({name, dtype, shape, data});
  }

  static Index count(const std::vector<Index> &shape) {
    Index out = 1;
    for (const Index size : shape) out *= size;
    return out;
  }

  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }

  Sizes s_;
  Format format_;
  bool per_channel_;
  std::mt19937_64 engine_;
};

}  // namespace
}  // namespace bkcore::engine
