// The backward sweep of NCHW maps with rows of any length, on Hopper (rows.cuh): one read of the map from memory, a
// second one of a part of it from L2, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S),  dW_H += dl Z^T
//
// The first sweep makes l and dA, the second the rest; a chunk turns into its dZ where it lies. W_H and dP lie side by
// side, column 2 k and 2 k + 1 of one matrix, and so do dl and a. dW_H is added up in memory, by the same threads.

#include "attend_backward.h"
#include "gates.cuh"
#include "rows.cuh"
#include "values.cuh"

namespace ar_kernels {

namespace {

#if AR_HOPPER

// A channel's row of weights: column 2 k of W_H, column 2 k + 1 of dP, both among the low halves of words, or the high.
__device__ __forceinline__ uint4 weight_row(const uint32_t (&w)[kHeads], const uint32_t (&dp)[kHeads], bool high) {
  uint32_t words[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) words[k] = __byte_perm(w[k], dp[k], high ? 0x7632 : 0x5410);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Two adjacent channels' rows.
__device__ __forceinline__ void store_weights(const RowsCut& cut, int channel, const uint32_t (&w)[kHeads],
                                              const uint32_t (&dp)[kHeads], uint4* weights) {
  weights[weight_place(cut, channel)] = weight_row(w, dp, false);
  weights[weight_place(cut, channel + 1)] = weight_row(w, dp, true);
}

// The same where W_H is there already.
__device__ __forceinline__ void store_gradients(const RowsCut& cut, int channel, const uint32_t (&dp)[kHeads],
                                                uint4* weights) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint4& row = weights[weight_place(cut, channel + i)];
    const uint32_t before[] = {row.x << 16 * i, row.y << 16 * i, row.z << 16 * i, row.w << 16 * i};
    row = weight_row(before, dp, i == 1);
  }
}

// dP of an image, of this block's channels; the formulas are pooled_gradient's of attend_backward.cu. In three steps,
// with a barrier of the workers between the last two, while the image before is not done: what is waited for is on its
// way. parts: two arrays of [kWarps].
template <class T>
struct Gradients {
  const BackwardSweep& a;
  const RowsCut& cut;
  int first_channel;
  float4* parts;
  const Exchange &of_gates, &of_deltas;
  uint32_t x[kHeads];              // dx of two channels
  float2 p[kHeads], more[kHeads];  // P, its own gradient

  // Whether a thread has two channels at most, which it then need not load twice.
  __device__ bool is_held() const { return cut.channels <= 2 * kWorkers; }

  __device__ bool has_scores() const { return a.of.score_w.data != nullptr; }

  // All of one channel and the next, where it is this block's.
  __device__ void load(int64_t image, int channel) {
    const PooledGradient& of = a.of;
    const bool is_one = channel < cut.channels;
    const T* dx = static_cast<const T*>(of.grad_features) + image * of.gated * a.channels + first_channel + channel;
    const int64_t at = image * a.heads * a.channels + first_channel + channel;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const bool has_head = is_one && k < a.heads;
      p[k] = has_head ? *reinterpret_cast<const float2*>(of.pooled + at + k * a.channels) : make_float2(0, 0);
      more[k] = has_head && of.grad_pooled != nullptr
                    ? *reinterpret_cast<const float2*>(of.grad_pooled + at + k * a.channels)
                    : make_float2(0, 0);
      x[k] = is_one && k < of.gated && of.grad_features != nullptr
                 ? *reinterpret_cast<const uint32_t*>(dx + k * a.channels)
                 : 0;
    }
  }

  __device__ void load(int64_t image) {
    if (is_held()) load(image, 2 * threadIdx.x);
  }

  // Gates' gradients, dx . P.
  __device__ void begin(int64_t image, int turn) {
    if (!has_scores()) return;
    float dg[kHeads] = {};
#pragma unroll 1
    for (int channel = 2 * threadIdx.x; channel < cut.channels; channel += 2 * kWorkers) {
      if (!is_held()) load(image, channel);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const float2 values = unpacked<T>(x[k]);
        dg[k] += values.x * p[k].x + values.y * p[k].y;
      }
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) dg[k] = warp_sum(dg[k]);
    give_part(dg, parts, of_gates, turn);
  }

  // dP beside W_H, and what delta is the sum of, which is taken after another barrier.
  __device__ void end(int64_t image, int turn, uint4* weights) {
    const PooledGradient& of = a.of;
    float gates[kHeads] = {}, dt[kHeads] = {};
    if (has_scores()) {
      float dg[kHeads], gradients[kHeads] = {}, tanhs[kHeads] = {};
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k < of.gated) gates[k] = of.gates[image * of.gated + k];
        if (k < of.gated && of.grad_gates != nullptr) gradients[k] = of.grad_gates[image * of.gated + k];
        if (k < a.heads) tanhs[k] = of.scores[image * a.heads + k];
        if (k < a.heads && of.grad_scores != nullptr) dt[k] = of.grad_scores[image * a.heads + k];
      }
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
        if (k < a.heads && of.dt != nullptr && threadIdx.x == 0 && first_channel == 0)
          of.dt[image * a.heads + k] = dt[k];
      }
    }
    float delta[kHeads] = {};
