// The backward sweep of NCHW maps with rows of any length, on Hopper (rows.cuh): one read of the map from memory, a
// second one of a part of it from L2, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S),  dW_H += dl Z^T
//
// The first sweep makes l and dA, the second the rest; a chunk turns into its dZ where it lies. W_H and dP lie side by
// side, column 2 k and 2 k + 1 of one matrix, and so do dl and a. dW_H is added up in memory, by the same threads.

#include <algorithm>

#include "attend_backward.h"
#include "gates.cuh"
#include "rows.cuh"
#include "values.cuh"

namespace ar_kernels {

namespace {

#if AR_HOPPER

// W_H and dP of an image in the order of weight_place, column 2 k and 2 k + 1; the formulas are pooled_gradient's of
// attend_backward.cu. shared: two arrays of [kWarps, kHeads] floats, the second of what delta is the sum of, after a
// barrier.
template <class T>
__device__ __forceinline__ void make_weights(const BackwardSweep& a, const RowsCut& cut, int64_t image, float* shared,
                                             uint4* weights) {
  const PooledGradient& of = a.of;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* pooled = of.pooled + image * a.heads * a.channels;
  const T* dx = static_cast<const T*>(of.grad_features) + image * of.gated * a.channels;
  const bool has_features = of.grad_features != nullptr;
  const auto features_at = [&](int k, int channel) {
    return has_features && k < of.gated ? unpacked<T>(*reinterpret_cast<const uint32_t*>(dx + k * a.channels + channel))
                                        : make_float2(0, 0);
  };
  const auto pooled_at = [&](int k, int channel) {
    return k < a.heads ? *reinterpret_cast<const float2*>(pooled + k * a.channels + channel) : make_float2(0, 0);
  };
  const auto store_sums = [&](const float (&sums)[kHeads], float* to) {
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const float sum = warp_sum(sums[k]);
      if (lane == 0) to[warp * kHeads + k] = sum;
    }
  };

  float gates[kHeads] = {}, dt[kHeads] = {};
  if (of.score_w.data != nullptr) {
    float dg[kHeads] = {};
    for (int channel = 2 * threadIdx.x; channel < a.channels; channel += 2 * kThreads)
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const float2 x = features_at(k, channel), p = pooled_at(k, channel);
        dg[k] += x.x * p.x + x.y * p.y;
      }
    store_sums(dg, shared);
    __syncthreads();
    float mixed = 0;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      dg[k] = 0;
      for (int other = 0; other < kWarps; ++other) dg[k] += shared[other * kHeads + k];
      if (k >= of.gated) continue;
      gates[k] = of.gates[image * of.gated + k];
      if (of.grad_gates != nullptr) dg[k] += of.grad_gates[image * of.gated + k];
      mixed += gates[k] * dg[k];
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= a.heads) continue;
      const float u = gate_tanh(of.scores[image * a.heads + k]);
      dt[k] = gates[k] * (dg[k] - mixed) * (1 - u * u);
      if (of.grad_scores != nullptr) dt[k] += of.grad_scores[image * a.heads + k];
      if (of.dt != nullptr && threadIdx.x == 0) of.dt[image * a.heads + k] = dt[k];
    }
  }
  float delta[kHeads] = {};
  for (int channel = 2 * threadIdx.x; channel < a.channels; channel += 2 * kThreads) {
    uint32_t low[kHeads] = {}, high[kHeads] = {};
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= a.heads) continue;
      const float2 x = features_at(k, channel), p = pooled_at(k, channel);
      float2 dp = {gates[k] * x.x, gates[k] * x.y};
      if (of.score_w.data != nullptr) {
        const float2 w = pair_of<T>(of.score_w, k * a.channels + channel);
        dp = make_float2(dp.x + dt[k] * w.x, dp.y + dt[k] * w.y);
      }
      if (of.grad_pooled != nullptr) {
        const int64_t at = (image * a.heads + k) * a.channels + channel;
        const float2 more = *reinterpret_cast<const float2*>(of.grad_pooled + at);
        dp = make_float2(dp.x + more.x, dp.y + more.y);
      }
      const uint32_t word = packed<T>(dp.x, dp.y), mask = weight_pair<T>(of.w, k * a.channels + channel);
      dp = unpacked<T>(word);
      delta[k] += dp.x * p.x + dp.y * p.y;
      low[k] = __byte_perm(mask, word, 0x5410);
      high[k] = __byte_perm(mask, word, 0x7632);
    }
    weights[weight_place(channel, cut.classes)] = make_uint4(low[0], low[1], low[2], low[3]);
    weights[weight_place(channel + 1, cut.classes)] = make_uint4(high[0], high[1], high[2], high[3]);
  }
  store_sums(delta, shared + kWarps * kHeads);
}

