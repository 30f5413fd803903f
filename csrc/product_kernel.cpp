// Products of activations and weights in codes: int8 x int8 or int8 x int4, summed in int32.
//
// Compiled once per instruction set, with BKCORE_ISA naming it; see sweep_kernel.cpp for why all of
// it is unnamed and includes no header with inline functions.
//
// A panel of outputs is unpacked and transposed once, so that a vector holds a word of codes (2 or
// 4 neighbouring inputs) of `lanes` outputs; then a few rows at a time run over it, one word of
// theirs in all lanes. For very few rows that would cost more than it saves: with AVX-512 they are
// multiplied with the weight as it lies in memory, vectors along the inputs.

#include <cstring>

#include "packing.h"
#include "product.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(product_kernels_, isa)

namespace bkcore {
namespace {

using Word = std::uint32_t;

constexpr float kSmallest = 1.17549435e-38f;  // normal number

// `Dot` is what the instruction set offers: vectors of `lanes` int32 sums, to which products of
// `depth` neighbouring codes are added at once. Weights have `offset` added to them first.
#if defined(__AVX512VNNI__)

struct Dot {
  using V = __m512i;
  using Activation = std::int8_t;
  using Weight = std::uint8_t;
  static constexpr int lanes = 16, depth = 4, offset = 128, vectors = 4, rows = 6;
  static BKCORE_INLINE V load(const Word *p) { return _mm512_loadu_si512(p); }
  static BKCORE_INLINE void store(void *p, V x) { _mm512_storeu_si512(p, x); }
  static BKCORE_INLINE V everywhere(Word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static BKCORE_INLINE V add(V sum, V weight, V x) { return _mm512_dpbusd_epi32(sum, weight, x); }
  // Exchanges the lanes of a that have `bit` in their number with those of b that do not.
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    const V lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const V other = _mm512_xor_si512(lane, _mm512_set1_epi32(bit));
    const __mmask16 high = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    const V first = _mm512_mask_permutexvar_epi32(a, high, other, b);
    b = _mm512_mask_permutexvar_epi32(b, static_cast<__mmask16>(~high), other, a);
    a = first;
  }
};

#elif defined(__AVX2__)

struct Dot {
  using V = __m256i;
  using Activation = std::int16_t;
  using Weight = std::int16_t;
  static constexpr int lanes = 8, depth = 2, offset = 0, vectors = 2, rows = 4;
  static BKCORE_INLINE V load(const Word *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  }
  static BKCORE_INLINE void store(void *p, V x) {
    _mm256_storeu_si256(static_cast<__m256i *>(p), x);
  }
  static BKCORE_INLINE V everywhere(Word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  // Pairs of 8-bit codes would overflow the 16 bits of _mm256_maddubs_epi16.
  static BKCORE_INLINE V add(V sum, V weight, V x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x));
  }
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    constexpr int high = bit == 1 ? 0xAA : bit == 2 ? 0xCC : 0xF0;
    const V lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const V other = _mm256_xor_si256(lane, _mm256_set1_epi32(bit));
    const V first = _mm256_blend_epi32(a, _mm256_permutevar8x32_epi32(b, other), high);
    b = _mm256_blend_epi32(b, _mm256_permutevar8x32_epi32(a, other), ~high & 0xFF);
    a = first;
  }
};

#else

