// What is written can be read, and a file that is not whole is refused.

#include "engine/safetensors.h"

#include <doctest/doctest.h>

#include "checkpoint.h"
#include "engine/write.h"

namespace bkcore::engine {
namespace {

void refused(const Folder &folder, const std::string &header, const std::string &data,
             const char *why) {
  CAPTURE(header);
  std::uint64_t length = header.size();
  std::string content(reinterpret_cast<const char *>(&length), sizeof length);
  write_file(folder.file("x"), content + header + data);
  try {
    Safetensors(folder.file("x"));
    FAIL("it was read");
  } catch (const CheckpointError &error) {
    CHECK(std::string(error.what()).find(why) != std::string::npos);
  }
}

std::string entry(const std::string &dtype, const std::string &shape, const std::string &offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

TEST_CASE("tensors are read as they were written") {
  const Folder folder;
  const float numbers[] = {1, -2, 3.5F, 0, 5, 6};
  const std::int64_t count = 7;
  const auto of = [](const void *x) { return static_cast<const std::byte *>(x); };
  write_safetensors(folder.file("x"), {{"count", {Dtype::i64, {1}, of(&count)}},
                                       {"a.b", {Dtype::f32, {2, 3}, of(numbers)}},
                                       {"none", {Dtype::f32, {2, 0}, nullptr}},
                                       {"scalar", {Dtype::f32, {}, of(numbers)}}});
  const Safetensors file(folder.file("x"));
  CHECK(file.tensors().size() == 4);
  const Tensor &a = file.tensors().at("a.b");
  CHECK(a.shape == std::vector<std::int64_t>{2, 3});
  CHECK(std::memcmp(a.data, numbers, sizeof numbers) == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data) % 8 == 0);
  CHECK(std::memcmp(file.tensors().at("count").data, &count, sizeof count) == 0);
  CHECK(file.tensors().at("none").shape == std::vector<std::int64_t>{2, 0});
  CHECK(file.tensors().at("scalar").shape.empty());
}

TEST_CASE("a file replaces another one, or nothing happens") {
  const Folder folder;
  const std::int64_t count = 7;
  const std::vector<std::pair<std::string, Tensor>> all = {
      {"x", {Dtype::i64, {1}, reinterpret_cast<const std::byte *>(&count)}}};
  write_file(folder.file("x"), "before");
  write_safetensors(folder.file("x"), all);
  CHECK(Safetensors(folder.file("x")).tensors().count("x") == 1);
  std::filesystem::create_directory(folder.file("folder"));
  for (const std::string &path : {folder.file("folder"), folder.file("no/x"), std::string("/")})
    CHECK_THROWS_AS(write_safetensors(path, all), CheckpointError);
  for (const auto &left : std::filesystem::directory_iterator(folder.path()))
    CHECK(left.path().filename().string().find(".saving") == std::string::npos);
}

TEST_CASE("a header of something else is refused") {
  const Folder folder;
  const std::string four(4, '\0');
  const auto tensor = [](const std::string &x) { return "{\"a\":" + x + "}"; };
  refused(folder, "[]", "", "not an object");
  refused(folder, "{", "", "JSON");
  refused(folder, tensor("3"), "", "no dtype, shape and data_offsets");
  refused(folder, tensor(R"({"dtype":"F32","shape":[1]})"), four, "no dtype, shape");
  refused(folder, tensor(entry("F32", "1", "[0,4]")), four, "no dtype, shape");
  refused(folder, tensor(entry("F31", "[1]", "[0,4]")), four, "dtype F31");
  refused(folder, tensor(entry("F32", "[-1]", "[0,4]")), four, "wrong shape");
  refused(folder, tensor(entry("F32", "[1.0]", "[0,4]")), four, "wrong shape");
  refused(folder, tensor(entry("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]")), four, "axes");
  refused(folder, tensor(entry("F32", "[4611686018427387904,4]", "[0,0]")), "", "2^64");
  for (const char *offsets : {"[0,3]", "[4,0]", "[0,8]", "[-4,0]", "[0,9223372036854775807]"})
    refused(folder, tensor(entry("F32", "[1]", offsets)), four, "does not fit");
  refused(folder, tensor(entry("F32", "[1]", "[4,8]")), four + four, "overlap or leave gaps");
  refused(folder, tensor(entry("F32", "[1]", "[0,4]")), four + four, "bytes follow");
  refused(folder,
          "{\"a\":" + entry("F32", "[1]", "[0,4]") + ",\"b\":" + entry("F32", "[1]", "[0,4]") + "}",
          four, "overlap");
  refused(folder, "{\"" + std::string(5000, 'n') + "\\u001b\":3}", "", "nnn...");
}

TEST_CASE("a length that is not that of a header is refused") {
  const Folder folder;
  for (const std::uint64_t length : {std::uint64_t{3}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    write_file(folder.file("x"),
               std::string(reinterpret_cast<const char *>(&length), sizeof length) + "{}");
    CHECK_THROWS_AS(Safetensors(folder.file("x")), CheckpointError);
  }
  for (const char *content : {"", "1234567"}) {
    write_file(folder.file("x"), content);
    CHECK_THROWS_AS(Safetensors(folder.file("x")), CheckpointError);
  }
}

TEST_CASE("what is no regular file, or too large, is refused without waiting") {
  const Folder folder;
  REQUIRE(::mkfifo(folder.file("pipe").c_str(), 0600) == 0);
  for (const std::string &path :
       {folder.file("pipe"), folder.path(), folder.file("none"), std::string("/dev/zero")})
    CHECK_THROWS_AS(MappedFile{path}, CheckpointError);
  write_file(folder.file("x"), "12345");
  CHECK(MappedFile(folder.file("x"), 5).text() == "12345");
  CHECK_THROWS_AS(MappedFile(folder.file("x"), 4), CheckpointError);
}

}  // namespace
}  // namespace bkcore::engine
