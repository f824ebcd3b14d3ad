// The forward sweep on Hopper of channels_last maps, in tiles of all channels (sweep.cuh): one read of the map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l    (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A block takes whole images, or splits of images where there are few of them: then it writes parts (m, d, P), which
// merge_kernel of ar_kernels/kernels/attend_forward.py adds up. The mean over positions is one more row of P, whose
// weights are 1.

#include "attend_forward.h"

#include <algorithm>

#include "gates.cuh"
#include "sweep.cuh"

namespace ar_kernels {

namespace {

constexpr int kTile = 16;             // positions
constexpr int kMostBlocks = 16;       // of 16 channels, of a warp
constexpr int kWarps = 8;             // of a block, if so many suffice: each knows the softmax for itself
constexpr int kFewestChannels = 576;  // of fewer a tile is too short; attend_forward_spread.cu takes up to 512

// How an image is cut, and where what lies in shared memory.
struct Cut {
  int per_processor;                 // blocks that share a multiprocessor
  int warps, blocks;                 // of a block; of 16 channels each, of a warp
  int tiles;                         // of an image
  int stages, stage_bytes;           // a stage has a tile
  int parts, rest, barriers, bytes;  // parts: [2, warps, tile, kHeads] floats
};

// The most warps of a block with so many blocks of channels each: there are registers for no more.
constexpr int most_warps(int blocks) { return blocks == kMostBlocks ? kWarps : kMostWarps; }

// What is divided by what a launch knows is divided before it: blocks begin at once.
struct Share {
  int tiles;       // of a split; the last one of an image has what is left
  int each, more;  // splits that a block takes, which follow each other; the first `more` blocks take one more
};

// A block's warps have the same channels all the time; of a tile each makes its part of the logits, and after the
// tile's one __syncthreads adds up all parts for itself, knows the softmax for itself, and adds to its channels of P.
//
// kBlocks: of 16 channels, of a warp. What a tile has beyond its image are zeros.
template <class T, int kBlocks>
__global__ void __launch_bounds__(32 * most_warps(kBlocks), 1)
    forward_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ ForwardSweep a,
                   const __grid_constant__ Cut cut, const __grid_constant__ Share share) {
#if AR_HOPPER
  constexpr int kPart = kTile * kHeads;  // logits of a tile
  constexpr int kMean = kHeads;          // the column of the mean
  constexpr int kChains = 4;             // of products that don't wait for each other
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = kept(shared_address(memory));
  const auto full = [&](int stage) { return base + cut.barriers + 8 * stage; };
  const int splits = max(a.splits, 1), block = blockIdx.x;
  const int first = share.each * block + min(block, share.more);
  const int taken = share.each + (block < share.more);
  // The first split is of this image and begins at this tile; so many tiles are the block's, which follow each other.
  int image = first, end = 0, tiles = taken * cut.tiles;
  if (splits > 1) {
    image = first / splits;
    end = first % splits * share.tiles;
    tiles = ((first + taken) / splits - image) * cut.tiles + (first + taken) % splits * share.tiles - end;
  }

  // One thread asks for all copies, in order, as stages get free.
  int to_ask = tiles, asked_image = image, asked_tile = end;
  const auto load = [&](int stage) {
    if (--to_ask < 0) return;
    barrier_arrive_expect(full(stage), cut.stage_bytes);
    tensor_load(base + stage * cut.stage_bytes, &z_map, 0, asked_tile * kTile, 0, asked_image, full(stage),
                kEvictFirst);
    if (++asked_tile == cut.tiles) asked_tile = 0, ++asked_image;
  };
  if (threadIdx.x == 0) {  // in few instructions, which must come from memory first: all else waits for the first tile
#pragma unroll 1
    for (int stage = 0; stage < cut.stages; ++stage) barrier_init(full(stage), 1);
    fence_barrier_init();
#pragma unroll 1
    for (int stage = 0; stage < cut.stages; ++stage) load(stage);
  }

  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh). In P rows
  // are channels; columns are heads, then the mean.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int warps = kept(blockDim.x / 32), first_channel = 16 * kBlocks * warp;
  float* parts = reinterpret_cast<float*>(memory + cut.parts);       // [2, warps, kPart]
  float* score_parts = reinterpret_cast<float*>(memory + cut.rest);  // [warps, kHeads]

