// The tensors of a safetensors file, in place. The format: 8 bytes of header length, the header in
// JSON, then the tensors, which cover the rest without gaps or overlaps
// (https://huggingface.co/docs/safetensors, "Format").
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "file.h"
#include "json.h"

namespace bkcore::engine {

enum class Dtype { f32, f16, bf16, f64, i64, i8, u8 };

// A dtype, the name that the format has for it, and the bytes of a number.
struct Kind {
  Dtype dtype;
  const char *name;
  std::uint64_t bytes;
};

// In the order of Dtype.
constexpr Kind kKinds[] = {{Dtype::f32, "F32", 4}, {Dtype::f16, "F16", 2}, {Dtype::bf16, "BF16", 2},
                           {Dtype::f64, "F64", 8}, {Dtype::i64, "I64", 8}, {Dtype::i8, "I8", 1},
                           {Dtype::u8, "U8", 1}};

constexpr const Kind &kind_of(Dtype dtype) { return kKinds[static_cast<int>(dtype)]; }

// Null if there is none of that name.
inline const Kind *kind_named(std::string_view name) {
  for (const Kind &kind : kKinds)
    if (name == kind.name) return &kind;
  return nullptr;
}

struct Tensor {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  const std::byte *data;

  // The shape is known to fit.
  std::size_t bytes() const {
    std::size_t all = kind_of(dtype).bytes;
    for (const std::int64_t size : shape) all *= static_cast<std::size_t>(size);
    return all;
  }
};

using Tensors = std::map<std::string, Tensor>;

inline std::string shown(const std::vector<std::int64_t> &shape) {
  std::string out = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

class Safetensors {
 public:
  explicit Safetensors(const std::string &path) : path_(shown_path(path)), file_(path) {
    constexpr std::uint64_t kLargestHeader = 100'000'000;
    std::uint64_t length = 0;
    if (file_.size() < sizeof length) fail("it is too short");
    std::memcpy(&length, file_.data(), sizeof length);
    if (length > kLargestHeader || length > file_.size() - sizeof length)
      fail("its header has " + std::to_string(length) + " bytes, more than there are or may be");
    const Json header =
        Json::parse(file_.text().substr(sizeof length, static_cast<std::size_t>(length)), path_);
    if (!header.is_object()) fail("its header is not an object");
    start_ = file_.data() + sizeof length + length;
    bytes_ = file_.size() - sizeof length - static_cast<std::size_t>(length);
    std::vector<Range> ranges;
    for (const auto &[name, entry] : header.members())
      if (name != "__metadata__") ranges.push_back(add(name, entry));
    check_cover(ranges);
  }

  const Tensors &tensors() const { return tensors_; }
  const std::string &path() const { return path_; }  // for messages

 private:
  static constexpr std::size_t kMostAxes = 8;

  struct Range {
    std::uint64_t begin, end;
  };

  [[noreturn]] void fail(const std::string &what) const {
    throw CheckpointError(path_ + " is no safetensors file that can be read: " + what);
  }

  Range add(const std::string &name, const Json &entry) {
    const std::string title = "tensor " + shown(name);
    const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"),
               *offsets = entry.find("data_offsets");
    if (!dtype || !shape || !offsets || entry.members().size() != 3 || !dtype->is_text() ||
        !shape->is_array() || !offsets->is_array() || offsets->items().size() != 2)
      fail(title + " has no dtype, shape and data_offsets, or more");
    const Kind *const kind = kind_named(dtype->text());
    if (!kind) fail(title + " has dtype " + shown(dtype->text()));
    Tensor tensor{kind->dtype, {}, nullptr};
    std::uint64_t bytes = kind->bytes;
    if (shape->items().size() > kMostAxes) fail(title + " has too many axes");
    for (const Json &size : shape->items()) {
      if (!size.is_integer() || size.integer() < 0) fail(title + " has a wrong shape");
      if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size.integer()), &bytes))
        fail(title + " is larger than 2^64 bytes");
      tensor.shape.push_back(size.integer());
    }
    const Json &begin = offsets->items()[0], &end = offsets->items()[1];
    if (!begin.is_integer() || !end.is_integer() || begin.integer() < 0 ||
        end.integer() < begin.integer() || static_cast<std::uint64_t>(end.integer()) > bytes_ ||
        static_cast<std::uint64_t>(end.integer() - begin.integer()) != bytes)
      fail(title + " " + shown(tensor.shape) + " does not fit its data_offsets");
    tensor.data = start_ + begin.integer();
    tensors_.emplace(name, std::move(tensor));
    return {static_cast<std::uint64_t>(begin.integer()), static_cast<std::uint64_t>(end.integer())};
  }

  void check_cover(std::vector<Range> &ranges) const {
    std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    std::uint64_t at = 0;
    for (const Range &range : ranges) {
      if (range.begin != at) fail("its tensors overlap or leave gaps");
      at = range.end;
    }
    if (at != bytes_) fail("bytes follow its last tensor");
  }

  std::string path_;
  MappedFile file_;
  const std::byte *start_ = nullptr;
  std::size_t bytes_ = 0;
  Tensors tensors_;
};

}  // namespace bkcore::engine
