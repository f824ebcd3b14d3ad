// The forward sweep of float32 NCHW maps, on Hopper (float_rows.cuh): one read of the map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l    (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A block takes whole images, or splits of images where there are few of them: then it writes parts, as
// attend_forward_floats.cu does.

#include <algorithm>

#include "attend_forward.h"
#include "float_rows.cuh"

namespace ar_kernels {

namespace {

template <int kQuads>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_rows_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ ForwardSweep a,
                              const __grid_constant__ FloatRowsCut cut) {
#if AR_HOPPER
  constexpr int kPositions = 4 * kQuads, kOwn = (kPositions + 31) / 32;  // of a lane, in a head's softmax
  const Place<kQuads> place;
  constexpr int kSets = place.kSets, kAtOnce = place.kAtOnce;
  uint8_t* memory = shared_memory();
  Ring ring(cut, memory);
  const int64_t rows = static_cast<int64_t>(a.images) * cut.splits;
  const int first = first_of(blockIdx.x, gridDim.x, rows), last = first_of(blockIdx.x + 1, gridDim.x, rows);
  const auto tile_of = [&](int split) { return first_of(split, cut.splits, cut.tiles); };

  // Thread 0 asks for all copies.
  int next_row = first, next_tile = tile_of(first % cut.splits), next_chunk = 0;
  const auto ask = [&](int slot) {
    if (next_row >= last) return;
    barrier_arrive_expect(ring.barrier(slot), cut.map_bytes);
    ring.load(&z_map, slot, 0, next_tile * kPositions, next_chunk, next_row / cut.splits);
    if (++next_chunk < cut.chunks) return;
    next_chunk = 0;
    if (++next_tile < tile_of(next_row % cut.splits + 1)) return;
    if (++next_row < last) next_tile = tile_of(next_row % cut.splits);
  };
  if (threadIdx.x == 0) {
    ring.start();
    for (int slot = 0; slot < cut.slots; ++slot) ask(slot);
  }

  const int warp = threadIdx.x / 32, lane = place.lane, threads = blockDim.x;
  float* weights = reinterpret_cast<float*>(memory + cut.weights);   // [C, kHeads]
  float* sums = reinterpret_cast<float*>(memory + cut.sums) + lane;  // [C / kBatch, 32]: P
  float* means = reinterpret_cast<float*>(memory + cut.means);       // [C]
  float* parts = reinterpret_cast<float*>(memory + cut.parts);       // [warps, kHeads, kPositions]
  float* masks = reinterpret_cast<float*>(memory + cut.masks);       // [kHeads, kPositions]
  float* shrinks = reinterpret_cast<float*>(memory + cut.rest);      // [kHeads]
  float* totals = shrinks + kHeads;                                  // [kHeads]
  float* score_parts = totals + kHeads;                              // [warps, kHeads]
  stage_weights(weights, a.w, a.heads, a.channels, cut.chunks * cut.rows);
  for (int i = threadIdx.x; i < kHeads * kPositions; i += threads) masks[i] = 0;
  if (threadIdx.x < 2 * kHeads) shrinks[threadIdx.x] = 1;
  const float bias = warp < a.heads && a.b.data != nullptr ? value_of(a.b, warp) : 0.f;
  __syncthreads();

  // Of this warp's batches of a chunk the first is `warp`.
  const auto batches_of = [&](int chunk) { return min(cut.rows, a.channels - chunk * cut.rows) / kBatch; };
  const auto tile_at = [&](int chunk) {
    return reinterpret_cast<const float4*>(memory + ring.next(chunk) * cut.slot_bytes) + lane;
  };

  for (int row = first; row < last; ++row) {
    const int image = row / cut.splits, split = row % cut.splits, begin = tile_of(split), end = tile_of(split + 1);
    float m = -INFINITY, d = 0;  // of this warp's head; d of this lane's positions
    for (int tile = begin; tile < end; ++tile) {
      float logits[4 * kHeads];  // [kHeads, 4], of this warp's channels
#pragma unroll
      for (int i = 0; i < 4 * kHeads; ++i) logits[i] = 0;
      for (int chunk = 0; chunk < cut.chunks; ++chunk) {
        ring.wait(chunk);
        const float4* z = tile_at(chunk);
        const float4* w = reinterpret_cast<const float4*>(weights) + chunk * cut.rows + place.row;
        for (int batch = warp; batch < batches_of(chunk); batch += cut.warps)
#pragma unroll
          for (int i = 0; i < kSets; ++i) {
            const float4 value = z[kBatch * kQuads * batch + 32 * i], weight = w[kBatch * batch + kAtOnce * i];
            const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
            for (int p = 0; p < 4; ++p) {
              logits[p] += weight.x * values[p], logits[4 + p] += weight.y * values[p];
              logits[8 + p] += weight.z * values[p], logits[12 + p] += weight.w * values[p];
            }
          }
      }
      store_sums<kQuads>(logits, place, parts + warp * kHeads * kPositions);
      __syncthreads();

      if (warp < a.heads) {  // a warp for each head's softmax
        const int k = warp;
        float logit[kOwn], most = -INFINITY;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int position = 32 * i + lane;
          logit[i] = -INFINITY;
          if (position >= kPositions || tile * kPositions + position >= a.positions) continue;
          float sum = bias;
#pragma unroll 4
          for (int other = 0; other < cut.warps; ++other) sum += parts[(other * kHeads + k) * kPositions + position];
          logit[i] = sum;
          if (a.logits != nullptr)
            a.logits[(static_cast<int64_t>(image) * a.heads + k) * a.positions + tile * kPositions + position] = sum;
          most = maximum(most, sum);
        }
        most = maximum(m, warp_maximum(most));
        const float start = origin(most), shrink = expf(m - start);
        m = most;
        d *= shrink;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float weight = expf(logit[i] - start);
          if (32 * i + lane < kPositions) masks[k * kPositions + 32 * i + lane] = weight;
          d += weight;
        }
        if (lane == 0) shrinks[k] = shrink;
      }
      __syncthreads();

      float4 mask[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k) mask[k] = reinterpret_cast<const float4*>(masks + k * kPositions)[place.quad];
      const float shrink = shrinks[place.head];
      for (int chunk = 0; chunk < cut.chunks; ++chunk) {
        const float4* z = tile_at(chunk);
        for (int batch = warp; batch < batches_of(chunk); batch += cut.warps) {
          float products[kQuads], averages[kSets];
#pragma unroll
          for (int i = 0; i < kSets; ++i) {
            const float4 value = z[kBatch * kQuads * batch + 32 * place.set(i)];
#pragma unroll
            for (int k = 0; k < kHeads; ++k)
              products[kHeads * i + k] =
                  value.x * mask[k].x + value.y * mask[k].y + value.z * mask[k].z + value.w * mask[k].w;
            averages[i] = value.x + value.y + (value.z + value.w);
          }
          halve_sums<kQuads / 2, kQuads / 2, 1, kHeads>(products);
          float* sum = sums + 32 * (chunk * cut.rows / kBatch + batch);
          *sum = tile == begin ? products[0] : *sum * shrink + products[0];
          if (a.mean != nullptr) {
            if constexpr (kSets > 1) halve_sums<kSets / 2, kQuads / 2, 1, 1>(averages);
#pragma unroll
            for (int lanes = 1; lanes < kHeads; lanes *= 2) averages[0] += __shfl_xor_sync(kAll, averages[0], lanes);
            float* mean = means + chunk * cut.rows + kBatch * batch + place.channel;
            if (place.head == 0) *mean = tile == begin ? averages[0] : *mean + averages[0];
          }
        }
        __syncthreads();
        if (threadIdx.x == 0) ask(ring.next(chunk));
      }
      ring.advance();
    }

