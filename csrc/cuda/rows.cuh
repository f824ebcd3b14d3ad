// What the Hopper kernels of NCHW maps with rows of any length share.
//
// An image is one run of memory, whatever the length of its rows. A cluster takes whole images, each of its one or two
// blocks the same share of the channels; they tell each other their sums. A block takes its share in chunks of some
// channels that the copy engine brings into slots of shared memory. The first sweep over an image's chunks makes sums
// over all channels at every position; the second goes backwards, and begins with the chunks that are still in their
// slots: only what had to leave is read again, from L2. Loads are one warp's, and so are stores: the others, the
// workers, wait for a chunk and tell when they are done with it, so each goes at its own pace between the few barriers
// of an image.
//
// A row's 16-byte blocks are not its neighbours': row c begins c S % 8 elements after one. Rows whose numbers leave the
// same remainder by `classes` = 8 / gcd(S, 8) are alike; matrices of 16 channels are of one class. Columns of a matrix
// are blocks, so row c has its position s in column s + c S % 8, and in the first and the last columns there are
// elements of other rows: of no use to products that keep columns apart, to be left out of those that add them up.
#pragma once

#include <algorithm>

#include "gates.cuh"
#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kUnit = 128;             // channels: a multiple of 16 rows of every class
constexpr int kChunkMost = 32 * 1024;  // bytes, unless the least chunk has more
constexpr int kWarps = 16;             // workers
constexpr int kWorkers = 32 * kWarps;
constexpr int kThreads = kWorkers + 32;
constexpr int kColumnTiles = 2;                // of 16 columns, the most that a warp sums at once
constexpr int kOfHead = 32 * kWarps / kHeads;  // threads
constexpr int kTurns = 2;                      // of a thread, to all positions
constexpr int kMostPositions = kTurns * kOfHead;
constexpr int kExchanges = 2;              // between the blocks of a cluster, of an image
constexpr int kGap = 8;                    // floats between rows of channels
constexpr int kFrame = 8;                  // rows of zeros before the masks' first
constexpr int kBytesPerNanosecond = 3350;  // of an H100's memory
constexpr int kLoads = 32;                 // that are told apart: twice as many as slots, at least

// Shared memory begins with what its users find without a register: of each load a barrier that it has come and one
// that all workers are done with it, and its slot's address; two barriers of each exchange.
constexpr int kLoaded = 0, kUsed = kLoaded + 8 * kLoads, kTable = kUsed + 8 * kLoads,
              kExchangeBarriers = kTable + 4 * kLoads;
constexpr int kBeforeSlots = kExchangeBarriers + kExchanges * 2 * 8;

// How an image is cut, and where what lies in shared memory.
struct RowsCut {
  int classes, class_bits, tiles;  // of rows; its logarithm; of 16 columns, of a row
  int blocks;                      // of a cluster
  int channels;                    // of a block
  int chunk, chunks, chunk_bytes;  // channels of a chunk; chunks of a block
  int slots, slot_bytes;           // a chunk, and as much as its last rows' columns reach beyond it
  int stay;                        // chunks that are still there after the first sweep
  int pause;                       // nanoseconds from one cluster's begin to the next one's
  int teams;                       // of warps, that take chunks in turn in the second sweep
  int weights, weight_bytes;       // [buffers, weight_place] of 8 16-bit values; of a buffer
  int sums, columns, pitch;        // [classes, columns, pitch] floats
  int quads;                       // of positions
  int given;                       // what the other block gave, of sums and of numbers: exchanges' memory
  int masks;                       // [kFrame + 16 tiles, 8] of 16 bits: zeros before and behind
  int rest, bytes;
};

// Of weights, of a chunk: with a gap after each class but the last, so that matrices of a class and rows of adjacent
// channels touch all banks.
__host__ __device__ constexpr int weight_rows(const RowsCut& cut) { return cut.chunk + cut.classes - 1; }

// Of an exchange, what a block gives: sums of all columns at all positions, or a number of each warp (Exchange).
__host__ __device__ constexpr int exchange_bytes(const RowsCut& cut, int number) {
  return 16 * (number == 0 ? cut.columns * cut.quads : kWarps);
}

// What a kernel wants of it.
struct RowsNeeds {
  int columns;                // sums at every position that are kept
  int sums_of_channel;        // bytes of the memory of sums, at least, for each channel and the gap
  int buffers;                // of weights
  int rest, rest_of_channel;  // bytes besides
};

