// Adds a number to each of several counters.
#pragma once

#include "kernel.h"

namespace wakesleep {

// A vector of counters that advance together.
struct Counter {
  enum class Type : uint8_t { int64, float64, float32 };
  void* data;
  Type type;
  int64_t size, stride;
  int64_t amount;

  WAKESLEEP_FUNCTION void advance(int64_t i) const {
    switch (type) {
      case Type::int64:
        static_cast<int64_t*>(data)[i * stride] += amount;
        break;
      case Type::float64:
        static_cast<double*>(data)[i * stride] += static_cast<double>(amount);
        break;
      case Type::float32:
        static_cast<float*>(data)[i * stride] += static_cast<float>(amount);
        break;
    }
  }
};

struct Advance {
  const Counter* counters;  // [count], on the CPU
  int64_t count;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(Advance)
