// The emulator's scheduler: fibers, schedules, barriers, and what can go wrong at them.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) (void)0
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) (void)0
#endif

#if defined(__x86_64__)
extern "C" void emulator_switch(void** from, void* to);
// Saves what a call must keep, changes stacks, and returns to where the other fiber left.
asm(R"(
.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace rdfkern {
constexpr size_t kMaxShared = 228 * 1024;
alignas(16) char dynamic_shared[kMaxShared];
}  // namespace rdfkern

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;

// A place to go on from.
class Context {
 public:
#if defined(__x86_64__)
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 8;
    top[6] = reinterpret_cast<void*>(entry);
    place_ = top;
  }
  void leave_for(Context& other) { emulator_switch(&place_, other.place_); }

 private:
  void* place_ = nullptr;
#else
  void start(char* stack, void (*entry)()) {
    getcontext(&place_);
    place_.uc_stack.ss_sp = stack;
    place_.uc_stack.ss_size = kStack;
    place_.uc_link = nullptr;
    makecontext(&place_, entry, 0);
  }
  void leave_for(Context& other) { swapcontext(&place_, &other.place_); }

 private:
  ucontext_t place_;
#endif
};

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Fiber {
  Context context;
  State state = State::kReady;
  uint3 thread = {};
  Site site = {};
  Operation operation = Operation::kSynchronise;
  unsigned mask = 0;
  uint64_t bits = 0, result = 0;
  int source = 0;
  uint64_t priority = 0;  // the lowest runs next
};

enum Schedule { kForward, kReverse, kRoundRobin, kEagerWarps, kRandom };

Schedule schedule = kForward;
uint64_t schedule_seed = 0;
std::string failure;
char* stacks = nullptr;
size_t stack_count = 0;
std::vector<Fiber> fibers;
Context scheduler;
int current = 0;
const std::function<void()>* current_kernel = nullptr;
std::mt19937_64 generator;
uint64_t turn = 0;

void fiber_main() {
  (*current_kernel)();
  fibers[current].state = State::kDone;
  fibers[current].context.leave_for(scheduler);
  std::abort();
}

std::string describe(int index) {
  const Fiber& fiber = fibers[index];
  std::string text = "thread " + std::to_string(index) + " of block " + std::to_string(blockIdx.x);
  if (fiber.state == State::kDone) return text + " has ended";
  const char* name = std::strrchr(fiber.site.file, '/');
  return text + (fiber.state == State::kAtBlockBarrier ? " waits for its block at "
                                                       : " waits for its warp at ") +
         (name ? name + 1 : fiber.site.file) + ":" + std::to_string(fiber.site.line);
}

bool same_site(const Fiber& a, const Fiber& b) {
  return a.site.line == b.site.line && !std::strcmp(a.site.file, b.site.file);
}

void draw_priorities() {
  for (size_t warp = 0; warp < fibers.size(); warp += warpSize) {
    const uint64_t of_warp = generator() >> 32 << 32;
    for (size_t i = warp; i < std::min(warp + warpSize, fibers.size()); ++i)
      fibers[i].priority = of_warp | (generator() >> 32);
  }
}

int next_ready() {
  int best = -1;
  if (schedule == kRandom) {
    int seen = 0;
    for (size_t i = 0; i < fibers.size(); ++i)
      if (fibers[i].state == State::kReady && generator() % ++seen == 0) best = int(i);
    return best;
  }
  for (size_t i = 0; i < fibers.size(); ++i)
    if (fibers[i].state == State::kReady &&
        (best < 0 || fibers[i].priority < fibers[best].priority))
      best = int(i);
  return best;
}

void release(Fiber& fiber) {
  fiber.state = State::kReady;
  if (schedule == kRoundRobin) fiber.priority = ++turn;
}

// Lets a warp go on once all lanes of the mask have come. False: they never will, or disagree.
bool complete_warp(int index) {
  const int first = index / warpSize * warpSize;
  const Fiber& asking = fibers[index];
  uint64_t ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (!(asking.mask >> lane & 1)) continue;
    if (first + lane >= int(fibers.size())) {
      failure = "the mask names lanes that do not exist: " + describe(index);
      return false;
    }
    const Fiber& fiber = fibers[first + lane];
    if (fiber.state == State::kReady) return true;
    if (fiber.state != State::kAtWarpOperation || fiber.mask != asking.mask ||
        fiber.operation != asking.operation || !same_site(fiber, asking)) {
      failure = "a warp disagrees: " + describe(index) + ", but " + describe(first + lane);
      return false;
    }
    ballot |= uint64_t(fiber.bits != 0) << lane;
  }
  if (!(asking.mask >> (index - first) & 1)) {
    failure = "not in its own mask: " + describe(index);
    return false;
  }
  const Operation operation = asking.operation;
  const unsigned mask = asking.mask;
  for (int lane = 0; lane < warpSize; ++lane)
    if (mask >> lane & 1) {
      Fiber& fiber = fibers[first + lane];
      if (operation == Operation::kExchange && !(mask >> (fiber.source - first) & 1)) {
        failure = "a shuffle from a lane outside the mask: " + describe(first + lane);
        return false;
      }
      fiber.result = operation == Operation::kBallot ? ballot : fibers[fiber.source].bits;
    }
  for (int lane = 0; lane < warpSize; ++lane)
    if (mask >> lane & 1) release(fibers[first + lane]);
  return true;
}

