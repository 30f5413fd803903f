// Weights and other tensors of a checkpoint, compared with what its configuration asks for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "../functions.h"
#include "../halves.h"
#include "../product.h"
#include "model_config.h"
#include "safetensors.h"

namespace bkcore::engine {

// A weight matrix, either in codes or dense.
struct Matrix {
  bool in_codes;  // which of the next two it is
  Product codes;  // rows, x and out are left open
  Dense dense;
  Index outputs, inputs;
};

struct Rounding {
  std::vector<std::uint16_t> scale;
  std::vector<std::int8_t> zero;
  std::vector<float> levels;
  Index channels, group_size;
};

// Takes tensors of a checkpoint, all of which must be taken.
class TensorReader {
 public:
  TensorReader(const Tensors &tensors, const std::string &path) : tensors_(tensors), path_(path) {}

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
    const Dense::Kind kind = dense_kind(tensor, name);
    Index count = 1;
    for (const Index size : shape) count *= size;
    std::vector<float> out(static_cast<std::size_t>(count));
    for (Index i = 0; i < count; ++i)
      out[i] = kind == Dense::Kind::f32   ? number<float>(tensor, i)
               : kind == Dense::Kind::f16 ? from_float16(number<std::uint16_t>(tensor, i))
                                          : from_bfloat16(number<std::uint16_t>(tensor, i));
    return out;
  }

  // A weight of a model that is not quantized, if group_size is 0; else in codes or in float16.
  Matrix matrix(const std::string &name, Index outputs, Index inputs, Index group_size) {
    const std::string packed = name + ".packed";
    const auto found = tensors_.find(packed);
    const bool is_packed = found != tensors_.end();
    if (group_size == 0 && is_packed)
      fail("it has " + packed + ", and the configuration names no quantization");
    if (group_size == 0) return dense(name, outputs, inputs);
    if (!is_packed) fail("it lacks " + packed);
    return found->second.dtype == Dtype::f16 ? dense(packed, outputs, inputs)
                                             : coded(name, outputs, inputs, group_size);
  }

  Rounding rounding(const std::string &name, Index channels, const Sizes &s) {
    Rounding r{};
    r.channels = channels;
    const Index groups = s.per_channel ? channels : 1;
    r.group_size = channels / groups;
    const Tensor &scale = copied(take(name + ".stored_scales", {groups}));
    const Tensor &zero = copied(take(name + ".zero_points", {groups}));
    const Tensor &record = take(name + ".record", {3});
    if (scale.dtype != Dtype::bf16 || zero.dtype != Dtype::i8 || record.dtype != Dtype::i64)
      fail(name + " has wrong dtypes");
    r.scale.resize(groups), r.zero.resize(groups);
    std::memcpy(r.scale.data(), scale.data, groups * 2);
    std::memcpy(r.zero.data(), zero.data, groups);
    if (s.level_tables) r.levels = levels(name + ".table.stored_levels");
    return r;
  }

  // The first level and the steps above it, as bkcore.quantization.levels.LevelTable adds them up:
  // in float64, each sum rounded. Language models have tables at 4 bits only.
  std::vector<float> levels(const std::string &name) {
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
  Matrix dense(const std::string &name, Index outputs, Index inputs) {
    Matrix m{};
    m.outputs = outputs, m.inputs = inputs;
    const Tensor &weight = take(name, {outputs, inputs});
    m.dense.kind = dense_kind(weight, name);
    m.dense.outputs = outputs, m.dense.inputs = inputs;
    m.dense.weight = aligned(weight, name);
    return m;
  }

  // Codes of 4 bits are two a byte, with scales of groups; those of 8 have one scale a row.
  Matrix coded(const std::string &name, Index outputs, Index inputs, Index group_size) {
    const std::string packed = name + ".packed", scales = name + ".stored_scales";
    const Dtype dtype = tensors_.at(packed).dtype;
    if (dtype != Dtype::u8 && dtype != Dtype::i8) fail(packed + " holds no codes");
    Matrix m{};
    m.in_codes = true, m.outputs = outputs, m.inputs = inputs;
    Product &p = m.codes;
    p.outputs = outputs, p.inputs = inputs, p.bits = dtype == Dtype::u8 ? 4 : 8;
    p.group_size = p.bits == 4 ? std::min(group_size, inputs) : inputs;
    p.groups = (inputs - 1) / p.group_size + 1;
    constexpr Index kLargestGroup = std::numeric_limits<std::int32_t>::max() / (128 * 127);
    if (p.group_size > kLargestGroup) fail(name + " has groups whose sums may overflow");
    const Index bytes = p.bits == 4 ? (inputs + 1) / 2 : inputs;
    p.weight = reinterpret_cast<const std::uint8_t *>(take(packed, {outputs, bytes}).data);
    const Tensor &scale = take(scales, {outputs, p.groups});
    if (scale.dtype != Dtype::bf16) fail(scales + " is not bfloat16");
    p.scales = static_cast<const std::uint16_t *>(aligned(scale, scales));
    return m;
  }

  const void *aligned(const Tensor &tensor, const std::string &name) const {
    const std::size_t size = kind_of(tensor.dtype).bytes;
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

  // Number i of a tensor, which need not be aligned.
  template <class T>
  static T number(const Tensor &tensor, Index i) {
    T x;
    std::memcpy(&x, tensor.data + i * static_cast<Index>(sizeof x), sizeof x);
    return x;
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

}  // namespace bkcore::engine