// How many clusters are launched for so many images.
inline int rows_clusters(const RowsCut& cut, int images) {
  return std::max(1, std::min(images, processors() / cut.blocks));
}

// Of one or two blocks; and of how many there are.
__host__ __device__ constexpr int cluster_of(const RowsCut& cut, int block) { return block >> (cut.blocks - 1); }

// No slots: it does not fit.
inline RowsCut rows_cut(int images, int channels, int positions, const RowsNeeds& needs) {
  RowsCut cut = {};
  cut.class_bits = positions % 8 == 0 ? 0 : positions % 4 == 0 ? 1 : positions % 2 == 0 ? 2 : 3;
  cut.classes = 1 << cut.class_bits;
  const int shift = cut.classes == 1 ? 0 : 8 - 8 / cut.classes;  // the most
  cut.tiles = (positions + shift + 15) / 16;
  if (channels < kUnit || channels % kUnit != 0 || cut.tiles > kColumnTiles * kWarps / cut.classes ||
      positions > kMostPositions)
    return cut;
  // Large chunks, of which fewer are waited for; but an even number of them, which two blocks share.
  const int least = cut.classes < 8 ? kUnit / 2 : kUnit;
  cut.chunk = 2 * kUnit;
  while (cut.chunk > least && (channels % (2 * cut.chunk) != 0 || 2 * cut.chunk * positions > kChunkMost))
    cut.chunk /= 2;
  cut.chunk_bytes = 2 * cut.chunk * positions;
  cut.slot_bytes = cut.chunk_bytes + 2 * (16 * cut.tiles - positions - ((cut.classes - 1) * positions & 7));
  cut.blocks = channels / cut.chunk % 2 == 0 ? 2 : 1;
  cut.channels = channels / cut.blocks;
  cut.chunks = cut.channels / cut.chunk;
  cut.teams = 16 * kWarps / cut.chunk;
  cut.columns = needs.columns;
  cut.quads = (positions + 3) / 4;
  cut.pitch = kFrame + 16 * cut.tiles + 4;  // every other column begins 8 banks before the one before
  int sums = cut.classes * cut.columns * cut.pitch * 4;
  if (sums < needs.sums_of_channel * (cut.channels + kGap)) sums = needs.sums_of_channel * (cut.channels + kGap);
  const int given = cut.blocks == 1 ? 0 : 2 * (exchange_bytes(cut, 0) + exchange_bytes(cut, 1));
  int at = 0;
  const auto take = [&](int bytes) {
    at += (bytes + 15) / 16 * 16;
    return at - (bytes + 15) / 16 * 16;
  };
  const auto lay_out = [&](int slots) {
    at = kBeforeSlots;
    take(slots * cut.slot_bytes);
    cut.weight_bytes = cut.chunks * weight_rows(cut) * 16;
    cut.weights = take(needs.buffers * cut.weight_bytes);
    cut.sums = take(sums);
    cut.given = take(given);
    cut.masks = take((kFrame + 16 * cut.tiles) * 16);
    cut.rest = take(needs.rest + needs.rest_of_channel * cut.channels);
    cut.bytes = at;
  };
  lay_out(0);
  const int slots = (kSharedBytes - cut.bytes) / cut.slot_bytes;
  cut.slots = slots < 1 ? 0 : slots < kLoads / 2 ? slots : kLoads / 2;
  if (cut.slots < 2 && cut.chunks > 1) cut.slots = 0;  // nothing could be on its way
  cut.stay = cut.slots < cut.chunks ? cut.slots : cut.chunks;
  lay_out(cut.slots);
  // Where little of the next image comes while one is worked on, as long as reading an image takes. Measured with four
  // images a cluster.
  if (2 * cut.slots < 3 * cut.chunks && images >= 3 * rows_clusters(cut, images))
    cut.pause = 2 * channels * positions / kBytesPerNanosecond;
  return cut;
}

// Whether the copy engine can bring chunks of it.
inline bool is_rows(const FlatMap& map, int positions) {
  return map.position == 1 && map.channel == positions && map.image > 0 && map.image % 8 == 0;
}

#if AR_HOPPER

// All workers, and nobody else.
__device__ __forceinline__ void workers_sync() { named_sync(1, kWorkers); }

// The slots, and what comes into them.
//
// An image's loads are its chunks in order, then, backwards, those that the second sweep must read again. A slot is
// filled again as soon as what it held was used the last time: in order, but that the last chunks of the first sweep,
// which stay for the second, go in reverse.
struct Slots {
  const RowsCut& cut;
  uint8_t* memory;
  uint32_t base;
  int per_image;  // loads