#pragma unroll 1
    for (int channel = 2 * threadIdx.x; channel < cut.channels; channel += 2 * kWorkers) {
      if (!is_held()) load(image, channel);
      uint32_t dp_words[kHeads] = {};
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k >= a.heads) continue;
        const float2 values = unpacked<T>(x[k]);
        float2 dp = {gates[k] * values.x + more[k].x, gates[k] * values.y + more[k].y};
        if (has_scores()) {
          const uint2 raw = raw_pair(of.score_w, k * a.channels + first_channel + channel);
          const float2 of_score = pair_from<T>(of.score_w, raw);
          dp = make_float2(dp.x + dt[k] * of_score.x, dp.y + dt[k] * of_score.y);
        }
        dp_words[k] = packed<T>(dp.x, dp.y);
        dp = unpacked<T>(dp_words[k]);
        delta[k] += dp.x * p[k].x + dp.y * p[k].y;
      }
      store_gradients(cut, channel, dp_words, weights);
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) delta[k] = warp_sum(delta[k]);
    give_part(delta, parts + kWarps, of_deltas, turn);
  }
};

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
  if (threadIdx.x >= kWorkers) {
    cluster_wait();
    const int64_t skipped = static_cast<int64_t>(first_channel) * a.positions;
    if (threadIdx.x != kWorkers) return;
    slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + skipped, a.z.image * sizeof(T), end - begin,
               static_cast<T*>(a.dz.data) + begin * a.dz.image + skipped, a.dz.image * sizeof(T));
    return;
  }

  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int positions = a.positions, channels = a.channels;
  const OwnRows own(slots, positions);
  // Two buffers of weights, of images in turn.
  const auto buffer_of = [&](int turn) { return turn % 2 * cut.weight_bytes; };
  const auto weights_of = [&](int turn) { return reinterpret_cast<uint4*>(memory + cut.weights + buffer_of(turn)); };
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.masks);
  const float* sums = reinterpret_cast<const float*>(memory + cut.sums);  // [2 * kHeads, pitch]
  float4* parts = reinterpret_cast<float4*>(memory + cut.rest);           // Gradients'
  // [channels / 16, 32]: what each thread adds up of dW_H, of its two channels and head `column`
  float2* dw = reinterpret_cast<float2*>(parts + 2 * kWarps);
  const int head = threadIdx.x % kHeads;               // of this thread, where masks are made
  constexpr bool kScaled = std::is_same_v<T, __half>;  // bfloat16 needs no scale of its own
  const bool makes = std::is_same_v<T, __nv_bfloat16> && a.of.w.data != nullptr;
  Gradients<T> gradients = {a, cut, first_channel, parts, of_gates, of_deltas};
  // A thread's channels: this one and the next, and others behind where a block has more.
  const int own_pair = 2 * threadIdx.x;
  uint2 raw[kHeads] = {};
  if (makes) gradients.load(begin);
  if (makes && own_pair < cut.channels) load_pairs(a.of.w, a.heads, channels, first_channel + own_pair, raw);
  for (int i = threadIdx.x; i < (kFrame + 16 * cut.tiles) * kHeads; i += kWorkers) masks[i] = 0;
  cluster_wait();  // before it, since behind the other warp's loads of the map these would wait long
