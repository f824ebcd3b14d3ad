// The forward sweep of NCHW maps with rows of any length, on Hopper (rows.cuh): one read of the map from memory, a
// second one of a part of it from L2.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// The first sweep makes l, the second the rest. The mean over positions is one more row of P, whose weights are 1.

#include "attend_forward.h"
#include "gates.cuh"
#include "rows.cuh"

namespace ar_kernels {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_rows_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  constexpr int kMean = kHeads;  // the column of the mean
  uint8_t* memory = shared_memory();
  const int rank = static_cast<int>(cluster_rank()), cluster = blockIdx.x / cut.blocks;
  const int clusters = gridDim.x / cut.blocks;
  const int begin = first_of(cluster, clusters, a.images), end = first_of(cluster + 1, clusters, a.images);
  const int first_channel = rank * cut.channels;
  const Slots slots(cut, memory);
  const Exchange of_sums(slots, 0), of_scores(slots, 1);
  cluster_arrive();
  if (threadIdx.x >= kWorkers) {
    cluster_wait();
    if (threadIdx.x == kWorkers)
      slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + first_channel * a.positions,
                 a.z.image * sizeof(T), end - begin, nullptr, 0);
    return;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  uint4* weights = reinterpret_cast<uint4*>(memory + cut.weights);
  T* masks = reinterpret_cast<T*>(memory + cut.masks) + kFrame * 8;  // [S, 8], zeros around
  float* sums = reinterpret_cast<float*>(memory + cut.sums);         // [kHeads, pitch]
  float* pooled = sums;                                              // or [kHeads + 1, pitch]: P
  const int pitch = cut.channels + 1;                                // floats
  float4* scores = reinterpret_cast<float4*>(memory + cut.rest);     // [kWarps]
  float* totals = reinterpret_cast<float*>(scores + kWarps);         // [kHeads]
  // A thread's channels: this one and the next, and others behind where a block has more.
  const int own_pair = 2 * threadIdx.x;
  const bool is_held = cut.channels <= 2 * kWorkers;  // there are no others: what is of them stays in registers
  uint2 w[kHeads] = {}, score_w[kHeads] = {};
  float2 values[kHeads] = {};  // P
  if (own_pair < cut.channels) load_pairs(a.w, a.heads, channels, first_channel + own_pair, w);
  if (a.gated > 0 && own_pair < cut.channels)
    load_pairs(a.score_w, a.heads, channels, first_channel + own_pair, score_w);
  for (int i = threadIdx.x; i < (kFrame + 16 * cut.tiles) * 8; i += kWorkers) {
    const int position = i / 8 - kFrame;
    masks[i - kFrame * 8] = rounded<T>(i % 8 == kMean && position >= 0 && position < positions ? 1.f : 0.f);
  }
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  cluster_wait();  // before it, since behind the other warp's loads of the map these would wait long
#pragma unroll 1
  for (int pair = own_pair; pair < cut.channels; pair += 2 * kWorkers) {
    if (pair != own_pair) load_pairs(a.w, a.heads, channels, first_channel + pair, w);
    float2 of[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) of[k] = pair_from<T>(a.w, w[k]);
    weights[weight_place(cut, pair)] = make_uint4(packed<T>(of[0].x, of[1].x), packed<T>(of[2].x, of[3].x), 0, 0);
    weights[weight_place(cut, pair + 1)] = make_uint4(packed<T>(of[0].y, of[1].y), packed<T>(of[2].y, of[3].y), 0, 0);
  }
  workers_sync();

