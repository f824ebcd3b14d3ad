// The forward sweep of NCHW maps with rows of any length, on Hopper (rows.cuh): one read of the map from memory, a
// second one of a part of it from L2.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// The first sweep makes l, the second the rest. The mean over positions is one more row of P, whose weights are 1.

#include <algorithm>

#include "attend_forward.h"
#include "gates.cuh"
#include "rows.cuh"

namespace ar_kernels {

namespace {

constexpr int kMean = kHeads;       // the column of the mean
constexpr int kPitch = kChunk + 8;  // floats of a row of P; rows 2 apart begin in different banks

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_rows_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (blockIdx.x + 1) / gridDim.x);
  Slots slots(cut, static_cast<const T*>(a.z.data) + begin * a.z.image, a.z.image * sizeof(T), end - begin, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  T* weights = reinterpret_cast<T*>(memory + cut.weights);       // [C, 8]
  T* masks = reinterpret_cast<T*>(memory + cut.masks) + 16 * 8;  // [S, 8], zeros around
  float* totals = reinterpret_cast<float*>(memory + cut.rest);   // [kHeads]
  float* scores = totals + kHeads;                               // [kHeads]
  float* pooled = scores + kHeads;                               // [2, kHeads + 1, kPitch]: P of a chunk
  for (int i = threadIdx.x; i < 8 * channels; i += kThreads)
    weights[8 * weight_place(i / 8, cut.classes) + i % 8] =
        rounded<T>(i % 8 < a.heads ? value_of(a.w, i % 8 * channels + i / 8) : 0.f);
  for (int i = threadIdx.x; i < (16 * cut.tiles + 32) * 8; i += kThreads) {
    const int position = i / 8 - 16;
    masks[i - 16 * 8] = rounded<T>(i % 8 == kMean && position >= 0 && position < positions ? 1.f : 0.f);
  }
  __syncthreads();

  for (int64_t image = begin; image < end; ++image) {
    sum_over_channels<T>(slots, static_cast<int>(image) - begin, positions);
    if (warp < a.heads) {  // a warp for each head's softmax
      const int k = warp;
      const float bias = a.b.data == nullptr ? 0.f : value_of(a.b, k);
      float most = -INFINITY, total = 0;
      for (int position = lane; position < positions; position += 32) {
        const float2 pair = class_sum(slots, positions, position, k / 2);
        most = maximum(most, (k % 2 == 0 ? pair.x : pair.y) + bias);
      }
      most = warp_maximum(most);
      const float start = origin(most);
      for (int position = lane; position < positions; position += 32) {
        const float2 pair = class_sum(slots, positions, position, k / 2);
        const float logit = (k % 2 == 0 ? pair.x : pair.y) + bias, mask = __expf(logit - start);
        if (a.logits != nullptr) a.logits[(image * a.heads + k) * positions + position] = logit;
        masks[position * 8 + k] = rounded<T>(mask);
        total += mask;
      }
      total = warp_sum(total);
      if (lane == 0) {
        totals[k] = total;
        a.lse[image * a.heads + k] = start + __logf(total);
      }
    }
    __syncthreads();

    // Columns 2 * column and + 1 of P become rows in shared memory; then a warp has a row.
    const int k = 2 * column, r = warp == a.heads ? kMean : warp;
    const float low = 1 / (k < a.heads ? totals[k] : positions), high = 1 / (k + 1 < a.heads ? totals[k + 1] : 1.f);
    float score = 0;
    for (int chunk = cut.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(static_cast<int>(image) - begin, chunk, true);
      float sums[4];
      own.sum_over_positions<T>(slots, slots.base + slot * cut.chunk_bytes, positions, sums);
      float* rows = pooled + chunk % 2 * (kHeads + 1) * kPitch;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = rows + k * kPitch + own.first + cut.classes * (row + 8 * half);
        if (k <= kMean) to[0] = sums[2 * half] * low;
        if (k < kMean) to[kPitch] = sums[2 * half + 1] * high;
      }
      __syncthreads();
      if (threadIdx.x == 0) slots.ask(slot);
      if (warp < a.heads + (a.mean != nullptr))
        score += store_pooled(a, image, warp, chunk * kChunk + 4 * lane,
                              *reinterpret_cast<const float4*>(rows + r * kPitch + 4 * lane));
    }
    if (a.gated == 0) continue;
    score = warp_sum(score);
    if (warp < a.heads && lane == 0) scores[warp] = score;
    __syncthreads();
    float gates[kHeads];
    make_gates(a, image, scores, 1, gates);
    // Of what other threads of the block have stored.
    for (int unit = warp; unit < a.gated * cut.chunks; unit += kWarps) {
      const int head = unit / cut.chunks, channel = unit % cut.chunks * kChunk + 4 * lane;
      const float4 values = *reinterpret_cast<const float4*>(a.pooled + (image * a.heads + head) * channels + channel);
      store_features<T>(a, image, head, channel, values, gate_of(gates, head));
    }
  }
#endif  // AR_HOPPER
}

constexpr int kRest = (2 * kHeads + 2 * (kHeads + 1) * kPitch) * 4;

RowsCut forward_cut(const ForwardSweep& a) { return rows_cut(a.channels, a.positions, kRest); }

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const RowsCut cut = forward_cut(a);
  return launch<forward_rows_kernel<T>>(std::min(a.images, processors()), kThreads, cut.bytes, stream, a, cut);
}

}  // namespace

bool can_sweep_forward_rows(const ForwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  return is_rows(a.z, a.positions) && forward_cut(a).slots > 0;
}

cudaError_t sweep_forward_rows(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