  // Where a lane's row of 16 by 16 elements is in a tile, which is read over channels and over positions. Matrices 1
  // and 3 of the four are the second eight of a product's rows, 2 and 3 of what it sums over.
  const auto row_of = [&](bool over_channels) {
    const int of_rows = lane / 8 % 2, of_sum = lane / 16;
    return swizzled(8 * (over_channels ? of_rows : of_sum) + lane % 8, over_channels ? of_sum : of_rows) +
           512 * kBlocks * warp;
  };
  const uint32_t over_channels = kept(row_of(true)), over_positions = kept(row_of(false));
  // The row of block b, where `at` is the first one's.
  const auto address = [](uint32_t at, int b) { return (at ^ b % 4 * 32) + b / 4 * kTile * 128; };

  uint32_t masks[kBlocks][2];  // W_H
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) masks[i / 2][i % 2] = 0;
  const auto load_masks = [&](const auto* w) {
    w += row * a.channels + first_channel + 2 * column;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) masks[i / 2][i % 2] = weight_pair<T>(w + 8 * i);
  };
  if (row < a.heads) {
    if (a.w.kind == Kind::kFloat)  // asked once, so that no load waits for another
      load_masks(static_cast<const float*>(a.w.data));
    else
      load_masks(static_cast<const T*>(a.w.data));
  }
  // Biases, which nothing waits for yet.
  const int head = row % kHeads;
  const bool biased = head < a.heads && a.b.data != nullptr, score_biased = head < a.heads && a.score_b.data != nullptr;
  const uint32_t raw_bias = biased ? raw_value(a.b, head) : 0;
  const uint32_t raw_score_bias = score_biased ? raw_value(a.score_b, head) : 0;
  // Weights of scores are needed when nothing is left to do meanwhile.
  const int score_bytes = a.gated > 0 ? a.heads * a.channels * (a.score_w.kind == Kind::kFloat ? 4 : 2) : 0;
#pragma unroll 1
  for (int byte = 128 * threadIdx.x; byte < score_bytes; byte += 128 * blockDim.x)
    prefetch_l1(static_cast<const char*>(a.score_w.data) + byte);

  // Where a part of logits [kHeads, 16 positions] has a head: sums over channels, where a lane has heads 2i and 2i + 1,
  // are then stored, and by heads loaded, without bank conflicts.
  const auto place_of = [](int head) { return 16 * (head % 2 == 0 ? head / 2 : 3 - head / 2); };
  // This warp's part of a tile's logits.
  const int of_part = kept(kPart * warp + 2 * row + place_of(2 * column));
  const int to_next = place_of(2 * column + 1) - place_of(2 * column);  // head
  const auto make_part = [&](uint32_t z, int buffer) {
    float sums[kChains][4];
#pragma unroll
    for (int i = 0; i < 4 * kChains; ++i) sums[i / 4][i % 4] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t fragment[4];
      load_matrix(fragment, address(z + over_channels, b));
      mma<T>(sums[b % kChains], fragment, masks[b][0], masks[b][1]);
    }
