// The mode in which a processor computes with floats.
#pragma once

#include <cfenv>

namespace bkcore::engine {

// While it lives, floats of this thread are rounded to the nearest, and subnormal ones are kept. A
// program may have set another mode, for its own thread only, so that helpers would differ from it.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  DefaultFloats(const DefaultFloats &) = delete;
  DefaultFloats &operator=(const DefaultFloats &) = delete;
  ~DefaultFloats() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

}  // namespace bkcore::engine
