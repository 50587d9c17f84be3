// Rows of tensors of any floating dtype, read and written as float; scratch memory; fair queues.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "simd.h"

namespace rdfkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

inline int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Float ? 4 : type == ScalarType::Bool ? 1 : 2;
}

// A (batch, head, row, element) view of a tensor with these dims, or packed with (row, head,
// element); the last stride is 1.
struct Rows {
  char* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())), type(tensor.scalar_type()),
        head_stride(tensor.stride(1)) {
    const bool packed = tensor.dim() == 3;
    batch_stride = packed ? 0 : tensor.stride(0);
    row_stride = tensor.stride(packed ? 0 : 2);
  }

  char* at(int64_t batch, int64_t head, int64_t row) const {
    const int64_t offset = batch * batch_stride + head * head_stride + row * row_stride;
    return data + offset * bytes_of(type);
  }
  float* floats(int64_t batch, int64_t head, int64_t row) const {
    return reinterpret_cast<float*>(at(batch, head, row));
  }
};

inline float to_float(const char* element, ScalarType type) {
  if (type == ScalarType::Float) return *reinterpret_cast<const float*>(element);
  const uint16_t raw = *reinterpret_cast<const uint16_t*>(element);
  return type == ScalarType::BFloat16 ? bits<float>(uint32_t(raw) << 16) : half_to_float(raw);
}

// target[0, padded(size)) = the row's elements, then zeros.
inline void read_row(const char* source, ScalarType type, int64_t size, float* target) {
  const int64_t whole = size / kLanes * kLanes;
  if (type == ScalarType::Float) {  // without a call, which takes as long as a short row
    auto floats = reinterpret_cast<const float*>(source);
    for (int64_t i = 0; i < whole; i += kLanes) store(target + i, load(floats + i));
    if (whole == size) return;
    store(target + whole, Vec{});
    std::copy(floats + whole, floats + size, target + whole);
    return;
  }
  auto raw = reinterpret_cast<const uint16_t*>(source);
  uint16_t tail[kLanes] = {};
  std::copy(raw + whole, raw + size, tail);
  auto convert = [&](auto from) {
    for (int64_t i = 0; i < whole; i += kLanes) store(target + i, from(raw + i));
    if (whole < size) store(target + whole, from(tail));
  };
  type == ScalarType::BFloat16 ? convert(from_bfloat16) : convert(from_float16);
}

inline void write_row(char* target, ScalarType type, int64_t size, const float* source) {
  const int64_t whole = size / kLanes * kLanes;
  if (type == ScalarType::Float) {
    std::memcpy(target, source, size * sizeof(float));
    return;
  }
  auto raw = reinterpret_cast<uint16_t*>(target);
  auto convert = [&](auto to) {
    for (int64_t i = 0; i < whole; i += kLanes) to(raw + i, load(source + i));
    if (whole == size) return;
    uint16_t tail[kLanes];
    float values[kLanes] = {};
    std::copy(source + whole, source + size, values);
    to(tail, load(values));
    std::copy(tail, tail + (size - whole), raw + whole);
  };
  type == ScalarType::BFloat16 ? convert(to_bfloat16) : convert(to_float16);
}

struct Block {
  const float* data;
  int64_t stride;

  Block from(int64_t row) const { return {data + row * stride, stride}; }
};

// `count` rows as floats with padded width: the tensor's own memory where it is already that.
inline Block read_rows(const Rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
                       int64_t size, float* scratch) {
  const int64_t width = padded(size);
  if (rows.type == ScalarType::Float && rows.row_stride == width && size == width)
    return {rows.floats(batch, head, first), width};
  for (int64_t i = 0; i < count; ++i)
    read_row(rows.at(batch, head, first + i), rows.type, size, scratch + i * width);
  return {scratch, width};
}

// The same for who reads along the rows, or each of them once: then their distance does not matter.
inline Block view_rows(const Rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
                       int64_t size, float* scratch) {
  if (rows.type == ScalarType::Float && size == padded(size))
    return {rows.floats(batch, head, first), rows.row_stride};
  return read_rows(rows, batch, head, first, count, size, scratch);
}

// Lane i: vector . row i, up to `count` rows and the last of them after that: with a fixed number the
// sums are in registers.
inline Vec row_products(const float* vector, const Block& rows, int64_t count, int64_t width) {
  const float* row[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    row[lane] = rows.data + std::min(lane, count - 1) * rows.stride;
  Vec products[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec factor = load(vector + d);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) products[lane] += load(row[lane] + d) * factor;
  }
  return sums(products);
}

// target[d * ld + i] = factor * source[i * stride + d]; i is zero-filled up to padded(count).
inline void transpose_rows(const Block& source, int64_t count, int64_t width, float factor,
                           float* target, int64_t ld) {
  for (int64_t i = 0; i < count; i += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        square[lane] = i + lane < count ? load(source.data + (i + lane) * source.stride + d) * factor
                                        : Vec{};
      transpose(square);
      for (int lane = 0; lane < kLanes; ++lane) store(target + (d + lane) * ld + i, square[lane]);
    }
}

// Memory of one thread, kept between calls up to 64 MiB: fresh pages cost more than small problems.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > capacity_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 127) / 64 * 64)));
      capacity_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    next_ = memory_.get();
  }
  ~Scratch() {
    if (capacity_ <= (16 << 20)) return;
    memory_.reset();
    capacity_ = 0;
  }
  Scratch(const Scratch&) = delete;

  static int64_t size_of(int64_t floats) { return (floats + 15) / 16 * 16; }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += size_of(floats);
    return taken;
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static inline thread_local std::unique_ptr<float, Free> memory_;
  static inline thread_local int64_t capacity_ = 0;
  float* next_;
};

enum class Tasks { kNear, kInOrder };

// Runs body(next) on each thread of torch's pool; next() hands out every task once, then -1. kNear:
// each thread begins with a range of its own, whose rows may be in its cache since the call before,
// and then helps the others. kInOrder: all take the first task left; for tasks that come largest
// first.
template <Tasks ORDER = Tasks::kNear, class Body>
void for_each_task(int64_t tasks, const Body& body) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t count = ORDER == Tasks::kNear ? threads : std::min<int64_t>(threads, 1);
  const std::unique_ptr<Range[]> ranges(new Range[count]);
  for (int64_t at = 0; at < count; ++at) {
    ranges[at].next = tasks * at / count;
    ranges[at].end = tasks * (at + 1) / count;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    int64_t passed = 0;
    body([&]() -> int64_t {
      for (; passed < count; ++passed) {
        Range& range = ranges[(thread + passed) % count];
        const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
        if (task < range.end) return task;
      }
      return -1;
    });
  });
}

}  // namespace rdfkern