  __device__ Slots(const RowsCut& cut, uint8_t* memory)
      : cut(cut), memory(memory), base(shared_address(memory)), per_image(2 * cut.chunks - cut.stay) {
    if (threadIdx.x != kWorkers) return;  // which needs them first
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      barrier_init(loaded(i), 1);
      barrier_init(used(i), kWarps);
    }
    fence_barrier_init();
  }

  __device__ uint32_t loaded(uint32_t load) const { return base + kLoaded + load % kLoads * 8; }
  __device__ uint32_t used(uint32_t load) const { return base + kUsed + load % kLoads * 8; }
  __device__ uint32_t& address_of(uint32_t load) const {
    return reinterpret_cast<uint32_t*>(memory + kTable)[load % kLoads];
  }

  // The last warp: all of a block's loads, and stores of what became of its chunks, where `to` is not null. It meets
  // the others at the barrier of the cluster when the first loads are on their way.
  __device__ void move(const void* map, int64_t image_bytes, int images, void* to, int64_t image_bytes_to) const {
    const bool moves = threadIdx.x == kWorkers;
    // Or all clusters would be between sweeps at the same time, and memory would idle.
    if (images > 1) pause(cluster_of(cut, blockIdx.x) * cut.pause);
    const int loads = images * per_image, early = cut.chunks - cut.stay;
    int next = 0, of_image = 0;  // the load to ask for, its number in its image
    const uint8_t* from = static_cast<const uint8_t*>(map);
    const auto fill = [&](uint32_t slot) {  // its address
      if (next >= loads) return;
      const int chunk = of_image < cut.chunks ? of_image : per_image - 1 - of_image;
      address_of(next) = slot;
      barrier_arrive_expect(loaded(next), cut.chunk_bytes);
      bulk_load(slot, from + chunk * cut.chunk_bytes, cut.chunk_bytes, loaded(next), kEvictNormal);
      ++next;
      if (++of_image < per_image) return;
      of_image = 0;
      from += image_bytes;
    };
    for (int slot = 0; moves && slot < cut.slots; ++slot) fill(base + kBeforeSlots + slot * cut.slot_bytes);
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (!moves) return;
    uint8_t* image_to = static_cast<uint8_t*>(to);
    for (int first = 0; first < loads; first += per_image, image_to += image_bytes_to) {
      uint32_t leaving = 0;  // the slot that a store still reads, or none
      for (int i = 0; i < per_image; ++i) {
        const int chunk = i < early ? i : cut.chunks - 1 - (i - early);
        const uint32_t load = first + (i < cut.chunks ? chunk : i);
        barrier_wait(used(load), load / kLoads & 1);
        const uint32_t slot = address_of(load);
        if (i < early || to == nullptr) {
          fill(slot);
          continue;
        }
        bulk_store(image_to + chunk * cut.chunk_bytes, slot, cut.chunk_bytes, kEvictNormal);
        bulk_commit();
        if (leaving != 0) {
          bulk_wait_read<1>();
          fill(leaving);
        }
        leaving = slot;
      }
      if (leaving == 0) continue;
      bulk_wait_read<0>();
      fill(leaving);
    }
  }

  // The load of a chunk; image counts from this block's first.
  __device__ uint32_t load_of(int image, int chunk, bool second_sweep) const {
    const bool again = second_sweep && chunk < cut.chunks - cut.stay;
    return image * per_image + (again ? per_image - 1 - chunk : chunk);
  }

  // A worker's: the address of what has come.
  __device__ uint32_t wait(uint32_t load) const {
    barrier_wait(loaded(load), load / kLoads & 1);
    return address_of(load);
  }

  // A warp is done with it, for so many of the kWarps that it is awaited from.
  __device__ void release(uint32_t load, int count) const {
    __syncwarp();
    if (static_cast<int>(threadIdx.x % 32) < count) barrier_arrive(used(load));
  }
};

// What the blocks of a cluster of two tell each other, once an image: sums of floats over the channels of each. Memory
// for two images, used in turn: a block gives again only after the other took what it gave before the last time, for it
// has been given something since. Exchange 0 is of sums at all positions, the other one of the warps' shares of
// a number of each head.
struct Exchange {
  const Slots& slots;
  int number;

