// Fused multiply-adds for processors without the instruction: slow, but with the bits that all
// other processors give. Included by simd.h.
#pragma once

namespace bkcore {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Double2 = double __attribute__((vector_size(16)));

#if defined(__SSE2__)
// a + b rounded to odd: unless the sum is exact, to that neighbour whose last bit is 1. Rounded to
// float it is the exact sum rounded once (Boldo and Melquiond 2008).
BKCORE_INLINE Double2 add_to_odd(Double2 a, Double2 b) {
  const Double2 sum = a + b, part = sum - a;
  const Double2 error = (a - (sum - part)) + (b - part);  // exact (Knuth), or NaN beside infinity
  const __m128d size = _mm_andnot_pd(_mm_set1_pd(-0.0), error);
  const __m128i inexact = _mm_castpd_si128(_mm_cmpgt_pd(size, _mm_setzero_pd()));
  // All ones where sum and error differ in sign, so that |sum| is too large.
  const __m128i signs = _mm_srai_epi32(_mm_castpd_si128(_mm_xor_pd(sum, error)), 31);
  const __m128i beyond = _mm_and_si128(inexact, _mm_shuffle_epi32(signs, 0xF5));
  const __m128i bits = _mm_add_epi64(_mm_castpd_si128(sum), beyond);
  return _mm_castsi128_pd(_mm_or_si128(bits, _mm_srli_epi64(inexact, 63)));
}

// Whether one of these is halfway between two floats, or small enough for a subnormal float. If
// not, rounding them to float after they have been rounded to double is as good as rounding once.
BKCORE_INLINE bool any_in_doubt(Double2 low, Double2 high) {
  const auto words = [](__m128 x) { return _mm_castps_si128(x); };
  const __m128 a = _mm_castpd_ps(low), b = _mm_castpd_ps(high);
  const __m128i last = words(_mm_shuffle_ps(a, b, 0x88)), first = words(_mm_shuffle_ps(a, b, 0xDD));
  const __m128i half = _mm_set1_epi32(1 << 28), size = _mm_slli_epi32(first, 1);
  const __m128i beyond = _mm_and_si128(last, _mm_set1_epi32((1 << 29) - 1));
  const __m128i small = _mm_cmpgt_epi32(_mm_set1_epi32(897 << 20), _mm_srli_epi32(size, 1));
  const __m128i zero = _mm_cmpeq_epi32(size, _mm_setzero_si128());
  const __m128i any = _mm_or_si128(_mm_cmpeq_epi32(beyond, half), _mm_andnot_si128(zero, small));
  return _mm_movemask_epi8(any) != 0;
}

BKCORE_INLINE Double2 upper(Float4 x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }

// The product of two floats is exact in double.
__attribute__((noinline, cold, unused)) Float4 fused_exactly(Float4 a, Float4 b, Float4 c) {
  const Double2 low = add_to_odd(_mm_cvtps_pd(a) * _mm_cvtps_pd(b), _mm_cvtps_pd(c));
  const Double2 high = add_to_odd(upper(a) * upper(b), upper(c));
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}

BKCORE_INLINE Float4 fused(Float4 a, Float4 b, Float4 c) {
  const Double2 low = _mm_cvtps_pd(a) * _mm_cvtps_pd(b) + _mm_cvtps_pd(c);
  const Double2 high = upper(a) * upper(b) + upper(c);
  if (__builtin_expect(any_in_doubt(low, high), 0)) return fused_exactly(a, b, c);
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
#else
BKCORE_INLINE Float4 fused(Float4 a, Float4 b, Float4 c) {
  for (int k = 0; k < 4; ++k) c[k] = __builtin_fmaf(a[k], b[k], c[k]);
  return c;
}
#endif

BKCORE_INLINE Double2 fused(Double2 a, Double2 b, Double2 c) {
  for (int k = 0; k < 2; ++k) c[k] = __builtin_fma(a[k], b[k], c[k]);
  return c;
}

}  // namespace
}  // namespace bkcore
