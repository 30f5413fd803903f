// Memory that the calling thread asks `operator new` for: tests look at it, and let it run out.
#pragma once

#include <cstddef>

namespace bkcore {

struct Allocations {
  static thread_local long until_failure;   // that succeed before one fails; below 0 none does
  static thread_local std::size_t largest;  // bytes of the largest one
};

}  // namespace bkcore
