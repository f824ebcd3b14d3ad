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

// Two adjacent values as memory has them, and what they are: apart, so that several loads are under way at a time.
__device__ __forceinline__ uint2 raw_pair(const Values& values, int index) {
  if (values.kind == Kind::kFloat)
    return *reinterpret_cast<const uint2*>(static_cast<const float*>(values.data) + index);
  return make_uint2(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(values.data) + index), 0);
}

template <class T>
__device__ __forceinline__ float2 pair_from(const Values& values, uint2 raw) {
  return values.kind == Kind::kFloat ? make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y)) : unpacked<T>(raw.x);
}

// Two adjacent channels' rows of weights.
__device__ __forceinline__ void store_weights(const RowsCut& cut, int channel, const uint32_t (&w)[kHeads],
                                              const uint32_t (&dp)[kHeads], uint4* weights) {
  uint32_t low[kHeads], high[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    low[k] = __byte_perm(w[k], dp[k], 0x5410);
    high[k] = __byte_perm(w[k], dp[k], 0x7632);
  }
  weights[weight_place(cut, channel)] = make_uint4(low[0], low[1], low[2], low[3]);
  weights[weight_place(cut, channel + 1)] = make_uint4(high[0], high[1], high[2], high[3]);
}

// W_H and dP of an image's channels from the first one of this block, in the order of weight_place, column 2 k and
// 2 k + 1; the formulas are pooled_gradient's of attend_backward.cu. parts: two arrays of [kWarps], the second of
// delta, which is for the caller to take.
template <class T>
__device__ __forceinline__ void make_weights(const BackwardSweep& a, const RowsCut& cut, int64_t image,
                                             int first_channel, const Exchange& of_gates, const Exchange& of_deltas,
                                             int turn, float4* parts, uint4* weights) {
  const PooledGradient& of = a.of;
  const float* pooled = of.pooled + image * a.heads * a.channels + first_channel;
  const T* dx = static_cast<const T*>(of.grad_features) + image * of.gated * a.channels + first_channel;
  const float* more =
      of.grad_pooled == nullptr ? nullptr : of.grad_pooled + image * a.heads * a.channels + first_channel;
  const bool has_features = of.grad_features != nullptr, has_scores = of.score_w.data != nullptr;
  const auto features_at = [&](int k, int channel) {
    return has_features && k < of.gated ? *reinterpret_cast<const uint32_t*>(dx + k * a.channels + channel) : 0;
  };
  const auto floats_at = [&](const float* data, int k, int channel) {
    return k < a.heads ? *reinterpret_cast<const float2*>(data + k * a.channels + channel) : make_float2(0, 0);
  };

  float gates[kHeads] = {}, dt[kHeads] = {};
  if (has_scores) {
    float dg[kHeads] = {}, gradients[kHeads] = {}, tanhs[kHeads] = {};
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k < of.gated) gates[k] = of.gates[image * of.gated + k];
      if (k < of.gated && of.grad_gates != nullptr) gradients[k] = of.grad_gates[image * of.gated + k];
      if (k < a.heads) tanhs[k] = of.scores[image * a.heads + k];
      if (k < a.heads && of.grad_scores != nullptr) dt[k] = of.grad_scores[image * a.heads + k];
    }
    for (int channel = 2 * threadIdx.x; channel < cut.channels; channel += 2 * kWorkers) {
      uint32_t x[kHeads];
      float2 p[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        x[k] = features_at(k, channel);
        p[k] = floats_at(pooled, k, channel);
      }
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const float2 values = unpacked<T>(x[k]);
        dg[k] += values.x * p[k].x + values.y * p[k].y;
      }
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) dg[k] = warp_sum(dg[k]);
    give_part(dg, parts, of_gates, turn);
    workers_sync();
    take_sums(parts, of_gates, turn, dg);
    float mixed = 0;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      dg[k] += gradients[k];
      mixed += gates[k] * dg[k];
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const float u = gate_tanh(tanhs[k]);
      dt[k] += gates[k] * (dg[k] - mixed) * (1 - u * u);
      if (k < a.heads && of.dt != nullptr && threadIdx.x == 0 && first_channel == 0) of.dt[image * a.heads + k] = dt[k];
    }
  }
  float delta[kHeads] = {};
  for (int channel = 2 * threadIdx.x; channel < cut.channels; channel += 2 * kWorkers) {
    uint32_t x[kHeads], dp_words[kHeads] = {}, w_words[kHeads] = {};
    float2 p[kHeads], others[kHeads] = {};
    uint2 w[kHeads] = {}, score_w[kHeads] = {};
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      x[k] = features_at(k, channel);
      p[k] = floats_at(pooled, k, channel);
      if (k < a.heads) w[k] = raw_pair(of.w, k * a.channels + first_channel + channel);
      if (k < a.heads && has_scores) score_w[k] = raw_pair(of.score_w, k * a.channels + first_channel + channel);
      if (more != nullptr) others[k] = floats_at(more, k, channel);
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= a.heads) continue;
      const float2 values = unpacked<T>(x[k]), weight = pair_from<T>(of.w, w[k]);
      float2 dp = {gates[k] * values.x + others[k].x, gates[k] * values.y + others[k].y};
      if (has_scores) {
        const float2 of_score = pair_from<T>(of.score_w, score_w[k]);
        dp = make_float2(dp.x + dt[k] * of_score.x, dp.y + dt[k] * of_score.y);
      }
      dp_words[k] = packed<T>(dp.x, dp.y);
      w_words[k] = packed<T>(weight.x, weight.y);
      dp = unpacked<T>(dp_words[k]);
      delta[k] += dp.x * p[k].x + dp.y * p[k].y;
    }
    store_weights(cut, channel, w_words, dp_words, weights);
  }
