// Whether objects of Python still are what they were.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_set>
#include <vector>

namespace bkcore::engine {

// Compares the attributes of modules and classes by identity, and the tensors among them also by
// address, format and layout. It keeps none of them alive: whatever can be referred to weakly is,
// so that a freed object's address that is used again is no match.
class Snapshot {
 public:
  // `objects` have a __dict__, and none is a class of the interpreter's own. `exchange` is
  // tensor.__dlpack_c_exchange_api__; None where PyTorch has none, and then the caller must compare
  // addresses, formats and layouts. Attributes named in `inner` are dictionaries that are compared,
  // too.
  Snapshot(const nanobind::list &objects, nanobind::handle tensor, nanobind::handle exchange,
           const nanobind::set &inner) {
    if (!exchange.is_none()) layout_of_ = layout_function(exchange);
    for (const nanobind::handle each : objects) {
      watch(each.ptr(), tensor.ptr());
      const Owner owner{each.ptr(), dict_of(each.ptr())};
      owners_.push_back(owner);
      add(owner.dict, tensor.ptr(), inner.ptr());
    }
    if (layout_of_)
      each_layout([&](std::int64_t fact) {
        layouts_.push_back(fact);
        return true;
      });
    seen_.clear();
  }

  // The tensors, if all objects have the same attributes with the same values, in the same order;
  // otherwise none. They are handed out at once, since another thread may let them go.
  std::optional<nanobind::list> hold() const {
    if (!holds()) return std::nullopt;
    nanobind::list out;
    for (PyObject *x : tensors_) out.append(nanobind::handle(x));
    return out;
  }

  // Whether it compares the layouts of tensors.
  bool sees_layouts() const { return layout_of_ != nullptr; }

 private:
  using Layout = nanobind::dlpack::dltensor;
  using LayoutFunction = int (*)(void *, Layout *);

  struct Owner {
    PyObject *object, *dict;
  };
  struct Dict {
    PyObject *dict;
    Py_ssize_t size;
  };
  struct Entry {
    PyObject *key, *value;
  };
  struct Watched {
    PyObject *object, *reference;
    PyTypeObject *type;
  };

  bool holds() const {
    for (const Watched &each : watched_)
      if (!is_alive(each) || Py_TYPE(each.object) != each.type) return false;
    for (const Owner &owner : owners_)
      if (dict_of(owner.object) != owner.dict) return false;
    auto entry = entries_.begin();
    for (const Dict &each : dicts_) {  // those inside others come after them
      if (!PyDict_Check(each.dict) || PyDict_Size(each.dict) != each.size) return false;
      PyObject *key, *value;
      Py_ssize_t at = 0;
      while (each.size && PyDict_Next(each.dict, &at, &key, &value)) {
        if (key != entry->key || value != entry->value) return false;
        ++entry;
      }
    }
    auto known = layouts_.begin();
    return !layout_of_ || each_layout([&](std::int64_t fact) { return fact == *known++; });
  }

  // The C interface of DLPack 1.3, as far as it is needed here.
  static LayoutFunction layout_function(nanobind::handle capsule) {
    struct Exchange {
      std::uint32_t major, minor;
      void *previous, *allocate, *to_managed, *from_managed;
      LayoutFunction layout;
    };
    const auto *found =
        static_cast<const Exchange *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw nanobind::python_error();
    return found->major == 1 ? found->layout : nullptr;
  }

  // The attributes of an object, or of a class. The dictionary lives as long as the object has it.
  static PyObject *dict_of(PyObject *object) {
    if (PyType_Check(object)) return reinterpret_cast<PyTypeObject *>(object)->tp_dict;
    PyObject *const dict = PyObject_GenericGetDict(object, nullptr);
    if (!dict) throw nanobind::python_error();
    Py_DECREF(dict);
    return dict;
  }

  static bool is_alive(const Watched &each) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *found;
    if (PyWeakref_GetRef(each.reference, &found) != 1) return false;
    Py_DECREF(found);
    return true;
#else
    return PyWeakref_GetObject(each.reference) == each.object;
#endif
  }

  void add(PyObject *dict, PyObject *tensor, PyObject *inner) {
    std::vector<PyObject *> below;
    dicts_.push_back({dict, PyDict_Size(dict)});
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &key, &value)) {
      entries_.push_back({key, value});
      kept_.push_back(nanobind::borrow(key));
      watch(value, tensor);
      if (inner && PyDict_Check(value) && PySet_Contains(inner, key) == 1) below.push_back(value);
    }
    for (PyObject *each : below) add(each, tensor, nullptr);
  }

  // Sees to it that no other object can pass for this one at the same address. Containers may: no
  // module computes with one but those that are compared, too, and there are many.
  void watch(PyObject *object, PyObject *tensor) {
    if (holds_no_objects(object, 4)) {
      kept_.push_back(nanobind::borrow(object));
    } else if (PyType_SUPPORTS_WEAKREFS(Py_TYPE(object)) && !PyDict_Check(object) &&
               !PyAnySet_Check(object) && seen_.insert(object).second) {
      const nanobind::object reference = nanobind::steal(PyWeakref_NewRef(object, nullptr));
      if (!reference.is_valid()) throw nanobind::python_error();
      watched_.push_back({object, reference.ptr(), Py_TYPE(object)});
      kept_.push_back(reference);
      if (PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject *>(tensor)))
        tensors_.push_back(object);
      watch(reinterpret_cast<PyObject *>(Py_TYPE(object)), tensor);
    }
  }

  // Whether an object is a number, a text and the like, or a tuple of them. A list of them may
  // later hold the model.
  static bool holds_no_objects(PyObject *object, int depth) {
    if (!PyObject_IS_GC(object)) return true;
    if (!PyTuple_CheckExact(object) || depth == 0) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i)
      if (!holds_no_objects(PyTuple_GET_ITEM(object, i), depth - 1)) return false;
    return true;
  }

  // Tells where each tensor is, its format, and how its numbers lie there, until `see` is false.
  template <class See>
  bool each_layout(See see) const {
    for (PyObject *tensor : tensors_) {
      Layout x;
      if (layout_of_(tensor, &x)) {  // it has no such layout: it is sparse, for example
        PyErr_Clear();
        if (!see(-1)) return false;
        continue;
      }
      const std::int64_t format = std::int64_t{x.dtype.code} << 48 |
                                  std::int64_t{x.dtype.bits} << 40 |
                                  std::int64_t{x.device.device_type} << 32 | x.ndim;
      if (!see(reinterpret_cast<std::intptr_t>(x.data) +
               static_cast<std::int64_t>(x.byte_offset)) ||
          !see(format))
        return false;
      for (int i = 0; i < x.ndim; ++i)
        if (!see(x.shape[i]) || !see(x.strides[i])) return false;
    }
    return true;
  }

  LayoutFunction layout_of_ = nullptr;
  std::vector<Owner> owners_;
  std::vector<Dict> dicts_;
  std::vector<Entry> entries_;  // of all of them
  std::vector<Watched> watched_;
  std::vector<PyObject *> tensors_;
  std::vector<std::int64_t> layouts_;
  std::vector<nanobind::object> kept_;  // what is kept, and weak references to the rest
  std::unordered_set<PyObject *> seen_;
};

}  // namespace bkcore::engine