struct Dot {
  struct V {
    std::int32_t of[4];
  };
  using Activation = std::int16_t;
  using Weight = std::int16_t;
  static constexpr int lanes = 4, depth = 2, offset = 0, vectors = 2, rows = 2;
  static BKCORE_INLINE V load(const Word *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static BKCORE_INLINE void store(void *p, V x) { std::memcpy(p, &x, sizeof x); }
  static BKCORE_INLINE V everywhere(Word x) {
    const auto value = static_cast<std::int32_t>(x);
    return {{value, value, value, value}};
  }
  static BKCORE_INLINE V add(V sum, V weight, V x) {
    std::int16_t w[8], codes[8];
    std::memcpy(w, &weight, sizeof w);
    std::memcpy(codes, &x, sizeof codes);
    for (int l = 0; l < lanes; ++l)
      sum.of[l] += w[2 * l] * codes[2 * l] + w[2 * l + 1] * codes[2 * l + 1];
    return sum;
  }
  template <int bit>
  static BKCORE_INLINE void exchange(V &a, V &b) {
    for (int l = 0; l < lanes; ++l)
      if (l & bit) {
        const std::int32_t kept = a.of[l];
        a.of[l] = b.of[l ^ bit];
        b.of[l ^ bit] = kept;
      }
  }
};

#endif

// What the codes -8 to 7 of a weight of 4 bits stand for (src/bkcore/kernels/weight_levels.py).
constexpr int kLevels = 16;
alignas(16) constexpr std::int8_t kLevel[kLevels] = {
    -127, -102, -81, -63, -47, -34, -22, -11, 0, 12, 25, 40, 56, 75, 99, 127};

// Codes of 4 bits to what they stand for.
BKCORE_INLINE void look_up(std::int8_t *codes, Index count) {
  Index k = 0;
#ifdef BKCORE_VECTOR_CODES
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i *>(kLevel));
  for (; k + 16 <= count; k += 16) {
    auto *place = reinterpret_cast<__m128i *>(codes + k);
    const __m128i number = _mm_add_epi8(_mm_loadu_si128(place), _mm_set1_epi8(8));
    _mm_storeu_si128(place, _mm_shuffle_epi8(table, number));
  }
#endif
  for (; k < count; ++k) codes[k] = kLevel[codes[k] + 8];
}

