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

#include "gates.cuh"
#include "primitives.cuh"
#include "sweep.h"
#include "values.cuh"

namespace ar_kernels {

constexpr int kUnit = 128;             // channels: a multiple of 16 rows of every class
constexpr int kChunkMost = 32 * 1024;  // bytes, where classes are few enough for chunks of half a unit
constexpr int kWarps = 16;             // workers
constexpr int kWorkers = 32 * kWarps;
constexpr int kThreads = kWorkers + 32;
constexpr int kColumnTiles = 2;  // of 16 columns, the most that a warp sums at once
constexpr int kExchanges = 3;    // between the blocks of a cluster, of an image: the first one of sums at all positions
constexpr int kLoads = 32;       // barriers and places in the table of slots: twice as many as slots, at least

// How an image is cut, and where what lies in shared memory.
struct RowsCut {
  int classes, class_bits, tiles;  // of rows; its logarithm; of 16 columns, of a row
  int blocks, channels;            // of a cluster; of a block
  int chunk, chunks, chunk_bytes;  // channels of a chunk; chunks of a block
  int slots, slot_bytes;           // a chunk, and as much as its last rows' columns reach beyond it
  int stay;                        // chunks that are still there after the first sweep
  int teams;                       // of warps, that take chunks in turn in the second sweep
  int weights;                     // [weight_place] of 8 16-bit values
  int sums, columns, pitch;        // [classes, columns, pitch] floats
  int quads;                       // of positions
  int given;                       // what the other block gave, of sums and of numbers: exchanges' memory
  int masks;                       // [16 + S + 16 rounded up, 8] of 16 bits: zeros before and behind
  int table;                       // [kLoads] ints: the slot of each load
  int loaded, used;                // [kLoads] barriers: a load has come, all workers are done with it
  int exchanges;                   // [kExchanges, 2] barriers
  int rest, bytes;
};

// columns: sums at every position that are kept. sums: bytes that are wanted where they are at least. rest,
// rest_of_channel: bytes that a kernel wants besides. No slots: it does not fit.
inline RowsCut rows_cut(int channels, int positions, int columns, int sums, int rest, int rest_of_channel) {
  RowsCut cut = {};
  cut.class_bits = positions % 8 == 0 ? 0 : positions % 4 == 0 ? 1 : positions % 2 == 0 ? 2 : 3;
  cut.classes = 1 << cut.class_bits;
  const int shift = cut.classes == 1 ? 0 : 8 - 8 / cut.classes;  // the most
  cut.tiles = (positions + shift + 15) / 16;
  if (channels < kUnit || channels % kUnit != 0 || cut.tiles > kColumnTiles * kWarps / cut.classes) return cut;
  cut.chunk = cut.classes < 8 && 2 * kUnit * positions > kChunkMost ? kUnit / 2 : kUnit;
  cut.chunk_bytes = 2 * cut.chunk * positions;
  cut.slot_bytes = cut.chunk_bytes + 64;
  cut.blocks = channels / cut.chunk % 2 == 0 ? 2 : 1;
  cut.channels = channels / cut.blocks;
  cut.chunks = cut.channels / cut.chunk;
  cut.teams = 16 * kWarps / cut.chunk;
  cut.columns = columns;
  cut.quads = (positions + 3) / 4;
  cut.pitch = 16 * cut.tiles + 4;  // two columns begin 8 banks apart
  if (sums < cut.classes * columns * cut.pitch * 4) sums = cut.classes * columns * cut.pitch * 4;
  const int given = cut.blocks == 1 ? 0 : 2 * (columns * cut.pitch + (kExchanges - 1) * kWarps * kHeads) * 4;
  int at = 0;
  const auto take = [&](int bytes) {
    at += (bytes + 15) / 16 * 16;
    return at - (bytes + 15) / 16 * 16;
  };
  const auto lay_out = [&](int slots) {
    at = 0;
    take(slots * cut.slot_bytes);
    cut.weights = take(cut.chunks * (cut.chunk + cut.classes) * 16);
    cut.sums = take(sums);
    cut.given = take(given);
    cut.masks = take((16 * cut.tiles + 32) * 16);
    cut.table = take(kLoads * 4);
    cut.loaded = take(kLoads * 8);
    cut.used = take(kLoads * 8);
    cut.exchanges = take(kExchanges * 2 * 8);
    cut.rest = take(rest + rest_of_channel * cut.channels);
    cut.bytes = at;
  };
  lay_out(0);
  const int slots = (kSharedBytes - cut.bytes) / cut.slot_bytes;
  cut.slots = slots < 1 ? 0 : slots < kLoads / 2 ? slots : kLoads / 2;
  if (cut.slots < 2 && cut.chunks > 1) cut.slots = 0;  // nothing could be on its way
  cut.stay = cut.slots < cut.chunks ? cut.slots : cut.chunks;
  lay_out(cut.slots);
  return cut;
}

// How many clusters are launched for so many images.
inline int rows_clusters(const RowsCut& cut, int images) {
  const int most = processors() / cut.blocks;
  return images < most ? images : most < 1 ? 1 : most;
}

// Whether the copy engine can bring chunks of it.
inline bool is_rows(const Map& map, int positions) {
  return map.position == 1 && map.channel == positions && map.image > 0 && map.image % 8 == 0;
}

#if AR_HOPPER

// All workers, and nobody else.
__device__ __forceinline__ void workers_sync() { named_sync(1, kWorkers); }

// The slots, and what comes into them.
//
// An image's loads are its chunks in order, then, backwards, those that the second sweep must read again. A slot is
// filled again as soon as what it held was used the last time: in order, but that the last `slots` chunks of the first
// sweep, which stay for the second, go in reverse.
struct Slots {
  const RowsCut& cut;
  uint8_t* memory;
  uint32_t base;
  int per_image;  // loads

