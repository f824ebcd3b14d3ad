// The backward sweep of float32 NCHW maps, on Hopper (float_rows.cuh): one read of the map, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// W_H and dP lie side by side, column 2 k and 2 k + 1, and so do dl and a. A chunk turns into its dZ where it lies, and
// leaves by the copy engine.

#include <algorithm>

#include "attend_backward.h"
#include "float_rows.cuh"

namespace ar_kernels {

namespace {

constexpr int kColumns = 2 * kHeads;

template <int kQuads>
__global__ void __launch_bounds__(kFloatThreads, 1)
    backward_float_rows_kernel(const __grid_constant__ CUtensorMap z_map,
                               const __grid_constant__ CUtensorMap upstream_map,
                               const __grid_constant__ CUtensorMap dz_map, const __grid_constant__ BackwardSweep a,
                               const __grid_constant__ FloatRowsCut cut) {
#if AR_HOPPER
  constexpr int kPositions = 4 * kQuads, kOwn = (kPositions + 31) / 32;  // of a lane, where masks are made
  const Place<kQuads> place;
  constexpr int kSets = place.kSets, kAtOnce = place.kAtOnce;
  uint8_t* memory = shared_memory();
  Ring ring(cut, memory);
  const bool tapped = a.upstream.data != nullptr, writes = a.dz.data != nullptr;
  const int64_t items = static_cast<int64_t>(a.images) * cut.tiles;
  const int begin = first_of(blockIdx.x, gridDim.x, items), end = first_of(blockIdx.x + 1, gridDim.x, items);

  // Thread 0 asks for all copies.
  int next_item = begin, next_chunk = 0;
  const auto ask = [&](int slot) {
    if (next_item >= end) return;
    const int image = next_item / cut.tiles, position = next_item % cut.tiles * kPositions;
    barrier_arrive_expect(ring.barrier(slot), cut.map_bytes * (1 + tapped));
    ring.load(&z_map, slot, 0, position, next_chunk, image);
    if (tapped) ring.load(&upstream_map, slot, 1, position, next_chunk, image);
    if (++next_chunk == cut.chunks) next_chunk = 0, ++next_item;
  };
  if (threadIdx.x == 0) {
    ring.start();
    for (int slot = 0; slot < cut.slots; ++slot) ask(slot);
  }

  const int warp = threadIdx.x / 32, lane = place.lane, threads = blockDim.x, channels = a.channels;
  float* weights = reinterpret_cast<float*>(memory + cut.weights);   // [C, kColumns]
  float* sums = reinterpret_cast<float*>(memory + cut.sums) + lane;  // [C / kBatch, 32]: dW_H
  float* means = reinterpret_cast<float*>(memory + cut.means);       // [C]: what comes of the mean
  float* parts = reinterpret_cast<float*>(memory + cut.parts);       // [warps, kColumns, kPositions]
  float* masks = reinterpret_cast<float*>(memory + cut.masks);       // [kColumns, kPositions]
  for (int i = warp; i < cut.chunks * cut.rows / kBatch; i += cut.warps) sums[32 * i] = 0;
  for (int i = threadIdx.x; i < cut.chunks * cut.rows; i += threads) means[i] = 0;
  for (int i = threadIdx.x; i < kColumns * kPositions; i += threads) masks[i] = 0;
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  float shift = 0, delta = 0;  // of this warp's head

  // Of this warp's batches of a chunk the first is `warp`.
  const auto batches_of = [&](int chunk) { return min(cut.rows, channels - chunk * cut.rows) / kBatch; };
  const auto tile_at = [&](int chunk) {
    return reinterpret_cast<float4*>(memory + ring.next(chunk) * cut.slot_bytes) + lane;
  };

  __syncthreads();
  int image = -1, slot_before = -1;
  for (int item = begin; item < end; ++item) {
    const int first_position = item % cut.tiles * kPositions;
    if (item / cut.tiles != image) {
      image = item / cut.tiles;
      const float* pairs =
          static_cast<const float*>(a.pairs) + static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * channels;
      if (warp < a.heads) {
        shift = a.lse[image * a.heads + warp] - bias;
        delta = a.delta[image * a.heads + warp];
      }
      stage_pairs(weights, a.mean ? means : nullptr, pairs, a.heads, channels, cut.chunks * cut.rows, a.positions);
      __syncthreads();
    }

    // l and dA, of this warp's channels.
    float both[4 * kColumns];  // [kColumns, 4]
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) both[i] = 0;
    for (int chunk = 0; chunk < cut.chunks; ++chunk) {
      ring.wait(chunk);
      const float4* z = tile_at(chunk);
      const float4* w = reinterpret_cast<const float4*>(weights) + 2 * (chunk * cut.rows + place.row);
      for (int batch = warp; batch < batches_of(chunk); batch += cut.warps)
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          const float4 value = z[kBatch * kQuads * batch + 32 * i];
          const float4 low = w[2 * (kBatch * batch + kAtOnce * i)], high = w[2 * (kBatch * batch + kAtOnce * i) + 1];
          const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            both[p] += low.x * values[p], both[4 + p] += low.y * values[p];
            both[8 + p] += low.z * values[p], both[12 + p] += low.w * values[p];
            both[16 + p] += high.x * values[p], both[20 + p] += high.y * values[p];
            both[24 + p] += high.z * values[p], both[28 + p] += high.w * values[p];
          }
        }
    }
    store_sums<kQuads>(both, place, parts + warp * kColumns * kPositions);
    __syncthreads();

