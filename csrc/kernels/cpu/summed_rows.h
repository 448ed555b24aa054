// Processes rows and sums the results over the rows in the same pass. The rows are the gradient of a layer's output,
// and their sum is the bias gradient.
#pragma once

#include "tiles.h"

namespace wakesleep::cpu {

// Calls body(row, sum) for every row, where body adds the results of the row to `sum` [D]. Each piece of kPieceRows
// rows has a separate sum, which is a row of `sums` [pieces, D].
template <typename compute_t, typename Body>
void for_summed_rows(int64_t rows, int64_t D, compute_t* sums, const Body& body) {
  vectorized_parallel_for(inner_pieces(rows), grain_rows(kPieceRows * D), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      compute_t* sum = sums + piece * D;
      std::fill_n(sum, D, compute_t(0));
      const int64_t last_row = std::min(rows, (piece + 1) * kPieceRows);
      for (int64_t row = piece * kPieceRows; row < last_row; ++row) {
        body(row, sum);
      }
    }
  });
}

}  // namespace wakesleep::cpu
