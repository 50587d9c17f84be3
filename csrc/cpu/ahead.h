// Rows that will soon be needed, asked into the cache a few at a time while a matrix product runs.
// The rows of one head of a packed tensor lie far apart: the processor itself foresees none of them.
#pragma once

#include "rows.h"

namespace rdfkern {

class Ahead {
 public:
  void add(const Rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
           int64_t size) {
    add(rows.at(batch, head, first), rows.row_stride * bytes_of(rows.type),
        size * bytes_of(rows.type), count);
  }
  // `count` rows of so many bytes each, `stride` bytes apart.
  void add(const char* first, int64_t stride, int64_t bytes, int64_t count) {
    if (count > 0) runs_[size_++] = {first, stride, bytes, count};
  }

  // So that everything is asked for within so many tiles, if that is not too much for one.
  void spread(int64_t tiles) {
    int64_t bytes = 0;
    for (int at = at_; at < size_; ++at) bytes += runs_[at].bytes * runs_[at].rows;
    step_ = std::clamp(bytes / std::max<int64_t>(tiles, 1) + 1, kStep, kLargestStep);
  }

  // After every tile of a product, by std::ref.
  void operator()() {
    for (int64_t bytes = 0; bytes < step_ && at_ < size_;) {
      Run& run = runs_[at_];
      for (int64_t byte = 0; byte < run.bytes; byte += kLine)
        __builtin_prefetch(run.next + byte, 0, 2);
      bytes += run.bytes;
      run.next += run.stride;
      if (--run.rows == 0) ++at_;
    }
  }

  void finish() {
    while (at_ < size_) (*this)();
  }

 private:
  static constexpr int64_t kLine = 64, kStep = 1024, kLargestStep = 8192;
  static constexpr int kRuns = 12;
  struct Run {
    const char* next;
    int64_t stride, bytes, rows;
  };
  Run runs_[kRuns];
  int size_ = 0, at_ = 0;
  int64_t step_ = kStep;
};

// body(task, following) for every task: the thread's next one is known early, so that its rows can be
// asked for, but not at the end, where another thread would wait for it; it is -1 then.
template <class Body>
void for_each_task_ahead(int64_t tasks, const Body& body) {
  const int64_t known = tasks - 4 * int64_t(torch::stable::get_num_threads());
  for_each_task<Tasks::kInOrder>(tasks, [&](auto next) {
    for (int64_t task = next(); task >= 0;) {
      const int64_t following = task < known ? next() : -1;
      body(task, following);
      task = task < known ? following : next();
    }
  });
}

}  // namespace rdfkern
