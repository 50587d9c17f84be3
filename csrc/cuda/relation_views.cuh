// Graphs as relation kernels walk them. A row has a list of entries that is sorted by relation; a
// run of one relation holds the row's neighbours of that relation. An entry is an edge, or a band:
// the contiguous rows that the row hears of one key and one direction.
#pragma once

#include <climits>

#include "rows.cuh"

namespace rdfkern {

constexpr int kTileRows = 32;         // a lane of the first warp for each
constexpr int kNoRelation = INT_MAX;  // behind the last run of a row

// int32 or int64.
struct Indices {
  const void* data;
  bool wide;

  __device__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Run {
  int64_t begin, end, count;  // entries, and how many neighbours they are
  int relation;
};

// The fields of EdgeLists (rdfkern/ops/relation_mp/bands.py), by target or by source.
struct EdgeView {
  Indices start, other, relation, edge, count;
  const char* weights;  // null: all are 1
  Kind weight_kind;
  int64_t weight_stride;
  bool shares;  // every weight is divided by `count`
  int64_t rows;

  __device__ int64_t node(int64_t row) const { return row; }
  __device__ int64_t first_entry(int64_t row) const { return start.at(row); }
  __device__ int64_t end_entry(int64_t row) const { return start.at(row + 1); }
  __device__ int relation_of(int64_t entry) const { return int(relation.at(entry)); }
  __device__ int64_t size_of(int64_t, int64_t) const { return 1; }

  __device__ float weight_of(int64_t entry) const {
    const float weight =
        weights ? read(weights, weight_kind, edge.at(entry) * weight_stride) : 1.0f;
    return shares ? weight / float(count.at(entry)) : weight;
  }

  // body(node, weight)
  template <class Body>
  __device__ void for_each_neighbour(int64_t, const Run& run, const Body& body) const {
#pragma unroll 1
    for (int64_t entry = run.begin; entry < run.end; ++entry)
      body(other.at(entry), weight_of(entry));
  }
};

// The fields of Bands, seen by the targets, or by the sources with `behind` and `ahead` swapped and
// the table transposed.
struct BandView {
  Indices order, position, group, start;
  const int *relations, *entries;  // (keys, 3 keys): other key * 3 + direction, by relation
  const float* inverse;  // null, or (rows, 3 keys): the weight of a row for a source's entry
  int64_t rows, keys, behind, ahead;

  struct Range {
    int64_t begin, end;
  };

  __device__ int64_t node(int64_t row) const { return order.at(row); }
  __device__ int64_t key_of(int64_t row) const { return group.at(row) % keys; }
  __device__ int64_t first_entry(int64_t row) const { return key_of(row) * 3 * keys; }
  __device__ int64_t end_entry(int64_t row) const { return first_entry(row) + 3 * keys; }
  __device__ int relation_of(int64_t entry) const { return relations[entry]; }
  __device__ int64_t size_of(int64_t row, int64_t entry) const {
    const Range range = range_of(row, entry);
    return range.end - range.begin;
  }

  // The first row of [begin, end) whose position is at least `origin` + `offset`.
  __device__ int64_t first_from(int64_t begin, int64_t end, int64_t origin, int64_t offset) const {
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (position.at(middle) - origin < offset) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }

  __device__ Range range_of(int64_t row, int64_t entry) const {
    const int other = entries[entry] / 3, direction = entries[entry] % 3;
    const int64_t mine = group.at(row), heard = mine - mine % keys + other;
    const int64_t begin = start.at(heard), end = start.at(heard + 1);
    if (begin == end) return {begin, end};
    const int64_t low = direction == 0 ? -behind : direction - 1;
    const int64_t high = direction == 2 ? ahead + 1 : direction;
    const int64_t origin = position.at(row), first = first_from(begin, end, origin, low);
    return {first, first_from(first, end, origin, high)};
  }

