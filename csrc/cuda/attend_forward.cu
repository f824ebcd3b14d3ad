// The forward sweep on Hopper of tiles of all channels (sweep.cuh): one read of the map.
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

constexpr int kMean = kHeads;  // the column of the mean

constexpr int kChannels = 128;  // of a row of P, that a warp stores at once

// Offsets from Cut::rest, in bytes; `rows` positions of a tile, rounded up.
struct Rest {
  int logits;   // [rows, kHeads] floats
  int weights;  // [warps, rows, 8]: softmax weights of each position, by each warp for itself
  int scores;   // [chunks, kHeads] floats
  int pooled;   // [kHeads + 1, pitch] floats: P, the mean's row at kMean
  int pitch, bytes;
};

inline Rest rest_of(int warps, int rows, int channels) {
  Rest rest = {};
  rest.pitch = channels + 8;  // rows 2 apart begin in different banks
  rest.weights = rest.logits + rows * kHeads * 4;
  rest.scores = rest.weights + warps * rows * 16;
  rest.pooled = rest.scores + kHeads * (channels + kChannels - 1) / kChannels * 4;
  rest.pooled = (rest.pooled + 15) / 16 * 16;
  rest.bytes = rest.pooled + (kHeads + 1) * rest.pitch * 4;
  return rest;
}

