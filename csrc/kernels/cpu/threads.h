// What the CPU kernels need of the host: threads and the choice of an instruction set. The host code defines the two
// functions.
#pragma once

#include <cstdint>

namespace wakesleep::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

// Returns the instruction set to use. It is the same at every call.
InstructionSet instruction_set();

// Calls range(body, begin, end) for disjoint ranges that together are 0 .. count - 1, possibly on several threads. A
// range is as long as `grain` or longer, except for the last one.
void parallel_for(int64_t count, int64_t grain, void (*range)(const void* body, int64_t begin, int64_t end),
                  const void* body);

template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto range = [](const void* of, int64_t begin, int64_t end) { (*static_cast<const Body*>(of))(begin, end); };
  parallel_for(count, grain, range, &body);
}

}  // namespace wakesleep::cpu
