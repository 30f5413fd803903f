// The engine's threads. They share pieces of work, and sleep when there is none.
//
// The caller works, too: it takes pieces like everyone else, so that a thread which the system has
// not woken yet, or gives to another process, delays nothing but the piece that it holds. A thread
// without work looks for more for some microseconds, because the next layer is about to come, and
// then sleeps until it is woken.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../threads.h"
#include "error.h"
#include "float_mode.h"

namespace bkcore::engine {

// How often a thread looks for work before it sleeps: about 20 microseconds.
constexpr int kLooks = 1000;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Workers {
 public:
  // With one thread nothing is started: the caller does everything.
  explicit Workers(Index threads) : threads_(threads) {}
  Workers(const Workers &) = delete;
  Workers &operator=(const Workers &) = delete;
  ~Workers() {
    if (team_ && team_->forks == forks())
      team_->stop();
    else
      abandon();
  }

  Index threads() const { return threads_; }

  // How often the threads have shared work.
  std::uint32_t jobs() const { return team_ ? team_->job : 0; }

  // Calls work(i) for i in [0, count), in any order, and returns when all are done. An exception
  // of a call is thrown again here. Work that is not worth sharing, which takes a microsecond, is
  // done by the caller.
  template <class Work>
  void each(bool shared, Index count, const Work &work) {
    if (!shared || threads_ <= 1 || count <= 1) {
      for (Index i = 0; i < count; ++i) work(i);
      return;
    }
    // A reading has fewer: its rows and the channels of a model are limited.
    if (count > kMost) throw InputError("there are more than 2^32 - 1 pieces of work");
    if (!team_ || team_->forks != forks()) start();
    const auto ascending = [&](Index left) { work(count - left); };
    using Ascending = decltype(ascending);
    team_->run(
        count, [](const void *context, Index left) { (*static_cast<Ascending *>(context))(left); },
        &ascending);
  }

 private:
  using Call = void (*)(const void *context, Index left);
  static constexpr Index kMost = 0xFFFFFFFF;

  // How often this process was made by a fork. Threads do not come along into the child.
  static unsigned forks() {
    static std::atomic<unsigned> count{0};
    static const int registered =
        ::pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
    (void)registered;
    return count.load(std::memory_order_relaxed);
  }

  struct Team {
    explicit Team(Index helpers) : forks(Workers::forks()) {
      threads.reserve(static_cast<std::size_t>(helpers));
      try {
        for (Index i = 0; i < helpers; ++i) threads.emplace_back([this] { serve(); });
      } catch (...) {  // a thread that runs must not be destroyed
        stop();
        throw;
      }
    }

    void run(Index count, Call next_call, const void *next_context) {
      call = next_call, context = next_context;
      failure = nullptr;
      finished.store(0);
      ++job;
      todo.store(std::uint64_t{job} << 32 | static_cast<std::uint64_t>(count));
      // Both sequentially consistent, as in `serve`: a thread that is about to sleep sees the job,
      // or is seen here.
      if (sleeping.load() > 0) {
        const std::lock_guard lock(mutex);
        wake.notify_all();
      }
      work(job);
      for (int looks = 0; looks < kLooks && finished.load() < count; ++looks) pause_briefly();
      while (finished.load() < count) ::sched_yield();
      if (failure) std::rethrow_exception(failure);
    }

    void stop() {
      {
        const std::lock_guard lock(mutex);
        stopped = true;
        wake.notify_all();
      }
      for (std::thread &thread : threads) thread.join();
    }

    // Takes pieces of a job until none is left. A thread that is late finds another number, or no
    // piece: whoever gets a piece knows that the job is not over, and its `call` and `context`
    // stay.
    void work(std::uint32_t number) {
      std::uint64_t at = todo.load();
      while (at >> 32 == number && (at & kMost) > 0) {
        if (!todo.compare_exchange_weak(at, at - 1)) continue;
        try {
          call(context, static_cast<Index>(at & kMost));
        } catch (...) {
          const std::lock_guard lock(mutex);
          failure = std::current_exception();
        }
        finished.fetch_add(1);
        at = todo.load();
      }
    }

    void serve() {
      const DefaultFloats floats;  // not those of whoever started the thread
      std::uint32_t seen = 0;
      for (;;) {
        std::uint32_t number = current();
        for (int looks = 0; number == seen && looks < kLooks; ++looks) {
          pause_briefly();
          number = current();
        }
        if (number != seen) {
          seen = number;
          work(number);
          continue;
        }
        std::unique_lock lock(mutex);
        ++sleeping;
        wake.wait(lock, [&] { return stopped || current() != seen; });
        --sleeping;
        if (stopped) return;
      }
    }

    std::uint32_t current() const { return static_cast<std::uint32_t>(todo.load() >> 32); }

    const unsigned forks;
    Call call = nullptr;
    const void *context = nullptr;
    std::uint32_t job = 0;
    std::atomic<std::uint64_t> todo{0};  // the job in the high half, pieces left in the low one
    std::atomic<Index> finished{0};
    std::atomic<int> sleeping{0};
    bool stopped = false;  // under the lock
    std::mutex mutex;
    std::condition_variable wake;
    std::exception_ptr failure;  // under the lock while pieces are done, else the caller's
    std::vector<std::thread> threads;
  };

  void start() {
    abandon();
    try {
      team_ = std::make_unique<Team>(threads_ - 1);
    } catch (const std::system_error &error) {
      throw Error("threads cannot be started: " + std::string(error.what()));
    }
  }

  // Forgets a team that a fork left without threads: what they had locked stays locked.
  void abandon() { static_cast<void>(team_.release()); }

  Index threads_;
  std::unique_ptr<Team> team_;
};

}  // namespace bkcore::engine
