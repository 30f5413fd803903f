// An exception in a thread reaches the caller.

#include "threads.h"

#include <doctest/doctest.h>

#include <new>

namespace bkcore {
namespace {

TEST_CASE("an exception leaves a parallel region as it leaves a loop") {
  for (const Index threads : {1, 2, 5})
    CHECK_THROWS_AS(parallel_for(100, threads,
                                 [](Index i) {
                                   if (i % 7 == 3) throw std::bad_alloc();
                                 }),
                    std::bad_alloc);
}

}  // namespace
}  // namespace bkcore
