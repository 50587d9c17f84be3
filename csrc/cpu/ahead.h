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
  // `count` rows of so many bytes each, `stride` bytes apart; too many such runs are left out.
  void add(const char* first, int64_t stride, int64_t bytes, int64_t count) {
    if (count > 0 && size_ < kRuns) runs_[size_++] = {first, stride, bytes, count};
  }

  // So that everything is asked for within so many tiles, if that is not too much for one.
  void spread(int64_t tiles) {
    int64_t bytes = 0;
    for (int at = at_; at < size_; ++at) bytes += runs_[at].bytes * runs_[at].rows;
    share_ = std::clamp(bytes / std::max<int64_t>(tiles, 1) + 1, kShare, kLargestShare);
  }

  // Asks for one line: many at once would wait for each other.
  void step() {
    if (at_ == size_) return;
    const Run& run = runs_[at_];
    __builtin_prefetch(run.next + byte_, 0, 2);
    byte_ += kLine;
    asked_ += kLine;
    if (byte_ >= run.bytes) end_row();
  }

  // Asks for what is left of a tile's share, in whole rows.
  void end_tile() {
    while (asked_ < share_ && at_ < size_) {
      const Run& run = runs_[at_];
      for (int64_t byte = byte_; byte < run.bytes; byte += kLine)
        __builtin_prefetch(run.next + byte, 0, 2);
      asked_ += run.bytes - byte_;
      end_row();
    }
    asked_ = 0;
  }

  void finish() {
    while (at_ < size_) end_tile();
  }

 private:
  static constexpr int64_t kLine = 64, kShare = 1024, kLargestShare = 8192;
  static constexpr int kRuns = 12;
  struct Run {
    const char* next;
    int64_t stride, bytes, rows;
  };

  void end_row() {
    Run& run = runs_[at_];
    byte_ = 0;
    run.next += run.stride;
    if (--run.rows == 0) ++at_;
  }

  Run runs_[kRuns];
  int size_ = 0, at_ = 0;
  int64_t share_ = kShare, asked_ = 0, byte_ = 0;
};

// For a product to ask while it runs.
struct AskFor {
  Ahead& ahead;
  void step() const { ahead.step(); }
  void operator()() const { ahead.end_tile(); }
};

// body(task, following) for every task: the thread's next one is known early, so that its rows can be
// asked for, but not at the end, where another thread would wait for it; it is -1 then. Of `group`
// tasks in a row whose rows lie side by side, one thread takes all, unless there are few groups.
template <class Body>
void for_each_task_ahead(int64_t tasks, int64_t group, const Body& body) {
  constexpr int64_t kKept = 4;  // per thread, at the end
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks < 4 * kKept * threads * group) group = 1;
  const int64_t groups = (tasks + group - 1) / group, known = groups - kKept * threads;
  for_each_task<Tasks::kInOrder>(groups, [&](auto next) {
    for (int64_t at = next(); at >= 0;) {
      const int64_t following = at < known ? next() : -1;
      const int64_t end = std::min(tasks, (at + 1) * group);
      for (int64_t task = at * group; task < end; ++task)
        body(task, task + 1 < end ? task + 1 : following < 0 ? -1 : following * group);
      at = at < known ? following : next();
    }
  });
}

}  // namespace rdfkern
