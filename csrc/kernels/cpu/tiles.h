// Loops over the rows of operands of any type, in tiles that stay in the L1 cache.
#pragma once

#include "../rows.h"
#include "vec.h"

namespace wakesleep::cpu {

// Rows are processed in tiles of at most this many elements, which stay in the L1 cache.
constexpr int64_t kTile = 1024;

// Elements in the compute type. Elements stored in this type are used in place, and all others are converted into the
// tile. A loop over a single type uses full vectors. In a loop that also reads narrower types, the compiled code
// processes at most a quarter as many elements per iteration.
template <typename compute_t>
class Tile {
 public:
  WAKESLEEP_INLINE Tile() {}  // leaves value_ uninitialised; a defaulted constructor would zero it

  template <typename scalar_t>
  WAKESLEEP_INLINE const compute_t* read(const scalar_t* from, int64_t count) {
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      return from;
    } else {
      for_lanes<scalar_t>(
          count, [&](auto element, scalar_t value) { element.store(value_, static_cast<compute_t>(value)); }, from);
      return value_;
    }
  }

  // Computes value(operands...) for every element.
  template <typename Value, typename... Operands>
  WAKESLEEP_INLINE const compute_t* fill(int64_t count, const Value& value, const Operands*... operand) {
    for_lanes<compute_t>(count, [&](auto element, Operands... of) { element.store(value_, value(of...)); }, operand...);
    return value_;
  }

  // Returns the address where the caller should write the values for `to`. If this address is not `to` itself, store()
  // then converts the values to scalar_t and copies them to `to`. If `to` is null, the values are discarded.
  template <typename scalar_t>
  WAKESLEEP_INLINE compute_t* place_for(scalar_t* to) {
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      return to == nullptr ? value_ : to;
    } else {
      return value_;
    }
  }

  template <typename scalar_t>
  WAKESLEEP_INLINE void store(scalar_t* to, int64_t count) const {
    if constexpr (!std::is_same_v<scalar_t, compute_t>) {
      if (to == nullptr) {
        return;
      }
      for_lanes<scalar_t>(
          count, [&](auto element, compute_t value) { element.store(to, static_cast<scalar_t>(value)); }, value_);
    }
  }

 private:
  alignas(64) compute_t value_[kTile];
};

// Calls body(column, columns) for every tile of a row.
template <typename Body>
WAKESLEEP_INLINE void for_tiles(int64_t width, const Body& body) {
  for (int64_t column = 0; column < width; column += kTile) {
    body(column, std::min(kTile, width - column));
  }
}

// Returns the sum of term(operands...) for each lane.
template <typename compute_t, typename Term, typename... Operands>
WAKESLEEP_INLINE Lanes<compute_t> lane_sums(int64_t count, const Term& term, const Operands*... operand) {
  Lanes<compute_t> sum(0);
  for_lanes<compute_t>(count, [&](auto element, Operands... value) { element.add(sum, term(value...)); }, operand...);
  return sum;
}

// Returns the sum of term(operands...) over a row, with the operands converted to compute_t.
template <typename compute_t, typename Term, typename... Operands>
WAKESLEEP_INLINE compute_t sum_over_row(int64_t width, const Term& term, const Operands*... row) {
  Lanes<compute_t> sum(0);
  for (int64_t column = 0; column < width; column += kTile) {
    const int64_t columns = std::min(kTile, width - column);
    sum += lane_sums<compute_t>(columns, term, Tile<compute_t>().read(row + column, columns)...);
  }
  return sum.sum();
}

// Calls body(piece, index, column, columns) for every tile of every piece. A sum over inner rows is split into pieces.
template <int operands, typename Body>
void for_inner_pieces(const RowGroups<operands>& rows, int64_t width, const Body& body) {
  const int64_t count = inner_pieces(rows.inner.rows) * rows.outer.rows;
  vectorized_parallel_for(
      count, grain_rows(width * std::min(rows.inner.rows, kPieceRows)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const auto piece = inner_piece(rows, index);
          for_tiles(width, [&](int64_t column, int64_t columns) { body(piece, index, column, columns); });
        }
      });
}

// Calls body(layer, first row, rows) for every tile of every layer. A tile is several narrow rows or one wide row.
template <typename Body>
void for_row_tiles(int64_t layers, int64_t rows, int64_t width, const Body& body) {
  const int64_t rows_at_once = std::max<int64_t>(1, kTile / std::max<int64_t>(1, width));
  const int64_t tiles = (rows + rows_at_once - 1) / rows_at_once;
  vectorized_parallel_for(layers * tiles, grain_rows(4 * rows_at_once * width), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % tiles * rows_at_once;
      body(index / tiles, row, std::min(rows_at_once, rows - row));
    }
  });
}

}  // namespace wakesleep::cpu
