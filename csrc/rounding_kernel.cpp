// Rounding to the values of codes, and its derivatives.
// Compiled once per instruction set, which BKCORE_ISA names. sweep_kernel.cpp says why everything
// is in an unnamed namespace and no header with inline functions is included.

#include <cstring>

#include "rounding.h"
#include "scales.h"

#define BKCORE_PASTE(a, b) a##b
#define BKCORE_TABLE(isa) BKCORE_PASTE(rounding_kernels_, isa)

namespace bkcore {
namespace {

// Copies the scales and zero points of groups to each of their channels.
void each_channel(const RoundChannels &r, float *scale, float *zero) {
  if (r.group_size == 1) {  // the usual case, which compilers turn into vectors
    for (Index c = 0; c < r.channels; ++c) scale[c] = from_bfloat16(r.scale[c]);
    for (Index c = 0; c < r.channels; ++c) zero[c] = r.zero[c];
    return;
  }
  for (Index group = 0, c = 0; c < r.channels; ++group) {
    const float s = from_bfloat16(r.scale[group]), z = r.zero[group];
    const Index left = r.channels - c, end = c + (left < r.group_size ? left : r.group_size);
    for (; c < end; ++c) scale[c] = s, zero[c] = z;
  }
}

using Floats = Simd<float>::V;
using Mask = decltype(Floats{} > Floats{});  // lanes of 0 or -1

// Finds the nearest level in a table, for a vector of channels at a time. It tries every level, so
// it needs no gathers and works with vectors of any width.
struct LevelSearch {
  using S = Simd<float>;
  using V = S::V;

  Index channels;
  int bounds;
  const float *levels;
  float *scale, *zero, *halfway;

  // How many numbers of scratch memory a search needs.
  static Index size(const RoundChannels &r) {
    return 2 * round_up(r.channels, S::width) + (1 << r.bits);
  }

  LevelSearch(const RoundChannels &r, float *memory)
      : channels(r.channels),
        bounds((1 << r.bits) - 1),
        levels(r.levels),
        scale(memory),
        zero(scale + round_up(channels, S::width)),
        halfway(zero + round_up(channels, S::width)) {
    for (int b = 0; b < bounds; ++b) halfway[b] = levels[b] + (levels[b + 1] - levels[b]) / 2;
    each_channel(r, scale, zero);
    for (Index c = channels; c % S::width; ++c) scale[c] = 1, zero[c] = 0;
  }

  BKCORE_INLINE V place(V x, Index channel) const {
    return x / S::load(scale + channel) + S::load(zero + channel);
  }
  // The level nearest to a place (the lower one if it is halfway), and how many levels are below
  // it.
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

void round_channels_to_levels(const RoundChannels &r, Index first, Index count,
                              RoundingKernels::Scratch scratch) {
  using S = LevelSearch::S;
  const LevelSearch search(r, static_cast<float *>(scratch(LevelSearch::size(r) * sizeof(float))));
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

// Within a share, rows are summed in order, however many threads there are.
void adjoint_to_levels(const RoundChannelsBackward &a, Index share,
                       RoundingKernels::Scratch scratch) {
  using S = LevelSearch::S;
  using V = S::V;
  const RoundChannels &r = a.forward;
  const Index count = 1 << r.bits, channels = round_up(r.channels, S::width);
  const Index first = share * kRowsPerShare, end = least(r.rows, first + kRowsPerShare);
  float *memory = static_cast<float *>(
      scratch((LevelSearch::size(r) + channels + kPartialSums<float> * count) * sizeof(float)));
  // Neighbouring channels often have the same level, so each lane has its own sums; and as many as
  // the widest vectors have lanes, so that their order does not depend on the width.
  float *dscale = memory + LevelSearch::size(r), *dlevels = dscale + channels;
  std::memset(dscale, 0, (channels + kPartialSums<float> * count) * sizeof(float));
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
        dlevels[(c + lane) % kPartialSums<float> * count + number[lane]] += by_level[lane];
      const Mask outside = (place < lowest) | (place > highest);
      const V dx = outside ? none : grad, ratio = outside ? none : place - zero;
      whole ? S::store(a.dx + start + c, dx) : S::store(a.dx + start + c, dx, left);
      S::store(dscale + c, S::load(dscale + c) + grad * (level - zero - ratio));
    }
  }
  for (Index c = 0; c < r.channels; ++c) a.dscale[share * r.channels + c] = dscale[c];
  for (Index lane = 0; lane < kPartialSums<float>; ++lane)
    for (Index level = 0; level < count; ++level)
      a.dlevels[share * count + level] += dlevels[lane * count + level];
}

void adjoint_to_codes(const RoundChannelsBackward &a, Index share,
                      RoundingKernels::Scratch scratch) {
  const RoundChannels &r = a.forward;
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
      const bool below = code<least, above = code> most;
      const float kept = below ? least : above ? most : code;
      dx[c] = below || above ? 0.0f : grad[c];
      dscale[c] += grad[c] * (kept - zero[c] - (below || above ? 0.0f : ratio));
    }
  }
}

