// The backward sweep of NCHW maps with rows of any length, on Hopper (rows.cuh): one read of the map from memory, a
// second one of a part of it from L2, one write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S),  dW_H += dl Z^T
//
// The first sweep makes l and dA, the second the rest; a chunk turns into its dZ where it lies. W_H and dP lie side by
// side, column 2 k and 2 k + 1 of one matrix, and so do dl and a. dW_H is added up in memory, by the same threads.

#include "attend_backward.h"
#include "rows.cuh"
#include "values.cuh"

namespace ar_kernels {

namespace {

#if AR_HOPPER

// A channel's row of weights, column 2 k of W_H and column 2 k + 1 of dP: both among the low halves of words, or the
// high.
__device__ __forceinline__ uint4 weight_row(const uint32_t (&pairs)[2 * kHeads], bool high) {
  uint32_t words[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) words[k] = __byte_perm(pairs[2 * k], pairs[2 * k + 1], high ? 0x7632 : 0x5410);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

#endif  // AR_HOPPER

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_rows_kernel(const __grid_constant__ BackwardSweep a, const __grid_constant__ RowsCut cut) {
#if AR_HOPPER
  uint8_t* memory = shared_memory();
  const int rank = static_cast<int>(cluster_rank()), cluster = cluster_of(cut, blockIdx.x);
  const int clusters = cluster_of(cut, gridDim.x);
  const int begin = first_of<int>(cluster, clusters, a.images), end = first_of<int>(cluster + 1, clusters, a.images);
  const int positions = a.positions, channels = a.channels, first_channel = rank * cut.channels;
  const auto pairs_of = [&](int image) {  // this block's channels
    return static_cast<const T*>(a.pairs) + static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * channels +
           first_channel;
  };
  // A thread's channels: this one and the next, and others behind where a block has more. Their weights are loaded an
  // image ahead, while the other block's sums are on their way.
  const int own_pair = 2 * threadIdx.x;
  uint32_t ahead[2 * kHeads];
  const auto load_weights = [&](int image, int channel) {
#pragma unroll
    for (int i = 0; i < 2 * kHeads; ++i)
      ahead[i] = channel < cut.channels && i < 2 * a.heads
                     ? *reinterpret_cast<const uint32_t*>(pairs_of(image) + i * channels + channel)
                     : 0;
  };
  if (threadIdx.x < kWorkers) load_weights(begin, own_pair);  // behind the map's loads these would wait long
  const Slots slots(cut, memory);
  const Exchange of_sums(slots, 0);
  if (threadIdx.x >= kWorkers) {
    const int64_t skipped = static_cast<int64_t>(first_channel) * a.positions;
    slots.move(static_cast<const T*>(a.z.data) + begin * a.z.image + skipped, a.z.image * sizeof(T), end - begin,
               static_cast<T*>(a.dz.data) + begin * a.dz.image + skipped, a.dz.image * sizeof(T));
    return;
  }
  cluster_arrive();

  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const OwnRows own(slots, positions);
  // Two buffers of weights, of images in turn.
  const auto buffer_of = [&](int turn) { return turn % 2 * cut.weight_bytes; };
  const auto weights_of = [&](int turn) { return reinterpret_cast<uint4*>(memory + cut.weights + buffer_of(turn)); };
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.masks);
  // [channels / 16, 32]: what each thread adds up of dW_H, of its two channels and head `column`
  float2* dw = reinterpret_cast<float2*>(memory + cut.rest);
  const int head = head_of_warp();                     // where masks are made
  constexpr bool kScaled = std::is_same_v<T, __half>;  // bfloat16 needs no scale of its own
  const auto store_weights = [&](int image) {
#pragma unroll 1
    for (int channel = own_pair; channel < cut.channels; channel += 2 * kWorkers) {
      if (channel != own_pair) load_weights(image, channel);
      uint4* weights = weights_of(image - begin);
      weights[weight_place(cut, channel)] = weight_row(ahead, false);
      weights[weight_place(cut, channel + 1)] = weight_row(ahead, true);
    }
  };
  for (int i = threadIdx.x; i < (kFrame + 16 * cut.tiles) * kHeads; i += kWorkers) masks[i] = 0;
  cluster_wait();
  store_weights(begin);
  workers_sync();

  for (int image = begin; image < end; ++image) {
    const int turn = image - begin;
    const bool has_next = image + 1 < end;
    float sums[kTurns][2];  // l without its bias, dA
    const auto meanwhile = [&] {
      if (has_next) load_weights(image + 1, own_pair);
    };
    sum_over_channels<T, 2 * kHeads>(slots, of_sums, turn, positions, buffer_of(turn), meanwhile, sums);
    float shift = 0, delta = 0;
    if (head < a.heads) {
      shift = a.lse[image * a.heads + head];
      if (a.b.data != nullptr) shift -= value_of(a.b, head);
      delta = a.delta[image * a.heads + head];
    }
    const float inverse = kScaled && a.unscale != nullptr ? a.unscale[image] : 1.f;
    const float* others = of_sums.take(turn);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int position = thread_of_head() + i * kOfHead;
      if (position >= positions || head >= a.heads) continue;
      if (others != nullptr)
#pragma unroll
        for (int of_pair = 0; of_pair < 2; ++of_pair)
          sums[i][of_pair] += others[(2 * head + of_pair) * 4 * cut.quads + position];
      const float mask = __expf(sums[i][0] - shift);
      float gradient = mask * (sums[i][1] - delta);
      if (a.grad_logits != nullptr)
        gradient += a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * positions + position] / inverse;
      masks[(kFrame + position) * kHeads + head] = packed<T>(gradient, mask);
    }
    if (has_next) store_weights(image + 1);
    workers_sync();

