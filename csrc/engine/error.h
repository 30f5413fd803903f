// The error of the engine: what went wrong, in words for the person who asked.
#pragma once

#include <cstddef>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace bkcore::engine {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A checkpoint that is missing, damaged or of another kind.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// A checkpoint of bkcore that the engine does not read.
class UnsupportedError : public CheckpointError {
 public:
  using CheckpointError::CheckpointError;
};

// An argument that cannot be.
class InputError : public Error {
 public:
  using Error::Error;
};

// Text of a stranger for a message: one line of ASCII, shortened if long.
inline std::string shown(std::string_view text) {
  constexpr std::size_t kMost = 100;
  std::string out;
  for (const char c : text.substr(0, kMost)) out += c < ' ' || c > '~' ? '?' : c;
  return text.size() > kMost ? out + "..." : out;
}

// A path for a message: one line, and otherwise as it is.
inline std::string shown_path(std::string path) {
  for (char &c : path)
    if ((c >= 0 && c < ' ') || c == '\x7F') c = '?';
  return path;
}

inline std::string shown(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", number);
  return text;
}

}  // namespace bkcore::engine
