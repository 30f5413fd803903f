// Tiles whose potentials, sources and outputs are integer codes.
// A code q stands for scale * (q - zero); a number x becomes clamp(round(x / scale) + zero), ties
// to even, as in src/bkcore/quantization/affine.py. With levels, q stands for scale * (level of q -
// zero), and x becomes the code of the level next to x / scale + zero. A tile is decoded, swept by
// the same code as float32 tensors and encoded, all within the first-level cache: bit for bit what
// those three steps give.
//
// Simd::quotient rounds x / scale correctly without dividing (Markstein 1990): with y = 1 / scale
// rounded correctly and q = x y, the remainder x - q scale is exact, and q + (remainder) y is the
// quotient rounded correctly, as long as scale's significand is not all ones (stored scales have 8
// bits).
#pragma once

#include "packing.h"
#include "two_sided.h"

namespace bkcore {
namespace {

// round(x / scale) + zero within the range of codes, as an integer in float. low and high are the
// range minus the zero point, so that it can clamp first, and rounding cannot leave the range.
BKCORE_INLINE float code_of(float x, float scale, float low, float high, float zero) {
  float q = x / scale;
  q = q > low ? q : low;
  q = q < high ? q : high;
  return ((q + kRound) - kRound) + zero;
}

// How a row of output lanes is encoded; low and high are the range of codes minus the zero point.
struct EncoderRows {
  float *scale, *inverse, *zero, *low, *high;
};

// The values of the codes, or the bounds between them: 2 * half numbers, or null if the codes
// themselves are the values.
struct Levels {
  const float *table;
  int half;
  float of(std::int8_t code) const { return table ? table[code + half] : static_cast<float>(code); }
  std::int8_t nearest(float x) const { return bounds_below(x, table, half); }
};

// `sites` rows of codes, one per byte, that share a row of scales and a row of zero points. The
// outer loop is over lanes and the inner one over sites, so that a vector of lanes loads its scales
// once.
BKCORE_INLINE void decode_bytes(Rows<const std::int8_t> codes, Index sites, Index count,
                                const float *scale, const float *zero, const Levels &levels,
                                Rows<float> out) {
  Index h = 0;
  using S = Simd<float>;
  for (; h + S::width <= count; h += S::width) {
    const auto s = S::load(scale + h), z = S::load(zero + h);
    for (Index k = 0; k < sites; ++k) {
      const std::int8_t *code = codes[k] + h;
      const auto level =
          levels.table ? S::look_up(levels.table, code, levels.half) : S::widen(code);
      S::store(out[k] + h, s * (level - z));
    }
  }
  for (Index k = 0; k < sites; ++k)
    for (Index rest = h; rest < count; ++rest)
      out[k][rest] = scale[rest] * (levels.of(codes[k][rest]) - zero[rest]);
}

BKCORE_INLINE void encode_bytes(Rows<const float> x, Index sites, Index count,
                                const EncoderRows &rows, const Levels &bounds,
                                Rows<std::int8_t> codes) {
  Index h = 0;
  using S = Simd<float>;
  S::Bounds search = {};
  if (bounds.table) search = S::bounds(bounds.table, bounds.half);
  for (; h + S::width <= count; h += S::width) {
    const auto scale = S::load(rows.scale + h), inverse = S::load(rows.inverse + h);
    const auto zero = S::load(rows.zero + h);
    const auto low = S::load(rows.low + h), high = S::load(rows.high + h);
    for (Index k = 0; k < sites; ++k) {
      const auto value = S::load(x[k] + h);
      const auto exact = S::quotient(value, scale, inverse);
      if (bounds.table) {
        S::search(codes[k] + h, exact + zero, search);
      } else {
        S::narrow(codes[k] + h, S::clamp(exact, low, high), zero);
      }
    }
  }
  for (Index k = 0; k < sites; ++k)
    for (Index rest = h; rest < count; ++rest) {
      const float value = x[k][rest], zero = rows.zero[rest];
      codes[k][rest] = bounds.table
                           ? bounds.nearest(value / rows.scale[rest] + zero)
                           : static_cast<std::int8_t>(code_of(
                                 value, rows.scale[rest], rows.low[rest], rows.high[rest], zero));
    }
}

class CodedTiles {
 public:
  static constexpr Index kSites = 8;

  CodedTiles(const SweepCodes &coded, Unit unit, void *memory)
      : coded_(coded), unit_(unit), pitch_(row_pitch(unit.count)) {
    float *rows = static_cast<float *>(memory);
    const auto take = [&](Index count) {
      float *taken = rows;
      rows += count * pitch_;
      return taken;
    };
    v_ = take(kSites);
    source_ = take(kSites);
    parts_ = take(4 * kSites);
    for (float *&row : decoder_) row = take(1);
    for (EncoderRows &encoder : encoder_) encoder = {take(1), take(1), take(1), take(1), take(1)};
    codes_ = reinterpret_cast<std::int8_t *>(take(kSites));
    prepare_decoder(0);
    prepare_encoder(0);
  }
  static std::size_t bytes(Index width) {
    return (7 * kSites + 4 + 20) * row_pitch(width) * sizeof(float);
  }

