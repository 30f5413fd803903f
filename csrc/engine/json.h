// A strict reader of JSON (RFC 8259) for files that nobody vouches for.
//
// Depth and number of values are limited, so that memory is; names in an object are unique, and
// text must be UTF-8. There is no writer and no way to change a value.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <locale>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.h"

namespace bkcore::engine {

class Json {
 public:
  enum class Kind { null, boolean, integer, real, text, array, object };
  using Member = std::pair<std::string, Json>;

  // Reads a whole document. `name` is that of the file, for messages.
  static Json parse(std::string_view text, const std::string &name);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }
  bool is_boolean() const { return kind_ == Kind::boolean; }
  bool is_integer() const { return kind_ == Kind::integer; }
  bool is_number() const { return kind_ == Kind::integer || kind_ == Kind::real; }
  bool is_text() const { return kind_ == Kind::text; }
  bool is_array() const { return kind_ == Kind::array; }
  bool is_object() const { return kind_ == Kind::object; }

  bool boolean() const { return integer_ != 0; }
  std::int64_t integer() const { return integer_; }
  double number() const { return kind_ == Kind::integer ? static_cast<double>(integer_) : real_; }
  const std::string &text() const { return text_; }
  const std::vector<Json> &items() const { return items_; }
  const std::vector<Member> &members() const { return members_; }

  // The member of an object, or null if it has none of that name.
  const Json *find(std::string_view name) const {
    for (const Member &member : members_)
      if (member.first == name) return &member.second;
    return nullptr;
  }

 private:
  friend class JsonReader;
  Kind kind_ = Kind::null;
  std::int64_t integer_ = 0;
  double real_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<Member> members_;
};

class JsonReader {
 public:
  JsonReader(std::string_view text, const std::string &name) : text_(text), name_(name) {}

  Json document() {
    Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail("more text after the end");
    return value;
  }

 private:
  static constexpr int kDepth = 32, kMostValues = 1 << 20;

