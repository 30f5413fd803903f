// The float functions of a token's way through the model: norms, SiLU, short convolution, float
// products and softmax.
//
// Compiled once per instruction set, which BKCORE_ISA names. sweep_kernel.cpp says why everything
// is in an unnamed namespace and no header with inline functions is included.
// Every result has the same bits for every instruction set: only sums, products, quotients and
// roots are used, which IEEE 754 rounds one way, and no fused multiply-add. Sums have kLanes
// partial sums whatever the vectors' width: partial sum j takes the numbers j, j + kLanes, ..., and
// the halves are added until one is left.

#include <cstring>

#include "functions.h"
#include "halves.h"
#include "packing.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(functions_, isa)

namespace bkcore {
namespace {

using S = Simd<float>;
using V = S::V;

constexpr Index kLanes = 16;
constexpr Index kVectors = kLanes / S::width;

// The bits of a vector's numbers. Unsigned, so that they may be shifted out.
using Bits = std::uint32_t __attribute__((vector_size(sizeof(V))));

BKCORE_INLINE Bits bits_of(V x) {
  Bits out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

BKCORE_INLINE V from_bits(Bits x) {
  V out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// exp(x), by x = n ln 2 + r with |r| <= ln(2) / 2 and a polynomial of degree 6 in r; at most
// 2 units in the last place from the truth. Below -87.3, where results would be subnormal, it is
// exp(-87.3); above 88.3 exp(88.3).
BKCORE_INLINE V exponential(V given) {
  V x = given;
  const V low = S::set(-87.33654f), high = S::set(88.37626f);
  x = x > low ? x : low;
  x = x < high ? x : high;
  const V shifted = x * S::set(1.44269504f) + S::set(kRound);
  const V n = shifted - S::set(kRound);
  // 0.693359375 has 9 bits, so that n times it is exact.
  V r = x - n * S::set(0.693359375f);
  r = r - n * S::set(-2.12194440e-4f);
  V p = S::set(1.9875691500e-4f);
  p = p * r + S::set(1.3981999507e-3f);
  p = p * r + S::set(8.3334519073e-3f);
  p = p * r + S::set(4.1665795894e-2f);
  p = p * r + S::set(1.6666665459e-1f);
  p = p * r + S::set(5.0000001201e-1f);
  p = p * (r * r) + r + S::set(1);
  // The low bits of `shifted` hold n; as a power of two it is n in the exponent.
  const Bits power = (bits_of(shifted) << 23) + 0x3F800000u;
  return given == given ? p * from_bits(power) : given;
}

BKCORE_INLINE V silu(V x) { return x / (S::set(1) + exponential(-x)); }

// Calls body(k, place) for all vectors of `count` numbers, which start at number k; the last may be
// ragged.
template <class Body>
BKCORE_INLINE void each_vector(Index count, const Body &body) {
  for_vectors<float>(count, body);
}

// The sum of partial sums: halves are added until one number is left.
BKCORE_INLINE float total(const V (&part)[kVectors]) {
  float all[kLanes];
  for (Index j = 0; j < kVectors; ++j) S::store(all + j * S::width, part[j]);
  for (Index half = kLanes / 2; half > 0; half /= 2)
    for (Index j = 0; j < half; ++j) all[j] += all[j + half];
  return all[0];
}

// The sum over k of what term(k, place) gives.
template <class Term>
BKCORE_INLINE float sum(Index count, const Term &term) {
  V part[kVectors];
  for (V &each : part) each = S::set(0);
  Index k = 0;
  for (; k + kLanes <= count; k += kLanes)
    for (Index j = 0; j < kVectors; ++j) part[j] = part[j] + term(k + j * S::width, Whole{});
  for (Index j = 0; k < count; ++j, k += S::width)
    part[j] = part[j] + (count - k >= S::width ? term(k, Whole{}) : term(k, Ragged{count - k}));
  return total(part);
}

BKCORE_INLINE float sum_of_squares(const float *x, Index count) {
  return sum(count, [&](Index k, auto place) {
    const V part = load<float>(x + k, place);
    return part * part;
  });
}

// sqrt is an instruction on every processor here, and rounded as IEEE 754 asks.
BKCORE_INLINE float root(float x) { return __builtin_sqrtf(x); }

void rms_norm(const float *x, const float *weight, Index count, float eps, float *out) {
  const float mean = sum_of_squares(x, count) / static_cast<float>(count);
  const V scale = S::set(1 / root(mean + eps));
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, load<float>(x + k, place) * scale * load<float>(weight + k, place),
                 place);
  });
}

void unit_length(const float *x, Index count, float eps, float *out) {
  const V scale = S::set(1 / root(sum_of_squares(x, count) + eps));
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, load<float>(x + k, place) * scale, place);
  });
}

void silu(const float *x, Index count, float *out) {
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, silu(load<float>(x + k, place)), place);
  });
}

void gated(const float *x, const float *gate, Index count, float *out) {
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, load<float>(x + k, place) * silu(load<float>(gate + k, place)), place);
  });
}

void convolve(const float *const *sites, const float *weight, Index taps, Index count, float *out) {
  each_vector(count, [&](Index k, auto place) {
    const auto tap = [&](Index i) {
      return load<float>(sites[i] + k, place) * load<float>(weight + i * count + k, place);
    };
    V total = tap(0);
    for (Index i = 1; i < taps; ++i) total = total + tap(i);
    store<float>(out + k, silu(total), place);
  });
}