  // Before a barrier of the cluster.
  __device__ Exchange(const Slots& slots, int number) : slots(slots), number(number) {
    if (threadIdx.x != 0 || !is_shared()) return;
    for (int turn = 0; turn < 2; ++turn) barrier_init(barrier(turn), 1);
    fence_barrier_init();
    for (int turn = 0; turn < 2; ++turn) barrier_arrive_expect(barrier(turn), bytes());
  }

  __device__ bool is_shared() const { return slots.cut.blocks > 1; }
  __device__ int bytes() const { return exchange_bytes(slots.cut, number); }
  __device__ uint32_t barrier(int turn) const { return slots.base + kExchangeBarriers + 16 * number + turn % 2 * 8; }

  // Offset of what is given.
  __device__ int place(int turn) const {
    return slots.cut.given + (number == 0 ? 0 : 2 * exchange_bytes(slots.cut, 0)) + turn % 2 * bytes();
  }

  // Four floats to the other block, from there on where they belong. turn: the image, from this block's first.
  __device__ void give(int turn, int index, float4 values) const {
    if (!is_shared()) return;
    const uint32_t other = cluster_rank() ^ 1;
    store_to_cluster(cluster_address(slots.base + place(turn) + 4 * index, other), values,
                     cluster_address(barrier(turn), other));
  }

  // All workers, with a barrier of theirs before what they give next: what the other block gave; null where there is
  // none.
  __device__ const float* take(int turn) const {
    if (!is_shared()) return nullptr;
    barrier_wait_cluster(barrier(turn), turn / 2 & 1);
    if (threadIdx.x == 0) barrier_arrive_expect(barrier(turn), bytes());
    return reinterpret_cast<const float*>(slots.memory + place(turn));
  }
};

// Warps share the heads: this one's, and which of its threads this one is.
__device__ __forceinline__ int head_of_warp() { return threadIdx.x / 32 % kHeads; }
__device__ __forceinline__ int thread_of_head() { return threadIdx.x / 32 / kHeads * 32 + threadIdx.x % 32; }

// The sum of a number of this warp's head over all warps of the cluster that have it: each gives its part to `parts`,
// [kWarps] of this block, and to the other block. Sums are taken after a barrier of the workers.
__device__ __forceinline__ void give_part(float sum, float* parts, const Exchange& exchange, int turn) {
  if (threadIdx.x % 32 != 0) return;
  const int warp = threadIdx.x / 32;
  parts[warp] = sum;
  exchange.give(turn, warp * 4, make_float4(sum, 0, 0, 0));
}

__device__ __forceinline__ void take_sums(const float* parts, const Exchange& exchange, int turn,
                                          float (&sums)[kHeads]) {
  const float4* others = reinterpret_cast<const float4*>(exchange.take(turn));
  const int warp = threadIdx.x % kWarps;
  float sum = parts[warp];
  if (others != nullptr) sum += others[warp].x;
#pragma unroll
  for (int lanes = kHeads; lanes < kWarps; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) sums[k] = __shfl_sync(kAll, sum, k);
}

// Two adjacent values as memory has them, and what they are: apart, so that several loads are under way at a time.
__device__ __forceinline__ uint2 raw_pair(const Values& values, int index) {
  if (values.kind == Kind::kFloat)
    return *reinterpret_cast<const uint2*>(static_cast<const float*>(values.data) + index);
  return make_uint2(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(values.data) + index), 0);
}

// Of weights [heads, C], those of a channel and the next, of each head.
__device__ __forceinline__ void load_pairs(const Values& values, int heads, int channels, int channel,
                                           uint2 (&raw)[kHeads]) {
#pragma unroll
  for (int k = 0; k < kHeads; ++k) raw[k] = k < heads ? raw_pair(values, k * channels + channel) : make_uint2(0, 0);
}

template <class T>
__device__ __forceinline__ float2 pair_from(const Values& values, uint2 raw) {
  return values.kind == Kind::kFloat ? make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y)) : unpacked<T>(raw.x);
}

// Elements between a 16-byte block's begin and that of a row of a class.
__device__ __forceinline__ int shift_of(int row_class, int positions) { return row_class * positions & 7; }

// Where a channel's weights are: chunk by chunk, class by class.
__device__ __forceinline__ int weight_place(const RowsCut& cut, int chunk, int of_chunk) {
  const int row_class = of_chunk & (cut.classes - 1);
  return chunk * weight_rows(cut) + row_class * ((cut.chunk >> cut.class_bits) + 1) + (of_chunk >> cut.class_bits);
}