BKCORE_INLINE float from_bfloat16(std::uint16_t x) {
  const Word bits = Word{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using V = Dot::V;
constexpr Index kPanel = Dot::lanes * Dot::vectors;

Index round_up(Index a, Index b) { return (a + b - 1) / b * b; }

// Calls work(group, first input, inputs, first word, words) for every group of inputs.
template <class Work>
BKCORE_INLINE void for_groups(const Product &p, const Work &work) {
  Index word = 0;
  for (Index group = 0; group < p.groups; ++group) {
    const Index first = group * p.group_size;
    const Index count = least(p.group_size, p.inputs - first);
    const Index words = (count + Dot::depth - 1) / Dot::depth;
    work(group, first, count, word, words);
    word += words;
  }
}

// The scale of a row of activations, and the bits of its largest absolute value.
BKCORE_INLINE float row_scale(const float *x, Index count, std::uint32_t &bits) {
  // As integers absolute values have the order of the numbers, and NaN comes after infinity.
  bits = 0;
  for (Index i = 0; i < count; ++i) {
    std::uint32_t one;
    std::memcpy(&one, x + i, sizeof one);
    one &= 0x7FFFFFFFu;
    bits = one > bits ? one : bits;
  }
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  scale /= 127.0f;
  return scale < kSmallest ? 1.0f : scale;
}

// The codes of one row of activations and their scale, as `quantize_rows` in
// src/bkcore/kernels/reference.py has them.
void encode(const Product &p, Index row, const EncodedRows &rows) {
  const float *x = p.x + row * p.inputs;
  std::uint32_t bits;
  const float scale = row_scale(x, p.inputs, bits);
  rows.scale[row] = scale;

  const Index words = words_of(p, Dot::depth);
  Word *out = rows.words + row * words;
  std::memset(out, 0, words * sizeof(Word));
  std::int32_t *sums = rows.sums + row * p.groups;
  std::memset(sums, 0, p.groups * sizeof *sums);
  if (bits >= 0x7F800000u) return;  // codes of 0, and 0 times a scale that is not finite is NaN
  for_groups(p, [&](Index group, Index first, Index count, Index word, Index) {
    auto *codes = reinterpret_cast<Dot::Activation *>(out + word);
    std::int32_t sum = 0;
    for (Index i = 0; i < count; ++i) {
      const float rounded = x[first + i] / scale + kRound;
      std::int32_t code;
      std::memcpy(&code, &rounded, sizeof code);
      codes[i] = static_cast<Dot::Activation>(code);
      sum += static_cast<Dot::Activation>(code);
    }
    sums[group] = Dot::offset * sum;
  });
}

// The codes of one output's weights, group by group in whole words.
void expand(const Product &p, Index output, std::int8_t *unpacked, Word *out) {
  const Index bytes = p.bits == 8 ? p.inputs : (p.inputs + 1) / 2;
  const std::uint8_t *row = p.weight + output * bytes;
  const std::int8_t *codes = reinterpret_cast<const std::int8_t *>(row);
  if (p.bits == 4) {
    unpack(row, p.inputs, unpacked);
    look_up(unpacked, p.inputs);
    codes = unpacked;
  }
  for_groups(p, [&](Index, Index first, Index count, Index word, Index words) {
    if (words * Dot::depth != count) out[word + words - 1] = 0;
    auto *weights = reinterpret_cast<Dot::Weight *>(out + word);
    for (Index i = 0; i < count; ++i)
      weights[i] = static_cast<Dot::Weight>(codes[first + i] + Dot::offset);
  });
}

template <int bit>
BKCORE_INLINE void exchange_all(V *row) {
#pragma GCC unroll 16
  for (int i = 0; i < Dot::lanes; ++i)
    if (!(i & bit)) Dot::exchange<bit>(row[i], row[i | bit]);
  if constexpr (2 * bit < Dot::lanes) exchange_all<2 * bit>(row);
}

// Transposes words of `lanes` outputs, a row each, into every `vectors`-th vector of a panel.
void transpose(const Word *rows, Index pitch, Index words, Word *panel) {
  for (Index first = 0; first < words; first += Dot::lanes) {
    V block[Dot::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Dot::lanes; ++i) block[i] = Dot::load(rows + i * pitch + first);
    exchange_all<1>(block);
#pragma GCC unroll 16
    for (int i = 0; i < Dot::lanes; ++i) Dot::store(panel + (first + i) * kPanel, block[i]);
  }
}

// Adds up `words` words of R rows and a panel: sums (R, kPanel).
template <int R>
BKCORE_INLINE void add_up(const Word *x, Index pitch, const Word *panel, Index words,
                          std::int32_t *sums) {
  V sum[R][Dot::vectors];
  std::memset(&sum, 0, sizeof sum);
  for (Index w = 0; w < words; ++w, panel += kPanel) {
    V weight[Dot::vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Dot::vectors; ++j) weight[j] = Dot::load(panel + j * Dot::lanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const V one = Dot::everywhere(x[r * pitch + w]);
#pragma GCC unroll 4
      for (int j = 0; j < Dot::vectors; ++j) sum[r][j] = Dot::add(sum[r][j], weight[j], one);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Dot::vectors; ++j)
      Dot::store(sums + r * kPanel + j * Dot::lanes, sum[r][j]);
}

// A panel of outputs, ready for any row: its words, and for every group the scales of its outputs.
struct Panel {
  const Word *words;
  const float *scales;
  Index first, count;
};

// R rows from `row` on, in the order of roundings that product.py gives.
template <int R>
void multiply_rows(const Product &p, const EncodedRows &rows, const Panel &panel, Index row) {
  const Index pitch = words_of(p, Dot::depth);
  std::int32_t sums[R * kPanel];
  float total[R * kPanel];
  for_groups(p, [&](Index group, Index, Index, Index word, Index words) {
    add_up<R>(rows.words + row * pitch + word, pitch, panel.words + word * kPanel, words, sums);
    const float *scales = panel.scales + group * kPanel;
    for (int r = 0; r < R; ++r) {
      const std::int32_t offset = rows.sums[(row + r) * p.groups + group];
      for (Index o = 0; o < kPanel; ++o) {
        // Sums of weights made unsigned may have gone round 2^32; their difference has not.
        const Word exact = static_cast<Word>(sums[r * kPanel + o]) - static_cast<Word>(offset);
        const float term = static_cast<float>(static_cast<std::int32_t>(exact)) * scales[o];
        total[r * kPanel + o] = group ? total[r * kPanel + o] + term : term;
      }
    }
  });
  for (int r = 0; r < R; ++r) {
    const float scale = rows.scale[row + r];
    float *out = p.out + (row + r) * p.outputs + panel.first;
    for (Index o = 0; o < panel.count; ++o) out[o] = total[r * kPanel + o] * scale;
  }
}

template <int R>
BKCORE_INLINE void multiply_rest(const Product &p, const EncodedRows &rows, const Panel &panel,
                                 Index row, Index count) {
  if constexpr (R > 0) {
    if (count == R)
      multiply_rows<R>(p, rows, panel, row);
    else
      multiply_rest<R - 1>(p, rows, panel, row, count);
  }
}

#if defined(__AVX512VNNI__)

constexpr Index kFewRows = 4;

BKCORE_INLINE __mmask64 first_bytes(Index count) {
  return count < 64 ? (std::uint64_t{1} << count) - 1 : ~std::uint64_t{0};
}

// Lane i of the result is the sum of all lanes of sum[i].
BKCORE_INLINE V lane_sums(V (&sum)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    sum[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[2 * i], sum[2 * i + 1]),
                              _mm512_unpackhi_epi32(sum[2 * i], sum[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    sum[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(sum[2 * i], sum[2 * i + 1]),
                              _mm512_unpackhi_epi64(sum[2 * i], sum[2 * i + 1]));
  const auto halved = [](V a, V b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  return halved(halved(sum[0], sum[1]), halved(sum[2], sum[3]));
}

// Levels with 128 added, by the code as 4 bits without a sign: 0 to 7, then -8 to -1.
BKCORE_INLINE V unsigned_levels() {
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i *>(kLevel));
  const __m128i rotated = _mm_shuffle_epi32(table, 0x4E);
  return _mm512_broadcast_i32x4(_mm_xor_si128(rotated, _mm_set1_epi8(-128)));
}

// `bytes` bytes of the weights of 16 outputs against one row of codes. At 4 bits a byte holds an even
// and an odd input, which `x` has in two halves of 64 for every 64 bytes.
template <int bits>
BKCORE_INLINE V add_up_inputs(const std::uint8_t *const (&weight)[16], Index bytes,
                              const std::int8_t *x) {
  V sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_si512();
  for (Index k = 0; k < bytes; k += 64) {
    const __mmask64 mask = first_bytes(bytes - k);
    if constexpr (bits == 8) {
      const V codes = _mm512_maskz_loadu_epi8(mask, x + k);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const V signed_codes = _mm512_maskz_loadu_epi8(mask, weight[i] + k);
        const V w = _mm512_xor_si512(signed_codes, _mm512_set1_epi8(-128));
        sum[i] = _mm512_dpbusd_epi32(sum[i], w, codes);
      }
    } else {
      const V even = _mm512_loadu_si512(x + 2 * k), odd = _mm512_loadu_si512(x + 2 * k + 64);
      const V low = _mm512_set1_epi8(0x0F), table = unsigned_levels();
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const V packed = _mm512_maskz_loadu_epi8(mask, weight[i] + k);
        const V first = _mm512_and_si512(packed, low);
        const V second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
        sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_shuffle_epi8(table, first), even);
        sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_shuffle_epi8(table, second), odd);
      }
    }
  }
  return lane_sums(sum);
}

// The codes of a row with even and odd inputs apart, as `add_up_inputs` wants them at 4 bits.
void split_codes(const Product &p, const Word *words, std::int8_t *out) {
  for_groups(p, [&](Index, Index, Index count, Index word, Index) {
    const auto *codes = reinterpret_cast<const std::int8_t *>(words + word);
    for (Index k = 0; k < count; k += 128, out += 128) {
      const Index rest = least(128, count - k);
      if (rest < 128) std::memset(out, 0, 128);
      for (Index i = 0; i < rest / 2; ++i) {
        out[i] = codes[k + 2 * i];
        out[64 + i] = codes[k + 2 * i + 1];
      }
      if (rest % 2) out[rest / 2] = codes[k + rest - 1];
    }
  });
}

template <int bits>
void multiply_inputs(const Product &p, const EncodedRows &rows, const Panel &panel, Index row,
                     std::int8_t *split) {
  const Index width = bits == 8 ? p.inputs : (p.inputs + 1) / 2;
  const Word *words = rows.words + row * words_of(p, Dot::depth);
  if (bits == 4) split_codes(p, words, split);
  for (Index o = 0; o < panel.count; o += 16) {
    const Index outputs = least(16, panel.count - o);
    // Sixteen rows side by side are more streams than the hardware looks ahead in.
    const std::uint8_t *next = p.weight + (panel.first + o + 16) * width;
    const Index ahead = least(16, p.outputs - panel.first - o - 16) * width;
    for (Index b = 0; b < ahead; b += 64) _mm_prefetch(next + b, _MM_HINT_T0);
    __m512 total = _mm512_setzero_ps();
    const std::int8_t *x = split;
    for_groups(p, [&](Index group, Index first, Index count, Index word, Index) {
      const Index bytes = bits == 8 ? count : (count + 1) / 2;
      const std::uint8_t *weight[16];  // lanes beyond the last output repeat it
      for (Index i = 0; i < 16; ++i) {
        const Index output = panel.first + o + (i < outputs ? i : outputs - 1);
        weight[i] = p.weight + output * width + (bits == 8 ? first : first / 2);
      }
      if (bits == 8) x = reinterpret_cast<const std::int8_t *>(words + word);
      const int offset = rows.sums[row * p.groups + group];
      const V sums = _mm512_sub_epi32(add_up_inputs<bits>(weight, bytes, x), _mm512_set1_epi32(offset));
      const __m512 scales = _mm512_loadu_ps(panel.scales + group * kPanel + o);
      const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales);
      total = group ? _mm512_add_ps(total, term) : term;
      if (bits == 4) x += round_up(bytes, 64) * 2;
    });
    const __m512 out = _mm512_mul_ps(total, _mm512_set1_ps(rows.scale[row]));
    _mm512_mask_storeu_ps(p.out + row * p.outputs + panel.first + o,
                          static_cast<__mmask16>((1u << outputs) - 1), out);
  }
}

