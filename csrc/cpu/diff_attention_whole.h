// Softmax of rows whose keys all stand in one tile of scores.
#pragma once

#include "simd.h"

namespace rdfkern {

constexpr int64_t kWholeKeys = 256;  // so many are kept in one tile; longer rows come in blocks

// In parts, which rounds less than one long sum.
template <class Term>
inline Vec sum_over(int64_t count, const Term& term) {
  Vec total = {};
  for (int64_t first = 0; first < count; first += 16) {
    Vec part = {};
    for (int64_t j = first; j < std::min(count, first + 16); ++j) part += term(j);
    total += part;
  }
  return total;
}

// Of one vector of queries; a row whose keys are all hidden has a base of -inf and an inverse of 0.
struct WholeSoftmax {
  Vec base, total, inverse;
};

// Scores in a column become exp2(factor * score - base): times inverse, they are the weights.
inline WholeSoftmax softmax_whole(float* column, int64_t keys, int64_t stride, float factor) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Vec top = broadcast(-infinity);
  for (int64_t j = 0; j < keys; ++j) top = maximum(top, load(column + j * stride));
  // GCC 12.2 crashes where the maximum itself is selected anew.
  const Vec base = top * factor, shift = top == -infinity ? Vec{} : base;
  const Vec total = sum_over(keys, [&](int64_t j) {
    const Vec weight = exp2(load(column + j * stride) * factor - shift);
    store(column + j * stride, weight);
    return weight;
  });
  return {base, total, top == -infinity ? Vec{} : 1.0f / total};
}

}  // namespace rdfkern