__device__ __forceinline__ int weight_place(const RowsCut& cut, int channel) {
  const int of_chunk = channel & (cut.chunk - 1);
  return weight_place(cut, (channel - of_chunk) / cut.chunk, of_chunk);
}

// The first sweep: Σ_c weights[c, i] z[c, position] over this block's channels, given to the other block too. Columns i
// are shared by the heads: a thread gets the sums of its head's columns at every kOfHead-th position from its own
// number on, in of_head; what is there of positions beyond the map has no meaning. buffer: of weights, as bytes.
// meanwhile: called when no chunk is waited for any more. After a barrier of the workers since weights were written.
template <class T, int kColumns, class Meanwhile>
__device__ __forceinline__ void sum_over_channels(const Slots& slots, const Exchange& exchange, int image,
                                                  int positions, uint32_t buffer, const Meanwhile& meanwhile,
                                                  float (&of_head)[kTurns][kColumns / kHeads]) {
  constexpr int kOwn = kColumns / kHeads;
  const RowsCut& cut = slots.cut;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int row_class = warp & (cut.classes - 1), group = warp >> cut.class_bits, groups = kWarps >> cut.class_bits;
  // A warp has columns' tiles `group` and, after `groups` of them, a second one, or none.
  const bool has_one = group < cut.tiles, has_two = group + groups < cut.tiles;
  float both[kColumnTiles][4] = {};
  // Matrices 0 and 1 of a fragment are columns 0 to 7 and 8 to 15 of the first eight channels, 2 and 3 of the others.
  const uint32_t lane_row = cut.classes * (lane % 8 + lane / 16 * 8) + row_class;
  const uint32_t lane_offset =
      kept(2 * (lane_row * positions - shift_of(row_class, positions)) + lane / 8 % 2 * 16 + 32 * group);
  const uint32_t block_bytes = kept(32 * cut.classes * positions), to_second = kept(32 * groups);
  const uint32_t chunk_weights = kept(16 * weight_rows(cut));
  const uint32_t end_of_weights = kept(256 * (cut.chunk / 16 >> cut.class_bits));  // of this class in a chunk
  uint32_t weights = kept(slots.base + cut.weights + buffer + 16 * (weight_place(cut, 0, row_class) + lane % 16));
  uint32_t load = slots.load_of(image, 0, false);
  const uint32_t leave = kept(load + cut.chunks - cut.stay), end = kept(load + cut.chunks);  // the others stay
  for (; load != end; ++load) {
    uint32_t fragments = slots.wait(load) + lane_offset;
    if (has_one)
      for (uint32_t block = 0; block < end_of_weights; block += 256) {  // of 16 channels
        uint32_t weight[2], fragment[kColumnTiles][4];
        load_matrix_transposed(weight, weights + block);
        load_matrix_transposed(fragment[0], fragments);
        if (has_two) load_matrix_transposed(fragment[1], fragments + to_second);
        mma<T>(both[0], fragment[0], weight[0], weight[1]);
        if (has_two) mma<T>(both[1], fragment[1], weight[0], weight[1]);
        fragments += block_bytes;
      }
    weights += chunk_weights;
    if (load < leave) slots.release(load, 1);
  }
  meanwhile();
  workers_sync();  // what was where the sums belong is not used any more
  float* sums = reinterpret_cast<float*>(slots.memory + cut.sums);  // [classes, kColumns, pitch]
  const int class_sums = kColumns * cut.pitch;
  if (has_one && 2 * column < kColumns) {
    // Each at its position: before the first one and after the last there is room for elements of other rows.
    float* to = sums + row_class * class_sums + 2 * column * cut.pitch + kFrame + 16 * group + row -
                shift_of(row_class, positions);
#pragma unroll
    for (int u = 0; u < kColumnTiles; ++u, to += 16 * groups) {
      if (u == 1 && !has_two) continue;
      to[0] = both[u][0], to[8] = both[u][2];
      to[cut.pitch] = both[u][1], to[cut.pitch + 8] = both[u][3];
    }
  }
  workers_sync();
  const int first_column = head_of_warp() * kOwn, count = 4 * cut.quads;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int position = thread_of_head() + turn * kOfHead;
    if (turn * kOfHead >= positions) continue;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float* of_class = sums + (first_column + i) * cut.pitch + kFrame + position;
      float total = 0;
      if (position < count)
        for (int each = 0; each < cut.classes; ++each, of_class += class_sums) total += *of_class;
      of_head[turn][i] = total;
      float next[3];
#pragma unroll
      for (int lanes = 0; lanes < 3; ++lanes) next[lanes] = __shfl_down_sync(kAll, total, lanes + 1);
      if (position < count && lane % 4 == 0)
        exchange.give(image, (first_column + i) * count + position, make_float4(total, next[0], next[1], next[2]));
    }
  }
}