    // The image's end.
    const int part_rows = a.heads + (a.mean != nullptr),
              length = min(end * kPositions, a.positions) - begin * kPositions;
    const int64_t part = static_cast<int64_t>(row) * part_rows;
    if (warp < a.heads) {
      d = warp_sum(d);
      if (lane == 0) {
        totals[warp] = d;
        if (cut.splits > 1)
          a.part_m[part + warp] = m, a.part_d[part + warp] = d;
        else
          a.lse[image * a.heads + warp] = origin(m) + logf(d);
      }
    }
    if (a.gated > 0 && cut.splits == 1 && place.head < a.heads)
      for (int chunk = 0; chunk < cut.chunks; ++chunk)
        for (int batch = warp; batch < batches_of(chunk); batch += cut.warps)
          prefetch_l1(static_cast<const uint8_t*>(a.score_w.data) +
                      (place.head * a.channels + chunk * cut.rows + kBatch * batch + place.channel) *
                          (a.score_w.kind == Kind::kFloat ? 4 : 2));
    if (threadIdx.x == 0 && cut.splits > 1 && a.mean != nullptr)
      a.part_m[part + a.heads] = 0, a.part_d[part + a.heads] = static_cast<float>(length);
    __syncthreads();
    const float total = cut.splits > 1 ? 1.f : totals[place.head];
    float* pooled =
        cut.splits > 1 ? a.part_p + part * a.channels : a.pooled + static_cast<int64_t>(image) * a.heads * a.channels;
    float* average = cut.splits > 1 ? pooled + a.heads * a.channels : a.mean + static_cast<int64_t>(image) * a.channels;
    float t = 0;  // of this lane's head and channels
    for (int chunk = 0; chunk < cut.chunks; ++chunk)
      for (int batch = warp; batch < batches_of(chunk); batch += cut.warps) {
        const int batch_channel = chunk * cut.rows + kBatch * batch;
        float* sum = sums + 32 * (batch_channel / kBatch);
        const float value = *sum /= total;
        const int at = place.head * a.channels + batch_channel + place.channel;
        if (place.head < a.heads) {
          pooled[at] = value;
          if (a.gated > 0 && cut.splits == 1) t += value * value_of(a.score_w, at);
        }
        if (a.mean != nullptr && lane < kBatch)
          average[batch_channel + lane] =
              means[batch_channel + lane] / (cut.splits > 1 ? 1.f : static_cast<float>(a.positions));
      }
    if (a.gated == 0 || cut.splits > 1) continue;
#pragma unroll
    for (int lanes = kHeads; lanes < 32; lanes *= 2) t += __shfl_xor_sync(kAll, t, lanes);
    if (lane < kHeads) score_parts[warp * kHeads + lane] = t;
    __syncthreads();
    float gates[kHeads];
    make_gates(a, image, score_parts, cut.warps, gates);
    const float gate = gate_of(gates, place.head);
    float* features = static_cast<float*>(a.features) + static_cast<int64_t>(image) * a.gated * a.channels;
    if (place.head < a.gated)
      for (int chunk = 0; chunk < cut.chunks; ++chunk)
        for (int batch = warp; batch < batches_of(chunk); batch += cut.warps) {
          const int batch_channel = chunk * cut.rows + kBatch * batch;
          features[place.head * a.channels + batch_channel + place.channel] =
              gate * sums[32 * (batch_channel / kBatch)];
        }
  }
