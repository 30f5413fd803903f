// Damages checkpoints and states of all formats: bits, bytes, numbers, names, dtypes, shapes. Each
// is either refused with an Error, or read and continued: no memory may be touched that is not
// theirs, none may be asked for out of proportion, and nothing else may be thrown.
//     fuzz_engine [rounds [seed]]
//
// Round r of seed s is round 0 of seed s + r, so that a round that failed can be repeated alone.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "checkpoint.h"
#include "engine/generate.h"
#include "engine/state_file.h"

namespace bkcore::engine {
namespace {

unsigned long current_seed, opened, loaded;

void report(int) {
  std::fprintf(stderr, "\nTo repeat this round alone: fuzz_engine 1 %lu\n", current_seed);
}

void too_slow(int) { std::abort(); }

constexpr unsigned kMostSeconds = 60;
constexpr Index kTooMany = 18000;

class Fuzzer {
 public:
  Fuzzer(unsigned long seed, const Folder &folder) : engine_(seed), folder_(folder) {}

  void run() {
    const Format formats[] = {Format::f32,  Format::f16,  Format::bf16,
                              Format::int8, Format::int4, Format::mixed};
    sizes_ = sizes();
    Checkpoint checkpoint(sizes_, one_of(formats), static_cast<unsigned>(engine_()));
    const std::function<void()> damages[] = {
        [&] {},
        [&] { times([&] { damage_text(checkpoint.config); }); },
        [&] { checkpoint.config = Checkpoint(sizes_, one_of(formats), 0).config; },
        [&] { times([&] { damage_parts(checkpoint.parts); }); },
        [&] { damages_file_ = true; },
        [&] { damages_state_ = true; },
    };
    const Index which = integer(0, std::size(damages) - 1);
    damages[which]();
    checkpoint.save(folder_.path());
    if (damages_file_) damage_file(folder_.file("model.safetensors"));
    try {
      use();
      ++opened;
    } catch (const Error &error) {
      if (which == 0 && sizes_.keys < kTooMany) throw std::logic_error(error.what());
    }
  }