  __device__ Slots(const RowsCut& cut, uint8_t* memory)
      : cut(cut), memory(memory), base(shared_address(memory)), per_image(2 * cut.chunks - cut.stay) {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kLoads; ++i) {
      barrier_init(loaded(i), 1);
      barrier_init(used(i), kWarps);
    }
    fence_barrier_init();
  }

  __device__ uint32_t loaded(uint32_t load) const { return base + cut.loaded + load % kLoads * 8; }
  __device__ uint32_t used(uint32_t load) const { return base + cut.used + load % kLoads * 8; }
  __device__ int& slot_of(uint32_t load) const { return reinterpret_cast<int*>(memory + cut.table)[load % kLoads]; }

  // One thread: all of a block's loads, and stores of what became of its chunks, where `to` is not null.
  __device__ void move(const void* map, int64_t image_bytes, int images, void* to, int64_t image_bytes_to) const {
    const int loads = images * per_image, early = cut.chunks - cut.stay;
    int next = 0, of_image = 0;  // the load to ask for, its number in its image
    const uint8_t* from = static_cast<const uint8_t*>(map);
    const auto fill = [&](int slot) {
      if (next >= loads) return;
      const int chunk = of_image < cut.chunks ? of_image : per_image - 1 - of_image;
      slot_of(next) = slot;
      barrier_arrive_expect(loaded(next), cut.chunk_bytes);
      bulk_load(base + slot * cut.slot_bytes, from + chunk * cut.chunk_bytes, cut.chunk_bytes, loaded(next),
                kEvictNormal);
      ++next;
      if (++of_image < per_image) return;
      of_image = 0;
      from += image_bytes;
    };
    for (int slot = 0; slot < cut.slots; ++slot) fill(slot);
    uint8_t* image_to = static_cast<uint8_t*>(to);
    for (int first = 0; first < loads; first += per_image, image_to += image_bytes_to) {
      int leaving = -1;  // the slot that a store still reads
      for (int i = 0; i < per_image; ++i) {
        const int chunk = i < early ? i : cut.chunks - 1 - (i - early);
        const uint32_t load = first + (i < cut.chunks ? chunk : i);
        barrier_wait(used(load), load / kLoads & 1);
        const int slot = slot_of(load);
        if (i < early || to == nullptr) {
          fill(slot);
          continue;
        }
        bulk_store(image_to + chunk * cut.chunk_bytes, base + slot * cut.slot_bytes, cut.chunk_bytes, kEvictNormal);
        bulk_commit();
        if (leaving >= 0) {
          bulk_wait_read<1>();
          fill(leaving);
        }
        leaving = slot;
      }
      if (leaving < 0) continue;
      bulk_wait_read<0>();
      fill(leaving);
    }
  }

  // A worker's chunk; image counts from this block's first.
  struct Chunk {
    uint32_t load, address;
  };

  __device__ Chunk wait(int image, int chunk, bool second_sweep) const {
    const bool again = second_sweep && chunk < cut.chunks - cut.stay;
    const uint32_t load = image * per_image + (again ? per_image - 1 - chunk : chunk);
    barrier_wait(loaded(load), load / kLoads & 1);
    return {load, base + slot_of(load) * cut.slot_bytes};
  }

