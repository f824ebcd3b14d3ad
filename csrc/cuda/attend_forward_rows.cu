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

constexpr int kParts = kWarps / kHeads;  // of a head's sums: a warp's each
static_assert(kParts == 4);

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_rows_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  constexpr int kMean = kHeads;  // the column of the mean
  constexpr int kHeldPairs = 4;  // of channels, a thread: what is of them stays in registers
  uint8_t* memory = shared_memory();
  const int rank = static_cast<int>(cluster_rank()), cluster = cluster_of(cut, blockIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels, first_channel = rank * cut.channels;
  // A head's threads: this one's positions, and its channels, of which each has a pair.
  const int head = head_of_warp(), own_part = head * kParts + warp / kHeads;
  const bool is_head = head < a.heads;
  const int own_channel = 2 * thread_of_head();
  const bool is_held = cut.channels <= 2 * kOfHead * kHeldPairs;
  const int64_t own_row = static_cast<int64_t>(head) * channels + first_channel;
  // Weights first: behind the map's loads they would wait long. Of W_H a thread has this channel and the next.
  const bool is_worker = threadIdx.x < kWorkers;
  const int own_pair = 2 * threadIdx.x;
  uint2 w[kHeads] = {}, score_w[kHeldPairs] = {};
  float2 values[kHeldPairs] = {};  // P
  if (is_worker && own_pair < cut.channels) load_pairs(a.w, a.heads, channels, first_channel + own_pair, w);
  const auto for_held = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < kHeldPairs; ++i)
      if (own_channel + 2 * kOfHead * i < cut.channels) visit(i, own_channel + 2 * kOfHead * i);
  };
  if (a.gated > 0 && is_held && is_head && is_worker)
    for_held([&](int i, int channel) { score_w[i] = raw_pair(a.score_w, own_row + channel); });
  const float bias = is_head && a.b.data != nullptr ? value_of(a.b, head) : 0.f;
  const int clusters = cluster_of(cut, gridDim.x);
  const int begin = first_of<int>(cluster, clusters, a.images), end = first_of<int>(cluster + 1, clusters, a.images);
  const Slots slots(cut, memory);
  const Exchange of_sums(slots, 0), of_scores(slots, 1);
  if (!is_worker) {
    slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + first_channel * a.positions, a.z.image * sizeof(T),
               end - begin, nullptr, 0);
    return;
  }
  cluster_arrive();

  const OwnRows own(slots, positions);
  uint4* weights = reinterpret_cast<uint4*>(memory + cut.weights);
  T* masks = reinterpret_cast<T*>(memory + cut.masks) + kFrame * 8;  // [S, 8], zeros around
  float* pooled = reinterpret_cast<float*>(memory + cut.sums);       // [kHeads + 1, pitch]: P
  const int pitch = cut.channels + kGap;                             // floats
  float* maxima = reinterpret_cast<float*>(memory + cut.rest);       // [kHeads, kParts], and so are totals
  float* totals = maxima + kWarps;
  float* scores = totals + kWarps;  // [kWarps]
  const auto sum_of = [](const float* parts) {
    const float4 four = *reinterpret_cast<const float4*>(parts);
    return four.x + four.y + (four.z + four.w);
  };
  // Where matrices leave this thread's sums of P: of row k of it and the next, of a channel and a later one.
  const int k = 2 * column;
  const uint32_t own_place = kept(k * pitch + own.first + cut.classes * row);
  for (int i = threadIdx.x; i < (kFrame + 16 * cut.tiles) * 8; i += kWorkers) {
    const int position = i / 8 - kFrame;
    masks[i - kFrame * 8] = rounded<T>(i % 8 == kMean && position >= 0 && position < positions ? 1.f : 0.f);
  }
  cluster_wait();
