// The interface between the float functions of a token's way through the model and their callers.
// Formulas and the order of roundings: functions_kernel.cpp.
#pragma once

#include <cstdint>

namespace bkcore {

// Rows of a matrix that is not quantized: each number is converted to float.
struct Dense {
  enum class Kind { f32, f16, bf16 };
  Kind kind;
  std::int64_t outputs, inputs;
  const void *weight;  // (outputs, inputs)
};

struct Functions {
  // out = x / root mean square of x * weight.
  void (*rms_norm)(const float *x, const float *weight, std::int64_t count, float eps, float *out);
  // out = x / length, with eps in the sum of squares. Here and below they may be the same.
  void (*unit_length)(const float *x, std::int64_t count, float eps, float *out);
  // out = silu(x).
  void (*silu)(const float *x, std::int64_t count, float *out);
  // out = x * silu(gate).
  void (*gated)(const float *x, const float *gate, std::int64_t count, float *out);
  // out = silu(sum over taps of site * weight): sites, one address a tap; weight (taps, count).
  void (*convolve)(const float *const *sites, const float *weight, std::int64_t taps,
                   std::int64_t count, float *out);
  // The outputs [first, first + count) of a matrix for x (rows, inputs): out (rows, outputs).
  void (*multiply)(const Dense &, const float *x, std::int64_t rows, std::int64_t first,
                   std::int64_t count, float *out);
  // out (inputs) = one row of a matrix.
  void (*row)(const Dense &, std::int64_t output, float *out);
  // out = softmax(x) of at least one number.
  void (*softmax)(const float *x, std::int64_t count, float *out);
};

// One function per instruction set, from one source compiled several times.
Functions functions_baseline();
Functions functions_avx2();
Functions functions_avx512();

}  // namespace bkcore
