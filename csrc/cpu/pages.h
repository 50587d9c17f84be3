// Fresh memory costs a fault per page, and with pages of 4 KiB these can take as long as a kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "rows.h"

namespace rdfkern {

// Asks for huge pages for memory that will be written as a whole. The system may decline, and pages
// that are there already stay as they are.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// The same for dense outputs of a kernel.
inline void ask_for_huge_pages(std::initializer_list<std::optional<Tensor>> outputs) {
  for (const std::optional<Tensor>& output : outputs)
    if (output)
      ask_for_huge_pages(output->data_ptr(), output->numel() * bytes_of(output->scalar_type()));
}

}  // namespace rdfkern