#pragma unroll
    for (int i = 0; i < 4 * (kChains - 1); ++i) sums[0][i % 4] += sums[1 + i / 4][i % 4];
    if (column >= kHeads / 2) return;
    // Positions p and p + 8 are adjacent.
    float* to = parts + buffer + of_part;
    *reinterpret_cast<float2*>(to) = make_float2(sums[0][0], sums[0][2]);
    *reinterpret_cast<float2*>(to + to_next) = make_float2(sums[0][1], sums[0][3]);
  };

  // In the softmax a lane has one head, as the factor of the sum over positions wants it: positions 2 * column, + 8, +
  // 1 and + 9. Lanes of rows from kHeads on have the same logits once more, so each adds up every second part.
  const auto position_of = [&](int i) { return 2 * column + i / 2 + i % 2 * 8; };
  constexpr int kSharers = 2;  // lanes of the same logits
  constexpr int kAtOnce = 4;   // loads of each
  const int first_part = row / kHeads;
  const int of_head = kept(kPart * first_part + place_of(head) + 4 * column);
  const uint32_t ones = row == kHeads ? packed<T>(1.f, 1.f) : 0;  // the mean's weights

  __syncthreads();
  int stage = 0, writer = 0, buffer = 0;  // buffer: where the parts of the tile are
  uint32_t parity = 0;
  barrier_wait(full(0), 0);
  make_part(base, 0);
  __syncthreads();
  const float bias = biased ? value_from(a.b, raw_bias) : 0.f;
  const float score_bias = score_biased ? value_from(a.score_b, raw_score_bias) : 0.f;
  for (int split = first; tiles > 0; ++split) {
    if (end == cut.tiles) end = 0, ++image;
    const int begin = end;
    end = min(begin + share.tiles, cut.tiles);
    float m = -INFINITY, d = 0;  // of this lane's head; d: of its positions
    float sums[kBlocks][4];      // P [16 channels, 8 columns]
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0;

    int of_image = begin;
    do {  // no split is empty
      const int position = of_image * kTile, count = a.positions - position;

      // Logits, of all channels.
      float l[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) l[i] = first_part == 0 ? bias : 0.f;
      const float* from = parts + buffer + of_head;
#pragma unroll 1
      for (int part = first_part; part < warps + first_part; part += kAtOnce * kSharers) {
        float4 loaded[kAtOnce];  // none waits for another
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          loaded[i] = make_float4(0, 0, 0, 0);
          if (part + kSharers * i < warps) loaded[i] = *reinterpret_cast<const float4*>(from + kPart * kSharers * i);
        }
        from += kPart * kSharers * kAtOnce;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          l[0] += loaded[i].x, l[1] += loaded[i].y, l[2] += loaded[i].z, l[3] += loaded[i].w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) l[i] += __shfl_xor_sync(kAll, l[i], 16);
      if (a.logits != nullptr && warp == writer && head < a.heads && first_part == 0) {
        float* to = a.logits + (static_cast<int64_t>(image) * a.heads + head) * a.positions + position;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (position_of(i) < count) to[position_of(i)] = l[i];
      }
      if (++writer == warps) writer = 0;
      if (count < kTile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (position_of(i) >= count) l[i] = -INFINITY;

      // The softmax. What exponents are counted from follows the maximum where that has grown by more than kSlack.
      float most = l[0];
#pragma unroll
      for (int i = 1; i < 4; ++i) most = maximum(most, l[i]);
      if (__any_sync(kAll, !(most <= m + kSlack))) {  // NaN too
        most = maximum(most, __shfl_xor_sync(kAll, most, 1));
        most = maximum(most, __shfl_xor_sync(kAll, most, 2));
        most = maximum(m, most);
        const float shrink = power_of_two((m - origin(most)) * kLog2OfE);
        m = most;
        d *= shrink;
        float low = __shfl_sync(kAll, shrink, 8 * column), high = __shfl_sync(kAll, shrink, 8 * column + 4);
        if (column >= kHeads / 2) low = high = 1;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          sums[b][0] *= low, sums[b][1] *= high;
          sums[b][2] *= low, sums[b][3] *= high;
        }
      }
      const float start = origin(m);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l[i] = power_of_two((l[i] - start) * kLog2OfE);
        d += l[i];
      }
      uint32_t weights[2];  // [16 positions, 8 columns]
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[half] = row < kHeads ? packed<T>(l[half], l[2 + half]) : ones;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t fragment[4];
        load_matrix_transposed(fragment, address(base + stage * cut.stage_bytes + over_positions, b));
        mma<T>(sums[b], fragment, weights[0], weights[1]);
      }

      // The tile after, perhaps of the next image, so that one barrier is enough.
      const int used = stage;
      if (++stage == cut.stages) stage = 0, parity ^= 1;
      buffer = warps * kPart - buffer;
      if (--tiles > 0) {
        barrier_wait(full(stage), parity);
        make_part(base + stage * cut.stage_bytes, buffer);
      }
      __syncthreads();
      if (threadIdx.x == 0) load(used);
    } while (++of_image < end);

    // The image's end: P, scores, gates, features.
    d += __shfl_xor_sync(kAll, d, 1);
    d += __shfl_xor_sync(kAll, d, 2);
    const bool whole = splits == 1, is_mean = 2 * column == kMean;
    const int64_t part = static_cast<int64_t>(split) * (a.heads + (a.mean != nullptr));
    if (warp == 0 && column == 0 && row < a.heads) {
      if (whole) {
        a.lse[static_cast<int64_t>(image) * a.heads + row] = origin(m) + __logf(d);
      } else {
        a.part_m[part + row] = m;
        a.part_d[part + row] = d;
      }
    }
    if (!whole && threadIdx.x == 0 && a.mean != nullptr) {
      a.part_m[part + a.heads] = 0;
      a.part_d[part + a.heads] = static_cast<float>(min(end * kTile, a.positions) - begin * kTile);
    }
    // Of 16 channels even rows will have row and row + 1, others row + 7 and row + 8.
    const int channel = first_channel + row + row % 2 * 7;
    const float scale = whole ? __fdividef(1, d) : 1.f, high = __shfl_sync(kAll, scale, 8 * column + 4);
    float low = __shfl_sync(kAll, scale, 8 * column);
    if (is_mean) low = whole ? __fdividef(1, a.positions) : 1.f;
    const bool scored = a.gated > 0 && whole;
    float2 score_weights[kBlocks][2];  // of both columns' heads; undefined, they would have registers in the loop
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) score_weights[i / 2][i % 2] = {};
    const auto load_score_weights = [&](const auto* w) {
      const int of_low = min(2 * column, a.heads - 1) * a.channels + channel;
      const int of_high = min(2 * column + 1, a.heads - 1) * a.channels + channel;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        score_weights[b][0] = float_pair(w + of_low + 16 * b);
        score_weights[b][1] = float_pair(w + of_high + 16 * b);
      }
    };
    if (scored && a.score_w.kind == Kind::kFloat) load_score_weights(static_cast<const float*>(a.score_w.data));
    if (scored && a.score_w.kind == Kind::kHalf) load_score_weights(static_cast<const __half*>(a.score_w.data));
    if (scored && a.score_w.kind == Kind::kBFloat16)
      load_score_weights(static_cast<const __nv_bfloat16*>(a.score_w.data));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // of a column: of channels row and row + 8 make two adjacent ones
        float &x = sums[b][i], &y = sums[b][2 + i];
        const float other = __shfl_xor_sync(kAll, row % 2 == 0 ? y : x, 4);
        (row % 2 == 0 ? y : x) = other;
        x *= i == 0 ? low : high;
        y *= i == 0 ? low : high;
      }
    float score = score_bias;  // of this lane's head
    if (scored) {
      float low_score = 0, high_score = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        low_score += sums[b][0] * score_weights[b][0].x + sums[b][2] * score_weights[b][0].y;
        high_score += sums[b][1] * score_weights[b][1].x + sums[b][3] * score_weights[b][1].y;
      }
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        low_score += __shfl_xor_sync(kAll, low_score, lanes);
        high_score += __shfl_xor_sync(kAll, high_score, lanes);
      }
      if (row == 0 && column < kHeads / 2)
        *reinterpret_cast<float2*>(score_parts + kHeads * warp + 2 * column) = make_float2(low_score, high_score);
      __syncthreads();
