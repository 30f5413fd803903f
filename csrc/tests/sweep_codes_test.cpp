// The sweep from codes to codes equals, bit for bit, decoding, the float sweep and encoding.

#include "codes.h"
#include "run_sweep.h"
#include "support.h"

namespace bkcore {
namespace {

struct CodedProblem {
  Index batch, sites, lanes, bits, inputs, row;
  bool two_sided, scale_per_site;
  Buffer<std::uint8_t> v, source;
  Tensor<float> energy, eta, hopping, in_scale, in_zero, out_scale, out_zero;
  std::vector<float> in_levels, out_levels, out_bounds;

  CodedProblem(Index batch, Index sites, Index lanes, Index bits, bool has_source, bool two_sided,
               bool per_site, bool with_levels, unsigned seed = 2)
      : batch(batch),
        sites(sites),
        lanes(lanes),
        bits(bits),
        inputs(has_source ? 2 : 1),
        row((lanes * bits + 7) / 8),
        two_sided(two_sided),
        scale_per_site(per_site) {
    Random random(seed);
    const auto byte = [&] { return random.integer(0, 255); };
    v = Buffer<std::uint8_t>::of(batch * sites * row, byte);
    if (has_source) source = Buffer<std::uint8_t>::of(batch * sites * row, byte);
    const auto fill = [&](Index rows, Index parts, const auto &make) {
      Layout how;
      how.expanded = {true, rows == 1, false, false};
      Tensor<float> x({1, rows, parts, lanes}, how, Place::kBeforePage);
      for (float &number : x.numbers()) number = static_cast<float>(make());
      return x;
    };
    const Index half = Index{1} << (bits - 1), outputs = 2 * inputs;
    const auto zero = [&] { return random.integer(-half / 2, half / 2); };
    energy = fill(1, 1, [&] { return random.normal(); });
    eta = fill(per_site ? sites : 1, 1, [&] { return random.uniform(0.5, 1.5); });
    hopping =
        fill(per_site ? std::max<Index>(sites - 1, 1) : 1, 1, [&] { return random.normal(); });
    const Index rows = per_site ? sites : 1;
    in_scale = fill(rows, inputs, [&] { return random.uniform(0.5, 2) / double(half); });
    in_zero = fill(rows, inputs, zero);
    out_scale = fill(rows, outputs, [&] { return random.uniform(0.5, 2) / double(half); });
    out_zero = fill(rows, outputs, zero);
    if (!with_levels) return;
    in_levels = uneven_levels(random, inputs, bits);
    out_levels = uneven_levels(random, outputs, bits);
    out_bounds = bounds_of(out_levels, bits);
  }

  Sweep<float> chains() const {
    Sweep<float> s{batch, sites, lanes};
    s.energy = energy.readable(), s.eta = eta.readable(), s.hopping = hopping.readable();
    return s;
  }

  Buffer<std::uint8_t> run(const Isa &isa, Index threads) const {
    Buffer<std::uint8_t> out(batch * sites * 2 * inputs * row, Place::kBeforePage);
    SweepCodes s{chains(),
                 bits,
                 v.data(),
                 source.data(),
                 out.data(),
                 in_scale.readable(),
                 in_zero.readable(),
                 out_scale.readable(),
                 out_zero.readable(),
                 data_or_null(in_levels),
                 data_or_null(out_bounds)};
    run_sweep_codes(isa, threads, two_sided, s);
    return out;
  }

  Codes codes(const Tensor<float> &scale, const Tensor<float> &zero,
              const std::vector<float> &levels, Index part, Index site, Index h) const {
    const Index i = scale_per_site ? site : 0;
    return {bits, scale.at(0, i, part, h), zero.at(0, i, part, h), part_of(levels, part, bits)};
  }

  Buffer<std::uint8_t> expected(const Isa &isa) const {
    Sweep<float> s = chains();
    Tensor<float> floats[2], parts({batch, sites, 2 * inputs, lanes});
    for (Index n = 0; n < inputs; ++n) {
      floats[n] = Tensor<float>({batch, sites, 1, lanes});
      const std::uint8_t *packed = n ? source.data() : v.data();
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < sites; ++i)
          for (Index h = 0; h < lanes; ++h)
            floats[n].at(b, i, 0, h) =
                codes(in_scale, in_zero, in_levels, n, i, h)
                    .decode(code_at(packed + (b * sites + i) * row, h, bits));
    }
    s.v = floats[0].readable(), s.source = floats[1].readable(), s.parts = parts.writable();
    run_sweep(isa, 1, two_sided, true, Index{1} << 40, s);
    const Index outputs = 2 * inputs;
    Buffer<std::uint8_t> out(batch * sites * outputs * row);
    for (Index b = 0; b < batch; ++b)
      for (Index i = 0; i < sites; ++i)
        for (Index c = 0; c < outputs; ++c)
          for (Index h = 0; h < lanes; ++h)
            set_code(out.data() + ((b * sites + i) * outputs + c) * row, h, bits,
                     codes(out_scale, out_zero, out_levels, c, i, h).encode(parts.at(b, i, c, h)));
    return out;
  }
};

TEST_CASE("codes in, codes out") {
  for (const Index bits : {4, 8})
    for (const Index lanes : {1, 2, 15, 16, 17, 33})
      for (const Index sites : {1, 2, 9, 33})
        for (const int form : {0, 1, 2})
          for (const bool per_site : {false, true})
            for (const bool levels : {false, true}) {
              CAPTURE(bits);
              CAPTURE(lanes);
              CAPTURE(sites);
              CAPTURE(form);
              CAPTURE(per_site);
              CAPTURE(levels);
              const CodedProblem p(2, sites, lanes, bits, form == 1, form == 2, per_site, levels);
              for_isas([&](const Isa &isa) { CHECK(same_bits(p.run(isa, 1), p.expected(isa))); });
            }
}

TEST_CASE("codes of many lanes, in many threads") {
  for (const Index bits : {4, 8}) {
    const CodedProblem p(1, 12, 1100, bits, true, false, true, true);
    for_isas([&](const Isa &isa) {
      const auto want = p.expected(isa);
      for (const Index threads : {1, 2, 5}) CHECK(same_bits(p.run(isa, threads), want));
    });
  }
}

TEST_CASE("NaN among the parameters gives the lowest codes") {
  for (const Index bits : {4, 8})
    for (const bool levels : {false, true}) {
      const CodedProblem p(1, 5, 19, bits, false, false, false, levels);
      p.energy.at(0, 0, 0, 3) = kNaN;
      p.energy.at(0, 0, 0, 18) = kNaN;
      for_isas([&](const Isa &isa) {
        const auto got = p.run(isa, 1);
        CHECK(same_bits(got, p.expected(isa)));
        for (const Index h : {3, 18}) CHECK(code_at(got.data(), h, bits) == -(1 << (bits - 1)));
      });
    }
}

TEST_CASE("no codes at all") {
  for_isas([](const Isa &isa) {
    CHECK(CodedProblem(0, 3, 5, 4, true, false, false, true).run(isa, 2).size() == 0);
    CHECK(CodedProblem(2, 3, 0, 8, false, true, true, false).run(isa, 2).size() == 0);
  });
}

}  // namespace
}  // namespace bkcore
