// The forward sweep of float32 NCHW maps of few positions, with rows of any length, on Hopper (float_images.cuh): one
// read of the map from memory, a second one of a part of a large image from L2.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// An image's gates are made while the blocks of a cluster wait for the next one's sums.

#include <algorithm>

#include "attend_forward.h"
#include "float_images.cuh"

namespace ar_kernels {

namespace {

template <int kOwn>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_images_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ FloatImagesCut cut) {
#if AR_HOPPER
  constexpr int kQuads = (kOwn + 3) / 4;  // of a lane, in a head's softmax: of four adjacent positions
  uint8_t* memory = shared_memory();
  const ImageShare share(cut, a.images);
  const int begin = share.begin, end = share.end, first_channel = share.first_channel;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, positions = a.positions, channels = a.channels;
  ImageSlots slots(cut, static_cast<const float*>(a.z.data) + begin * a.z.image + first_channel * positions,
                   a.z.image * 4, end - begin, memory);
  float* weights = reinterpret_cast<float*>(memory + cut.weights);     // [channels of this block, kHeads]
  float* masks = reinterpret_cast<float*>(memory + cut.masks) + lane;  // [kHeads, kOwn, 32]
  float* score_parts = reinterpret_cast<float*>(memory + cut.rest);    // [warps, kHeads]
  const int scores = cut.rest + kGroupWarps * kHeads * 4;              // [2, blocks, kHeads] floats
  stage_weights(weights, {static_cast<const float*>(a.w.data) + first_channel, a.w.kind}, a.heads, channels,
                cut.channels);
  for (int i = warp; i < kHeads * kOwn; i += kGroupWarps) masks[32 * i] = 0;
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  // After sums over positions a lane has the one of channel `own_channel` of kUnit and of head `head`.
  const int own_channel = lane / kHeads % kUnit, head = lane % kHeads;
  const bool is_copy = lane >= kUnit * kHeads;
  const ImageExchange exchange(slots, a.heads, positions);

  // Gates and features of an image whose P and scores are there.
  const auto finish = [&](int64_t image) {
    const int turn = static_cast<int>(image) - begin;
    if (cut.blocks > 1) {
      exchange.wait(2 + turn % 2, turn / 2);
      if (threadIdx.x == 0) exchange.expect(2 + turn % 2);
    }
    float gates[kHeads];  // all blocks store the same
    make_gates(a, image, reinterpret_cast<const float*>(memory + scores) + turn % 2 * cut.blocks * kHeads, cut.blocks,
               gates);
    // Other threads of the block have written some of it.
    const float* all = a.pooled + image * a.heads * channels + first_channel;
    float* features = static_cast<float*>(a.features) + image * a.gated * channels + first_channel;
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      if (k < a.gated)
        for (int channel = threadIdx.x; channel < cut.channels; channel += kFloatThreads)
          features[k * channels + channel] = gates[k] * all[k * channels + channel];
  };

  for (int64_t image = begin; image < end; ++image) {
    const int turn = static_cast<int>(image) - begin;
    sum_floats_over_channels<kOwn, kHeads>(slots, cut, turn, positions);
    if (warp < a.heads && !exchange.owns(warp))  // a warp for each head
      for (int quad = lane; quad < exchange.quads; quad += 32)
        exchange.give_sums(warp, 0, quad, float_sums<kOwn, kHeads>(slots, warp, quad));
    if (a.gated > 0 && turn > 0) finish(image - 1);
    if (warp < a.heads && exchange.owns(warp)) {  // its softmax
      exchange.wait(0, turn);
      float logits[4 * kQuads], most = -INFINITY, total = 0;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int quad = lane + 32 * j;
        float4 sum = make_float4(0, 0, 0, 0);
        if (quad < exchange.quads) sum = exchange.take_sums(warp, 0, quad, float_sums<kOwn, kHeads>(slots, warp, quad));
        const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = 4 * quad + i;
          logits[4 * j + i] = position < positions ? sums[i] + bias : -INFINITY;
          if (a.logits != nullptr && position < positions)
            a.logits[(image * a.heads + warp) * positions + position] = logits[4 * j + i];
          most = maximum(most, logits[4 * j + i]);
        }
      }
      most = warp_maximum(most);
      const float start = origin(most);
#pragma unroll
      for (int i = 0; i < 4 * kQuads; ++i) total += logits[i] = expf(logits[i] - start);
      total = warp_sum(total);
      if (lane == 0) a.lse[image * a.heads + warp] = start + logf(total);
#pragma unroll
      for (int j = 0; j < kQuads; ++j)
        if (lane + 32 * j < exchange.quads)
          exchange.give_masks(warp, lane + 32 * j,
                              make_float4(logits[4 * j] / total, logits[4 * j + 1] / total, logits[4 * j + 2] / total,
                                          logits[4 * j + 3] / total));
    }
    __syncthreads();
    if (cut.blocks > 1) {
      exchange.wait(1, turn);
      if (threadIdx.x == 0) exchange.expect(0), exchange.expect(1);
    }

    float mask[kHeads][kOwn];
#pragma unroll
    for (int i = 0; i < kHeads * kOwn; ++i) mask[i / kOwn][i % kOwn] = masks[32 * i];
    float* pooled = a.pooled + (image * a.heads + head) * channels + first_channel;
    float t = 0;  // of this lane's head and channels
    for (int chunk = cut.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(turn, chunk, true);
      const float* z = reinterpret_cast<const float*>(memory + slot * cut.chunk_bytes) + lane;
      for (int unit = kUnit * warp; unit < cut.rows; unit += kUnit * kGroupWarps) {
        const int channel = chunk * cut.rows + unit;
        const bool has_score = a.gated > 0 && head < a.heads && !is_copy;
        const uint32_t score_weight =
            has_score ? raw_value(a.score_w, head * channels + first_channel + channel + own_channel) : 0;
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
        const float value = lane_sums(products);
        if (head < a.heads && !is_copy) {
          pooled[channel + own_channel] = value;
          if (has_score) t += value * value_from(a.score_w, score_weight);
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
          if (lane < kUnit) a.mean[image * channels + first_channel + channel + lane] = average;
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
    if (warp > 0) continue;
    float4 sums = make_float4(0, 0, 0, 0);
    if (lane < kGroupWarps) sums = reinterpret_cast<const float4*>(score_parts)[lane];
    sums = make_float4(warp_sum(sums.x), warp_sum(sums.y), warp_sum(sums.z), warp_sum(sums.w));
    if (lane == 0) exchange.give_scores(scores, turn, sums);
  }
  __syncthreads();
  if (a.gated > 0 && end > begin) finish(end - 1);
#endif  // AR_HOPPER
}

FloatImagesCut forward_cut(const ForwardSweep& a) { return float_images_cut(a.channels, a.positions, kHeads); }

}  // namespace

bool can_sweep_forward_float_images(const ForwardSweep& a) {
  if (a.kind != Kind::kFloat || a.w.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1)
    return false;
  return is_float_images(a.z, a.channels, a.positions) && a.splits <= 1 && forward_cut(a).slots > 0;
}

cudaError_t sweep_forward_float_images(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_float_images(a)) return cudaErrorInvalidValue;
  const FloatImagesCut cut = forward_cut(a);
  return with_own(cut, [&](auto own) {
    return launch_float_images<forward_float_images_kernel<decltype(own)::value>>(cut, a, stream);
  });
}

}  // namespace ar_kernels
