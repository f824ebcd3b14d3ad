// The forward sweep of float32 channels_last maps, on Hopper (floats.cuh): one read of the map.
//
//   l = W_H Z + b_H,  A = softmax over positions of l,  P = A Z^T,  lse = log sum exp l    (online: m, d, P rescaled)
//   t_k = W_G[k] . P_k + b_G[k],  g = softmax over heads of tanh t,  x = g P
//
// A block takes whole images, or splits of images where there are few of them: then it writes parts (m, d, P), which
// merge_kernel of ar_kernels/kernels/attend_forward.py adds up. Logits are sums over a warp's lanes, P stays in
// registers: every group has its own, which are added up when the image ends.

#include <algorithm>

#include "attend_forward.h"
#include "floats.cuh"

namespace ar_kernels {

namespace {

constexpr int kRows = kHeads + 1;  // of P; the last is the mean's

// kOwn: channels of a lane. kStep: positions at once.
template <int kOwn, int kStep>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_floats_kernel(const __grid_constant__ ForwardSweep a, const __grid_constant__ FloatsCut cut) {
#if AR_HOPPER
  constexpr int kValues = kStep * kHeads;
  uint8_t* memory = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / cut.warps, of_group = warp % cut.warps;
  GroupSlots slots(cut, memory, group);
  const int64_t rows = static_cast<int64_t>(a.images) * cut.splits;
  const int first = first_of(blockIdx.x, gridDim.x, rows), last = first_of(blockIdx.x + 1, gridDim.x, rows);
  const auto image_of = [&](int row) { return cut.splits == 1 ? row : row / cut.splits; };
  const auto begin_of = [&](int split) { return split * cut.length + min(split, cut.longer); };

  const bool leads = of_group == 0 && lane == 0;  // asks for its group's copies
  const auto load = [&](const TilePlace& place, int slot) {
    if (place.row >= last) return;
    const int image = image_of(place.row), split = place.row - image * cut.splits;
    const int position = begin_of(split) + place.tile * cut.tile;
    const int bytes = 4 * a.channels * max(min(cut.tile, begin_of(split + 1) - position), 0);  // none in some last ones
    barrier_arrive_expect(slots.barriers + 8 * slot, bytes);
    if (bytes > 0)
      bulk_load(slots.slots + slot * cut.slot_bytes,
                static_cast<const float*>(a.z.data) + image * a.z.image + static_cast<int64_t>(position) * a.channels,
                bytes, slots.barriers + 8 * slot, kEvictFirst);
  };
  if (leads) {
    slots.start();
    for (int slot = 0; slot < cut.slots; ++slot) load({cut.tiles, first, group + slot * cut.groups}, slot);
  }

  // This lane's channels are `channel` and every 32nd after it; the warp's last 32 may not all be there.
  const int planes = (a.channels + 31) / 32;
  const int channel = planes * of_group / cut.warps * 32 + lane;
  const bool whole = channel + 32 * (kOwn - 1) < min(a.channels, planes * (of_group + 1) / cut.warps * 32);
  const auto has = [&](int j) { return j + 1 < kOwn || whole; };
  float* own_weights = reinterpret_cast<float*>(memory + cut.weights) + 32 * warp;  // [kStep, kHeads]
  float* parts = reinterpret_cast<float*>(memory + cut.parts) + 32 * cut.warps * group;
  float* buffer = reinterpret_cast<float*>(memory + cut.sums);        // [groups / 2, kRows, C]
  float* all_m = reinterpret_cast<float*>(memory + cut.heads);        // [groups, kHeads]
  float* all_d = all_m + kGroupWarps * kHeads;                        // the same
  float* score_parts = all_d + kGroupWarps * kHeads;                  // [warps, kHeads]
  const int head = lane % kHeads, of_step = lane % kValues / kHeads;  // of this lane's logit

  float w[kOwn][kHeads];
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      w[j][k] = k < a.heads && has(j) ? static_cast<const float*>(a.w.data)[k * a.channels + channel + 32 * j] : 0.f;
  const float bias = head < a.heads && a.b.data != nullptr ? value_of(a.b, head) : 0.f;

  __syncthreads();
  int tile = group, turn = 0;
  for (int row = first; row < last; ++row) {
    const int image = image_of(row), split = row - image * cut.splits;
    const int begin = begin_of(split), end = begin_of(split + 1);
    float m = -INFINITY, d = 0;  // of this lane's head; d of its positions
    float sums[kOwn * kRows];    // P; the mean's row last
#pragma unroll
    for (int i = 0; i < kOwn * kRows; ++i) sums[i] = 0;

    for (; tile < cut.tiles; tile += cut.groups) {
      slots.wait();
      const float* of_slot = reinterpret_cast<const float*>(memory + (group * cut.slots + slots.slot) * cut.slot_bytes);
      const int of_tile = min(cut.tile, end - begin - tile * cut.tile);
      for (int step = 0; step < of_tile; step += kStep) {
        const float* z = of_slot + step * a.channels + channel;
        const int count = min(kStep, of_tile - step), position = begin + tile * cut.tile + step;
        float values[kValues];  // what positions that are not there have in them stays with them
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
          const float* of_position = z + (s ^ of_step) * a.channels;  // every lane begins with its own
#pragma unroll
          for (int k = 0; k < kHeads; ++k) values[kHeads * s + k] = 0;
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const float value = has(j) ? of_position[32 * j] : 0.f;
#pragma unroll
            for (int k = 0; k < kHeads; ++k) values[kHeads * s + k] += value * w[j][k];
          }
        }
        float logit = lane_sums<kHeads>(values);
        if (cut.warps > 1) {
          float* of_turn = parts + turn * 32 * cut.warps * cut.groups;
          of_turn[32 * of_group + lane] = logit;
          group_sync(group, cut.warps);
          logit = 0;
          for (int other = 0; other < cut.warps; ++other) logit += of_turn[32 * other + lane];
          turn ^= 1;
        }
        logit += bias;
        const bool real = of_step < count;
        if (a.logits != nullptr && of_group == 0 && real && head < a.heads)
          a.logits[(static_cast<int64_t>(image) * a.heads + head) * a.positions + position + of_step] = logit;

        // The softmax, by each warp for itself.
        float most = real ? logit : -INFINITY;
#pragma unroll
        for (int lanes = kHeads; lanes < kValues; lanes *= 2) most = maximum(most, __shfl_xor_sync(kAll, most, lanes));
        most = maximum(m, most);
        const float start = origin(most), shrink = expf(m - start), weight = real ? expf(logit - start) : 0.f;
        m = most;
        d = d * shrink + weight;
        if (lane < kValues) own_weights[lane] = weight;
        __syncwarp();
        if (__any_sync(kAll, shrink != 1)) {
#pragma unroll
          for (int k = 0; k < kHeads; ++k) {
            const float of_head = __shfl_sync(kAll, shrink, k);
#pragma unroll
            for (int j = 0; j < kOwn; ++j) sums[j * kRows + k] *= of_head;
          }
        }
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
          if (s >= count) break;
          const float4 weights = *reinterpret_cast<const float4*>(own_weights + kHeads * s);
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const float value = has(j) ? z[s * a.channels + 32 * j] : 0.f;
            float* of_channel = sums + j * kRows;
            of_channel[0] += value * weights.x, of_channel[1] += value * weights.y;
            of_channel[2] += value * weights.z, of_channel[3] += value * weights.w;
            of_channel[kHeads] += value;  // also where nobody asks for the mean: cheaper than another read
          }
        }
        __syncwarp();
      }
      group_sync(group, cut.warps);
      if (leads) load({cut.tiles, row, tile + cut.slots * cut.groups}, slots.slot);
      slots.advance();
    }
    tile -= cut.tiles;

    // The image's end: of all groups. The first one's loads of scores' weights are under way meanwhile.
    uint32_t score_weights[kHeads][kOwn];
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        score_weights[k][j] = a.gated > 0 && cut.splits == 1 && group == 0 && k < a.heads && has(j)
                                  ? raw_value(a.score_w, k * a.channels + channel + 32 * j)
                                  : 0;