#pragma unroll 1
  for (int pair = own_pair; makes && pair < cut.channels; pair += 2 * kWorkers) {
    if (pair != own_pair) load_pairs(a.of.w, a.heads, channels, first_channel + pair, raw);
    uint32_t w[kHeads];
    const uint32_t dp[kHeads] = {};
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const float2 values = pair_from<T>(a.of.w, raw[k]);
      w[k] = packed<T>(values.x, values.y);
    }
    store_weights(cut, pair, w, dp, weights_of(0));
    store_weights(cut, pair, w, dp, weights_of(1));
  }

  const auto pairs_of = [&](int image) {  // this block's channels
    return static_cast<const T*>(a.pairs) + static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * channels +
           first_channel;
  };
  // Weights are made an image ahead: turn -1 makes the first image's, and nothing else.
  for (int image = begin - 1; image < end; ++image) {
    const int turn = image - begin;
    const bool is_one = turn >= 0, has_next = image + 1 < end;
    workers_sync();
    if (is_one)
      sum_over_channels<T, 2 * kHeads>(slots, of_sums, turn, positions, buffer_of(turn), [&] {
        if (makes && has_next) gradients.load(image + 1);
      });
    if (makes && has_next) gradients.begin(image + 1, turn + 1);
    float shift = 0, delta = 0;
    const float* others = nullptr;
    if (is_one && head < a.heads) {
      shift = a.lse[image * a.heads + head];
      if (a.b.data != nullptr) shift -= value_of(a.b, head);
      if (!makes)
        delta = a.delta[image * a.heads + head];
      else if (a.of.grad_lse != nullptr)
        delta = -a.of.grad_lse[image * a.heads + head];
    }
    if (is_one) {
      if (makes) {
        float deltas[kHeads];
        take_sums(parts + kWarps, of_deltas, turn, deltas);
        delta += gate_of(deltas, head);
      }
      others = of_sums.take(turn);
    }
    workers_sync();
    const float inverse = kScaled && is_one && a.unscale != nullptr ? a.unscale[image] : 1.f;
    for (int entry = threadIdx.x; is_one && entry < positions * kHeads; entry += kWorkers) {
      const int position = entry / kHeads;
      float mask = 0, gradient = 0;
      if (head < a.heads) {
        const int low = 2 * head * cut.pitch + position, high = low + cut.pitch;
        float logit = sums[low], da = sums[high];
        if (others != nullptr) {
          logit += others[2 * head * 4 * cut.quads + position];
          da += others[(2 * head + 1) * 4 * cut.quads + position];
        }
        mask = __expf(logit - shift);
        gradient = mask * (da - delta);
        if (a.grad_logits != nullptr)
          gradient += a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * positions + position] / inverse;
      }
      masks[kFrame * kHeads + entry] = packed<T>(gradient, mask);
    }
    if (makes && has_next) gradients.end(image + 1, turn + 1, weights_of(turn + 1));
#pragma unroll 1
    for (int channel = 2 * threadIdx.x; !makes && has_next && channel < cut.channels; channel += 2 * kWorkers) {
      uint32_t w[kHeads], dp[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const T* pair = pairs_of(image + 1) + 2 * k * channels + channel;
        w[k] = k < a.heads ? *reinterpret_cast<const uint32_t*>(pair) : 0;
        dp[k] = k < a.heads ? *reinterpret_cast<const uint32_t*>(pair + channels) : 0;
      }
      store_weights(cut, channel, w, dp, weights_of(turn + 1));
    }
    workers_sync();
    if (!is_one) continue;

    // The mean's gradient at this lane's two channels of a chunk.
    const auto means_of = [&](int chunk) {
      if (!a.mean || chunk < 0) return make_float2(0, 0);
      const int low = chunk * cut.chunk + own.first + cut.classes * row, high = low + cut.classes * 8;
      if (makes) {
        const float* means = a.of.grad_mean + image * channels + first_channel;
        return make_float2(means[low], means[high]);
      }
      const T* means = pairs_of(image) + (2 * a.heads + 1) * channels;
      return make_float2(value_of(means[low]), value_of(means[high]));
    };
    const float share = 1.f / positions;
    float2 next_mean = means_of(own.last);
    for (int chunk = own.last; chunk >= 0; chunk -= cut.teams) {
      const float2 mean = next_mean;
      next_mean = means_of(chunk - cut.teams);
      const Slots::Chunk z = slots.wait(turn, chunk, true);
      if (a.dw != nullptr) {
        float products[4];
        own.sum_over_positions<T>(z.address, products);
        float2* to = dw + (chunk * (cut.chunk / 16) + own.unit) * 32 + lane;
        const float2 before = image > begin ? *to : make_float2(0, 0);
        *to = make_float2(before.x + products[0] * inverse, before.y + products[2] * inverse);
        own.sync(cut);  // others have read what lies around theirs
      }

      uint32_t weight[2];
      load_matrix(weight, own.weights + buffer_of(turn) + 16 * chunk * weight_rows(cut));
      const float low = share * mean.x, high = share * mean.y;
      T* own_rows = reinterpret_cast<T*>(memory + (z.address - slots.base)) +
                    (own.first + cut.classes * row) * positions + 2 * column - own.shift;
#pragma unroll 2
      for (int tile = 0; tile < own.tiles; ++tile) {
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
  // The cluster anew: it has no register all the time.
  float* shares = a.dw + static_cast<int64_t>(kept(blockIdx.x) / cut.blocks) * a.heads * channels + first_channel;
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
  RowsNeeds needs = {};
  needs.columns = 2 * kHeads;
  needs.buffers = 2;
  needs.rest = 2 * kWarps * kHeads * 4;
  needs.rest_of_channel = kHeads * 4;
  return rows_cut(a.images, a.channels, a.positions, needs);
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
  if (static_cast<int64_t>(a.images) * a.channels > INT32_MAX) return false;  // by which the mean's gradient is found
  return is_rows(a.z, a.positions) && is_rows(a.dz, a.positions) && backward_cut(a).slots > 0;
}

int backward_rows_programs(const BackwardSweep& a) { return rows_clusters(backward_cut(a), a.images); }

cudaError_t sweep_backward_rows(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