// kBlocks: of 16 channels, of a warp. kTiles: of 16 positions, of a tile. kPer: blocks that share a multiprocessor.
template <class T, Layout kLayout, int kBlocks, int kTiles, int kPer>
__global__ void __launch_bounds__(32 * kMostWarps / kPer, kPer)
    forward_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ ForwardSweep a,
                   const __grid_constant__ Cut cut, const __grid_constant__ Rest rest) {
#if AR_HOPPER
  constexpr int kEntries = 16 * kTiles * kHeads;  // positions and heads of a tile
  constexpr int kOwn = (16 * kTiles + 31) / 32;   // positions of a lane, 32 apart
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = shared_address(memory);
  const auto full = [&](int stage) { return base + cut.barriers + 8 * stage; };
  const int splits = max(a.splits, 1), split_tiles = (cut.tiles + splits - 1) / splits;
  const int64_t splits_in_all = static_cast<int64_t>(a.images) * splits;
  const int first = static_cast<int>(splits_in_all * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(splits_in_all * (blockIdx.x + 1) / gridDim.x);
  const auto begin_of = [&](int split) { return split % splits * split_tiles; };
  const auto end_of = [&](int split) { return min(begin_of(split) + split_tiles, cut.tiles); };

  // One thread asks for all copies, in order, as stages get free.
  int asked_split = first, asked_tile = begin_of(first);
  const auto load = [&](int stage) {
    if (asked_split >= last) return;
    barrier_arrive_expect(full(stage), 2 * a.channels * cut.tile);
    load_tile<kLayout>(cut, a.channels, base + stage * cut.stage_bytes, &z_map, asked_split / splits,
                       asked_tile * cut.tile, full(stage));
    if (++asked_tile < end_of(asked_split)) return;
    ++asked_split;
    asked_tile = begin_of(asked_split);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < cut.stages; ++stage) barrier_init(full(stage), 1);
    fence_barrier_init();
    for (int stage = 0; stage < cut.stages; ++stage) load(stage);
  }

  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh).
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int warps = blockDim.x / 32, threads = blockDim.x, first_channel = 16 * kBlocks * warp;
  float* parts = reinterpret_cast<float*>(memory + cut.parts);                // [warps, 16 kTiles, 8]
  float* logits = reinterpret_cast<float*>(memory + cut.rest + rest.logits);  // [16 kTiles, kHeads]
  float* score_parts = reinterpret_cast<float*>(memory + cut.rest + rest.scores);
  float* pooled = reinterpret_cast<float*>(memory + cut.rest + rest.pooled);
  uint4* own_weights = reinterpret_cast<uint4*>(memory + cut.rest + rest.weights) + 16 * kTiles * warp;
  const auto address = [&](int tile, int b) { return matrix_row<kLayout>(cut, warp * kBlocks + b, tile); };

  uint32_t masks[kBlocks][2];  // W_H
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      masks[b][half] =
          row < a.heads ? weight_pair<T>(a.w, row * a.channels + first_channel + 16 * b + 8 * half + 2 * column) : 0;
  const int head = threadIdx.x % kHeads;  // of this thread, in the sum over warps
  const float bias = head < a.heads && a.b.data != nullptr ? value_of(a.b, head) : 0.f;

  __syncthreads();
  int stage = 0, stage_before = -1;
  uint32_t parity = 0;
  for (int split = first; split < last; ++split) {
    const int image = split / splits;
    float m[kHeads], d[kHeads];  // d: of this lane's positions
    float sums[kBlocks][4];      // [16 channels, 8 columns]: heads, then the mean
#pragma unroll
    for (int k = 0; k < kHeads; ++k) m[k] = -INFINITY, d[k] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0;

    for (int of_image = begin_of(split); of_image < end_of(split); ++of_image) {
      const int position = of_image * cut.tile, count = min(cut.tile, a.positions - position);
      const uint32_t z = base + stage * cut.stage_bytes;
      barrier_wait(full(stage), parity);

      // Logits, of this warp's channels.
      float both[kTiles][2][4];  // two chains of products that don't wait for each other
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 8; ++i) both[tile][i / 4][i % 4] = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t fragment[4];
          load_factor<kLayout, true>(fragment, z + address(tile, b));
          mma<T>(both[tile][b % 2], fragment, masks[b][0], masks[b][1]);
        }
      if (column < kHeads / 2)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(parts + warp * kEntries + (16 * tile + 8 * half + row) * kHeads + 2 * column) =
                make_float2(both[tile][0][2 * half] + both[tile][1][2 * half],
                            both[tile][0][2 * half + 1] + both[tile][1][2 * half + 1]);
      __syncthreads();
      // All warps are through with the tile before.
      if (threadIdx.x == 0 && stage_before >= 0) load(stage_before);

      // Of all channels.
      for (int entry = threadIdx.x; entry < kEntries; entry += threads) {
        float logit = bias;
#pragma unroll 4
        for (int other = 0; other < warps; ++other) logit += parts[other * kEntries + entry];
        const int s = entry / kHeads;
        logits[entry] = s < count ? logit : -INFINITY;
        if (a.logits != nullptr && s < count && head < a.heads)
          a.logits[(static_cast<int64_t>(image) * a.heads + head) * a.positions + position + s] = logit;
      }
      __syncthreads();

      // The softmax, by each warp for itself.
      float l[kOwn][kHeads], shrink[kHeads];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        float4 own = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (32 * i + lane < 16 * kTiles) own = *reinterpret_cast<const float4*>(logits + kHeads * (32 * i + lane));
        l[i][0] = own.x, l[i][1] = own.y, l[i][2] = own.z, l[i][3] = own.w;
      }
      bool shrinks = false;
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        float most = l[0][k];
#pragma unroll
        for (int i = 1; i < kOwn; ++i) most = maximum(most, l[i][k]);
        most = maximum(m[k], warp_maximum(most));
        const float start = origin(most);
        shrink[k] = __expf(m[k] - start);
        shrinks = shrinks || shrink[k] != 1;
        m[k] = most;
        d[k] *= shrink[k];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          l[i][k] = __expf(l[i][k] - start);
          d[k] += l[i][k];
        }
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int s = 32 * i + lane;
        const float real = s < count ? 1 : 0;
        if (s < 16 * kTiles)
          own_weights[s] =
              make_uint4(packed<T>(l[i][0], l[i][1]), packed<T>(l[i][2], l[i][3]), packed<T>(real, 0.f), 0);
      }
      __syncwarp();
      uint32_t weights[kTiles][2];  // [positions, columns]
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        load_matrix_transposed(weights[tile], shared_address(own_weights + 16 * tile + lane % 16));
      if (shrinks) {  // alike in all lanes
        const float low = column == 0 ? shrink[0] : column == 1 ? shrink[2] : 1.f;
        const float high = column == 0 ? shrink[1] : column == 1 ? shrink[3] : 1.f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          sums[b][0] *= low, sums[b][1] *= high;
          sums[b][2] *= low, sums[b][3] *= high;
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t fragment[4];
          load_factor<kLayout, false>(fragment, z + address(tile, b));
          mma<T>(sums[b], fragment, weights[tile][0], weights[tile][1]);
        }
      __syncwarp();
      stage_before = stage;
      if (++stage == cut.stages) stage = 0, parity ^= 1;
    }

    // The image's end: P, scores, gates, features.
