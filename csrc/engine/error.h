// The error of the engine: what went wrong, in words for the person who asked.
#pragma once

#include <stdexcept>
#include <string>

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

// An argument that cannot be.
class InputError : public Error {
 public:
  using Error::Error;
};

}  // namespace bkcore::engine
