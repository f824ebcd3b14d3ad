// The forward sweep on Hopper of few images, each spread over a cluster (half precision, both layouts): one read of the
// map, one launch, nothing to merge.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l    (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A block has some of an image's positions. Of a tile each of its warps makes the logits of 16 positions, with all
// channels, and adds all positions to P of some channels, with the weights of all warps. At the end blocks tell each
// other everything at once, since scores are sums as P is: each finishes a share of the channels, for which all sums
// are rescaled to the common maximum. The mean over positions is one more column of P, whose weights are 1.

#include "attend_forward.h"

#include <algorithm>

#include "gates.cuh"
#include "sweep.cuh"

namespace ar_kernels {

namespace {

constexpr int kStep = 16;               // positions, channels of a matrix product
constexpr int kMostClusterBlocks = 16;  // of a cluster
constexpr int kTogether = 8;            // products whose loads are under way together
constexpr int kLeastBytes = 24 * 1024;  // of a block's share of an image; hopper.py spreads twice as large ones
constexpr int kGrain = 8;               // channels that a block finishes come in whole kGrains

// How an image is cut, and where what lies in shared memory.
struct SpreadCut {
  int blocks, positions;  // of a cluster; of a block, whole kSteps: the last one has what is left
  int own_channels;       // that a block finishes, if so many are left for it
  int own_reciprocal;     // of as many kGrains, in 65536ths
  int boxes;              // of a tile in channels_last: 1, or where channels are no whole planes, one of each plane
  int stages;             // a stage has a tile
  int w;                  // [blocks of channels, kHeads, 4] pairs of words: W_H
  int masks;              // [2, warps, 32] pairs of words: a tile's masks, in turns
  int maxima;             // [warps, kHeads] floats: of a tile's logits
  int totals;             // [warps, kHeads] pairs of floats: d, W_G P
  int given;              // [blocks, 1 or with the mean's 2, own channels] float4s: P of all heads; room for 2
  int given_stats;        // [blocks, kHeads] float4s: m, d, W_G P
  int shares;             // [warps, kMostClusterBlocks, kHeads] floats: what P of a block is multiplied by
  int barriers, bytes;
};

AR_ANYWHERE constexpr int tile_bytes(int channel_blocks, int warps) {
  return channel_blocks * kStep * warps * kStep * 2;
}

// Channels of a box in NCHW, of which the copy engine takes 256 at most.
AR_ANYWHERE constexpr int box_rows(int channel_blocks) {
  return channel_blocks > 16 ? kStep * channel_blocks / 2 : kStep * channel_blocks;
}

// kBlocks: of 16 channels, the last of which may be zeros. kLast: channels_last, else NCHW.
template <class T, int kBlocks, int kWarps, bool kLast>
__global__ void __launch_bounds__(32 * (kWarps + 1), 1)
    forward_spread_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ ForwardSweep a,
                          const __grid_constant__ SpreadCut cut) {
#if AR_HOPPER
  constexpr int kTile = kStep * kWarps, kOwn = kBlocks / kWarps;  // blocks of P that a warp has: `warp`, + kWarps, ...
  static_assert(kBlocks % kWarps == 0 && kWarps % 4 == 0 && kBlocks % kTogether == 0);
  constexpr int kMean = kHeads;  // the column of the mean
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = kept(shared_address(memory));
  const auto full = [&](int stage) { return base + cut.barriers + 8 * stage; };
  const auto used = [&](int stage) { return base + cut.barriers + 8 * (kMostStages + stage); };
  const uint32_t everything = base + cut.barriers + 8 * 2 * kMostStages;  // that the cluster tells this block
  const int rank = cut.blocks > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int image = blockIdx.x / cut.blocks;
  const int begin = rank * cut.positions, count = min(cut.positions, a.positions - begin);
  const int tiles = (count + kTile - 1) / kTile;
  const int kinds = a.mean != nullptr ? 2 : 1;  // of what is given of a channel
  const int first_channel = rank * cut.own_channels;
  const int own_channels = max(0, min(cut.own_channels, a.channels - first_channel));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // A tile has rows of 128 bytes: in channels_last [planes of 64 channels, kTile, 64 channels], else [kTile / 64,
  // 16 kBlocks, 64 positions].
  constexpr int kRowBytes = 2 * kRow, kBoxRows = box_rows(kBlocks);
  if (warp == kWarps) {  // asks for the map
    if (lane == 0) {
#pragma unroll 1
      for (int stage = 0; stage < cut.stages; ++stage) {
        barrier_init(full(stage), 1);
        barrier_init(used(stage), kWarps);
      }
      barrier_init(everything, 1);
      fence_barrier_init();
      barrier_arrive_expect(everything, cut.blocks * 16 * (kinds * own_channels + a.heads));
    }
    cluster_arrive();
    __syncthreads();
    int stage = 0;
    uint32_t parity = 1;
#pragma unroll 1
    for (int tile = 0; lane == 0 && tile < tiles; ++tile) {
      const int position = begin + tile * kTile;
      uint32_t to = base + stage * tile_bytes(kBlocks, kWarps);
      barrier_wait(used(stage), parity);
      barrier_arrive_expect(full(stage), tile_bytes(kBlocks, kWarps));
      if constexpr (kLast) {
#pragma unroll 1
        for (int box = 0; box < cut.boxes; ++box, to += kTile * kRowBytes)
          tensor_load(to, &z_map, kRow * box, position, 0, image, full(stage), kEvictNormal);
      } else {
#pragma unroll 1
        for (int p = position; p < position + kTile; p += kRow)
#pragma unroll 1
          for (int channel = 0; channel < kStep * kBlocks; channel += kBoxRows, to += kBoxRows * kRowBytes)
            tensor_load(to, &z_map, p, channel, image, 0, full(stage), kEvictNormal);
      }
      if (++stage == cut.stages) stage = 0, parity ^= 1;
    }
    __syncwarp();
    cluster_wait();
    return;
  }
  cluster_arrive();
  __syncthreads();

  // W_H, as a lane multiplies by it.
  constexpr int kThreads = 32 * kWarps, kItems = (kBlocks * kHeads * 4 + kThreads - 1) / kThreads;
  uint2* weights = reinterpret_cast<uint2*>(memory + cut.w);
  const auto load_weights = [&](const auto* w) {
    uint2 pairs[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = threadIdx.x + i * kThreads, of_head = item / 4 % kHeads;
      const int channel = item / (4 * kHeads) * kStep + item % 4 * 2;
      const auto* from = w + of_head * a.channels + channel;
      pairs[i] = make_uint2(0, 0);
      if (of_head < a.heads && channel < a.channels) pairs[i].x = weight_pair<T>(from);
      if (of_head < a.heads && channel + 8 < a.channels) pairs[i].y = weight_pair<T>(from + 8);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (threadIdx.x + i * kThreads < kBlocks * kHeads * 4) weights[threadIdx.x + i * kThreads] = pairs[i];
  };
  if (a.w.kind == Kind::kFloat)  // asked once, so that no load waits for another
    load_weights(static_cast<const float*>(a.w.data));
  else
    load_weights(static_cast<const T*>(a.w.data));

  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh). Of logits
  // rows are positions and columns heads, twice; of P rows are channels and columns heads, then the mean.
  const int row = lane / 4, column = lane % 4, head = 2 * column % kHeads;
  const bool is_again = column >= kHeads / 2;  // what another lane has of the logits
  float biases[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) biases[i] = head + i < a.heads && a.b.data != nullptr ? value_of(a.b, head + i) : 0.f;
  const int of_gate = lane / 8;  // a lane's head while scores and gates are made
  const float score_bias = of_gate < a.heads && a.score_b.data != nullptr ? value_of(a.score_b, of_gate) : 0.f;
  float score_weights[kOwn][4];  // of P as this lane has it
#pragma unroll
  for (int i = 0; i < 4 * kOwn; ++i) score_weights[i / 4][i % 4] = 0;
  const auto load_score_weights = [&](const auto* w) {
#pragma unroll
    for (int i = 0; i < 4 * kOwn; ++i) {
      const int of_head = 2 * column + i % 2, channel = (warp + i / 4 * kWarps) * kStep + row + i % 4 / 2 * 8;
      if (of_head < a.heads && channel < a.channels)
        score_weights[i / 4][i % 4] = value_of(w[of_head * a.channels + channel]);
    }
  };
  if (a.score_w.data != nullptr && a.score_w.kind == Kind::kFloat)  // without, they weigh every head alike
    load_score_weights(static_cast<const float*>(a.score_w.data));
  else if (a.score_w.data != nullptr)
    load_score_weights(static_cast<const T*>(a.score_w.data));
  const auto all_sync = [] { named_sync(1, kThreads); };  // of all that are left
  all_sync();

  // Where a lane's row is of the first 16 by 16 elements that are multiplied, of four matrices: of logits the second
  // and fourth are the next eight positions, the third and fourth the next eight channels; of P the other way round.
  const auto place = [&](int position, int block, int more_positions, int more_channels) {
    return kLast ? block / 4 * kTile * kRowBytes +
                       swizzled(position + 8 * more_positions + lane % 8, block % 4 * 2 + more_channels)
                 : position / kRow * kStep * kBlocks * kRowBytes +
                       swizzled(kStep * block + 8 * more_channels + lane % 8, position % kRow / 8 + more_positions);
  };
  const uint32_t of_logits = kept(base + place(kStep * warp, 0, lane / 8 % 2, lane / 16));
  const uint32_t of_pool = kept(base + place(0, warp, lane / 16, lane / 8 % 2));
  const auto of_block = [](uint32_t at, int block) {
    return kLast ? (at ^ block % 4 * 32) + block / 4 * kTile * kRowBytes : at + block * kStep * kRowBytes;
  };
  const auto of_group = [](uint32_t at, int group) {  // of 16 positions
    return kLast ? at + group * kStep * kRowBytes : (at ^ group % 4 * 32) + group / 4 * kStep * kBlocks * kRowBytes;
  };
  float2* maxima = reinterpret_cast<float2*>(memory + cut.maxima);
  const auto* own_weights = reinterpret_cast<const uint2*>(memory + kept(cut.w + (row % kHeads * 4 + column) * 8));
  const int own_position = kept(kStep * warp + row);  // of a tile; and the eighth after it
  const int own_masks = kept(cut.masks + (128 * warp + 32 * column + row / 2 * 4 + row % 2) * 2);
  const int lane_masks = kept(cut.masks + 8 * lane);
  float m[2] = {-INFINITY, -INFINITY}, d[2] = {};  // of this lane's heads; d: of its positions
  float pooled[kOwn][4];                           // P [16 channels, 8 columns]
#pragma unroll
  for (int i = 0; i < 4 * kOwn; ++i) pooled[i / 4][i % 4] = 0;
  int stage = 0;
  uint32_t parity = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t z = stage * tile_bytes(kBlocks, kWarps);
    barrier_wait(full(stage), parity);

    constexpr int kChains = 4;  // of products that don't wait for each other
    float l[kChains][4];
#pragma unroll
    for (int i = 0; i < 4 * kChains; ++i) l[i / 4][i % 4] = 0;
#pragma unroll 1
    for (int first = 0; first < kBlocks; first += kTogether) {
      uint32_t fragments[kTogether][4];
      uint2 w[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const uint32_t from = of_block(of_block(of_logits + z, first), i);
        w[i] = own_weights[(first + i) * kHeads * 4];
        if constexpr (kLast)
          load_matrix(fragments[i], from);
        else
          load_matrix_transposed(fragments[i], from);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) mma<T>(l[i % kChains], fragments[i], w[i].x, w[i].y);
    }
    const int left = count - tile * kTile - own_position;  // positions, this lane's first one included
#pragma unroll
    for (int i = 0; i < 4; ++i) l[0][i] = l[0][i] + l[1][i] + (l[2][i] + l[3][i]) + biases[i % 2];
    if (a.logits != nullptr && !is_again) {
      float* to = a.logits + (static_cast<int64_t>(image) * a.heads + head) * a.positions + (begin + count - left);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (head + i % 2 < a.heads && i / 2 * 8 < left) to[i % 2 * a.positions + i / 2 * 8] = l[0][i];
    }
    float most[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (left <= 0) l[0][i] = -INFINITY;
      if (left <= 8) l[0][2 + i] = -INFINITY;
      most[i] = maximum(l[0][i], l[0][2 + i]);
    }

    // Masks, as of the maximum up to the tile before; where one has grown by more than kSlack, and at first, once more
    // as of this tile's.
    const int turn = tile % 2 * 256 * kWarps;  // of masks: bytes
    float sums[2];
    const auto make_masks = [&] {
      sums[0] = sums[1] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float mask = power_of_two((l[0][i] - origin(m[i % 2])) * kLog2OfE);
        sums[i % 2] += mask;
        if (is_again) mask = 2 * column + i % 2 == kMean && i / 2 * 8 < left ? 1 : 0;
        reinterpret_cast<T*>(memory + own_masks + turn)[16 * (i % 2) + 2 * (i / 2)] = rounded<T>(mask);
      }
    };
    bool has_grown = tile == 0;
    if (tile > 0) {
      make_masks();
      const bool is_less = most[0] <= m[0] + kSlack && most[1] <= m[1] + kSlack;  // not where there is a NaN
      has_grown = named_any(1, kThreads, !is_less);
    }
    if (has_grown) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) most[i] = maximum(most[i], __shfl_xor_sync(kAll, most[i], lanes));
      if (row == 0 && !is_again) maxima[kHeads / 2 * warp + column] = make_float2(most[0], most[1]);
      all_sync();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float2 other = maxima[kHeads / 2 * i + head / 2];
        most[0] = maximum(most[0], other.x), most[1] = maximum(most[1], other.y);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        most[i] = maximum(m[i], most[i]);
        const float shrink = power_of_two((m[i] - origin(most[i])) * kLog2OfE);
        m[i] = most[i];
        d[i] *= shrink;
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (!is_again) pooled[j][i] *= shrink, pooled[j][2 + i] *= shrink;
      }
      make_masks();
      all_sync();
    }
    d[0] += sums[0], d[1] += sums[1];

    // Not of what another block has, which may be infinite: times 0 it would be NaN.
    const int groups = (count - tile * kTile + kStep - 1) / kStep;
    float others[4] = {};  // of the only block's every second product, which then does not wait for the one before
    constexpr int kGroups = kOwn < 2 ? kWarps : kOwn < 4 ? 4 : 1;