  Index sites() const { return coded_.sweep.sites; }
  Index width() const { return unit_.count; }
  Index length(Index) const { return kSites; }

  Tile<float> load(Index from, Index to) {
    const Sweep<float> &s = coded_.sweep;
    Tile<float> tile{};
    tile.sites = to - from;
    tile.width = unit_.count;
    tile.starts = from == 0;
    tile.ends = to == s.sites;
    const Index group = coded_.in_scale.site || coded_.in_zero.site ? 1 : tile.sites;
    for (Index k = 0; k < tile.sites; k += group) {
      if (group == 1) prepare_decoder(from + k);
      decode(coded_.v, 0, from + k, group, v_ + k * pitch_);
      if (coded_.source) decode(coded_.source, 1, from + k, group, source_ + k * pitch_);
    }
    tile.v = {v_, pitch_};
    if (coded_.source) tile.source = {source_, pitch_};
    tile.energy = {s.energy.data + unit_.first, 0};
    tile.eta = {s.eta.data + from * s.eta.site + unit_.first, s.eta.site};
    tile.hopping = {s.hopping.data + (from - 1) * s.hopping.site + unit_.first, s.hopping.site};
    tile.parts = {parts_, components() * pitch_};
    tile.part = pitch_;
    return tile;
  }

  void done(const Tile<float> &tile, Index from) {
    const Index group = coded_.out_scale.site || coded_.out_zero.site ? 1 : tile.sites;
    for (Index k = 0; k < tile.sites; k += group) {
      if (group == 1) prepare_encoder(from + k);
      for (Index c = 0; c < components(); ++c)
        encode({tile.parts[k] + c * pitch_, tile.parts.step}, from + k, group, c);
    }
  }

 private:
  Index components() const { return coded_.source ? 4 : 2; }
  Index row_bytes() const { return (coded_.sweep.lanes * coded_.bits + 7) / 8; }
  Index first_byte() const { return unit_.first * coded_.bits / 8; }

  // The table of one part of the input or output.
  Levels levels(const float *tables, Index part) const {
    const int half = 1 << (coded_.bits - 1);
    return {tables ? tables + part * 2 * half : nullptr, half};
  }

  void decode(const std::uint8_t *codes, Index part, Index site, Index sites, float *out) {
    const std::uint8_t *row =
        codes + (unit_.batch * coded_.sweep.sites + site) * row_bytes() + first_byte();
    Rows<const std::int8_t> bytes = {reinterpret_cast<const std::int8_t *>(row), row_bytes()};
    if (coded_.bits == 4) {
      for (Index k = 0; k < sites; ++k)
        unpack(row + k * row_bytes(), unit_.count, codes_ + k * pitch_);
      bytes = {codes_, pitch_};
    }
    decode_bytes(bytes, sites, unit_.count, decoder_[2 * part], decoder_[2 * part + 1],
                 levels(coded_.in_levels, part), {out, pitch_});
  }

  void encode(Rows<const float> x, Index site, Index sites, Index c) {
    const Index row = (unit_.batch * coded_.sweep.sites + site) * components() + c;
    const Index step = components() * row_bytes();
    std::uint8_t *out = coded_.out + row * row_bytes() + first_byte();
    const Levels bounds = levels(coded_.out_bounds, c);
    if (coded_.bits == 8) {
      encode_bytes(x, sites, unit_.count, encoder_[c], bounds,
                   {reinterpret_cast<std::int8_t *>(out), step});
      return;
    }
    encode_bytes(x, sites, unit_.count, encoder_[c], bounds, {codes_, pitch_});
    for (Index k = 0; k < sites; ++k) pack(codes_ + k * pitch_, unit_.count, out + k * step);
  }

  float value(const Strided<const float> &x, Index part, Index site, Index h) const {
    return x.data[part * x.part + site * x.site + (unit_.first + h) * x.lane];
  }
  void prepare_decoder(Index site) {
    for (Index part = 0; part < (coded_.source ? 2 : 1); ++part)
      for (Index h = 0; h < unit_.count; ++h) {
        decoder_[2 * part][h] = value(coded_.in_scale, part, site, h);
        decoder_[2 * part + 1][h] = value(coded_.in_zero, part, site, h);
      }
  }
  void prepare_encoder(Index site) {
    const float low = -static_cast<float>(1 << (coded_.bits - 1));
    for (Index c = 0; c < components(); ++c) {
      const EncoderRows &rows = encoder_[c];
      for (Index h = 0; h < unit_.count; ++h) {
        const float scale = value(coded_.out_scale, c, site, h);
        const float zero = value(coded_.out_zero, c, site, h);
        rows.scale[h] = scale;
        rows.inverse[h] = 1 / scale;
        rows.zero[h] = zero;
        rows.low[h] = low - zero;
        rows.high[h] = -low - 1 - zero;
      }
    }
  }

  const SweepCodes &coded_;
  Unit unit_;
  Index pitch_;
  float *v_, *source_, *parts_, *decoder_[4];
  EncoderRows encoder_[4];
  std::int8_t *codes_;
};

}  // namespace
}  // namespace bkcore
