#include <cuda_runtime.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <numeric>
#include <random>

#include "race.h"

extern __thread char emulated_shared_begin[], emulated_shared_end[];  // see shared_edge.cpp

namespace pruneattn::emulated {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 1024;  // bytes before and after dynamic shared memory, and its alignment
constexpr unsigned char kPoison = 0xa5, kUntouched = 0x5c;
constexpr int kBarriers = 16;

size_t index_of(Async kind) { return static_cast<size_t>(kind); }

// A barrier of the block, of a warp, or with a number. The last thread to arrive publishes the values of all threads.
struct Barrier {
  std::vector<uint64_t> arriving, published;
  std::vector<size_t> members;
  size_t expected = 0;
  uint64_t generation = 0;
  std::string operation;
};

// The asynchronous operations of a thread.
struct Pending {
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started, finished;
  Pending pending[2];
  Barrier* waits_for;
  uint64_t generation;
};

std::vector<Thread> threads;
std::vector<Barrier> warps;
Barrier block, barriers[kBarriers];
size_t current;
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;
bool early[2];
std::vector<unsigned char> arena;  // dynamic shared memory between guards
unsigned char* dynamic;

void thread_main() {
  race::watching = true;
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  race::watching = false;
  threads[current].finished = true;
  _longjmp(scheduler, 1);
}

void resume(size_t number) {
  current = number;
  threadIdx = dim3(static_cast<unsigned>(number));
  if (_setjmp(scheduler)) return;
  if (threads[number].started) _longjmp(threads[number].here, 1);
  threads[number].started = true;
  setcontext(&threads[number].start);
}

const uint64_t* arrive(Barrier& barrier, size_t expected, size_t slot, const std::string& operation, uint64_t value,
                       bool orders_memory) {
  const race::Pause pause;
  if (barrier.members.empty()) {
    barrier.operation = operation;
    barrier.expected = expected;
    barrier.arriving.resize(expected);
  }
  if (barrier.operation != operation) {
    fail("threads wait at different operations: " + barrier.operation + " and " + operation);
  }
  if (barrier.expected != expected) {
    fail(operation + ": some threads expect " + std::to_string(barrier.expected) + " threads, others " +
         std::to_string(expected));
  }
  barrier.arriving[slot < expected ? slot : 0] = value;
  barrier.members.push_back(current);
  if (barrier.members.size() == expected) {
    barrier.published = barrier.arriving;
    if (orders_memory) race::order(barrier.members);
    barrier.members.clear();
    ++barrier.generation;
  } else {
    Thread& thread = threads[current];
    thread.waits_for = &barrier;
    thread.generation = barrier.generation;
    if (!_setjmp(thread.here)) _longjmp(scheduler, 1);
  }
  return barrier.published.data();
}

std::vector<size_t> order_of(size_t count, unsigned seed) {
  const char* name = std::getenv("EMULATED_ORDER");
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (name && std::string(name) == "reverse") std::reverse(order.begin(), order.end());
  if (name && std::string(name) == "shuffle") std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

void start_block(const Launch& launch, unsigned number) {
  std::fill(emulated_shared_begin, emulated_shared_end, static_cast<char>(kPoison));
  arena.assign(launch.shared + 3 * kGuard, kUntouched);
  dynamic = arena.data() + kGuard;
  dynamic += -reinterpret_cast<uintptr_t>(dynamic) % kGuard;
  std::fill(dynamic, dynamic + launch.shared, kPoison);
  block = Barrier();
  std::fill(barriers, barriers + kBarriers, Barrier());
  warps.assign(launch.threads / kWarp, Barrier());
  if (threads.size() < launch.threads) threads.resize(launch.threads);
  for (size_t l = 0; l < launch.threads; ++l) {
    Thread& thread = threads[l];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, thread_main, 0);
    std::fill(thread.stack.get(), thread.stack.get() + 64, static_cast<char>(kUntouched));
    thread.started = thread.finished = false;
    std::fill(thread.pending, thread.pending + 2, Pending());
    thread.waits_for = nullptr;
  }
  const char* bytes = reinterpret_cast<const char*>(dynamic);
  race::start_block(number, launch.threads,
                    {{emulated_shared_begin, emulated_shared_end}, {bytes, bytes + launch.shared}});
}

bool changed(const unsigned char* first, const unsigned char* last) {
  return std::any_of(first, last, [](unsigned char byte) { return byte != kUntouched; });
}

void check_block(const Launch& launch) {
  for (size_t l = 0; l < launch.threads; ++l) {
    const Barrier* barrier = threads[l].waits_for;
    if (!threads[l].finished) {
      throw std::logic_error("a thread waits forever at " + barrier->operation + ": " +
                             std::to_string(barrier->members.size()) + " of " + std::to_string(barrier->expected) +
                             " threads arrived");
    }
    for (const Pending& pending : threads[l].pending) {
      size_t left = pending.open.size();
      for (const auto& group : pending.groups) left += group.size();
      if (left > 0) throw std::logic_error("a thread ends before it waits for its asynchronous operations");
    }
    const auto* stack = reinterpret_cast<unsigned char*>(threads[l].stack.get());
    if (changed(stack, stack + 64)) throw std::logic_error("a thread exceeds its stack: increase kStack in fibers.cpp");
  }
  const unsigned char* end = dynamic + launch.shared;
  const std::string what = "the " + std::to_string(launch.shared) + " bytes of dynamic shared memory";
  if (changed(arena.data(), dynamic)) throw std::logic_error("a write before " + what);
  if (changed(end, arena.data() + arena.size())) throw std::logic_error("a write past the end of " + what);
}

// Runs each of some threads until it has to wait. Returns whether any thread could run.
bool advance(const size_t* first, const size_t* last) {
  bool progress = false;
  for (const size_t* l = first; l < last; ++l) {
    Thread& thread = threads[*l];
    if (thread.finished || (thread.waits_for && thread.waits_for->generation == thread.generation)) continue;
    thread.waits_for = nullptr;
    resume(*l);
    if (!failure.empty()) throw std::logic_error(failure);
    progress = true;
  }
  return progress;
}

void run_block(const Launch& launch, unsigned number) {
  failure.clear();
  start_block(launch, number);
  const std::vector<size_t> order = order_of(launch.threads, number);
  for (bool progress = true; progress;) {
    progress = false;
    // Runs a warp as far as possible before the next warp. Code that a missing barrier should order has not started
    // yet.
    for (size_t first = 0; first < order.size(); first += kWarp) {
      while (advance(&order[first], &order[first] + kWarp)) progress = true;
    }
  }
  check_block(launch);
}

}  // namespace

