// Indexes the rows of broadcast operands without expanding them in memory.
//
// An op treats each operand as a collection of rows, and each row is one contiguous event. A RowMap maps the index of a
// row to the row's offset in every operand. Broadcast dimensions have stride 0. Two neighbouring dimensions are merged
// if every operand allows it, so nearly every call iterates over one or two dimensions. Host and device use the same
// struct, which is passed as a kernel argument. ops/geometry.h makes it from tensors.
#pragma once

#include "numbers.h"

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

 private:
  WAKESLEEP_FUNCTION void add(RowOffsets<operands>& offsets, int64_t index, int d) const {
    for (int i = 0; i < operands; ++i) {
      offsets.of[i] += index * stride[i][d];
    }
  }
};

// The rows of a gradient that is summed over the dimensions along which its operand was broadcast. Each row of the
// operand is an outer row, and the rows to which it was broadcast are its inner rows. The offset of an inner row is
// relative to its outer row.
template <int operands>
struct RowGroups {
  RowMap<operands> outer, inner;
};

// Groups the rows that share a row of the first `shared` operands. The last operand of the groups is the index of the
// row.
template <int shared, int operands>
RowGroups<operands + 1> group_by(const RowMap<operands>& rows) {
  RowGroups<operands + 1> groups;
  int64_t step[kMaxRowDims + 1];
  step[rows.dims] = 1;
  for (int d = rows.dims - 1; d >= 0; --d) {
    step[d] = step[d + 1] * rows.size[d];
  }
  for (int d = 0; d < rows.dims; ++d) {
    bool is_shared = true;
    for (int i = 0; i < shared; ++i) {
      is_shared = is_shared && rows.stride[i][d] == 0;
    }
    auto& map = is_shared ? groups.inner : groups.outer;
    map.rows *= rows.size[d];
    map.size[map.dims] = rows.size[d];
    for (int i = 0; i < operands; ++i) {
      map.stride[i][map.dims] = rows.stride[i][d];
    }
    map.stride[operands][map.dims++] = step[d + 1];
  }
  return groups;
}

// A sum over inner rows is divided into pieces of this many rows, so that every processor has work. The length of a
// piece is fixed, so the result does not depend on the rest of the batch.
constexpr int64_t kPieceRows = 64;

inline int64_t inner_pieces(int64_t inner_rows) {
  return inner_rows > kPieceRows ? (inner_rows + kPieceRows - 1) / kPieceRows : 1;
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

// The output of a gradient kernel: rows of the gradient in the dtype of its operand, or, if the gradient is summed over
// inner rows, one row of partial sums in the compute type for every piece.
struct GradientRows {
  void* data;
  bool is_summed;
};

// Calls body(pointer to the rows, std::bool_constant<is_summed>{}).
template <typename scalar_t, typename Body>
void dispatch_sum(GradientRows rows, const Body& body) {
  if (rows.is_summed) {
    body(static_cast<Compute<scalar_t>*>(rows.data), std::true_type{});
  } else {
    body(static_cast<scalar_t*>(rows.data), std::false_type{});
  }
}

}  // namespace wakesleep
