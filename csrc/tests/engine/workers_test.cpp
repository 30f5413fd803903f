// Every piece of work is done once, whatever happens around it.

#include "engine/workers.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "allocations.h"

namespace bkcore::engine {
namespace {

void each_is_done_once(Workers &workers, Index count) {
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(count));
  workers.each(true, count, [&](Index i) { done[static_cast<std::size_t>(i)].fetch_add(1); });
  for (const auto &times : done) REQUIRE(times.load() == 1);
}

// Whether two threads work at the same time: each piece waits for the other one to begin.
bool two_work_at_once(Workers &workers) {
  std::atomic<int> begun{0}, met{0};
  workers.each(true, 2, [&](Index) {
    begun.fetch_add(1);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (begun.load() < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    if (begun.load() == 2) met.fetch_add(1);
  });
  return met.load() == 2;
}

TEST_CASE("each piece is done once") {
  for (const Index threads : {1, 2, 3, 8}) {
    Workers workers(threads);
    CHECK(workers.threads() == threads);
    for (const Index count : {0, 1, 2, 3, 7, 100}) each_is_done_once(workers, count);
    for (int i = 0; i < 300; ++i) each_is_done_once(workers, 5);
  }
}

TEST_CASE("what a piece wrote is there afterwards") {
  Workers workers(3);
  std::vector<Index> squares(1000);
  for (int round = 1; round <= 50; ++round) {
    workers.each(true, 1000, [&](Index i) { squares[static_cast<std::size_t>(i)] = i * round; });
    REQUIRE(std::accumulate(squares.begin(), squares.end(), Index{0}) == round * 499500);
  }
}

TEST_CASE("threads that sleep are woken") {
  Workers workers(2);
  for (int i = 0; i < 5; ++i) {
    CHECK(two_work_at_once(workers));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

TEST_CASE("jobs are counted, and those of the caller alone are none") {
  Workers workers(2);
  CHECK(workers.jobs() == 0);
  workers.each(false, 5, [](Index) {}), workers.each(true, 1, [](Index) {});
  CHECK(workers.jobs() == 0);
  for (int i = 0; i < 3; ++i) workers.each(true, 2, [](Index) {});
  CHECK(workers.jobs() == 3);
}

TEST_CASE("memory that runs out when threads are started is an exception, and the next try works") {
  int refused = 0;
  for (bool started = false; !started;) {
    Workers workers(4);
    Allocations::until_failure = refused;
    try {
      workers.each(true, 8, [](Index) {});
      started = true;
    } catch (const std::bad_alloc &) {
      ++refused;
    }
    Allocations::until_failure = -1;
    CHECK(two_work_at_once(workers));
  }
  CHECK(refused >= 4);  // the team, and each of its three threads
}

TEST_CASE("an exception of a piece is thrown again, and the next work is done") {
  for (const Index threads : {1, 2, 5}) {
    Workers workers(threads);
    for (int round = 0; round < 20; ++round) {
      CHECK_THROWS_AS(workers.each(true, 50,
                                   [](Index i) {
                                     if (i % 7 == 3) throw std::bad_alloc();
                                   }),
                      std::bad_alloc);
      each_is_done_once(workers, 50);
    }
  }
}

TEST_CASE("more pieces than can be counted are refused") {
  Workers workers(2);
  CHECK_THROWS_AS(workers.each(true, Index{1} << 32, [](Index) {}), InputError);
}

TEST_CASE("several teams work at once, one inside another") {
  std::atomic<Index> total{0};
  const auto work = [&] {
    Workers outer(2);
    for (int i = 0; i < 20; ++i)
      outer.each(true, 4, [&](Index) {
        Workers inner(2);
        inner.each(true, 3, [&](Index) { total.fetch_add(1); });
      });
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(work);
  for (std::thread &thread : threads) thread.join();
  CHECK(total.load() == 3 * 20 * 4 * 3);
}

// Ends the child without the clean-up of a process that it shares with the parent.
int status_of_child(const std::function<bool()> &work) {
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::alarm(20);
    ::_exit(work() ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  return status;
}

// ThreadSanitizer does not know threads of a child.
#if !defined(__SANITIZE_THREAD__)
TEST_CASE("a child of a fork has threads of its own") {
  auto workers = std::make_unique<Workers>(3);
  each_is_done_once(*workers, 10);
  const auto work = [&] {
    if (!two_work_at_once(*workers)) return false;
    std::atomic<Index> total{0};
    for (int i = 0; i < 100; ++i) workers->each(true, 10, [&](Index) { total.fetch_add(1); });
    workers.reset();
    return total.load() == 1000;
  };
  CHECK(status_of_child(work) == 0);
  each_is_done_once(*workers, 10);
  // A child of the child, whose parent has threads or has none.
  CHECK(status_of_child([&] { return status_of_child(work) == 0; }) == 0);
  CHECK(status_of_child([&] {
          workers->each(true, 10, [](Index) {});
          return status_of_child(work) == 0;
        }) == 0);
  CHECK(status_of_child([&] {  // forgets them without having used them
          workers.reset();
          return true;
        }) == 0);
}
#endif

}  // namespace
}  // namespace bkcore::engine