 private:
  Index integer(Index low, Index high) {
    return std::uniform_int_distribution<Index>(low, high)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <class Options>
  decltype(*std::begin(std::declval<Options &>())) one_of(Options &options) {
    return options[integer(0, static_cast<Index>(std::size(options)) - 1)];
  }

  // Once, and sometimes more often.
  template <class Work>
  void times(const Work &work) {
    do work();
    while (chance(0.5));
  }

  Sizes sizes() {
    Sizes s = small_sizes();
    s.vocabulary = integer(1, 40), s.width = integer(1, 20), s.layers = integer(1, 2);
    s.experts = integer(1, 4), s.experts_per_token = integer(1, s.experts);
    s.hidden = integer(1, 20), s.groups = integer(1, 3), s.heads = s.groups * integer(1, 3);
    s.keys = integer(1, 9), s.values = integer(1, 9), s.taps = integer(1, 5);
    s.group_size = integer(1, 24);
    // A small file that asks for gigabytes.
    if (chance(0.01)) s.width = s.layers = s.heads = s.groups = 1, s.keys = s.values = kTooMany;
    return s;
  }

  // Opens the checkpoint and does with it all that there is to do.
  void use() {
    const Isa &isa = one_of(isas());
    Engine engine(folder_.path(), chance(0.05) ? 2 : 1, isa.name);
    const Sizes &s = engine.sizes();
    const Index batch = integer(1, 3), sites = integer(1, 5);
    const auto tokens = [&] {
      std::vector<std::int64_t> all(static_cast<std::size_t>(batch * sites));
      for (std::int64_t &token : all)
        token = chance(0.02) ? integer(-1, s.vocabulary) : integer(0, s.vocabulary - 1);
      return all;
    };
    State state(s, batch);
    std::vector<float> logits(static_cast<std::size_t>(batch * sites * s.vocabulary));
    try {
      engine.read(state, sites, tokens().data(), logits.data(), true);
      Generation settings;
      settings.most = integer(1, 3), settings.seed = engine_();
      settings.stops = {integer(0, s.vocabulary - 1)};
      settings.sampling.top_k = integer(0, 5), settings.sampling.top_p = 0.9;
      settings.sampling.repetition_penalty = 1.1;
      generate(engine, state, sites, tokens().data(), settings,
               [&](Index, std::int64_t) { return chance(0.9); });
    } catch (const InputError &) {  // a token that is none
    } catch (const CheckpointError &) {
      throw std::logic_error("a checkpoint that was opened is refused");
    } catch (const Error &) {  // logits that are not finite
    }
    if (!damages_state_ && !chance(0.05)) return;  // the disk takes longer than all else
    const std::string path = folder_.file("state.safetensors");
    save_state(state, path);
    if (damages_state_) damage_file(path);
    try {
      State again = load_state(s, path);
      ++loaded;
      const std::vector<std::int64_t> next(static_cast<std::size_t>(again.batch()));
      engine.read(again, 1, next.data(), nullptr);
    } catch (const CheckpointError &error) {
      if (!damages_state_) throw std::logic_error(error.what());
    }
  }

  // A number that is seldom right.
  std::string number() {
    static const char *const all[] = {"0",
                                      "-1",
                                      "1",
                                      "2",
                                      "7",
                                      "127",
                                      "65536",
                                      "1048576",
                                      "2147483647",
                                      "2147483648",
                                      "4294967296",
                                      "4611686018427387904",
                                      "9223372036854775807",
                                      "9223372036854775808",
                                      "-9223372036854775808",
                                      "1e308",
                                      "1e309",
                                      "1e-320",
                                      "1.5",
                                      "-0",
                                      "null",
                                      "true",
                                      "\"8\"",
                                      "[]",
                                      "{}",
                                      "NaN"};
    return chance(0.5) ? std::to_string(integer(0, 50)) : one_of(all);
  }

  void damage_text(std::string &text) {
    const std::function<void()> ways[] = {
        [&] { damage_bytes(text); }, [&] { replace_value(text); }, [&] { replace_number(text); },
        [&] { swap_words(text); },   [&] { nest(text); },
    };
    one_of(ways)();
  }

  Index place(const std::string &text) { return integer(0, static_cast<Index>(text.size())); }

  void damage_bytes(std::string &bytes) {
    if (bytes.empty()) return;
    const Index at = integer(0, static_cast<Index>(bytes.size()) - 1), length = integer(1, 40);
    const std::function<void()> ways[] = {
        [&] { bytes[at] = static_cast<char>(bytes[at] ^ 1 << integer(0, 7)); },
        [&] { bytes.resize(at); },
        [&] { bytes.erase(at, length); },
        [&] { bytes.insert(place(bytes), bytes.substr(at, length)); },
        [&] { bytes[at] = static_cast<char>(integer(0, 255)); },
        [&] { bytes.append(length, static_cast<char>(integer(0, 255))); },
    };
    one_of(ways)();
  }

  void replace_number(std::string &text) {
    std::vector<Index> starts;
    for (Index i = 1; i < static_cast<Index>(text.size()); ++i)
      if (std::isdigit(text[i]) && !std::isalnum(text[i - 1]) && text[i - 1] != '.')
        starts.push_back(i);
    if (starts.empty()) return;
    const Index start = one_of(starts);
    std::size_t end = start;
    while (end < text.size() && (std::isalnum(text[end]) || text[end] == '.')) ++end;
    text.replace(start, end - start, number());
  }

  // The value after some colon, which may be an object or a list.
  void replace_value(std::string &text) {
    std::vector<std::size_t> starts;
    for (std::size_t at = text.find(':'); at != std::string::npos; at = text.find(':', at + 1))
      starts.push_back(at + 1);
    if (starts.empty()) return;
    const std::size_t start = one_of(starts);
    std::size_t end = start;
    for (int depth = 0; end < text.size(); ++end) {
      const char c = text[end];
      if (depth == 0 && (c == ',' || c == '}' || c == ']')) break;
      depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    }
    text.replace(start, end - start, number());
  }

  // Exchanges two texts in quotes.
  void swap_words(std::string &text) {
    std::vector<std::pair<Index, Index>> words;
    for (std::size_t at = text.find('"'); at != std::string::npos; at = text.find('"', at + 1)) {
      const std::size_t end = text.find('"', at + 1);
      if (end == std::string::npos) break;
      words.emplace_back(at, end + 1 - at);
      at = end;
    }
    if (words.empty()) return;
    auto one = one_of(words), other = one_of(words);
    if (one.first > other.first) std::swap(one, other);
    const std::string first = text.substr(one.first, one.second);
    const std::string second = text.substr(other.first, other.second);
    text.replace(other.first, other.second, chance(0.3) ? second : first);
    text.replace(one.first, one.second, second);
  }

  void nest(std::string &text) {
    const Index depth = chance(0.5) ? integer(1, 50) : integer(1000, 100000);
    text.insert(place(text), std::string(depth, chance(0.5) ? '[' : '{'));
  }

  void damage_parts(std::vector<Checkpoint::Part> &parts) {
    Checkpoint::Part &part = one_of(parts);
    const Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64,
                            Dtype::i64, Dtype::i8,  Dtype::u8};
    const std::function<void()> ways[] = {
        [&] { std::swap(part.name, one_of(parts).name); },
        [&] { std::swap(part.shape, one_of(parts).shape); },
        [&] { part.dtype = one_of(dtypes); },
        [&] {
          if (!part.shape.empty()) one_of(part.shape) = integer(0, 30);
        },
        [&] { part.shape.insert(part.shape.begin() + place_in(part), integer(0, 3)); },
        [&] {
          if (parts.size() > 1) parts.erase(parts.begin() + (&part - parts.data()));
        },
        [&] { fill(part.data); },
        [&] { damage_bytes(part.data); },
    };
    one_of(ways)();
    for (Checkpoint::Part &each : parts) fit(each);
  }

