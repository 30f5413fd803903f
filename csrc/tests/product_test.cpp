// Products of codes against sums in int64, with roundings in the order that product.h names. All
// instruction sets must give the same bits.

#include "codes.h"
#include "run_codes.h"
#include "support.h"

namespace bkcore {
namespace {

constexpr int kInt4[16] = {-127, -102, -81, -63, -47, -34, -22, -11,
                           0,    12,   25,  40,  56,  75,  99,  127};

struct ProductProblem {
  Index rows, outputs, inputs, bits, group_size, groups, width;
  Buffer<float> x;
  Buffer<std::uint8_t> weight;
  Buffer<std::uint16_t> scales;

  ProductProblem(Index rows, Index outputs, Index inputs, Index bits, Index group_size)
      : rows(rows),
        outputs(outputs),
        inputs(inputs),
        bits(bits),
        group_size(group_size),
        groups(groups_of(inputs, group_size)),
        width((inputs * bits + 7) / 8) {
    Random random(6);
    const Place place = Place::kBeforePage;
    x = Buffer<float>::of(rows * inputs, [&] { return random.normal(); }, place);
    weight =
        Buffer<std::uint8_t>::of(outputs * width, [&] { return random.integer(0, 255); }, place);
    scales = Buffer<std::uint16_t>::of(
        outputs * groups, [&] { return bfloat16(float(random.uniform(-2, 2))); }, place);
  }

  Buffer<float> run(const Isa &isa, Index threads = 1) const {
    const Buffer<float> out(rows * outputs, Place::kBeforePage);
    for (float &number : out) number = kNaN;
    run_product(isa, threads,
                {rows, outputs, inputs, bits, groups, group_size, x.data(), weight.data(),
                 scales.data(), out.data()});
    return out;
  }

  Buffer<float> expected() const {
    const Buffer<float> out(rows * outputs);
    for (Index m = 0; m < rows; ++m) {
      const float *row = x.data() + m * inputs;
      float largest = 0;
      for (Index k = 0; k < inputs; ++k)
        largest =
            row[k] != row[k] || largest != largest ? kNaN : std::max(largest, std::abs(row[k]));
      float scale = largest / 127;
      if (scale < std::numeric_limits<float>::min()) scale = 1;
      for (Index o = 0; o < outputs; ++o) {
        float total = 0;
        for (Index group = 0; group < groups; ++group) {
          std::int64_t sum = 0;
          for (Index k = group * group_size; k < std::min(inputs, (group + 1) * group_size); ++k) {
            const int code = code_at(weight.data() + o * width, k, bits);
            const float q = std::isfinite(scale) ? std::nearbyint(row[k] / scale) : 0;
            sum += std::int64_t{bits == 8 ? code : kInt4[code + 8]} * static_cast<int>(q);
          }
          const float term = static_cast<float>(sum) * from_bits(scales[o * groups + group]);
          total = group ? total + term : term;
        }
        out[m * outputs + o] = total * scale;
      }
    }
    return out;
  }
};

TEST_CASE("products of all sizes and groups") {
  for (const Index bits : {4, 8})
    for (const Index rows : {1, 2, 4, 5, 7, 17})
      for (const Index outputs : {1, 15, 16, 17, 33, 65})
        for (const Index inputs : {1, 2, 3, 15, 16, 33, 64, 130})
          for (const Index group_size : {1, 2, 7, 32, 1000}) {
            CAPTURE(bits);
            CAPTURE(rows);
            CAPTURE(outputs);
            CAPTURE(inputs);
            CAPTURE(group_size);
            const ProductProblem p(rows, outputs, inputs, bits, std::min(group_size, inputs));
            const Buffer<float> want = p.expected();
            for_isas([&](const Isa &isa) { CHECK(same_bits(p.run(isa), want)); });
          }
}

TEST_CASE("threads and many rows change no bit of a product") {
  for (const Index bits : {4, 8}) {
    const ProductProblem p(401, 70, 65, bits, 32);
    const Buffer<float> want = p.expected();
    for_isas([&](const Isa &isa) {
      for (const Index threads : {1, 2, 5}) CHECK(same_bits(p.run(isa, threads), want));
    });
  }
}

// A group with the most inputs that bkcore.kernels.product allows, all with the largest codes.
TEST_CASE("the largest sums are exact") {
  const Index inputs = ((Index{1} << 31) - 1) / (128 * 127);
  for (const Index rows : {1, 5})
    for (const std::uint8_t code : {0x80, 0x7F}) {
      const ProductProblem p(rows, 2, inputs, 8, inputs);
      for (float &number : p.x) number = 1;
      for (std::uint8_t &number : p.weight) number = code;
      const Buffer<float> want = p.expected();
      for_isas([&](const Isa &isa) { CHECK(same_bits(p.run(isa), want)); });
    }
}

TEST_CASE("rows of zeros, of the smallest numbers, and with NaN and infinity") {
  for (const Index bits : {4, 8})
    for (const Index rows : {4, 9}) {
      const ProductProblem p(rows, 19, 21, bits, 7);
      for (Index k = 0; k < 21; ++k) p.x[k] = 0, p.x[21 + k] = 1e-40f * float(k);
      p.x[2 * 21 + 20] = kNaN;
      p.x[3 * 21] = -kInfinity;
      const Buffer<float> want = p.expected();
      for (Index o = 0; o < 19; ++o) {
        CHECK(want[o] == 0);
        for (const Index row : {2, 3}) CHECK(want[row * 19 + o] != want[row * 19 + o]);
      }
      for_isas([&](const Isa &isa) { CHECK(same_bits(p.run(isa), want)); });
    }
}

TEST_CASE("products without rows or outputs, and of no inputs, which are 0") {
  for (const Index bits : {4, 8})
    for_isas([&](const Isa &isa) {
      CHECK(ProductProblem(0, 3, 4, bits, 2).run(isa, 2).size() == 0);
      CHECK(ProductProblem(3, 0, 4, bits, 2).run(isa, 2).size() == 0);
      for (const Index rows : {1, 6})
        for (const float x : ProductProblem(rows, 20, 0, bits, 2).run(isa, 2)) CHECK(x == 0);
    });
}

}  // namespace
}  // namespace bkcore
