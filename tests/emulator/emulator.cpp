#include "emulator.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda.h"
#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

constexpr int kLanes = 32;
constexpr size_t kMostShared = 227 * 1024, kSharedWithoutAsking = 48 * 1024;
constexpr uint32_t kBase = 1024;  // where a block's shared memory begins: the system has the first KiB
constexpr int kRankShift = 24;    // of addresses in a cluster: rank + 1 above it, 0 for the own block
constexpr size_t kStackBytes = 256 * 1024;
constexpr int64_t kMostBarrierBytes = (1 << 20) - 1;
constexpr uint64_t kBarrierWord = 0x6261727269657221;  // what a barrier's memory holds while nobody spoils it
constexpr uint8_t kPoison = 0xff;                      // makes NaN of every dtype

struct Block;
struct Warp;
struct Fiber;

// One group of bulk_commit.
struct Group {
  int unread = 0, unwritten = 0;  // copies
  bool seen_read = false;         // by a wait of the thread
  Fiber* waiter = nullptr;
  struct Source {
    Site site;
    uint32_t offset, bytes;
  };
  std::vector<Source> sources;
};

struct Fiber {
  jmp_buf jump;
  ucontext_t start;
  uint8_t* stack;
  bool started, left, met, any;
  Block* block;
  Warp* warp;
  int lane;
  uint3 index;
  // Of the last function that it entered.
  const char* name;
  Site site;
  uint32_t barrier, parity;  // of an mbarrier that it waits for; 0 otherwise
  uint64_t fenced;           // when, by Machine::clock
  std::vector<uint32_t> unfenced_barriers;
  std::shared_ptr<Group> open;  // before bulk_commit
  std::vector<std::shared_ptr<Group>> groups;
  bool in_cluster_barrier;
  uint64_t cluster_phase;  // that it waits for the end of
};

// What lanes of a warp are about to do together.
struct Meeting {
  bool active = false, one_instruction;
  uint32_t mask, arrived;
  const char* name;
  Site site;
  void* arguments[kLanes];
  Operation operation;
};

struct Warp {
  Block* block;
  int number;
  uint32_t ready, alive, all;
  Fiber* lanes[kLanes];
  Meeting meetings[kLanes];  // by the lowest lane of the mask
};

struct Barrier {
  uint32_t expected, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool fenced = false, from_cluster = false;
  Site site;
  std::vector<Fiber*> waiters;
};

struct Named {
  int threads = 0, came = 0;
  bool any = false;
  std::vector<uint32_t> lanes;  // that came, by warp
  std::vector<Fiber*> waiters;
};

// 16 bytes of shared memory.
struct Chunk {
  uint64_t written;     // when; by store_matrix, and in any way where `strict`
  const Warp* warp;     // that wrote it,
  const Fiber* thread;  // or the one thread
  Site site;
  uint16_t loading, storing;  // copies that still write it; that the thread has not yet waited for to have read it
};

struct Block {
  uint8_t* memory;
  std::vector<uint8_t> known;  // what was there when a thread last called, where `strict`
  uint32_t bytes, rank;
  uint3 index;
  int alive, flights;  // copies to its memory
  std::vector<Warp*> warps;
  std::map<uint32_t, Barrier> barriers;
  Named named[16];
  std::vector<Chunk> chunks;
};

struct Copy {
  uint64_t due, order;
  Site site;
  std::function<void()> run;
  bool operator<(const Copy& other) const { return due != other.due ? due > other.due : order > other.order; }
};

