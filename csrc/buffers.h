// Memory as Python hands it over. How much of it there is comes along, so that nothing is read or
// written beyond its end, whatever Python and a kernel disagree about.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>

#include "sweep.h"

namespace bkcore {
namespace {

using Index = std::int64_t;
using Address = std::uintptr_t;

// A contiguous tensor: the address of its first element, and its bytes.
using Buffer = std::tuple<Address, Index>;
// No tensor, which an empty one is not.
constexpr Buffer kNoBuffer{0, -1};
// Any other: the address of its first element, and the bytes of one; then its sizes and its strides
// in elements, over batch, sites, parts and lanes. A stride of 0 is an axis that it lacks, and zeros
// throughout are no tensor.
using Sizes = std::array<Index, 4>;
using Layout = std::tuple<Address, Index, Sizes, Sizes>;

[[noreturn]] inline void refuse(const std::string &what) {
  throw std::invalid_argument("bkcore.kernels._native: " + what);
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

// The numbers of a tensor that has to have these sizes, to the byte.
template <class T>
T *numbers(const Buffer &buffer, std::initializer_list<Index> sizes, const char *name) {
  const auto [address, bytes] = buffer;
  const Index wanted = count({count(sizes), Index{sizeof(T)}});
  if (bytes != wanted)
    refuse(std::string(name) + " has " + std::to_string(bytes) + " bytes instead of " +
           std::to_string(wanted));
  if (!address && bytes) refuse(std::string(name) + " has no memory; is it a fake tensor?");
  return reinterpret_cast<T *>(address);
}

// The same of a tensor that may not be there.
template <class T>
T *numbers_or_null(const Buffer &buffer, std::initializer_list<Index> sizes, const char *name) {
  return buffer == kNoBuffer ? nullptr : numbers<T>(buffer, sizes, name);
}

// The numbers of a tensor that has to reach as far as these sizes.
template <class T>
Strided<T> strided(const Layout &layout, const Sizes &wanted, const char *name) {
  const auto &[address, bytes, sizes, strides] = layout;
  if (bytes != static_cast<Index>(sizeof(T)))
    refuse(std::string(name) + " has numbers of " + std::to_string(bytes) + " bytes instead of " +
           std::to_string(sizeof(T)));
  bool any = true;
  for (std::size_t axis = 0; axis < wanted.size(); ++axis) {
    const Index size = strides[axis] ? wanted[axis] : std::min<Index>(wanted[axis], 1);
    if (size < 0 || strides[axis] < 0 || sizes[axis] < size)
      refuse(std::string(name) + " has the size " + std::to_string(sizes[axis]) + " along axis " +
             std::to_string(axis) + " instead of " + std::to_string(size));
    any = any && wanted[axis] > 0;
  }
  if (any && !address) refuse(std::string(name) + " has no memory; is it a fake tensor?");
  return {reinterpret_cast<T *>(address), strides[0], strides[1], strides[2], strides[3]};
}

// The same of a tensor that may not be there.
template <class T>
Strided<T> strided_or_null(const Layout &layout, const Sizes &wanted, const char *name) {
  return layout == Layout{} ? Strided<T>{} : strided<T>(layout, wanted, name);
}

inline void require_bits(Index bits) {
  if (bits != 4 && bits != 8) refuse("codes have 4 or 8 bits, not " + std::to_string(bits));
}

// Groups of `size` channels or sites, a smaller last one included.
inline Index groups_of(Index size, Index group_size) {
  if (group_size < 1) refuse("a group size is " + std::to_string(group_size));
  return size / group_size + (size % group_size != 0);
}

}  // namespace
}  // namespace bkcore
