// The backward sweep of float32 NCHW maps of few positions, with rows of any length, on Hopper (float_images.cuh): one
// read of the map from memory, a second one of a part of a large image from L2, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// W_H and dP lie side by side, column 2 k and 2 k + 1, and so do dl and a. A chunk turns into its dZ where it lies.
// dW_H is added up in shared memory, by the same threads; the upstream gradient is read from memory where it is added.

#include <algorithm>

#include "attend_backward.h"
#include "float_images.cuh"

namespace ar_kernels {

namespace {

constexpr int kColumns = 2 * kHeads;

template <int kOwn>
__global__ void __launch_bounds__(kFloatThreads, 1)
    backward_float_images_kernel(const __grid_constant__ BackwardSweep a, const __grid_constant__ FloatImagesCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const bool tapped = a.upstream.data != nullptr, writes = a.dz.data != nullptr;
  const ImageShare share(cut, a.images);
  const int begin = share.begin, end = share.end, first_channel = share.first_channel;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, positions = a.positions, channels = a.channels;
  ImageSlots slots(cut, static_cast<const float*>(a.z.data) + begin * a.z.image + first_channel * positions,
                   a.z.image * 4, end - begin, memory);
  float* weights = reinterpret_cast<float*>(memory + cut.weights);     // [channels of this block, kColumns]
  float* masks = reinterpret_cast<float*>(memory + cut.masks) + lane;  // [kColumns, kOwn, 32]
  for (int i = warp; i < kColumns * kOwn; i += kGroupWarps) masks[32 * i] = 0;
  // After sums over positions a lane has the one of channel `own_channel` of kUnit and of head `head`.
  const int own_channel = lane / kHeads % kUnit, head = lane % kHeads;
  float* dw = head < a.heads && lane < kUnit * kHeads
                  ? reinterpret_cast<float*>(memory + cut.gradients) + own_channel * kHeads + head
                  : nullptr;
  const ImageExchange exchange(slots, a.heads, positions);

  for (int turn = 0; turn < end - begin; ++turn) {
    const int64_t image = begin + turn;
    const float* pairs = static_cast<const float*>(a.pairs) + image * (a.heads + a.mean) * 2 * channels + first_channel;
    const float* average = pairs + (2 * a.heads + 1) * channels;
    stage_pairs(weights, nullptr, pairs, a.heads, channels, cut.channels, positions);
    __syncthreads();

    sum_floats_over_channels<kOwn, kColumns>(slots, cut, turn, positions);
    if (warp < a.heads) {  // a warp for each head's dl and a
      if (!exchange.owns(warp)) {
        for (int quad = lane; quad < exchange.quads; quad += 32)
          for (int i = 0; i < 2; ++i)
            exchange.give_sums(warp, i, quad, float_sums<kOwn, kColumns>(slots, 2 * warp + i, quad));
      } else {
        const float bias = a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
        const float shift = a.lse[image * a.heads + warp] - bias, delta = a.delta[image * a.heads + warp];
        exchange.wait(0, turn);
        for (int quad = lane; quad < exchange.quads; quad += 32) {
          const float4 of_w = exchange.take_sums(warp, 0, quad, float_sums<kOwn, kColumns>(slots, 2 * warp, quad));
          const float4 of_dp = exchange.take_sums(warp, 1, quad, float_sums<kOwn, kColumns>(slots, 2 * warp + 1, quad));
          const float logits[4] = {of_w.x, of_w.y, of_w.z, of_w.w}, grads[4] = {of_dp.x, of_dp.y, of_dp.z, of_dp.w};
          float both[2][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int position = 4 * quad + i;
            const bool real = position < positions;
            both[1][i] = real ? expf(logits[i] - shift) : 0.f;
            both[0][i] = both[1][i] * (grads[i] - delta);
            if (!real) both[0][i] = 0;
            if (a.grad_logits != nullptr && real)
              both[0][i] += a.grad_logits[(image * a.heads + warp) * positions + position];
          }
#pragma unroll
          for (int i = 0; i < 2; ++i)
            exchange.give_masks(2 * warp + i, quad, make_float4(both[i][0], both[i][1], both[i][2], both[i][3]));
        }
      }
    }
    __syncthreads();
    if (cut.blocks > 1) {
      exchange.wait(1, turn);
      if (threadIdx.x == 0) exchange.expect(0), exchange.expect(1);
    }

    float both[kColumns][kOwn];  // dl and a
#pragma unroll
    for (int i = 0; i < kColumns * kOwn; ++i) both[i / kOwn][i % kOwn] = masks[32 * i];
    const float* upstream = tapped ? static_cast<const float*>(a.upstream.data) + image * a.upstream.image +
                                         first_channel * positions + lane
                                   : nullptr;
    int slot_before = -1;
    for (int chunk = cut.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(turn, chunk, true);
      float* z = reinterpret_cast<float*>(memory + slot * cut.chunk_bytes) + lane;
      for (int unit = kUnit * warp; unit < cut.rows; unit += kUnit * kGroupWarps) {
        const int channel = chunk * cut.rows + unit;
        float products[kUnit * kHeads];
#pragma unroll
        for (int c = 0; c < kUnit; ++c) {
          const float4* of_channel = reinterpret_cast<const float4*>(weights + kColumns * (channel + c));
          const float4 low = of_channel[0], high = of_channel[1];
          const float weight[kColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          const float mean = a.mean ? average[channel + c] / positions : 0.f;
#pragma unroll
          for (int k = 0; k < kHeads; ++k) products[kHeads * c + k] = 0;
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            if (lane + 32 * i >= positions) continue;
            float* to = z + (unit + c) * positions + 32 * i;
            const float value = *to;
            float result = mean;
#pragma unroll
            for (int k = 0; k < kHeads; ++k) products[kHeads * c + k] += value * both[2 * k][i];
#pragma unroll
            for (int k = 0; k < kColumns; ++k) result += weight[k] * both[k][i];
            if (tapped) result += upstream[(channel + c) * positions + 32 * i];
            if (writes) *to = result;
          }
        }
        if (a.dw == nullptr) continue;
        const float sum = lane_sums(products);
        if (dw != nullptr) dw[channel * kHeads] = turn > 0 ? dw[channel * kHeads] + sum : sum;
      }
      fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        if (slot_before >= 0) {
          bulk_wait_read<0>();
          slots.ask(slot_before);
        }
        if (writes)
          bulk_store(
              static_cast<float*>(a.dz.data) + image * a.dz.image + (first_channel + chunk * cut.rows) * positions,
              slots.base + slot * cut.chunk_bytes, cut.chunk_bytes, kEvictNormal);
        bulk_commit();
      }
      slot_before = slot;
    }
    if (threadIdx.x == 0) {
      bulk_wait_read<0>();
      slots.ask(slot_before);
    }
  }
  if (a.dw == nullptr) return;
  const float* gradients = reinterpret_cast<const float*>(memory + cut.gradients);
  for (int k = 0; k < a.heads; ++k)
    for (int channel = threadIdx.x; channel < cut.channels; channel += kFloatThreads)
      a.dw[(static_cast<int64_t>(share.cluster) * a.heads + k) * channels + first_channel + channel] =
          gradients[channel * kHeads + k];
#endif  // AR_HOPPER
}

FloatImagesCut backward_cut(const BackwardSweep& a) { return float_images_cut(a.channels, a.positions, kColumns); }

}  // namespace

bool can_sweep_backward_float_images(const BackwardSweep& a) {
  if (a.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  for (const FlatMap& map : {a.dz, a.upstream})
    if (map.data != nullptr && !is_float_images(map, a.channels, a.positions)) return false;
  return is_float_images(a.z, a.channels, a.positions) && backward_cut(a).slots > 0;
}

int backward_float_images_programs(const BackwardSweep& a) {
  const FloatImagesCut cut = backward_cut(a);
  return with_own(cut, [&](auto own) {
    return float_images_clusters<backward_float_images_kernel<decltype(own)::value>>(cut, a.images);
  });
}

cudaError_t sweep_backward_float_images(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_float_images(a)) return cudaErrorInvalidValue;
  const FloatImagesCut cut = backward_cut(a);
  return with_own(cut, [&](auto own) {
    return launch_float_images<backward_float_images_kernel<decltype(own)::value>>(cut, a, stream);
  });
}

}  // namespace ar_kernels