struct Count {
  int64_t calls = 0, wavefronts = 0, worst = 0, matrices = 0, early = 0;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Machine {
  // Settings.
  uint64_t seed = 0;
  int processors = 132;
  bool strict = false;

  std::string message, refusal;
  std::map<std::tuple<const char*, int, const char*>, Count> counts;
  std::map<const void*, int> allowed;
  std::vector<uint8_t*> stacks;
  std::vector<uint8_t*> memories;

  // Of a launch.
  const Launch* launch = nullptr;
  std::mt19937_64 random;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  Site copy_site{nullptr, 0};  // of the copy that runs
  jmp_buf after_copy;          // where a signal in it leads

  // Of a cluster.
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Block>> blocks;
  std::priority_queue<Copy> copies;
  uint64_t step = 0, clock = 0, asked = 0, idle_polls = 0;
  int alive = 0, cluster_came = 0;
  uint64_t cluster_phase = 0;
  std::vector<Fiber*> cluster_waiters;
  size_t warp_cursor = 0;
  int lane_cursor = -1;
  std::vector<size_t> order;  // of the warps, which changes when `until` is reached
  uint64_t until = 0;
};

Machine m;

std::string formatted(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = formatted(format, arguments);
  va_end(arguments);
  return result;
}

std::string place(Site site) {
  if (site.file == nullptr) return "before its first call";
  const char* slash = strrchr(site.file, '/');
  return text("%s:%d", slash == nullptr ? site.file : slash + 1, site.line);
}

std::string name_of(const Block& block) {
  return m.launch->grid[1] == 1 && m.launch->grid[2] == 1
             ? text("block %u", block.index.x)
             : text("block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
}

Count& counted(const char* name, Site site) { return m.counts[{site.file, site.line, name}]; }

uint64_t draw(uint64_t below) { return m.random() % below; }

// ------------------------------------------------------------------------------------------------ fibers

__attribute__((noinline)) void suspend() {
  if (_setjmp(m.current->jump) == 0) _longjmp(m.scheduler, 1);
}

uint32_t bit_of(const Fiber& fiber) { return 1u << fiber.lane; }

void wake(Fiber& fiber) { fiber.warp->ready |= bit_of(fiber); }

void sleep() {
  Fiber& fiber = *m.current;
  fiber.warp->ready &= ~bit_of(fiber);
  suspend();
}

// Until somebody sets `met`.
void sleep_until_met() {
  Fiber& fiber = *m.current;
  while (!fiber.met) sleep();
}

void meet(Fiber& fiber) {
  fiber.met = true;
  wake(fiber);
}

void leave();

void run_fiber() {
  m.launch->call(m.launch->arguments);
  leave();
}

// Whether the fiber went on without failing.
__attribute__((noinline)) bool resume(Fiber& fiber) {
  m.current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block->index;
  const int how = _setjmp(m.scheduler);
  if (how == 0) {
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  m.current = nullptr;
  return how == 1;
}

uint8_t* mapped(size_t bytes) {  // with a page before and one after that nobody may touch
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* all = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw Failure("no memory for the emulator's threads");
  uint8_t* inside = static_cast<uint8_t*>(all) + page;
  mprotect(inside, bytes, PROT_READ | PROT_WRITE);
  return inside;
}

// ------------------------------------------------------------------------------------------------ shared memory

// The bytes of this block's shared memory at an address.
uint32_t offset_of(const char* what, uint32_t address, uint32_t bytes, uint32_t alignment) {
  const Block& block = *m.current->block;
  if (address >> kRankShift != 0) fail("%s: %#x is an address of the cluster, not of the block", what, address);
  if (address < kBase || address - kBase + static_cast<uint64_t>(bytes) > block.bytes)
    fail("%s: %u bytes at offset %lld lie outside of the block's %u bytes of shared memory", what, bytes,
         static_cast<long long>(address) - kBase, block.bytes);
  if (address % alignment != 0)
    fail("%s: offset %u in shared memory is not a multiple of %u", what, address - kBase, alignment);
  return address - kBase;
}

struct Place {
  Block* block;
  uint32_t offset;
};

Place place_in_cluster(const char* what, uint32_t address, uint32_t bytes, uint32_t alignment) {
  const uint32_t above = address >> kRankShift;
  Block* own = m.current->block;
  if (above > m.blocks.size()) fail("%s: %#x is no address of the cluster", what, address);
  Block* block = above == 0 ? own : m.blocks[above - 1].get();
  const uint32_t offset = offset_of(what, address & ((1u << kRankShift) - 1), bytes, alignment);
  if (block != own && m.cluster_phase == 0)
    fail("%s: block %u of the cluster may not have started, there was no cluster_wait", what, block->rank);
  if (block != own && block->alive == 0) fail("%s: block %u of the cluster has left", what, block->rank);
  return {block, offset};
}

template <class Action>
void for_chunks(Block& block, uint32_t offset, uint32_t bytes, Action action) {
  for (uint32_t i = offset / 16; i < (offset + bytes + 15) / 16; ++i) action(block.chunks[i]);
}

// That all who wrote these bytes by store_matrix have fenced since.
void check_fenced(const char* what, Block& block, uint32_t offset, uint32_t bytes) {
  for_chunks(block, offset, bytes, [&](const Chunk& chunk) {
    if (chunk.written == 0) return;
    for (const Fiber* lane : chunk.warp->lanes)
      if (lane != nullptr && lane->fenced < chunk.written && (chunk.thread == nullptr || chunk.thread == lane))
        fail("%s: bytes that were written %s %s by warp %d, whose lane %d has not passed fence_proxy_async since", what,
             chunk.thread == nullptr ? "at" : "before", place(chunk.site).c_str(), chunk.warp->number, lane->lane);
  });
}

void check_writable(const Chunk& chunk, uint32_t offset) {
  if (chunk.loading != 0) fail("offset %u is written while a copy to it is under way", offset);
  if (chunk.storing != 0)
    fail("offset %u is written: a copy from it was asked for at %s, and bulk_wait_read has not passed since", offset,
         place(chunk.site).c_str());
}

// After the emulator itself has written.
void know(Block& block, uint32_t offset, uint32_t bytes) {
  if (m.strict) memcpy(block.known.data() + offset, block.memory + offset, bytes);
}

// What the thread has written through pointers since it last called: nobody else has run.
void note_writes() {
  const Fiber& fiber = *m.current;
  Block& block = *fiber.block;
  constexpr uint32_t kStep = 4096;
  for (uint32_t start = 0; start < block.bytes; start += kStep) {
    const uint32_t end = std::min(start + kStep, block.bytes);
    if (memcmp(block.memory + start, block.known.data() + start, end - start) == 0) continue;
    for (uint32_t offset = start; offset < end; offset += 16) {
      const uint32_t bytes = std::min(16u, end - offset);
      if (memcmp(block.memory + offset, block.known.data() + offset, bytes) == 0) continue;
      Chunk& chunk = block.chunks[offset / 16];
      check_writable(chunk, offset);
      chunk.written = ++m.clock;
      chunk.warp = fiber.warp;
      chunk.thread = &fiber;
      chunk.site = fiber.site;
    }
    know(block, start, end - start);
  }
}

// ------------------------------------------------------------------------------------------------ mbarriers

std::string state_of(const Barrier& barrier) {
  return text("phase %llu lacks %u of %u arrivals and %lld bytes", static_cast<unsigned long long>(barrier.phase),
              barrier.pending, barrier.expected, static_cast<long long>(barrier.bytes));
}

Barrier& barrier_at(Block& block, uint32_t offset) {
  const auto found = block.barriers.find(offset);
  if (found == block.barriers.end()) fail("the barrier at offset %u was not initialised", offset);
  if (memcmp(block.memory + offset, &kBarrierWord, 8) != 0) fail("the barrier at offset %u was overwritten", offset);
  return found->second;
}

Barrier& barrier_at(uint32_t address) { return barrier_at(*m.current->block, offset_of("a barrier", address, 8, 8)); }

// Of a barrier that a copy is to complete on.
void check_barrier_for_copy(Block& block, uint32_t offset) {
  const Barrier& barrier = barrier_at(block, offset);
  if (!barrier.fenced)
    fail("the barrier at offset %u was initialised at %s by a thread that has not passed fence_barrier_init since",
         offset, place(barrier.site).c_str());
}

void settle(Barrier& barrier, uint32_t offset) {
  if (barrier.pending != 0) return;
  if (barrier.bytes < 0)
    fail("the barrier at offset %u got %lld bytes more than its phase %llu was told to expect", offset,
         static_cast<long long>(-barrier.bytes), static_cast<unsigned long long>(barrier.phase));
  if (barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  m.idle_polls = 0;
  for (Fiber* waiter : barrier.waiters) wake(*waiter);
  barrier.waiters.clear();
}

void complete(Block& block, uint32_t offset, uint32_t bytes) {
  Barrier& barrier = barrier_at(block, offset);
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMostBarrierBytes) fail("the barrier at offset %u got too many bytes", offset);
  settle(barrier, offset);
}

// ------------------------------------------------------------------------------------------------ copy engine

// Some time later: soon, or after others have gone on for long.
void later(Site site, std::function<void()> run) {
  const uint64_t steps = 1 + draw(uint64_t{1} << draw(14));
  m.copies.push({m.step + steps, m.asked++, site, std::move(run)});
}

__attribute__((noinline)) void run_copy(const Copy& copy) {
  m.copy_site = copy.site;
  if (_setjmp(m.after_copy) != 0) fail("an access where there is nothing");
  copy.run();
  m.copy_site = {nullptr, 0};
}

void run_first_copy() {
  const Copy copy = m.copies.top();
  m.copies.pop();
  m.idle_polls = 0;
  run_copy(copy);
}

// A tensor map as the emulator keeps it in the driver's 128 bytes.
struct Map {
  uint64_t magic;
  uint8_t* data;
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t rank, element, span, unused[3];  // span: bytes of the swizzle's rows, 0 without
  uint64_t strides[4];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
constexpr uint64_t kMapMagic = 0x72656e736f72206d;

uint32_t bytes_of(const Map& map) {
  uint32_t bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Acts on the address: its bits 4 to 6 change with bits 7 to 9 (and fewer of both for narrower rows).
uint32_t swizzled_address(const Map& map, uint32_t address) {
  return map.span == 0 ? address : address ^ ((address >> 7 & (map.span / 16u - 1)) << 4);
}

// Every element of a box: where it is in shared memory, counted from the box's start at `address`, and in the tensor
// (null outside).
template <class Action>
void for_box(const Map& map, const int32_t* at, uint32_t address, Action action) {
  const uint32_t elements = bytes_of(map) / map.element;
  for (uint32_t i = 0; i < elements; ++i) {
    uint32_t rest = i;
    bool inside = true;
    int64_t offset = 0;
    for (int d = 0; d < map.rank; ++d) {
      const int64_t x = int64_t{at[d]} + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && x >= 0 && x < map.sizes[d];
      offset += x * static_cast<int64_t>(d == 0 ? map.element : map.strides[d - 1]);
    }
    action(swizzled_address(map, address + i * map.element) - address, inside ? map.data + offset : nullptr);
  }
}

Map map_at(const char* what, const void* pointer, int rank) {
  Map map;
  memcpy(&map, pointer, sizeof(map));
  if (map.magic != kMapMagic) fail("%s: this is no tensor map", what);
  if (reinterpret_cast<uintptr_t>(pointer) % 64 != 0) fail("%s: a tensor map is aligned to 64 bytes", what);
  if (map.rank != rank) fail("%s: the map has %d dimensions, not %d", what, map.rank, rank);
  return map;
}

// A copy into shared memory: what is there is gone as soon as it is asked for.
void load(Block& block, uint32_t offset, uint32_t bytes, Block& of_barrier, uint32_t barrier,
          std::function<void(uint8_t*)> fill) {
  const Site site = m.current->site;
  check_fenced(m.current->name, block, offset, bytes);
  for_chunks(block, offset, bytes, [&](Chunk& chunk) {
    if (chunk.storing != 0)
      fail("%s: a copy from these bytes was asked for at %s, and bulk_wait_read has not passed since", m.current->name,
           place(chunk.site).c_str());
    if (chunk.loading != 0) fail("%s: another copy to these bytes is still under way", m.current->name);
    ++chunk.loading;
  });
  memset(block.memory + offset, kPoison, bytes);
  know(block, offset, bytes);
  ++block.flights;
  ++counted(m.current->name, site).calls;
  later(site, [&block, offset, bytes, &of_barrier, barrier, fill] {
    fill(block.memory + offset);
    know(block, offset, bytes);
    for_chunks(block, offset, bytes, [](Chunk& chunk) {
      --chunk.loading;
      chunk.written = 0;
    });
    --block.flights;
    complete(of_barrier, barrier, bytes);
  });
}

// A copy from shared memory: read some time later, written some time after.
void store(uint32_t offset, uint32_t bytes, std::function<void(const uint8_t*)> write) {
  Fiber& fiber = *m.current;
  Block& block = *fiber.block;
  const Site site = fiber.site;
  check_fenced(fiber.name, block, offset, bytes);
  for_chunks(block, offset, bytes, [&](Chunk& chunk) {
    if (chunk.loading != 0) fail("%s: a copy to these bytes is still under way", fiber.name);
    ++chunk.storing;
    chunk.site = site;
  });
  ++counted(fiber.name, site).calls;
  if (fiber.open == nullptr) fiber.open = std::make_shared<Group>();
  const std::shared_ptr<Group> group = fiber.open;
  ++group->unread;
  ++group->unwritten;
  group->sources.push_back({site, offset, bytes});
  later(site, [&block, offset, bytes, write, group, site] {
    auto taken = std::make_shared<std::vector<uint8_t>>(block.memory + offset, block.memory + offset + bytes);
    --group->unread;
    if (group->waiter != nullptr) wake(*group->waiter);
    later(site, [taken, write, group] {
      write(taken->data());
      --group->unwritten;
      if (group->waiter != nullptr) wake(*group->waiter);
    });
  });
}

// ------------------------------------------------------------------------------------------------ meetings

bool complete_meeting(Warp& warp, Meeting& meeting) {
  const uint32_t needed = meeting.one_instruction ? meeting.mask : meeting.mask & warp.alive;
  if (!meeting.active || (meeting.arrived & needed) != needed) return false;
  meeting.active = false;
  m.idle_polls = 0;
  ++counted(meeting.name, meeting.site).calls;
  meeting.operation(meeting.arguments, meeting.mask);
  for (int lane = 0; lane < kLanes; ++lane)
    if (meeting.arrived >> lane & 1) meet(*warp.lanes[lane]);
  return true;
}

bool complete_named(Block& block, int name) {
  Named& barrier = block.named[name];
  const int needed = name == 0 ? block.alive : barrier.threads;
  if (barrier.came == 0 || barrier.came < needed) return false;
  if (name != 0)
    for (size_t i = 0; i < barrier.lanes.size(); ++i)
      if (barrier.lanes[i] != 0 && barrier.lanes[i] != block.warps[i]->all)
        fail("named barrier %d: of warp %zu came only the lanes %#x", name, i, barrier.lanes[i]);
  m.idle_polls = 0;
  for (Fiber* waiter : barrier.waiters) waiter->any = barrier.any, meet(*waiter);
  barrier = {};
  return true;
}

bool complete_cluster_barrier() {
  if (m.cluster_came == 0 || m.cluster_came < m.alive) return false;
  m.cluster_came = 0;
  ++m.cluster_phase;
  m.idle_polls = 0;
  for (Fiber* waiter : m.cluster_waiters) wake(*waiter);
  m.cluster_waiters.clear();
  return true;
}

void leave() {
  Fiber& fiber = *m.current;
  Warp& warp = *fiber.warp;
  Block& block = *fiber.block;
  fiber.name = "the kernel's end";
  if (m.strict) note_writes();
  if (fiber.open != nullptr)
    fail("a copy was asked for at %s without a bulk_commit after it", place(fiber.open->sources[0].site).c_str());
  for (const auto& group : fiber.groups)
    if (!group->seen_read)
      fail("shared memory that a copy is to read, asked for at %s, is given back without a bulk_wait_read",
           place(group->sources[0].site).c_str());
  if (fiber.in_cluster_barrier) fail("cluster_arrive without a cluster_wait after it");
  warp.alive &= ~bit_of(fiber);
  warp.ready &= ~bit_of(fiber);
  fiber.left = true;
  --m.alive;
  if (--block.alive == 0 && block.flights > 0)
    fail("the block has left, and copies to its shared memory are still under way");
  for (Meeting& meeting : warp.meetings) {
    if (meeting.active && meeting.one_instruction)
      fail("other lanes of the warp wait in %s at %s", meeting.name, place(meeting.site).c_str());
    complete_meeting(warp, meeting);
  }
  complete_named(block, 0);
  complete_cluster_barrier();
  _longjmp(m.scheduler, 1);
}

// ------------------------------------------------------------------------------------------------ scheduler

std::string describe(const Fiber& fiber) {
  if (fiber.left) return "left";
  std::string result = text("%s at %s", fiber.name == nullptr ? "" : fiber.name, place(fiber.site).c_str());
  if (fiber.barrier != 0) {
    const auto found = fiber.block->barriers.find(fiber.barrier - kBase);
    result += text(", parity %u of the barrier at offset %u", fiber.parity, fiber.barrier - kBase);
    if (found != fiber.block->barriers.end()) result += " (" + state_of(found->second) + ")";
  }
  return result;
}

[[noreturn]] void deadlock() {
  std::string message = "deadlock: no thread can go on";
  for (const auto& warp : m.warps) {
    std::map<std::string, std::vector<int>> groups;
    for (const Fiber* lane : warp->lanes)
      if (lane != nullptr) groups[describe(*lane)].push_back(lane->lane);
    for (const auto& [what, lanes] : groups) {
      message += "\n  " + name_of(*warp->block) + text(", warp %d, ", warp->number);
      if (lanes.size() == kLanes)
        message += "all lanes: ";
      else if (lanes.size() == 1)
        message += text("lane %d: ", lanes[0]);
      else
        message += text("%zu lanes from %d to %d: ", lanes.size(), lanes.front(), lanes.back());
      message += what;
    }
  }
  throw Failure(message);
}

Fiber* choose() {
  if (m.seed == 0) {  // in turn: lanes of a warp, then the next warp
    for (size_t tried = 0; tried <= m.warps.size(); ++tried) {
      Warp& warp = *m.warps[m.warp_cursor];
      const uint32_t higher = m.lane_cursor < 0 ? ~0u : m.lane_cursor == 31 ? 0 : ~0u << (m.lane_cursor + 1);
      if ((warp.ready & higher) != 0) {
        m.lane_cursor = __builtin_ctz(warp.ready & higher);
        return warp.lanes[m.lane_cursor];
      }
      m.warp_cursor = (m.warp_cursor + 1) % m.warps.size();
      m.lane_cursor = -1;
    }
    return nullptr;
  }
  // At random: one warp goes on as far as it can, then another, so that some are far ahead; then all change places.
  if (m.step >= m.until) {
    m.until = m.step + (uint64_t{1} << draw(13));
    std::shuffle(m.order.begin(), m.order.end(), m.random);
  }
  for (const size_t index : m.order) {
    Warp& warp = *m.warps[index];
    if (warp.ready == 0) continue;
    uint32_t ready = warp.ready;
    for (uint64_t skipped = draw(static_cast<uint64_t>(__builtin_popcount(ready))); skipped > 0; --skipped)
      ready &= ready - 1;
    return warp.lanes[__builtin_ctz(ready)];
  }
  return nullptr;
}

__attribute__((noinline)) void prepare_start(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
}

void prepare_cluster(const Launch& launch, uint32_t number) {
  m.fibers.clear();
  m.warps.clear();
  m.blocks.clear();
  m.copies = {};
  m.cluster_waiters.clear();
  m.step = m.asked = m.idle_polls = m.cluster_phase = m.until = 0;
  m.clock = 1;
  m.cluster_came = 0;
  m.warp_cursor = 0;
  m.lane_cursor = -1;
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  m.alive = static_cast<int>(threads * launch.cluster);
  for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
    m.blocks.push_back(std::make_unique<Block>());
    Block& block = *m.blocks.back();
    const uint32_t along = launch.grid[0] / launch.cluster;
    block.index = {number % along * launch.cluster + rank, number / along % launch.grid[1],
                   number / along / launch.grid[1]};
    block.rank = rank;
    block.alive = static_cast<int>(threads);
    block.flights = 0;
    block.bytes = static_cast<uint32_t>(launch.shared_bytes);
    if (m.memories.size() <= rank) m.memories.push_back(mapped(kMostShared + 1024));
    // The end of the block's memory lies as near to the page that nobody may touch as the alignment lets it.
    block.memory = m.memories[rank] + (kMostShared + 1024 - block.bytes) / 1024 * 1024;
    memset(m.memories[rank], kPoison, kMostShared + 1024);
    block.chunks.resize(block.bytes / 16 + 1);
    if (m.strict) block.known.assign(block.bytes, kPoison);
    for (uint32_t thread = 0; thread < threads; ++thread) {
      if (thread % kLanes == 0) {
        m.warps.push_back(std::make_unique<Warp>());
        Warp& warp = *m.warps.back();
        warp.block = &block;
        warp.number = static_cast<int>(thread / kLanes);
        const uint32_t lanes = std::min<uint32_t>(kLanes, threads - thread);
        warp.ready = warp.alive = warp.all = lanes == kLanes ? ~0u : (1u << lanes) - 1;
        for (Fiber*& lane : warp.lanes) lane = nullptr;
        block.warps.push_back(&warp);
      }
      if (m.stacks.size() <= m.fibers.size()) m.stacks.push_back(mapped(kStackBytes));
      auto fiber = std::make_unique<Fiber>();
      fiber->stack = m.stacks[m.fibers.size()];
      fiber->block = &block;
      fiber->warp = m.warps.back().get();
      fiber->lane = static_cast<int>(thread % kLanes);
      fiber->warp->lanes[fiber->lane] = fiber.get();
      fiber->index = {thread % launch.block[0], thread / launch.block[0] % launch.block[1],
                      thread / launch.block[0] / launch.block[1]};
      prepare_start(*fiber);
      m.fibers.push_back(std::move(fiber));
    }
  }
  m.order.resize(m.warps.size());
  for (size_t i = 0; i < m.order.size(); ++i) m.order[i] = i;
}

void run_cluster() {
  while (m.alive > 0 || !m.copies.empty()) {
    ++m.step;
    while (!m.copies.empty() && m.copies.top().due <= m.step) run_first_copy();
    Fiber* fiber = choose();
    if (fiber == nullptr) {
      if (m.copies.empty()) {
        if (m.alive == 0) break;
        deadlock();
      }
      m.step = m.copies.top().due;
      continue;
    }
    if (!resume(*fiber)) throw Failure(m.message);
    if (m.idle_polls > 1000 * m.fibers.size() && m.copies.empty()) deadlock();
  }
  for (const auto& block : m.blocks) {
    const uint8_t* start = m.memories[block->rank];
    for (const uint8_t* byte = start; byte < start + kMostShared + 1024; ++byte) {
      if (byte == block->memory) byte += block->bytes;
      if (byte < start + kMostShared + 1024 && *byte != kPoison)
        throw Failure(text("%s has written outside of its %u bytes of shared memory, at offset %td",
                           name_of(*block).c_str(), block->bytes, byte - block->memory));
    }
  }
}

// ------------------------------------------------------------------------------------------------ signals

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};

// The instruction that a signal is of, as the library's file has it.
std::string instruction(const siginfo_t* info, const void* context) {
  const void* address = info->si_addr;
#if defined(__x86_64__)
  address = reinterpret_cast<void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  address = reinterpret_cast<void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#endif
  Dl_info library;
  if (dladdr(address, &library) == 0) return "after";
  return text("at <%td>, after", static_cast<const uint8_t*>(address) - static_cast<const uint8_t*>(library.dli_fbase));
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (m.current == nullptr && m.copy_site.file != nullptr) _longjmp(m.after_copy, 1);
  if (m.current == nullptr) {  // not a kernel's
    ::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  const std::string where = instruction(info, context);
  if (signal == SIGFPE) fail("a division by zero, or the like, %s:", where.c_str());
  if (signal == SIGILL || signal == SIGTRAP)
    fail("an access that is not aligned, an index outside of an array, or the like, %s:", where.c_str());
  constexpr size_t kNear = 64 * 1024;
  const uint8_t* address = static_cast<const uint8_t*>(info->si_addr);
  for (const auto& block : m.blocks)
    if (address >= m.memories[block->rank] - kNear && address < m.memories[block->rank] + kMostShared + kNear)
      fail("an access at offset %td of block %u's %u bytes of shared memory, %s:", address - block->memory, block->rank,
           block->bytes, where.c_str());
  for (const auto& fiber : m.fibers)
    if (address < fiber->stack && address >= fiber->stack - kNear) fail("the stack has no room, %s:", where.c_str());
  fail("an access at %p, where there is nothing, %s:", info->si_addr, where.c_str());
}

struct Signals {
  struct sigaction before[std::size(kSignals)];
  stack_t stack_before;
  std::vector<uint8_t> stack = std::vector<uint8_t>(64 * 1024);

  Signals() {
    stack_t own{};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before[i]);
  }
  ~Signals() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

}  // namespace

// ------------------------------------------------------------------------------------------------ what kernels call

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string message = formatted(format, arguments);
  va_end(arguments);
  if (m.current == nullptr) {
    if (m.copy_site.file != nullptr) message += ", by the copy asked for at " + place(m.copy_site);
    throw Failure(message);
  }
  const Fiber& fiber = *m.current;
  m.message = message + text("\n  %s, warp %d, lane %d, in %s at %s", name_of(*fiber.block).c_str(), fiber.warp->number,
                             fiber.lane, fiber.name == nullptr ? "the kernel" : fiber.name, place(fiber.site).c_str());
  _longjmp(m.scheduler, 2);
}

void enter(const char* name, Site site) {
  if (m.current == nullptr) throw Failure(text("%s outside of a kernel", name));
  m.current->name = name;
  m.current->site = site;
  if (m.strict) note_writes();
  m.current->barrier = 0;
  m.current->met = false;
  if (m.seed != 0 && draw(16) == 0) suspend();
}

int lane() { return m.current->lane; }

uint8_t* shared_memory() { return m.current->block->memory; }

uint32_t shared_address(const void* pointer) {
  const Block& block = *m.current->block;
  const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - block.memory;
  if (offset < 0 || offset > block.bytes) fail("the pointer is not one into the block's shared memory");
  return kBase + static_cast<uint32_t>(offset);
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block& block = *m.current->block;
  const uint32_t offset = offset_of("a barrier", address, 8, 8);
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier takes 1 to 2^20 - 1 arrivals, got %u", arrivals);
  if (block.barriers.count(offset) != 0) fail("the barrier at offset %u is one already", offset);
  Barrier barrier;
  barrier.expected = barrier.pending = arrivals;
  barrier.site = m.current->site;
  block.barriers[offset] = barrier;
  memcpy(block.memory + offset, &kBarrierWord, 8);
  know(block, offset, 8);
  m.current->unfenced_barriers.push_back(offset);
}

void fence_barrier_init() {
  for (const uint32_t offset : m.current->unfenced_barriers) m.current->block->barriers[offset].fenced = true;
  m.current->unfenced_barriers.clear();
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBarrierBytes)
    fail("a phase takes 2^20 - 1 bytes at most, got %lld", static_cast<long long>(barrier.bytes));
  if (barrier.pending == 0)
    fail("an arrival beyond the %u that a phase takes: phase %llu only waits for %lld bytes", barrier.expected,
         static_cast<unsigned long long>(barrier.phase), static_cast<long long>(barrier.bytes));
  --barrier.pending;
  settle(barrier, address - kBase);
}

bool barrier_passed(uint32_t address, uint32_t parity, bool of_cluster) {
  const Barrier& barrier = barrier_at(address);
  if (parity > 1) fail("a parity is 0 or 1, got %u", parity);
  if (barrier.from_cluster && !of_cluster)
    fail("other blocks write what this barrier tells of: barrier_wait_cluster is what sees it");
  return (barrier.phase & 1) != parity;
}

bool barrier_polled(uint32_t address, uint32_t parity) {
  if (barrier_passed(address, parity, false)) return true;
  m.current->barrier = address;
  m.current->parity = parity;
  ++m.idle_polls;
  m.until = 0;  // let others go on
  suspend();
  return false;
}

void barrier_wait(uint32_t address, uint32_t parity, bool of_cluster) {
  while (!barrier_passed(address, parity, of_cluster)) {
    m.current->barrier = address;
    m.current->parity = parity;
    barrier_at(address).waiters.push_back(m.current);
    sleep();
  }
}

void fence_proxy_async() {
  m.current->fenced = ++m.clock;
  fence_barrier_init();
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  Block& block = *m.current->block;
  const uint32_t offset = offset_of("bulk_load to", to, bytes, 16);
  const uint32_t of_barrier = offset_of("bulk_load's barrier", barrier, 8, 8);
  if (bytes % 16 != 0) fail("bulk_load: %u bytes are not a multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("bulk_load: %p is not a multiple of 16", from);
  check_barrier_for_copy(block, of_barrier);
  load(block, offset, bytes, block, of_barrier, [=](uint8_t* at) { memcpy(at, from, bytes); });
}

void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  const uint32_t offset = offset_of("bulk_store from", from, bytes, 16);
  if (bytes % 16 != 0) fail("bulk_store: %u bytes are not a multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("bulk_store: %p is not a multiple of 16", to);
  store(offset, bytes, [=](const uint8_t* taken) { memcpy(to, taken, bytes); });
}

// Where a box begins: beyond the tensor's end if it likes, but what begins before it ended in an illegal instruction on
// a GPU, so no kernel may ask for that.
std::vector<int32_t> place_of(const char* what, int rank, const int32_t* coordinates) {
  for (int d = 0; d < rank; ++d)
    if (coordinates[d] < 0)
      fail("%s: coordinate %d of the box is %d, before the tensor's begin", what, d, coordinates[d]);
  return {coordinates, coordinates + rank};
}

void tensor_load(uint32_t to, const void* pointer, int rank, const int32_t* coordinates, uint32_t barrier) {
  Block& block = *m.current->block;
  const Map map = map_at("tensor_load", pointer, rank);
  const uint32_t bytes = bytes_of(map), offset = offset_of("tensor_load to", to, bytes, 128);
  const uint32_t of_barrier = offset_of("tensor_load's barrier", barrier, 8, 8);
  check_barrier_for_copy(block, of_barrier);
  const std::vector<int32_t> at = place_of("tensor_load", rank, coordinates);
  load(block, offset, bytes, block, of_barrier, [=](uint8_t* memory) {
    for_box(map, at.data(), to, [&](uint32_t place, const uint8_t* from) {
      if (from != nullptr)
        memcpy(memory + place, from, map.element);
      else
        memset(memory + place, 0, map.element);
    });
  });
}

void tensor_store(const void* pointer, uint32_t from, int rank, const int32_t* coordinates) {
  const Map map = map_at("tensor_store", pointer, rank);
  const uint32_t bytes = bytes_of(map), offset = offset_of("tensor_store from", from, bytes, 128);
  const std::vector<int32_t> at = place_of("tensor_store", rank, coordinates);
  store(offset, bytes, [=](const uint8_t* taken) {
    for_box(map, at.data(), from, [&](uint32_t place, uint8_t* to) {
      if (to != nullptr) memcpy(to, taken + place, map.element);
    });
  });
}

void bulk_commit() {
  Fiber& fiber = *m.current;
  fiber.groups.push_back(fiber.open != nullptr ? fiber.open : std::make_shared<Group>());
  fiber.open = nullptr;
}

void bulk_wait(int pending, bool read) {
  Fiber& fiber = *m.current;
  const size_t done = fiber.groups.size() - std::min(fiber.groups.size(), static_cast<size_t>(pending));
  for (size_t i = 0; i < done; ++i) {
    Group& group = *fiber.groups[i];
    group.waiter = &fiber;
    while ((read ? group.unread : group.unwritten) > 0) sleep();
    group.waiter = nullptr;
    if (group.seen_read) continue;
    group.seen_read = true;
    for (const auto& source : group.sources)
      for_chunks(*fiber.block, source.offset, source.bytes, [](Chunk& chunk) { --chunk.storing; });
  }
  if (!read) fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + static_cast<ptrdiff_t>(done));
}

void block_sync() {
  Named& barrier = m.current->block->named[0];
  ++barrier.came;
  barrier.waiters.push_back(m.current);
  complete_named(*m.current->block, 0);
  sleep_until_met();
}

bool named_sync(int name, int threads, bool predicate) {
  Fiber& fiber = *m.current;
  Block& block = *fiber.block;
  if (name < 1 || name > 15) fail("named barriers are 1 to 15, got %d", name);
  const int most = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  if (threads % kLanes != 0 || threads < kLanes || threads > most)
    fail("a named barrier takes a multiple of 32 threads up to the block's %d, got %d", most, threads);
  Named& barrier = block.named[name];
  if (barrier.came == 0) {
    barrier.threads = threads;
    barrier.lanes.assign(block.warps.size(), 0);
  }
  if (barrier.threads != threads)
    fail("named barrier %d: %d threads are said to come, others said %d", name, threads, barrier.threads);
  uint32_t& lanes = barrier.lanes[static_cast<size_t>(fiber.warp->number)];
  if ((lanes & bit_of(fiber)) != 0) fail("named barrier %d: this thread comes twice before all have come", name);
  lanes |= bit_of(fiber);
  ++barrier.came;
  barrier.any |= predicate;
  barrier.waiters.push_back(&fiber);
  complete_named(block, name);
  sleep_until_met();
  return fiber.any;
}

uint32_t cluster_rank() { return m.current->block->rank; }

uint32_t cluster_address(uint32_t address, uint32_t rank) {
  if (rank >= m.blocks.size()) fail("the cluster has %zu blocks, not one of rank %u", m.blocks.size(), rank);
  if (address >> kRankShift != 0) fail("%#x is an address of the cluster already", address);
  return (rank + 1) << kRankShift | address;
}

void store_to_cluster(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  const Place target = place_in_cluster("store_to_cluster", to, bytes, bytes);
  const Place of_barrier = place_in_cluster("store_to_cluster's barrier", barrier, 8, 8);
  if (target.block != of_barrier.block) fail("store_to_cluster: the barrier is of another block than the bytes");
  check_barrier_for_copy(*target.block, of_barrier.offset);
  if (target.block != m.current->block) barrier_at(*target.block, of_barrier.offset).from_cluster = true;
  const std::vector<uint8_t> bytes_to_send(static_cast<const uint8_t*>(from),
                                           static_cast<const uint8_t*>(from) + bytes);
  load(*target.block, target.offset, bytes, *of_barrier.block, of_barrier.offset,
       [bytes_to_send](uint8_t* at) { memcpy(at, bytes_to_send.data(), bytes_to_send.size()); });
}

void cluster_arrive() {
  Fiber& fiber = *m.current;
  if (fiber.in_cluster_barrier) fail("cluster_arrive twice without a cluster_wait between");
  fiber.in_cluster_barrier = true;
  fiber.cluster_phase = m.cluster_phase;
  ++m.cluster_came;
  complete_cluster_barrier();
}

void cluster_wait() {
  Fiber& fiber = *m.current;
  if (!fiber.in_cluster_barrier) fail("cluster_wait without a cluster_arrive before it");
  while (m.cluster_phase == fiber.cluster_phase) {
    m.cluster_waiters.push_back(&fiber);
    sleep();
  }
  fiber.in_cluster_barrier = false;
}

void together(const char* name, uint32_t mask, void* argument, Operation operation, bool one_instruction) {
  Fiber& fiber = *m.current;
  Warp& warp = *fiber.warp;
  if ((mask & bit_of(fiber)) == 0) fail("%s: lane %d is not in the mask %#x", name, fiber.lane, mask);
  if (one_instruction && warp.alive != ~0u)
    fail("%s: all 32 lanes must come, and there are only %#x", name, warp.alive);
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (!meeting.active) {
    meeting = {true, one_instruction, mask, 0, name, fiber.site, {}, operation};
  } else if (meeting.name != name && strcmp(meeting.name, name) != 0) {
    fail("other lanes of the warp are in %s at %s", meeting.name, place(meeting.site).c_str());
  } else if (meeting.mask != mask) {
    fail("%s: the mask is %#x here, and %#x at %s", name, mask, meeting.mask, place(meeting.site).c_str());
  } else if (one_instruction && meeting.site.line != fiber.site.line) {
    fail("%s: other lanes of the warp are at %s", name, place(meeting.site).c_str());
  }
  meeting.arguments[fiber.lane] = argument;
  meeting.arrived |= bit_of(fiber);
  if (!complete_meeting(warp, meeting)) sleep_until_met();
}

uint32_t vote(const char* name, uint32_t mask, bool predicate) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } own{predicate, 0};
  together(
      name, mask, &own,
      [](void* const(&arguments)[kLanes], uint32_t) {
        uint32_t result = 0;
        for (int lane = 0; lane < kLanes; ++lane)
          if (arguments[lane] != nullptr && static_cast<Vote*>(arguments[lane])->predicate) result |= 1u << lane;
        for (void* argument : arguments)
          if (argument != nullptr) static_cast<Vote*>(argument)->result = result;
      },
      false);
  return own.result;
}

