// One vector of lanes, for the instruction set that this file is compiled for.
//
// Simd<T>::V is a vector of `width` numbers; GCC and Clang provide the operators + - * / for it.
// Every fused multiply-add is explicit (contraction by the compiler is off), so that the result of
// a lane depends neither on its place in a vector nor on how lanes are split among threads. Partial
// loads fill the missing lanes with zeros; what is computed there is never stored.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BKCORE_INLINE inline __attribute__((always_inline))

#if !defined(__AVX2__) && !defined(__aarch64__)
#include "fused.h"
#endif

namespace bkcore {
namespace {

using Index = std::int64_t;

// 1.5 * 2^23: adding it to a small number rounds the number to an integer, ties to even, which is
// then in the low bits of the sum.
constexpr float kRound = 12582912.0f;

// How many of 2 * half bounds are below x, minus half. They ascend, and the last one is infinity.
BKCORE_INLINE std::int8_t bounds_below(float x, const float *bounds, int half) {
  int count = 0;
  for (int step = half; step > 0; step /= 2)
    if (x > bounds[count + step - 1]) count += step;
  return static_cast<std::int8_t>(count - half);
}

template <class T>
struct Simd;

#if defined(__AVX512F__)

template <>
struct Simd<float> {
  using V = __m512;
  static constexpr Index width = 16;
  static BKCORE_INLINE __mmask16 first(Index n) { return static_cast<__mmask16>((1u << n) - 1); }
  static BKCORE_INLINE V set(float x) { return _mm512_set1_ps(x); }
  static BKCORE_INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
  static BKCORE_INLINE V load(const float *p, Index n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static BKCORE_INLINE void store(float *p, V x) { _mm512_storeu_ps(p, x); }
  static BKCORE_INLINE void store(float *p, V x, Index n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static BKCORE_INLINE void stream(float *p, V x) { _mm512_stream_ps(p, x); }
  static BKCORE_INLINE V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static BKCORE_INLINE float sum(V x) { return _mm512_reduce_add_ps(x); }
  // Clamps to [low, high]; NaN becomes low.
  static BKCORE_INLINE V clamp(V x, V low, V high) {
    return _mm512_min_ps(_mm512_max_ps(x, low), high);
  }
  // value, but x where x is NaN.
  static BKCORE_INLINE V keep_nan(V value, V x) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
  }
  // x / scale, rounded correctly, if inverse is 1 / scale; see sweep_codes.h.
  static BKCORE_INLINE V quotient(V x, V scale, V inverse) {
    const V rough = x * inverse, remainder = madd(-rough, scale, x);
    const __mmask16 infinite = _mm512_fpclass_ps_mask(rough, 0x18);
    return _mm512_mask3_fmadd_ps(remainder, inverse, rough, _knot_mask16(infinite));
  }
  static BKCORE_INLINE V widen(const std::int8_t *p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  // table[code + half] for codes from -half to half - 1.
  static BKCORE_INLINE V look_up(const float *table, const std::int8_t *p, int half) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m512i place = _mm512_add_epi32(_mm512_cvtepi8_epi32(codes), _mm512_set1_epi32(half));
    return at(table, place, half);
  }
  // The 2 * half bounds of a search, in ascending order, the last one infinity. If there are 256,
  // every eighth is kept in registers, so that five of eight steps need no gather.
  struct Bounds {
    const float *table;
    int half;
    V eighths[2];
  };
  static BKCORE_INLINE Bounds bounds(const float *table, int half) {
    Bounds all = {table, half, {set(0), set(0)}};
    if (half == 128) {
      const __m512i places =
          _mm512_setr_epi32(7, 15, 23, 31, 39, 47, 55, 63, 71, 79, 87, 95, 103, 111, 119, 127);
      all.eighths[0] = _mm512_i32gather_ps(places, table, sizeof(float));
      all.eighths[1] = _mm512_i32gather_ps(places, table + 128, sizeof(float));
    }
    return all;
  }
  // How many of the bounds are below x, minus half.
  static BKCORE_INLINE void search(std::int8_t *p, V x, const Bounds &bounds) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i count = _mm512_setzero_si512();
    int step = bounds.half;
    if (bounds.half == 128) {
      for (int eighths = 16; eighths > 0; eighths /= 2) {
        const __m512i next = _mm512_add_epi32(count, _mm512_set1_epi32(eighths));
        const V bound = _mm512_permutex2var_ps(bounds.eighths[0], _mm512_sub_epi32(next, one),
                                               bounds.eighths[1]);
        count = _mm512_mask_mov_epi32(count, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), next);
      }
      count = _mm512_slli_epi32(count, 3);
      step = 4;
    }
    for (; step > 0; step /= 2) {
      const __m512i next = _mm512_add_epi32(count, _mm512_set1_epi32(step));
      const V bound = at(bounds.table, _mm512_sub_epi32(next, one), bounds.half);
      count = _mm512_mask_mov_epi32(count, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), next);
    }
    const __m512i codes = _mm512_sub_epi32(count, _mm512_set1_epi32(bounds.half));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(codes));
  }
  static BKCORE_INLINE V at(const float *table, __m512i place, int half) {
    return half == 8 ? _mm512_permutexvar_ps(place, load(table))
                     : _mm512_i32gather_ps(place, table, sizeof(float));
  }
  // Rounds x to the nearest integer, ties to even, and adds the integer `zero`.
  static BKCORE_INLINE void narrow(std::int8_t *p, V x, V zero) {
    const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_cvtps_epi32(zero));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(codes));
  }
};