#endif

void multiply(const Product &p, const EncodedRows &rows, Index output, Index first, Index count,
              ProductKernels::Scratch scratch) {
  const Index pitch = round_up(words_of(p, Dot::depth), Dot::lanes);
  const Index outputs = least(kPanel, p.outputs - output);
  float *scales = static_cast<float *>(
      scratch((p.groups * kPanel + (kPanel + Dot::lanes) * pitch) * sizeof(Word) +
              p.inputs + p.groups * 128));
  Word *words = reinterpret_cast<Word *>(scales + p.groups * kPanel);
  Word *expanded = words + kPanel * pitch;
  auto *codes = reinterpret_cast<std::int8_t *>(expanded + Dot::lanes * pitch);

  for (Index o = 0; o < outputs; ++o)
    for (Index group = 0; group < p.groups; ++group)
      scales[group * kPanel + o] = from_bfloat16(p.scales[(output + o) * p.groups + group]);
  const Panel panel = {words, scales, output, outputs};
#if defined(__AVX512VNNI__)
  if (count <= kFewRows && (p.bits == 8 || p.groups == 1 || p.group_size % 2 == 0)) {
    for (Index row = first; row < first + count; ++row)
      p.bits == 8 ? multiply_inputs<8>(p, rows, panel, row, codes)
                  : multiply_inputs<4>(p, rows, panel, row, codes);
    return;
  }
#endif
  for (Index o = 0; o < kPanel; o += Dot::lanes) {
    for (Index l = 0; l < Dot::lanes && o + l < outputs; ++l)
      expand(p, output + o + l, codes, expanded + l * pitch);
    transpose(expanded, pitch, pitch, words + o);
  }
  Index row = first;
  for (; row + Dot::rows <= first + count; row += Dot::rows)
    multiply_rows<Dot::rows>(p, rows, panel, row);
  multiply_rest<Dot::rows - 1>(p, rows, panel, row, first + count - row);
}