// ------------------------------------------------------------------------------------------------ matrices

namespace {

using Matrix = uint16_t[8][8];

// Lane t has row t / 4, columns 2 (t % 4) and + 1; of the transpose, the same.
uint32_t spread(const Matrix& matrix, int lane, bool transposed) {
  const int i = lane / 4, j = lane % 4 * 2;
  const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
  const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
  return low | high << 16;
}

void gather(Matrix& matrix, int lane, uint32_t word) {
  const int i = lane / 4, j = lane % 4 * 2;
  matrix[i][j] = static_cast<uint16_t>(word);
  matrix[i][j + 1] = static_cast<uint16_t>(word >> 16);
}

struct Matrices {
  uint32_t words[4];
  int count;
  uint32_t offset;  // of the lane's row
  bool transposed;
};

// The eight rows of a matrix go in one wavefront where they lie in different banks.
void count_wavefronts(void* const (&arguments)[kLanes]) {
  const int matrices = static_cast<const Matrices*>(arguments[0])->count;
  int64_t wavefronts = 0;
  for (int i = 0; i < matrices; ++i) {
    std::vector<uint32_t> rows[8];
    size_t most = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t offset = static_cast<const Matrices*>(arguments[8 * i + row])->offset;
      std::vector<uint32_t>& bank = rows[offset / 16 % 8];
      if (std::find(bank.begin(), bank.end(), offset) == bank.end()) bank.push_back(offset);
      most = std::max(most, bank.size());
    }
    wavefronts += static_cast<int64_t>(most);
  }
  Count& own = counted(m.current->name, m.current->site);
  own.wavefronts += wavefronts;
  own.matrices += matrices;
  own.worst = std::max(own.worst, wavefronts);
}

