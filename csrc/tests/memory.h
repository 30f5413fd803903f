// Memory of exactly the right size for the tensors of tests, in which access beyond a tensor is
// noticed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "sweep.h"

namespace bkcore {
namespace {

using Index = std::int64_t;
// Batch, sites, parts and lanes.
using Sizes = std::array<Index, 4>;

// The first three rely on AddressSanitizer, which does not check masked loads and gathers; kLine
// starts at a cache line, kOffLine does not. The others are next to a guard page.
enum class Place { kHeap, kLine, kOffLine, kBeforePage, kAfterPage };

inline std::shared_ptr<void> allocate(std::size_t bytes, Place place) {
  if (bytes == 0) return nullptr;
  if (place <= Place::kOffLine) {
    void *memory = nullptr;
    const std::size_t before = place == Place::kOffLine ? sizeof(double) : 0;
    const std::size_t alignment = place == Place::kHeap ? sizeof(double) : 64;
    if (posix_memalign(&memory, alignment, before + bytes)) throw std::bad_alloc();
    return {static_cast<char *>(memory) + before, [memory](void *) { std::free(memory); }};
  }
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t inside = (bytes + page - 1) / page * page, all = inside + 2 * page;
  void *mapped = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char *first = static_cast<char *>(mapped) + page;
  if (mprotect(first, inside, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  void *start = place == Place::kAfterPage ? first : first + inside - bytes;
  return {start, [mapped, all](void *) { munmap(mapped, all); }};
}

// What nobody has written yet: NaN, or the largest whole number.
template <class T>
constexpr T kUnwritten = std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN()
                                                               : std::numeric_limits<T>::max();

// Contiguous numbers; null if there are none.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Index count, Place place = Place::kHeap)
      : size_(count),
        memory_(allocate(static_cast<std::size_t>(count) * sizeof(T), place)),
        data_(static_cast<T *>(memory_.get())) {
    for (T &x : *this) x = kUnwritten<T>;
  }
  template <class Make>
  static Buffer of(Index count, Make make, Place place = Place::kHeap) {
    Buffer all(count, place);
    for (T &x : all) x = static_cast<T>(make());
    return all;
  }

  static Buffer zeros(Index count, Place place = Place::kHeap) {
    return of(count, [] { return 0; }, place);
  }

  T *data() const { return data_; }
  const std::shared_ptr<void> &memory() const { return memory_; }
  Index size() const { return size_; }
  T *begin() const { return data_; }
  T *end() const { return data_ ? data_ + size_ : nullptr; }
  T &operator[](Index i) const { return data_[i]; }

 private:
  Index size_ = 0;
  std::shared_ptr<void> memory_;
  T *data_ = nullptr;
};

// The order of axes in memory, from the outermost to the innermost, and how many numbers are left
// out after each axis. An axis of `expanded` has no memory of its own: its stride is 0.
struct Layout {
  std::array<int, 4> order = {0, 1, 2, 3};
  Index gap = 0;
  std::array<bool, 4> expanded = {};
};

// A tensor (batch, sites, parts, lanes) of any strides; 0 along an axis of one, as kernels want it.
template <class T>
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Sizes &sizes, const Layout &layout = {}, Place place = Place::kHeap)
      : sizes_(sizes) {
    Index step = 1, last = 0;
    bool any = true;
    for (int k = 3; k >= 0; --k) {
      const int axis = layout.order[k];
      any = any && sizes[axis] > 0;
      if (layout.expanded[axis]) continue;
      strides_[axis] = sizes[axis] > 1 ? step : 0;
      last += (sizes[axis] - 1) * step;
      step = step * sizes[axis] + layout.gap;
    }
    numbers_ = Buffer<T>(any ? last + 1 : 0, place);
  }

  explicit operator bool() const { return numbers_.data(); }
  const Sizes &sizes() const { return sizes_; }
  const Buffer<T> &numbers() const { return numbers_; }
  T &at(Index b, Index i, Index c, Index h) const {
    return numbers_[b * strides_[0] + i * strides_[1] + c * strides_[2] + h * strides_[3]];
  }
  Strided<T> writable() const {
    return {numbers_.data(), strides_[0], strides_[1], strides_[2], strides_[3]};
  }
  Strided<const T> readable() const {
    return {numbers_.data(), strides_[0], strides_[1], strides_[2], strides_[3]};
  }

 private:
  Sizes sizes_ = {};
  Sizes strides_ = {};
  Buffer<T> numbers_;
};

}  // namespace
}  // namespace bkcore