// In the second sweep a warp has 16 channels of its team's chunks, `classes` apart.
struct OwnRows {
  int last;                 // chunk of its team
  int unit, first, shift;   // first: channel, in the chunk
  int tiles;                // of 16 columns that its rows touch
  uint32_t last_tile;       // bytes before it, of a row
  uint32_t begin, ends[2];  // what is of its rows: of a lane's words of the first eight columns, of the last tile
  uint32_t weights;         // address of this lane's row, in the first chunk
  uint32_t masks;           // of what belongs to column 0, of lane 0; each lane has the next one
  uint32_t row;             // offset of this lane's row of a matrix, in a chunk

  __device__ OwnRows(const Slots& slots, int positions) {
    const RowsCut& cut = slots.cut;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = cut.chunk >> 4;
    const int team = warp * cut.teams / kWarps;
    last = cut.chunks - 1 - ((cut.chunks - 1 - team) & (cut.teams - 1));
    unit = warp & (units - 1);
    const int row_class = unit & (cut.classes - 1);
    first = 16 * (unit - row_class) + row_class;
    shift = shift_of(row_class, positions);
    tiles = (positions + shift + 15) / 16;
    last_tile = kept(32 * (tiles - 1));
    begin = kept(real_pair(0, positions));
#pragma unroll
    for (int half = 0; half < 2; ++half) ends[half] = kept(real_pair(16 * (tiles - 1) + 8 * half, positions));
    weights = slots.base + cut.weights + 16 * (weight_place(cut, 0, first) + lane % 16);
    masks = kept(slots.base + cut.masks + 16 * (kFrame - shift + lane));
    row = kept(2 * ((first + cut.classes * (lane % 16)) * positions - shift) + lane / 16 * 16);
  }

  // All warps of the team.
  __device__ void sync(const RowsCut& cut) const { named_sync(2 + (last & (cut.teams - 1)), 2 * cut.chunk); }

  // Σ_s z[c, s] masks[s] of these channels. Reads what lies around its rows too, and leaves it out: it may be infinite.
  template <class T>
  __device__ void sum_over_positions(uint32_t chunk, float (&sums)[4]) const {
    const uint32_t z = chunk + row;
    uint32_t first[4], last[4], first_mask[2], last_mask[2];
    load_matrix(first, z);
    load_matrix_transposed(first_mask, masks);
    load_matrix(last, z + last_tile);
    load_matrix_transposed(last_mask, masks + 8 * last_tile);
    float chains[2][4] = {};  // of products that don't wait for each other
    first[0] &= begin, first[1] &= begin;
#pragma unroll
    for (int i = 0; i < 4; ++i) last[i] &= ends[i / 2];
    if (tiles > 1) mma<T>(chains[0], first, first_mask[0], first_mask[1]);
    mma<T>(chains[1], last, last_mask[0], last_mask[1]);
    // Short code, since it runs a few times for each image alone.
    uint32_t fragments = z + 32, mask = masks + 256;
    int left = tiles - 2;
#pragma unroll 1
    for (; left > 1; left -= 2, fragments += 64, mask += 512) {
      uint32_t fragment[2][4], both[4];
      load_matrix(fragment[0], fragments);
      load_matrix(fragment[1], fragments + 32);
      load_matrix_transposed(both, mask);
      mma<T>(chains[0], fragment[0], both[0], both[1]);
      mma<T>(chains[1], fragment[1], both[2], both[3]);
    }
    if (left == 1) {
      uint32_t fragment[4], one[2];
      load_matrix(fragment, fragments);
      load_matrix_transposed(one, mask);
      mma<T>(chains[0], fragment, one[0], one[1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = chains[0][i] + chains[1][i];
  }

  // Which halves of a lane's word of eight columns are positions of its row.
  __device__ uint32_t real_pair(int begin, int positions) const {
    const uint32_t position = begin + threadIdx.x % 4 * 2 - shift, count = positions;  // what is negative is large
    const bool low = position < count, high = position + 1 < count;
    return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
  }
};

#endif  // AR_HOPPER

}  // namespace ar_kernels
