// The interface between the integer products and their caller; the order of roundings is that of
// src/bkcore/kernels/ops/product.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bkcore {

// Rows of activations times the rows of a quantized weight; all contiguous.
struct Product {
  std::int64_t rows, outputs, inputs, bits, groups, group_size;
  const float *x;               // (rows, inputs)
  const std::uint8_t *weight;   // int8 (outputs, inputs), or two codes a byte (outputs, inputs / 2)
  const std::uint16_t *scales;  // bfloat16 (outputs, groups)
  float *out;                   // (rows, outputs)
};

// Activations as codes, in rows of ProductKernels::words words, whose order is up to the kernels.
struct EncodedRows {
  float *scale;          // (rows)
  std::int32_t *sums;    // (rows, groups): of the codes, which corrects for weights made unsigned
  std::uint32_t *words;  // (rows, words)
};

struct ProductKernels {
  using Scratch = void *(*)(std::size_t bytes);
  std::int64_t panel;                      // outputs that are computed together
  std::int64_t (*words)(const Product &);  // of one row of codes
  void (*encode)(const Product &, std::int64_t row, const EncodedRows &);
  // Computes the panel of outputs that starts at `output`, for `count` rows starting at `first`.
  void (*multiply)(const Product &, const EncodedRows &, std::int64_t output, std::int64_t first,
                   std::int64_t count, Scratch);
};

// One function per instruction set, from one source compiled several times.
ProductKernels product_kernels_baseline();
ProductKernels product_kernels_avx2();
ProductKernels product_kernels_vnni();
ProductKernels product_kernels_dotprod();

}  // namespace bkcore