void softmax(const float *x, Index count, float *out) {
  float largest = x[0];
  for (Index k = 1; k < count; ++k) largest = x[k] > largest ? x[k] : largest;
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, exponential(load<float>(x + k, place) - S::set(largest)), place);
  });
  float total = out[0];
  for (Index k = 1; k < count; ++k) total += out[k];
  each_vector(count, [&](Index k, auto place) {
    store<float>(out + k, load<float>(out + k, place) / S::set(total), place);
  });
}

BKCORE_INLINE V widen_half(const std::uint16_t *p, Index count) {
#if defined(__AVX512F__)
  if (count >= 16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
  if (count >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#endif
  float all[S::width] = {};
  for (Index k = 0; k < least(count, S::width); ++k) all[k] = from_float16(p[k]);
  return S::load(all);
}

BKCORE_INLINE V widen_bfloat(const std::uint16_t *p, Index count) {
  float all[S::width] = {};
  for (Index k = 0; k < least(count, S::width); ++k) all[k] = from_bfloat16(p[k]);
  return S::load(all);
}

template <Dense::Kind kind>
BKCORE_INLINE V widened(const void *row, Index k, Index count) {
  if constexpr (kind == Dense::Kind::f32) {
    const float *p = static_cast<const float *>(row) + k;
    return count >= S::width ? S::load(p) : S::load(p, count);
  } else if constexpr (kind == Dense::Kind::f16) {
    return widen_half(static_cast<const std::uint16_t *>(row) + k, count);
  } else {
    return widen_bfloat(static_cast<const std::uint16_t *>(row) + k, count);
  }
}

constexpr Index bytes_of(Dense::Kind kind) { return kind == Dense::Kind::f32 ? 4 : 2; }

// As many rows and outputs are multiplied together as there are registers for their sums.
constexpr Index kBlock = kVectors == 1 ? 4 : kVectors == 2 ? 2 : 1;

// The products of R rows and O outputs from `output` on, each summed as in `sum`.
template <Dense::Kind kind, Index R, Index O>
BKCORE_INLINE void multiply_block(const Dense &m, const float *x, Index output, float *out) {
  const char *const weight = static_cast<const char *>(m.weight);
  const Index pitch = m.inputs * bytes_of(kind);
  V part[R][O][kVectors];
  for (auto &row : part)
    for (auto &sums : row)
      for (V &each : sums) each = S::set(0);
  for (Index first = 0; first < m.inputs; first += kLanes)
    for (Index j = 0; j < kVectors; ++j) {
      const Index k = first + j * S::width, left = m.inputs - k;
      if (left <= 0) break;
      V factor[R];
      for (Index r = 0; r < R; ++r) {
        const float *p = x + r * m.inputs + k;
        factor[r] = left >= S::width ? S::load(p) : S::load(p, left);
      }
      for (Index o = 0; o < O; ++o) {
        const V w = widened<kind>(weight + (output + o) * pitch, k, left);
        for (Index r = 0; r < R; ++r) part[r][o][j] = part[r][o][j] + factor[r] * w;
      }
    }
  for (Index r = 0; r < R; ++r)
    for (Index o = 0; o < O; ++o) out[r * m.outputs + output + o] = total(part[r][o]);
}

template <Dense::Kind kind, Index R>
void multiply_rows(const Dense &m, const float *x, Index first, Index count, float *out) {
  Index o = first;
  for (; o + kBlock <= first + count; o += kBlock) multiply_block<kind, R, kBlock>(m, x, o, out);
  for (; o < first + count; ++o) multiply_block<kind, R, 1>(m, x, o, out);
}

template <Dense::Kind kind>
void multiply_as(const Dense &m, const float *x, Index rows, Index first, Index count, float *out) {
  Index r = 0;
  for (; r + kBlock <= rows; r += kBlock)
    multiply_rows<kind, kBlock>(m, x + r * m.inputs, first, count, out + r * m.outputs);
  for (; r < rows; ++r)
    multiply_rows<kind, 1>(m, x + r * m.inputs, first, count, out + r * m.outputs);
}

void multiply(const Dense &m, const float *x, Index rows, Index first, Index count, float *out) {
  using Kind = Dense::Kind;
  switch (m.kind) {
    case Kind::f32:
      return multiply_as<Kind::f32>(m, x, rows, first, count, out);
    case Kind::f16:
      return multiply_as<Kind::f16>(m, x, rows, first, count, out);
    case Kind::bf16:
      return multiply_as<Kind::bf16>(m, x, rows, first, count, out);
  }
}

template <Dense::Kind kind>
void row_as(const Dense &m, Index output, float *out) {
  const void *row = static_cast<const char *>(m.weight) + output * m.inputs * bytes_of(kind);
  each_vector(m.inputs, [&](Index k, auto place) {
    store<float>(out + k, widened<kind>(row, k, m.inputs - k), place);
  });
}

void row(const Dense &m, Index output, float *out) {
  switch (m.kind) {
    case Dense::Kind::f32:
      return row_as<Dense::Kind::f32>(m, output, out);
    case Dense::Kind::f16:
      return row_as<Dense::Kind::f16>(m, output, out);
    case Dense::Kind::bf16:
      return row_as<Dense::Kind::bf16>(m, output, out);
  }
}

}  // namespace

Functions BKCORE_TABLE(BKCORE_ISA)() {
  return {rms_norm, unit_length, silu, gated, convolve, multiply, row, softmax};
}

}  // namespace bkcore