#pragma unroll 1
  for (int pair = own_pair; pair < cut.channels; pair += 2 * kWorkers) {
    if (pair != own_pair) load_pairs(a.w, a.heads, channels, first_channel + pair, w);
    float2 of[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) of[i] = pair_from<T>(a.w, w[i]);
    weights[weight_place(cut, pair)] = make_uint4(packed<T>(of[0].x, of[1].x), packed<T>(of[2].x, of[3].x), 0, 0);
    weights[weight_place(cut, pair + 1)] = make_uint4(packed<T>(of[0].y, of[1].y), packed<T>(of[2].y, of[3].y), 0, 0);
  }
  workers_sync();

  const auto pooled_pair = [&](int64_t image, int channel) {  // of this head
    return reinterpret_cast<float2*>(a.pooled + image * a.heads * channels + own_row + channel);
  };
  // Gates and features of an image whose P and scores are there.
  const auto finish = [&](int64_t image) {
    float sums[kHeads], gates[kHeads];
    take_sums(scores, of_scores, static_cast<int>(image) - begin, sums);
    make_gates(a, image, sums, 1, gates);  // both blocks store the same
    if (head >= a.gated) return;
    const float gate = gate_of(gates, head);
    T* features = static_cast<T*>(a.features) + image * a.gated * channels + own_row;
    const auto store = [&](int channel, float2 value) {
      *reinterpret_cast<uint32_t*>(features + channel) = packed<T>(gate * value.x, gate * value.y);
    };
    if (is_held) {
      for_held([&](int i, int channel) { store(channel, values[i]); });
      return;
    }
#pragma unroll 1
    for (int channel = own_channel; channel < cut.channels; channel += 2 * kOfHead)
      store(channel, *pooled_pair(image, channel));  // which this thread has stored
  };

  for (int64_t image = begin;; ++image) {
    const int turn = static_cast<int>(image) - begin;
    float logits[kTurns][1];  // a head has one column
    if (image < end)
      sum_over_channels<T, kHeads>(slots, of_sums, turn, positions, 0, [] {}, logits);
    else
      workers_sync();
    // While the other block's sums are on their way.
    if (a.gated > 0 && turn > 0) finish(image - 1);
    if (image == end) break;
    const float* others = of_sums.take(turn);
    float most = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int position = thread_of_head() + i * kOfHead;
      if (others != nullptr && position < positions) logits[i][0] += others[head * 4 * cut.quads + position];
      logits[i][0] = position < positions ? logits[i][0] + bias : -INFINITY;
      most = maximum(most, logits[i][0]);
    }
    most = warp_maximum(most);
    if (lane == 0) maxima[own_part] = most;
    workers_sync();
    const float4 of_parts = *reinterpret_cast<const float4*>(maxima + head * kParts);
    const float start = origin(maximum(maximum(of_parts.x, of_parts.y), maximum(of_parts.z, of_parts.w)));
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int position = thread_of_head() + i * kOfHead;
      if (position >= positions || !is_head) continue;
      const float mask = __expf(logits[i][0] - start);
      masks[position * 8 + head] = rounded<T>(mask);
      total += mask;
      if (a.logits != nullptr && rank == 0) a.logits[(image * a.heads + head) * positions + position] = logits[i][0];
    }
    total = warp_sum(total);
    if (lane == 0) totals[own_part] = total;
    workers_sync();

    // Columns 2 * column and + 1 of P become rows in shared memory; then a thread has channels.
    const float low = __fdividef(1, k < a.heads ? sum_of(totals + k * kParts) : positions);
    const float high = __fdividef(1, k + 1 < a.heads ? sum_of(totals + (k + 1) * kParts) : 1.f);
    for (int chunk = own.last; chunk >= 0; chunk -= cut.teams) {
      const uint32_t load = slots.load_of(turn, chunk, true);
      float pooled_sums[4];
      own.sum_over_positions<T>(slots.wait(load), pooled_sums);
      slots.release(load, cut.teams);
      if (k > kMean) continue;
      float* to = pooled + own_place + chunk * cut.chunk;
      to[0] = pooled_sums[0] * low, to[cut.classes * 8] = pooled_sums[2] * low;
      if (k == kMean) continue;
      to[pitch] = pooled_sums[1] * high, to[pitch + cut.classes * 8] = pooled_sums[3] * high;
    }
    workers_sync();
    float score = 0;
    if (is_head) {
      if (rank == 0 && thread_of_head() == 0)
        a.lse[image * a.heads + head] = start + __logf(sum_of(totals + head * kParts));
      const auto take = [&](int channel, uint2 of_score) {
        const float2 value = *reinterpret_cast<const float2*>(pooled + head * pitch + channel);
        *pooled_pair(image, channel) = value;
        const float2 weight = pair_from<T>(a.score_w, of_score);
        score += value.x * weight.x + value.y * weight.y;
        return value;
      };
      if (is_held) {
        for_held([&](int i, int channel) { values[i] = take(channel, score_w[i]); });
      } else {
#pragma unroll 1
        for (int channel = own_channel; channel < cut.channels; channel += 2 * kOfHead)
          take(channel, a.gated > 0 ? raw_pair(a.score_w, own_row + channel) : make_uint2(0, 0));
      }
    }
    if (a.gated > 0) give_part(warp_sum(score), scores, of_scores, turn);
    if (a.mean != nullptr)
#pragma unroll 1
      for (int pair = own_pair; pair < cut.channels; pair += 2 * kWorkers)
        *reinterpret_cast<float2*>(a.mean + image * channels + first_channel + pair) =
            *reinterpret_cast<const float2*>(pooled + kMean * pitch + pair);
  }
#endif  // AR_HOPPER
}

RowsCut forward_cut(const ForwardSweep& a) {
  RowsNeeds needs = {};
  needs.columns = kHeads;
  needs.sums_of_channel = (kHeads + 1) * 4;
  needs.buffers = 1;
  needs.rest = 3 * kWarps * 4;  // maxima, totals, scores
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
