// Draws with several keys, such as those that vmap makes. Each member is drawn as a call with its own key draws it.
#pragma once

#include "geometry.h"

namespace wakesleep {

// The members of a draw from parameters [*M, *B, K] with keys [*M, 2]. A single key [2] has one member.
struct Members {
  at::Tensor keys;
  at::IntArrayRef shape;  // M
  at::IntArrayRef batch;  // B
  int64_t count;

  Members(const char* op, const at::Tensor& keys_in, const Argument& operand, at::IntArrayRef whole_batch) {
    check_key_type(op, keys_in, operand);
    const int64_t dims = keys_in.dim() - 1;
    const bool fits = dims >= 0 && keys_in.size(-1) == 2 && dims <= static_cast<int64_t>(whole_batch.size()) &&
                      batch_sizes(keys_in) == whole_batch.slice(0, dims);
    TORCH_CHECK_VALUE(fits, op, ": expected key to have shape [2], (seed, offset), got ", keys_in.sizes(),
                      ". Several keys, [*M, 2], need parameters whose leading dimensions begin with M; they are ",
                      whole_batch);
    keys = keys_in.contiguous();
    shape = whole_batch.slice(0, dims);
    batch = whole_batch.slice(dims);
    count = c10::multiply_integers(shape);
  }

  // Returns the shape [*M, *samples, *B, ..] of a draw.
  at::DimVector draw_shape(at::IntArrayRef samples, at::IntArrayRef event) const {
    return concat(concat(shape, samples), concat(batch, event));
  }

  // Returns the rows of a member, given the strides of the operands along [*M, *B].
  template <int operands>
  RowMap<operands> rows(const std::array<at::DimVector, operands>& strides) const {
    return map_rows<operands>(batch, part<operands>(strides, shape.size(), batch.size()));
  }

  // Calls body(member, its key, offsets of its operands) for every member.
  template <int operands, typename Body>
  void for_each(const std::array<at::DimVector, operands>& strides, const Body& body) const {
    const auto members = map_rows<operands>(shape, part<operands>(strides, 0, shape.size()));
    const auto* key = keys.const_data_ptr<int64_t>();
    for (int64_t member = 0; member < count; ++member, key += 2) {
      body(member, key, members(member));
    }
  }

 private:
  template <int operands>
  static std::array<at::DimVector, operands> part(const std::array<at::DimVector, operands>& strides, size_t first,
                                                  size_t dims) {
    std::array<at::DimVector, operands> found;
    for (int i = 0; i < operands; ++i) {
      const auto from = strides[i].begin() + first;
      found[i].assign(from, from + dims);
    }
    return found;
  }
};

}  // namespace wakesleep
