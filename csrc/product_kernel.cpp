// Products of activations and weights in codes: int8 x int8 or int8 x int4, summed in int32.
//
// Compiled once per instruction set, which BKCORE_ISA names. sweep_kernel.cpp says why everything
// is in an unnamed namespace and no header with inline functions is included.
// A panel of outputs is unpacked and transposed once, so that a vector holds a word of codes (2 or
// 4 neighbouring inputs) of each of `lanes` outputs. Then a few rows at a time are multiplied with
// it, one word of theirs in all lanes. For very few rows that would cost more than it saves. So
// with AVX-512 they are multiplied with the weight as it is in memory, with vectors along the
// inputs.

#include <cstring>

#include "dot.h"
#include "packing.h"
#include "product.h"
#include "scales.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(product_kernels_, isa)

namespace bkcore {
namespace {

using V = Dot::V;
constexpr Index kPanel = Dot::lanes * Dot::vectors;

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

// The codes of one row of activations and their scale, as computed by `quantize_rows` in
// src/bkcore/kernels/backends/reference/codes.py.
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

// Transposes words of `lanes` outputs, one row each, into every `vectors`-th vector of a panel.
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

// A panel of outputs, ready for any row: its words, and the scales of its outputs for every group.
struct Panel {
  const Word *words;
  const float *scales;
  Index first, count;
};

// Multiplies R rows from `row` on, with roundings in the order of product.py.
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
        // Sums with unsigned weights may wrap around at 2^32; their difference is exact.
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

// Levels plus 128, indexed by the code as an unsigned 4-bit number: 0 to 7, then -8 to -1.
BKCORE_INLINE V unsigned_levels() {
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i *>(kLevel));
  const __m128i rotated = _mm_shuffle_epi32(table, 0x4E);
  return _mm512_broadcast_i32x4(_mm_xor_si128(rotated, _mm_set1_epi8(-128)));
}

// Multiplies `bytes` bytes of the weights of 16 outputs with one row of codes. At 4 bits a byte
// holds an even and an odd input; for every 64 bytes, `x` has them in two halves of 64.
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

// The codes of a row with even and odd inputs separated, as `add_up_inputs` needs them at 4 bits.
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
    // Sixteen rows at a time are more streams than the hardware prefetcher follows.
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
      const V sums =
          _mm512_sub_epi32(add_up_inputs<bits>(weight, bytes, x), _mm512_set1_epi32(offset));
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
      scratch((p.groups * kPanel + (kPanel + Dot::lanes) * pitch) * sizeof(Word) + p.inputs +
              p.groups * 128));
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

}  // namespace

ProductKernels BKCORE_TABLE(BKCORE_ISA)() { return {kPanel, Dot::depth, encode, multiply}; }

}  // namespace bkcore
