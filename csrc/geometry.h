// Indexes the rows of broadcast operands without expanding them in memory.
//
// An op treats each operand as a collection of rows, and each row is one contiguous event. A RowMap maps the index of a
// row to the row's offset in every operand. Broadcast dimensions have stride 0. Two neighbouring dimensions are merged
// if every operand allows it, so nearly every call iterates over one or two dimensions. Host and device use the same
// struct, which is passed as a kernel argument.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <array>

#include "aten.h"
#include "checks.h"
#include "dispatch.h"
#include "elementary.h"

namespace wakesleep {

constexpr int kMaxRowDims = 8;

template <int operands>
struct RowOffsets {
  int64_t of[operands];

  WAKESLEEP_FUNCTION RowOffsets operator+(const RowOffsets& other) const {
    RowOffsets sum;
    for (int i = 0; i < operands; ++i) {
      sum.of[i] = of[i] + other.of[i];
    }
    return sum;
  }
};

template <int operands>
struct RowMap {
  int64_t rows = 1;
  int dims = 0;
  int64_t size[kMaxRowDims] = {};
  int64_t stride[operands][kMaxRowDims] = {};

  WAKESLEEP_FUNCTION RowOffsets<operands> operator()(int64_t row) const {
    RowOffsets<operands> offsets = {};
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int d = dims - 1; d > 0; --d) {
      const int64_t rest = row / size[d];
      add(offsets, row - rest * size[d], d);
      row = rest;
    }
    add(offsets, row, 0);
    return offsets;
  }

  // Appends a new innermost dimension.
  void push(int64_t length, const std::array<int64_t, operands>& strides) {
    if (length == 1) {
      return;
    }
    rows *= length;
    bool merges = dims > 0;
    for (int i = 0; merges && i < operands; ++i) {
      merges = stride[i][dims - 1] == strides[i] * length;
    }
    if (!merges) {
      TORCH_CHECK(dims < kMaxRowDims, "expected leading dimensions that merge into at most ", kMaxRowDims,
                  "; make the arguments contiguous");
      size[dims++] = 1;
    }
    size[dims - 1] *= length;
    for (int i = 0; i < operands; ++i) {
      stride[i][dims - 1] = strides[i];
    }
  }

 private:
  WAKESLEEP_FUNCTION void add(RowOffsets<operands>& offsets, int64_t index, int d) const {
    for (int i = 0; i < operands; ++i) {
      offsets.of[i] += index * stride[i][d];
    }
  }
};

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

template <int operands>
RowMap<operands> map_rows(at::IntArrayRef shape, const std::array<at::DimVector, operands>& strides) {
  RowMap<operands> map;
  for (size_t d = 0; d < shape.size(); ++d) {
    std::array<int64_t, operands> at_d;
    for (int i = 0; i < operands; ++i) {
      at_d[i] = strides[i][d];
    }
    map.push(shape[d], at_d);
  }
  return map;
}

// The rows of a gradient that is summed over the dimensions along which its operand was broadcast. Each row of the
// operand is an outer row, and the rows to which it was broadcast are its inner rows. The offset of an inner row is
// relative to its outer row.
template <int operands>
struct RowGroups {
  RowMap<operands> outer, inner;
};

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
    (broadcast ? groups.inner : groups.outer).push(shape[d], at_d);
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

// A sum over inner rows is divided into pieces of this many rows, so that every processor has work. The length of a
// piece is fixed, so the result does not depend on the rest of the batch.
constexpr int64_t kPieceRows = 64;

inline int64_t inner_pieces(int64_t inner_rows) {
  return std::max<int64_t>(1, (inner_rows + kPieceRows - 1) / kPieceRows);
}

// The rows that are summed in one piece. Pieces are numbered as follows: first piece 0 of every outer row, then piece 1
// of every outer row, and so on.
template <int operands>
struct InnerPiece {
  RowOffsets<operands> offset;  // of the outer row
  int64_t first, last;          // inner rows first .. last - 1
};

// An index, split into a row and the number of complete passes over all rows. The index is almost always within the
// first pass, where no division is needed.
struct RowOfPass {
  int64_t pass, row;
};

WAKESLEEP_FUNCTION RowOfPass pass_over(int64_t rows, int64_t index) {
  const int64_t pass = index < rows ? 0 : index / rows;
  return {pass, index - pass * rows};
}

template <int operands>
WAKESLEEP_FUNCTION InnerPiece<operands> inner_piece(const RowGroups<operands>& rows, int64_t index) {
  const auto [pass, row] = pass_over(rows.outer.rows, index);
  const int64_t first = pass * kPieceRows;
  const int64_t rest = rows.inner.rows - first;
  return {rows.outer(row), first, first + (rest < kPieceRows ? rest : kPieceRows)};
}

// Calls body(offset) for every inner row of the piece. `summed` is false if every outer row has only one inner row.
template <bool summed, int operands, typename Body>
WAKESLEEP_FUNCTION void for_inner_rows(const RowGroups<operands>& rows, const InnerPiece<operands>& piece,
                                       const Body& body) {
  if constexpr (summed) {
    for (int64_t inner = piece.first; inner < piece.last; ++inner) {
      body(piece.offset + rows.inner(inner));
    }
  } else {
    body(piece.offset);
  }
}

// The output of a gradient kernel. If the gradient is summed over inner rows, the output contains partial sums in the
// compute type. Otherwise, it is the gradient itself.
class GradientSum {
 public:
  GradientSum(const at::Tensor& like, at::IntArrayRef shape, int64_t inner_rows)
      : summed(inner_rows != 1), dtype_(like.scalar_type()) {
    written =
        summed ? aten::empty(concat({inner_pieces(inner_rows)}, shape), like.options().dtype(at::toOpMathType(dtype_)))
               : aten::empty(shape, like.options());
  }

  at::Tensor total() const {
    if (!summed) {
      return written;
    }
    return (written.size(0) == 1 ? written.squeeze(0) : written.sum(0)).to(dtype_);
  }

  const bool summed;
  at::Tensor written;  // [*shape], or [pieces, *shape]

 private:
  at::ScalarType dtype_;
};

// Calls body(pointer to `written`, std::bool_constant<summed>{}).
template <typename scalar_t, typename Body>
void dispatch_sum(const GradientSum& sum, const Body& body) {
  if (sum.summed) {
    body(sum.written.template mutable_data_ptr<at::opmath_type<scalar_t>>(), std::true_type{});
  } else {
    body(sum.written.template mutable_data_ptr<scalar_t>(), std::false_type{});
  }
}

}  // namespace wakesleep