#pragma unroll 1
    for (int first = 0; first < kWarps; first += kGroups) {
      uint32_t fragments[kGroups][kOwn][4];
      uint2 of_positions[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint32_t at = of_group(of_group(of_pool + z, first), j);
        of_positions[j] = *reinterpret_cast<const uint2*>(memory + lane_masks + turn + 256 * (first + j));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const uint32_t from = at + i * (kLast ? kWarps / 4 * kTile : kWarps * kStep) * kRowBytes;
          if constexpr (kLast)
            load_matrix_transposed(fragments[j][i], from);
          else
            load_matrix(fragments[j][i], from);
        }
      }
#pragma unroll
      for (int i = 0; i < kGroups * kOwn; ++i)
        if (first + i / kOwn < groups)
          mma<T>(kOwn == 1 && i % 2 == 1 ? others : pooled[i % kOwn], fragments[i / kOwn][i % kOwn],
                 of_positions[i / kOwn].x, of_positions[i / kOwn].y);
    }
    if constexpr (kOwn == 1)
#pragma unroll
      for (int i = 0; i < 4; ++i) pooled[0][i] += others[i];
    __syncwarp();
    if (lane == 0) barrier_arrive(used(stage));
    if (++stage == cut.stages) stage = 0, parity ^= 1;
  }

  // P to the blocks that finish its channels: columns 0 and 1 of lanes give all heads of a channel, 2 and 3 the mean.
  cluster_wait();        // their barriers are there
  float scores[2] = {};  // W_G P, of this lane's channels
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float (&p)[4] = pooled[i];
    scores[0] += p[0] * score_weights[i][0] + p[2] * score_weights[i][2];
    scores[1] += p[1] * score_weights[i][1] + p[3] * score_weights[i][3];
    const bool is_first = column % 2 == 0;
    const float x = __shfl_xor_sync(kAll, is_first ? p[2] : p[0], 1);
    const float y = __shfl_xor_sync(kAll, is_first ? p[3] : p[1], 1);
    const int channel = (warp + i * kWarps) * kStep + row + column % 2 * 8;
    if (channel >= a.channels || column / 2 >= kinds) continue;
    const float4 values = is_first ? make_float4(p[0], p[1], x, y) : make_float4(x, y, p[2], p[3]);
    const int to = channel / kGrain * cut.own_reciprocal >> 16, first = to * cut.own_channels;
    const int there = min(cut.own_channels, a.channels - first);
    const uint32_t block = cluster_address(base, to);
    store_to_cluster(block + cut.given + 16 * ((rank * kinds + column / 2) * there + channel - first), values,
                     block + everything - base);
  }
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      d[i] += __shfl_xor_sync(kAll, d[i], lanes);
      scores[i] += __shfl_xor_sync(kAll, scores[i], lanes);
    }
  float2* totals = reinterpret_cast<float2*>(memory + cut.totals);
  if (row == 0 && column < kHeads / 2) {
    totals[kHeads * warp + 2 * column] = make_float2(d[0], scores[0]);
    totals[kHeads * warp + 2 * column + 1] = make_float2(d[1], scores[1]);
  }
  all_sync();
  if (warp == 0) {
    const float2 own = lane % 8 < kWarps ? totals[kHeads * (lane % 8) + of_gate] : make_float2(0, 0);
    float total = own.x, score = own.y;
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      total += __shfl_xor_sync(kAll, total, lanes);
      score += __shfl_xor_sync(kAll, score, lanes);
    }
    const float even = __shfl_sync(kAll, m[0], of_gate / 2), odd = __shfl_sync(kAll, m[1], of_gate / 2);
    const float4 own_stats = make_float4(of_gate % 2 == 0 ? even : odd, total, score, 0);
    for (int to = lane % 8; to < cut.blocks; to += 8)
      if (of_gate < a.heads)
        store_to_cluster(cluster_address(base + cut.given_stats + 16 * (kHeads * rank + of_gate), to), own_stats,
                         cluster_address(everything, to));
  }

  // What all blocks have of a share of the channels. Each warp knows scores and gates for itself; a lane has a head,
  // and block lane % 8 and the eighth after it.
  barrier_wait_cluster(everything, 0);
  float4 stats[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = lane % 8 + 8 * i;
    stats[i] = make_float4(-INFINITY, 0, 0, 0);
    if (from < cut.blocks && of_gate < a.heads)
      stats[i] = reinterpret_cast<const float4*>(memory + cut.given_stats)[kHeads * from + of_gate];
  }
  float largest = maximum(stats[0].x, stats[1].x);
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) largest = maximum(largest, __shfl_xor_sync(kAll, largest, lanes));
  const float low = power_of_two((stats[0].x - origin(largest)) * kLog2OfE);
  const float high = power_of_two((stats[1].x - origin(largest)) * kLog2OfE);
  float total = low * stats[0].y + high * stats[1].y, score = low * stats[0].z + high * stats[1].z;
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) {
    total += __shfl_xor_sync(kAll, total, lanes);
    score += __shfl_xor_sync(kAll, score, lanes);
  }
  const float scale = __fdividef(1, total);
  float* shares = reinterpret_cast<float*>(memory + cut.shares) + warp * kMostClusterBlocks * kHeads;
  shares[lane % 8 * kHeads + of_gate] = low * scale;  // 0 from cut.blocks on
  shares[(lane % 8 + 8) * kHeads + of_gate] = high * scale;
  __syncwarp();
  score = score * scale + score_bias;
  float gate = of_gate < a.gated ? __expf(gate_tanh(score)) : 0.f, gates = gate;
  gates += __shfl_xor_sync(kAll, gates, 8);
  gates += __shfl_xor_sync(kAll, gates, 16);
  gate = gate == gates ? 1 : __fdividef(gate, gates);  // exactly 1 for the only head, whose score gets no gradient
  if (rank == 0 && warp == 0 && lane % 8 == 0 && of_gate < a.heads) {
    a.lse[image * a.heads + of_gate] = origin(largest) + __logf(total);
    if (a.gated > 0) a.scores[image * a.heads + of_gate] = score;
    if (of_gate < a.gated) a.gates[image * a.gated + of_gate] = gate;
  }
  float own_gates[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) own_gates[k] = __shfl_sync(kAll, gate, 8 * k);
