// Writes the key of a draw from the state of a generator.
#pragma once

#include "kernel.h"

namespace wakesleep {

// A state that a CUDA graph captures is in memory, where each replay finds new values.
struct WriteKey {
  struct Word {
    int64_t value;
    const int64_t* captured;  // read instead of `value`, unless null
  };
  Word seed, offset;
  int64_t after;  // added to the offset
  int64_t* key;   // [2]
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(WriteKey)
