// Every kernel gives the same bits on every processor: with each instruction set, what it computes
// from fixed numbers must have the digest that is written here. `make test-arm` checks them for
// aarch64, too.

#include <cstdio>

#include "codes.h"
#include "engine/recall.h"
#include "run_attention.h"
#include "run_codes.h"
#include "run_sweep.h"
#include "support.h"

namespace bkcore {
namespace {

// The distributions of the standard library may differ between libraries; its engines do not.
class Numbers {
 public:
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(engine_() >> 8) / 16777216;
  }
  Index integer(Index low, Index high) {
    return low + static_cast<Index>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  template <class T>
  Buffer<T> row(Index count, double low, double high) {
    return Buffer<T>::of(count, [&] { return uniform(low, high); });
  }
  template <class T>
  Buffer<T> integers(Index count, Index low, Index high) {
    return Buffer<T>::of(count, [&] { return integer(low, high); });
  }
  template <class T>
  Tensor<T> tensor(const Sizes &sizes, double low, double high) {
    const Tensor<T> x(sizes);
    for (T &number : x.numbers()) number = static_cast<T>(uniform(low, high));
    return x;
  }
  // bfloat16
  Buffer<std::uint16_t> scales(Index count, double low, double high) {
    return Buffer<std::uint16_t>::of(
        count, [&] { return bfloat16(static_cast<float>(uniform(low, high))); });
  }
  // Ascending, for each of several parts.
  std::vector<float> levels(Index parts, Index bits) {
    std::vector<float> all;
    for (Index part = 0; part < parts; ++part) {
      double level = static_cast<double>(-(1 << (bits - 1)));
      for (Index i = 0; i < Index{1} << bits; ++i, level += uniform(0.5, 1.5))
        all.push_back(static_cast<float>(level));
    }
    return all;
  }

 private:
  std::mt19937 engine_{11};
};

// FNV-1a of the bytes of numbers; all NaN are one.
class Digest {
 public:
  template <class T>
  void add(const Buffer<T> &numbers) {
    for (T x : numbers) {
      if (x != x) x = kUnwritten<T>;
      unsigned char bytes[sizeof x];
      std::memcpy(bytes, &x, sizeof x);
      for (const unsigned char byte : bytes) value_ = (value_ ^ byte) * 0x100000001B3u;
    }
  }
  template <class T>
  void add(const Tensor<T> &numbers) {
    add(numbers.numbers());
  }
  std::string text() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(value_));
    return digits;
  }

 private:
  std::uint64_t value_ = 0xCBF29CE484222325u;
};

template <class Run>
void check_bits(const std::string &want, const Run &run) {
  for_isas([&](const Isa &isa) {
    Digest digest;
    run(isa, digest);
    CHECK(digest.text() == want);
  });
}

template <class T>
void sweep_bits(const Isa &isa, Digest &digest, const Sizes &sizes, bool has_source,
                bool two_sided) {
  Numbers numbers;
  const Index batch = sizes[0], sites = sizes[1], lanes = sizes[3], parts = has_source ? 4 : 2;
  const Sizes all = {batch, sites, parts, lanes}, row = {1, 1, 1, lanes},
              sum = {batch, 1, 1, lanes};
  const auto v = numbers.tensor<T>(sizes, -2, 2), grad = numbers.tensor<T>(all, -1, 1);
  const auto energy = numbers.tensor<T>(row, -1, 1), eta = numbers.tensor<T>(row, 0.1, 1);
  const auto hopping = numbers.tensor<T>(row, 0.5, 1.5);
  const Tensor<T> parts_of_all(all), dv(sizes);
  const Tensor<T> source = has_source ? numbers.tensor<T>(sizes, -1, 1) : Tensor<T>();
  const Tensor<T> dsource = has_source ? Tensor<T>(sizes) : Tensor<T>();
  const auto denergy = numbers.tensor<T>(sum, 0, 0), deta = numbers.tensor<T>(sum, 0, 0);
  const auto dhopping = numbers.tensor<T>(sum, 0, 0);
  const Sweep<T> s{batch,
                   sites,
                   lanes,
                   v.readable(),
                   source.readable(),
                   energy.readable(),
                   eta.readable(),
                   hopping.readable(),
                   parts_of_all.writable(),
                   false};
  run_sweep(isa, 1, two_sided, false, Index{1} << 40, s);
  run_sweep_backward<T>(isa, 1, two_sided, Index{1} << 40,
                        {s, grad.readable(), dv.writable(), dsource.writable(), denergy.writable(),
                         deta.writable(), dhopping.writable()});
  for (const Tensor<T> *x : {&parts_of_all, &dv, &dsource, &denergy, &deta, &dhopping})
    digest.add(*x);
}

