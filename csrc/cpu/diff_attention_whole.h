// Softmax of rows whose scores all stay until their sums are known, block after block of keys.
#pragma once

#include "diff_attention.h"

namespace rdfkern {

constexpr int64_t kBlockKeys = 256;  // so many at a time
constexpr int64_t kWholeKeys = 4096;  // of so many the scores are kept; longer rows rescale their sums
constexpr int64_t kBlocks = kWholeKeys / kBlockKeys;

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

// Four at a time, as each waits for the one before it.
template <class Term>
inline Vec largest_of(int64_t count, const Term& term) {
  Vec tops[4];
  for (Vec& top : tops) top = broadcast(-kInfinity);
  int64_t at = 0;
  for (; at + 4 <= count; at += 4)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) tops[n] = maximum(tops[n], term(at + n));
  for (; at < count; ++at) tops[0] = maximum(tops[0], term(at));
  return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
}

inline int64_t blocks_of(int64_t keys) { return (keys + kBlockKeys - 1) / kBlockKeys; }

// body(number, first key, keys) for the blocks of so many keys.
template <class Body>
inline void for_each_block(int64_t keys, const Body& body) {
  for (int64_t first = 0; first < keys; first += kBlockKeys)
    body(first / kBlockKeys, first, std::min(kBlockKeys, keys - first));
}

struct Exponentials {
  Vec base, total;  // -inf and as it comes where all keys are hidden
};

// Scores in a column become exp2(factor * score - base).
inline Exponentials exponentiate(float* column, int64_t stride, int64_t keys, float factor) {
  const Vec top = largest_of(keys, [&](int64_t j) { return load(column + j * stride); });
  // GCC 12.2 crashes where the maximum itself is selected anew.
  const Vec base = top * factor, shift = top == -kInfinity ? Vec{} : base;
  const Vec total = sum_over(keys, [&](int64_t j) {
    const Vec weight = exp2(load(column + j * stride) * factor - shift);
    store(column + j * stride, weight);
    return weight;
  });
  return {base, total};
}

// One map of one panel of queries.
class WholeSoftmax {
 public:
  // Of all keys, once merged; a row whose keys are all hidden has a base of -inf.
  float base[kPanel], total[kPanel];

  // Scores in a column become exp2(factor * score - base of the block): times share(block, first),
  // they are the weights; times what is returned, those among the keys of the block.
  Vec add(int64_t block, float* column, int64_t keys, int64_t first, float factor) {
    const auto [base, total] = exponentiate(column, kPanelStride, keys, factor);
    store(shares_[block] + first, base);
    store(totals_[block] + first, total);
    return base == -kInfinity ? Vec{} : 1.0f / total;
  }

  void merge(int64_t blocks, int64_t first) {
    Vec top = broadcast(-kInfinity), sum = {};
    for (int64_t b = 0; b < blocks; ++b) top = maximum(top, load(shares_[b] + first));
    const Vec shift = top == -kInfinity ? Vec{} : top;
    for (int64_t b = 0; b < blocks; ++b) {
      const Vec factor = exp2(load(shares_[b] + first) - shift);
      const Vec part = load(totals_[b] + first) * factor;
      store(shares_[b] + first, factor);
      store(totals_[b] + first, part);
      sum += part;
    }
    const Vec safe = top == -kInfinity ? Vec{} + 1.0f : sum, inverse = 1.0f / safe;
    for (int64_t b = 0; b < blocks; ++b) {
      store(shares_[b] + first, load(shares_[b] + first) * inverse);
      store(totals_[b] + first, load(totals_[b] + first) / safe);
    }
    store(base + first, top);
    store(total + first, sum);
  }

  Vec share(int64_t block, int64_t first) const { return load(shares_[block] + first); }
  // What the weights of a block sum to; exactly 1 if there is no other.
  Vec mass(int64_t block, int64_t first) const { return load(totals_[block] + first); }

 private:
  float shares_[kBlocks][kPanel], totals_[kBlocks][kPanel];
};

}  // namespace rdfkern
