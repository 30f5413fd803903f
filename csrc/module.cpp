// The Python module bkcore.kernels._native: picks the instruction set and spreads the work over
// threads. Python has checked every tensor (src/bkcore/kernels/ops.py) and passes addresses.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "sweep.h"

namespace nb = nanobind;

namespace bkcore {
namespace {

using Index = std::int64_t;
using Address = std::uintptr_t;

// Below this many elements per thread, starting the threads costs more than they save.
constexpr Index kElementsPerThread = 4096;
// Lanes of one unit of work are whole cache lines, so that no two threads write to the same one.
constexpr Index kLaneStep = 16;

struct Isa {
  std::string name;
  KernelTable table;
};

std::vector<Isa> detect() {
  std::vector<Isa> found;
#ifdef BKCORE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", sweep_kernels_avx512()});
  if (avx2) found.push_back({"avx2", sweep_kernels_avx2()});
#endif
  found.push_back({"baseline", sweep_kernels_baseline()});
  return found;
}

const std::vector<Isa> &isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

template <class T>
const Kernels<T> &kernels(const std::string &isa) {
  for (const Isa &known : isas()) {
    if (known.name != isa) continue;
    if constexpr (sizeof(T) == sizeof(float)) {
      return known.table.f32;
    } else {
      return known.table.f64;
    }
  }
  throw std::invalid_argument("this processor or build has no instruction set " + isa);
}

// Batch elements times chunks of lanes, as the units that threads share.
struct Plan {
  Index threads, chunk, chunks, units;

  Plan(Index batch, Index sites, Index lanes, Index allowed) {
    const Index worth = batch * sites * lanes / kElementsPerThread;
    threads = std::max<Index>(1, std::min(allowed, worth));
#ifndef _OPENMP
    threads = 1;
#endif
    // A batch that divides evenly, or is long, needs no split along the lanes.
    const Index splits = batch % threads == 0 || batch >= 4 * threads ? 1 : 2 * threads;
    const Index even = (lanes + splits - 1) / splits;
    const Index rounded = (even + kLaneStep - 1) / kLaneStep * kLaneStep;
    chunk = std::max(kLaneStep, std::min(rounded, kMaxLanes));
    chunks = (lanes + chunk - 1) / chunk;
    units = batch * chunks;
  }
};

// Calls work(batch, first lane, last lane, thread) for every unit.
template <class Work>
void for_each_unit(const Plan &plan, Index lanes, const Work &work) {
  const auto run = [&](Index unit, Index thread) {
    const Index first = unit % plan.chunks * plan.chunk;
    work(unit / plan.chunks, first, std::min(first + plan.chunk, lanes), thread);
  };
#ifdef _OPENMP
  // Not even a region of one thread: a forked process must not touch its parent's thread pool.
  if (plan.threads > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(plan.threads))
    for (Index unit = 0; unit < plan.units; ++unit) run(unit, omp_get_thread_num());
    return;
  }
#endif
  for (Index unit = 0; unit < plan.units; ++unit) run(unit, 0);
}

using Shape = std::tuple<Index, Index, Index>;  // batch, sites, lanes
using RowCounts = std::tuple<Index, Index>;     // rows of eta, rows of hopping

template <class T>
Sweep<T> describe(Shape shape, RowCounts rows, Address v, Address source, Address energy,
                  Address eta, Address hopping, Address parts) {
  const auto [batch, sites, lanes] = shape;
  const auto [eta_rows, hopping_rows] = rows;
  return {sites,
          lanes,
          eta_rows > 1 ? lanes : 0,
          hopping_rows > 1 ? lanes : 0,
          reinterpret_cast<const T *>(v),
          reinterpret_cast<const T *>(source),
          reinterpret_cast<const T *>(energy),
          reinterpret_cast<const T *>(eta),
          reinterpret_cast<const T *>(hopping),
          reinterpret_cast<T *>(parts)};
}

template <class T>
void run_forward(const std::string &isa, Index threads, bool two_sided, Shape shape,
                 const Sweep<T> &sweep) {
  const auto [batch, sites, lanes] = shape;
  const auto kernel = two_sided ? kernels<T>(isa).two_sided : kernels<T>(isa).causal;
  for_each_unit(Plan(batch, sites, lanes, threads), lanes,
                [&](Index b, Index first, Index last, Index) { kernel(sweep, b, first, last); });
}

template <class T>
void run_backward(const std::string &isa, Index threads, bool two_sided, Shape shape,
                  const Adjoint<T> &adjoint) {
  const auto [batch, sites, lanes] = shape;
  const Kernels<T> &set = kernels<T>(isa);
  const auto kernel = two_sided ? set.two_sided_backward : set.causal_backward;
  const Plan plan(batch, sites, lanes, threads);
  const Index share = two_sided ? 4 * sites * std::min(plan.chunk, lanes) : 0;
  const std::unique_ptr<T[]> workspace(new T[static_cast<std::size_t>(share * plan.threads)]);
  for_each_unit(plan, lanes, [&](Index b, Index first, Index last, Index thread) {
    kernel(adjoint, b, first, last, workspace.get() + thread * share);
  });
}

void forward(const std::string &isa, Index threads, bool is_double, bool two_sided, Shape shape,
             RowCounts rows, Address v, Address source, Address energy, Address eta,
             Address hopping, Address parts) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    run_forward<T>(isa, threads, two_sided, shape,
                   describe<T>(shape, rows, v, source, energy, eta, hopping, parts));
  };
  is_double ? run(double()) : run(float());
}

void backward(const std::string &isa, Index threads, bool is_double, bool two_sided, Shape shape,
              RowCounts rows, Address v, Address source, Address energy, Address eta,
              Address hopping, Address parts, Address grad, Address dv, Address dsource,
              Address denergy, Address deta, Address dhopping) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    run_backward<T>(isa, threads, two_sided, shape,
                    {describe<T>(shape, rows, v, source, energy, eta, hopping, parts),
                     reinterpret_cast<const T *>(grad), reinterpret_cast<T *>(dv),
                     reinterpret_cast<T *>(dsource), reinterpret_cast<T *>(denergy),
                     reinterpret_cast<T *>(deta), reinterpret_cast<T *>(dhopping)});
  };
  is_double ? run(double()) : run(float());
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa &isa : isas()) names.push_back(isa.name);
  return names;
}

}  // namespace
}  // namespace bkcore

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of bkcore. Private: the functions take raw addresses.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("supported_isas", &bkcore::supported_isas);
  m.def("sweep", &bkcore::forward, Unlocked());
  m.def("sweep_backward", &bkcore::backward, Unlocked());
}
