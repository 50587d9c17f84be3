// Graphs as relation kernels walk them: tiles of rows, and for every relation in a tile the rows
// that have neighbours of it, with those neighbours.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "pages.h"
#include "rows.h"

namespace rdfkern {

constexpr int64_t kUnlimited = -1;
constexpr int64_t kLargestTile = 96;

// Memory of buffers that are gone, up to 64 MiB in all: fresh pages would cost more than many
// problems do.
class Kept {
 public:
  struct Memory {
    float* data = nullptr;
    int64_t bytes = 0;
  };

  static Kept& shared() {
    static Kept kept;
    return kept;
  }

  // The smallest that is large enough, or new memory.
  Memory take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = memories_.end();
      for (auto at = memories_.begin(); at != memories_.end(); ++at)
        if (at->bytes >= bytes && (best == memories_.end() || at->bytes < best->bytes)) best = at;
      if (best != memories_.end()) {
        const Memory found = *best;
        memories_.erase(best);
        bytes_ -= found.bytes;
        return found;
      }
    }
    auto fresh = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!fresh) throw std::bad_alloc();
    ask_for_huge_pages(fresh, bytes);
    return {fresh, bytes};
  }

  // The oldest make room.
  void give(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    memories_.push_back(memory);
    bytes_ += memory.bytes;
    size_t dropped = 0;
    for (; bytes_ > kMost; ++dropped) {
      bytes_ -= memories_[dropped].bytes;
      std::free(memories_[dropped].data);
    }
    memories_.erase(memories_.begin(), memories_.begin() + dropped);
  }

 private:
  static constexpr int64_t kMost = 64 << 20;
  std::mutex mutex_;
  std::vector<Memory> memories_;
  int64_t bytes_ = 0;
};

// Floats that outlive a task; left as they come. A row more than asked for may be read.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats)
      : memory_(Kept::shared().take((floats * 4 + 1087) / 64 * 64)) {}
  Buffer(Buffer&& other) noexcept : memory_(std::exchange(other.memory_, {})) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Buffer() {
    if (memory_.data) Kept::shared().give(memory_);
  }
  float* data() const { return memory_.data; }

 private:
  Kept::Memory memory_;
};

// A (rows, width) tensor whose last stride is 1.
struct Table {
  char* data;
  ScalarType type;
  int64_t rows, width, stride;

  explicit Table(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())), type(tensor.scalar_type()),
        rows(tensor.size(0)), width(tensor.size(1)), stride(tensor.stride(0)) {}

  char* at(int64_t row) const { return data + row * stride * bytes_of(type); }
};

// The tensor's rows as floats, row i being row order[i], with room for whole vectors behind each.
class FloatRows {
 public:
  FloatRows(const Table& table, const int64_t* order, bool in_place) {
    if (in_place && order == nullptr && table.type == ScalarType::Float &&
        table.width % kLanes == 0) {
      block_ = {reinterpret_cast<const float*>(table.data), table.stride};
      return;
    }
    // An odd number of vectors: rows a power of two apart would share few sets of the cache.
    const int64_t vectors = padded(table.width) / kLanes;
    const int64_t stride = (vectors + 1 - vectors % 2) * kLanes;
    buffer_ = Buffer((table.rows + 1) * stride);
    float* data = buffer_.data();
    torch::stable::parallel_for(0, table.rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        read_row(table.at(order ? order[i] : i), table.type, table.width, data + i * stride);
    });
    block_ = {data, stride};
  }
  const Block& block() const { return block_; }

 private:
  Buffer buffer_;
  Block block_;
};

// Rows that one task handles: about an eighth of all, but no more than a GEMM needs. It does not
// depend on the number of threads, and neither does any result.
inline int64_t tile_rows(int64_t rows) {
  return std::clamp<int64_t>((rows + 47) / 48 * 6, 12, kLargestTile);
}

// The neighbours of one relation: parts [begin, end) of a tile's list.
struct Work {
  int64_t relation, begin, end;
};

// Rows of a tile that have neighbours of one relation, and how many different sums over these.
struct Found {
  int64_t rows, sums;

  bool apart() const { return rows == sums; }
};

struct Sum {
  static constexpr float kStart = 0.0f;
  static Vec join(Vec a, Vec b) { return a + b; }
};

// NaN where either is NaN.
struct Max {
  static constexpr float kStart = -__builtin_inff();
  static Vec join(Vec a, Vec b) {
    const IntVec keeps_a = (a >= b) | (a != a);
    return keeps_a ? a : b;
  }
};

// Calls body(offset, number of vectors as a constant) over [0, width) in whole vectors.
template <class Body>
inline void for_each_columns(int64_t width, const Body& body) {
  int64_t at = 0;
  auto run = [&](auto vectors) {
    constexpr int64_t step = decltype(vectors)::value * kLanes;
    for (; at + step <= width; at += step) body(at, vectors);
  };
  run(std::integral_constant<int, 8>{});
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

template <class Op, int VECTORS>
struct Running {
  Vec values[VECTORS];

  void start() {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) values[n] = broadcast(Op::kStart);
  }
  void join(const float* row) {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) values[n] = Op::join(values[n], load(row + n * kLanes));
  }
  void join(const float* row, float factor) {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n)
      values[n] = Op::join(values[n], load(row + n * kLanes) * factor);
  }
  void join_into(float* row) const {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n)
      store(row + n * kLanes, Op::join(load(row + n * kLanes), values[n]));
  }
};

inline void add_row(const float* row, int64_t width, float* target) {
  for (int64_t d = 0; d < width; d += kLanes) store(target + d, load(target + d) + load(row + d));
}

inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += kLanes) store(row + d, load(row + d) * factor);
}

}  // namespace rdfkern
