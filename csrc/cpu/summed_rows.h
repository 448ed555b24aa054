// Rows whose sums are wanted beside what else is made of them: the gradient of a layer's result, and that of its bias.
#pragma once

#include "vec.h"

namespace wakesleep::cpu {

// body(row, sum) for every row, where the sums [pieces, D] over every kPieceRows of them are to be added to.
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
