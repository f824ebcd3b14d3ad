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
constexpr int kGroup = kWorkers;    // channels whose P meets in shared memory, one for each thread
constexpr int kPitch = kGroup + 1;  // floats of a row of it; rows 2 apart begin 2 banks apart, channels of a warp 8
constexpr int kGroups = 2;          // whose features are made at once
static_assert(kGroup % kUnit == 0);

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_rows_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int rank = static_cast<int>(cluster_rank()), cluster = blockIdx.x / cut.blocks;
  const int clusters = gridDim.x / cut.blocks;
  const int begin = static_cast<int>(static_cast<int64_t>(a.images) * cluster / clusters);
  const int end = static_cast<int>(static_cast<int64_t>(a.images) * (cluster + 1) / clusters);
  const int first_channel = rank * cut.channels;
  const Slots slots(cut, memory);
  const Exchange of_sums(slots, 0), of_scores(slots, 1);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x >= kWorkers) {
    if (threadIdx.x == kWorkers)
      slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + first_channel * a.positions,
                 a.z.image * sizeof(T), end - begin, nullptr, 0);
    return;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  uint4* weights = reinterpret_cast<uint4*>(memory + cut.weights);
  T* masks = reinterpret_cast<T*>(memory + cut.masks) + 16 * 8;   // [S, 8], zeros around
  float* sums = reinterpret_cast<float*>(memory + cut.sums);      // [kHeads, pitch]
  float* pooled = sums;                                           // or [kHeads + 1, kPitch]: P of a group
  float4* scores = reinterpret_cast<float4*>(memory + cut.rest);  // [kWarps]
  float* totals = reinterpret_cast<float*>(scores + kWarps);      // [kHeads]
  // Four heads' weights of a channel of this block, to be looked at later.
  const auto raw_values = [&](const Values& values, int channel, uint32_t (&raw)[kHeads]) {
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      raw[k] = k < a.heads ? raw_value(values, k * channels + first_channel + channel) : 0;
  };
#pragma unroll 2
  for (int channel = threadIdx.x; channel < cut.channels; channel += kWorkers) {
    uint32_t raw[kHeads];
    raw_values(a.w, channel, raw);
    weights[weight_place(cut, channel)] = make_uint4(packed<T>(value_from(a.w, raw[0]), value_from(a.w, raw[1])),
                                                     packed<T>(value_from(a.w, raw[2]), value_from(a.w, raw[3])), 0, 0);
  }
  for (int i = threadIdx.x; i < (16 * cut.tiles + 32) * 8; i += kWorkers) {
    const int position = i / 8 - 16;
    masks[i - 16 * 8] = rounded<T>(i % 8 == kMean && position >= 0 && position < positions ? 1.f : 0.f);
  }
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  workers_sync();

  // Gates and features of an image whose P and scores are there.
  const auto finish = [&](int64_t image) {
    float sums[kHeads], gates[kHeads];
    take_sums(scores, of_scores, static_cast<int>(image) - begin, sums);
    make_gates(a, image, sums, 1, gates);  // both blocks store the same
    // Of what this thread has stored.
    for (int first = threadIdx.x; first < cut.channels; first += kGroups * kGroup) {
      float values[kGroups][kHeads];
      const auto all = [&](auto&& visit) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
#pragma unroll
          for (int k = 0; k < kHeads; ++k)
            if (k < a.gated && first + i * kGroup < cut.channels) visit(i, k, first_channel + first + i * kGroup);
      };
      all([&](int i, int k, int channel) { values[i][k] = a.pooled[(image * a.heads + k) * channels + channel]; });
      all([&](int i, int k, int channel) {
        static_cast<T*>(a.features)[(image * a.gated + k) * channels + channel] = rounded<T>(gates[k] * values[i][k]);
      });
    }
  };

  for (int64_t image = begin; image < end; ++image) {
    const int turn = static_cast<int>(image) - begin;
    sum_over_channels<T, kHeads>(slots, of_sums, turn, positions);
    if (a.gated > 0 && turn > 0) finish(image - 1);  // while the other block's sums are on their way
    const float* others = of_sums.take(turn);
    workers_sync();
    if (warp < a.heads) {  // a warp for each head's softmax
      const int k = warp;
      float* logits = sums + k * cut.pitch;
      float most = -INFINITY, total = 0;
      for (int position = lane; position < positions; position += 32) {
        float logit = logits[position];
        if (others != nullptr) logit += others[k * cut.pitch + position];
        logit += bias;
        most = maximum(most, logit);
        logits[position] = logit;
      }
      most = warp_maximum(most);
      const float start = origin(most);
      for (int position = lane; position < positions; position += 32) {
        const float logit = logits[position], mask = __expf(logit - start);
        if (a.logits != nullptr && rank == 0) a.logits[(image * a.heads + k) * positions + position] = logit;
        masks[position * 8 + k] = rounded<T>(mask);
        total += mask;
      }
      total = warp_sum(total);
      if (lane == 0) {
        totals[k] = total;
        if (rank == 0) a.lse[image * a.heads + k] = start + __logf(total);
      }
    }
    workers_sync();

    // Columns 2 * column and + 1 of P become rows in shared memory; then a thread has a channel.
    const int k = 2 * column;
    const float low = 1 / (k < a.heads ? totals[k] : positions), high = 1 / (k + 1 < a.heads ? totals[k + 1] : 1.f);
    float score[kHeads] = {};
    int chunk = own.last;
    for (int group = (cut.channels - 1) / kGroup * kGroup; group >= 0; group -= kGroup) {
      const int channel = group + threadIdx.x;
      uint32_t score_w[kHeads] = {};
      if (a.gated > 0 && channel < cut.channels) raw_values(a.score_w, channel, score_w);
      for (; chunk * cut.chunk >= group; chunk -= cut.teams) {
        const Slots::Chunk z = slots.wait(turn, chunk, true);
        float pooled_sums[4];
        own.sum_over_positions<T>(slots, z.address, positions, pooled_sums);
        slots.release(z, cut.teams);
        float* to = pooled + k * kPitch + chunk * cut.chunk - group + own.first + cut.classes * row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (k <= kMean) to[cut.classes * 8 * half] = pooled_sums[2 * half] * low;
          if (k < kMean) to[cut.classes * 8 * half + kPitch] = pooled_sums[2 * half + 1] * high;
        }
      }
      workers_sync();
      if (channel < cut.channels) {
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          if (k >= a.heads) continue;
          const float value = pooled[k * kPitch + threadIdx.x];
          a.pooled[(image * a.heads + k) * channels + first_channel + channel] = value;
          score[k] += value * value_from(a.score_w, score_w[k]);
        }
        if (a.mean != nullptr)
          a.mean[image * channels + first_channel + channel] = pooled[kMean * kPitch + threadIdx.x];
      }
      if (group > 0) workers_sync();
    }
    if (a.gated > 0) {
#pragma unroll
      for (int k = 0; k < kHeads; ++k) score[k] = warp_sum(score[k]);
      give_part(score, scores, of_scores, turn);
    }
  }
  workers_sync();
  if (a.gated > 0 && end > begin) finish(end - 1);
#endif  // AR_HOPPER
}

RowsCut forward_cut(const ForwardSweep& a) {
  return rows_cut(a.channels, a.positions, kHeads, (kHeads + 1) * kPitch * 4, (1 + kWarps) * kHeads * 4, 0);
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const RowsCut cut = forward_cut(a);
  return launch_clusters<forward_rows_kernel<T>>(cut.blocks, rows_clusters(cut, a.images), kThreads, cut.bytes, stream,
                                                 a, cut);
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
