// Makes the row maps of kernels/rows.h from tensors, and the tensors that gradients are written to.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <array>

#include "../kernels/rows.h"
#include "checks.h"

namespace wakesleep {

// Returns the strides of a tensor along the dimensions of `shape`. The tensor is [*batch, D], or [*batch] if event_dims
// is 0. Its batch dimensions broadcast to `shape`.
inline at::DimVector row_strides(const at::Tensor& tensor, at::IntArrayRef shape, int64_t event_dims = 1) {
  at::DimVector strides(shape.size(), 0);
  const int64_t batch_dims = tensor.dim() - event_dims;
  for (int64_t d = 0; d < batch_dims; ++d) {
    const int64_t position = static_cast<int64_t>(shape.size()) - batch_dims + d;
    strides[position] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  return strides;
}

// Appends a new innermost dimension to a row map.
template <int operands>
void push(RowMap<operands>& map, int64_t length, const std::array<int64_t, operands>& strides) {
  if (length == 1) {
    return;
  }
  map.rows *= length;
  bool merges = map.dims > 0;
  for (int i = 0; merges && i < operands; ++i) {
    merges = map.stride[i][map.dims - 1] == strides[i] * length;
  }
  if (!merges) {
    TORCH_CHECK(map.dims < kMaxRowDims, "expected leading dimensions that merge into at most ", kMaxRowDims,
                "; make the arguments contiguous");
    map.size[map.dims++] = 1;
  }
  map.size[map.dims - 1] *= length;
  for (int i = 0; i < operands; ++i) {
    map.stride[i][map.dims - 1] = strides[i];
  }
}

template <int operands>
RowMap<operands> map_rows(at::IntArrayRef shape, const std::array<at::DimVector, operands>& strides) {
  RowMap<operands> map;
  for (size_t d = 0; d < shape.size(); ++d) {
    std::array<int64_t, operands> at_d;
    for (int i = 0; i < operands; ++i) {
      at_d[i] = strides[i][d];
    }
    push<operands>(map, shape[d], at_d);
  }
  return map;
}

template <int operands>
RowGroups<operands> group_rows(at::IntArrayRef shape, at::IntArrayRef owner_shape,
                               const std::array<at::DimVector, operands>& strides) {
  RowGroups<operands> groups;
  const size_t missing = shape.size() - owner_shape.size();
  for (size_t d = 0; d < shape.size(); ++d) {
    std::array<int64_t, operands> at_d;
    for (int i = 0; i < operands; ++i) {
      at_d[i] = strides[i][d];
    }
    const bool broadcast = d < missing || owner_shape[d - missing] != shape[d];
    push<operands>(broadcast ? groups.inner : groups.outer, shape[d], at_d);
  }
  return groups;
}

// Returns the tensor, or a contiguous copy if its last dimension is not contiguous. The other dimensions may have any
// strides, so copies are rare.
inline at::Tensor with_contiguous_events(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline at::DimVector concat(at::IntArrayRef first, at::IntArrayRef second) {
  at::DimVector all(first.begin(), first.end());
  all.append(second.begin(), second.end());
  return all;
}

inline at::IntArrayRef batch_sizes(const at::Tensor& tensor) { return tensor.sizes().slice(0, tensor.dim() - 1); }

// Writes the sum over partial sums [pieces, *shape] to `total`, or adds it to `total`. Both are in a compute dtype.
inline void sum_pieces(const at::Tensor& pieces, const at::Tensor& total, bool adds) {
  if (const auto kernel = backend_of(total.device()).column_sums) {
    launch(total.device(), kernel,
           ColumnSums{dtype_of(total), read(pieces), write(total), pieces.size(0), total.numel(), adds});
  } else if (adds) {
    total.add_(pieces.sum(0));
  } else {
    at::Tensor written = total;
    at::sum_out(written, pieces, 0);
  }
}

// The output of a gradient kernel. If the gradient is summed over inner rows, `written` contains partial sums in the
// compute dtype. Otherwise, it is the gradient itself.
struct GradientSum {
  bool is_summed;
  at::ScalarType dtype;
  int64_t pieces_dim;
  at::Tensor written;  // [*shape], or with a dimension of pieces inserted

  GradientSum(const at::Tensor& like, at::IntArrayRef shape, int64_t inner_rows, int64_t pieces_dim_in = 0)
      : is_summed(inner_rows != 1), dtype(like.scalar_type()), pieces_dim(pieces_dim_in) {
    const auto pieces = concat(shape.slice(0, pieces_dim), {inner_pieces(inner_rows)});
    written = is_summed ? at::empty(concat(pieces, shape.slice(pieces_dim)), like.options().dtype(compute_dtype(dtype)))
                        : at::empty(shape, like.options());
  }

  GradientRows rows() const { return {write(written), is_summed}; }

  at::Tensor total() const {
    if (!is_summed) {
      return written;
    }
    if (written.size(pieces_dim) == 1) {
      return written.squeeze(pieces_dim).to(dtype);
    }
    if (pieces_dim > 0) {
      return written.sum(pieces_dim).to(dtype);
    }
    const at::Tensor sum = at::empty(written.sizes().slice(1), written.options());
    sum_pieces(written, sum, false);
    return sum.to(dtype);
  }
};

}  // namespace wakesleep
