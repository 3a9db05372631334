#include "race.h"

#include <cuda_runtime.h>

#include <unordered_map>

namespace pruneattn::emulated::race {

bool watching = false;

namespace {

// Vector clocks. The clock of a thread advances at each barrier and each fence. An access has the clock of its
// thread.
using Clocks = std::vector<unsigned>;       // by thread: the last clock that is visible
using Blocks = std::map<unsigned, Clocks>;  // by block

struct ThreadState {
  Clocks seen;                           // of threads of this block
  std::shared_ptr<const Blocks> others;  // of threads of other blocks
  Clocks seen_at_fence;
  std::shared_ptr<const Blocks> others_at_fence;
  unsigned fenced = 0;  // own clock at the last fence
  Blocks observed;      // by atomic operations since the last fence; visible after the next fence
};

enum Kind : unsigned char { kRead, kWrite, kAtomic };

// An access by threads of one warp at the same clock.
struct Access {
  unsigned block, clock, warp;
  unsigned lanes;       // a bit per thread
  unsigned char bytes;  // a bit per byte of the cell
  Kind kind;
  const void* code;
};

// Four bytes of memory, with the accesses that a later access can race with.
struct Cell {
  std::vector<Access> reads, others;
};
constexpr size_t kPage = 1024;  // cells
using Pages = std::unordered_map<uintptr_t, std::vector<Cell>>;

std::vector<ThreadState> threads;
unsigned block;
std::vector<Range> shared_ranges;
Pages shared_pages, global_pages;
std::unordered_map<const void*, Blocks> published;  // by atomic operations, by address

void join(Clocks& clocks, const Clocks& more) {
  clocks.resize(max(clocks.size(), more.size()));
  for (size_t l = 0; l < more.size(); ++l) clocks[l] = max(clocks[l], more[l]);
}

void join(Blocks& blocks, const Blocks& more) {
  for (const auto& [number, clocks] : more) join(blocks[number], clocks);
}

void join(std::shared_ptr<const Blocks>& blocks, const std::shared_ptr<const Blocks>& more) {
  if (!more || blocks == more) return;
  auto joined = std::make_shared<Blocks>(*more);
  if (blocks) join(*joined, *blocks);
  blocks = joined;
}

// The lanes of an earlier access that does not happen before the current operation of the running thread.
unsigned unseen_lanes(const Access& access) {
  const ThreadState& state = threads[thread_number()];
  const Clocks* clocks = &state.seen;
  if (access.block != block) {
    if (!state.others) return access.lanes;
    const auto found = state.others->find(access.block);
    if (found == state.others->end()) return access.lanes;
    clocks = &found->second;
  }
  const unsigned* of_warp = clocks->data() + access.warp * kWarp;
  unsigned unseen = 0;
  for (int l = 0; l < kWarp; ++l) unseen |= static_cast<unsigned>(of_warp[l] < access.clock) << l;
  return unseen & access.lanes;
}

std::string describe(const Access& access, unsigned among) {
  const char* verbs[] = {"reads", "writes", "updates"};
  const unsigned thread = access.warp * kWarp + __builtin_ctz(among);
  return "thread " + std::to_string(thread) + " of block " + std::to_string(access.block) + " " + verbs[access.kind] +
         " in " + place_of(static_cast<const char*>(access.code) - 1);
}

void check(const std::vector<Access>& accesses, const Access& access, bool shared) {
  for (const Access& earlier : accesses) {
    if (!(earlier.bytes & access.bytes) || (earlier.kind == kAtomic && access.kind == kAtomic)) continue;
    const unsigned unseen = unseen_lanes(earlier);
    if (!unseen) continue;
    fail(std::string("race in ") + (shared ? "shared" : "global") + " memory: " + describe(earlier, unseen) + ", " +
         describe(access, access.lanes) + ", and " +
         (earlier.block == block ? "no barrier orders them" : "no fences around atomic operations order the blocks"));
  }
}

// Returns an equal access by this warp, to which the new access can be added.
Access* find(std::vector<Access>& accesses, const Access& access) {
  for (Access& one : accesses) {
    if (one.block == access.block && one.clock == access.clock && one.warp == access.warp &&
        one.bytes == access.bytes && one.kind == access.kind && one.code == access.code) {
      return &one;
    }
  }
  return nullptr;
}

// Adds the access to the list and removes the accesses that it supersedes: those that happen before it and touch no
// other bytes. A later access that races with a superseded access also races with the new access.
void add(std::vector<Access>& accesses, const Access& access) {
  const auto replaced = [&](const Access& earlier) {
    return !(earlier.bytes & ~access.bytes) && (access.kind == kWrite || access.kind == earlier.kind) &&
           unseen_lanes(earlier) == 0;
  };
  accesses.erase(std::remove_if(accesses.begin(), accesses.end(), replaced), accesses.end());
  accesses.push_back(access);
}

bool is_index(const void* pointer) {
  for (const dim3* index : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
    if (pointer >= index && pointer < index + 1) return true;
  }
  return false;
}

void access(const void* pointer, size_t bytes, Kind kind, const void* code) {
  if (on_own_stack(pointer) || is_index(pointer)) return;
  const bool shared = std::any_of(shared_ranges.begin(), shared_ranges.end(),
                                  [&](const Range& range) { return pointer >= range.first && pointer < range.second; });
  Pages& pages = shared ? shared_pages : global_pages;
  const unsigned thread = static_cast<unsigned>(thread_number());
  Access what = {block, threads[thread].seen[thread], thread / kWarp, 1u << thread % kWarp, 0, kind, code};
  const uintptr_t first = reinterpret_cast<uintptr_t>(pointer), last = first + bytes;
  std::vector<Cell>* page = nullptr;
  for (uintptr_t number = first / 4; number * 4 < last; ++number) {
    what.bytes = 0;
    for (unsigned b = 0; b < 4; ++b) {
      if (number * 4 + b >= first && number * 4 + b < last) what.bytes |= 1 << b;
    }
    if (!page || number % kPage == 0) {
      page = &pages[number / kPage];
      page->resize(kPage);
    }
    Cell& cell = (*page)[number % kPage];
    std::vector<Access>& list = kind == kRead ? cell.reads : cell.others;
    Access* const same = find(list, what);
    if (same && (same->lanes & what.lanes)) continue;  // later accesses were already compared with it
    check(cell.others, what, shared);
    if (kind != kRead) check(cell.reads, what, shared);
    if (same) {
      same->lanes |= what.lanes;
    } else {
      add(list, what);
    }
  }
}

}  // namespace

void start_launch() {
  global_pages.clear();
  published.clear();
}

void start_block(unsigned number, size_t count, const std::vector<Range>& shared) {
  block = number;
  shared_ranges = shared;
  shared_pages.clear();
  threads.assign(count, ThreadState());
  for (size_t t = 0; t < count; ++t) {
    threads[t].seen.assign(count, 0);
    threads[t].seen[t] = 1;
  }
}

void order(const std::vector<size_t>& members) {
  Clocks joined;
  std::shared_ptr<const Blocks> others;
  for (size_t t : members) {
    join(joined, threads[t].seen);
    join(others, threads[t].others);
  }
  for (size_t t : members) {
    threads[t].seen = joined;
    ++threads[t].seen[t];
    threads[t].others = others;
  }
}

// Publishes the accesses that a fence has made visible to other blocks: those that this thread had seen at its last
// fence, and those of other threads before their last fence, if a barrier has ordered them since.
void atomic(const void* address, const void* code) {
  access(address, 4, kAtomic, code);
  ThreadState& state = threads[thread_number()];
  Clocks visible(threads.size());
  for (size_t t = 0; t < threads.size(); ++t) visible[t] = min(state.seen[t], threads[t].fenced);
  join(visible, state.seen_at_fence);
  Blocks& all = published[address];
  join(state.observed, all);
  join(all[block], visible);
  if (state.others_at_fence) join(all, *state.others_at_fence);
}

void fence() {
  ThreadState& state = threads[thread_number()];
  const auto own = state.observed.find(block);
  if (own != state.observed.end()) join(state.seen, own->second);
  state.observed.erase(block);
  if (!state.observed.empty()) {
    join(state.others, std::make_shared<const Blocks>(std::move(state.observed)));
    state.observed.clear();
  }
  state.seen_at_fence = state.seen;
  state.others_at_fence = state.others;
  state.fenced = state.seen[thread_number()]++;
}

}  // namespace pruneattn::emulated::race

