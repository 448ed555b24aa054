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

std::vector<int64_t> modes() {
  std::vector<int64_t> found = {
      c10::GradMode::is_enabled(),
      c10::InferenceMode::is_enabled(),
      at::globalContext().deterministicAlgorithms(),
      at::globalContext().deterministicAlgorithmsWarnOnly(),
      at::globalContext().deterministicFillUninitializedMemory(),
      static_cast<int64_t>(at::globalContext().float32MatmulPrecision()),
      static_cast<int64_t>(c10::get_default_dtype_as_scalartype()),
  };
  for (const auto device : {at::kCPU, at::kCUDA}) {
    const bool is_on = at::autocast::is_autocast_enabled(device);
    found.push_back(is_on ? static_cast<int64_t>(at::autocast::get_autocast_dtype(device)) : -1);
  }
  return found;
}

const void* data_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) {
    return nullptr;
  }
  const auto* bytes =
      static_cast<const char*>(tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
  return bytes + tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

size_t hooks_of(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta == nullptr ? 0 : meta->hooks_.size() + (meta->post_acc_grad_hooks_ != nullptr ? 1 : 0);
}

// Numbers and strings are the same if they are equal; everything else, if it is the same object.
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

bool holds_dict(PyObject* place) {
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

bool holds_instance(PyObject* place) {
  PyObject* instance = PyTuple_GET_ITEM(place, 0);
  PyObject* dict = PyObject_GenericGetDict(instance, nullptr);
  const bool same_dict = dict == PyTuple_GET_ITEM(place, 2);
  if (dict == nullptr) {
    PyErr_Clear();
  }
  Py_XDECREF(dict);
  return same_dict && reinterpret_cast<PyObject*>(Py_TYPE(instance)) == PyTuple_GET_ITEM(place, 1);
}

bool holds_global(PyObject* place) {
  PyObject* value = PyDict_GetItem(PyTuple_GET_ITEM(place, 1), PyTuple_GET_ITEM(place, 0));
  return is_same(PyTuple_GET_ITEM(place, 2), value);
}

bool holds_place(PyObject* place) {
  PyObject* container = PyTuple_GET_ITEM(place, 0);
  if (PyUnicode_Check(container)) {
    return holds_global(place);
  }
  if (PyDict_Check(container)) {
    return holds_dict(place);
  }
  if (PyList_Check(container)) {
    return holds_list(place);
  }
  if (PyCell_Check(container)) {
    PyObject* content = PyCell_GET(container);
    return content != nullptr && is_same(PyTuple_GET_ITEM(place, 1), content);
  }
  return holds_instance(place);
}

}  // namespace

Watch::Watch(const std::vector<at::Tensor>& tensors) : modes_(modes()) {
  for (const at::Tensor& tensor : tensors) {
    const bool is_strided = tensor.layout() == at::kStrided;
    seen_.push_back({tensor, tensor.scalar_type(), data_of(tensor), tensor.sizes().vec(),
                     is_strided ? tensor.strides().vec() : std::vector<int64_t>(), tensor.requires_grad(),
                     tensor.is_leaf() ? tensor.grad() : at::Tensor(), hooks_of(tensor)});
  }
}

bool Watch::holds(PyObject* places) const {
  for (const Seen& seen : seen_) {
    const at::Tensor& tensor = seen.tensor;
    if (tensor.scalar_type() != seen.type || data_of(tensor) != seen.data || tensor.sizes() != seen.sizes ||
        (tensor.layout() == at::kStrided && tensor.strides() != seen.strides) ||
        tensor.requires_grad() != seen.requires_grad || (tensor.is_leaf() && !tensor.grad().is_same(seen.grad)) ||
        hooks_of(tensor) != seen.hooks) {
      return false;
    }
  }
  for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(places); ++place) {
    if (!holds_place(PyTuple_GET_ITEM(places, place))) {
      return false;
    }
  }
  return modes() == modes_;
}

}  // namespace wakesleep