template <>
struct Simd<double> {
  using V = __m512d;
  static constexpr Index width = 8;
  static BKCORE_INLINE __mmask8 first(Index n) { return static_cast<__mmask8>((1u << n) - 1); }
  static BKCORE_INLINE V set(double x) { return _mm512_set1_pd(x); }
  static BKCORE_INLINE V load(const double *p) { return _mm512_loadu_pd(p); }
  static BKCORE_INLINE V load(const double *p, Index n) {
    return _mm512_maskz_loadu_pd(first(n), p);
  }
  static BKCORE_INLINE void store(double *p, V x) { _mm512_storeu_pd(p, x); }
  static BKCORE_INLINE void store(double *p, V x, Index n) {
    _mm512_mask_storeu_pd(p, first(n), x);
  }
  static BKCORE_INLINE void stream(double *p, V x) { _mm512_stream_pd(p, x); }
  static BKCORE_INLINE V madd(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static BKCORE_INLINE double sum(V x) { return _mm512_reduce_add_pd(x); }
};

#else

// Partial loads and stores through memory: one per row, at its ragged end.
template <class T, class Vector, Index kWidth>
struct SimdBase {
  using V = Vector;
  static constexpr Index width = kWidth;
  static BKCORE_INLINE V set(T x) { return x - V{}; }
  static BKCORE_INLINE V load(const T *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static BKCORE_INLINE V load(const T *p, Index n) {
    T all[kWidth] = {};
    for (Index k = 0; k < n; ++k) all[k] = p[k];
    return load(all);
  }
  static BKCORE_INLINE void store(T *p, V x) { std::memcpy(p, &x, sizeof x); }
  static BKCORE_INLINE void store(T *p, V x, Index n) {
    T all[kWidth];
    store(all, x);
    for (Index k = 0; k < n; ++k) p[k] = all[k];
  }
  static BKCORE_INLINE void stream(T *p, V x) { store(p, x); }
  static BKCORE_INLINE T sum(V x) {
    T all[kWidth];
    store(all, x);
    for (Index half = kWidth / 2; half > 0; half /= 2)
      for (Index k = 0; k < half; ++k) all[k] += all[k + half];
    return all[0];
  }
};

// What kernels on codes need of float, without special instructions.
template <class Vector, Index kWidth>
struct SimdFloat : SimdBase<float, Vector, kWidth> {
  using Base = SimdBase<float, Vector, kWidth>;
  using V = Vector;
  // Clamps to [low, high]; NaN becomes low.
  static BKCORE_INLINE V clamp(V x, V low, V high) {
    x = x > low ? x : low;
    return x < high ? x : high;
  }
  // value, but x where x is NaN.
  static BKCORE_INLINE V keep_nan(V value, V x) { return x == x ? value : x; }
  // x / scale, rounded correctly, unless it is beyond 10^9; inverse is 1 / scale.
  static BKCORE_INLINE V quotient(V x, V scale, V) { return x / scale; }
  static BKCORE_INLINE V widen(const std::int8_t *p) {
    float all[kWidth];
    for (Index k = 0; k < kWidth; ++k) all[k] = p[k];
    return Base::load(all);
  }
  // table[code + half] for codes from -half to half - 1.
  static BKCORE_INLINE V look_up(const float *table, const std::int8_t *p, int half) {
    float all[kWidth];
    for (Index k = 0; k < kWidth; ++k) all[k] = table[p[k] + half];
    return Base::load(all);
  }
  // The 2 * half bounds of a search, in ascending order, the last one infinity.
  struct Bounds {
    const float *table;
    int half;
  };
  static BKCORE_INLINE Bounds bounds(const float *table, int half) { return {table, half}; }
  // How many of the bounds are below x, minus half.
  static BKCORE_INLINE void search(std::int8_t *p, V x, const Bounds &bounds) {
    float all[kWidth];
    Base::store(all, x);
    for (Index k = 0; k < kWidth; ++k) p[k] = bounds_below(all[k], bounds.table, bounds.half);
  }
  // Rounds x to the nearest integer, ties to even, and adds the integer `zero`.
  static BKCORE_INLINE void narrow(std::int8_t *p, V x, V zero) {
    float all[kWidth];
    Base::store(all, ((x + Base::set(kRound)) - Base::set(kRound)) + zero);
    for (Index k = 0; k < kWidth; ++k) p[k] = static_cast<std::int8_t>(all[k]);
  }
};

#if defined(__AVX2__)
using Float8 = float __attribute__((vector_size(32)));
using Double4 = double __attribute__((vector_size(32)));
template <>
struct Simd<float> : SimdFloat<Float8, 8> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static BKCORE_INLINE void stream(float *p, V x) { _mm256_stream_ps(p, x); }
  static BKCORE_INLINE V clamp(V x, V low, V high) {
    return _mm256_min_ps(_mm256_max_ps(x, low), high);
  }
  static BKCORE_INLINE V keep_nan(V value, V x) {
    return _mm256_blendv_ps(value, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  static BKCORE_INLINE V quotient(V x, V scale, V inverse) {
    const V rough = x * inverse, remainder = madd(-rough, scale, x);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), rough);
    const __m256 finite = _mm256_cmp_ps(size, set(1e9f), _CMP_LT_OQ);
    return _mm256_blendv_ps(rough, madd(remainder, inverse, rough), finite);
  }
  static BKCORE_INLINE V widen(const std::int8_t *p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static BKCORE_INLINE V look_up(const float *table, const std::int8_t *p, int half) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    const __m256i place = _mm256_add_epi32(_mm256_cvtepi8_epi32(codes), _mm256_set1_epi32(half));
    return _mm256_i32gather_ps(table, place, sizeof(float));
  }
  static BKCORE_INLINE void search(std::int8_t *p, V x, const Bounds &bounds) {
    __m256i count = _mm256_setzero_si256();
    for (int step = bounds.half; step > 0; step /= 2) {
      const __m256i next = _mm256_add_epi32(count, _mm256_set1_epi32(step));
      const V bound = _mm256_i32gather_ps(bounds.table - 1, next, sizeof(float));
      const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_GT_OQ));
      count = _mm256_blendv_epi8(count, next, above);
    }
    narrow_words(p, _mm256_sub_epi32(count, _mm256_set1_epi32(bounds.half)));
  }
  static BKCORE_INLINE void narrow(std::int8_t *p, V x, V zero) {
    const __m256i codes = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_cvtps_epi32(zero));
    narrow_words(p, codes);
  }
  static BKCORE_INLINE void narrow_words(std::int8_t *p, __m256i codes) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(words, words));
  }
};
template <>
struct Simd<double> : SimdBase<double, Double4, 4> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static BKCORE_INLINE void stream(double *p, V x) { _mm256_stream_pd(p, x); }
};
#elif defined(__aarch64__)
using Float4 = float __attribute__((vector_size(16)));
using Double2 = double __attribute__((vector_size(16)));
template <>
struct Simd<float> : SimdFloat<Float4, 4> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static BKCORE_INLINE V quotient(V x, V scale, V inverse) {
    const V rough = x * inverse, remainder = madd(-rough, scale, x);
    const V exact = madd(remainder, inverse, rough);
    const auto finite = (rough < set(1e9f)) & (rough > set(-1e9f));
    return finite ? exact : rough;
  }
  static BKCORE_INLINE V widen(const std::int8_t *p) {
    std::uint32_t four;
    std::memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
  }
  static BKCORE_INLINE void narrow(std::int8_t *p, V x, V zero) {
    const int16x4_t codes = vmovn_s32(vaddq_s32(vcvtnq_s32_f32(x), vcvtnq_s32_f32(zero)));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(codes, codes));
    std::memcpy(p, &bytes, 4);
  }
};
template <>
struct Simd<double> : SimdBase<double, Double2, 2> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return vfmaq_f64(c, a, b); }
};
#else
template <>
struct Simd<float> : SimdFloat<Float4, 4> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return fused(a, b, c); }
};
template <>
struct Simd<double> : SimdBase<double, Double2, 2> {
  static BKCORE_INLINE V madd(V a, V b, V c) { return fused(a, b, c); }
};
#endif
#endif

