// The interface between the roundings and their caller.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bkcore {

// Rows of channels, rounded to the values of their codes
// (src/bkcore/kernels/ops/round_activations.py).
struct RoundChannels {
  std::int64_t rows, channels, bits, group_size;
  const float *x;              // (rows, channels)
  const std::uint16_t *scale;  // bfloat16 (groups)
  const std::int8_t *zero;     // (groups)
  const float *levels;         // (2^bits), ascending: the values of the codes; or null
  float *out;                  // (rows, channels)
};

// The straight-through derivative of that rounding.
struct RoundChannelsBackward {
  RoundChannels forward;  // `out` is not used
  const float *grad;      // (rows, channels)
  float *dx;              // (rows, channels)
  // A row for every kRowsPerShare rows; zeros at the start.
  float *dscale;   // (shares, channels)
  float *dlevels;  // (shares, 2^bits), or null without levels
};

constexpr std::int64_t kRowsPerShare = 64;

// A weight, rounded to the values of its codes (src/bkcore/kernels/ops/round_weight.py).
struct RoundWeight {
  std::int64_t rows, columns, bits, groups, group_size;
  const float *weight;         // (rows, columns)
  const std::uint16_t *scale;  // bfloat16 (rows, groups)
};

struct RoundingKernels {
  using Scratch = void *(*)(std::size_t bytes);
  void (*round_channels)(const RoundChannels &, std::int64_t first, std::int64_t count, Scratch);
  void (*round_channels_backward)(const RoundChannelsBackward &, std::int64_t share, Scratch);
  // Rounds a row of activations (count) to the values of its INT8 codes.
  void (*round_row)(const float *x, std::int64_t count, float *out);
  // Rounds a row of a weight; and the straight-through derivative of its values.
  void (*round_weight)(const RoundWeight &, std::int64_t row, std::int8_t *codes, float *values);
  void (*round_weight_backward)(const RoundWeight &, std::int64_t row, const float *grad,
                                float *dweight, float *dscale);
};

// One function per instruction set, from one source compiled several times.
RoundingKernels rounding_kernels_baseline();
RoundingKernels rounding_kernels_avx2();
RoundingKernels rounding_kernels_avx512();

}  // namespace bkcore