uint32_t row_offset(uint32_t row, int count) {
  if (m.current->lane >= 8 * count) return 0;  // nobody looks at it
  return offset_of(m.current->name, row, 16, 16);
}

}  // namespace

void load_matrices(uint32_t* to, int count, uint32_t row, bool transposed) {
  Matrices own{{}, count, row_offset(row, count), transposed};
  together(
      m.current->name, ~0u, &own,
      [](void* const(&arguments)[kLanes], uint32_t) {
        count_wavefronts(arguments);
        Block& block = *m.current->block;
        const Matrices& first = *static_cast<const Matrices*>(arguments[0]);
        for (int i = 0; i < first.count; ++i) {
          Matrix matrix;
          for (int r = 0; r < 8; ++r) {
            const uint32_t offset = static_cast<const Matrices*>(arguments[8 * i + r])->offset;
            // Poison by now: no mistake where nobody looks at what is read behind a tile's end.
            if (block.chunks[offset / 16].loading != 0) ++counted(m.current->name, m.current->site).early;
            memcpy(matrix[r], block.memory + offset, 16);
          }
          for (int lane = 0; lane < kLanes; ++lane)
            static_cast<Matrices*>(arguments[lane])->words[i] = spread(matrix, lane, first.transposed);
        }
      },
      true);
  memcpy(to, own.words, static_cast<size_t>(count) * 4);
}

