// Whether what a recording depends on is still what it was: a few microseconds of looking, at every call of a replay.
// wakesleep_ext/watch.py says what is looked at.
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
  // Whether a tensor requires a gradient, which one it has, and how many hooks.
  struct Gradient {
    bool is_required;
    const at::TensorImpl* value;
    size_t hooks;
    bool operator!=(const Gradient& o) const {
      return is_required != o.is_required || value != o.value || hooks != o.hooks;
    }
  };
  using Modes = std::array<int64_t, 9>;

  // Notes where these tensors lie, how they are laid out, whether they require a gradient, which one they have and how
  // many hooks; the modes that torch is in; and these places, a tuple of tuples that the caller keeps. Of a dict the
  // first item is that dict, then come its keys and values in turn; of a list the list, then its elements; of a cell
  // the cell and what is in it; of an instance itself, whose class and dict are noted; of a global its name, the dict
  // that has it, and its value.
  Watch(const std::vector<at::Tensor>& tensors, PyObject* places);

  // Whether all this is unchanged.
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

  // A dict holds what its place says for as long as its version is this one; after that, if the check says so.
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
  std::vector<std::pair<const void* const*, const void*>> words_;  // of memory, and what they held
  std::vector<std::pair<PyObject*, Check>> places_;                // those that are neither
  Modes modes_;
  // The lines of the cache that are going to be read. The step before has displaced them: fetched together they take
  // half the time that they take one after another.
  std::vector<const char*> lines_;
};

}  // namespace wakesleep
