// x ~ Bernoulli(grey / white) for the images that an index selects.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct Binarize {
  Dtype x_dtype;  // uint8 or float32
  const uint8_t* grey;
  const int64_t* index;  // [rows], or null to use the images in order
  const int64_t* key;    // [2]
  void* x;               // [rows, D]
  int white;             // the grey level at which x is always 1
  int64_t images;        // the number of rows of grey
  int64_t stride;        // between the rows of grey
  int64_t rows, D;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(Binarize)
