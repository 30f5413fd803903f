#include "allocations.h"

#include <cstdlib>
#include <new>

namespace bkcore {
namespace {

void *allocate(std::size_t size) noexcept {
  if (size > Allocations::largest) Allocations::largest = size;
  const bool fails = Allocations::until_failure == 0;
  if (Allocations::until_failure >= 0) --Allocations::until_failure;
  return fails ? nullptr : std::malloc(size ? size : 1);
}

void *allocate_or_throw(std::size_t size) {
  void *const memory = allocate(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

thread_local long Allocations::until_failure = -1;
thread_local std::size_t Allocations::largest = 0;

}  // namespace bkcore

// All that have no alignment, since AddressSanitizer, too, has each of them.
void *operator new(std::size_t size) { return bkcore::allocate_or_throw(size); }
void *operator new[](std::size_t size) { return bkcore::allocate_or_throw(size); }
void *operator new(std::size_t size, const std::nothrow_t &) noexcept {
  return bkcore::allocate(size);
}
void *operator new[](std::size_t size, const std::nothrow_t &) noexcept {
  return bkcore::allocate(size);
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete[](void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void *memory, std::size_t) noexcept { std::free(memory); }