    // The mean's gradient at this lane's two channels of a chunk.
    const auto means_of = [&](int chunk) {
      if (!a.mean || chunk < 0) return make_float2(0, 0);
      const int low = chunk * cut.chunk + own.first + cut.classes * row, high = low + cut.classes * 8;
      const T* means = pairs_of(image) + (2 * a.heads + 1) * channels;
      return make_float2(value_of(means[low]), value_of(means[high]));
    };
    const float share = 1.f / positions;
    float2 next_mean = means_of(own.last);
    for (int chunk = own.last; chunk >= 0; chunk -= cut.teams) {
      const float2 mean = next_mean;
      next_mean = means_of(chunk - cut.teams);
      const uint32_t load = slots.load_of(turn, chunk, true), z = slots.wait(load);
      if (a.dw != nullptr) {
        float products[4];
        own.sum_over_positions<T>(z, products);
        float2* to = dw + (chunk * (cut.chunk / 16) + own.unit) * 32 + lane;
        const float2 before = image > begin ? *to : make_float2(0, 0);
        *to = make_float2(before.x + products[0] * inverse, before.y + products[2] * inverse);
        own.sync(cut);  // others have read what lies around theirs
      }

      uint32_t weight[2];
      load_matrix(weight, own.weights + buffer_of(turn) + 16 * chunk * weight_rows(cut));
      const float low = share * mean.x, high = share * mean.y;
      T* own_rows = reinterpret_cast<T*>(memory + (z - slots.base)) + (own.first + cut.classes * row) * positions +
                    2 * column - own.shift;
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
          store_matrix(z + own.row + 2 * first, gradient);
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
      slots.release(load, cut.teams);
    }
  }

  if (a.dw == nullptr) return;
  workers_sync();
  // The cluster anew: it has no register all the time.
  float* shares = a.dw + static_cast<int64_t>(cluster_of(cut, kept(blockIdx.x))) * a.heads * channels + first_channel;
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
  if (a.heads < 1 || a.heads > kHeads || a.images < 1) return false;
  if (a.upstream.data != nullptr || a.of.w.data != nullptr) return false;
  return is_rows(a.z, a.positions) && is_rows(a.dz, a.positions) && backward_cut(a).slots > 0;
}

int backward_rows_programs(const BackwardSweep& a) { return rows_clusters(backward_cut(a), a.images); }

cudaError_t sweep_backward_rows(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward_rows(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
