#include <Python.h>

#include "watch.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

namespace wakesleep {
namespace {

constexpr size_t kLine = 64;  // bytes in a cache line

Watch::Modes modes() {
  const auto autocast = [](c10::DeviceType device) {
    const bool is_on = at::autocast::is_autocast_enabled(device);
    return is_on ? static_cast<int64_t>(at::autocast::get_autocast_dtype(device)) : -1;
  };
  return {
      c10::GradMode::is_enabled(),
      c10::InferenceMode::is_enabled(),
      at::globalContext().deterministicAlgorithms(),
      at::globalContext().deterministicAlgorithmsWarnOnly(),
      at::globalContext().deterministicFillUninitializedMemory(),
      static_cast<int64_t>(at::globalContext().float32MatmulPrecision()),
      static_cast<int64_t>(c10::get_default_dtype_as_scalartype()),
      autocast(at::kCPU),
      autocast(at::kCUDA),
  };
}

const void* data_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) {
    return nullptr;
  }
  const auto* bytes =
      static_cast<const char*>(tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
  return bytes + tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

Watch::Gradient gradient_of(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  if (meta == nullptr) {
    return {false, nullptr, 0};
  }
  return {meta->requires_grad_ || meta->grad_fn_, meta->grad_.unsafeGetTensorImpl(),
          meta->hooks_.size() + (meta->post_acc_grad_hooks_ != nullptr ? 1 : 0)};
}

// Compares numbers and strings by value, and everything else by identity.
bool is_same(PyObject* before, PyObject* now) {
  if (before == now) {
    return true;
  }
  if (now == nullptr || Py_TYPE(before) != Py_TYPE(now) ||
      !(PyFloat_CheckExact(now) || PyLong_CheckExact(now) || PyUnicode_CheckExact(now))) {
    return false;
  }
  const int equal = PyObject_RichCompareBool(before, now, Py_EQ);
  return equal == 1;
}

// Returns the version of a dict, a number that changes with every modification (PEP 509). Python 3.12 and later have no
// such number, so the result is 0.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

bool holds_items(PyObject* place) {
  PyObject* dict = PyTuple_GET_ITEM(place, 0);
  if (2 * PyDict_Size(dict) + 1 != PyTuple_GET_SIZE(place)) {
    return false;
  }
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t item = 1; PyDict_Next(dict, &position, &key, &value); item += 2) {
    if (PyTuple_GET_ITEM(place, item) != key || !is_same(PyTuple_GET_ITEM(place, item + 1), value)) {
      return false;
    }
  }
  return true;
}

bool holds_global(PyObject* place) {
  PyObject* value = PyDict_GetItem(PyTuple_GET_ITEM(place, 1), PyTuple_GET_ITEM(place, 0));
  return is_same(PyTuple_GET_ITEM(place, 2), value);
}

bool holds_list(PyObject* place) {
  PyObject* list = PyTuple_GET_ITEM(place, 0);
  if (PyList_GET_SIZE(list) + 1 != PyTuple_GET_SIZE(place)) {
    return false;
  }
  for (Py_ssize_t item = 0; item < PyList_GET_SIZE(list); ++item) {
    if (!is_same(PyTuple_GET_ITEM(place, item + 1), PyList_GET_ITEM(list, item))) {
      return false;
    }
  }
  return true;
}

bool holds_cell(PyObject* place) {
  PyObject* content = PyCell_GET(PyTuple_GET_ITEM(place, 0));
  return content != nullptr && is_same(PyTuple_GET_ITEM(place, 1), content);
}

}  // namespace

Watch::Watch(const std::vector<at::Tensor>& tensors, PyObject* places) : modes_(modes()) {
  for (const at::Tensor& tensor : tensors) {
    const bool is_strided = tensor.layout() == at::kStrided;
    tensors_.push_back({tensor, tensor.scalar_type(), data_of(tensor), at::DimVector(tensor.sizes()),
                        is_strided ? at::DimVector(tensor.strides()) : at::DimVector(), gradient_of(tensor)});
    add_lines(tensor.unsafeGetTensorImpl(), sizeof(at::TensorImpl));
    if (tensor.has_storage()) {
      add_lines(tensor.storage().unsafeGetStorageImpl(), kLine);
    }
    if (const auto* meta = torch::autograd::impl::get_autograd_meta(tensor)) {
      add_lines(meta, sizeof(*meta));
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); ++i) {
    PyObject* place = PyTuple_GET_ITEM(places, i);
    PyObject* container = PyTuple_GET_ITEM(place, 0);
    if (PyUnicode_Check(container)) {
      add_dict(PyTuple_GET_ITEM(place, 1), place, holds_global);
    } else if (PyDict_Check(container)) {
      add_dict(container, place, holds_items);
    } else if (PyList_Check(container) || PyCell_Check(container)) {
      places_.push_back({place, PyList_Check(container) ? holds_list : holds_cell});
      add_lines(place, kLine);
      add_lines(container, kLine);
    } else {
      add_word(&container->ob_type);
      if (PyObject** dict = _PyObject_GetDictPtr(container)) {  // null if __dict__ is a property
        add_word(dict);
      }
    }
  }
}

void Watch::add_dict(PyObject* dict, PyObject* place, Check check) {
  dicts_.push_back({dict, version_of(dict), place, check});
  add_lines(dict, sizeof(PyDictObject));
}

template <typename T>
void Watch::add_word(T* const* word) {
  words_.push_back({reinterpret_cast<const void* const*>(word), *word});
  lines_.push_back(reinterpret_cast<const char*>(word));
}

void Watch::add_lines(const void* object, size_t size) {
  for (size_t at = 0; at < size; at += kLine) {
    lines_.push_back(static_cast<const char*>(object) + at);
  }
}

bool Watch::holds() {
  for (const char* line : lines_) {
    __builtin_prefetch(line);
  }
  for (const SeenTensor& seen : tensors_) {
    const at::Tensor& tensor = seen.tensor;
    const at::IntArrayRef sizes = seen.sizes, strides = seen.strides;
    if (data_of(tensor) != seen.data || tensor.scalar_type() != seen.type || tensor.sizes() != sizes ||
        (!strides.empty() && tensor.strides() != strides) || gradient_of(tensor) != seen.gradient) {
      return false;
    }
  }
  for (SeenDict& seen : dicts_) {
    const uint64_t version = version_of(seen.dict);
    if ((version == 0 || version != seen.version) && !seen.check(seen.place)) {
      return false;
    }
    seen.version = version;
  }
  for (const auto& [word, value] : words_) {
    if (*word != value) {
      return false;
    }
  }
  for (const auto& [place, check] : places_) {
    if (!check(place)) {
      return false;
    }
  }
  return modes() == modes_;
}

}  // namespace wakesleep
