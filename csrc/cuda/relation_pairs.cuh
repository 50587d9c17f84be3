// Edges as the kernels of relation attention walk them: a warp has a row, a lane every 32nd of the
// row's slots, and a slot has an edge or none.
#pragma once

#include "dropout.cuh"
#include "relation_views.cuh"
#include "relation_warps.cuh"

namespace rdfkern {

constexpr int kEveryRelation = -1;

struct Heard {
  int64_t target = -1, source = -1, edge = -1;
  int relation = -1;  // -1: there is no edge

  __device__ bool exists() const { return relation >= 0; }
};

// The edges into a target that share a softmax: those of `relation`, or of kEveryRelation, among
// the slots [begin, end). There are none of kNoRelation.
struct Group {
  int64_t begin, end;
  int relation;
};

// The fields of Windows (rdfkern/ops/relation_mp/windows.py); `first` and `end` are those of the
// targets, or of the sources.
struct WindowPairs {
  const int *first, *end, *same_first, *same_end, *key, *table;
  int64_t rows, keys, relations;
  bool of_source;
  static constexpr bool kSoftmaxByEdge = false;

  __device__ int64_t begin_of(int64_t row) const { return first[row]; }
  __device__ int64_t end_of(int64_t row) const { return end[row]; }
  __device__ Heard at(int64_t row, int64_t slot) const {
    Heard pair{of_source ? slot : row, of_source ? row : slot};
    const int direction = pair.source < same_first[pair.target] ? 0
                          : pair.source < same_end[pair.target] ? 1
                                                                : 2;
    pair.relation = table[(key[pair.target] * keys + key[pair.source]) * 3 + direction];
    return pair;
  }
  // The group of the lowest relation above this one; all lanes get it.
  __device__ Group group_above(int64_t row, int relation) const {
    int lowest = kNoRelation;
#pragma unroll 1
    for (int64_t slot = begin_of(row) + lane_of_thread(); slot < end_of(row); slot += kLanes) {
      const int heard = at(row, slot).relation;
      if (heard > relation) lowest = min(lowest, heard);
    }
    return {begin_of(row), end_of(row), minimum_of_warp(lowest)};
  }
  // Where backward keeps what it knows of the softmax within the relation of an edge.
  __device__ int64_t place_within(const Heard& pair) const {
    return pair.target * relations + pair.relation;
  }
  __device__ float kept(const Dropout& dropout, int head, const Heard& pair) const {
    float both[2];
    dropout.factors(head, uint32_t(pair.target), uint32_t(pair.source / 2), both);
    return pair.source % 2 ? both[1] : both[0];
  }
};

// The fields of EdgeLists (bands.py), by target or by source.
struct EdgePairs {
  Indices start, other, relation, edge;
  int64_t rows;
  bool of_source;
  static constexpr bool kSoftmaxByEdge = true;

  __device__ int64_t begin_of(int64_t row) const { return start.at(row); }
  __device__ int64_t end_of(int64_t row) const { return start.at(row + 1); }
  __device__ Heard at(int64_t row, int64_t slot) const {
    const int64_t heard = other.at(slot);
    return {of_source ? heard : row, of_source ? row : heard, edge.at(slot),
            int(relation.at(slot))};
  }
  __device__ int64_t first_above(int64_t low, int64_t high, int than) const {
#pragma unroll 1
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (relation.at(middle) <= than) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  __device__ Group group_above(int64_t row, int than) const {
    const int64_t end = end_of(row), begin = first_above(begin_of(row), end, than);
    if (begin == end) return {end, end, kNoRelation};
    const int lowest = int(relation.at(begin));
    return {begin, first_above(begin, end, lowest), lowest};
  }
  __device__ int64_t place_within(const Heard& pair) const { return pair.edge; }
  __device__ float kept(const Dropout& dropout, int head, const Heard& pair) const {
    float both[2];
    dropout.factors(head, uint32_t(pair.edge), 2 * uint32_t(pair.edge >> 32), both);
    return both[0];
  }
};

// The edge of this lane, if it has one.
template <class Pairs>
__device__ inline Heard own_pair(const Pairs& pairs, int64_t row, int64_t slot, int64_t end) {
  slot += lane_of_thread();
  return slot < end ? pairs.at(row, slot) : Heard{};
}

template <class Pairs>
__device__ inline Heard own_pair(const Pairs& pairs, int64_t row, int64_t slot,
                                 const Group& group) {
  const Heard pair = own_pair(pairs, row, slot, group.end);
  return group.relation == kEveryRelation || group.relation == pair.relation ? pair : Heard{};
}

// body(group) for every softmax of a target.
template <class Pairs, class Body>
__device__ inline void for_each_softmax(const Pairs& pairs, int64_t row, bool within,
                                        const Body& body) {
  Group group = within ? pairs.group_above(row, -1)
                       : Group{pairs.begin_of(row), pairs.end_of(row), kEveryRelation};
#pragma unroll 1
  while (group.relation != kNoRelation) {
    body(group);
    group = within ? pairs.group_above(row, group.relation) : Group{0, 0, kNoRelation};
  }
}

// body(lane, row) for the lanes of the warp that bring a row, in order.
template <class Body>
__device__ inline void for_each_lane(int64_t row, const Body& body) {
  const unsigned having = __ballot_sync(kAllLanes, row >= 0);
#pragma unroll 1
  for (int lane = 0; lane < kLanes && having >> lane; ++lane)
    if (having >> lane & 1) body(lane, __shfl_sync(kAllLanes, row, lane));
}

}  // namespace rdfkern