#pragma unroll 4
      for (int other = 0; other < warps; ++other) score += score_parts[kHeads * other + head];
    }
    // Stores of P, which are so many that a warp waits for them, beside the gates. Where a lane's columns go, 2 *
    // column and the next; nowhere if there are none.
    float *low_to = nullptr, *high_to = nullptr;
    float* pooled =
        whole ? a.pooled + static_cast<int64_t>(image) * a.heads * a.channels : a.part_p + part * a.channels;
    pooled += channel;
    if (2 * column < a.heads) low_to = pooled + 2 * column * a.channels;
    if (2 * column + 1 < a.heads) high_to = pooled + (2 * column + 1) * a.channels;
    if (is_mean && a.mean != nullptr)
      low_to = whole ? a.mean + static_cast<int64_t>(image) * a.channels + channel : pooled + a.heads * a.channels;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (low_to != nullptr) *reinterpret_cast<float2*>(low_to + 16 * b) = make_float2(sums[b][0], sums[b][2]);
      if (high_to != nullptr) *reinterpret_cast<float2*>(high_to + 16 * b) = make_float2(sums[b][1], sums[b][3]);
    }
    if (!scored) continue;
    float gate = head < a.gated ? __expf(gate_tanh(score)) : 0.f, total = gate;
    total += __shfl_xor_sync(kAll, total, 4);
    total += __shfl_xor_sync(kAll, total, 8);
    gate /= total;  // exactly 1 for the only head, whose score then gets no gradient
    if (warp == 0 && column == 0 && row < a.heads) {
      a.scores[static_cast<int64_t>(image) * a.heads + row] = score;
      if (row < a.gated) a.gates[static_cast<int64_t>(image) * a.gated + row] = gate;
    }
    const float low_gate = __shfl_sync(kAll, gate, 8 * column);
    const float high_gate = __shfl_sync(kAll, gate, 8 * column + 4);
    T* features =
        static_cast<T*>(a.features) + (static_cast<int64_t>(image) * a.gated + 2 * column) * a.channels + channel;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (2 * column < a.gated)
        *reinterpret_cast<uint32_t*>(features + 16 * b) = packed<T>(low_gate * sums[b][0], low_gate * sums[b][2]);
      if (2 * column + 1 < a.gated)
        *reinterpret_cast<uint32_t*>(features + a.channels + 16 * b) =
            packed<T>(high_gate * sums[b][1], high_gate * sums[b][3]);
    }
  }