// Scales and zero points of groups, written out for their channels.
void each_channel(const Rounding &r, float *scale, float *zero) {
  for (Index group = 0, c = 0; c < r.channels; ++group) {
    const float s = from_bfloat16(r.scale[group]), z = r.zero[group];
    const Index left = r.channels - c, end = c + (left < r.group_size ? left : r.group_size);
    for (; c < end; ++c) scale[c] = s, zero[c] = z;
  }
}

using Floats = Simd<float>::V;
using Mask = decltype(Floats{} > Floats{});  // lanes of 0 or -1

// Rounding to the nearest of a table of levels, a vector of channels at a time. Every level is tried:
// no gathers, and vectors of any width.
struct LevelSearch {
  using S = Simd<float>;
  using V = S::V;

  Index channels;
  int bounds;
  const float *levels;
  float *scale, *zero, *halfway;

  // Numbers of scratch memory that one needs.
  static Index size(const Rounding &r) {
    return 2 * round_up(r.channels, S::width) + (1 << r.bits);
  }

  LevelSearch(const Rounding &r, float *memory)
      : channels(r.channels), bounds((1 << r.bits) - 1), levels(r.levels), scale(memory),
        zero(scale + round_up(channels, S::width)), halfway(zero + round_up(channels, S::width)) {
    for (int b = 0; b < bounds; ++b) halfway[b] = levels[b] + (levels[b + 1] - levels[b]) / 2;
    each_channel(r, scale, zero);
    for (Index c = channels; c % S::width; ++c) scale[c] = 1, zero[c] = 0;
  }