void round_channels_backward(const RoundChannelsBackward &a, Index share,
                             RoundingKernels::Scratch scratch) {
  a.forward.levels ? adjoint_to_levels(a, share, scratch) : adjoint_to_codes(a, share, scratch);
}

void round_channels(const RoundChannels &r, Index first, Index count,
                    RoundingKernels::Scratch scratch) {
  if (r.levels) return round_channels_to_levels(r, first, count, scratch);
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
      // Clamping first changes nothing, because the bounds are integers; and then rounding cannot
      // overflow.
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
BKCORE_INLINE void each_group(const RoundWeight &w, Index row, Visit visit) {
  for (Index group = 0; group < w.groups; ++group) {
    const Index first = group * w.group_size;
    visit(group, first, least(w.columns, first + w.group_size),
          from_bfloat16(w.scale[row * w.groups + group]));
  }
}

// The value of the code nearest to each ratio, and which ratios are outside the range of the codes.
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
void round_weight_to(const RoundWeight &w, Index row, std::int8_t *codes, float *values) {
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

void round_weight(const RoundWeight &w, Index row, std::int8_t *codes, float *values) {
  w.bits == 8 ? round_weight_to<8>(w, row, codes, values)
              : round_weight_to<4>(w, row, codes, values);
}

template <int bits>
void adjoint_of(const RoundWeight &w, Index row, const float *grad, float *dweight, float *dscale) {
  using S = Simd<float>;
  const float *weight = w.weight + row * w.columns;
  const Floats none = S::set(0);
  each_group(w, row, [&](Index group, Index first, Index end, float scale) {
    float sums[kPartialSums<float>] = {};
    for (Index k = first; k < end; k += S::width) {
      const Index left = end - k;
      const bool whole = left >= S::width;
      const Floats dy = whole ? S::load(grad + k) : S::load(grad + k, left);
      const Floats x = whole ? S::load(weight + k) : S::load(weight + k, left);
      const Floats ratio = x / S::set(scale);
      Mask outside;
      const Floats code = nearest_code<bits>(ratio, outside);
      const Floats dw = outside ? none : dy;
      float *sum = partial_sums(sums, k - first);
      S::store(sum, S::load(sum) + dy * (code - (outside ? none : ratio)));
      whole ? S::store(dweight + k, dw) : S::store(dweight + k, dw, left);
    }
    dscale[group] = sum_of(sums);
  });
}

void round_weight_backward(const RoundWeight &w, Index row, const float *grad, float *dweight,
                           float *dscale) {
  w.bits == 8 ? adjoint_of<8>(w, row, grad, dweight, dscale)
              : adjoint_of<4>(w, row, grad, dweight, dscale);
}

}  // namespace

RoundingKernels BKCORE_TABLE(BKCORE_ISA)() {
  return {round_channels, round_channels_backward, round_row, round_weight, round_weight_backward};
}

}  // namespace bkcore
