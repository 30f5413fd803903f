// Whether dictionaries of Python still hold what they held.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <vector>

namespace bkcore::engine {

// Keeps dictionaries, their keys and their values alive, and compares them by identity.
class Snapshot {
 public:
  explicit Snapshot(const nanobind::list &dicts) {
    for (const nanobind::handle each : dicts) {
      const auto dict = nanobind::cast<nanobind::dict>(each);
      dicts_.push_back({dict, dict.size()});
      for (const auto &[key, value] : dict)
        entries_.push_back({nanobind::borrow(key), nanobind::borrow(value)});
    }
  }

  // Whether all have the same keys and values, in the same order.
  bool holds() const {
    auto entry = entries_.begin();
    for (const Dict &dict : dicts_) {
      if (dict.dict.size() != dict.size) return false;
      PyObject *key, *value;
      Py_ssize_t at = 0;
      while (dict.size && PyDict_Next(dict.dict.ptr(), &at, &key, &value)) {
        if (key != entry->key.ptr() || value != entry->value.ptr()) return false;
        ++entry;
      }
    }
    return true;
  }

 private:
  struct Dict {
    nanobind::dict dict;
    std::size_t size;
  };
  struct Entry {
    nanobind::object key, value;
  };

  std::vector<Dict> dicts_;
  std::vector<Entry> entries_;  // of all of them
};

}  // namespace bkcore::engine