void store_matrices(uint32_t row, const uint32_t* from, int count) {
  Matrices own{{}, count, row_offset(row, count), false};
  memcpy(own.words, from, static_cast<size_t>(count) * 4);
  together(
      m.current->name, ~0u, &own,
      [](void* const(&arguments)[kLanes], uint32_t) {
        count_wavefronts(arguments);
        Block& block = *m.current->block;
        const Matrices& first = *static_cast<const Matrices*>(arguments[0]);
        ++m.clock;
        for (int i = 0; i < first.count; ++i) {
          Matrix matrix;
          for (int lane = 0; lane < kLanes; ++lane)
            gather(matrix, lane, static_cast<const Matrices*>(arguments[lane])->words[i]);
          for (int r = 0; r < 8; ++r) {
            const uint32_t offset = static_cast<const Matrices*>(arguments[8 * i + r])->offset;
            Chunk& chunk = block.chunks[offset / 16];
            check_writable(chunk, offset);
            memcpy(block.memory + offset, matrix[r], 16);
            know(block, offset, 16);
            chunk.written = m.clock;
            chunk.warp = m.current->warp;
            chunk.thread = nullptr;
            chunk.site = m.current->site;
          }
        }
      },
      true);
}

uint32_t move_matrix(uint32_t word) {
  together(
      m.current->name, ~0u, &word,
      [](void* const(&arguments)[kLanes], uint32_t) {
        Matrix matrix;
        for (int lane = 0; lane < kLanes; ++lane) gather(matrix, lane, *static_cast<const uint32_t*>(arguments[lane]));
        for (int lane = 0; lane < kLanes; ++lane) *static_cast<uint32_t*>(arguments[lane]) = spread(matrix, lane, true);
      },
      true);
  return word;
}

