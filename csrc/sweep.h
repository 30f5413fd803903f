// What the kernels and their caller agree on. Formulas, layout and derivation:
// src/bkcore/kernels/ops.py.
#pragma once

#include <cstdint>

namespace bkcore {

// The most lanes one call may take; it bounds the rows of state that a call keeps on its stack.
constexpr std::int64_t kMaxLanes = 256;

template <class T>
struct Sweep {
  std::int64_t sites, lanes;
  // Elements from one row to the next: 0 if all sites share a row.
  std::int64_t eta_stride, hopping_stride;
  const T *v, *source, *energy, *eta, *hopping;  // source may be null
  T *parts;
};

template <class T>
struct Adjoint {
  Sweep<T> forward;  // v may be null in the causal form; forward.parts is only read
  const T *grad;
  T *dv, *dsource;                 // dsource is null if there is no source
  T *denergy, *deta, *dhopping;    // one partial sum per batch element, zero at the start
};

// Every kernel works on the lanes [first, last) of one batch element.
template <class T>
struct Kernels {
  using Forward = void (*)(const Sweep<T> &, std::int64_t batch, std::int64_t first,
                           std::int64_t last);
  // The two-sided adjoint needs a workspace of 4 * sites * (last - first).
  using Backward = void (*)(const Adjoint<T> &, std::int64_t batch, std::int64_t first,
                            std::int64_t last, T *workspace);
  Forward causal, two_sided;
  Backward causal_backward, two_sided_backward;
};

struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

// One function per instruction set, from one source compiled several times.
KernelTable sweep_kernels_baseline();
KernelTable sweep_kernels_avx2();
KernelTable sweep_kernels_avx512();

}  // namespace bkcore
