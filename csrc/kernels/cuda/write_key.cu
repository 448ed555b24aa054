#include "../write_key.h"

#include "launch.cuh"

namespace wakesleep::cuda {
namespace {

__device__ int64_t value_of(WriteKey::Word word) { return word.captured == nullptr ? word.value : *word.captured; }

__global__ void write_key(const WriteKey call) {
  wait_for_previous();
  call.key[0] = value_of(call.seed);
  call.key[1] = value_of(call.offset) + call.after;
}

}  // namespace

void compute(const WriteKey& call, Stream stream) { launch(stream, write_key, 1, 1, call); }

}  // namespace wakesleep::cuda