float float_of_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

uint16_t bfloat16_of_float(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_of_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // zero and subnormals
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t half_of_float(float value) {
  if (value != value) return 0x7fff;
  const uint16_t sign = __float_as_uint(value) >> 31 != 0 ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (magnitude >= 65520.f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)  // counts of the smallest subnormal; nearbyint rounds to even
    return sign | static_cast<uint16_t>(nearbyintf(magnitude * 0x1p24f));
  const uint32_t bits = __float_as_uint(magnitude);
  return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

namespace {

struct Product {
  float* c;
  const uint32_t *a, *b;
};

template <bool kHalf>
float unpack(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
  return kHalf ? float_of_half(bits) : float_of_bfloat16(bits);
}

// 16 x k by k x 8: products are exact in float32, and are added one after another.
template <int kDepth, bool kHalf>
void multiply_all(void* const (&arguments)[kLanes], uint32_t) {
  float a[kDepth][16], b[kDepth][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = *static_cast<const Product*>(arguments[lane]);
    const int g = lane / 4, i = lane % 4 * 2;
    for (int one = 0; one < 2; ++one) {
      for (int word = 0; word < kDepth / 4; ++word)
        a[word / 2 * 8 + i + one][word % 2 * 8 + g] = unpack<kHalf>(own.a[word], one);
      for (int word = 0; word < kDepth / 8; ++word) b[word * 8 + i + one][g] = unpack<kHalf>(own.b[word], one);
      c[g][i + one] = own.c[one];
      c[g + 8][i + one] = own.c[2 + one];
    }
  }
  for (int depth = 0; depth < kDepth; ++depth)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) c[row][column] += a[depth][row] * b[depth][column];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = *static_cast<const Product*>(arguments[lane]);
    const int g = lane / 4, i = lane % 4 * 2;
    for (int one = 0; one < 2; ++one) {
      own.c[one] = c[g][i + one];
      own.c[2 + one] = c[g + 8][i + one];
    }
  }
}

}  // namespace

