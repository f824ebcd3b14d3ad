// The forward sweep of channels_last maps of many channels, on Hopper: one read of the map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l    (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A block takes whole images. The mean over positions is one more row of P, whose weights are 1.

#include "attend_forward.h"

#include <algorithm>

#include "gates.cuh"
#include "sweep.cuh"

namespace ar_kernels {

namespace {

constexpr int kMean = kHeads;  // the column of the mean

// Two adjacent weights of a row, in the map's dtype.
template <class T>
__device__ __forceinline__ uint32_t weight_pair(const Values& w, int index) {
  if (w.kind != Kind::kFloat)  // the map's own
    return *reinterpret_cast<const uint32_t*>(static_cast<const T*>(w.data) + index);
  const float2 pair = *reinterpret_cast<const float2*>(static_cast<const float*>(w.data) + index);
  return packed<T>(pair.x, pair.y);
}

struct Layout {
  // Offsets from Cut::rest, in bytes.
  int logits;   // [32, kHeads] floats
  int weights;  // [warps, 32, 8]: softmax weights of each position, by each warp for itself
  int scores;   // [warps, kHeads] floats
  int bytes;
};

inline Layout layout(int warps) {
  Layout offsets = {};
  offsets.weights = offsets.logits + 32 * kHeads * 4;
  offsets.scores = offsets.weights + warps * 32 * 16;
  offsets.bytes = offsets.scores + warps * kHeads * 4;
  return offsets;
}

// kTiles: of 16 positions, in a tile.
template <class T, int kPlanes, int kTiles>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    forward_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ ForwardSweep a,
                   const __grid_constant__ Cut cut, const __grid_constant__ Layout offsets) {
#if AR_HOPPER
  constexpr int kBlocks = kPlanes * kPlane / 16;  // of 16 channels, of a warp
  constexpr int kEntries = 16 * kTiles * kHeads;  // positions and heads of a tile
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = shared_address(memory);
  const auto full = [&](int stage) { return base + cut.barriers + 8 * stage; };
  const int first = static_cast<int>(static_cast<int64_t>(a.images) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(a.images) * (blockIdx.x + 1) / gridDim.x);
  const int begin = first * cut.tiles, end = last * cut.tiles;

  // One thread asks for all copies.
  const auto load = [&](int item, int stage) {
    barrier_arrive_expect(full(stage), cut.planes * cut.tile * 2 * kPlane);
    tensor_load(base + stage * cut.stage_bytes, &z_map, 0, item % cut.tiles * cut.tile, 0, item / cut.tiles,
                full(stage), kEvictFirst);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < cut.stages; ++stage) barrier_init(full(stage), 1);
    fence_barrier_init();
    for (int stage = 0; stage < cut.stages && begin + stage < end; ++stage) load(begin + stage, stage);
  }

  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh).
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int warps = blockDim.x / 32, threads = blockDim.x, first_channel = warp * kPlanes * kPlane;
  float* parts = reinterpret_cast<float*>(memory + cut.parts);                   // [warps, 16 kTiles, 8]
  float* logits = reinterpret_cast<float*>(memory + cut.rest + offsets.logits);  // [16 kTiles, kHeads]
  float* score_parts = reinterpret_cast<float*>(memory + cut.rest + offsets.scores);
  uint4* own_weights = reinterpret_cast<uint4*>(memory + cut.rest + offsets.weights) + 32 * warp;  // [16 kTiles, 8]
  const auto address = [&](int tile, int b) { return matrix_row(cut, warp * kPlanes + b / 4, b % 4, tile); };

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
  int item = begin, stage = 0, stage_before = 0;
  uint32_t parity = 0;
  for (int image = first; image < last; ++image) {
    float m[kHeads], d[kHeads];  // d: of this lane's positions
    float sums[kBlocks][4];      // [16 channels, 8 columns]: heads, then the mean
#pragma unroll
    for (int k = 0; k < kHeads; ++k) m[k] = -INFINITY, d[k] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0;

    for (int position = 0; position < a.positions; position += cut.tile, ++item) {
      const int count = min(cut.tile, a.positions - position);
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
          load_matrix(fragment, z + address(tile, b));
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
      if (threadIdx.x == 0 && item > begin && item - 1 + cut.stages < end) load(item - 1 + cut.stages, stage_before);

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

      // The softmax, by each warp for itself: a lane has a position.
      float4 logit = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (lane < 16 * kTiles) logit = *reinterpret_cast<const float4*>(logits + kHeads * lane);
      float l[kHeads] = {logit.x, logit.y, logit.z, logit.w}, shrink[kHeads];
      bool shrinks = false;
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const float most = maximum(m[k], warp_maximum(l[k])), start = origin(most);
        shrink[k] = __expf(m[k] - start);
        shrinks = shrinks || shrink[k] != 1;
        m[k] = most;
        l[k] = __expf(l[k] - start);
        d[k] = d[k] * shrink[k] + l[k];
      }
      if (lane < 16 * kTiles)
        own_weights[lane] =
            make_uint4(packed<T>(l[0], l[1]), packed<T>(l[2], l[3]), packed<T>(lane < count ? 1.f : 0.f, 0.f), 0);
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
          load_matrix_transposed(fragment, z + address(tile, b));
          const uint32_t by_channel[4] = {fragment[0], fragment[2], fragment[1], fragment[3]};
          mma<T>(sums[b], by_channel, weights[tile][0], weights[tile][1]);
        }
      __syncwarp();
      stage_before = stage;
      if (++stage == cut.stages) stage = 0, parity ^= 1;
    }

    // The image's end: P, scores, gates, features.