std::string place_of(const void* code) {
  Dl_info info = {};
  if (!dladdr(code, &info)) return "?";
  char offset[32];
  std::snprintf(offset, sizeof(offset), "%#zx",
                static_cast<size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  const std::string command = std::string("addr2line -Cfpsie '") + info.dli_fname + "' " + offset + " 2>/dev/null";
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char part[1000];
    while (std::fgets(part, sizeof(part), pipe)) text += part;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  for (const char* noise : {"\n", "void ", "pruneattn::cuda::", "(anonymous namespace)::"}) {
    for (size_t at; (at = text.find(noise)) != std::string::npos;) text.erase(at, std::strlen(noise));
  }
  return text.empty() ? offset : text;
}

void run(const Launch& launch, const std::function<void()>& kernel_body) {
  body = &kernel_body;
  const char* setting = std::getenv("EMULATED_EARLY");
  early[index_of(Async::copies)] = setting && std::strstr(setting, "copies");
  early[index_of(Async::products)] = setting && std::strstr(setting, "products");
  race::start_launch();
  const dim3 grid = launch.grid;
  for (size_t number : order_of(size_t{grid.x} * grid.y * grid.z, 0)) {
    const unsigned b = static_cast<unsigned>(number);
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    try {
      run_block(launch, b);
    } catch (const std::logic_error& error) {
      const std::string name = place_of(launch.kernel);
      throw std::logic_error("emulated kernel " + name.substr(0, name.find_first_of("( ")) + ", block " +
                             std::to_string(b) + " of " + std::to_string(launch.threads) + " threads: " + error.what());
    }
  }
}

size_t thread_number() { return current; }
unsigned char* dynamic_shared() { return dynamic; }

bool on_own_stack(const void* address) {
  const char* stack = threads[current].stack.get();
  return address >= stack && address < stack + kStack;
}

void fail(const std::string& message) {
  race::watching = false;
  failure = message;
  _longjmp(scheduler, 1);
}

void wait_for_block(const char* operation) { arrive(block, blockDim.x, current, operation, 0, true); }

// __syncwarp is the only warp operation that orders memory accesses.
const uint64_t* exchange_in_warp(const char* operation, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail(std::string(operation) + ": the emulation supports only full masks");
  return arrive(warps[current / kWarp], kWarp, current % kWarp, operation, value,
                !std::strcmp(operation, "__syncwarp"));
}

void wait_at_barrier(int id, int count) {
  const race::Pause pause;
  const std::string name = "barrier " + std::to_string(id);
  if (id < 1 || id >= kBarriers) fail(name + ": the number must be in 1..15");
  if (count < kWarp || count % kWarp || count > static_cast<int>(blockDim.x)) {
    fail(name + " is for " + std::to_string(count) + " threads: expected whole warps of the block");
  }
  Barrier& barrier = barriers[id];
  if (barrier.members.size() + 1 == static_cast<size_t>(count)) {
    std::vector<int> present(threads.size() / kWarp + 1);
    for (size_t member : barrier.members) ++present[member / kWarp];
    ++present[current / kWarp];
    if (std::any_of(present.begin(), present.end(), [](int lanes) { return lanes % kWarp; })) {
      fail(name + ": only a part of a warp arrived");
    }
  }
  arrive(barrier, count, barrier.members.size(), name, 0, true);
}

void start(Async kind, const Operation& operation) {
  if (early[index_of(kind)]) return operation.run(operation);
  const race::Pause pause;
  threads[current].pending[index_of(kind)].open.push_back(operation);
}

void commit(Async kind) {
  const race::Pause pause;
  Pending& own = threads[current].pending[index_of(kind)];
  own.groups.emplace_back();
  own.groups.back().swap(own.open);
}

void wait(Async kind, size_t pending) {
  Pending& own = threads[current].pending[index_of(kind)];
  while (own.groups.size() > pending) {
    std::vector<Operation> group;
    {
      const race::Pause pause;
      group.swap(own.groups.front());
      own.groups.pop_front();
    }
    // A copy on the thread's own stack, which the race finder ignores.
    for (const Operation operation : group) operation.run(operation);
  }
}

// Threads run one at a time, so the addition needs no atomic instruction. The race finder must know that it is
// atomic.
unsigned atomic_add(unsigned* address, unsigned value) {
  const race::Pause pause;
  race::atomic(address, __builtin_return_address(0));
  const unsigned old = *address;
  *address = old + value;
  return old;
}

void fence() {
  const race::Pause pause;
  race::fence();
}

}  // namespace pruneattn::emulated