// Lets the block go on when nobody is ready. False: they never all come, or disagree.
bool complete_block() {
  for (size_t i = 0; i < fibers.size(); ++i)
    if (fibers[i].state == State::kAtWarpOperation) return complete_warp(int(i)) && false;
  for (size_t i = 0; i < fibers.size(); ++i)
    if (fibers[i].state != State::kAtBlockBarrier || !same_site(fibers[i], fibers[0])) {
      size_t waiting = 0;
      while (fibers[waiting].state == State::kDone) ++waiting;
      failure = "the block disagrees: " + describe(int(waiting)) + ", but " +
                describe(int(waiting == i ? 0 : i));
      return false;
    }
  for (Fiber& fiber : fibers) release(fiber);
  if (schedule == kEagerWarps) draw_priorities();
  return true;
}

void prepare_block(size_t shared_bytes) {
  ASAN_UNPOISON_MEMORY_REGION(rdfkern::dynamic_shared, rdfkern::kMaxShared);
  std::memset(rdfkern::dynamic_shared, 0xff, rdfkern::kMaxShared);  // NaN
  ASAN_POISON_MEMORY_REGION(rdfkern::dynamic_shared + shared_bytes,
                            rdfkern::kMaxShared - shared_bytes);
  ASAN_UNPOISON_MEMORY_REGION(stacks, fibers.size() * kStack);
  for (size_t i = 0; i < fibers.size(); ++i) {
    fibers[i] = {};
    fibers[i].thread = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                        unsigned(i / blockDim.x / blockDim.y)};
    fibers[i].priority = schedule == kReverse ? fibers.size() - i : i;
    fibers[i].context.start(stacks + i * kStack, fiber_main);
  }
  turn = fibers.size();
  if (schedule == kEagerWarps) draw_priorities();
}

bool run_block(size_t shared_bytes) {
  prepare_block(shared_bytes);
  for (;;) {
    current = next_ready();
    if (current < 0) {
      const bool ended = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
        return fiber.state == State::kDone;
      });
      if (ended) return true;
      if (!complete_block()) return false;
      continue;
    }
    threadIdx = fibers[current].thread;
    scheduler.leave_for(fibers[current].context);
    if (fibers[current].state == State::kAtWarpOperation && !complete_warp(current)) return false;
  }
}

bool reserve_stacks(size_t count) {
  if (count <= stack_count) return true;
  if (stacks) munmap(stacks, stack_count * kStack);
  void* memory = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  stack_count = stacks ? count : 0;
  return stacks != nullptr;
}

}  // namespace

int lane() { return current % warpSize; }

void wait_for_block(Site site) {
  Fiber& fiber = fibers[current];
  fiber.state = State::kAtBlockBarrier;
  fiber.site = site;
  fiber.context.leave_for(scheduler);
}

uint64_t wait_for_warp(Operation operation, unsigned mask, uint64_t bits, int source, Site site) {
  Fiber& fiber = fibers[current];
  fiber.state = State::kAtWarpOperation;
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.bits = bits;
  fiber.source = current / warpSize * warpSize + source;
  fiber.site = site;
  fiber.context.leave_for(scheduler);
  return fiber.result;
}

namespace {

struct Operands {
  float a[4], b[2];
};
std::vector<Operands> operands;  // of every thread

float cut_to_tf32(float value) { return __int_as_float(__float_as_int(value) & ~0x1fff); }

double cut_below(double value, double unit) { return std::trunc(value / unit) * unit; }

// The last place of a float as large as these numbers.
double unit_of(const std::vector<double>& addends) {
  int exponent = -126;
  for (const double addend : addends)
    if (addend != 0) exponent = std::max(exponent, std::ilogb(addend));
  return std::ldexp(1.0, exponent - 23);
}

}  // namespace

void multiply_fragments(float (&sums)[4], const float (&a)[4], const float (&b)[2],
                        const char* file, int line) {
  operands.resize(std::max(operands.size(), fibers.size()));
  Operands& own = operands[current];
  for (int i = 0; i < 4; ++i) own.a[i] = cut_to_tf32(a[i]);
  for (int i = 0; i < 2; ++i) own.b[i] = cut_to_tf32(b[i]);
  wait_for_warp(Operation::kSynchronise, 0xffffffffu, 0, 0, {file, line});
  const Operands* const warp = &operands[current / warpSize * warpSize];
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    std::vector<double> addends{sums[i]};
    for (int k = 0; k < 8; ++k)
      addends.push_back(double(warp[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) *
                        warp[column * 4 + k % 4].b[k / 4]);
    double sum = 0;
    bool finite = true;
    for (const double addend : addends) finite = finite && std::isfinite(addend);
    const double unit = finite ? unit_of(addends) : 1;
    for (const double addend : addends) sum += finite ? cut_below(addend, unit) : addend;
    sums[i] = finite            ? float(cut_below(sum, unit_of({sum})))
              : std::isnan(sum) ? __int_as_float(0x7fffffff)  // a GPU's only NaN
                                : float(sum);
  }
  wait_for_warp(Operation::kSynchronise, 0xffffffffu, 0, 0, {file, line});
}

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || shared_bytes > rdfkern::kMaxShared ||
      !reserve_stacks(threads)) {
    failure = "invalid launch";
    return cudaErrorInvalidValue;
  }
  generator.seed(schedule_seed);
  blockDim = block;
  gridDim = grid;
  current_kernel = &kernel;
  fibers.resize(threads);
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule >= kEagerWarps) std::shuffle(order.begin(), order.end(), generator);
  for (const size_t index : order) {
    blockIdx = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                unsigned(index / grid.x / grid.y)};
    if (!run_block(shared_bytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::failure.c_str();
}

// kind: 0 forward, 1 reverse, 2 round robin, 3 eager warps in random order, 4 random.
extern "C" void emulator_set_schedule(int kind, uint64_t seed) {
  emulator::schedule = emulator::Schedule(kind);
  emulator::schedule_seed = seed;
}