#pragma unroll
  for (int k = 0; k < kHeads; ++k) delta[k] = warp_sum(delta[k]);
  give_part(delta, parts + kWarps, of_deltas, turn);
}

#endif  // AR_HOPPER

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_rows_kernel(const __grid_constant__ BackwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int rank = static_cast<int>(cluster_rank()), cluster = blockIdx.x / cut.blocks;
  const int clusters = gridDim.x / cut.blocks;
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * cluster / clusters);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (cluster + 1) / clusters);
  const int first_channel = rank * cut.channels;
  const Slots slots(cut, memory);
  const Exchange of_sums(slots, 0), of_gates(slots, 1), of_deltas(slots, 2);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x >= kWorkers) {
    const int64_t skipped = static_cast<int64_t>(first_channel) * a.positions;
    if (threadIdx.x == kWorkers)
      slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + skipped, a.z.image * sizeof(T), end - begin,
                 static_cast<T*>(a.dz.data) + begin * a.dz.image + skipped, a.dz.image * sizeof(T));
    return;
  }

  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  uint4* weights = reinterpret_cast<uint4*>(memory + cut.weights);
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.masks);
  const float* sums = reinterpret_cast<const float*>(memory + cut.sums);  // [2 * kHeads, pitch]
  float4* parts = reinterpret_cast<float4*>(memory + cut.rest);           // make_weights'
  // [channels / 16, 32]: what each thread adds up of dW_H, of its two channels and head `column`
  float2* dw = reinterpret_cast<float2*>(parts + 2 * kWarps);
  const int head = threadIdx.x % kHeads;  // of this thread, where masks are made
  const float bias = head < a.heads && a.b.data != nullptr ? value_of(a.b, head) : 0.f;
  const float share = 1.f / positions;
  constexpr bool kScaled = std::is_same_v<T, __half>;  // bfloat16 needs no scale of its own
  const bool makes = std::is_same_v<T, __nv_bfloat16> && a.of.w.data != nullptr;
  for (int i = threadIdx.x; i < (16 * cut.tiles + 32) * kHeads; i += kWorkers) masks[i] = 0;

  for (int image = begin; image < end; ++image) {
    workers_sync();  // the weights of the image before are not used any more
    const T* pairs = static_cast<const T*>(a.pairs) + static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * channels +
                     first_channel;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (makes) make_weights<T>(a, cut, image, first_channel, of_gates, of_deltas, image - begin, parts, weights);
    for (int channel = 2 * threadIdx.x; !makes && channel < cut.channels; channel += 2 * kWorkers) {
      uint32_t w[kHeads], dp[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const T* pair = pairs + 2 * k * channels + channel;
        w[k] = k < a.heads ? *reinterpret_cast<const uint32_t*>(pair) : 0;
        dp[k] = k < a.heads ? *reinterpret_cast<const uint32_t*>(pair + channels) : 0;
      }
      store_weights(cut, channel, w, dp, weights);
    }
    const float inverse = kScaled && a.unscale != nullptr ? a.unscale[image] : 1.f;
    const float shift = head < a.heads ? a.lse[image * a.heads + head] - bias : 0.f;
    float delta = head < a.heads && !makes ? a.delta[image * a.heads + head] : 0.f;
    if (makes && head < a.heads && a.of.grad_lse != nullptr) delta = -a.of.grad_lse[image * a.heads + head];
    workers_sync();
    sum_over_channels<T, 2 * kHeads>(slots, of_sums, image - begin, positions);
    if (makes) {
      float deltas[kHeads];
      take_sums(parts + kWarps, of_deltas, image - begin, deltas);
      delta += gate_of(deltas, head);
    }
    const float* others = of_sums.take(image - begin);
    workers_sync();
    for (int entry = threadIdx.x; entry < positions * kHeads; entry += kWorkers) {
      const int position = entry / kHeads;
      float mask = 0, gradient = 0;
      if (head < a.heads) {
        const int low = 2 * head * cut.pitch + position, high = low + cut.pitch;
        float logit = sums[low], da = sums[high];
        if (others != nullptr) {
          logit += others[low];
          da += others[high];
        }
        mask = __expf(logit - shift);
        gradient = mask * (da - delta);
        if (a.grad_logits != nullptr)
          gradient += a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * positions + position] / inverse;
      }
      masks[16 * kHeads + entry] = packed<T>(gradient, mask);
    }
    workers_sync();

    // The mean's gradient at this lane's two channels of a chunk.
    const auto means_of = [&](int chunk) {
      if (!a.mean || chunk < 0) return make_float2(0, 0);
      const int low = chunk * cut.chunk + own.first + cut.classes * row, high = low + cut.classes * 8;
      if (makes) {
        const float* means = a.of.grad_mean + image * channels + first_channel;
        return make_float2(means[low], means[high]);
      }
      const T* means = pairs + (2 * a.heads + 1) * channels;
      return make_float2(value_of(means[low]), value_of(means[high]));
    };
    float2 next_mean = means_of(own.last);
    for (int chunk = own.last; chunk >= 0; chunk -= cut.teams) {
      const float2 mean = next_mean;
      next_mean = means_of(chunk - cut.teams);
      const Slots::Chunk z = slots.wait(image - begin, chunk, true);
      if (a.dw != nullptr) {
        float products[4];
        own.sum_over_positions<T>(slots, z.address, positions, products);
        float2* to = dw + (chunk * (cut.chunk / 16) + own.unit) * 32 + lane;
        const float2 before = image > begin ? *to : make_float2(0, 0);
        *to = make_float2(before.x + products[0] * inverse, before.y + products[2] * inverse);
        own.sync();  // others have read what lies around theirs
      }

      uint32_t weight[2];
      load_matrix(weight, own.weights + 16 * chunk * (cut.chunk + cut.classes));
      const float low = share * mean.x, high = share * mean.y;
      T* own_rows = reinterpret_cast<T*>(memory + (z.address - slots.base)) +
                    (own.first + cut.classes * row) * positions + 2 * column - own.shift;
#pragma unroll 2
      for (int tile = 0; tile < cut.tiles; ++tile) {
        const int first = 16 * tile;
        uint32_t mask[2], gradient[4];
        load_matrix(mask, own.masks + 16 * first);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float values[4] = {low, low, high, high};
          mma<T>(values, weight, mask[half]);
          if constexpr (kScaled)
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] *= inverse;
          gradient[2 * half] = packed<T>(values[0], values[1]);
          gradient[2 * half + 1] = packed<T>(values[2], values[3]);
        }
        if (first >= own.shift && first + 16 - own.shift <= positions) {
          store_matrix(z.address + own.row + 2 * first, gradient);
          continue;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = first + 8 * half;
          const uint32_t real = own.real_pair(at, positions);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            T* to = own_rows + cut.classes * 8 * i * positions + at;
            if ((real & 1) != 0) to[0] = half_of<T>(gradient[2 * half + i]);
            if ((real >> 16) != 0) to[1] = half_of<T>(gradient[2 * half + i] >> 16);
          }
        }
      }
      fence_proxy_async();
      slots.release(z, cut.teams);
    }
  }

  if (a.dw == nullptr) return;
  workers_sync();
  float* shares = a.dw + static_cast<int64_t>(cluster) * a.heads * channels + first_channel;
  for (int channel = threadIdx.x; channel < cut.channels; channel += kWorkers) {
    // Its matrix, and its row there.
    const int of_chunk = channel & (cut.chunk - 1), row_class = channel & (cut.classes - 1);
    const int of_class = of_chunk >> cut.class_bits;
    const int unit = (channel - of_chunk) / 16 + of_class / 16 * cut.classes + row_class, of_matrix = of_class % 16;
    for (int k = 0; k < a.heads; ++k) {
      const float2 both = dw[unit * 32 + of_matrix % 8 * 4 + k];
      shares[k * channels + channel] = of_matrix < 8 ? both.x : both.y;
    }
  }
#endif  // AR_HOPPER
}

RowsCut backward_cut(const BackwardSweep& a) {
  return rows_cut(a.channels, a.positions, 2 * kHeads, 0, 2 * kWarps * kHeads * 4, kHeads * 4);
}

template <class T>
cudaError_t sweep(const BackwardSweep& a, cudaStream_t stream) {
  const RowsCut cut = backward_cut(a);
  return launch_clusters<backward_rows_kernel<T>>(cut.blocks, backward_rows_programs(a), kThreads, cut.bytes, stream, a,
                                                  cut);
}

}  // namespace

bool can_sweep_backward_rows(const BackwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1 || a.upstream.data != nullptr) return false;
  if (a.kind == Kind::kBFloat16 && a.unscale != nullptr) return false;
  return is_rows(a.z, a.positions) && is_rows(a.dz, a.positions) && backward_cut(a).slots > 0;
}

int backward_rows_programs(const BackwardSweep& a) { return rows_clusters(backward_cut(a), a.images); }

cudaError_t sweep_backward_rows(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
