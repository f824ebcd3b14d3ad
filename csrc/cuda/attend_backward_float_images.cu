// The backward sweep of float32 NCHW maps of few positions, with rows of any length, on Hopper (float_images.cuh): one
// read of the map from memory, a second one of a part of it from L2, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// W_H and dP lie side by side, column 2 k and 2 k + 1, and so do dl and a. A chunk turns into its dZ where it lies.
// dW_H is added up in memory, by the same threads; the upstream gradient is read from memory where it is added.

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
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (blockIdx.x + 1) / gridDim.x);
  ImageSlots slots(cut.slots, static_cast<const float*>(a.z.data) + begin * a.z.image, a.z.image * 4, end - begin,
                   memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, positions = a.positions, channels = a.channels;
  float* weights = reinterpret_cast<float*>(memory + cut.slots.weights);     // [C, kColumns]
  float* masks = reinterpret_cast<float*>(memory + cut.slots.masks) + lane;  // [kColumns, kOwn, 32]
  for (int i = warp; i < kColumns * kOwn; i += kGroupWarps) masks[32 * i] = 0;
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  // After sums over positions a lane has the one of channel `own_channel` of kUnit and of head `head`.
  const int own_channel = lane / kHeads % kUnit, head = lane % kHeads;
  float* dw = a.dw == nullptr || head >= a.heads || lane >= kUnit * kHeads
                  ? nullptr
                  : a.dw + (static_cast<int64_t>(blockIdx.x) * a.heads + head) * channels + own_channel;

  for (int64_t image = begin; image < end; ++image) {
    const float* pairs = static_cast<const float*>(a.pairs) + image * (a.heads + a.mean) * 2 * channels;
    const float* average = pairs + (2 * a.heads + 1) * channels;
    stage_pairs(weights, nullptr, pairs, a.heads, channels, channels, positions);
    __syncthreads();

    sum_floats_over_channels<kOwn, kColumns>(slots, cut, static_cast<int>(image) - begin, positions);
    if (warp < a.heads) {  // a warp for each head's dl and a
      const float shift = a.lse[image * a.heads + warp] - bias, delta = a.delta[image * a.heads + warp];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int position = lane + 32 * i;
        float mask = 0, gradient = 0;
        if (position < positions) {
          mask = expf(float_sum<kOwn, kColumns>(slots, 2 * warp, i) - shift);
          gradient = mask * (float_sum<kOwn, kColumns>(slots, 2 * warp + 1, i) - delta);
          if (a.grad_logits != nullptr) gradient += a.grad_logits[(image * a.heads + warp) * positions + position];
        }
        masks[32 * (2 * warp * kOwn + i)] = gradient;
        masks[32 * ((2 * warp + 1) * kOwn + i)] = mask;
      }
    }
    __syncthreads();

    float both[kColumns][kOwn];  // dl and a
#pragma unroll
    for (int i = 0; i < kColumns * kOwn; ++i) both[i / kOwn][i % kOwn] = masks[32 * i];
    uint8_t* dz = writes ? reinterpret_cast<uint8_t*>(static_cast<float*>(a.dz.data) + image * a.dz.image) : nullptr;
    const float* upstream =
        tapped ? static_cast<const float*>(a.upstream.data) + image * a.upstream.image + lane : nullptr;
    int slot_before = -1;
    for (int chunk = cut.slots.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(static_cast<int>(image) - begin, chunk, true);
      float* z = reinterpret_cast<float*>(memory + slot * cut.slots.chunk_bytes) + lane;
      for (int unit = kUnit * warp; unit < cut.rows; unit += kUnit * kGroupWarps) {
        const int channel = chunk * cut.rows + unit;
        const float before = dw != nullptr && image > begin ? dw[channel] : 0.f;
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
        if (dw != nullptr) dw[channel] = before + sum;
      }
      fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        if (slot_before >= 0) {
          bulk_wait_read<0>();
          slots.ask(slot_before);
        }
        if (writes)
          bulk_store(dz + static_cast<int64_t>(chunk) * cut.slots.chunk_bytes,
                     slots.base + slot * cut.slots.chunk_bytes, cut.slots.chunk_bytes, kEvictNormal);
        bulk_commit();
      }
      slot_before = slot;
    }
    if (threadIdx.x == 0) {
      bulk_wait_read<0>();
      slots.ask(slot_before);
    }
  }
#endif  // AR_HOPPER
}

FloatImagesCut backward_cut(const BackwardSweep& a) { return float_images_cut(a.channels, a.positions, kColumns); }

template <int kOwn>
cudaError_t sweep(const BackwardSweep& a, const FloatImagesCut& cut, cudaStream_t stream) {
  return launch<backward_float_images_kernel<kOwn>>(backward_float_images_programs(a), kFloatThreads, cut.slots.bytes,
                                                    stream, a, cut);
}

}  // namespace

bool can_sweep_backward_float_images(const BackwardSweep& a) {
  if (a.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  for (const Map& map : {a.dz, a.upstream})
    if (map.data != nullptr && !is_float_images(map, a.positions)) return false;
  return is_float_images(a.z, a.positions) && backward_cut(a).slots.slots > 0;
}

int backward_float_images_programs(const BackwardSweep& a) { return std::min(a.images, processors()); }

cudaError_t sweep_backward_float_images(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_float_images(a) || a.unscale != nullptr) return cudaErrorInvalidValue;
  const FloatImagesCut cut = backward_cut(a);
  switch (cut.own) {
    case 2: return sweep<2>(a, cut, stream);
    case 6: return sweep<6>(a, cut, stream);
    default: return sweep<8>(a, cut, stream);
  }
}

}  // namespace ar_kernels