  BKCORE_INLINE V place(V x, Index channel) const {
    return x / S::load(scale + channel) + S::load(zero + channel);
  }
  // The level nearest to a place, the lower one halfway, and how many lie below it.
  BKCORE_INLINE V nearest(V place, Mask &number) const {
    V level = S::set(levels[0]);
    number = Mask{};
    for (int b = 0; b < bounds; ++b) {
      const Mask above = place > S::set(halfway[b]);
      level = above ? S::set(levels[b + 1]) : level;
      number -= above;
    }
    return level;
  }
};

void round_rows_to_levels(const Rounding &r, Index first, Index count,
                          ProductKernels::Scratch scratch) {
  using S = LevelSearch::S;
  const LevelSearch search(
      r, static_cast<float *>(scratch(LevelSearch::size(r) * sizeof(float))));
  for (Index row = first; row < first + count; ++row) {
    const float *in = r.x + row * r.channels;
    float *out = r.out + row * r.channels;
    for (Index c = 0; c < r.channels; c += S::width) {
      const Index left = r.channels - c;
      const S::V x = left < S::width ? S::load(in + c, left) : S::load(in + c);
      Mask number;
      const S::V level = search.nearest(search.place(x, c), number);
      S::V value = S::load(search.scale + c) * (level - S::load(search.zero + c));
      value = x == x ? value : x;
      left < S::width ? S::store(out + c, value, left) : S::store(out + c, value);
    }
  }
}

// Within a share the sums over rows are taken in their order, whatever the threads.
void adjoint_to_levels(const RoundingAdjoint &a, Index share, ProductKernels::Scratch scratch) {
  using S = LevelSearch::S;
  using V = S::V;
  const Rounding &r = a.forward;
  const Index count = 1 << r.bits, channels = round_up(r.channels, S::width);
  const Index first = share * kRowsPerShare, end = least(r.rows, first + kRowsPerShare);
  float *memory = static_cast<float *>(
      scratch((LevelSearch::size(r) + channels + S::width * count) * sizeof(float)));
  // Neighbouring channels often have one level: each lane adds up by itself.
  float *dscale = memory + LevelSearch::size(r), *dlevels = dscale + channels;
  std::memset(dscale, 0, (channels + S::width * count) * sizeof(float));
  const LevelSearch search(r, memory);
  const V lowest = S::set(r.levels[0]), highest = S::set(r.levels[search.bounds]), none = S::set(0);
  for (Index row = first; row < end; ++row) {
    const Index start = row * r.channels;
    for (Index c = 0; c < r.channels; c += S::width) {
      const Index left = r.channels - c;
      const bool whole = left >= S::width;
      const V x = whole ? S::load(r.x + start + c) : S::load(r.x + start + c, left);
      const V grad = whole ? S::load(a.grad + start + c) : S::load(a.grad + start + c, left);
      const V scale = S::load(search.scale + c), zero = S::load(search.zero + c);
      const V place = search.place(x, c);
      Mask number;
      const V level = search.nearest(place, number);
      const V by_level = grad * scale;
      for (Index lane = 0; lane < S::width; ++lane)
        dlevels[lane * count + number[lane]] += by_level[lane];
      const Mask outside = (place < lowest) | (place > highest);
      const V dx = outside ? none : grad, ratio = outside ? none : place - zero;
      whole ? S::store(a.dx + start + c, dx) : S::store(a.dx + start + c, dx, left);
      S::store(dscale + c, S::load(dscale + c) + grad * (level - zero - ratio));
    }
  }
  std::memcpy(a.dscale + share * r.channels, dscale, r.channels * sizeof(float));
  for (Index lane = 0; lane < S::width; ++lane)
    for (Index level = 0; level < count; ++level)
      a.dlevels[share * count + level] += dlevels[lane * count + level];
}

