// Checks at every replay whether anything that a recording depends on has changed, in a few microseconds.
// wakesleep_ext/watch.py lists what is watched.
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

  // Notes the memory, layout and gradient state of these tensors, the modes of torch, and these places: a tuple of
  // tuples that the caller keeps. The tuple of a place has
  //
  //   for a dict: the dict, then its keys and values in turn;
  //   for a list: the list, then its elements;
  //   for a cell: the cell and its content;
  //   for an instance: the instance, whose class and dict are noted;
  //   for a global: its name, the dict that has it, and its value.
  Watch(const std::vector<at::Tensor>& tensors, PyObject* places);

  // True if all this is unchanged.
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

  // A dict is unchanged while its version is this one. After that, `check` compares it with its place.
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
  std::vector<std::pair<const void* const*, const void*>> words_;  // addresses, and what they held
  std::vector<std::pair<PyObject*, Check>> places_;                // lists and cells
  Modes modes_;
  // The cache lines that holds() reads. The previous step displaced them. Prefetched together, they take half the time
  // that they take one after another.
  std::vector<const char*> lines_;
};

}  // namespace wakesleep
