// Work spread over threads, and memory that belongs to one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace bkcore {
namespace {

using Index = std::int64_t;

// Below this many elements per thread, starting the threads costs more than they save.
constexpr Index kElementsPerThread = 4096;

inline Index ceil_divide(Index a, Index b) { return a / b + (a % b != 0); }
inline Index round_up_to(Index a, Index b) { return ceil_divide(a, b) * b; }

inline Index worthwhile_threads(Index elements, Index allowed, Index each = kElementsPerThread) {
#ifdef _OPENMP
  return std::max<Index>(1, std::min(allowed, elements / each));
#else
  return 1;
#endif
}

// Calls work(i) for i in [0, count); the threads take turns. If a call throws, for example because
// memory runs out, the exception is thrown again here: none may leave a parallel region.
template <class Work>
void parallel_for(Index count, Index threads, const Work &work) {
#ifdef _OPENMP
  // Not even a region of one thread: a forked process must not touch its parent's thread pool.
  if (threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
    for (Index i = 0; i < count; ++i) {
      try {
        work(i);
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  for (Index i = 0; i < count; ++i) work(i);
}

// Aligned memory in a vector that is kept for the next call: fresh pages cost more than a sweep.
inline void *aligned(std::vector<std::byte> &memory, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size());
#endif
  if (memory.size() < bytes + kLine) memory.resize(bytes + kLine);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  std::byte *const start = memory.data() + (kLine - address % kLine) % kLine;
#if defined(__SANITIZE_ADDRESS__)
  // This call may not touch what an earlier, larger call left behind.
  ASAN_POISON_MEMORY_REGION(start + bytes, memory.data() + memory.size() - (start + bytes));
#endif
#if defined(BKCORE_POISON)
  std::memset(start, 0xFF, bytes);  // all NaN, so that tests notice what nobody wrote in this call
#endif
  return start;
}

// Memory that belongs to the calling thread until its next call.
inline void *scratch(std::size_t bytes) {
  static thread_local std::vector<std::byte> memory;
  return aligned(memory, bytes);
}

}  // namespace
}  // namespace bkcore