  template <class Body>
  __device__ void for_each_neighbour(int64_t row, const Run& run, const Body& body) const {
#pragma unroll 1
    for (int64_t entry = run.begin; entry < run.end; ++entry) {
      const Range range = range_of(row, entry);
      // What is direction d for this row is 2 - d for the neighbour.
      const int64_t heard_as = key_of(row) * 3 + 2 - entries[entry] % 3;
#pragma unroll 1
      for (int64_t other = range.begin; other < range.end; ++other)
        body(node(other), inverse ? inverse[other * 3 * keys + heard_as] : 1.0f);
    }
  }
};

template <class View>
__device__ inline Run run_from(const View& view, int64_t row, int64_t begin) {
  Run run{begin, begin, 0, view.relation_of(begin)};
  const int64_t end = view.end_entry(row);
#pragma unroll 1
  for (; run.end < end && view.relation_of(run.end) == run.relation; ++run.end)
    run.count += view.size_of(row, run.end);
  return run;
}

// The first run with neighbours from an entry on.
template <class View>
__device__ inline Run next_run(const View& view, int64_t row, int64_t entry) {
  const int64_t end = view.end_entry(row);
#pragma unroll 1
  while (entry < end && view.relation_of(entry) < 0) ++entry;
#pragma unroll 1
  while (entry < end) {
    const Run run = run_from(view, row, entry);
    if (run.count) return run;
    entry = run.end;
  }
  return {end, end, 0, kNoRelation};
}

// The first entry of a relation or a later one.
template <class View>
__device__ inline int64_t first_entry_from(const View& view, int64_t row, int relation) {
  int64_t low = view.first_entry(row), high = view.end_entry(row);
#pragma unroll 1
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (view.relation_of(middle) < relation) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class View>
__device__ inline Run find_run(const View& view, int64_t row, int relation) {
  const int64_t entry = first_entry_from(view, row, relation), end = view.end_entry(row);
  if (entry < end && view.relation_of(entry) == relation) {
    const Run run = run_from(view, row, entry);
    if (run.count) return run;
  }
  return {end, end, 0, kNoRelation};
}

// The runs of one relation in a tile of rows, in shared memory; whether there are any. For all
// threads of a block, which are done with the runs of before.
struct FoundRuns {
  Run runs[kTileRows];
  bool any;

  template <class View>
  __device__ bool find(const View& view, int64_t first_row, int relation) {
    __syncthreads();
    if (threadIdx.x < kTileRows) {
      const int64_t row = first_row + threadIdx.x;
      const Run run = row < view.rows ? find_run(view, row, relation) : Run{0, 0, 0, kNoRelation};
      runs[threadIdx.x] = run;
      const bool found = __any_sync(kAllLanes, run.count != 0);
      if (threadIdx.x == 0) any = found;
    }
    __syncthreads();
    return any;
  }
};

// Walks the relations of a tile of rows in ascending order; the first warp keeps the rows' runs.
struct Walk {
  Run runs[kTileRows];
  int relation;

  template <class View>
  __device__ void start(const View& view, int64_t first_row) {
    if (threadIdx.x >= kTileRows) return;
    const int64_t row = first_row + threadIdx.x;
    runs[threadIdx.x] = row < view.rows ? next_run(view, row, view.first_entry(row))
                                        : Run{0, 0, 0, kNoRelation};
  }

  // The lowest relation, or kNoRelation; every thread of the block gets it.
  __device__ int lowest() {
    if (threadIdx.x < kTileRows) {
      int lowest = runs[threadIdx.x].relation;
      for (int step = kTileRows / 2; step > 0; step /= 2)
        lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, step));
      if (threadIdx.x == 0) relation = lowest;
    }
    __syncthreads();
    return relation;
  }

  // Once all threads are done with the runs of `done`.
  template <class View>
  __device__ void advance(const View& view, int64_t first_row, int done) {
    if (threadIdx.x >= kTileRows || runs[threadIdx.x].relation != done) return;
    const int64_t row = first_row + threadIdx.x;
    runs[threadIdx.x] = next_run(view, row, runs[threadIdx.x].end);
  }
};

}  // namespace rdfkern
