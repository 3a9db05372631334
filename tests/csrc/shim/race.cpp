#include "race.h"

#include <cuda_runtime.h>

#include <unordered_map>

namespace shim::race {

bool watching = false;

namespace {

// Vector clocks. A lane's own clock ticks when it meets others and at a fence; an access bears the clock of its lane.
using Clocks = std::vector<unsigned>;       // by lane: what has been seen of it
using Blocks = std::map<unsigned, Clocks>;  // by block

struct LaneState {
  Clocks seen;                           // of this block
  std::shared_ptr<const Blocks> others;  // seen of other blocks
  Clocks seen_at_fence;
  std::shared_ptr<const Blocks> others_at_fence;
  unsigned fenced = 0;  // own clock at the last fence
  Blocks observed;      // by atomic operations since then: to be seen after the next fence
};

enum Kind : unsigned char { kRead, kWrite, kAtomic };

// By threads of one warp at the same clock.
struct Access {
  unsigned block, clock, warp;
  unsigned lanes;       // a bit for each of them
  unsigned char bytes;  // a bit for each of four
  Kind kind;
  const void* code;
};

// Four bytes of memory: the accesses that a later one can race with.
struct Cell {
  std::vector<Access> reads, others;
};
constexpr size_t kPage = 1024;  // cells
using Pages = std::unordered_map<uintptr_t, std::vector<Cell>>;

std::vector<LaneState> lanes;
unsigned block;
std::vector<Range> shared_ranges;
Pages shared_pages, global_pages;
std::unordered_map<const void*, Blocks> published;  // by the atomic operations on an address

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

// Those lanes of an earlier access that the running thread has not seen it from.
unsigned unseen_lanes(const Access& access) {
  const LaneState& state = lanes[lane()];
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

// The same access by this warp before: it stands for this one, too.
Access* find(std::vector<Access>& accesses, const Access& access) {
  for (Access& one : accesses) {
    if (one.block == access.block && one.clock == access.clock && one.warp == access.warp &&
        one.bytes == access.bytes && one.kind == access.kind && one.code == access.code) {
      return &one;
    }
  }
  return nullptr;
}

// Puts the access into the list and takes out those that it stands for: whatever comes later and races with one that
// this one has seen, and that touches no other bytes, races with this one as well.
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
  const bool shared = std::any_of(shared_ranges.begin(), shared_ranges.end(), [&](const Range& range) {
    return pointer >= range.first && pointer < range.second;
  });
  Pages& pages = shared ? shared_pages : global_pages;
  const unsigned thread = static_cast<unsigned>(lane());
  Access what = {block, lanes[thread].seen[thread], thread / kWarp, 1u << thread % kWarp, 0, kind, code};
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
    std::vector<Access>& alike = kind == kRead ? cell.reads : cell.others;
    Access* const same = find(alike, what);
    if (same && (same->lanes & what.lanes)) continue;  // whatever came since then was compared with that
    check(cell.others, what, shared);
    if (kind != kRead) check(cell.reads, what, shared);
    if (same) {
      same->lanes |= what.lanes;
    } else {
      add(alike, what);
    }
  }
}

}  // namespace

void start_launch() {
  global_pages.clear();
  published.clear();
}

void start_block(unsigned number, size_t threads, const std::vector<Range>& shared) {
  block = number;
  shared_ranges = shared;
  shared_pages.clear();
  lanes.assign(threads, LaneState());
  for (size_t l = 0; l < threads; ++l) {
    lanes[l].seen.assign(threads, 0);
    lanes[l].seen[l] = 1;
  }
}

void order(const std::vector<size_t>& members) {
  Clocks joined;
  std::shared_ptr<const Blocks> others;
  for (size_t l : members) {
    join(joined, lanes[l].seen);
    join(others, lanes[l].others);
  }
  for (size_t l : members) {
    lanes[l].seen = joined;
    ++lanes[l].seen[l];
    lanes[l].others = others;
  }
}

// Publishes what a fence has made visible to other blocks: all that this thread had seen at its own last fence, and
// what other threads had done before their own if this one has met them since.
void atomic(const void* address, const void* code) {
  access(address, 4, kAtomic, code);
  LaneState& state = lanes[lane()];
  Clocks visible(lanes.size());
  for (size_t l = 0; l < lanes.size(); ++l) visible[l] = min(state.seen[l], lanes[l].fenced);
  join(visible, state.seen_at_fence);
  Blocks& all = published[address];
  join(state.observed, all);
  join(all[block], visible);
  if (state.others_at_fence) join(all, *state.others_at_fence);
}

void fence() {
  LaneState& state = lanes[lane()];
  const auto own = state.observed.find(block);
  if (own != state.observed.end()) join(state.seen, own->second);
  state.observed.erase(block);
  if (!state.observed.empty()) {
    join(state.others, std::make_shared<const Blocks>(std::move(state.observed)));
    state.observed.clear();
  }
  state.seen_at_fence = state.seen;
  state.others_at_fence = state.others;
  state.fenced = state.seen[lane()]++;
}

}  // namespace shim::race

// What the compiler calls.
#define SHIM_SEE(size, kind)                                                              \
  if (!shim::race::watching) return;                                                     \
  const shim::race::Pause pause;                                                         \
  shim::race::access(address, size, shim::race::kind, __builtin_return_address(0))
#define SHIM_ACCESSES(bytes)                                                             \
  SHIM_C void __tsan_read##bytes(void* address) { SHIM_SEE(bytes, kRead); }              \
  SHIM_C void __tsan_write##bytes(void* address) { SHIM_SEE(bytes, kWrite); }            \
  SHIM_C void __tsan_unaligned_read##bytes(void* address) { SHIM_SEE(bytes, kRead); }    \
  SHIM_C void __tsan_unaligned_write##bytes(void* address) { SHIM_SEE(bytes, kWrite); }
#define SHIM_C extern "C" SHIM_HIDDEN

SHIM_ACCESSES(1)
SHIM_ACCESSES(2)
SHIM_ACCESSES(4)
SHIM_ACCESSES(8)
SHIM_ACCESSES(16)
SHIM_C void __tsan_read_range(void* address, size_t bytes) { SHIM_SEE(bytes, kRead); }
SHIM_C void __tsan_write_range(void* address, size_t bytes) { SHIM_SEE(bytes, kWrite); }
SHIM_C void __tsan_vptr_read(void**) {}
SHIM_C void __tsan_vptr_update(void**, void*) {}
SHIM_C void __tsan_func_entry(void*) {}
SHIM_C void __tsan_func_exit() {}
SHIM_C void __tsan_init() {}