#pragma unroll 1
  for (int channel = threadIdx.x; channel < own_channels; channel += kThreads) {
    constexpr int kAtOnce = 4;  // blocks
    float sums[kHeads] = {}, mean = 0;
#pragma unroll 1
    for (int first = 0; first < cut.blocks; first += kAtOnce) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        const int at = cut.given + 16 * (min(i, cut.blocks - 1) * kinds * own_channels + channel);
        const float4 p = *reinterpret_cast<const float4*>(memory + at);
        const float4 share = reinterpret_cast<const float4*>(shares)[i];
        sums[0] += share.x * p.x, sums[1] += share.y * p.y, sums[2] += share.z * p.z, sums[3] += share.w * p.w;
        if (kinds > 1 && i < cut.blocks) mean += *reinterpret_cast<const float*>(memory + at + 16 * own_channels);
      }
    }
    const int to = first_channel + channel;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k < a.heads) a.pooled[(image * a.heads + k) * a.channels + to] = sums[k];
      if (k < a.gated)
        static_cast<T*>(a.features)[(image * a.gated + k) * a.channels + to] = rounded<T>(own_gates[k] * sums[k]);
    }
    if (kinds > 1) a.mean[image * a.channels + to] = mean * __fdividef(1, a.positions);
  }
#endif  // AR_HOPPER
}