void multiply(float* c, const uint32_t* a, const uint32_t* b, int k, bool is_half) {
  Product own{c, a, b};
  const Operation operation = k == 16   ? is_half ? multiply_all<16, true> : multiply_all<16, false>
                              : is_half ? multiply_all<8, true>
                                        : multiply_all<8, false>;
  together("mma", ~0u, &own, operation, true);
}

// ------------------------------------------------------------------------------------------------ runtime

void refuse(const char* why) { m.refusal = why; }

int multiprocessors() { return m.processors; }

bool allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostShared) {
    refuse(text("a block has at most %zu bytes of shared memory, asked for %d", kMostShared, bytes).c_str());
    return false;
  }
  m.allowed[kernel] = bytes;
  return true;
}

bool launch(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
  const uint64_t blocks = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  const auto allowed = m.allowed.find(launch.kernel);
  const size_t room =
      allowed == m.allowed.end() ? kSharedWithoutAsking : std::max(kSharedWithoutAsking, size_t(allowed->second));
  const char* fault = nullptr;
  if (threads < 1 || threads > 1024) fault = "a block has 1 to 1024 threads";
  if (blocks == 0) fault = "there are no blocks";
  if (launch.cluster < 1 || launch.cluster > 16) fault = "a cluster has 1 to 16 blocks, along x";
  if (fault == nullptr && launch.grid[0] % launch.cluster != 0) fault = "the grid is no multiple of the cluster";
  if (launch.shared_bytes > room) fault = "more shared memory than cudaFuncSetAttribute allowed";
  if (fault != nullptr) {
    refuse(fault);
    return false;
  }
  m.launch = &launch;
  m.random.seed(m.seed);
  blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
  gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
  std::vector<uint32_t> clusters(blocks / launch.cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = static_cast<uint32_t>(i);
  if (m.seed != 0) std::shuffle(clusters.begin(), clusters.end(), m.random);
  const Signals signals;
  try {
    for (const uint32_t cluster : clusters) {
      prepare_cluster(launch, cluster);
      run_cluster();
    }
  } catch (const Failure& failure) {
    m.message = failure.what();
    m.copy_site = {nullptr, 0};
    m.current = nullptr;
    return false;
  }
  return true;
}

}  // namespace emulator

