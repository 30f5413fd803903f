// Resolvent attention, spread over threads, one chain per piece of work.
#pragma once

#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace bkcore {
namespace {

template <class T, class Work>
void for_chains(const Attention<T> &a, Index threads, const Work &work) {
  const Index products = a.batch * a.sites * a.heads * a.keys * a.values;
  threads = worthwhile_threads(products, threads);
  const Index lanes = a.heads;
  parallel_for(a.batch * a.heads, threads, [&](Index i) { work(i / lanes, i % lanes); });
}

template <class T>
void run_attention(const Isa &isa, Index threads, const Attention<T> &a) {
  const auto kernel = kernels<T>(isa).attention;
  for_chains(a, threads, [&](Index b, Index h) { kernel(a, b, h); });
}

template <class T>
void run_attention_backward(const Isa &isa, Index threads, const Attention<T> &a,
                            const AttentionBackward<T> &d) {
  const auto kernel = kernels<T>(isa).attention_backward;
  for_chains(a, threads, [&](Index b, Index h) { kernel(a, d, b, h, scratch); });
}

}  // namespace
}  // namespace bkcore