#endif  // AR_HOPPER

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_rows_kernel(const __grid_constant__ BackwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (blockIdx.x + 1) / gridDim.x);
  Slots slots(cut, static_cast<const T*>(a.z.data) + begin * a.z.image, a.z.image * sizeof(T), end - begin, memory);
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  uint4* weights = reinterpret_cast<uint4*>(memory + cut.weights);
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.masks);
  float* of_image = reinterpret_cast<float*>(memory + cut.rest);  // make_weights'
  const int head = threadIdx.x % kHeads;                          // of this thread, where masks are made
  const float bias = head < a.heads && a.b.data != nullptr ? value_of(a.b, head) : 0.f;
  const float share = 1.f / positions;
  float* dw = a.dw == nullptr || column >= a.heads
                  ? nullptr
                  : a.dw + (static_cast<int64_t>(blockIdx.x) * a.heads + column) * channels + own.first;
  for (int i = threadIdx.x; i < (16 * cut.tiles + 32) * kHeads; i += kThreads) masks[i] = 0;

  for (int image = begin; image < end; ++image) {
    const bool makes = std::is_same_v<T, __nv_bfloat16> && a.of.w.data != nullptr;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (makes) make_weights<T>(a, cut, image, of_image, weights);
    // W_H and dP: rows of pairs become columns.
    const int64_t rows = a.heads + a.mean;
    const T* pairs = static_cast<const T*>(a.pairs) + image * rows * 2 * channels;
    for (int channel = 2 * threadIdx.x; !makes && channel < channels; channel += 2 * kThreads) {
      uint32_t words[2 * kHeads];
#pragma unroll
      for (int i = 0; i < 2 * kHeads; ++i)
        words[i] = i < 2 * a.heads ? *reinterpret_cast<const uint32_t*>(pairs + i * channels + channel) : 0;
      uint32_t low[kHeads], high[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        low[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x5410);
        high[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7632);
      }
      weights[weight_place(channel, cut.classes)] = make_uint4(low[0], low[1], low[2], low[3]);
      weights[weight_place(channel + 1, cut.classes)] = make_uint4(high[0], high[1], high[2], high[3]);
    }
    const float inverse = a.unscale == nullptr ? 1.f : a.unscale[image];
    const float shift = head < a.heads ? a.lse[image * a.heads + head] - bias : 0.f;
    float delta = head < a.heads && !makes ? a.delta[image * a.heads + head] : 0.f;
    __syncthreads();
    if (makes && head < a.heads) {
      if (a.of.grad_lse != nullptr) delta = -a.of.grad_lse[image * a.heads + head];
      for (int other = 0; other < kWarps; ++other) delta += of_image[(kWarps + other) * kHeads + head];
    }

    sum_over_channels<T>(slots, image - begin, positions);
    for (int entry = threadIdx.x; entry < positions * kHeads; entry += kThreads) {
      const int position = entry / kHeads;
      float mask = 0, gradient = 0;
      if (head < a.heads) {
        const float2 sum = class_sum(slots, positions, position, head);
        mask = __expf(sum.x - shift);
        gradient = mask * (sum.y - delta);
        if (a.grad_logits != nullptr)
          gradient += a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * positions + position] / inverse;
      }
      masks[16 * kHeads + entry] = packed<T>(gradient, mask);
    }
    __syncthreads();

    uint8_t* dz = reinterpret_cast<uint8_t*>(static_cast<T*>(a.dz.data) + image * a.dz.image);
    int slot_before = -1;
    for (int chunk = cut.chunks - 1; chunk >= 0; --chunk) {
      const int slot = slots.wait(image - begin, chunk, true);
      const uint32_t z = slots.base + slot * cut.chunk_bytes;
      if (a.dw != nullptr) {
        float before[2] = {0, 0}, sums[4];
        if (dw != nullptr && image > begin)
#pragma unroll
          for (int half = 0; half < 2; ++half) before[half] = dw[chunk * kChunk + cut.classes * (row + 8 * half)];
        own.sum_over_positions<T>(slots, z, positions, sums);
        if (dw != nullptr)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            dw[chunk * kChunk + cut.classes * (row + 8 * half)] = before[half] + sums[2 * half] * inverse;
        __syncthreads();  // what follows writes where others' matrices begin and end
      }

      uint32_t weight[2];
      load_matrix(weight, own.weights + 16 * (chunk * kChunk + lane % 16));
      float2 mean = {0, 0};  // of this lane's two channels
      if (a.mean) {
        const int low = chunk * kChunk + own.first + cut.classes * row, high = low + cut.classes * 8;
        const T* means = pairs + (2 * a.heads + 1) * channels;
        const float* gradients = a.of.grad_mean + image * channels;
        mean.x = share * (makes ? gradients[low] : value_of(means[low]));
        mean.y = share * (makes ? gradients[high] : value_of(means[high]));
      }
      const uint32_t own_row = 2 * ((own.first + cut.classes * (lane % 16)) * positions - own.shift);
      for (int tile = 0; tile < cut.tiles; ++tile) {
        const int first = 16 * tile;
        uint32_t mask[2], gradient[4];
        load_matrix(mask, own.masks + 16 * (first + lane % 16));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float values[4] = {mean.x, mean.x, mean.y, mean.y};
          mma<T>(values, weight, mask[half]);
          gradient[2 * half] = packed<T>(values[0] * inverse, values[1] * inverse);
          gradient[2 * half + 1] = packed<T>(values[2] * inverse, values[3] * inverse);
        }
        if (first >= own.shift && first + 16 - own.shift <= positions) {
          store_matrix(z + own_row + 2 * first + lane / 16 * 16, gradient);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int channel = own.first + cut.classes * (row + i % 2 * 8);
          const int position = first + i / 2 * 8 + 2 * column - own.shift;
          T* to = reinterpret_cast<T*>(memory + slot * cut.chunk_bytes) + channel * positions + position;
          if (position >= 0 && position < positions) to[0] = half_of<T>(gradient[i]);
          if (position >= -1 && position + 1 < positions) to[1] = half_of<T>(gradient[i] >> 16);
        }
      }
      fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        if (slot_before >= 0) {
          bulk_wait_read<0>();
          slots.ask(slot_before);
        }
        bulk_store(dz + static_cast<int64_t>(chunk) * cut.chunk_bytes, z, cut.chunk_bytes, kEvictNormal);
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

RowsCut backward_cut(const BackwardSweep& a) { return rows_cut(a.channels, a.positions, 2 * kWarps * kHeads * 4); }

template <class T>
cudaError_t sweep(const BackwardSweep& a, cudaStream_t stream) {
  const RowsCut cut = backward_cut(a);
  return launch<backward_rows_kernel<T>>(backward_rows_programs(a), kThreads, cut.bytes, stream, a, cut);
}

}  // namespace

bool can_sweep_backward_rows(const BackwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1 || a.upstream.data != nullptr) return false;
  return is_rows(a.z, a.positions) && is_rows(a.dz, a.positions) && backward_cut(a).slots > 0;
}

int backward_rows_programs(const BackwardSweep& a) { return std::min(a.images, processors()); }

cudaError_t sweep_backward_rows(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