// A whole vector, or the first `count` lanes of one: the places that for_vectors visits.
struct Whole {};
struct Ragged {
  Index count;
};

template <class T>
BKCORE_INLINE typename Simd<T>::V load(const T *p, Whole) {
  return Simd<T>::load(p);
}
template <class T>
BKCORE_INLINE typename Simd<T>::V load(const T *p, Ragged r) {
  return Simd<T>::load(p, r.count);
}
template <class T>
BKCORE_INLINE void store(T *p, typename Simd<T>::V x, Whole) {
  Simd<T>::store(p, x);
}
template <class T>
BKCORE_INLINE void store(T *p, typename Simd<T>::V x, Ragged r) {
  Simd<T>::store(p, x, r.count);
}

BKCORE_INLINE Index least(Index a, Index b) { return a < b ? a : b; }

// Calls body(h, place) for the vectors that start at lanes h of a row.
template <class T, class Body>
BKCORE_INLINE void for_vectors(Index lanes, const Body &body) {
  Index h = 0;
  for (; h + Simd<T>::width <= lanes; h += Simd<T>::width) body(h, Whole{});
  if (h < lanes) body(h, Ragged{lanes - h});
}

// x, but 0 for lanes smaller than twice the smallest normal number. Processors take some hundred
// cycles for what is smaller still.
template <class T>
BKCORE_INLINE typename Simd<T>::V without_tiny(typename Simd<T>::V x) {
  using Bits = decltype(x < x);  // integers of the same size
  using Word = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  // All bits of the exponent but the lowest.
  constexpr Word high = static_cast<Word>(sizeof(T) == 4 ? 0x7F000000 : 0x7FE0000000000000);
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= (bits & high) != 0;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The sum over a row has so many partial sums whatever the width of vectors, so that its bits do
// not depend on that: lane h adds to number h % kPartialSums. At the end the second half of them is
// added to the first, until one is left.
template <class T>
constexpr Index kPartialSums = 64 / sizeof(T);

// Where the partial sums are to which the vector that starts at lane h adds.
template <class T>
BKCORE_INLINE T *partial_sums(T *all, Index h) {
  return Simd<T>::width == kPartialSums<T> ? all : all + h % kPartialSums<T>;
}

template <class T>
BKCORE_INLINE T sum_of(const T *all) {
  using S = Simd<T>;
  constexpr Index count = kPartialSums<T> / S::width;
  typename S::V part[count];
  for (Index i = 0; i < count; ++i) part[i] = S::load(all + i * S::width);
  for (Index half = count / 2; half > 0; half /= 2)
    for (Index i = 0; i < half; ++i) part[i] = part[i] + part[i + half];
  return S::sum(part[0]) + 0;  // not -0, which would depend on how many lanes are missing
}

// Complex arithmetic on vectors (or scalars) of T.
template <class T>
struct Lanes {
  using V = typename Simd<T>::V;
  struct Complex {
    V re, im;
  };

  static BKCORE_INLINE V madd(V a, V b, V c) { return Simd<T>::madd(a, b, c); }
  static BKCORE_INLINE V set(T x) { return Simd<T>::set(x); }
  static BKCORE_INLINE Complex mul(Complex a, Complex b) {
    return {madd(a.re, b.re, -(a.im * b.im)), madd(a.re, b.im, a.im * b.re)};
  }
  static BKCORE_INLINE Complex scale(V s, Complex a) { return {s * a.re, s * a.im}; }
  static BKCORE_INLINE Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  // a + s b
  static BKCORE_INLINE Complex axpy(V s, Complex b, Complex a) {
    return {madd(s, b.re, a.re), madd(s, b.im, a.im)};
  }
  // Re(a b)
  static BKCORE_INLINE V real_product(Complex a, Complex b) {
    return madd(a.re, b.re, -(a.im * b.im));
  }
  // 1 / (x - i y), in terms of the two real numbers that the recurrences use.
  static BKCORE_INLINE Complex invert(V x, V y) {
    const V inverse = set(1) / madd(x, x, y * y);
    return {x * inverse, y * inverse};
  }
};

}  // namespace
}  // namespace bkcore
