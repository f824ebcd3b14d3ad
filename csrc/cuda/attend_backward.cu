// The backward sweep on Hopper of tiles of all channels (sweep.cuh): one read of the map, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// A tile turns into its dZ where it lies, and leaves by the copy engine.
//
// W_H and dP lie side by side, row 2 k and 2 k + 1 of one matrix, and so do dl and a: one product makes l and dA, one
// makes dZ.

#include "attend_backward.h"

#include <algorithm>

#include "gates.cuh"
#include "sweep.cuh"

namespace ar_kernels {

namespace {

#if AR_HOPPER

// dP of an image as the kernel's weights, and what delta is the sum of: a lane with an odd row has dP of head row / 2,
// one with an even row W_H.
//   dg_k = dx_k . P_k,  du = g (dg - sum_j g_j dg_j),  dt = du (1 - tanh^2 t),  dP_k = g_k dx_k + dt_k W_G[k]
// shared: two arrays of [warps, kHeads] floats; the second is what delta is the sum of, after a barrier. A barrier for
// all threads is inside.
template <class T, int kBlocks>
__device__ __forceinline__ void pooled_gradient(const BackwardSweep& a, int image, int first_channel, bool stores,
                                                float* shared, uint32_t (&weights)[kBlocks][2]) {
  const PooledGradient& of = a.of;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4, k = row / 2;
  const int warps = blockDim.x / 32, h = lane % kHeads;
  const bool is_gradient = row % 2 == 1 && k < a.heads, is_weight = row % 2 == 0 && k < a.heads;
  const bool has_features = is_gradient && k < of.gated && of.grad_features != nullptr;
  const float* pooled = of.pooled + (static_cast<int64_t>(image) * a.heads + k) * a.channels;
  const T* dx = static_cast<const T*>(of.grad_features) + (static_cast<int64_t>(image) * of.gated + k) * a.channels;
  const auto features_at = [&](int channel) {
    return has_features ? unpacked<T>(*reinterpret_cast<const uint32_t*>(dx + channel)) : make_float2(0, 0);
  };
  const auto pooled_at = [&](int channel) {
    return is_gradient ? *reinterpret_cast<const float2*>(pooled + channel) : make_float2(0, 0);
  };
  // Over the lanes of a row, then over warps.
  const auto store_sum = [&](float sum, float* to) {
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    if (row % 2 == 1 && column == 0) to[warp * kHeads + k] = sum;
  };

  float gate = 0, dt = 0;  // of head h
  if (of.score_w.data != nullptr) {
    float dg = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = first_channel + 16 * b + 8 * half + 2 * column;
        const float2 x = features_at(channel), p = pooled_at(channel);
        dg += x.x * p.x + x.y * p.y;
      }
    store_sum(dg, shared);
    __syncthreads();
    dg = 0;
    for (int other = lane / kHeads; other < warps; other += 32 / kHeads) dg += shared[other * kHeads + h];
    for (int lanes = kHeads; lanes < 32; lanes *= 2) dg += __shfl_xor_sync(kAll, dg, lanes);
    if (h < of.gated) {
      gate = of.gates[image * of.gated + h];
      if (of.grad_gates != nullptr) dg += of.grad_gates[image * of.gated + h];
    }
    float mixed = gate * dg;
    mixed += __shfl_xor_sync(kAll, mixed, 1);
    mixed += __shfl_xor_sync(kAll, mixed, 2);
    if (h < a.heads) {
      const float u = gate_tanh(of.scores[image * a.heads + h]);
      dt = gate * (dg - mixed) * (1 - u * u);
      if (of.grad_scores != nullptr) dt += of.grad_scores[image * a.heads + h];
      if (stores && of.dt != nullptr && threadIdx.x < kHeads) of.dt[image * a.heads + h] = dt;
    }
  }
  const float own_gate = __shfl_sync(kAll, gate, k), own_dt = __shfl_sync(kAll, dt, k);

