#include <cuda_runtime.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <numeric>
#include <random>

#include "race.h"

extern __thread char shim_shared_begin[], shim_shared_end[];  // see shared_edge.cpp

namespace shim {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 1024;  // bytes before and after dynamic shared memory, and its alignment
constexpr unsigned char kPoison = 0xa5, kUntouched = 0x5c;
constexpr int kBarriers = 16;

// Threads that meet: the block, a warp, or a named barrier. The last to arrive publishes what all of them brought.
struct Meeting {
  std::vector<uint64_t> brought, published;
  std::vector<size_t> members;
  size_t expected = 0;
  uint64_t generation = 0;
  std::string operation;
};

struct Running {
  std::vector<Work> open;
  std::deque<std::vector<Work>> groups;
};

struct Lane {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started, finished;
  Running running[2];
  Meeting* waits_for;
  uint64_t generation;
};

std::vector<Lane> lanes;
std::vector<Meeting> warps;
Meeting block, barriers[kBarriers];
size_t current;
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;
bool early[2];
std::vector<unsigned char> arena;
unsigned char* dynamic;

void lane_main() {
  race::watching = true;
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  race::watching = false;
  lanes[current].finished = true;
  _longjmp(scheduler, 1);
}

void resume(size_t lane) {
  current = lane;
  threadIdx = dim3(static_cast<unsigned>(lane));
  if (_setjmp(scheduler)) return;
  if (lanes[lane].started) _longjmp(lanes[lane].here, 1);
  lanes[lane].started = true;
  setcontext(&lanes[lane].start);
}

const uint64_t* meet(Meeting& meeting, size_t expected, size_t slot, const std::string& operation,
                     uint64_t value, bool orders_memory) {
  const race::Pause pause;
  if (meeting.members.empty()) {
    meeting.operation = operation;
    meeting.expected = expected;
    meeting.brought.resize(expected);
  }
  if (meeting.operation != operation) {
    fail("threads that should meet are at " + meeting.operation + " and at " + operation);
  }
  if (meeting.expected != expected) {
    fail(operation + ": some threads expect " + std::to_string(meeting.expected) + " there, others " +
         std::to_string(expected));
  }
  meeting.brought[slot < expected ? slot : 0] = value;
  meeting.members.push_back(current);
  if (meeting.members.size() == expected) {
    meeting.published = meeting.brought;
    if (orders_memory) race::order(meeting.members);
    meeting.members.clear();
    ++meeting.generation;
  } else {
    Lane& lane = lanes[current];
    lane.waits_for = &meeting;
    lane.generation = meeting.generation;
    if (!_setjmp(lane.here)) _longjmp(scheduler, 1);
  }
  return meeting.published.data();
}

std::vector<size_t> order_of(size_t count, unsigned seed) {
  const char* name = std::getenv("SHIM_ORDER");
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (name && std::string(name) == "reverse") std::reverse(order.begin(), order.end());
  if (name && std::string(name) == "shuffle") std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

void start_block(const Launch& launch, unsigned number) {
  std::fill(shim_shared_begin, shim_shared_end, static_cast<char>(kPoison));
  arena.assign(launch.shared + 3 * kGuard, kUntouched);
  dynamic = arena.data() + kGuard;
  dynamic += -reinterpret_cast<uintptr_t>(dynamic) % kGuard;
  std::fill(dynamic, dynamic + launch.shared, kPoison);
  block = Meeting();
  std::fill(barriers, barriers + kBarriers, Meeting());
  warps.assign(launch.threads / kWarp, Meeting());
  if (lanes.size() < launch.threads) lanes.resize(launch.threads);
  for (size_t l = 0; l < launch.threads; ++l) {
    Lane& lane = lanes[l];
    getcontext(&lane.start);
    lane.start.uc_stack.ss_sp = lane.stack.get();
    lane.start.uc_stack.ss_size = kStack;
    makecontext(&lane.start, lane_main, 0);
    std::fill(lane.stack.get(), lane.stack.get() + 64, static_cast<char>(kUntouched));
    lane.started = lane.finished = false;
    std::fill(lane.running, lane.running + 2, Running());
    lane.waits_for = nullptr;
  }
  const char* bytes = reinterpret_cast<const char*>(dynamic);
  race::start_block(number, launch.threads, {{shim_shared_begin, shim_shared_end}, {bytes, bytes + launch.shared}});
}

bool changed(const unsigned char* first, const unsigned char* last) {
  return std::any_of(first, last, [](unsigned char byte) { return byte != kUntouched; });
}

void check_block(const Launch& launch) {
  for (size_t l = 0; l < launch.threads; ++l) {
    const Meeting* meeting = lanes[l].waits_for;
    if (!lanes[l].finished) {
      throw std::logic_error("a thread waits forever at " + meeting->operation + ": " +
                             std::to_string(meeting->members.size()) + " of " + std::to_string(meeting->expected) +
                             " threads are there");
    }
    for (const Running& running : lanes[l].running) {
      size_t left = running.open.size();
      for (const auto& group : running.groups) left += group.size();
      if (left > 0) throw std::logic_error("a thread ends while it has work in the background, which nothing waits for");
    }
    const auto* stack = reinterpret_cast<unsigned char*>(lanes[l].stack.get());
    if (changed(stack, stack + 64)) throw std::logic_error("a thread needs more stack: raise kStack in fibres.cpp");
  }
  const unsigned char* end = dynamic + launch.shared;
  const std::string what = "its " + std::to_string(launch.shared) + " bytes of dynamic shared memory";
  if (changed(arena.data(), dynamic)) throw std::logic_error("wrote before " + what);
  if (changed(end, arena.data() + arena.size())) throw std::logic_error("wrote past the end of " + what);
}

// Runs some lanes, each until it has to wait; whether there was one that did not.
bool advance(const size_t* first, const size_t* last) {
  bool progress = false;
  for (const size_t* l = first; l < last; ++l) {
    Lane& lane = lanes[*l];
    if (lane.finished || (lane.waits_for && lane.waits_for->generation == lane.generation)) continue;
    lane.waits_for = nullptr;
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
    // A warp goes as far as it can without the others: what it should have waited for has not begun.
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

void run(const Launch& launch, const std::function<void()>& thread) {
  body = &thread;
  const char* setting = std::getenv("SHIM_EARLY");
  early[kCopies] = setting && std::strstr(setting, "copies");
  early[kProducts] = setting && std::strstr(setting, "products");
  race::start_launch();
  const dim3 grid = launch.grid;
  for (size_t number : order_of(size_t{grid.x} * grid.y * grid.z, 0)) {
    const unsigned b = static_cast<unsigned>(number);
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    try {
      run_block(launch, b);
    } catch (const std::logic_error& error) {
      const std::string name = place_of(launch.kernel);
      throw std::logic_error("shim: kernel " + name.substr(0, name.find_first_of("( ")) + ", block " +
                             std::to_string(b) + " of " + std::to_string(launch.threads) + " threads: " + error.what());
    }
  }
}

size_t lane() { return current; }
unsigned char* dynamic_shared() { return dynamic; }

bool on_own_stack(const void* address) {
  const char* stack = lanes[current].stack.get();
  return address >= stack && address < stack + kStack;
}

void fail(const std::string& message) {
  race::watching = false;
  failure = message;
  _longjmp(scheduler, 1);
}

const uint64_t* meet_block(const char* operation, uint64_t value) {
  return meet(block, blockDim.x, current, operation, value, true);
}

// Of the operations of a warp only __syncwarp orders memory.
const uint64_t* meet_warp(const char* operation, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail(std::string(operation) + ": only full masks are emulated");
  return meet(warps[current / kWarp], kWarp, current % kWarp, operation, value, !std::strcmp(operation, "__syncwarp"));
}

void meet_at_barrier(int id, int threads) {
  const race::Pause pause;
  const std::string name = "barrier " + std::to_string(id);
  if (id < 1 || id >= kBarriers) fail(name + ": 1..15 are free, 0 is __syncthreads");
  if (threads < kWarp || threads % kWarp || threads > static_cast<int>(blockDim.x)) {
    fail(name + " is for " + std::to_string(threads) + " threads: expected whole warps of the block");
  }
  Meeting& meeting = barriers[id];
  if (meeting.members.size() + 1 == static_cast<size_t>(threads)) {
    std::vector<int> present(lanes.size() / kWarp + 1);
    for (size_t member : meeting.members) ++present[member / kWarp];
    ++present[current / kWarp];
    if (std::any_of(present.begin(), present.end(), [](int count) { return count % kWarp; })) {
      fail(name + ": a warp is there in part");
    }
  }
  meet(meeting, threads, meeting.members.size(), name, 0, true);
}

void start(Background what, const Work& work) {
  if (early[what]) return work.run(work);
  const race::Pause pause;
  lanes[current].running[what].open.push_back(work);
}

void commit(Background what) {
  const race::Pause pause;
  Running& running = lanes[current].running[what];
  running.groups.emplace_back();
  running.groups.back().swap(running.open);
}

void wait(Background what, size_t pending) {
  Running& running = lanes[current].running[what];
  while (running.groups.size() > pending) {
    std::vector<Work> group;
    {
      const race::Pause pause;
      group.swap(running.groups.front());
      running.groups.pop_front();
    }
    for (const Work work : group) work.run(work);  // a copy on the thread's own stack, where no race is looked for
  }
}

// Threads run one at a time: an atomic operation needs nothing but to be told from plain accesses.
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

}  // namespace shim