TEST_CASE_TEMPLATE("bits of sweeps and their adjoints", T, float, double) {
  const std::string want = sizeof(T) == 4 ? "3c9b15b93d00ea4f" : "1f53731387335b9d";
  check_bits(want, [](const Isa &isa, Digest &digest) {
    // Lanes in vectors, gathered, and in blocks.
    for (const Sizes &sizes : {Sizes{2, 37, 1, 21}, Sizes{3, 70, 1, 5}, Sizes{1, 1100, 1, 1}}) {
      sweep_bits<T>(isa, digest, sizes, false, false);
      sweep_bits<T>(isa, digest, sizes, true, false);
      sweep_bits<T>(isa, digest, sizes, false, true);
    }
  });
}

TEST_CASE_TEMPLATE("bits of steps of a sweep", T, float, double) {
  const std::string want = sizeof(T) == 4 ? "d4de45aaef234dad" : "588d64a74f58647a";
  check_bits(want, [](const Isa &isa, Digest &digest) {
    Numbers numbers;
    const Index lanes = 21;
    const auto v = numbers.row<T>(lanes, -2, 2), source = numbers.row<T>(lanes, -1, 1);
    const auto energy = numbers.row<T>(lanes, -1, 1), eta = numbers.row<T>(lanes, 0.1, 1);
    const auto hopping = numbers.row<T>(lanes, 0.5, 1.5), state = numbers.row<T>(4 * lanes, 0, 1);
    const auto row = [](const Buffer<T> &x) { return Strided<const T>{x.data(), 0, 0, 0, 1}; };
    const Sweep<T> s{1,           1,        lanes,        row(v), row(source),
                     row(energy), row(eta), row(hopping), {},     false};
    for (int step = 0; step < 20; ++step) run_sweep_step(isa, s, state.data());
    digest.add(state);
  });
}

TEST_CASE("bits of sweeps of codes") {
  check_bits("f92af6fa5122541e", [](const Isa &isa, Digest &digest) {
    for (const Index bits : {4, 8})
      for (const bool two_sided : {false, true})
        for (const bool with_levels : {false, true}) {
          Numbers numbers;
          const Index sites = 30, lanes = 45, inputs = two_sided ? 1 : 2, outputs = 2 * inputs;
          const Index half = Index{1} << (bits - 1), bytes = sites * ((lanes * bits + 7) / 8);
          const auto v = numbers.integers<std::uint8_t>(bytes, 0, 255);
          const auto source = numbers.integers<std::uint8_t>(two_sided ? 0 : bytes, 0, 255);
          const auto row = [&](Index parts, double low, double high) {
            return numbers.tensor<float>({1, 1, parts, lanes}, low, high);
          };
          const auto zero = [&](Index parts) {
            const Tensor<float> x({1, 1, parts, lanes});
            for (float &each : x.numbers()) each = static_cast<float>(numbers.integer(-3, 3));
            return x;
          };
          const double most = 2 / static_cast<double>(half);
          const auto energy = row(1, -1, 1), eta = row(1, 0.5, 1), hopping = row(1, 0.5, 1.5);
          const auto in_scale = row(inputs, most / 4, most), in_zero = zero(inputs);
          const auto out_scale = row(outputs, most / 4, most), out_zero = zero(outputs);
          std::vector<float> levels, bounds;
          if (with_levels) {
            levels = numbers.levels(inputs, bits);
            bounds = bounds_of(numbers.levels(outputs, bits), bits);
          }
          const Buffer<std::uint8_t> codes(outputs * bytes);
          SweepCodes s{{1, sites, lanes}, bits};
          s.sweep.energy = energy.readable(), s.sweep.eta = eta.readable();
          s.sweep.hopping = hopping.readable();
          s.v = v.data(), s.source = source.data(), s.out = codes.data();
          s.in_scale = in_scale.readable(), s.in_zero = in_zero.readable();
          s.out_scale = out_scale.readable(), s.out_zero = out_zero.readable();
          s.in_levels = data_or_null(levels), s.out_bounds = data_or_null(bounds);
          run_sweep_codes(isa, 1, two_sided, s);
          digest.add(codes);
        }
  });
}