  // A warp is done with it, for so many of the kWarps that it is awaited from.
  __device__ void release(const Chunk& chunk, int count) const {
    __syncwarp();
    if (static_cast<int>(threadIdx.x % 32) < count) barrier_arrive(used(chunk.load));
  }
};

// What the blocks of a cluster of two tell each other, once an image: sums of floats over the channels of each. Memory
// for two images, used in turn: a block gives again only after the other took what it gave before the last time, for it
// has been given something since. Exchange 0 is of sums at all positions, the others are of the warps' shares of
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
  __device__ int bytes() const { return (number == 0 ? slots.cut.columns * slots.cut.quads : kWarps) * 16; }
  __device__ uint32_t barrier(int turn) const { return slots.base + slots.cut.exchanges + 16 * number + turn % 2 * 8; }

  // Offset of what is given.
  __device__ int place(int turn) const {
    const int sums = slots.cut.columns * slots.cut.pitch;
    return slots.cut.given +
           (number == 0 ? turn % 2 * sums : 2 * sums + (2 * number - 2 + turn % 2) * kWarps * kHeads) * 4;
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

// Sums of a number of each head over all warps of the cluster: each gives its part to `parts`, [kWarps] of this block,
// and to the other block. They are taken after a barrier of the workers.
__device__ __forceinline__ void give_part(const float (&sums)[kHeads], float4* parts, const Exchange& exchange,
                                          int turn) {
  if (threadIdx.x % 32 != 0) return;
  const int warp = threadIdx.x / 32;
  parts[warp] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  exchange.give(turn, warp * kHeads, parts[warp]);
}

__device__ __forceinline__ void take_sums(const float4* parts, const Exchange& exchange, int turn,
                                          float (&sums)[kHeads]) {
  // Half a warp looks at this block's parts, the other half at the other's: of two numbers it is the same sum in both.
  const float4* others = reinterpret_cast<const float4*>(exchange.take(turn));
  const int lane = threadIdx.x % 32;
  float4 part = make_float4(0, 0, 0, 0);
  if (lane < kWarps)
    part = parts[lane];
  else if (others != nullptr)
    part = others[lane - kWarps];
  sums[0] = warp_sum(part.x), sums[1] = warp_sum(part.y), sums[2] = warp_sum(part.z), sums[3] = warp_sum(part.w);
}

// Elements between a 16-byte block's begin and that of a row of a class.
__device__ __forceinline__ int shift_of(int row_class, int positions) { return row_class * positions & 7; }

// Where a channel's weights are: chunk by chunk, class by class, with a gap after each class, so that matrices of a
// class and rows of adjacent channels touch all banks.
__device__ __forceinline__ int weight_place(const RowsCut& cut, int chunk, int of_chunk) {
  const int row_class = of_chunk & (cut.classes - 1);
  return chunk * (cut.chunk + cut.classes) + row_class * ((cut.chunk >> cut.class_bits) + 1) +
         (of_chunk >> cut.class_bits);
}

__device__ __forceinline__ int weight_place(const RowsCut& cut, int channel) {
  const int of_chunk = channel & (cut.chunk - 1);
  return weight_place(cut, (channel - of_chunk) / cut.chunk, of_chunk);
}

// The first sweep: sums[i, position] = Σ_c weights[c, i] z[c, position] of this block's channels, given to the other
// block too. After a barrier of the workers since such sums were read; one must follow.
template <class T, int kColumns>
__device__ __forceinline__ void sum_over_channels(const Slots& slots, const Exchange& exchange, int image,
                                                  int positions) {
  static_assert(kWarps % kColumns == 0);
  const RowsCut& cut = slots.cut;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int row_class = warp & (cut.classes - 1), group = warp >> cut.class_bits, groups = kWarps >> cut.class_bits;
  // A warp has columns' tiles `group` and, after `groups` of them, a second one, or none.
  const bool has_one = group < cut.tiles, has_two = group + groups < cut.tiles;
  float both[kColumnTiles][4] = {};
  // Matrices 0 and 1 of a fragment are columns 0 to 7 and 8 to 15 of the first eight channels, 2 and 3 of the others.
  const uint32_t lane_row = cut.classes * (lane % 8 + lane / 16 * 8) + row_class;
  const uint32_t lane_offset =
      2 * (lane_row * positions - shift_of(row_class, positions)) + lane / 8 % 2 * 16 + 32 * group;
  const uint32_t block_bytes = kept(32 * cut.classes * positions), to_second = kept(32 * groups);
  const uint32_t chunk_weights = kept(16 * (cut.chunk + cut.classes));
  const uint32_t end_of_weights = kept(256 * (cut.chunk / 16 >> cut.class_bits));  // of this class in a chunk
  uint32_t weights = slots.base + cut.weights + 16 * (weight_place(cut, 0, row_class) + lane % 16);
  for (int chunk = 0; chunk < cut.chunks; ++chunk) {
    const Slots::Chunk z = slots.wait(image, chunk, false);
    uint32_t fragments = z.address + lane_offset;
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
    if (chunk < cut.chunks - cut.stay) slots.release(z, 1);  // the others stay
  }
  workers_sync();  // what was where the sums belong is not used any more
  float* sums = reinterpret_cast<float*>(slots.memory + cut.sums);  // [classes, kColumns, pitch]
  const int class_sums = kColumns * cut.pitch;
#pragma unroll
  for (int u = 0; u < kColumnTiles; ++u) {
    if (u == 0 ? !has_one : !has_two) continue;
    float* to = sums + row_class * class_sums + 2 * column * cut.pitch + 16 * (group + groups * u) + row;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * column + i % 2 < kColumns) to[i % 2 * cut.pitch + i / 2 * 8] = both[u][i];
  }
  workers_sync();
  // Of all classes, a position a thread. The result lies where the first class's sum was, which nobody else reads.
  const int own = warp % kColumns * cut.pitch;
  for (int first = warp / kColumns * 32; first < 4 * cut.quads; first += 32 * (kWarps / kColumns)) {
    const int at = own + first + lane;
    const bool is_one = first + lane < 4 * cut.quads;
    float total = 0;
#pragma unroll
    for (int of_class = 0; of_class < 8; ++of_class)
      if (of_class < cut.classes && is_one) total += sums[of_class * class_sums + at + shift_of(of_class, positions)];
    if (is_one) sums[at] = total;
    float next[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) next[i] = __shfl_down_sync(kAll, total, i + 1);
    if (is_one && lane % 4 == 0) exchange.give(image, at, make_float4(total, next[0], next[1], next[2]));
  }
}