// An image in so many blocks, or fewer where none of its positions would be left for some.
template <int kBlocks, int kWarps>
SpreadCut spread_cut(const ForwardSweep& a, int blocks) {
  const auto rounded_up = [](int value, int to) { return (value + to - 1) / to; };
  SpreadCut cut = {};
  cut.positions = rounded_up(rounded_up(a.positions, kStep), blocks) * kStep;
  cut.blocks = rounded_up(a.positions, cut.positions);
  const int own_grains = rounded_up(a.channels / kGrain, cut.blocks);
  cut.own_channels = own_grains * kGrain;
  cut.own_reciprocal = rounded_up(1 << 16, own_grains);
  cut.boxes = a.channels == kBlocks * kStep ? 1 : kBlocks / 4;
  int bytes = 0;
  const auto take = [&](int* place, int count) {
    *place = bytes;
    bytes += count;
  };
  constexpr int kTile = tile_bytes(kBlocks, kWarps);
  const int tiles = rounded_up(cut.positions, kStep * kWarps);
  for (cut.stages = std::min(tiles, kMostStages); cut.stages > 0; --cut.stages) {
    bytes = cut.stages * kTile;
    take(&cut.given, cut.blocks * 2 * cut.own_channels * 16);
    take(&cut.given_stats, cut.blocks * kHeads * 16);
    take(&cut.w, kBlocks * kHeads * 4 * 8);
    take(&cut.masks, 2 * kWarps * 32 * 8);
    take(&cut.shares, kWarps * kMostClusterBlocks * kHeads * 4);
    take(&cut.totals, kWarps * 2 * kHeads * 4);
    take(&cut.maxima, kWarps * kHeads * 4);
    take(&cut.barriers, 8 * (2 * kMostStages + 1));
    cut.bytes = bytes + 1024;  // tiles begin at a multiple of it
    if (cut.bytes <= kSharedBytes) break;
  }
  return cut;
}

