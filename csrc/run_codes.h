// Products of codes and roundings to codes, spread over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "product.h"
#include "rounding.h"
#include "threads.h"

namespace bkcore {
namespace {

// How many rows share a panel, and how many products of codes make a thread worthwhile.
constexpr Index kRowsPerPanel = 384, kProductsPerThread = Index{1} << 18;
// Rows that a thread rounds at a time.
constexpr Index kRowsAtOnce = 64;

inline EncodedRows encoded_rows(const Product &p, Index words) {
  static thread_local std::vector<std::byte> memory;
  const std::size_t bytes = p.rows * (words + p.groups + 1) * sizeof(std::uint32_t);
  auto *start = static_cast<std::uint32_t *>(aligned(memory, bytes));
  auto *sums = reinterpret_cast<std::int32_t *>(start + p.rows * words);
  return {reinterpret_cast<float *>(sums + p.rows * p.groups), sums, start};
}

// Calls each(count, work) twice: for chunks of rows to encode, then for the products themselves.
template <class Each>
void multiply_codes(const Isa &isa, const Product &p, const Each &each) {
  if (p.inputs == 0) {  // there is no group to start the sums
    std::fill_n(p.out, p.rows * p.outputs, 0.0F);
    return;
  }
  const ProductKernels &kernels = isa.product;
  const EncodedRows encoded = encoded_rows(p, kernels.words(p));
  const Index panels = ceil_divide(p.outputs, kernels.panel);
  const Index chunks = ceil_divide(p.rows, kRowsPerPanel);
  each(chunks, [&](Index chunk) {
    const Index first = chunk * kRowsPerPanel, end = std::min(p.rows, first + kRowsPerPanel);
    for (Index row = first; row < end; ++row) kernels.encode(p, row, encoded);
  });
  each(panels * chunks, [&](Index i) {
    const Index first = i / panels * kRowsPerPanel;
    kernels.multiply(p, encoded, i % panels * kernels.panel, first,
                     std::min(kRowsPerPanel, p.rows - first), scratch);
  });
}

inline void run_product(const Isa &isa, Index allowed, const Product &p) {
  const Index products = p.rows * p.outputs * p.inputs;
  const Index threads = worthwhile_threads(products, allowed, kProductsPerThread);
  multiply_codes(isa, p,
                 [&](Index count, const auto &work) { parallel_for(count, threads, work); });
}

inline void run_round_channels(const Isa &isa, Index threads, const RoundChannels &r) {
  threads = worthwhile_threads(r.rows * r.channels, threads);
  const Index share = ceil_divide(std::max<Index>(r.rows, 1), threads);
  const auto kernel = isa.rounding.round_channels;
  parallel_for(ceil_divide(r.rows, share), threads, [&](Index i) {
    kernel(r, i * share, std::min(share, r.rows - i * share), scratch);
  });
}

inline void run_round_channels_backward(const Isa &isa, Index threads,
                                        const RoundChannelsBackward &a) {
  const Index rows = a.forward.rows;
  threads = worthwhile_threads(rows * a.forward.channels, threads);
  const auto kernel = isa.rounding.round_channels_backward;
  parallel_for(ceil_divide(rows, kRowsPerShare), threads,
               [&](Index share) { kernel(a, share, scratch); });
}

// Calls a function for every row; each thread takes a few rows at a time.
template <class Work>
void each_row(Index rows, Index columns, Index threads, const Work &work) {
  threads = worthwhile_threads(rows * columns, threads);
  parallel_for(ceil_divide(rows, kRowsAtOnce), threads, [&](Index i) {
    for (Index row = i * kRowsAtOnce; row < std::min(rows, (i + 1) * kRowsAtOnce); ++row) work(row);
  });
}

inline void run_round_rows(const Isa &isa, Index threads, Index rows, Index columns, const float *x,
                           float *out) {
  const auto kernel = isa.rounding.round_row;
  each_row(rows, columns, threads,
           [&](Index row) { kernel(x + row * columns, columns, out + row * columns); });
}

inline void run_round_weight(const Isa &isa, Index threads, const RoundWeight &w,
                             std::int8_t *codes, float *values) {
  const auto kernel = isa.rounding.round_weight;
  each_row(w.rows, w.columns, threads,
           [&](Index row) { kernel(w, row, codes + row * w.columns, values + row * w.columns); });
}

// grad and dweight (rows, columns), dscale (rows, groups).
inline void run_round_weight_backward(const Isa &isa, Index threads, const RoundWeight &w,
                                      const float *grad, float *dweight, float *dscale) {
  const auto kernel = isa.rounding.round_weight_backward;
  each_row(w.rows, w.columns, threads, [&](Index row) {
    kernel(w, row, grad + row * w.columns, dweight + row * w.columns, dscale + row * w.groups);
  });
}

}  // namespace
}  // namespace bkcore