    if (warp < a.heads) {  // a warp for each head's dl and a
      const int k = warp;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int position = 32 * i + lane;
        if (position >= kPositions) continue;
        float logit = 0, da = 0, mask = 0, gradient = 0;
#pragma unroll 4
        for (int other = 0; other < cut.warps; ++other) {
          logit += parts[(other * kColumns + 2 * k) * kPositions + position];
          da += parts[(other * kColumns + 2 * k + 1) * kPositions + position];
        }
        if (first_position + position < a.positions) {
          mask = expf(logit - shift);
          gradient = mask * (da - delta);
          if (a.grad_logits != nullptr)
            gradient +=
                a.grad_logits[(static_cast<int64_t>(image) * a.heads + k) * a.positions + first_position + position];
        }
        masks[2 * k * kPositions + position] = gradient;
        masks[(2 * k + 1) * kPositions + position] = mask;
      }
    }
    __syncthreads();

    float4 gradient[kHeads], mask[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      gradient[k] = reinterpret_cast<const float4*>(masks + 2 * k * kPositions)[place.quad];
      mask[k] = reinterpret_cast<const float4*>(masks + (2 * k + 1) * kPositions)[place.quad];
    }
    for (int chunk = 0; chunk < cut.chunks; ++chunk) {
      float4* z = tile_at(chunk);
      for (int batch = warp; batch < batches_of(chunk); batch += cut.warps) {
        const int batch_channel = chunk * cut.rows + kBatch * batch;
        float products[kQuads];
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          float4* to = z + kBatch * kQuads * batch + 32 * place.set(i);
          const float4 value = *to;
          const int channel = batch_channel + kAtOnce * place.set(i) + place.row;
          const float4* w = reinterpret_cast<const float4*>(weights) + 2 * channel;
          const float4 low = w[0], high = w[1];
          const float of_logits[kHeads] = {low.x, low.z, high.x, high.z}, dp[kHeads] = {low.y, low.w, high.y, high.w};
          const float mean = means[channel];
          float4 result = {mean, mean, mean, mean};
#pragma unroll
          for (int k = 0; k < kHeads; ++k) {
            products[kHeads * i + k] =
                value.x * gradient[k].x + value.y * gradient[k].y + value.z * gradient[k].z + value.w * gradient[k].w;
            result.x += of_logits[k] * gradient[k].x, result.y += of_logits[k] * gradient[k].y;
            result.z += of_logits[k] * gradient[k].z, result.w += of_logits[k] * gradient[k].w;
            result.x += dp[k] * mask[k].x, result.y += dp[k] * mask[k].y;
            result.z += dp[k] * mask[k].z, result.w += dp[k] * mask[k].w;
          }
          if (tapped) {
            const float4 more = to[cut.map_bytes / 16];
            result.x += more.x, result.y += more.y, result.z += more.z, result.w += more.w;
          }
          if (writes) *to = result;
        }
        if (a.dw == nullptr) continue;
        halve_sums<kQuads / 2, kQuads / 2, 1, kHeads>(products);
        sums[32 * (batch_channel / kBatch)] += products[0];
      }
      fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        if (slot_before >= 0) {
          bulk_wait_read<0>();
          ask(slot_before);
        }
        if (writes)
          tensor_store(&dz_map, ring.base + ring.next(chunk) * cut.slot_bytes, first_position, chunk * cut.rows, image,
                       kEvictNormal);
        bulk_commit();
      }
      slot_before = ring.next(chunk);
    }
    ring.advance();
  }
  if (threadIdx.x == 0) bulk_wait_read<0>();

  if (a.dw != nullptr && place.head < a.heads)
    for (int chunk = 0; chunk < cut.chunks; ++chunk)
      for (int batch = warp; batch < batches_of(chunk); batch += cut.warps) {
        const int batch_channel = chunk * cut.rows + kBatch * batch;
        a.dw[(static_cast<int64_t>(blockIdx.x) * a.heads + place.head) * channels + batch_channel + place.channel] =
            sums[32 * (batch_channel / kBatch)];
      }
#endif  // AR_HOPPER
}

FloatRowsCut backward_cut(const BackwardSweep& a) {
  return float_rows_cut(a.channels, a.positions, kColumns, a.upstream.data == nullptr ? 1 : 2);
}

template <int kQuads>
cudaError_t sweep(const BackwardSweep& a, const FloatRowsCut& cut, cudaStream_t stream) {
  CUtensorMap z, upstream, dz;
  const auto encoded = [&](CUtensorMap* tensor, const FlatMap& map) {
    return encode(tensor, map.data == nullptr ? a.z : map, a.images, a.channels, a.positions, cut);
  };
  if (!encoded(&z, a.z) || !encoded(&dz, a.dz) || !encoded(&upstream, a.upstream)) return cudaErrorInvalidValue;
  return launch<backward_float_rows_kernel<kQuads>>(backward_float_rows_programs(a), 32 * cut.warps, cut.bytes, stream,
                                                    z, upstream, dz, a, cut);
}

}  // namespace

bool can_sweep_backward_float_rows(const BackwardSweep& a) {
  if (a.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  if (!is_float_rows(a.z)) return false;
  for (const FlatMap& map : {a.dz, a.upstream})
    if (map.data != nullptr && !is_float_rows(map)) return false;
  const FloatRowsCut cut = backward_cut(a);
  return cut.slots > 0 && static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

int backward_float_rows_programs(const BackwardSweep& a) {
  const FloatRowsCut cut = backward_cut(a);
  return static_cast<int>(std::min<int64_t>(static_cast<int64_t>(a.images) * cut.tiles, cut.blocks * processors()));
}

cudaError_t sweep_backward_float_rows(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_float_rows(a)) return cudaErrorInvalidValue;
  const FloatRowsCut cut = backward_cut(a);
  switch (cut.quads) {
    case 4: return sweep<4>(a, cut, stream);
    case 8: return sweep<8>(a, cut, stream);
    default: return sweep<16>(a, cut, stream);
  }
}

}  // namespace ar_kernels
