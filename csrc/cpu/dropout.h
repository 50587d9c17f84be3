// Philox4x32-10 (Salmon et al. 2011) on a vector of counters: dropout that any block can recompute.
#pragma once

#include "simd.h"

namespace rdfkern {

typedef uint64_t WideVec __attribute__((vector_size(kLanes * 4)));

struct Product {
  UintVec high, low;
};

inline Product multiply(UintVec x, uint32_t factor) {
  const WideVec even = (bits<WideVec>(x) & 0xffffffffu) * uint64_t(factor);
  const WideVec odd = (bits<WideVec>(x) >> 32) * uint64_t(factor);
  return {bits<UintVec>((even >> 32) | (odd & 0xffffffff00000000u)),
          bits<UintVec>((even & 0xffffffffu) | (odd << 32))};
}

inline void philox(UintVec (&counter)[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product first = multiply(counter[0], 0xd2511f53u);
    const Product second = multiply(counter[2], 0xcd9e8d57u);
    counter[0] = second.high ^ counter[1] ^ key0;
    counter[1] = second.low;
    counter[2] = first.high ^ counter[3] ^ key1;
    counter[3] = first.low;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

struct Dropout {
  double probability;
  uint64_t seed;

  // factors[map][j * ld + i] = 0 or 1 / (1 - p) of entry (query + i, key + j) of both maps.
  void fill(uint32_t head, int64_t query, int64_t columns, int64_t key, int64_t keys,
            float* const (&factors)[2], int64_t ld) const {
    const uint32_t threshold = uint32_t(probability * 4294967296.0);
    const Vec kept = broadcast(probability < 1.0 ? float(1.0 / (1.0 - probability)) : 0.0f);
    UintVec lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    for (int64_t pair = key / 2; pair <= (key + keys - 1) / 2; ++pair)
      for (int64_t i = 0; i < columns; i += kLanes) {
        UintVec words[4] = {lanes + uint32_t(query + i), UintVec{} + uint32_t(pair),
                            UintVec{} + head, UintVec{}};
        philox(words, seed);
        for (int half = 0; half < 2; ++half) {
          const int64_t j = 2 * pair + half - key;
          if (j < 0 || j >= keys) continue;
          for (int map = 0; map < 2; ++map) {
            const IntVec keep = words[2 * half + map] >= threshold;
            store(factors[map] + j * ld + i, bits<Vec>(bits<IntVec>(kept) & keep));
          }
        }
      }
  }
};

}  // namespace rdfkern
