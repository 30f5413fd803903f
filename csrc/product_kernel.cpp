// Products of activations and weights in codes: int8 x int8 or int8 x int4, summed in int32.
//
// Compiled once per instruction set, which BKCORE_ISA names. sweep_kernel.cpp says why everything
// is in an unnamed namespace and no header with inline functions is included.
// A panel of outputs is unpacked and transposed once, so that a vector holds a word of codes (2 or
// 4 neighbouring inputs) of each of `lanes` outputs. Then a few rows at a time are multiplied with
// it, one word of theirs in all lanes. For very few rows that would cost more than it saves. So
// they are multiplied with the weight as it is in memory, with vectors along the inputs.

#include <cstring>

#include "dot.h"
#include "product.h"
#include "scales.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(product_kernels_, isa)

namespace bkcore {
namespace {

using V = Dot::V;
constexpr Index kPanel = Dot::lanes * Dot::vectors;
constexpr Index kCodes = Dot::lanes * Dot::depth;  // in a vector
constexpr Index kFewRows = 4;
constexpr Index kPair = 2 * Dot::depth;  // inputs of two words, in a panel

// Whether 4-bit codes are expanded as they lie in bytes: those of even inputs, then those of odd
// ones. The two of a byte must not belong to two groups.
BKCORE_INLINE bool in_bytes(const Product &p) {
  return p.bits == 4 && (p.groups == 1 || p.group_size % 2 == 0);
}

// Whether vectors go along the inputs.
BKCORE_INLINE bool few_rows(const Product &p) {
  return p.rows <= kFewRows && (p.bits == 8 || in_bytes(p));
}

// A row of codes has the groups of inputs one after the other, each filled up with zeros to whole
// units: pairs of words, and with few rows vectors, or with 4 bits two of them.
template <Index unit>
constexpr Index words_of_group(Index inputs) {
  return (inputs + unit - 1) / unit * (unit / Dot::depth);
}

template <Index unit>
Index words_of(const Product &p) {
  return p.inputs / p.group_size * words_of_group<unit>(p.group_size) +
         words_of_group<unit>(p.inputs % p.group_size);
}

Index words_of_row(const Product &p) {
  if (!few_rows(p)) return words_of<kPair>(p);
  return p.bits == 8 ? words_of<kCodes>(p) : words_of<2 * kCodes>(p);
}

// Calls work(group, first input, inputs, first word, words) for every group of inputs.
template <Index unit, class Work>
BKCORE_INLINE void for_groups(const Product &p, const Work &work) {
  Index word = 0;
  for (Index group = 0; group < p.groups; ++group) {
    const Index first = group * p.group_size;
    const Index count = least(p.group_size, p.inputs - first);
    const Index words = words_of_group<unit>(count);
    work(group, first, count, word, words);
    word += words;
  }
}

// In every two vectors of codes, and in what is left, moves those of even places to the first half
// and the others to the second.
void separate(Dot::Activation *codes, Index count) {
  const auto part = [&](Index half) {
    Dot::Activation pairs[2 * kCodes];
    std::memcpy(pairs, codes, 2 * half * sizeof *codes);
    for (Index i = 0; i < half; ++i) {
      codes[i] = pairs[2 * i];
      codes[half + i] = pairs[2 * i + 1];
    }
  };
  for (; count >= 2 * kCodes; codes += 2 * kCodes, count -= 2 * kCodes) part(kCodes);
  part(count / 2);
}

// Bytes of one output's weights.
BKCORE_INLINE Index row_bytes(const Product &p) {
  return p.bits == 8 ? p.inputs : (p.inputs + 1) / 2;
}

// The codes of one row of activations and their scale, as computed by `quantize_rows` in
// src/bkcore/kernels/backends/reference/codes.py.
template <Index unit>
void encode_in(const Product &p, Index row, const EncodedRows &rows) {
  const float *x = p.x + row * p.inputs;
  std::uint32_t bits;
  const float scale = row_scale(x, p.inputs, bits);
  rows.scale[row] = scale;

  const Index all = words_of<unit>(p);
  Word *out = rows.words + row * all;
  std::memset(out, 0, all * sizeof(Word));
  std::int32_t *sums = rows.sums + row * p.groups;
  std::memset(sums, 0, p.groups * sizeof *sums);
  if (bits >= 0x7F800000u) return;  // codes of 0, and 0 times a scale that is not finite is NaN
  for_groups<unit>(p, [&](Index group, Index first, Index count, Index word, Index words) {
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
    if (in_bytes(p)) separate(codes, words * Dot::depth);
  });
}

void encode(const Product &p, Index row, const EncodedRows &rows) {
  if (!few_rows(p)) return encode_in<kPair>(p, row, rows);
  p.bits == 8 ? encode_in<kCodes>(p, row, rows) : encode_in<2 * kCodes>(p, row, rows);
}

// The 8-bit codes of some bytes as words. Whole vectors are written, which go beyond the last word.
BKCORE_INLINE void expand_codes(const std::uint8_t *codes, Index count, Word *out) {
  for (; count >= kCodes; codes += kCodes, count -= kCodes, out += Dot::lanes)
    Dot::store(out, Dot::codes(Dot::bytes(codes)));
  if (count > 0) Dot::store(out, Dot::codes(Dot::bytes(codes, count)));
}

// The same of 4-bit codes, in the order of `separate`.
BKCORE_INLINE void expand_nibbles(const std::uint8_t *packed, Index bytes, Word *out) {
  for (; bytes >= kCodes; packed += kCodes, bytes -= kCodes, out += 2 * Dot::lanes) {
    const auto all = Dot::bytes(packed);
    Dot::store(out, Dot::even(all));
    Dot::store(out + Dot::lanes, Dot::odd(all));
  }
  if (bytes == 0) return;
  const auto all = Dot::bytes(packed, bytes);
  Dot::store(out, Dot::even(all));
  Dot::store(out + (bytes + Dot::depth - 1) / Dot::depth, Dot::odd(all));
}

// The codes of one output's weights, group by group.
void expand(const Product &p, Index output, std::int8_t *unpacked, Word *out) {
  const std::uint8_t *row = p.weight + output * row_bytes(p);
  if (in_bytes(p)) {
    for_groups<kPair>(p, [&](Index, Index first, Index count, Index word, Index) {
      expand_nibbles(row + first / 2, (count + 1) / 2, out + word);
    });
    return;
  }
  if (p.bits == 4) {
    unpack(row, p.inputs, unpacked);
    for (Index k = 0; k < p.inputs; ++k) unpacked[k] = kLevel[unpacked[k] + 8];
    row = reinterpret_cast<const std::uint8_t *>(unpacked);
  }
  for_groups<kPair>(p, [&](Index, Index first, Index count, Index word, Index) {
    expand_codes(row + first, count, out + word);
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

// A panel of outputs, and the scales of its outputs for every group.
struct Panel {
  const float *scales;
  Index first, count;
};

// Multiplies R rows from `row` on with the words of a panel, with roundings in the order of
// product.py.
template <int R>
void multiply_rows(const Product &p, const EncodedRows &rows, const Panel &panel, const Word *words,
                   Index row) {
  const Index pitch = words_of<kPair>(p);
  std::int32_t sums[R * kPanel];
  float total[R * kPanel];
  for_groups<kPair>(p, [&](Index group, Index, Index, Index word, Index count) {
    add_up<R>(rows.words + row * pitch + word, pitch, words + word * kPanel, count, sums);
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
                                 const Word *words, Index row, Index count) {
  if constexpr (R > 0) {
    if (count == R)
      multiply_rows<R>(p, rows, panel, words, row);
    else
      multiply_rest<R - 1>(p, rows, panel, words, row, count);
  }
}

// Fetches what lies so many bytes behind a place. That may be behind the end of an array, where no
// pointer may point.
BKCORE_INLINE void prefetch(const void *place, Index ahead) {
  __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<std::uintptr_t>(place) +
                                                    static_cast<std::uintptr_t>(ahead)));
}

using Weights = const std::uint8_t * [Dot::outputs];

// Adds the products of one vector of every weight and the codes of the same inputs. `part` is how
// many bytes there are, if they do not fill the vector. What lies `ahead` is prefetched: so many
// weights at a time are more streams than the hardware follows.
template <int bits, class... Part>
BKCORE_INLINE void add_inputs(V *sum, const Weights &weight, Index k, Index ahead, const Word *x,
                              Part... part) {
  const V first = Dot::load(x);
  if constexpr (bits == 8) {
#pragma GCC unroll 16
    for (int i = 0; i < Dot::outputs; ++i) {
      prefetch(weight[i], k + ahead);
      sum[i] = Dot::add(sum[i], Dot::codes(Dot::bytes(weight[i] + k, part...)), first);
    }
  } else {
    const V second = Dot::load(x + Dot::lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Dot::outputs; ++i) {
      prefetch(weight[i], k + ahead);
      const auto packed = Dot::bytes(weight[i] + k, part...);
      sum[i] = Dot::add(sum[i], Dot::even(packed), first);
      sum[i] = Dot::add(sum[i], Dot::odd(packed), second);
    }
  }
}

// Multiplies the bytes [k, end) of the weights of some outputs with the codes of one row.
template <int bits>
BKCORE_INLINE void add_up_inputs(const Weights &weight, Index k, Index end, Index ahead,
                                 const Word *x, V *sum) {
  constexpr Index words = Dot::lanes * 8 / bits;
  for (; k + kCodes <= end; k += kCodes, x += words) add_inputs<bits>(sum, weight, k, ahead, x);
  if (k < end) add_inputs<bits>(sum, weight, k, ahead, x, end - k);
}

// Vectors of one number for every lane of V.
using Words = Word __attribute__((vector_size(4 * Dot::lanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * Dot::lanes)));
using Floats = float __attribute__((vector_size(4 * Dot::lanes)));

template <class Vector>
BKCORE_INLINE Vector load_vector(const void *p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <int bits>
void multiply_inputs(const Product &p, const EncodedRows &rows, const Panel &panel, Index row) {
  constexpr Index unit = kCodes * 8 / bits, some = Dot::outputs;
  constexpr int vectors = Dot::outputs / Dot::lanes;
  const Index width = row_bytes(p);
  const Word *words = rows.words + row * words_of<unit>(p);
  for (Index o = 0; o < panel.count; o += some) {
    const Index outputs = least(some, panel.count - o);
    const std::uint8_t *start = p.weight + (panel.first + o) * width;
    Weights weight;  // those beyond the last output repeat it
    for (Index i = 0; i < some; ++i) weight[i] = start + least(i, outputs - 1) * width;
    Floats total[vectors] = {};
    for_groups<unit>(p, [&](Index group, Index first, Index count, Index word, Index) {
      V sum[Dot::outputs];
#pragma GCC unroll 16
      for (V &each : sum) each = V{};
      const Index end = first + count;
      add_up_inputs<bits>(weight, first * bits / 8, (end * bits + 7) / 8, some * width,
                          words + word, sum);
      const Word offset = static_cast<Word>(rows.sums[row * p.groups + group]);
      const float *scales = panel.scales + group * kPanel + o;
#pragma GCC unroll 2
      for (int i = 0; i < vectors; ++i) {
        const V sums = Dot::lane_sums(sum + i * Dot::lanes);
        const Words exact = load_vector<Words>(&sums) - offset;
        const Floats term = __builtin_convertvector((Ints)exact, Floats) *
                            load_vector<Floats>(scales + i * Dot::lanes);
        total[i] = group ? total[i] + term : term;
      }
    });
    float *out = p.out + row * p.outputs + panel.first + o, all[some];
    std::memcpy(all, &total, sizeof all);
    for (Index i = 0; i < outputs; ++i) out[i] = all[i] * rows.scale[row];
  }
}

// Scales (outputs, groups) to floats (groups, kPanel). Those of the next panel are prefetched: the
// weights between two panels' scales are more than the hardware looks ahead.
void widen_scales(const std::uint16_t *from, Index outputs, Index groups, float *to) {
  constexpr Index line = 64 / sizeof *from;
  for (Index k = 0; k < kPanel * groups; k += line)
    prefetch(from, (kPanel * groups + k) * sizeof *from);
  if (groups == 1) {  // the usual case, which compilers turn into vectors
    for (Index o = 0; o < outputs; ++o) to[o] = from_bfloat16(from[o]);
    return;
  }
  for (Index o = 0; o < outputs; ++o, from += groups) {
    float *place = to + o;
    Index group = 0;
    for (; group + 2 <= groups; group += 2, place += 2 * kPanel) {  // one load for two
      std::uint16_t two[2];
      std::memcpy(two, from + group, sizeof two);
      place[0] = from_bfloat16(two[0]);
      place[kPanel] = from_bfloat16(two[1]);
    }
    if (group < groups) place[0] = from_bfloat16(from[group]);
  }
}

void multiply(const Product &p, const EncodedRows &rows, Index output, Index first, Index count,
              ProductKernels::Scratch scratch) {
  const bool few = few_rows(p);
  const Index pitch = few ? 0 : round_up(words_of<kPair>(p), Dot::lanes);
  const Index outputs = least(kPanel, p.outputs - output);
  float *scales = static_cast<float *>(scratch(
      (p.groups * kPanel + (kPanel + Dot::lanes) * pitch + Dot::lanes) * sizeof(Word) + p.inputs));
  Word *words = reinterpret_cast<Word *>(scales + p.groups * kPanel);
  Word *expanded = words + kPanel * pitch;
  auto *codes = reinterpret_cast<std::int8_t *>(expanded + Dot::lanes * (pitch + 1));

  widen_scales(p.scales + output * p.groups, outputs, p.groups, scales);
  const Panel panel = {scales, output, outputs};
  Index row = first;
  if (few) {
    for (; row < first + count; ++row)
      p.bits == 8 ? multiply_inputs<8>(p, rows, panel, row)
                  : multiply_inputs<4>(p, rows, panel, row);
    return;
  }
  for (Index o = 0; o < kPanel; o += Dot::lanes) {
    for (Index l = 0; l < Dot::lanes && o + l < outputs; ++l)
      expand(p, output + o + l, codes, expanded + l * pitch);
    transpose(expanded, pitch, pitch, words + o);
  }
  for (; row + Dot::rows <= first + count; row += Dot::rows)
    multiply_rows<Dot::rows>(p, rows, panel, words, row);
  multiply_rest<Dot::rows - 1>(p, rows, panel, words, row, first + count - row);
}

}  // namespace

ProductKernels BKCORE_TABLE(BKCORE_ISA)() { return {kPanel, words_of_row, encode, multiply}; }

}  // namespace bkcore