  Index place_in(const Checkpoint::Part &part) {
    return integer(0, static_cast<Index>(part.shape.size()));
  }

  // Numbers that are NaN, infinite, tiny or the largest of some dtype.
  void fill(std::string &data) {
    static const std::string patterns[] = {{"\xFF"},
                                           {"\0", 1},
                                           {"\x80"},
                                           {"\x7F"},
                                           {"\x80\x7F", 2},
                                           {"\x80\xFF", 2},
                                           {"\x7F\x7F", 2},
                                           {"\0\x7C", 2},
                                           {"\x01\0", 2},
                                           {"\0\0\x80\x7F", 4},
                                           {"\0\0\xC0\xFF", 4},
                                           "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F"};
    const std::string &pattern = one_of(patterns);
    const std::size_t first = chance(0.5) ? 0 : place(data) / 4 * 4;
    for (std::size_t i = first; i < data.size(); ++i)
      data[i] = pattern[(i - first) % pattern.size()];
  }

  // As many bytes as the shape asks for.
  static void fit(Checkpoint::Part &part) {
    std::uint64_t size = kind_of(part.dtype).bytes;
    for (const Index n : part.shape) size *= static_cast<std::uint64_t>(n);
    part.data.resize(size);
  }

  void damage_file(const std::string &path) {
    std::string content = read_file(path);
    std::uint64_t length;
    std::memcpy(&length, content.data(), sizeof length);
    std::string header = content.substr(sizeof length, length);
    std::string data = content.substr(sizeof length + length);
    if (chance(0.7)) times([&] { damage_text(header); });
    if (chance(0.3)) times([&] { chance(0.5) ? fill(data) : damage_bytes(data); });
    if (chance(0.9)) length = header.size();
    if (chance(0.1))
      length = static_cast<std::uint64_t>(integer(INT64_MIN, INT64_MAX)) >> integer(0, 63);
    content.assign(reinterpret_cast<const char *>(&length), sizeof length);
    content += header + data;
    if (chance(0.1)) damage_bytes(content);
    write_file(path, content);
  }

  std::mt19937_64 engine_;
  const Folder &folder_;
  Sizes sizes_{};
  bool damages_file_ = false, damages_state_ = false;
};

}  // namespace
}  // namespace bkcore::engine

// So that every failure ends the program with SIGABRT, as does memory that is out of proportion:
// the files have some kilobytes.
extern "C" const char *__asan_default_options() {
  return "abort_on_error=1:max_allocation_size_mb=128:hard_rss_limit_mb=2048";
}
extern "C" const char *__ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

int main(int count, char **arguments) {
  using namespace bkcore::engine;
  const unsigned long rounds = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 2000;
  const unsigned long seed = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 1;
  std::signal(SIGABRT, report);
  std::signal(SIGALRM, too_slow);
  const Folder folder;
  for (unsigned long round = 0; round < rounds; ++round) {
    current_seed = seed + round;
    ::alarm(kMostSeconds);
    try {
      Fuzzer(seed + round, folder).run();
    } catch (const std::exception &error) {
      std::fprintf(stderr, "\n%s", error.what());
      std::abort();
    }
  }
  std::printf(
      "fuzz_engine: %lu rounds from seed %lu found nothing; %lu models and %lu states read\n",
      rounds, seed, opened, loaded);
}