void adjoint_to_codes(const RoundingAdjoint &a, Index share, ProductKernels::Scratch scratch) {
  const Rounding &r = a.forward;
  const Index first = share * kRowsPerShare, left = r.rows - first;
  float *scale = static_cast<float *>(scratch(2 * r.channels * sizeof(float)));
  float *zero = scale + r.channels, *dscale = a.dscale + share * r.channels;
  const float least = -static_cast<float>(1 << (r.bits - 1)), most = -least - 1;
  each_channel(r, scale, zero);
  for (Index row = first; row < first + (left < kRowsPerShare ? left : kRowsPerShare); ++row) {
    const float *x = r.x + row * r.channels, *grad = a.grad + row * r.channels;
    float *dx = a.dx + row * r.channels;
    for (Index c = 0; c < r.channels; ++c) {
      const float ratio = x[c] / scale[c];
      // Beyond 2^22 adding kRound does not round, but such numbers saturate anyway.
      const float code = ((ratio + kRound) - kRound) + zero[c];
      const bool below = code < least, above = code > most;
      const float kept = below ? least : above ? most : code;
      dx[c] = below || above ? 0.0f : grad[c];
      dscale[c] += grad[c] * (kept - zero[c] - (below || above ? 0.0f : ratio));
    }
  }
}

void round_adjoint(const RoundingAdjoint &a, Index share, ProductKernels::Scratch scratch) {
  a.forward.levels ? adjoint_to_levels(a, share, scratch) : adjoint_to_codes(a, share, scratch);
}

void round_rows(const Rounding &r, Index first, Index count, ProductKernels::Scratch scratch) {
  if (r.levels) return round_rows_to_levels(r, first, count, scratch);
  float *scale = static_cast<float *>(scratch(3 * r.channels * sizeof(float)));
  float *low = scale + r.channels, *high = low + r.channels;
  const float least = -static_cast<float>(1 << (r.bits - 1));
  each_channel(r, scale, low);
  for (Index c = 0; c < r.channels; ++c) {
    const float zero = low[c];
    low[c] = least - zero;
    high[c] = -least - 1 - zero;
  }
  for (Index row = first; row < first + count; ++row) {
    const float *x = r.x + row * r.channels;
    float *out = r.out + row * r.channels;
    for (Index c = 0; c < r.channels; ++c) {
      // Clamping first changes nothing, as the bounds are whole; then rounding cannot overflow.
      float q = x[c] / scale[c];
      q = q > low[c] ? q : low[c];
      q = q < high[c] ? q : high[c];
      const float value = scale[c] * ((q + kRound) - kRound);
      out[c] = x[c] == x[c] ? value : x[c];
    }
  }
}

void round_row(const float *x, Index count, float *out) {
  std::uint32_t bits;
  const float scale = row_scale(x, count, bits);
  const bool finite = bits < 0x7F800000u;
  // Codes of 0 times a scale that is not finite are NaN.
  for (Index i = 0; i < count; ++i)
    out[i] = finite ? scale * ((x[i] / scale + kRound) - kRound) : scale * 0.0f;
}