#pragma unroll
    for (int lanes = kHeads; lanes < kValues; lanes *= 2) d += __shfl_xor_sync(kAll, d, lanes);
    if (cut.groups > 1) {
      const bool all_rows = a.mean != nullptr;
      const auto offset = [&](int i) {
        const int j = i / kRows, k = i % kRows;
        return has(j) && (k < a.heads || (k == kHeads && all_rows)) ? k * a.channels + channel + 32 * j : -1;
      };
      const auto give = [&](int pair) {
        if (of_group == 0 && lane < kHeads) all_m[pair * kHeads + lane] = m, all_d[pair * kHeads + lane] = d;
      };
      const auto take = [&](int pair) {
        const float other = all_m[pair * kHeads + head], most = maximum(m, other), start = origin(most);
        const float scale = expf(m - start), of_other = expf(other - start);
        m = most;
        d = d * scale + all_d[pair * kHeads + head] * of_other;
        float4 scales, of_others;  // of all heads
        scales.x = __shfl_sync(kAll, scale, 0), of_others.x = __shfl_sync(kAll, of_other, 0);
        scales.y = __shfl_sync(kAll, scale, 1), of_others.y = __shfl_sync(kAll, of_other, 1);
        scales.z = __shfl_sync(kAll, scale, 2), of_others.z = __shfl_sync(kAll, of_other, 2);
        scales.w = __shfl_sync(kAll, scale, 3), of_others.w = __shfl_sync(kAll, of_other, 3);
        return [=](int i, float own, float value) {
          switch (i % kRows) {
            case 0: return own * scales.x + value * of_others.x;
            case 1: return own * scales.y + value * of_others.y;
            case 2: return own * scales.z + value * of_others.z;
            case 3: return own * scales.w + value * of_others.w;
            default: return own + value;
          }
        };
      };
      add_groups(sums, group, cut.groups, buffer, kRows * a.channels, offset, give, take);
      if (group > 0) continue;
    }

    if (cut.splits > 1) {
      const int part_rows = a.heads + (a.mean != nullptr);
      if (of_group == 0 && lane < a.heads) {
        a.part_m[static_cast<int64_t>(row) * part_rows + lane] = m;
        a.part_d[static_cast<int64_t>(row) * part_rows + lane] = d;
      }
      if (threadIdx.x == 0 && a.mean != nullptr) {
        a.part_m[static_cast<int64_t>(row) * part_rows + a.heads] = 0;
        a.part_d[static_cast<int64_t>(row) * part_rows + a.heads] = static_cast<float>(end - begin);
      }
      float* pooled = a.part_p + static_cast<int64_t>(row) * part_rows * a.channels + channel;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (!has(j)) continue;
#pragma unroll
        for (int k = 0; k < kHeads; ++k)
          if (k < a.heads) pooled[k * a.channels + 32 * j] = sums[j * kRows + k];
        if (a.mean != nullptr) pooled[a.heads * a.channels + 32 * j] = sums[j * kRows + kHeads];
      }
      continue;
    }

    if (of_group == 0 && lane < a.heads) a.lse[image * a.heads + lane] = origin(m) + logf(d);
    float* pooled = a.pooled + static_cast<int64_t>(image) * a.heads * a.channels + channel;
    float t[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const float total = __shfl_sync(kAll, d, k);
      t[k] = 0;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const float value = sums[j * kRows + k] /= total;
        if (k >= a.heads || !has(j)) continue;
        pooled[k * a.channels + 32 * j] = value;
        if (a.gated > 0) t[k] += value * value_from(a.score_w, score_weights[k][j]);
      }
    }
    if (a.mean != nullptr)
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (has(j))
          a.mean[static_cast<int64_t>(image) * a.channels + channel + 32 * j] =
              sums[j * kRows + kHeads] / static_cast<float>(a.positions);
    if (a.gated == 0) continue;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      t[k] = warp_sum(t[k]);
      if (lane == 0) score_parts[of_group * kHeads + k] = t[k];
    }
    group_sync(group, cut.warps);
    float gates[kHeads];
    make_gates(a, image, score_parts, cut.warps, gates);
    group_sync(group, cut.warps);  // the next image's scores come to the same place
    float* features = static_cast<float*>(a.features) + static_cast<int64_t>(image) * a.gated * a.channels + channel;
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      if (k < a.gated)
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (has(j)) features[k * a.channels + 32 * j] = sums[j * kRows + k] * gates[k];
  }
#endif  // AR_HOPPER
}

FloatsCut forward_cut(const ForwardSweep& a) {
  return floats_cut(a.channels, a.positions, std::max(a.splits, 1), 8, 1, 2, kRows * a.channels * 4, 0);
}

template <int kOwn, int kStep>
cudaError_t sweep(const ForwardSweep& a, const FloatsCut& cut, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(a.images) * cut.splits;
  return launch<forward_floats_kernel<kOwn, kStep>>(static_cast<int>(std::min<int64_t>(rows, processors())),
                                                    32 * cut.warps * cut.groups, cut.bytes, stream, a, cut);
}

}  // namespace

bool can_sweep_forward_floats(const ForwardSweep& a) {
  if (a.kind != Kind::kFloat || a.w.kind != Kind::kFloat || a.heads < 1 || a.heads > kHeads || a.images < 1)
    return false;
  return is_dense_channels_last(a.z, a.channels) && a.splits <= a.positions && forward_cut(a).slots > 0;
}

// 16 positions at least.
int forward_floats_splits(const ForwardSweep& a, bool alike) {
  return splits_of(a.images, a.channels, a.positions, processors(), a.positions / 16, alike);
}

cudaError_t sweep_forward_floats(const ForwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_forward_floats(a)) return cudaErrorInvalidValue;
  const FloatsCut cut = forward_cut(a);
  if (cut.splits > 1 && (a.part_m == nullptr || a.part_d == nullptr || a.part_p == nullptr))
    return cudaErrorInvalidValue;
  switch (cut.own) {
    case 1: return sweep<1, 8>(a, cut, stream);  // with so few channels a step is never 4
    case 2: return sweep<2, 8>(a, cut, stream);
    case 3: return cut.step == 8 ? sweep<3, 8>(a, cut, stream) : sweep<3, 4>(a, cut, stream);
    case 4: return cut.step == 8 ? sweep<4, 8>(a, cut, stream) : sweep<4, 4>(a, cut, stream);
    default: return sweep<5, 4>(a, cut, stream);
  }
}

}  // namespace ar_kernels
