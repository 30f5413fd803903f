// Float functions of a language model, spread over threads.
#pragma once

#include <algorithm>
#include <vector>

#include "functions.h"
#include "isa.h"
#include "run_codes.h"
#include "threads.h"

namespace bkcore {
namespace {

// Numbers that a thread takes at a time, and outputs of a product.
constexpr Index kNumbersAtOnce = 4096, kOutputsAtOnce = 64;

inline void run_silu(const Isa &isa, Index threads, Index count, const float *x, float *out) {
  threads = worthwhile_threads(count, threads);
  parallel_for(ceil_divide(count, kNumbersAtOnce), threads, [&](Index i) {
    const Index first = i * kNumbersAtOnce;
    isa.functions.silu(x + first, std::min(kNumbersAtOnce, count - first), out + first);
  });
}

inline void run_rms_norm(const Isa &isa, Index threads, Index rows, Index channels, const float *x,
                         const float *weight, float eps, float *out) {
  each_row(rows, channels, threads, [&](Index row) {
    isa.functions.rms_norm(x + row * channels, weight, channels, eps, out + row * channels);
  });
}

inline void run_unit_length(const Isa &isa, Index threads, Index rows, Index channels,
                            const float *x, float eps, float *out) {
  each_row(rows, channels, threads, [&](Index row) {
    isa.functions.unit_length(x + row * channels, channels, eps, out + row * channels);
  });
}

inline void run_softmax(const Isa &isa, Index threads, Index rows, Index channels, const float *x,
                        float *out) {
  if (channels == 0) return;
  each_row(rows, channels, threads, [&](Index row) {
    isa.functions.softmax(x + row * channels, channels, out + row * channels);
  });
}

// x (batch, sites + taps - 1, channels), weight (taps, channels), out (batch, sites, channels).
inline void run_short_convolution(const Isa &isa, Index threads, Index batch, Index sites,
                                  Index taps, Index channels, const float *x, const float *weight,
                                  float *out) {
  each_row(batch * sites, channels, threads, [&](Index row) {
    const float *first = x + (row / sites * (sites + taps - 1) + row % sites) * channels;
    static thread_local std::vector<const float *> places;
    places.resize(taps);
    for (Index tap = 0; tap < taps; ++tap) places[tap] = first + tap * channels;
    isa.functions.convolve(places.data(), weight, taps, channels, out + row * channels);
  });
}

inline void run_dense_product(const Isa &isa, Index threads, Index rows, const Dense &m,
                              const float *x, float *out) {
  threads = worthwhile_threads(rows * m.outputs, threads, kElementsPerThread / 16);
  const Index pieces = ceil_divide(m.outputs, kOutputsAtOnce);
  parallel_for(ceil_divide(rows, kRowsAtOnce) * pieces, threads, [&](Index i) {
    const Index first = i % pieces * kOutputsAtOnce, row = i / pieces * kRowsAtOnce;
    isa.functions.multiply(m, x + row * m.inputs, std::min(kRowsAtOnce, rows - row), first,
                           std::min(kOutputsAtOnce, m.outputs - first), out + row * m.outputs);
  });
}

}  // namespace
}  // namespace bkcore