namespace {

CUresult encode_tiled(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto refused = [](const std::string& why) {
    emulator::refuse(("cuTensorMapEncodeTiled: " + why).c_str());
    return CUDA_ERROR_INVALID_VALUE;
  };
  emulator::Map map{};
  map.magic = emulator::kMapMagic;
  map.data = static_cast<uint8_t*>(data);
  map.element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8     ? 1
                : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT64 ? 8
                                                          : 2;
  constexpr uint8_t kSpans[] = {0, 32, 64, 128};
  map.span = kSpans[swizzle];
  if (rank < 1 || rank > 5) return refused("1 to 5 dimensions");
  map.rank = static_cast<uint8_t>(rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refused("the emulator has no interleaved layouts");
  if (reinterpret_cast<uintptr_t>(result) % 64 != 0) return refused("the map must be aligned to 64 bytes");
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return refused("the data must be aligned to 16 bytes");
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > UINT32_MAX) return refused("sizes are 1 to 2^32 - 1");
    if (box[i] < 1 || box[i] > 256) return refused("the box has 1 to 256 elements along each dimension");
    if (element_strides[i] != 1) return refused("the emulator has no strides between elements");
    map.sizes[i] = static_cast<uint32_t>(sizes[i]);
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i + 1 == rank) continue;
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return refused("strides are multiples of 16");
    map.strides[i] = strides[i];
  }
  const uint32_t inner = box[0] * map.element;
  if (inner % 16 != 0) return refused("the box's rows are multiples of 16 bytes");
  if (map.span != 0 && inner > map.span) return refused("the box's rows are longer than the swizzle's");
  if (map.span != 0 && inner < map.span) return refused("the emulator has no rows shorter than the swizzle's");
  if (emulator::bytes_of(map) > emulator::kMostShared) return refused("the box is larger than shared memory");
  memset(result, 0, sizeof(*result));
  memcpy(result, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) {
    *status = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorInvalidValue;
  }
  *function = reinterpret_cast<void*>(encode_tiled);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// What tests/emulator/__init__.py calls.
AR_EXPORT void emulator_begin(uint64_t seed, int processors, int strict) {
  emulator::m.strict = strict != 0;
  emulator::m.seed = seed;
  emulator::m.processors = processors;
  emulator::m.message.clear();
  emulator::m.refusal.clear();
  emulator::m.counts.clear();
}

AR_EXPORT const char* emulator_message() {
  return emulator::m.message.empty() ? emulator::m.refusal.c_str() : emulator::m.message.c_str();
}

// A line for each place: what Python has in Calls.
AR_EXPORT const char* emulator_report() {
  static std::string report;
  report.clear();
  for (const auto& [key, count] : emulator::m.counts) {
    const auto& [file, line, name] = key;
    report += emulator::text("%s\t%d\t%s", file, line, name);
    for (const int64_t number : {count.calls, count.matrices, count.wavefronts, count.worst, count.early})
      report += "\t" + std::to_string(number);
    report += "\n";
  }
  return report.c_str();
}
