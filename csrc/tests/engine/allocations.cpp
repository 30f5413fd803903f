#include "allocations.h"

#include <cstdlib>
#include <new>

namespace bkcore {

thread_local long Allocations::until_failure = -1;
thread_local std::size_t Allocations::largest = 0;

}  // namespace bkcore

void *operator new(std::size_t size) {
  using bkcore::Allocations;
  if (size > Allocations::largest) Allocations::largest = size;
  const bool fails = Allocations::until_failure == 0;
  if (Allocations::until_failure >= 0) --Allocations::until_failure;
  void *const memory = fails ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }
