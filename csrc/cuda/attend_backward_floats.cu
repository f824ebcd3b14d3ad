// The backward sweep of float32 channels_last maps, on Hopper (floats.cuh): one read of the map, one write of its
// gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// l and dA are sums over a warp's lanes, W_H, dP and dW_H stay in registers. A tile turns into its dZ where it lies,
// and leaves by the copy engine.

#include <algorithm>

#include "attend_backward.h"
#include "floats.cuh"

namespace ar_kernels {

namespace {

constexpr int kStep = 4;  // positions at once

// kOwn: channels of a lane.
template <int kOwn>
__global__ void __launch_bounds__(kFloatThreads, 1)
    backward_floats_kernel(const __grid_constant__ BackwardSweep a, const __grid_constant__ FloatsCut cut) {
#if AR_HOPPER
  constexpr int kValues = 2 * kStep * kHeads;  // [kStep, kHeads, 2]: l and dA, then dl and a
  static_assert(kValues == 32, "a lane has one");
  uint8_t* memory = shared_memory();
  const bool tapped = a.upstream.data != nullptr, writes = a.dz.data != nullptr;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / cut.warps, of_group = warp % cut.warps;
  GroupSlots slots(cut, memory, group);
  const int64_t all_items = static_cast<int64_t>(a.images) * cut.tiles;
  const int begin = first_of(blockIdx.x, gridDim.x, all_items), end = first_of(blockIdx.x + 1, gridDim.x, all_items);
  const auto count_of = [&](int tile) { return min(cut.tile, a.positions - tile * cut.tile); };
  const auto at = [&](const FlatMap& map, const TilePlace& place) {
    return static_cast<float*>(map.data) + place.row * map.image +
           static_cast<int64_t>(place.tile) * cut.tile * a.channels;
  };

  const bool leads = of_group == 0 && lane == 0;  // asks for its group's copies
  TilePlace place(cut.tiles, begin / cut.tiles, begin % cut.tiles + group);
  const auto load = [&](const TilePlace& place, int item, int slot) {
    if (item >= end) return;
    const uint32_t to = slots.slots + slot * cut.slot_bytes, barrier = slots.barriers + 8 * slot;
    const uint32_t bytes = 4 * a.channels * count_of(place.tile);
    barrier_arrive_expect(barrier, bytes * (1 + tapped));
    bulk_load(to, at(a.z, place), bytes, barrier, kEvictFirst);
    if (tapped) bulk_load(to + cut.map_bytes, at(a.upstream, place), bytes, barrier, kEvictFirst);
  };
  if (leads) {
    slots.start();
    for (int slot = 0, ahead = 0; slot < cut.slots; ++slot, ahead += cut.groups)
      load(place.after(ahead), begin + group + ahead, slot);
  }

  // This lane's channels are `channel` and every 32nd after it; the warp's last 32 may not all be there.
  const int planes = (a.channels + 31) / 32;
  const int channel = planes * of_group / cut.warps * 32 + lane;
  const bool whole = channel + 32 * (kOwn - 1) < min(a.channels, planes * (of_group + 1) / cut.warps * 32);
  const auto has = [&](int j) { return j + 1 < kOwn || whole; };
  float* own_weights = reinterpret_cast<float*>(memory + cut.weights) + 32 * warp;
  float* parts = reinterpret_cast<float*>(memory + cut.parts) + 32 * cut.warps * group;
  const int of_step = lane / (2 * kHeads), head = lane / 2 % kHeads;  // of this lane's value
  const bool is_mask = lane % 2 == 1;
  const float bias = head < a.heads && a.b.data != nullptr ? value_of(a.b, head) : 0.f;

  float* average =
      reinterpret_cast<float*>(memory + cut.sums) + threadIdx.x;  // what comes of the mean, of each channel
  float w[kOwn][kHeads], dp[kOwn][kHeads];                        // W_H, dP
  float sums[kOwn * kHeads];                                      // dW_H
#pragma unroll
  for (int i = 0; i < kOwn * kHeads; ++i) sums[i] = 0;
  float shift = 0, delta = 0;

  __syncthreads();
  int image = -1, turn = 0;
  for (int item = begin + group; item < end; item += cut.groups) {
    if (place.row != image) {
      image = place.row;
      const float* pairs = static_cast<const float*>(a.pairs) +
                           static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * a.channels + channel;
      float means[kOwn];  // all loads before the first store
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        means[j] = a.mean && has(j) ? pairs[(2 * a.heads + 1) * a.channels + 32 * j] : 0.f;
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          const bool there = k < a.heads && has(j);
          w[j][k] = there ? pairs[2 * k * a.channels + 32 * j] : 0.f;
          dp[j][k] = there ? pairs[(2 * k + 1) * a.channels + 32 * j] : 0.f;
        }
      }
      if (head < a.heads) {
        shift = a.lse[image * a.heads + head] - bias;
        delta = a.delta[image * a.heads + head];
      }
#pragma unroll
      for (int j = 0; j < kOwn; ++j) average[kFloatThreads * j] = means[j] / a.positions;
    }
    slots.wait();
    float* of_slot = reinterpret_cast<float*>(memory + (group * cut.slots + slots.slot) * cut.slot_bytes);
    const int of_tile = count_of(place.tile);
    for (int step = 0; step < of_tile; step += kStep) {
      float* z = of_slot + step * a.channels + channel;
      const int count = min(kStep, of_tile - step);
      float values[kValues];  // what positions that are not there have in them stays with them
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const float* from = z + (s ^ of_step) * a.channels;  // every lane begins with its own
        float* of_position = values + 2 * kHeads * s;
#pragma unroll
        for (int i = 0; i < 2 * kHeads; ++i) of_position[i] = 0;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const float value = has(j) ? from[32 * j] : 0.f;
#pragma unroll
          for (int k = 0; k < kHeads; ++k) {
            of_position[2 * k] += value * w[j][k];
            of_position[2 * k + 1] += value * dp[j][k];
          }
        }
      }
      float own = lane_sums<2 * kHeads>(values);
      if (cut.warps > 1) {
        float* of_turn = parts + turn * 32 * cut.warps * cut.groups;
        of_turn[32 * of_group + lane] = own;
        group_sync(group, cut.warps);
        own = 0;
        for (int other = 0; other < cut.warps; ++other) own += of_turn[32 * other + lane];
        turn ^= 1;
      }
      const float partner = __shfl_xor_sync(kAll, own, 1);
      const bool real = of_step < count && head < a.heads;
      const float mask = real ? expf((is_mask ? partner : own) - shift) : 0.f;
      float gradient = real ? mask * ((is_mask ? own : partner) - delta) : 0.f;
      if (a.grad_logits != nullptr && real)
        gradient += a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * a.positions + place.tile * cut.tile +
                                  step + of_step];
      own_weights[lane] = is_mask ? mask : gradient;
      __syncwarp();

      float means[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) means[j] = average[kFloatThreads * j];
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        if (s >= count) break;
        const float4 low = *reinterpret_cast<const float4*>(own_weights + 2 * kHeads * s);
        const float4 high = *reinterpret_cast<const float4*>(own_weights + 2 * kHeads * s + 4);
        const float of_logits[kHeads] = {low.x, low.z, high.x, high.z}, masks[kHeads] = {low.y, low.w, high.y, high.w};
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (!has(j)) continue;
          float* to = z + s * a.channels + 32 * j;
          const float value = *to;
          float result = means[j];
#pragma unroll
          for (int k = 0; k < kHeads; ++k) {
            sums[j * kHeads + k] += value * of_logits[k];
            result += of_logits[k] * w[j][k];
            result += masks[k] * dp[j][k];
          }
          if (tapped) result += to[cut.map_bytes / 4];
          if (writes) *to = result;
        }
      }
      __syncwarp();
    }
    fence_proxy_async();
    group_sync(group, cut.warps);
    if (leads) {
      if (writes)
        bulk_store(at(a.dz, place), slots.slots + slots.slot * cut.slot_bytes, 4 * a.channels * of_tile, kEvictNormal);
      bulk_commit();
      const int ahead = (cut.slots - 1) * cut.groups;
      if (item >= begin + cut.groups) {  // there was a tile before: what it has become leaves its slot
        bulk_wait_read<1>();
        load(place.after(ahead), item + ahead, slots.before());
      }
    }
    place = place.after(cut.groups);
    slots.advance();
  }
  if (leads) bulk_wait_read<0>();

  if (a.dw == nullptr) return;
  __syncthreads();  // nobody needs the slots any more
  add_groups(sums, group, cut.groups, reinterpret_cast<float*>(memory), kHeads * a.channels,
             [&](int i) { return has(i / kHeads) ? i % kHeads * a.channels + channel + 32 * (i / kHeads) : -1; });
  if (group > 0) return;
  float* dw = a.dw + static_cast<int64_t>(blockIdx.x) * a.heads * a.channels + channel;
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      if (k < a.heads && has(j)) dw[k * a.channels + 32 * j] = sums[j * kHeads + k];
#endif  // AR_HOPPER
}

FloatsCut backward_cut(const BackwardSweep& a) {
  // One tile is worked on, one on its way, and one leaves.
  return floats_cut(a.channels, a.positions, 1, kStep, a.upstream.data == nullptr ? 1 : 2, 3, 0,
                    4 * kFloatThreads * kMostOwn);
}

template <int kOwn>
cudaError_t sweep(const BackwardSweep& a, const FloatsCut& cut, cudaStream_t stream) {
  return launch<backward_floats_kernel<kOwn>>(backward_floats_programs(a), 32 * cut.warps * cut.groups, cut.bytes,
                                              stream, a, cut);
}

}  // namespace

bool can_sweep_backward_floats(const BackwardSweep& a) {
  if (a.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  const auto dense = [&](const FlatMap& map) { return is_dense_channels_last(map, a.channels); };
  if (!dense(a.z)) return false;
  for (const FlatMap& map : {a.dz, a.upstream})
    if (map.data != nullptr && !dense(map)) return false;
  const FloatsCut cut = backward_cut(a);
  return cut.slots > 0 && static_cast<int64_t>(a.images) * cut.tiles < INT32_MAX;
}

int backward_floats_programs(const BackwardSweep& a) {
  return static_cast<int>(std::min<int64_t>(static_cast<int64_t>(a.images) * backward_cut(a).tiles, processors()));
}

cudaError_t sweep_backward_floats(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_floats(a)) return cudaErrorInvalidValue;
  const FloatsCut cut = backward_cut(a);
  switch (cut.own) {
    case 1: return sweep<1>(a, cut, stream);
    case 2: return sweep<2>(a, cut, stream);
    case 3: return sweep<3>(a, cut, stream);
    case 4: return sweep<4>(a, cut, stream);
    default: return sweep<5>(a, cut, stream);
  }
}

}  // namespace ar_kernels
