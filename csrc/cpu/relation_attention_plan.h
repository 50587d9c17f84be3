// How backward of relation attention is cut into tasks on implicit graphs: chunks of panels, whose
// bounds do not depend on the number of threads, and neither does any result.
#pragma once

#include "relation_attention.h"

namespace rdfkern::relation_attention {

constexpr int64_t kTasks = 32, kTasksOfManyRelations = 8, kManyRelations = 1 << 14;
constexpr int64_t kLeastCost = 2048;
constexpr int64_t kSumsBesideGradients = int64_t(64) << 20;  // floats

// Consecutive panels. Sources that only this chunk's targets hear get their gradients at once.
struct Chunk {
  size_t first_panel, end_panel;
  Span targets, sources;
  bool owns_sources;
  int64_t sums;  // where its sums for all heads start, unless it owns its sources
};

// A segment of several chunks, whose sums are added afterwards.
struct Shared {
  size_t first_chunk, end_chunk;
  Span rows;
};

class Plan {
 public:
  std::vector<Span> panels;
  std::vector<Chunk> chunks;
  std::vector<Shared> shared;
  int64_t floats = 0;

  explicit Plan(const Problem& problem)
      : problem_(problem), width_(problem.value_width + std::max<int64_t>(1, problem.depth_width)) {
    std::vector<size_t> segments{0};
    int64_t total = 0;
    for (int64_t row = 0; row < problem.nodes;) {
      const Span segment{row, segment_end(problem, row) - row};
      for (const Span& panel : panels_of(problem, segment)) {
        panels.push_back(panel);
        total += cost(panel);
      }
      segments.push_back(panels.size());
      row = segment.end();
    }
    const int64_t tasks =
        problem.relations > kManyRelations ? kTasksOfManyRelations : kTasks;
    const int64_t share = std::max(kLeastCost, total * problem.heads / tasks);
    size_t first = 0;
    int64_t gathered = 0;
    for (size_t s = 0; s + 1 < segments.size(); ++s) {
      const size_t begin = segments[s], end = segments[s + 1];
      int64_t whole = 0;
      for (size_t p = begin; p < end; ++p) whole += cost(panels[p]);
      if (whole >= 2 * share && end - begin > 1) {
        if (first < begin) add(first, begin, true);
        split(begin, end, whole, whole / share);
        first = end;
        gathered = 0;
      } else if ((gathered += whole) >= share) {
        add(first, end, true);
        first = end;
        gathered = 0;
      }
    }
    if (first < panels.size()) add(first, panels.size(), true);
  }

  // Where the sums of a chunk's head stand: values (and keys), or values and src.
  int64_t sums_of(const Chunk& chunk, int64_t head) const {
    return chunk.sums + head * chunk.sources.count * width_;
  }
  int64_t width() const { return width_; }

 private:
  int64_t cost(const Span& panel) const {
    return padded(panel.count) * sources_of(problem_, panel).count + 256;
  }

  Chunk chunk_of(size_t first, size_t end) const {
    const Span targets{panels[first].first, panels[end - 1].end() - panels[first].first};
    return {first, end, targets, sources_of(problem_, targets), true, 0};
  }

  void add(size_t first, size_t end, bool owns) {
    Chunk chunk = chunk_of(first, end);
    chunk.owns_sources = owns;
    if (!owns) {
      chunk.sums = floats;
      floats += chunk.sources.count * width_ * problem_.heads;
    }
    chunks.push_back(chunk);
  }

  void split(size_t begin, size_t end, int64_t whole, int64_t parts) {
    const Span rows = chunk_of(begin, end).targets;
    std::vector<size_t> ends;
    for (;; parts /= 2) {
      ends.clear();
      int64_t gathered = 0, sources = 0;
      for (size_t p = begin, first = begin; p < end; ++p) {
        gathered += cost(panels[p]);
        if (p + 1 < end && gathered * parts < whole * int64_t(ends.size() + 1)) continue;
        ends.push_back(p + 1);
        sources += chunk_of(first, p + 1).sources.count;
        first = p + 1;
      }
      const int64_t room = std::max(kSumsBesideGradients, 2 * rows.count * width_ * problem_.heads);
      if (parts <= 1 || sources * width_ * problem_.heads <= room) break;
    }
    const size_t first_chunk = chunks.size();
    for (size_t chunk_end : ends) {
      add(begin, chunk_end, ends.size() == 1);
      begin = chunk_end;
    }
    if (ends.size() > 1) shared.push_back({first_chunk, chunks.size(), rows});
  }

  const Problem& problem_;
  const int64_t width_;
};

}  // namespace rdfkern::relation_attention
