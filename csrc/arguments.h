// Arguments as Python passes them, by name. A tensor comes with the size of its memory, so that
// nothing is read or written beyond its end, even if Python and a kernel disagree.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace bkcore {
namespace {

using Address = std::uintptr_t;
// Batch, sites, parts and lanes.
using Sizes = std::array<Index, 4>;

[[noreturn]] inline void refuse(const std::string &what) {
  throw std::invalid_argument("bkcore.kernels.backends.cpu._native: " + what);
}

// The product of sizes.
inline Index count(std::initializer_list<Index> sizes) {
  Index all = 1;
  bool overflows = false;
  for (const Index size : sizes) {
    if (size < 0) refuse("a size is " + std::to_string(size));
    if (size == 0) return 0;
    overflows |= __builtin_mul_overflow(all, size, &all);
  }
  if (overflows) refuse("sizes overflow 64 bits");
  return all;
}

// How many groups `size` channels or sites make; the last one may be smaller.
inline Index groups_of(Index size, Index group_size) {
  if (group_size < 1) refuse("a group size is " + std::to_string(group_size));
  return ceil_divide(size, group_size);
}

// The arguments of one call. Each must be read, and each that is read must be there; a tensor that
// was not given is None.
class Arguments {
 public:
  explicit Arguments(const nanobind::dict &given) : given_(given) { read_.reserve(given.size()); }

  bool has(const char *name) const { return !find(name, key(name)).is_none(); }

  // Of two that mean nothing without each other.
  void together(const char *one, const char *other) const {
    if (has(one) == has(other)) return;
    if (!has(one)) std::swap(one, other);
    refuse(std::string(one) + " comes without " + other);
  }

  Index number(const char *name) { return take<Index>(name); }

  float real(const char *name) { return static_cast<float>(take<double>(name)); }

  bool flag(const char *name) { return take<bool>(name); }

  const Isa &isa() { return find_isa(take<std::string>("isa")); }

  Index threads() {
    const Index threads = number("threads");
    if (threads < 1) refuse("there are " + std::to_string(threads) + " threads");
    return threads;
  }

  Index bits() {
    const Index bits = number("bits");
    if (bits != 4 && bits != 8) refuse("codes have 4 or 8 bits, not " + std::to_string(bits));
    return bits;
  }

  // A contiguous tensor, (address, bytes), which must have exactly these sizes.
  template <class T>
  T *numbers(const char *name, std::initializer_list<Index> sizes) {
    const auto [address, bytes] = take<std::tuple<Address, Index>>(name);
    const Index wanted = count({count(sizes), Index{sizeof(T)}});
    if (bytes != wanted)
      refuse(std::string(name) + " has " + std::to_string(bytes) + " bytes instead of " +
             std::to_string(wanted));
    if (!address && bytes) refuse(std::string(name) + " has no memory; is it a fake tensor?");
    return reinterpret_cast<T *>(address);
  }

  template <class T>
  T *numbers_or_null(const char *name, std::initializer_list<Index> sizes) {
    return has(name) ? numbers<T>(name, sizes) : missing<T *>(name);
  }

  // Any tensor, (address, bytes of a number, sizes, strides), which must be at least as large as
  // these sizes. A stride of 0 stands for an axis that the tensor lacks; outputs may lack none.
  // Along an axis of size 1 the stride is set to 0 too.
  template <class T>
  Strided<T> strided(const char *name, const Sizes &wanted) {
    const auto [address, bytes, sizes, strides] =
        take<std::tuple<Address, Index, Sizes, Sizes>>(name);
    if (bytes != static_cast<Index>(sizeof(T)))
      refuse(std::string(name) + " has numbers of " + std::to_string(bytes) + " bytes instead of " +
             std::to_string(sizeof(T)));
    bool any = true;
    Sizes steps = {};
    for (std::size_t axis = 0; axis < wanted.size(); ++axis) {
      const Index size = strides[axis] ? wanted[axis] : std::min<Index>(wanted[axis], 1);
      if (size < 0 || strides[axis] < 0 || sizes[axis] < size)
        refuse(std::string(name) + " has the size " + std::to_string(sizes[axis]) + " along axis " +
               std::to_string(axis) + " instead of " + std::to_string(size));
      if (!std::is_const_v<T> && wanted[axis] > 1 && !strides[axis])
        refuse(std::string(name) + " is written to, but expanded along axis " +
               std::to_string(axis));
      any = any && wanted[axis] > 0;
      if (wanted[axis] > 1) steps[axis] = strides[axis];
    }
    if (any && !address) refuse(std::string(name) + " has no memory; is it a fake tensor?");
    return {reinterpret_cast<T *>(address), steps[0], steps[1], steps[2], steps[3]};
  }

  // A tensor whose lanes are contiguous.
  template <class T>
  Strided<T> rows(const char *name, const Sizes &wanted) {
    const Strided<T> x = strided<T>(name, wanted);
    if (wanted[3] > 1 && x.lane != 1)
      refuse(std::string(name) + " has lanes " + std::to_string(x.lane) + " numbers apart");
    return x;
  }

  template <class T>
  Strided<T> strided_or_null(const char *name, const Sizes &wanted) {
    return has(name) ? strided<T>(name, wanted) : missing<Strided<T>>(name);
  }

  // To be called when all that is known has been read, each once.
  void finish() const {
    for (auto name = read_.begin(); name != read_.end(); ++name)
      if (std::find(read_.begin(), name, *name) != name) refuse(text(*name) + " is read twice");
    // What was read is in `given_`, and distinct. So equal counts mean equal sets.
    if (read_.size() == given_.size()) return;
    for (const auto [name, value] : given_)
      if (std::none_of(read_.begin(), read_.end(),
                       [&](PyObject *one) { return PyUnicode_Compare(one, name.ptr()) == 0; }))
        refuse(text(name.ptr()) + " is not known");
  }

 private:
  static std::string text(PyObject *name) {
    return nanobind::cast<std::string>(nanobind::handle(name));
  }

  nanobind::object find(const char *name, PyObject *interned) const {
    PyObject *const found = PyDict_GetItemWithError(given_.ptr(), interned);
    if (!found) refuse(std::string(name) + " is missing");
    return nanobind::borrow(found);
  }

  // A name as Python's string, made once for every place that has it: making and hashing one takes
  // longer than looking it up. Interned, so that equal names are one object. Under Python's lock.
  static PyObject *key(const char *name) {
    static std::unordered_map<const char *, PyObject *> known;
    PyObject *&found = known[name];
    if (!found) found = PyUnicode_InternFromString(name);
    return found;
  }

  template <class T>
  T take(const char *name) {
    T value;
    PyObject *const one = key(name);
    if (!nanobind::try_cast<T>(find(name, one), value, false))
      refuse(std::string(name) + " is of another kind");
    read_.push_back(one);
    return value;
  }

  template <class T>
  T missing(const char *name) {
    read_.push_back(key(name));
    return T{};
  }

  nanobind::dict given_;
  std::vector<PyObject *> read_;
};

}  // namespace
}  // namespace bkcore
