// The forward sweep of float32 NCHW maps of few positions, with rows of any length, on Hopper (float_images.cuh): one
// read of the map from memory, a second one of a part of it from L2.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P

#include <algorithm>

#include "attend_forward.h"
#include "float_images.cuh"

namespace ar_kernels {

namespace {

template <int kOwn>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_images_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ FloatImagesCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (blockIdx.x + 1) / gridDim.x);
  ImageSlots slots(cut.slots, static_cast<const float*>(a.z.data) + begin * a.z.image, a.z.image * 4, end - begin,
                   memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, positions = a.positions, channels = a.channels;
  float* weights = reinterpret_cast<float*>(memory + cut.slots.weights);     // [C, kHeads]
  float* masks = reinterpret_cast<float*>(memory + cut.slots.masks) + lane;  // [kHeads, kOwn, 32]
  float* totals = reinterpret_cast<float*>(memory + cut.slots.rest);         // [kHeads]
  float* score_parts = totals + kHeads;                                      // [warps, kHeads]
  stage_weights(weights, a.w, a.heads, channels, channels);
  for (int i = warp; i < kHeads * kOwn; i += kGroupWarps) masks[32 * i] = 0;
  if (threadIdx.x < kHeads) totals[threadIdx.x] = 1;
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  // After sums over positions a lane has the one of channel `own_channel` of kUnit and of head `head`.
  const int own_channel = lane / kHeads % kUnit, head = lane % kHeads;
  const bool is_copy = lane >= kUnit * kHeads;
  __syncthreads();

  for (int64_t image = begin; image < end; ++image) {
    sum_floats_over_channels<kOwn, kHeads>(slots, cut, static_cast<int>(image) - begin, positions);
    if (warp < a.heads) {  // a warp for each head's softmax
      float logits[kOwn], most = -INFINITY, total = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int position = lane + 32 * i;
        logits[i] = position < positions ? float_sum<kOwn, kHeads>(slots, warp, i) + bias : -INFINITY;
        if (a.logits != nullptr && position < positions)
          a.logits[(image * a.heads + warp) * positions + position] = logits[i];
        most = maximum(most, logits[i]);
      }
      most = warp_maximum(most);
      const float start = origin(most);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float mask = expf(logits[i] - start);
        masks[32 * (warp * kOwn + i)] = mask;
        total += mask;
      }
      total = warp_sum(total);
      if (lane == 0) {
        totals[warp] = total;
        a.lse[image * a.heads + warp] = start + logf(total);
      }
    }
    __syncthreads();

    float mask[kHeads][kOwn];
#pragma unroll
    for (int i = 0; i < kHeads * kOwn; ++i) mask[i / kOwn][i % kOwn] = masks[32 * i];
    const float total = totals[head];
    float* pooled = a.pooled + (image * a.heads + head) * channels;
    float t = 0;  // of this lane's head and channels
    for (int chunk = cut.slots.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(static_cast<int>(image) - begin, chunk, true);
      const float* z = reinterpret_cast<const float*>(memory + slot * cut.slots.chunk_bytes) + lane;
      for (int unit = kUnit * warp; unit < cut.rows; unit += kUnit * kGroupWarps) {
        const int channel = chunk * cut.rows + unit;
        const bool scores = a.gated > 0 && head < a.heads && !is_copy;
        const uint32_t score_weight = scores ? raw_value(a.score_w, head * channels + channel + own_channel) : 0;
        float products[kUnit * kHeads];
#pragma unroll
        for (int c = 0; c < kUnit; ++c) {
#pragma unroll
          for (int k = 0; k < kHeads; ++k) products[kHeads * c + k] = 0;
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            const float value = lane + 32 * i < positions ? z[(unit + c) * positions + 32 * i] : 0.f;
#pragma unroll
            for (int k = 0; k < kHeads; ++k) products[kHeads * c + k] += value * mask[k][i];
          }
        }
        const float value = lane_sums(products) / total;
        if (head < a.heads && !is_copy) {
          pooled[channel + own_channel] = value;
          if (scores) t += value * value_from(a.score_w, score_weight);
        }
        if (a.mean != nullptr) {
          float averages[kUnit];
#pragma unroll
          for (int c = 0; c < kUnit; ++c) {
            averages[c] = 0;
#pragma unroll
            for (int i = 0; i < kOwn; ++i)
              averages[c] += lane + 32 * i < positions ? z[(unit + c) * positions + 32 * i] : 0.f;
          }
          const float average = lane_sums(averages) / static_cast<float>(positions);
          if (lane < kUnit) a.mean[image * channels + channel + lane] = average;
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) slots.ask(slot);
    }
    if (a.gated == 0) continue;
#pragma unroll
    for (int lanes = kHeads; lanes < 32; lanes *= 2) t += __shfl_xor_sync(kAll, t, lanes);
    if (lane < kHeads) score_parts[warp * kHeads + lane] = t;
    __syncthreads();
    float gates[kHeads];
    make_gates(a, image, score_parts, kGroupWarps, gates);
    // Other threads of the block have written some of it.
    const float* all = a.pooled + image * a.heads * channels;
    float* features = static_cast<float*>(a.features) + image * a.gated * channels;
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      if (k < a.gated)
        for (int channel = threadIdx.x; channel < channels; channel += kFloatThreads)
          features[k * channels + channel] = gates[k] * all[k * channels + channel];
  }
#endif  // AR_HOPPER
}

FloatImagesCut forward_cut(const ForwardSweep& a) { return float_images_cut(a.channels, a.positions, kHeads); }

template <int kOwn>
cudaError_t sweep(const ForwardSweep& a, const FloatImagesCut& cut, cudaStream_t stream) {
  return launch<forward_float_images_kernel<kOwn>>(std::min(a.images, processors()), kFloatThreads, cut.slots.bytes,
                                                   stream, a, cut);
}

}  // namespace

bool can_sweep_forward_float_images(const ForwardSweep& a) {
  if (a.kind != Kind::kFloat || a.w.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1)
    return false;
  return is_float_images(a.z, a.positions) && a.splits <= 1 && forward_cut(a).slots.slots > 0;
}

cudaError_t sweep_forward_float_images(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_float_images(a)) return cudaErrorInvalidValue;
  const FloatImagesCut cut = forward_cut(a);
  switch (cut.own) {
    case 2: return sweep<2>(a, cut, stream);
    case 6: return sweep<6>(a, cut, stream);
    default: return sweep<8>(a, cut, stream);
  }
}

}  // namespace ar_kernels