#endif  // AR_HOPPER
}

// With so many blocks on a multiprocessor. No stages: it does not fit.
Cut forward_cut(const ForwardSweep& a, int per_processor) {
  Cut cut = {};
  if (a.channels < kFewestChannels || a.channels % kRow != 0 || a.positions < 1) return cut;
  cut.per_processor = per_processor;
  cut.blocks = kRow / 16;
  cut.warps = a.channels / kRow;
  while (cut.warps > kWarps && cut.warps % 2 == 0 && cut.blocks < kMostBlocks) cut.blocks *= 2, cut.warps /= 2;
  if (cut.warps > most_warps(cut.blocks) / per_processor) return cut;
  cut.tiles = (a.positions + kTile - 1) / kTile;
  cut.stage_bytes = kTile * 2 * a.channels;
  const int parts = 2 * cut.warps * kTile * kHeads * 4, scores = cut.warps * kHeads * 4;
  const int stages = (shared_bytes(per_processor) - 1024 - parts - scores - 8 * kMostStages) / cut.stage_bytes;
  cut.stages = stages < 2 ? 0 : std::min(stages, kMostStages);
  cut.parts = cut.stages * cut.stage_bytes;
  cut.rest = cut.parts + parts;
  cut.barriers = cut.rest + scores;
  cut.bytes = cut.barriers + 8 * kMostStages + 1024;  // tiles begin at a multiple of 1024
  return cut;
}

// As many blocks a multiprocessor as have three stages each: one works while others wait.
Cut forward_cut(const ForwardSweep& a) {
  for (int per_processor = 4; per_processor > 1; per_processor /= 2) {
    const Cut cut = forward_cut(a, per_processor);
    if (cut.stages >= 3) return cut;
  }
  return forward_cut(a, 1);
}

int tiles_of_split(const Cut& cut, int splits) { return (cut.tiles + splits - 1) / splits; }

template <class T, int kBlocks>
cudaError_t sweep(const ForwardSweep& a, const Cut& cut, cudaStream_t stream) {
  CUtensorMap z;
  if (!encode<T>(&z, a.z, a.images, a.channels, a.positions, a.channels, kTile)) return cudaErrorInvalidValue;
  const int splits = std::max(a.splits, 1), in_all = a.images * splits;
  const int blocks = std::min(in_all, cut.per_processor * processors());
  const Share share = {tiles_of_split(cut, splits), in_all / blocks, in_all % blocks};
  return launch<forward_kernel<T, kBlocks>>(blocks, 32 * cut.warps, cut.bytes, stream, z, a, cut, share);
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const Cut cut = forward_cut(a);
  if (cut.blocks == 16) return sweep<T, 16>(a, cut, stream);
  return cut.blocks == 8 ? sweep<T, 8>(a, cut, stream) : sweep<T, 4>(a, cut, stream);
}

}  // namespace

bool can_sweep_forward(const ForwardSweep& a) {
  if (!is_half(a)) return false;
  const Cut cut = forward_cut(a);
  const int splits = std::max(a.splits, 1);
  return is_channels_last(a.z) && cut.stages > 0 && (splits - 1) * tiles_of_split(cut, splits) < cut.tiles &&
         static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

int forward_splits(const ForwardSweep& a, bool alike) {
  constexpr int64_t kLarge = 1 << 19, kSplit = 1 << 18;  // bytes of an image, of a split
  const Cut cut = forward_cut(a);
  const int64_t bytes = int64_t{2} * a.channels * a.positions;
  // A merge follows: worth its launch where most of the GPU would idle.
  const bool few = 4 * a.images <= processors() || (2 * a.images <= processors() && bytes >= kLarge);
  const int64_t wanted = alike ? bytes / kSplit : few ? cut.per_processor * processors() / a.images : 1;
  const int splits = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, cut.tiles / 2)));
  const int tiles = tiles_of_split(cut, splits);
  return (cut.tiles + tiles - 1) / tiles;  // none of them empty
}

cudaError_t sweep_forward(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward(a)) return cudaErrorInvalidValue;
  if (a.splits > 1 && (a.part_m == nullptr || a.part_d == nullptr || a.part_p == nullptr)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
