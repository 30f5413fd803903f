// JSON is read as RFC 8259 says, and nothing else is.

#include "engine/json.h"

#include <doctest/doctest.h>

#include <locale>

namespace bkcore::engine {
namespace {

Json parsed(const std::string &text) { return Json::parse(text, "it"); }

void refused(const std::string &text, const char *why) {
  CAPTURE(text);
  try {
    parsed(text);
    FAIL("it was read");
  } catch (const CheckpointError &error) {
    CHECK(std::string(error.what()).find(why) != std::string::npos);
  }
}

TEST_CASE("values of every kind are read") {
  const Json value = parsed(R"( {"a": [1, -2.5e1, true, false, null, "x"], "b": {}} )");
  REQUIRE(value.is_object());
  const std::vector<Json> &items = value.find("a")->items();
  REQUIRE(items.size() == 6);
  CHECK(items[0].integer() == 1);
  CHECK(items[0].number() == 1);
  CHECK(items[1].number() == -25);
  CHECK_FALSE(items[1].is_integer());
  CHECK(items[2].boolean());
  CHECK_FALSE(items[3].boolean());
  CHECK(items[4].is_null());
  CHECK(items[5].text() == "x");
  CHECK(value.find("b")->members().empty());
  CHECK(value.find("c") == nullptr);
}

TEST_CASE("numbers follow the grammar") {
  CHECK(parsed("9223372036854775807").integer() == INT64_MAX);
  CHECK(parsed("-9223372036854775808").integer() == INT64_MIN);
  CHECK(parsed("-0").integer() == 0);
  CHECK(parsed("0.5E+2").number() == 50);
  CHECK(parsed("1e-400").number() == 0);
  for (const char *text : {"01", "-01", "00"}) refused(text, "starts with 0");
  for (const char *text : {"-", "1.", "-.5", "1.e5", "1e", "1e+", "+1", ".5", "- 1"})
    refused(text, "expected");
  for (const char *text : {"1-2", "1.2.3", "0x10", "1_000"}) refused(text, "more text");
  refused("9223372036854775808", "beyond 64 bits");
  refused("1e309", "beyond the range");
  for (const char *text : {"NaN", "Infinity", "-Infinity"}) refused(text, "expected");
}

TEST_CASE("a decimal point is a point whatever the locale") {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Comma));
  const double number = parsed("1.5").number();
  std::locale::global(before);
  CHECK(number == 1.5);
}

TEST_CASE("texts have escapes and are UTF-8") {
  CHECK(parsed(R"("\"\\\/\b\f\n\r\t")").text() == "\"\\/\b\f\n\r\t");
  CHECK(parsed(R"("\u0041\u00e9\u20AC\ud83d\ude00")").text() ==
        "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  CHECK(parsed("\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\"").text().size() == 9);
  for (const char *text : {R"("\ud83d")", R"("\ud83dx")", R"("\ude00")", R"("\ud83d\u0041")"})
    refused(text, "surrogate");
  for (const char *text : {R"("\u12g4")", R"("\u12)"}) refused(text, "hexadecimal");
  refused(R"("\x")", "unknown escape");
  refused("\"\\", "unknown escape");
  refused("\"a\nb\"", "control character");
  refused("\"abc", "without end");
  // Too long, a surrogate, beyond Unicode, cut, not a start.
  for (const char *text :
       {"\"\xC0\x80\"", "\"\xE0\x80\x80\"", "\"\xED\xA0\x80\"", "\"\xF4\x90\x80\x80\"",
        "\"\xE2\x82\"", "\"\xE2\x82", "\"\x80\"", "\"\xF5\x80\x80\x80\""})
    refused(text, "UTF-8");
}

TEST_CASE("structure is strict") {
  for (const char *text : {"[1,]", "[1 2]", "{\"a\" 1}", "{\"a\":1,}", "{a:1}", "[", "{", "[1", ""})
    refused(text, "expected");
  refused("{} {}", "more text");
  refused(R"({"a": 1, "a": 2})", "appears twice");
  refused(R"({"a": 1, "\u0061": 2})", "appears twice");
}

TEST_CASE("depth and number of values are limited") {
  const std::string open(32, '['), close(32, ']');
  CHECK(parsed(open + close).is_array());
  refused("[" + open + close + "]", "32 deep");
  refused(std::string(1'000'000, '['), "32 deep");
  std::string many = "[0";
  for (int i = 0; i < 1 << 20; ++i) many += ",0";
  refused(many + "]", "2^20 values");
}

}  // namespace
}  // namespace bkcore::engine