#endif  // AR_HOPPER
}

FloatRowsCut forward_cut(const ForwardSweep& a) {
  FloatRowsCut cut = float_rows_cut(a.channels, a.positions, kHeads, 1);
  cut.splits = std::max(a.splits, 1);
  return cut;
}

template <int kQuads>
cudaError_t sweep(const ForwardSweep& a, const FloatRowsCut& cut, cudaStream_t stream) {
  CUtensorMap z;
  if (!encode(&z, a.z, a.images, a.channels, a.positions, cut)) return cudaErrorInvalidValue;
  const int64_t rows = static_cast<int64_t>(a.images) * cut.splits;
  return launch<forward_float_rows_kernel<kQuads>>(static_cast<int>(std::min<int64_t>(rows, cut.blocks * processors())),
                                                   32 * cut.warps, cut.bytes, stream, z, a, cut);
}

}  // namespace

bool can_sweep_forward_float_rows(const ForwardSweep& a) {
  if (a.kind != Kind::kFloat || a.w.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1)
    return false;
  const FloatRowsCut cut = forward_cut(a);
  return is_float_rows(a.z) && cut.slots > 0 && cut.splits <= cut.tiles &&
         static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

int forward_float_rows_splits(const ForwardSweep& a, bool alike) {
  const FloatRowsCut cut = forward_cut(a);
  return splits_of(a.images, a.channels, a.positions, cut.blocks * processors(), cut.tiles, alike);
}

cudaError_t sweep_forward_float_rows(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_float_rows(a)) return cudaErrorInvalidValue;
  const FloatRowsCut cut = forward_cut(a);
  if (cut.splits > 1 && (a.part_m == nullptr || a.part_d == nullptr || a.part_p == nullptr))
    return cudaErrorInvalidValue;
  switch (cut.quads) {
    case 4: return sweep<4>(a, cut, stream);
    case 8: return sweep<8>(a, cut, stream);
    default: return sweep<16>(a, cut, stream);
  }
}

}  // namespace ar_kernels