  [[noreturn]] void fail(const std::string &what) const {
    throw CheckpointError(name_ + " is not valid JSON at byte " + std::to_string(at_) + ": " +
                          what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }

  void expect(char wanted) {
    skip_space();
    if (peek() != wanted) fail(std::string("expected '") + wanted + "'");
    ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json read(int depth) {
    if (++values_ > kMostValues) fail("more than 2^20 values");
    skip_space();
    Json value;
    const char first = peek();
    if (depth == kDepth && (first == '{' || first == '[')) fail("nested more than 32 deep");
    if (first == '{') {
      read_object(value, depth);
    } else if (first == '[') {
      read_array(value, depth);
    } else if (first == '"') {
      value.kind_ = Json::Kind::text;
      value.text_ = read_text();
    } else if (first == '-' || (first >= '0' && first <= '9')) {
      read_number(value);
    } else if (take("true")) {
      value.kind_ = Json::Kind::boolean, value.integer_ = 1;
    } else if (take("false")) {
      value.kind_ = Json::Kind::boolean;
    } else if (!take("null")) {
      fail("expected a value");
    }
    return value;
  }

  // Calls `item` for everything between a bracket and its counterpart.
  template <class Item>
  void read_list(char end, const Item &item) {
    ++at_;
    skip_space();
    if (peek() == end) {
      ++at_;
      return;
    }
    for (;;) {
      item();
      skip_space();
      if (peek() == end) break;
      expect(',');
    }
    ++at_;
  }

  void read_array(Json &value, int depth) {
    value.kind_ = Json::Kind::array;
    read_list(']', [&] { value.items_.push_back(read(depth + 1)); });
  }

  void read_object(Json &value, int depth) {
    value.kind_ = Json::Kind::object;
    read_list('}', [&] {
      skip_space();
      if (peek() != '"') fail("expected a name");
      std::string name = read_text();
      expect(':');
      value.members_.emplace_back(std::move(name), read(depth + 1));
    });
    std::vector<std::string_view> names;
    for (const Json::Member &member : value.members_) names.push_back(member.first);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) fail("a name appears twice");
  }

  void read_number(Json &value) {
    const std::size_t start = at_;
    if (peek() == '-') ++at_;
    if (const std::size_t first = at_; skip_digits() > 1 && text_[first] == '0')
      fail("a number starts with 0");
    bool whole = true;
    if (peek() == '.') {
      whole = false, ++at_;
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false, ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      skip_digits();
    }
    const char *first = text_.data() + start, *last = text_.data() + at_;
    if (whole) {
      value.kind_ = Json::Kind::integer;
      if (std::from_chars(first, last, value.integer_).ec != std::errc())
        fail("an integer beyond 64 bits");
    } else {
      value.kind_ = Json::Kind::real;
      // Unlike strtod, a stream of the classic locale takes a point whatever the program's locale.
      std::istringstream digits(std::string(first, last));
      digits.imbue(std::locale::classic());
      if (!(digits >> value.real_)) fail("a number beyond the range of float64");
    }
  }

  std::size_t skip_digits() {
    const std::size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    if (at_ == start) fail("expected a digit");
    return at_ - start;
  }

  std::string read_text() {
    std::string out;
    ++at_;
    for (;;) {
      if (at_ >= text_.size()) fail("a text without end");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') break;
      if (c < 0x20) fail("a control character in a text");
      if (c == '\\') {
        read_escape(out);
      } else if (c < 0x80) {
        out += static_cast<char>(c);
        ++at_;
      } else {
        read_multibyte(out, c);
      }
    }
    ++at_;
    return out;
  }

  void read_multibyte(std::string &out, unsigned char first) {
    const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    std::uint32_t point = first & (0x3F >> more);
    if (first < 0xC2 || first > 0xF4 || at_ + more >= text_.size()) fail("text that is not UTF-8");
    for (int i = 1; i <= more; ++i) {
      const auto c = static_cast<unsigned char>(text_[at_ + i]);
      if ((c & 0xC0) != 0x80) fail("text that is not UTF-8");
      point = point << 6 | (c & 0x3F);
    }
    constexpr std::uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    if (point < kSmallest[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000))
      fail("text that is not UTF-8");
    out.append(text_.substr(at_, more + 1));
    at_ += more + 1;
  }

  std::uint32_t read_hex() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("expected four hexadecimal digits");
      value = value << 4 | static_cast<std::uint32_t>(digit);
    }
    return value;
  }

  void read_escape(std::string &out) {
    ++at_;
    const char c = peek();
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const std::size_t known = kNames.find(c);
    if (c != '\0' && known != std::string_view::npos) {
      out += kMeant[known];
      ++at_;
      return;
    }
    if (c != 'u') fail("an unknown escape");
    ++at_;
    std::uint32_t point = read_hex();
    if (point >= 0xD800 && point < 0xDC00 && take("\\u")) {
      const std::uint32_t low = read_hex();
      if (low < 0xDC00 || low >= 0xE000) fail("half a surrogate pair");
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    } else if (point >= 0xD800 && point < 0xE000) {
      fail("half a surrogate pair");
    }
    append_utf8(out, point);
  }

  static void append_utf8(std::string &out, std::uint32_t point) {
    const auto tail = [&](int shift) { out += static_cast<char>(0x80 | (point >> shift & 0x3F)); };
    if (point < 0x80) {
      out += static_cast<char>(point);
    } else if (point < 0x800) {
      out += static_cast<char>(0xC0 | point >> 6), tail(0);
    } else if (point < 0x10000) {
      out += static_cast<char>(0xE0 | point >> 12), tail(6), tail(0);
    } else {
      out += static_cast<char>(0xF0 | point >> 18), tail(12), tail(6), tail(0);
    }
  }

  std::string_view text_;
  const std::string &name_;
  std::size_t at_ = 0;
  int values_ = 0;
};

inline Json Json::parse(std::string_view text, const std::string &name) {
  return JsonReader(text, name).document();
}

}  // namespace bkcore::engine