template <class T, int kBlocks, int kWarps, bool kLast>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  constexpr auto kKernel = forward_spread_kernel<T, kBlocks, kWarps, kLast>;
  // In as many blocks as there are multiprocessors for. Where not all clusters find room at once, small blocks may
  // share one; but of more than 8 a cluster would wait for others all the same.
  constexpr int kThreads = 32 * (kWarps + 1);
  const int64_t bytes = int64_t{2} * a.channels * a.positions;
  const int64_t most = std::min<int64_t>(processors() / a.images, bytes / kLeastBytes);
  SpreadCut cut = spread_cut<kBlocks, kWarps>(a, 1);
  for (int blocks = kMostClusterBlocks; blocks > 1; blocks /= 2) {
    if (blocks > most) continue;
    const SpreadCut more = spread_cut<kBlocks, kWarps>(a, blocks);
    const int sharing = blocks <= 8 && more.bytes <= shared_bytes(2) ? 2 : 1;
    if (active_clusters<kKernel>(more.blocks, kThreads, sharing) < a.images) continue;
    cut = more;
    break;
  }
  const uint64_t step = sizeof(T), c = a.channels, s = a.positions, n = a.images;
  constexpr uint32_t kPlanes = kBlocks / 4, kBoxRows = box_rows(kBlocks);
  CUtensorMap z;
  bool is_encoded;
  if (!kLast)
    is_encoded =
        encode_map<T, 4>(&z, a.z.data, {s, c, n, 1}, {a.z.channel * step, a.z.image * step, n * a.z.image * step},
                         {kRow, kBoxRows, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  else if (cut.boxes == 1)
    is_encoded =
        encode_map<T, 4>(&z, a.z.data, {kRow, s, kPlanes, n}, {a.z.position * step, kRow * step, a.z.image * step},
                         {kRow, kStep * kWarps, kPlanes, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  else
    is_encoded =
        encode_map<T, 4>(&z, a.z.data, {c, s, 1, n}, {a.z.position * step, s * a.z.position * step, a.z.image * step},
                         {kRow, kStep * kWarps, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!is_encoded) return cudaErrorInvalidValue;
  return launch_clusters<kKernel>(cut.blocks, a.images, kThreads, cut.bytes, stream, z, a, cut);
}

template <class T, bool kLast>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  if (a.channels <= 8 * kStep) return sweep<T, 8, 8, kLast>(a, stream);
  if (a.channels <= 16 * kStep) return sweep<T, 16, 8, kLast>(a, stream);
  if (a.channels <= 24 * kStep) return sweep<T, 24, 8, kLast>(a, stream);
  return sweep<T, 32, 4, kLast>(a, stream);
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  return a.z.channel == 1 ? sweep<T, true>(a, stream) : sweep<T, false>(a, stream);
}

}  // namespace

bool can_sweep_forward_spread(const ForwardSweep& a) {
  constexpr int kMostChannels = 32 * kStep;
  if (!is_half(a) || a.splits > 1) return false;
  if (a.channels < kGrain || a.channels % kGrain != 0 || a.channels > kMostChannels || a.positions < 1) return false;
  const bool is_rows =
      a.z.position == 1 && a.positions % 8 == 0 && a.z.channel > 0 && a.z.channel % 8 == 0 && a.z.image % 8 == 0;
  if (!is_channels_last(a.z) && !(is_rows && a.z.image > 0)) return false;
  return a.images < INT32_MAX / (kHeads * kMostChannels);
}

cudaError_t sweep_forward_spread(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_spread(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
