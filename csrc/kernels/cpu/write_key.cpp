#include "../write_key.h"

namespace wakesleep::cpu {

void compute(const WriteKey& call, Stream) {
  const auto value_of = [](WriteKey::Word word) { return word.captured == nullptr ? word.value : *word.captured; };
  call.key[0] = value_of(call.seed);
  call.key[1] = value_of(call.offset) + call.after;
}

}  // namespace wakesleep::cpu
