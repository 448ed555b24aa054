#include "../advance.h"

namespace wakesleep::cpu {

void compute(const Advance& call, Stream) {
  for (int64_t c = 0; c < call.count; ++c) {
    for (int64_t i = 0; i < call.counters[c].size; ++i) {
      call.counters[c].advance(i);
    }
  }
}

}  // namespace wakesleep::cpu
