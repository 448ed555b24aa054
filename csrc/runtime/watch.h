// Checks before every replay whether anything that a recording depends on has changed. The check takes a few
// microseconds. wakesleep_ext/watch.py lists what is watched.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <utility>
#include <vector>

struct _object;
using PyObject = _object;

namespace wakesleep {

class Watch {
 public:
  // The gradient state of a tensor.
  struct Gradient {
    bool is_required;
    const at::TensorImpl* value;
    size_t hooks;
    bool operator!=(const Gradient& o) const {
      return is_required != o.is_required || value != o.value || hooks != o.hooks;
    }
  };
  using Modes = std::array<int64_t, 9>;

  // Records the memory, layout and gradient state of the tensors, the modes of torch, and the contents of the places.
  // `places` is a tuple with one tuple for each place, and the caller must keep it alive. The tuple of a place contains
  //
  //   for a dict: the dict, then its keys and values in turn;
  //   for a list: the list, then its elements;
  //   for a cell: the cell and its content;
  //   for an instance: the instance, whose class and dict are recorded;
  //   for a global: its name, the dict that contains it, and its value.
  Watch(const std::vector<at::Tensor>& tensors, PyObject* places);

  // Returns true if nothing that was recorded has changed.
  bool holds();

 private:
  struct SeenTensor {
    at::Tensor tensor;
    c10::ScalarType type;
    const void* data;
    at::DimVector sizes, strides;
    Gradient gradient;
  };

  using Check = bool (*)(PyObject* place);

  // A dict is unchanged if its version is still `version`. Otherwise, `check` compares the contents of the dict with
  // `place`.
  struct SeenDict {
    PyObject* dict;
    uint64_t version;
    PyObject* place;
    Check check;
  };

  void add_dict(PyObject* dict, PyObject* place, Check check);
  template <typename T>
  void add_word(T* const* word);
  void add_lines(const void* object, size_t size);

  std::vector<SeenTensor> tensors_;
  std::vector<SeenDict> dicts_;
  std::vector<std::pair<const void* const*, const void*>> words_;  // addresses of pointers, and their recorded values
  std::vector<std::pair<PyObject*, Check>> places_;                // lists and cells
  Modes modes_;
  // The cache lines that holds() reads. The previous training step has evicted these lines. Prefetching all of them
  // together takes half as long as loading them one after another.
  std::vector<const char*> lines_;
};

}  // namespace wakesleep