  float delta = 0;  // of dP as it is rounded, so that sums over positions of dl stay 0
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel + 16 * b + 8 * half + 2 * column;
      uint32_t word = is_weight ? weight_pair<T>(of.w, k * a.channels + channel) : 0;
      if (is_gradient) {
        const float2 x = features_at(channel), p = pooled_at(channel);
        float2 dp = {own_gate * x.x, own_gate * x.y};
        if (of.score_w.data != nullptr) {
          const float2 w = pair_of<T>(of.score_w, k * a.channels + channel);
          dp = make_float2(dp.x + own_dt * w.x, dp.y + own_dt * w.y);
        }
        if (of.grad_pooled != nullptr) {
          const int64_t at = (static_cast<int64_t>(image) * a.heads + k) * a.channels + channel;
          const float2 more = *reinterpret_cast<const float2*>(of.grad_pooled + at);
          dp = make_float2(dp.x + more.x, dp.y + more.y);
        }
        word = packed<T>(dp.x, dp.y);
        dp = unpacked<T>(word);
        delta += dp.x * p.x + dp.y * p.y;
      }
      weights[b][half] = word;
    }
  store_sum(delta, shared + kMostWarps * kHeads);
}

#endif  // AR_HOPPER

// kBlocks: of 16 channels, of a warp. kTiles: of 16 positions, of a tile. kPer: blocks that share a multiprocessor.
template <class T, Layout kLayout, int kBlocks, int kTiles, int kPer>
__global__ void __launch_bounds__(32 * (kBlocks == 8 && kTiles == 2 ? 12 : kMostWarps / kPer), kPer)
    backward_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap upstream_map,
                    const __grid_constant__ CUtensorMap dz_map, const __grid_constant__ BackwardSweep a,
                    const __grid_constant__ Cut cut) {
#if AR_HOPPER
  constexpr bool kScaled = std::is_same_v<T, __half>;
  constexpr int kEntries = 16 * kTiles * kHeads;  // positions and heads of a tile
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = shared_address(memory);
  const bool tapped = a.upstream.data != nullptr;
  const auto full = [&](int stage) { return base + cut.barriers + 8 * stage; };
  const int64_t items = static_cast<int64_t>(a.images) * cut.tiles;
  const int begin = static_cast<int>(items * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);

  // One thread asks for all copies.
  const auto load = [&](int item, int stage) {
    const uint32_t to = base + stage * cut.stage_bytes;
    const int image = item / cut.tiles, position = item % cut.tiles * cut.tile;
    barrier_arrive_expect(full(stage), 2 * a.channels * cut.tile * (1 + tapped));
    load_tile<kLayout>(cut, a.channels, to, &z_map, image, position, full(stage));
    if (tapped) load_tile<kLayout>(cut, a.channels, to + cut.map_bytes, &upstream_map, image, position, full(stage));
  };
  const auto store = [&](int item, int stage) {
    store_tile<kLayout>(cut, a.channels, &dz_map, base + stage * cut.stage_bytes, item / cut.tiles,
                        item % cut.tiles * cut.tile);
    bulk_commit();
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < cut.stages; ++stage) barrier_init(full(stage), 1);
    fence_barrier_init();
    for (int stage = 0; stage < cut.stages && begin + stage < end; ++stage) load(begin + stage, stage);
  }

  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh).
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int threads = blockDim.x, first_channel = 16 * kBlocks * warp;
  float* parts = reinterpret_cast<float*>(memory + cut.parts);       // [warps, 16 kTiles, 2 kHeads]
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.rest);  // [16 kTiles, kHeads]: dl and a
  const uint32_t spare = cut.rest + kEntries * 4;                    // where rows go that are not there
  float* of_image = reinterpret_cast<float*>(memory + spare + 16);   // pooled_gradient's

  const auto address = [&](int tile, int b) { return matrix_row<kLayout>(cut, warp * kBlocks + b, tile); };

  uint32_t weights[kBlocks][2];     // W_H and dP by rows: the products over channels
  uint32_t transposes[kBlocks][2];  // the same by columns: dZ
  uint32_t average[kBlocks][2];     // dP of the mean: of the lane's columns, of NCHW in [0] of its rows
  float sums[kBlocks][4];           // dW_H in even columns
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[b][i] = 0;
  float scale = 1, inverse = 1, shift = 0, delta = 0;  // of this thread's head, in the sum over warps
  const float share = a.mean ? 1.f / a.positions : 0.f;
  const int head = threadIdx.x % kHeads;

  __syncthreads();
  bool fresh = false;  // delta is in of_image
  int image = -1, stage = 0, stage_before = 0;
  uint32_t parity = 0;
  for (int item = begin; item < end; ++item) {
    const int position = item % cut.tiles * cut.tile, count = min(cut.tile, a.positions - position);
    if (item / cut.tiles != image) {
      image = item / cut.tiles;
      const bool makes = !kScaled && a.of.w.data != nullptr;
      if constexpr (!kScaled)
        if (makes) pooled_gradient<T, kBlocks>(a, image, first_channel, position == 0, of_image, weights);
      const T* pairs = static_cast<const T*>(a.pairs) +
                       static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * a.channels + first_channel;
      const T* means = pairs + (2 * a.heads + 1) * a.channels;
      const float* gradients = a.of.grad_mean + static_cast<int64_t>(image) * a.channels + first_channel;
      const auto mean_at = [&](int channel) { return makes ? gradients[channel] : value_of(means[channel]); };
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = 16 * b + 8 * half + 2 * column;
          if (!makes)
            weights[b][half] =
                row < 2 * a.heads ? *reinterpret_cast<const uint32_t*>(pairs + row * a.channels + channel) : 0;
          average[b][half] = 0;
          if (kLayout == Layout::kChannelsLast && a.mean)
            average[b][half] = packed<T>(mean_at(channel), mean_at(channel + 1));
          if (kLayout == Layout::kNchw && a.mean && half == 0)
            average[b][half] = packed<T>(mean_at(16 * b + row), mean_at(16 * b + 8 + row));
        }
      if (head < a.heads) {
        shift = a.lse[image * a.heads + head] - (a.b.data == nullptr ? 0.f : value_of(a.b, head));
        if (!makes) delta = a.delta[image * a.heads + head];
      }
      fresh = makes;
      if (kScaled && a.unscale != nullptr) {  // the sums too come into this image's scale
        const float before = inverse;
        inverse = a.unscale[image];
        scale = 1 / inverse;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[b][i] *= before * scale;
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) transposes[b][half] = transposed(weights[b][half]);
    }

    const uint32_t z = base + stage * cut.stage_bytes;
    barrier_wait(full(stage), parity);

    // l and dA, of this warp's channels.
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
        mma<T>(both[tile][b % 2], fragment, weights[b][0], weights[b][1]);
      }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(parts + ((warp * kTiles + tile) * 16 + 8 * half + row) * 2 * kHeads + 2 * column) =
            make_float2(both[tile][0][2 * half] + both[tile][1][2 * half],
                        both[tile][0][2 * half + 1] + both[tile][1][2 * half + 1]);
    __syncthreads();
    if (threadIdx.x == 0 && item > begin) store(item - 1, stage_before);

    // Of all channels; dl and a.
    if (fresh) {
      fresh = false;
      delta = head < a.heads && a.of.grad_lse != nullptr ? -a.of.grad_lse[image * a.heads + head] : 0.f;
      for (int other = 0; other < cut.warps; ++other) delta += of_image[(kMostWarps + other) * kHeads + head];
    }
    for (int entry = threadIdx.x; entry < kEntries; entry += threads) {
      float2 sum = {0, 0};
#pragma unroll 4
      for (int other = 0; other < cut.warps; ++other) {
        const float2 part = *reinterpret_cast<const float2*>(parts + 2 * (other * kEntries + entry));
        sum = make_float2(sum.x + part.x, sum.y + part.y);
      }
      const int s = entry / kHeads;
      float mask = 0, gradient = 0;
      if (s < count && head < a.heads) {
        mask = __expf(sum.x - shift);
        gradient = mask * (sum.y - delta);
        if (a.grad_logits != nullptr)
          gradient +=
              scale * a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * a.positions + position + s];
      }
      masks[entry] = packed<T>(gradient, mask);
    }
    __syncthreads();

    uint32_t by_position[kTiles][2], by_head[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        by_position[tile][half] = masks[(16 * tile + 8 * half + row) * kHeads + column];
        by_head[tile][half] = transposed(by_position[tile][half]);
      }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (a.dw != nullptr)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t fragment[4];
          load_factor<kLayout, false>(fragment, z + address(tile, b));
          mma<T>(sums[b], fragment, by_head[tile][0], by_head[tile][1]);
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t gradient[4], upstream[4];
        if (tapped) load_matrix(upstream, z + cut.map_bytes + address(tile, b));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 mean = unpacked<T>(average[b][kLayout == Layout::kNchw ? 0 : half]);
          mean = make_float2(mean.x * share, mean.y * share);
          float values[4] = {mean.x, mean.y, mean.x, mean.y};
          if constexpr (kLayout == Layout::kChannelsLast) {
            mma<T>(values, by_position[tile], transposes[b][half]);
          } else {
            values[1] = mean.x;
            values[2] = mean.y;
            mma<T>(values, transposes[b], by_position[tile][half]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float2 value = {values[2 * i], values[2 * i + 1]};
            if (kScaled) value = make_float2(value.x * inverse, value.y * inverse);
            if (tapped) {
              const float2 more = unpacked<T>(upstream[2 * half + i]);
              value = make_float2(value.x + more.x, value.y + more.y);
            }
            gradient[2 * half + i] = packed<T>(value.x, value.y);
          }
        }
        const bool real = kLayout == Layout::kNchw || 16 * tile + lane % 16 < cut.tile;
        store_matrix(real ? z + address(tile, b) : base + spare, gradient);
      }
    }
    fence_proxy_async();
    if (threadIdx.x == 0 && item > begin && item - 1 + cut.stages < end) {
      bulk_wait_read<0>();
      load(item - 1 + cut.stages, stage_before);
    }
    stage_before = stage;
    if (++stage == cut.stages) stage = 0, parity ^= 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) store(end - 1, stage_before);

  if (a.dw != nullptr && column < a.heads) {
    float* dw = a.dw + (static_cast<int64_t>(blockIdx.x) * a.heads + column) * a.channels + first_channel + row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      dw[16 * b] = sums[b][0] * inverse;
      dw[16 * b + 8] = sums[b][2] * inverse;
    }
  }
  if (threadIdx.x == 0) bulk_wait_read<0>();