// The functions that the compiler calls.
#define ON_ACCESS(size, kind)                       \
  if (!pruneattn::emulated::race::watching) return; \
  const pruneattn::emulated::race::Pause pause;     \
  pruneattn::emulated::race::access(address, size, pruneattn::emulated::race::kind, __builtin_return_address(0))
#define DEFINE_ACCESSES(bytes)                                                           \
  EXTERN_C void __tsan_read##bytes(void* address) { ON_ACCESS(bytes, kRead); }           \
  EXTERN_C void __tsan_write##bytes(void* address) { ON_ACCESS(bytes, kWrite); }         \
  EXTERN_C void __tsan_unaligned_read##bytes(void* address) { ON_ACCESS(bytes, kRead); } \
  EXTERN_C void __tsan_unaligned_write##bytes(void* address) { ON_ACCESS(bytes, kWrite); }
#define EXTERN_C extern "C" __attribute__((visibility("hidden")))

DEFINE_ACCESSES(1)
DEFINE_ACCESSES(2)
DEFINE_ACCESSES(4)
DEFINE_ACCESSES(8)
DEFINE_ACCESSES(16)
EXTERN_C void __tsan_read_range(void* address, size_t bytes) { ON_ACCESS(bytes, kRead); }
EXTERN_C void __tsan_write_range(void* address, size_t bytes) { ON_ACCESS(bytes, kWrite); }
EXTERN_C void __tsan_vptr_read(void**) {}
EXTERN_C void __tsan_vptr_update(void**, void*) {}
EXTERN_C void __tsan_func_entry(void*) {}
EXTERN_C void __tsan_func_exit() {}
EXTERN_C void __tsan_init() {}