#pragma unroll
    for (int k = 0; k < kHeads; ++k) d[k] = warp_sum(d[k]);
    if (warp == 0 && lane < a.heads) {
      const float own = lane == 0 ? m[0] : lane == 1 ? m[1] : lane == 2 ? m[2] : m[3];
      const float total = lane == 0 ? d[0] : lane == 1 ? d[1] : lane == 2 ? d[2] : d[3];
      a.lse[image * a.heads + lane] = origin(own) + __logf(total);
    }
    const float low = 1 / (column == 0 ? d[0] : column == 1 ? d[2] : a.positions);
    const float high = 1 / (column == 0 ? d[1] : d[3]);
    const int k = 2 * column;  // and + 1
    float* pooled = a.pooled + (static_cast<int64_t>(image) * a.heads + k) * a.channels;
    float t[2] = {0, 0};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = first_channel + 16 * b + 8 * half + row;
        const float values[2] = {sums[b][2 * half] *= low, sums[b][2 * half + 1] *= high};
        if (k == kMean && a.mean != nullptr) a.mean[static_cast<int64_t>(image) * a.channels + channel] = values[0];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (k + i >= a.heads) continue;
          pooled[i * a.channels + channel] = values[i];
          if (a.gated > 0) t[i] += values[i] * value_of(a.score_w, (k + i) * a.channels + channel);
        }
      }
    if (a.gated == 0) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int lanes = 4; lanes < 32; lanes *= 2) t[i] += __shfl_xor_sync(kAll, t[i], lanes);
      if (row == 0 && k + i < kHeads) score_parts[warp * kHeads + k + i] = t[i];
    }
    __syncthreads();
    float gates[kHeads];
    make_gates(a, image, score_parts, warps, gates);
    const float gate[2] = {column == 0 ? gates[0] : gates[2], column == 0 ? gates[1] : gates[3]};
    T* features = static_cast<T*>(a.features) + (static_cast<int64_t>(image) * a.gated + k) * a.channels;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (k + j % 2 < a.gated)
          features[j % 2 * a.channels + first_channel + 16 * b + j / 2 * 8 + row] =
              rounded<T>(sums[b][j] * gate[j % 2]);
  }
#endif  // AR_HOPPER
}

Cut forward_cut(const ForwardSweep& a) { return cut_of(a.channels, a.positions, 1, layout(kMostWarps).bytes); }

template <class T, int kPlanes, int kTiles>
cudaError_t sweep(const ForwardSweep& a, const Cut& cut, cudaStream_t stream) {
  CUtensorMap z;
  if (!encode<T>(&z, a.z, a.images, a.positions, cut)) return cudaErrorInvalidValue;
  return launch<forward_kernel<T, kPlanes, kTiles>>(std::min(a.images, processors()), 32 * cut.warps, cut.bytes, stream,
                                                    z, a, cut, layout(cut.warps));
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const Cut cut = forward_cut(a);
  const bool two = cut.warps < cut.planes;
  if (cut.tile <= 16) return two ? sweep<T, 2, 1>(a, cut, stream) : sweep<T, 1, 1>(a, cut, stream);
  return two ? sweep<T, 2, 2>(a, cut, stream) : sweep<T, 1, 2>(a, cut, stream);
}

}  // namespace

bool can_sweep_forward(const ForwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.w.kind != a.kind && a.w.kind != Kind::kFloat) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1 || !is_channels_last(a.z)) return false;
  const Cut cut = forward_cut(a);
  return cut.stages >= 2 && static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

cudaError_t sweep_forward(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