TEST_CASE("bits of rounded sweeps") {
  check_bits("88fe82420257ad00", [](const Isa &isa, Digest &digest) {
    for (const Index bits : {4, 8})
      for (const bool two_sided : {false, true})
        for (const bool with_levels : {false, true}) {
          Numbers numbers;
          const Sizes sizes = {2, 40, 1, 13}, row = {1, 1, 1, 13};
          const double most = 2 / static_cast<double>(1 << (bits - 1));
          const auto v = numbers.tensor<float>(sizes, -2, 2);
          const auto energy = numbers.tensor<float>(row, -1, 1);
          const auto eta = numbers.tensor<float>(row, 0.5, 1);
          const auto hopping = numbers.tensor<float>(row, 0.5, 1.5);
          const auto scale = numbers.row<float>(3 * 6, most / 4, most);
          const auto zero = numbers.integers<float>(3 * 6, -3, 3);
          std::vector<float> levels, bounds;
          if (with_levels) levels = numbers.levels(3, bits), bounds = bounds_of(levels, bits);
          const Tensor<float> parts({2, 40, 2, 13});
          const Sweep<float> s{2,
                               40,
                               13,
                               v.readable(),
                               {},
                               energy.readable(),
                               eta.readable(),
                               hopping.readable(),
                               parts.writable(),
                               false};
          run_sweep_rounded(isa, 1, two_sided,
                            {s, bits, 6, 7, scale.data(), zero.data(), data_or_null(levels),
                             data_or_null(bounds)});
          digest.add(parts);
        }
  });
}

TEST_CASE_TEMPLATE("bits of attention", T, float, double) {
  const std::string want = sizeof(T) == 4 ? "325fb42e6b5a9ea7" : "8d2fded2d10e5f59";
  check_bits(want, [](const Isa &isa, Digest &digest) {
    Numbers numbers;
    const Index heads = 2, sites = 11, keys = 5, values = 37;
    const Index rows = sites * heads, state = 2 * keys * values;
    const auto any = [&](Index count) { return numbers.row<T>(count, -1, 1); };
    const auto v = any(rows), energy = any(heads), query = any(rows * keys), key = any(rows * keys);
    const auto hopping = numbers.row<T>(rows, 0.5, 1.5), eta = numbers.row<T>(heads, 0.1, 1);
    const auto value = any(rows * values), first_g = numbers.row<T>(2 * heads, 0, 1);
    const auto first_psi = any(heads * state);
    const auto dg = any(2 * rows), dout = any(2 * rows * values), dpsi = any(heads * state);
    const Buffer<T> g(2 * rows), out(2 * rows * values), psi(heads * state);
    Attention<T> a{1,
                   sites,
                   heads,
                   keys,
                   values,
                   4,
                   v.data(),
                   hopping.data(),
                   energy.data(),
                   eta.data(),
                   query.data(),
                   key.data(),
                   value.data(),
                   first_g.data(),
                   first_psi.data(),
                   g.data(),
                   out.data(),
                   psi.data(),
                   nullptr};
    const Buffer<T> checkpoints(heads * chunks_of(a) * state);
    a.checkpoints = checkpoints.data();
    run_attention(isa, 1, a);
    const Buffer<T> dv(rows), dhopping(rows), denergy(heads), deta(heads), dquery(rows * keys);
    const Buffer<T> dkey(rows * keys), dvalue(rows * values), dfirst_g(2 * heads);
    const Buffer<T> dfirst_psi(heads * state);
    run_attention_backward<T>(isa, 1, a,
                              {dg.data(), dout.data(), dpsi.data(), dv.data(), dhopping.data(),
                               denergy.data(), deta.data(), dquery.data(), dkey.data(),
                               dvalue.data(), dfirst_g.data(), dfirst_psi.data()});
    for (const Buffer<T> *x : {&g, &out, &psi, &checkpoints, &dv, &dhopping, &denergy, &deta,
                               &dquery, &dkey, &dvalue, &dfirst_g, &dfirst_psi})
      digest.add(*x);
  });
}

