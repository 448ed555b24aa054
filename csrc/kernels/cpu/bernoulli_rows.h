// Operations on a row of logits. A functor provides the logits: logits(tile, column, columns) returns a pointer to the
// `columns` logits that start at `column`, in the compute type. The functor may store these logits in the tile.
#pragma once

#include "../densities.h"
#include "draw.h"

namespace wakesleep::cpu {

template <typename logit_t>
struct StoredLogits {
  const logit_t* row;  // [D]

  template <typename compute_t>
  WAKESLEEP_INLINE const compute_t* operator()(Tile<compute_t>& tile, int64_t column, int64_t columns) const {
    return tile.read(row + column, columns);
  }
};

// Logits, stored without the bias, which is added on each read.
template <typename compute_t>
struct ProductAndBias {
  const compute_t* product;  // [D]
  const compute_t* bias;     // [D]

  WAKESLEEP_INLINE const compute_t* operator()(Tile<compute_t>& tile, int64_t column, int64_t columns) const {
    return tile.fill(columns, [](compute_t a, compute_t b) { return a + b; }, product + column, bias + column);
  }
};

// Returns sum_d [x a - softplus(a)] over at most one tile, as one partial sum per lane. It also calls also_for(element,
// a, x) for every element.
template <typename compute_t, typename Body>
WAKESLEEP_INLINE Lanes<compute_t> tile_log_prob(const compute_t* logits, const compute_t* x, int64_t count,
                                                const Body& also_for) {
  constexpr int width = Lanes<compute_t>::width;
  static_assert(kTile / width <= kFactorsPerLog || sizeof(compute_t) > sizeof(float));
  Lanes<compute_t> log_prob(0), product(1);
  for_lanes<compute_t>(
      count,
      [&](auto element, compute_t a, compute_t v) {
        const BernoulliTerm<compute_t> term(a, v);
        element.add(log_prob, term.linear);
        element.multiply(product, term.factor);
        also_for(element, a, v);
      },
      logits, x);
  for_lanes<compute_t>(
      width, [&](auto element, compute_t of_lane) { element.add(log_prob, -log_of_normal(of_lane)); }, product.lane);
  return log_prob;
}

// Returns sum_d [x a - softplus(a)] over a row. It also calls also_for(element, a, x) for every element.
template <typename compute_t, typename Logits, typename x_t, typename Body>
WAKESLEEP_INLINE compute_t row_log_prob(int64_t D, const Logits& logits, const x_t* x, const Body& also_for) {
  Lanes<compute_t> log_prob(0);
  for (int64_t column = 0; column < D; column += kTile) {
    const int64_t columns = std::min(kTile, D - column);
    Tile<compute_t> logits_tile, x_tile;
    log_prob += tile_log_prob(logits(logits_tile, column, columns), x_tile.read(x + column, columns), columns,
                              [&](auto element, compute_t a, compute_t v) { also_for(element.after(column), a, v); });
  }
  return log_prob.sum();
}

template <typename compute_t, typename Logits, typename x_t>
WAKESLEEP_INLINE compute_t row_log_prob(int64_t D, const Logits& logits, const x_t* x) {
  return row_log_prob<compute_t>(D, logits, x, [](auto, compute_t, compute_t) {});
}

// Draws x = [u <= probability(v)] for the values v in rows first .. first + rows - 1 of the whole draw. values_of(row)
// returns a functor that provides the values of row `first + row`, in the same way as the functor for logits.
template <typename compute_t, typename Probability, typename ValuesOf, typename x_t>
void draw_rows(PhiloxKey key, int64_t first, int64_t rows, int64_t D, const Probability& probability,
               const ValuesOf& values_of, x_t* x) {  // [.., D], all rows of the draw
  for_row_tiles(1, rows, D, [&](int64_t, int64_t first_of_tile, int64_t rows_of_tile) {
    DrawTile<Uniforms, compute_t> tile;
    for_tiles(D, [&](int64_t column, int64_t columns) {
      const compute_t* u = tile.fill(key, (first + first_of_tile) * D + column, rows_of_tile * columns);
      for (int64_t row = first_of_tile; row < first_of_tile + rows_of_tile; ++row, u += columns) {
        Tile<compute_t> values_tile, x_tile;
        const compute_t* v = values_of(row)(values_tile, column, columns);
        auto* out = x + (first + row) * D + column;
        compute_t* drawn = x_tile.place_for(out);
        for_lanes<compute_t>(
            columns,
            [&](auto element, compute_t uniform, compute_t value) {
              element.store(drawn, compute_t(uniform <= probability(value) ? 1 : 0));
            },
            u, v);
        x_tile.store(out, columns);
      }
    });
  });
}

}  // namespace wakesleep::cpu