#pragma unroll
    for (int k = 0; k < kHeads; ++k) d[k] = warp_sum(d[k]);
    const bool whole = splits == 1;
    const int rows = a.heads + (a.mean != nullptr);
    const int64_t part = static_cast<int64_t>(split) * rows;
    if (warp == 0 && lane < a.heads) {
      const float own = lane == 0 ? m[0] : lane == 1 ? m[1] : lane == 2 ? m[2] : m[3];
      const float total = lane == 0 ? d[0] : lane == 1 ? d[1] : lane == 2 ? d[2] : d[3];
      if (whole) {
        a.lse[image * a.heads + lane] = origin(own) + __logf(total);
      } else {
        a.part_m[part + lane] = own;
        a.part_d[part + lane] = total;
      }
    }
    const int positions = min(end_of(split) * cut.tile, a.positions) - begin_of(split) * cut.tile;
    if (!whole && threadIdx.x == 0 && a.mean != nullptr) {
      a.part_m[part + a.heads] = 0;
      a.part_d[part + a.heads] = static_cast<float>(positions);
    }
    // Columns 2 * column and + 1 of P become rows in shared memory.
    const float low = whole ? 1 / (column == 0 ? d[0] : column == 1 ? d[2] : a.positions) : 1.f;
    const float high = whole ? 1 / (column == 0 ? d[1] : d[3]) : 1.f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = pooled + 2 * column * rest.pitch + first_channel + 16 * b + 8 * half + row;
        if (2 * column <= kMean) to[0] = sums[b][2 * half] * low;
        if (2 * column < kMean) to[rest.pitch] = sums[b][2 * half + 1] * high;
      }
    __syncthreads();
    const int chunks = (a.channels + kChannels - 1) / kChannels;
    const auto values_at = [&](int r, int channel) {
      return *reinterpret_cast<const float4*>(pooled + (r == a.heads ? kMean : r) * rest.pitch + channel);
    };
    for (int unit = warp; unit < rows * chunks; unit += warps) {
      const int r = unit / chunks, channel = unit % chunks * kChannels + 4 * lane;
      if (!whole) {
        if (channel < a.channels)
          *reinterpret_cast<float4*>(a.part_p + (part + r) * a.channels + channel) = values_at(r, channel);
        continue;
      }
      const float part = channel < a.channels ? store_pooled(a, image, r, channel, values_at(r, channel)) : 0.f;
      if (r == a.heads || a.gated == 0) continue;
      const float sum = warp_sum(part);
      if (lane == 0) score_parts[unit % chunks * kHeads + r] = sum;
    }
    if (a.gated == 0 || !whole) continue;
    __syncthreads();
    float gates[kHeads];
    make_gates(a, image, score_parts, chunks, gates);
    for (int unit = warp; unit < a.gated * chunks; unit += warps) {
      const int r = unit / chunks, channel = unit % chunks * kChannels + 4 * lane;
      if (channel < a.channels) store_features<T>(a, image, r, channel, values_at(r, channel), gate_of(gates, r));
    }
  }
#endif  // AR_HOPPER
}

Layout layout_of(const ForwardSweep& a) {
  return is_of(Layout::kChannelsLast, a.z) ? Layout::kChannelsLast : Layout::kNchw;
}

Cut forward_cut(const ForwardSweep& a) {
  return cut_of(layout_of(a), a.channels, a.positions, 1, rest_of(kMostWarps, kRow, a.channels).bytes);
}

template <class T, Layout kLayout, int kBlocks, int kTiles, int kPer>
cudaError_t sweep(const ForwardSweep& a, const Cut& cut, cudaStream_t stream) {
  CUtensorMap z;
  if (!encode<T>(kLayout, &z, a.z, a.images, a.channels, a.positions, cut)) return cudaErrorInvalidValue;
  return launch<forward_kernel<T, kLayout, kBlocks, kTiles, kPer>>(
      static_cast<int>(
          std::min<int64_t>(static_cast<int64_t>(a.images) * std::max(a.splits, 1), cut.per_processor * processors())),
      32 * cut.warps, cut.bytes, stream, z, a, cut, rest_of(cut.warps, 16 * kTiles, a.channels));
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const Cut cut = forward_cut(a);
  const bool two = cut.per_processor == 2, few = cut.tile <= 16;
  if (layout_of(a) == Layout::kNchw) {
    if (cut.blocks == 1)
      return two ? sweep<T, Layout::kNchw, 1, 4, 2>(a, cut, stream) : sweep<T, Layout::kNchw, 1, 4, 1>(a, cut, stream);
    if (cut.blocks == 2)
      return two ? sweep<T, Layout::kNchw, 2, 4, 2>(a, cut, stream) : sweep<T, Layout::kNchw, 2, 4, 1>(a, cut, stream);
    return sweep<T, Layout::kNchw, 4, 4, 1>(a, cut, stream);
  }
  constexpr Layout kLast = Layout::kChannelsLast;
  if (cut.blocks == 4 && few)
    return two ? sweep<T, kLast, 4, 1, 2>(a, cut, stream) : sweep<T, kLast, 4, 1, 1>(a, cut, stream);
  if (cut.blocks == 4) return two ? sweep<T, kLast, 4, 2, 2>(a, cut, stream) : sweep<T, kLast, 4, 2, 1>(a, cut, stream);
  if (few) return two ? sweep<T, kLast, 8, 1, 2>(a, cut, stream) : sweep<T, kLast, 8, 1, 1>(a, cut, stream);
  return sweep<T, kLast, 8, 2, 1>(a, cut, stream);
}

}  // namespace

bool can_sweep_forward(const ForwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.w.kind != a.kind && a.w.kind != Kind::kFloat) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  const Cut cut = forward_cut(a);
  return is_of(layout_of(a), a.z) && cut.stages > 0 && a.splits <= cut.tiles &&
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
  const int tiles = (cut.tiles + splits - 1) / splits;
  return (cut.tiles + tiles - 1) / tiles;  // none of them empty
}

cudaError_t sweep_forward(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward(a)) return cudaErrorInvalidValue;
  if (a.splits > 1 && (a.part_m == nullptr || a.part_d == nullptr || a.part_p == nullptr)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