// Calls a function with the columns [first, end) and the scale of every group of a row.
template <class Visit>
BKCORE_INLINE void each_group(const WeightRounding &w, Index row, Visit visit) {
  for (Index group = 0; group < w.groups; ++group) {
    const Index first = group * w.group_size;
    visit(group, first, least(w.columns, first + w.group_size),
          from_bfloat16(w.scale[row * w.groups + group]));
  }
}

// The number of a code that is nearest to each ratio, and which ratios lie beyond all codes.
template <int bits>
BKCORE_INLINE Floats nearest_code(Floats ratio, Mask &outside) {
  using S = Simd<float>;
  if constexpr (bits == 8) {
    const Floats lowest = S::set(-128), highest = S::set(127);
    // Beyond 2^22 adding kRound does not round, but such numbers saturate anyway.
    const Floats code = (ratio + S::set(kRound)) - S::set(kRound);
    outside = (code < lowest) | (code > highest);
    const Floats kept = code > lowest ? code : lowest;
    return kept < highest ? kept : highest;
  } else {
    outside = (ratio < S::set(kLevel[0])) | (ratio > S::set(kLevel[kLevels - 1]));
    Floats level = S::set(kLevel[0]);
#pragma GCC unroll 16
    for (int i = 1; i < kLevels; ++i) {
      const float halfway = 0.5f * static_cast<float>(kLevel[i - 1] + kLevel[i]);
      level = ratio > S::set(halfway) ? S::set(kLevel[i]) : level;
    }
    return level;
  }
}

template <int bits>
void round_weight_to(const WeightRounding &w, Index row, std::int8_t *codes, float *values) {
  using S = Simd<float>;
  const float *weight = w.weight + row * w.columns;
  each_group(w, row, [&](Index, Index first, Index end, float scale) {
    for (Index k = first; k < end; k += S::width) {
      const Index left = least(end - k, S::width);
      const bool whole = left == S::width;
      const Floats x = whole ? S::load(weight + k) : S::load(weight + k, left);
      Mask outside;
      const Floats code = nearest_code<bits>(x / S::set(scale), outside);
      const Floats value = x == x ? S::set(scale) * code : x;
      whole ? S::store(values + k, value) : S::store(values + k, value, left);
      float numbers[S::width];
      S::store(numbers, code);
      for (Index i = 0; i < left; ++i) codes[k + i] = static_cast<std::int8_t>(numbers[i]);
    }
  });
}

void round_weight(const WeightRounding &w, Index row, std::int8_t *codes, float *values) {
  w.bits == 8 ? round_weight_to<8>(w, row, codes, values)
              : round_weight_to<4>(w, row, codes, values);
}

template <int bits>
void adjoint_of(const WeightRounding &w, Index row, const float *grad, float *dweight,
                float *dscale) {
  using S = Simd<float>;
  const float *weight = w.weight + row * w.columns;
  const Floats none = S::set(0);
  each_group(w, row, [&](Index group, Index first, Index end, float scale) {
    Floats sum = none;
    for (Index k = first; k < end; k += S::width) {
      const Index left = end - k;
      const bool whole = left >= S::width;
      const Floats dy = whole ? S::load(grad + k) : S::load(grad + k, left);
      const Floats x = whole ? S::load(weight + k) : S::load(weight + k, left);
      const Floats ratio = x / S::set(scale);
      Mask outside;
      const Floats code = nearest_code<bits>(ratio, outside);
      const Floats dw = outside ? none : dy;
      sum += dy * (code - (outside ? none : ratio));
      whole ? S::store(dweight + k, dw) : S::store(dweight + k, dw, left);
    }
    dscale[group] = S::sum(sum);
  });
}

void round_weight_adjoint(const WeightRounding &w, Index row, const float *grad, float *dweight,
                          float *dscale) {
  w.bits == 8 ? adjoint_of<8>(w, row, grad, dweight, dscale)
              : adjoint_of<4>(w, row, grad, dweight, dscale);
}

}  // namespace

ProductKernels BKCORE_TABLE(BKCORE_ISA)() {
  return {kPanel,    Dot::depth,   encode,       multiply,
          round_rows, round_adjoint, round_row, round_weight, round_weight_adjoint};
}

}  // namespace bkcore