// Its exp and log1p are the C library's, in double; the results are rounded to float at once, which
// hides their last bits but for one number in some hundred million.
TEST_CASE("bits of recall steps") {
  check_bits("b9c6817d8e8a994c", [](const Isa &isa, Digest &digest) {
    for (const int rounding : {0, 1, 2}) {
      Numbers numbers;
      const Index heads = 4, groups = 2, keys = 5, values = 21, width = heads * values;
      const Index shared = groups * keys;
      const auto any = [&](Index count) { return numbers.row<float>(count, -1, 1); };
      const auto positive = [&](Index count) { return numbers.row<float>(count, 0.1, 1); };
      const auto gate = any(heads), barrier = any(heads), query = any(shared), key = any(shared);
      const auto value = any(width), weight = any(3 * width), psi = any(2 * keys * width);
      const auto rate = positive(heads), height = positive(heads), eta = positive(heads);
      const auto g = positive(2 * heads);
      const auto scale = numbers.scales(width, 0.01, 0.02);
      const auto zero = numbers.integers<std::int8_t>(width, -3, 3);
      const std::vector<float> levels = numbers.levels(1, 8);
      std::vector<RoundChannels> parts;
      if (rounding)
        for (const Index channels : {heads, heads, shared, shared, width, width, width})
          parts.push_back({1, channels, 8, 1, nullptr, scale.data(), zero.data(),
                           rounding == 2 ? levels.data() : nullptr, nullptr});
      const Buffer<float> features(width), next_g(2 * heads), next_psi(2 * keys * width);
      engine::Workers workers(1);
      const engine::Recall recall{1,
                                  1,
                                  heads,
                                  groups,
                                  keys,
                                  values,
                                  gate.data(),
                                  barrier.data(),
                                  query.data(),
                                  key.data(),
                                  value.data(),
                                  rate.data(),
                                  height.data(),
                                  eta.data(),
                                  weight.data(),
                                  g.data(),
                                  psi.data(),
                                  parts,
                                  features.data(),
                                  next_g.data(),
                                  next_psi.data()};
      engine::RecallRun(isa, workers, recall).run();
      for (const Buffer<float> *x : {&features, &next_g, &next_psi}) digest.add(*x);
    }
  });
}

TEST_CASE("bits of products") {
  check_bits("5fceaaf0b7c6619d", [](const Isa &isa, Digest &digest) {
    for (const Index bits : {4, 8})
      for (const Index rows : {1, 3, 11}) {
        Numbers numbers;
        const Index outputs = 37, inputs = 300, groups = 10;
        const auto x = numbers.row<float>(rows * inputs, -1, 1);
        const auto weight = numbers.integers<std::uint8_t>(outputs * inputs * bits / 8, 0, 255);
        const auto scales = numbers.scales(outputs * groups, -0.1, 0.1);
        const Buffer<float> out(rows * outputs);
        run_product(isa, 1,
                    {rows, outputs, inputs, bits, groups, 32, x.data(), weight.data(),
                     scales.data(), out.data()});
        digest.add(out);
      }
  });
}

TEST_CASE("bits of roundings of activations and their derivatives") {
  check_bits("8d1a5b64423f8b78", [](const Isa &isa, Digest &digest) {
    for (const Index bits : {4, 8})
      for (const bool with_levels : {false, true}) {
        Numbers numbers;
        const Index rows = 70, channels = 27, count = rows * channels, shares = 2;
        const double most = 1.5 / static_cast<double>(1 << (bits - 1));
        const auto x = numbers.row<float>(count, -2, 2), grad = numbers.row<float>(count, -1, 1);
        const auto scale = numbers.scales(9, most / 4, most);
        const auto zero = numbers.integers<std::int8_t>(9, -3, 3);
        std::vector<float> levels;
        if (with_levels) levels = numbers.levels(1, bits);
        const Buffer<float> out(count), of_rows(count), dx(count);
        const auto dscale = Buffer<float>::zeros(shares * channels);
        const auto dlevels = Buffer<float>::zeros(with_levels ? shares << bits : 0);
        const RoundChannels r{rows,      channels,     bits,        3,
                              x.data(),  scale.data(), zero.data(), data_or_null(levels),
                              out.data()};
        run_round_channels(isa, 1, r);
        run_round_channels_backward(isa, 1,
                                    {r, grad.data(), dx.data(), dscale.data(), dlevels.data()});
        run_round_rows(isa, 1, rows, channels, x.data(), of_rows.data());
        for (const Buffer<float> *each : {&out, &dx, &dscale, &dlevels, &of_rows})
          digest.add(*each);
      }
  });
}

TEST_CASE("bits of roundings of weights and their derivatives") {
  check_bits("99ff91729191bbb1", [](const Isa &isa, Digest &digest) {
    for (const Index bits : {4, 8}) {
      Numbers numbers;
      const Index rows = 7, columns = 75, groups = 3, count = rows * columns;
      const auto weight = numbers.row<float>(count, -2, 2), grad = numbers.row<float>(count, -1, 1);
      const auto scale = numbers.scales(rows * groups, 0.005, 0.02);
      const Buffer<std::int8_t> codes(count);
      const Buffer<float> values(count), dweight(count), dscale(rows * groups);
      const RoundWeight w{rows, columns, bits, groups, 32, weight.data(), scale.data()};
      run_round_weight(isa, 1, w, codes.data(), values.data());
      run_round_weight_backward(isa, 1, w, grad.data(), dweight.data(), dscale.data());
      digest.add(codes);
      digest.add(values);
      digest.add(dweight);
      digest.add(dscale);
    }
  });
}

}  // namespace
}  // namespace bkcore