// In the second sweep a warp has 16 channels of its team's chunks, `classes` apart.
struct OwnRows {
  int team, team_threads;
  int last;                // chunk of its team
  int unit, first, shift;  // first: channel, in the chunk
  uint32_t weights;        // address of this lane's row, in the first chunk
  uint32_t masks;          // of what belongs to column 0
  uint32_t row;            // offset of this lane's row of a matrix, in a chunk

  __device__ OwnRows(const Slots& slots, int positions) {
    const RowsCut& cut = slots.cut;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = cut.chunk / 16;
    team = warp / units;
    team_threads = 32 * units;
    last = cut.chunks - 1 - ((cut.chunks - 1 - team) & (cut.teams - 1));
    unit = warp % units;
    const int row_class = unit & (cut.classes - 1);
    first = 16 * (unit - row_class) + row_class;
    shift = shift_of(row_class, positions);
    weights = slots.base + cut.weights + 16 * (weight_place(cut, 0, first) + lane % 16);
    masks = slots.base + cut.masks + 16 * (16 - shift + lane % 16);
    row = 2 * ((first + cut.classes * (lane % 16)) * positions - shift) + lane / 16 * 16;
  }

  // All warps of the team.
  __device__ void sync() const { named_sync(2 + team, team_threads); }

  // Σ_s z[c, s] masks[s] of these channels. Reads what lies around its rows too, and leaves it out.
  template <class T>
  __device__ void sum_over_positions(const Slots& slots, uint32_t chunk, int positions, float (&sums)[4]) const {
    const int tiles = slots.cut.tiles;
    const uint32_t z = chunk + row;
    float chains[2][4] = {};  // of products that don't wait for each other
    for (int tile = 0; tile < tiles; tile += 2) {
      uint32_t fragment[2][4], mask[2][2];
#pragma unroll
      for (int chain = 0; chain < 2; ++chain) {
        if (tile + chain >= tiles) continue;
        load_matrix(fragment[chain], z + 32 * (tile + chain));
        load_matrix_transposed(mask[chain], masks + 256 * (tile + chain));
      }
#pragma unroll
      for (int chain = 0; chain < 2; ++chain) {
        const int begin = 16 * (tile + chain);
        if (tile + chain >= tiles) continue;
        if (begin < shift || begin + 16 - shift > positions) {  // other rows' elements, which may be infinite
          const uint32_t real[] = {real_pair(begin, positions), real_pair(begin + 8, positions)};
#pragma unroll
          for (int i = 0; i < 4; ++i) fragment[chain][i] &= real[i / 2];
        }
        mma<T>(chains[chain], fragment[chain], mask[chain][0], mask[chain][1]);
      }
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
