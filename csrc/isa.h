// The kernels of every instruction set that is compiled in, and those that this processor has.
#pragma once

#if defined(BKCORE_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "functions.h"
#include "product.h"
#include "rounding.h"
#include "sweep.h"

namespace bkcore {
namespace {

struct Isa {
  std::string name;
  KernelTable sweeps;
  ProductKernels product;
  RoundingKernels rounding;
  Functions functions;
};

#ifdef BKCORE_ARM
inline bool has_dot_products() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
  return getauxval(AT_HWCAP) & kAsimdDp;
#else
  return false;
#endif
}
#endif

inline std::vector<Isa> detect() {
  std::vector<Isa> found;
#ifdef BKCORE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    found.push_back({"avx512", sweep_kernels_avx512(),
                     vnni ? product_kernels_vnni() : product_kernels_avx2(),
                     rounding_kernels_avx512(), functions_avx512()});
  }
  if (avx2)
    found.push_back({"avx2", sweep_kernels_avx2(), product_kernels_avx2(), rounding_kernels_avx2(),
                     functions_avx2()});
#endif
#ifdef BKCORE_ARM
  // Everything else is the same: there is NEON on every processor.
  if (has_dot_products())
    found.push_back({"dotprod", sweep_kernels_baseline(), product_kernels_dotprod(),
                     rounding_kernels_baseline(), functions_baseline()});
#endif
  found.push_back({"baseline", sweep_kernels_baseline(), product_kernels_baseline(),
                   rounding_kernels_baseline(), functions_baseline()});
  return found;
}

// The best one first.
inline const std::vector<Isa> &isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

inline const Isa &find_isa(const std::string &name) {
  for (const Isa &known : isas())
    if (known.name == name) return known;
  throw std::invalid_argument("this processor or build has no instruction set " + name);
}

template <class T>
const Kernels<T> &kernels(const Isa &isa) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return isa.sweeps.f32;
  } else {
    return isa.sweeps.f64;
  }
}

}  // namespace
}  // namespace bkcore