  const auto pooled_pair = [&](int64_t image, int k, int pair) {
    return reinterpret_cast<float2*>(a.pooled + (image * a.heads + k) * channels + first_channel + pair);
  };
  // Gates and features of an image whose P and scores are there.
  const auto finish = [&](int64_t image) {
    float sums[kHeads], gates[kHeads];
    take_sums(scores, of_scores, static_cast<int>(image) - begin, sums);
    make_gates(a, image, sums, 1, gates);  // both blocks store the same
#pragma unroll 1
    for (int pair = own_pair; pair < cut.channels; pair += 2 * kWorkers) {
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (!is_held && k < a.gated) values[k] = *pooled_pair(image, k, pair);  // which this thread has stored
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (k < a.gated)
          *reinterpret_cast<uint32_t*>(static_cast<T*>(a.features) + (image * a.gated + k) * channels + first_channel +
                                       pair) = packed<T>(gates[k] * values[k].x, gates[k] * values[k].y);
    }
  };

  for (int64_t image = begin; image < end; ++image) {
    const int turn = static_cast<int>(image) - begin;
    sum_over_channels<T, kHeads>(slots, of_sums, turn, positions, 0, [] {});
    if (a.gated > 0 && turn > 0) finish(image - 1);  // while the other block's sums are on their way
    const float* others = of_sums.take(turn);
    workers_sync();
    if (warp < a.heads) {  // a warp for each head's softmax
      const int k = warp;
      float* logits = sums + k * cut.pitch;
      float most = -INFINITY, total = 0;
      for (int position = lane; position < positions; position += 32) {
        float logit = logits[position];
        if (others != nullptr) logit += others[k * 4 * cut.quads + position];
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

    // Columns 2 * column and + 1 of P become rows in shared memory; then a thread has channels.
    const int k = 2 * column;
    const float low = __fdividef(1, k < a.heads ? totals[k] : positions);
    const float high = __fdividef(1, k + 1 < a.heads ? totals[k + 1] : 1.f);
    float score[kHeads] = {};
    for (int chunk = own.last; chunk >= 0; chunk -= cut.teams) {
      const Slots::Chunk z = slots.wait(turn, chunk, true);
      float pooled_sums[4];
      own.sum_over_positions<T>(z.address, pooled_sums);
      slots.release(z, cut.teams);
      if (k > kMean) continue;
      float* to = pooled + k * pitch + chunk * cut.chunk + own.first + cut.classes * row;
      to[0] = pooled_sums[0] * low, to[cut.classes * 8] = pooled_sums[2] * low;
      if (k == kMean) continue;
      to[pitch] = pooled_sums[1] * high, to[pitch + cut.classes * 8] = pooled_sums[3] * high;
    }
    workers_sync();
#pragma unroll 1
    for (int pair = own_pair; pair < cut.channels; pair += 2 * kWorkers) {
      if (a.gated > 0 && !is_held) load_pairs(a.score_w, a.heads, channels, first_channel + pair, score_w);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k >= a.heads) continue;
        const float2 of_score = pair_from<T>(a.score_w, score_w[k]);
        values[k] = make_float2(pooled[k * pitch + pair], pooled[k * pitch + pair + 1]);
        *pooled_pair(image, k, pair) = values[k];
        score[k] += values[k].x * of_score.x + values[k].y * of_score.y;
      }
      if (a.mean != nullptr)
        *reinterpret_cast<float2*>(a.mean + image * channels + first_channel + pair) =
            make_float2(pooled[kMean * pitch + pair], pooled[kMean * pitch + pair + 1]);
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
  RowsNeeds needs = {};
  needs.columns = kHeads;
  needs.sums_of_channel = (kHeads + 1) * 4;
  needs.buffers = 1;
  needs.rest = (1 + kWarps) * kHeads * 4;
  return rows_cut(a.images, a.channels, a.positions, needs);
}

template <class T>
cudaError_t sweep(const ForwardSweep& a, cudaStream_t stream) {
  const RowsCut cut = forward_cut(a);
  return launch_clusters<forward_rows_kernel<T>>(cut.blocks, rows_clusters(cut, a.images), kThreads, cut.bytes, stream,
                                                 a, cut);
}

}  // namespace

bool can_sweep_forward_rows(const ForwardSweep& a) {
  return is_half(a) && is_rows(a.z, a.positions) && forward_cut(a).slots > 0;
}

cudaError_t sweep_forward_rows(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