#endif  // AR_HOPPER
}

constexpr int kRest = kRow * kHeads * 4 + 16 + 2 * kMostWarps * kHeads * 4;

// Of z's layout; not even a warp where no sweep takes it.
Layout layout_of(const BackwardSweep& a) {
  return is_of(Layout::kChannelsLast, a.z) ? Layout::kChannelsLast : Layout::kNchw;
}

Cut backward_cut(const BackwardSweep& a) {
  return cut_of(layout_of(a), a.channels, a.positions, a.upstream.data == nullptr ? 1 : 2, kRest);
}

template <class T, Layout kLayout, int kBlocks, int kTiles, int kPer>
cudaError_t sweep(const BackwardSweep& a, const Cut& cut, cudaStream_t stream) {
  CUtensorMap z, upstream, dz;
  const auto encoded = [&](CUtensorMap* tensor, const Map& map) {
    return encode<T>(kLayout, tensor, map, a.images, a.channels, a.positions, cut);
  };
  if (!encoded(&z, a.z) || !encoded(&dz, a.dz)) return cudaErrorInvalidValue;
  if (!encoded(&upstream, a.upstream.data == nullptr ? a.z : a.upstream)) return cudaErrorInvalidValue;
  return launch<backward_kernel<T, kLayout, kBlocks, kTiles, kPer>>(backward_programs(a), 32 * cut.warps, cut.bytes,
                                                                    stream, z, upstream, dz, a, cut);
}

template <class T>
cudaError_t sweep(const BackwardSweep& a, cudaStream_t stream) {
  const Cut cut = backward_cut(a);
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

bool can_sweep_backward(const BackwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1 || a.dz.data == nullptr) return false;
  const Layout layout = layout_of(a);
  const Cut cut = backward_cut(a);
  const bool upstream = a.upstream.data == nullptr || is_of(layout, a.upstream);
  return is_of(layout, a.z) && upstream && is_of(layout, a.dz) && cut.stages > 0 &&
         static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

int backward_programs(const BackwardSweep& a) {
  const Cut cut = backward_cut(a);
  return static_cast<int>(
      std::min<int64_t>(static_cast<int64_t>(a.images) * cut.tiles, cut.per_processor * processors()));
}

cudaError_t sweep_backward(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
