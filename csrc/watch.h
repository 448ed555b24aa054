// Whether what a recording depends on is still what it was: a few microseconds of looking, at every call of a replay.
// wakesleep_ext/watch.py says what is looked at.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

struct _object;
using PyObject = _object;

namespace wakesleep {

class Watch {
 public:
  // Notes where these tensors lie, how they are laid out, whether they require a gradient, which one they have and how
  // many hooks; and the modes that torch is in.
  explicit Watch(const std::vector<at::Tensor>& tensors);

  // Whether all this is unchanged, and so are these places: a tuple of tuples. Of a dict the first item is that dict,
  // then come its keys and values in turn; of a list the list, then its elements; of a cell the cell and what is in it;
  // of an
  // instance itself, its class and its dict; of a global its name, the dict that has it, and its value.
  bool holds(PyObject* places) const;

 private:
  struct Seen {
    at::Tensor tensor;
    c10::ScalarType type;
    const void* data;
    std::vector<int64_t> sizes, strides;
    bool requires_grad;
    at::Tensor grad;
    size_t hooks;
  };

  std::vector<Seen> seen_;
  std::vector<int64_t> modes_;
};

}  // namespace wakesleep
