// A fused multiply-add is rounded once, for every number there is, also where the processor has no
// instruction for it: the instruction set of this file is the one that compilers assume.

#include "simd.h"

#include <cstring>
#include <limits>

#include "support.h"

namespace bkcore {
namespace {

template <class T>
struct BitsOf {
  using Type = std::uint32_t;
};
template <>
struct BitsOf<double> {
  using Type = std::uint64_t;
};

template <class T>
class Triples {
 public:
  using Bits = typename BitsOf<T>::Type;

  // Any bits at all: exponents are mostly far apart, and there is NaN, infinity and subnormals.
  T any() { return from(static_cast<Bits>(engine_())); }
  // Of moderate size, so that sums cancel; few bits are set, so that many sums are near a tie.
  T near() {
    const T x =
        from((static_cast<Bits>(engine_()) & static_cast<Bits>(engine_()) & kFraction) | kOne);
    return engine_() % 2 ? x : -x;
  }
  // 1 plus an odd multiple of 2^-bits.
  T odd(int bits) { return 1 + std::ldexp(static_cast<T>(engine_() % 1000 * 2 + 1), -bits); }
  // Close to another number, or far below it.
  T beside(T x) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    const T close = from(bits + static_cast<Bits>(engine_() % 5) - 2);
    return engine_() % 2 ? close : std::ldexp(close, -static_cast<int>(engine_() % 60));
  }

 private:
  static constexpr int kDigits = std::numeric_limits<T>::digits - 1;
  static constexpr Bits kFraction = (Bits{1} << kDigits) - 1;
  static constexpr Bits kOne = Bits{std::numeric_limits<T>::max_exponent - 1} << kDigits;
  static T from(Bits bits) {
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  std::mt19937_64 engine_{12};
};

template <class T>
bool fused_once(T a, T b, T c) {
  using S = Simd<T>;
  const T want = std::fma(a, b, c);
  T got[S::width];
  S::store(got, S::madd(S::set(a), S::set(b), S::set(c)));
  for (const T x : got)
    if (std::memcmp(&x, &want, sizeof x) && !(x != x && want != want)) return false;
  return true;
}

TEST_CASE_TEMPLATE("a fused multiply-add is rounded once", T, float, double) {
  Triples<T> triples;
  int wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    wrong += !fused_once(triples.any(), triples.any(), triples.any());
    const T a = triples.near(), b = triples.near();
    wrong += !fused_once(a, b, triples.near());
    wrong += !fused_once(a, b, triples.beside(-a * b));
    // A product that is halfway between two numbers, and a little more or less.
    constexpr int kDigits = std::numeric_limits<T>::digits, kHalf = kDigits / 2;
    const T tiny = std::ldexp(triples.near(), -60 - i % 60);
    wrong += !fused_once(triples.odd(kHalf), triples.odd(kDigits - kHalf), tiny);
    // Nearly halfway between two subnormal numbers.
    constexpr int kHalfUnit = std::numeric_limits<T>::min_exponent - kDigits - 1;
    const T unit = std::numeric_limits<T>::epsilon();
    const T some = std::numeric_limits<T>::denorm_min() * static_cast<T>(i % 2 ? i : -i);
    wrong += !fused_once(std::ldexp(1 + unit, kHalfUnit / 2),
                         std::ldexp(1 - unit, kHalfUnit - kHalfUnit / 2), some);
    // A result that is subnormal, and one at the largest number.
    const T small = std::ldexp(a, std::numeric_limits<T>::min_exponent);
    wrong += !fused_once(small, b, triples.beside(-small * b));
    wrong += !fused_once(small, triples.near() / 1024, triples.beside(small));
    const T large = std::ldexp(a, std::numeric_limits<T>::max_exponent - 2);
    wrong += !fused_once(large, b, triples.beside(large));
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("fused multiply-adds of zeros, infinity and NaN", T, float, double) {
  using Limits = std::numeric_limits<T>;
  const T special[] = {0,
                       -T{0},
                       1,
                       -1,
                       Limits::infinity(),
                       -Limits::infinity(),
                       Limits::quiet_NaN(),
                       Limits::denorm_min(),
                       -Limits::denorm_min(),
                       Limits::min(),
                       -Limits::min(),
                       Limits::max(),
                       Limits::lowest(),
                       1 + Limits::epsilon()};
  for (const T a : special)
    for (const T b : special)
      for (const T c : special) {
        CAPTURE(a);
        CAPTURE(b);
        CAPTURE(c);
        CHECK(fused_once(a, b, c));
      }
}

TEST_CASE_TEMPLATE("only tiny numbers are left out", T, float, double) {
  using Limits = std::numeric_limits<T>;
  using S = Simd<T>;
  const T below = std::nextafter(2 * Limits::min(), T{0});
  const T kept[] = {2 * Limits::min(), 1, Limits::max(), Limits::infinity()};
  for (const T sign : {T{1}, T{-1}}) {
    for (const T x : {T{0}, Limits::denorm_min(), Limits::min(), below})
      CHECK(S::sum(without_tiny<T>(S::set(sign * x))) == 0);
    for (const T x : kept) {
      T got[S::width];
      S::store(got, without_tiny<T>(S::set(sign * x)));
      CHECK(got[S::width - 1] == sign * x);
    }
  }
  T got[S::width];
  S::store(got, without_tiny<T>(S::set(Limits::quiet_NaN())));
  CHECK(got[0] != got[0]);
}

}  // namespace
}  // namespace bkcore
