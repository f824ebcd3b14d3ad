// The backward sweep on Hopper of channels_last maps, in tiles of all channels (sweep.cuh): one read of the map, one
// write of its gradient.
//
//   l = W_H Z,  dA = dP Z,  a = exp(l + b_H - lse),  dl = a (dA - delta) + direct
//   dZ = W_H^T dl + dP^T a (+ dP_mean / S) (+ upstream),  dW_H += dl Z^T
//
// W_H and dP lie side by side, row 2 k and 2 k + 1 of one matrix, and so do dl and a: one product makes l and dA, one
// makes dZ, to which the mean belongs as one more row with a constant mask.
//
// Every warp brings its own channels of a tile by the copy engine, turns them into their dZ where they lie, and sends
// that away, on barriers of its own. All that warps wait for each other for are the sums over channels: l and dA.

#include "attend_backward.h"

#include <algorithm>

#include "gates.cuh"
#include "sweep.cuh"

namespace ar_kernels {

namespace {

// Tiles that a warp asks for at first, and as each of them comes, until all stages are under way: what is asked for at
// once comes together, the first tile as late as the last.
constexpr int kEarly = 2;
// Two stages are there at least; and before a stage is free again all have been asked for.
static_assert(kEarly <= 2 && kMostStages <= 3 * kEarly);

// How an image is cut among warps, and where what lies in shared memory. A warp has 16 `blocks` channels of a tile of
// every map: [blocks / 4 planes, tile, 64].
struct Slices {
  int per_processor;       // blocks that share a multiprocessor
  int warps, blocks;       // of a block; of 16 channels each, of a warp
  int tile, sixteens;      // positions of a tile, and how many products of 16 that takes
  int tiles;               // of an image
  int span, run;           // tiles that are cut into runs, one of a program: an image, or the whole map
  int stages, bytes_each;  // bytes of one map that a warp has of a tile, a multiple of 1024
  int parts, masks, spare, of_image, barriers, bytes;
  float mean_mask, mean_factor;  // 1 / positions: a power of two in products, and the rest, at most 1
};

// What a warp has to itself beside tiles: sums over its channels of a tile's positions, 8 columns each; or dP of an
// image on its way to where products want it.
__host__ __device__ constexpr int part_bytes(int blocks, int sixteens) {
  const int sums = 16 * sixteens * 2 * kHeads * 4, gradients = kHeads * (32 * blocks + 16);
  return sums > gradients ? sums : gradients;
}

// tile: positions, at most. No stages: it does not fit.
inline Slices slices_of(int channels, int positions, int maps, int per_processor, int tile) {
  Slices cut = {};
  const int most_warps = kMostWarps / per_processor;
  if (channels < kRow || channels % kRow != 0 || positions < 1) return cut;
  cut.per_processor = per_processor;
  cut.blocks = kRow / 16;
  if (channels / kRow > most_warps && channels % (2 * kRow) == 0) cut.blocks *= 2;
  cut.warps = channels / 16 / cut.blocks;
  if (cut.warps > most_warps) return cut;
  // Two blocks have as many warps then, and half as many shares of dW_H.
  if (per_processor == 4 && 16 * cut.blocks > kRow) return cut;
  // Twice the channels, half the positions: so much work between two barriers, and so many registers.
  const bool wide = cut.blocks == 4 && positions > 16 && maps == 1;
  cut.tile = std::min(tile, wide ? 32 : 16);
  cut.sixteens = (cut.tile + 15) / 16;
  cut.tiles = (positions + cut.tile - 1) / cut.tile;
  cut.bytes_each = 2 * 16 * cut.blocks * cut.tile;
  const int stage_bytes = cut.warps * cut.bytes_each * maps;
  const int parts = cut.warps * part_bytes(cut.blocks, cut.sixteens), masks = 16 * cut.sixteens * kHeads * 4;
  const int of_image = 2 * cut.warps * kHeads * 4;
  const int others = 1024 + parts + masks + 16 + of_image;  // tiles begin at a multiple of 1024
  cut.stages = std::min((shared_bytes(per_processor) - others) / (stage_bytes + 8 * cut.warps), kMostStages);
  cut.parts = cut.stages * stage_bytes;
  cut.masks = cut.parts + parts;
  cut.spare = cut.masks + masks;
  cut.of_image = cut.spare + 16;
  cut.barriers = cut.of_image + of_image;
  cut.bytes = cut.barriers + 8 * cut.warps * cut.stages + 1024;
  for (cut.mean_mask = 1; cut.mean_mask / 2 * positions >= 1 && cut.mean_mask > 1e-7f;) cut.mean_mask /= 2;
  cut.mean_factor = 1 / (positions * cut.mean_mask);
  return cut;
}

// As many blocks on a multiprocessor as have three stages each: one works while others wait. But where all of a map's
// tiles are on their way at once, one block with the warps of two: half as many shares of dW_H.
inline Slices best_slices(int channels, int positions, int maps, int images, int processors) {
  for (const int per_processor : {4, 2, 1}) {
    const Slices cut = slices_of(channels, positions, maps, per_processor, 32);
    if (cut.stages < 3) continue;
    if (per_processor == 2) {
      const Slices one = slices_of(channels, positions, maps, 1, 32);
      const bool same_work = one.warps == 2 * cut.warps && one.tile == 2 * cut.tile;
      if (same_work && static_cast<int64_t>(images) * one.tiles <= one.stages * processors) return one;
    }
    return cut;
  }
  for (const int tile : {8, 32}) {
    const Slices cut = slices_of(channels, positions, maps, 1, tile);
    if (cut.stages >= 2) return cut;
  }
  return {};
}

// What an image wants before its first tile takes about as long as a tile. So runs are images or parts of one image,
// unless runs that begin anywhere are so much shorter that it makes up for the images that they have a part of.
inline void set_runs(Slices* cut, int images, int most_programs) {
  const auto parts = [](int of, int size) { return (of + size - 1) / size; };
  const int tiles = images * cut->tiles, anywhere = parts(tiles, most_programs);
  const int images_anywhere = 1 + parts(anywhere - 1, cut->tiles), images_each = parts(images, most_programs);
  const int whole = images_each * parts(cut->tiles, std::max(most_programs / images, 1));
  const bool aligned = whole + images_each <= anywhere + images_anywhere;
  cut->run = aligned ? whole : anywhere;
  cut->span = aligned && images_each == 1 ? cut->tiles : tiles;
}

#if AR_HOPPER

// What the mean's row has of a channel: its value in two parts, since one of T has too few digits.
template <class T>
__device__ __forceinline__ uint32_t mean_word(float value) {
  const float high = unpacked<T>(packed<T>(value, 0)).x;
  return packed<T>(high, fabsf(high) == INFINITY ? 0.f : value - high);
}

// Four adjacent values of T, where two are aligned.
template <class T>
__device__ __forceinline__ float4 four_at(const uint2& words) {
  const float2 low = unpacked<T>(words.x), high = unpacked<T>(words.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float dot(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// A lane's part of W_H's row, rounded to the map's dtype; all loads before the first use.
template <class T, int kBlocks>
__device__ __forceinline__ void load_weights(const Values& w, int first, uint32_t (&to)[kBlocks][2]) {
  if (w.kind != Kind::kFloat) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i)
      to[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(w.data) + first + 8 * i);
  } else {
    float2 values[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i)
      values[i] = *reinterpret_cast<const float2*>(static_cast<const float*>(w.data) + first + 8 * i);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) to[i / 2][i % 2] = packed<T>(values[i].x, values[i].y);
  }
}

// Row `row` of so many bytes, into L2; nothing where there is no data.
__device__ __forceinline__ void prefetch_row(const void* data, int64_t row, int bytes) {
  if (data == nullptr) return;
  const char* from = static_cast<const char*>(data) + row * bytes;
  for (int at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) prefetch_l2(from + at);
}

// What is wanted of an image before its first tile, into L2.
template <class T>
__device__ __forceinline__ void prefetch_image(const BackwardSweep& a, int64_t image) {
  constexpr int kFloatBytes = sizeof(float);
  const PooledGradient& of = a.of;
  prefetch_row(of.pooled, image, a.heads * a.channels * kFloatBytes);
  prefetch_row(of.grad_features, image, of.gated * a.channels * static_cast<int>(sizeof(T)));
  prefetch_row(of.grad_pooled, image, a.heads * a.channels * kFloatBytes);
  prefetch_row(of.grad_mean, image, a.channels * kFloatBytes);
  prefetch_row(a.pairs, image, (a.heads + a.mean) * 2 * a.channels * static_cast<int>(sizeof(T)));
  const float* const few[] = {of.gates, of.grad_gates, of.scores, of.grad_scores, of.grad_lse, a.lse, a.delta};
  const float* own = nullptr;  // a thread's row of these
#pragma unroll
  for (int i = 0; i < 7; ++i)
    if (threadIdx.x == i && few[i] != nullptr) own = few[i] + image * (i < 2 ? of.gated : a.heads);
  if (own != nullptr) prefetch_l2(own);
}

// dP of an image into the odd rows of the kernel's weights, and what delta is the sum of.
//   dg_k = dx_k . P_k,  du = g (dg - sum_j g_j dg_j),  dt = du (1 - tanh^2 t),  dP_k = g_k dx_k + dt_k W_G[k]
// A lane has four channels of one head after another, so that all it needs is on its way at once, and dP goes to where
// products want it through `own`, the warp's part of shared memory.
// shared: two arrays of [warps, kHeads] floats; the second is what delta is the sum of, after a barrier. Where there
// are gates, a barrier for all threads is inside.
template <class T, int kBlocks>
__device__ __forceinline__ void pooled_gradient(const BackwardSweep& a, int64_t image, int first_channel, bool stores,
                                                float mean_factor, float* shared, uint8_t* own,
                                                uint32_t (&weights)[kBlocks][2], uint32_t (&average)[kBlocks][2]) {
  constexpr int kLanes = 4 * kBlocks;  // that have a head's channels
  constexpr int kAtOnce = 32 / kLanes < kHeads ? 32 / kLanes : kHeads, kRounds = kHeads / kAtOnce;
  constexpr int kRowBytes = 32 * kBlocks + 16;  // of a head in `own`: rows begin in different banks
  const PooledGradient& of = a.of;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int warps = blockDim.x / 32, h = lane % kHeads, first_head = lane / kLanes;
  const int channel = first_channel + lane % kLanes * 4;
  const bool gated = of.score_w.data != nullptr;

  // All loads before the first use. Heads that are not there have zeros.
  float4 p[kRounds], score[kRounds];
  uint2 x[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int k = r * kAtOnce + first_head;
    const int64_t at = (image * a.heads + k) * a.channels + channel;
    p[r] = k < a.heads ? *reinterpret_cast<const float4*>(of.pooled + at) : make_float4(0, 0, 0, 0);
    x[r] = make_uint2(0, 0);
    score[r] = make_float4(0, 0, 0, 0);
  }
  if (of.grad_features != nullptr)
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int k = r * kAtOnce + first_head;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const T*>(of.grad_features) +
                                                                (image * of.gated + k) * a.channels + channel);
      if (k < of.gated) x[r] = make_uint2(words[0], words[1]);
    }
  const auto grad_pooled = [&](int k) {
    const float2* from = reinterpret_cast<const float2*>(of.grad_pooled + (image * a.heads + k) * a.channels + channel);
    const float2 low = from[0], high = from[1];
    return make_float4(low.x, low.y, high.x, high.y);
  };
  float dg = 0, gate = 0, t = 0, direct = 0;  // of head h
  if (gated) {
    if (h < of.gated) {
      gate = of.gates[image * of.gated + h];
      if (of.grad_gates != nullptr) dg = of.grad_gates[image * of.gated + h];
    }
    if (h < a.heads) {
      t = of.scores[image * a.heads + h];
      if (of.grad_scores != nullptr) direct = of.grad_scores[image * a.heads + h];
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int k = r * kAtOnce + first_head, index = k * a.channels + channel;
      if (k < a.heads && of.score_w.kind == Kind::kFloat)
        score[r] = *reinterpret_cast<const float4*>(static_cast<const float*>(of.score_w.data) + index);
      if (k < a.heads && of.score_w.kind != Kind::kFloat) {
        const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const T*>(of.score_w.data) + index);
        score[r].x = __uint_as_float(words.x), score[r].y = __uint_as_float(words.y);  // not looked at as yet
      }
    }
  } else if (of.grad_pooled != nullptr) {  // in W_G's place, and 1 in dt's
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int k = r * kAtOnce + first_head;
      if (k < a.heads) score[r] = grad_pooled(k);
    }
  }

  float mean[4] = {0, 0, 0, 0};
  if (a.mean && lane < kLanes)
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[i] = of.grad_mean[image * a.channels + channel + i];

  // Over the lanes of a head, then over warps.
  const auto store_sum = [&](float sum, int k, float* to) {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    if (lane % kLanes == 0 && k < kHeads) to[warp * kHeads + k] = sum;
  };
  float dt = 1;
  if (gated) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) store_sum(dot(four_at<T>(x[r]), p[r]), r * kAtOnce + first_head, shared);
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kMostWarps; other += 32 / kHeads)
      if (other + lane / kHeads < warps) sum += shared[other * kHeads + lane];
#pragma unroll
    for (int lanes = kHeads; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    dg += sum;
    float mixed = gate * dg;
    mixed += __shfl_xor_sync(kAll, mixed, 1);
    mixed += __shfl_xor_sync(kAll, mixed, 2);
    dt = 0;
    if (h < a.heads) {
      const float u = gate_tanh(t);
      dt = gate * (dg - mixed) * (1 - u * u) + direct;
      if (stores && of.dt != nullptr && threadIdx.x < kHeads) of.dt[image * a.heads + h] = dt;
    }
  }

  float of_delta[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int k = r * kAtOnce + first_head;
    if (gated && of.score_w.kind != Kind::kFloat)
      score[r] = four_at<T>(make_uint2(__float_as_uint(score[r].x), __float_as_uint(score[r].y)));
    const float own_gate = __shfl_sync(kAll, gate, k % kHeads), own_dt = __shfl_sync(kAll, dt, k % kHeads);
    float4 dp = four_at<T>(x[r]);
    dp.x = own_gate * dp.x + own_dt * score[r].x;
    dp.y = own_gate * dp.y + own_dt * score[r].y;
    dp.z = own_gate * dp.z + own_dt * score[r].z;
    dp.w = own_gate * dp.w + own_dt * score[r].w;
    if (gated && of.grad_pooled != nullptr && k < a.heads) {
      const float4 more = grad_pooled(k);
      dp = make_float4(dp.x + more.x, dp.y + more.y, dp.z + more.z, dp.w + more.w);
    }
    const uint2 words = make_uint2(packed<T>(dp.x, dp.y), packed<T>(dp.z, dp.w));
    if (k < kHeads) *reinterpret_cast<uint2*>(own + k * kRowBytes + lane % kLanes * 8) = words;
    of_delta[r] = dot(four_at<T>(words), p[r]);  // of dP as it is rounded, so that sums over positions of dl stay 0
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) store_sum(of_delta[r], r * kAtOnce + first_head, shared + warps * kHeads);
  __syncwarp();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row % 2 == 1)
        weights[b][half] =
            *reinterpret_cast<const uint32_t*>(own + row / 2 * kRowBytes + 32 * b + 16 * half + 4 * column);
  __syncwarp();
  if (a.mean && lane < kLanes)
    *reinterpret_cast<uint4*>(own + 16 * lane) =
        make_uint4(mean_word<T>(mean[0] * mean_factor), mean_word<T>(mean[1] * mean_factor),
                   mean_word<T>(mean[2] * mean_factor), mean_word<T>(mean[3] * mean_factor));
  __syncwarp();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      average[b][half] =
          a.mean && column == 0 ? *reinterpret_cast<const uint32_t*>(own + 4 * (16 * b + 8 * half + row)) : 0;
  __syncwarp();
}

#endif  // AR_HOPPER

// kBlocks: of 16 channels, of a warp. kTiles: of 16 positions, of a tile.
template <class T, int kBlocks, int kTiles>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    backward_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap upstream_map,
                    const __grid_constant__ CUtensorMap dz_map, const __grid_constant__ BackwardSweep a,
                    const __grid_constant__ Slices cut) {
#if AR_HOPPER
  constexpr bool kScaled = std::is_same_v<T, __half>;
  constexpr int kEntries = 16 * kTiles * kHeads;  // positions and heads of a tile
  constexpr int kPartBytes = part_bytes(kBlocks, kTiles);
  uint8_t* memory = shared_memory();
  memory += -shared_address(memory) & 1023;
  const uint32_t base = shared_address(memory);
  const bool tapped = a.upstream.data != nullptr, makes = !kScaled && a.of.w.data != nullptr;
  // A lane's place in what a warp has of a matrix: row `row`, columns 2 * column and + 1 (primitives.cuh).
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);  // so that it is known to be the same for all lanes
  const int threads = blockDim.x, first_channel = 16 * kBlocks * warp;
  const int runs = (cut.span + cut.run - 1) / cut.run, of_span = blockIdx.x % runs * cut.run;
  const int begin = blockIdx.x / runs * cut.span + of_span, end = begin + min(cut.run, cut.span - of_span);

  // The warp's channels of a tile come and go. Its first lane asks for that, in the order of tiles.
  const int of_warp = cut.bytes_each * (1 + tapped), stage_bytes = cut.warps * of_warp;
  const uint32_t slices = base + warp * of_warp, barriers = base + cut.barriers + 8 * cut.stages * warp;
  struct Place {
    int image, tile;
  };
  const auto later = [&](Place place, int tiles) {
    for (place.tile += tiles; place.tile >= cut.tiles; place.tile -= cut.tiles) ++place.image;
    return place;
  };
  Place at = {begin / cut.tiles, begin % cut.tiles};
  const auto load = [&](const Place& place, int stage) {
    const uint32_t to = slices + stage * stage_bytes, barrier = barriers + 8 * stage;
    const int position = place.tile * cut.tile;
    barrier_arrive_expect(barrier, of_warp);
    const auto load_slice = [&](const CUtensorMap* map, uint32_t slice) {
      tensor_load(slice, map, 0, position, warp * (kBlocks / 4), place.image, barrier, kEvictFirst);
    };
    load_slice(&z_map, to);
    if (tapped) load_slice(&upstream_map, to + cut.bytes_each);
  };
  const auto store = [&](uint32_t slice) {
    tensor_store(&dz_map, slice, 0, at.tile * cut.tile, warp * (kBlocks / 4), at.image, kEvictNormal);
    bulk_commit();
  };
  // Before the tiles, behind which it would wait for memory.
  const auto prefetch_weights = [&](const Values& w) {
    prefetch_row(w.data, 0,
                 a.heads * a.channels * static_cast<int>(w.kind == Kind::kFloat ? sizeof(float) : sizeof(T)));
  };
  prefetch_image<T>(a, at.image);
  prefetch_weights(a.of.w);
  prefetch_weights(a.of.score_w);
  if (lane == 0) {
#pragma unroll 1
    for (int stage = 0; stage < cut.stages; ++stage) barrier_init(barriers + 8 * stage, 1);
    fence_barrier_init();
#pragma unroll 1
    for (int stage = 0; stage < kEarly && begin + stage < end; ++stage) load(later(at, stage), stage);
  }
  int asked = kEarly;  // stages, by that lane
  __syncwarp();

  // The lane's row of 16 positions by 16 channels in a slice: rows of 128 bytes, whose chunks of 16 bytes are swizzled.
  // Of four matrices the second has the next eight rows, or, of a turned product, the next eight columns. Positions
  // that a tile of 8 has not are its others once more, and go to `spare`.
  const auto place_of = [&](int row, int chunk) { return swizzled(row & (cut.tile - 1), chunk); };
  const uint32_t straight = place_of(lane % 16, lane / 16);
  const uint32_t turned = place_of(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t plane_bytes = cut.tile * 128;
  const bool real = lane % 16 < cut.tile;
  const auto address = [&](uint32_t place, int tile, int b) {
    return ((place + b / 4 * plane_bytes) ^ (b % 4 * 32)) + tile * (16 * 128);
  };
  uint8_t* own_part = memory + cut.parts + warp * kPartBytes;
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory + cut.masks);  // [16 kTiles, kHeads]: dl and a
  float* of_image = reinterpret_cast<float*>(memory + cut.of_image);  // pooled_gradient's

  uint32_t weights[kBlocks][2];     // W_H and dP by rows: the products over channels
  uint32_t transposes[kBlocks][2];  // the same by columns: dZ
  uint32_t average[kBlocks][2];     // and of the mean: channels 16 b + 8 half + row, in lanes of column 0
  float sums[kBlocks][4];           // dW_H in even columns
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) weights[b][0] = weights[b][1] = 0;
  if (makes && row % 2 == 0 && row / 2 < a.heads)
    load_weights<T>(a.of.w, row / 2 * a.channels + first_channel + 2 * column, weights);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[b][i] = 0;
  const uint32_t mean_mask = column == 0 ? packed<T>(cut.mean_mask, cut.mean_mask) : 0;
  float scale = 1, inverse = 1, lse = 0, delta = 0;  // of this thread's head, in the sum over warps
  const int head = threadIdx.x % kHeads;
  const float bias = a.b.data == nullptr || head >= a.heads ? 0.f : value_of(a.b, head);

  int stage = 0;
  uint32_t parity = 0;
  for (int item = begin; item < end; ++item, at = later(at, 1)) {
    const int image = at.image, position = at.tile * cut.tile, count = min(cut.tile, a.positions - position);
    const bool first = item == begin || at.tile == 0;
    if (first) {
      if (head < a.heads) {
        lse = a.lse[image * a.heads + head];
        // Of what pooled_gradient makes it is what to subtract.
        const float* of_delta = makes ? a.of.grad_lse : a.delta;
        delta = of_delta == nullptr ? 0.f : of_delta[image * a.heads + head];
      }
      if (makes) {
        if constexpr (!kScaled)
          pooled_gradient<T, kBlocks>(a, image, first_channel, at.tile == 0, cut.mean_factor, of_image, own_part,
                                      weights, average);
      } else {
        const T* pairs = static_cast<const T*>(a.pairs) +
                         static_cast<int64_t>(image) * (a.heads + a.mean) * 2 * a.channels + first_channel;
        const T* means = pairs + (2 * a.heads + 1) * a.channels;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int channel = 16 * b + 8 * half;
            if (row < 2 * a.heads)
              weights[b][half] = *reinterpret_cast<const uint32_t*>(pairs + row * a.channels + channel + 2 * column);
            average[b][half] =
                a.mean && column == 0 ? mean_word<T>(value_of(means[channel + row]) * cut.mean_factor) : 0;
          }
      }
      if (item - at.tile + cut.tiles < end) prefetch_image<T>(a, image + 1);
      if (kScaled && a.unscale != nullptr) {  // the sums too come into this image's scale
        const float before = inverse;
        inverse = a.unscale[image];
        scale = 1 / inverse;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[b][i] *= before * scale;
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) transposes[b][half] = transposed(weights[b][half]);
    }

    const uint32_t z = slices + stage * stage_bytes;
    barrier_wait(barriers + 8 * stage, parity);
    if (lane == 0)
#pragma unroll 1
      for (const int until = min(min(asked + kEarly, cut.stages), end - begin); asked < until; ++asked)
        load(later(at, asked - (item - begin)), asked);

    // l and dA, of this warp's channels.
    float both[kTiles][2][4];  // two chains of products that don't wait for each other
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 8; ++i) both[tile][i / 4][i % 4] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t fragment[4];
        load_matrix(fragment, address(z + straight, tile, b));
        mma<T>(both[tile][b % 2], fragment, weights[b][0], weights[b][1]);
      }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        reinterpret_cast<float2*>(own_part)[(16 * tile + 8 * half + row) * kHeads + column] =
            make_float2(both[tile][0][2 * half] + both[tile][1][2 * half],
                        both[tile][0][2 * half + 1] + both[tile][1][2 * half + 1]);
    __syncthreads();

    // Of all channels; dl and a.
    if (first && makes) {
      delta = -delta;
#pragma unroll 4
      for (int other = 0; other < cut.warps; ++other) delta += of_image[(cut.warps + other) * kHeads + head];
    }
    for (int entry = threadIdx.x; entry < kEntries; entry += threads) {
      float2 sum = {0, 0};
#pragma unroll
      for (int other = 0; other < kMostWarps; ++other)
        if (other < cut.warps) {
          const float2 part = reinterpret_cast<const float2*>(memory + cut.parts + other * kPartBytes)[entry];
          sum = make_float2(sum.x + part.x, sum.y + part.y);
        }
      const int s = entry / kHeads;
      float mask = 0, gradient = 0;
      if (s < count && head < a.heads) {
        mask = __expf(sum.x + bias - lse);
        gradient = mask * (sum.y - delta);
        if (a.grad_logits != nullptr)
          gradient +=
              scale * a.grad_logits[(static_cast<int64_t>(image) * a.heads + head) * a.positions + position + s];
      }
      masks[entry] = packed<T>(gradient, mask);
    }
    __syncthreads();

    // The tile before has had half a tile's time to leave.
    if (lane == 0 && item > begin && item - 1 + cut.stages < end) {
      bulk_wait_read<0>();
      load(later(at, cut.stages - 1), (stage == 0 ? cut.stages : stage) - 1);
    }
    uint32_t by_position[kTiles][2], by_head[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        by_position[tile][half] = masks[(16 * tile + 8 * half + row) * kHeads + column];
        by_head[tile][half] = transposed(by_position[tile][half]);
      }
    const auto make_gradients = [&](auto with_upstream) {
      constexpr bool kTapped = decltype(with_upstream)::value;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (a.dw != nullptr)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t fragment[4];
            load_matrix_transposed(fragment, address(z + turned, tile, b));
            mma<T>(sums[b], fragment, by_head[tile][0], by_head[tile][1]);
          }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t gradient[4], upstream[4];
          if constexpr (kTapped) load_matrix(upstream, address(z + cut.bytes_each + straight, tile, b));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float values[4] = {0, 0, 0, 0};
            const uint32_t all_masks[4] = {by_position[tile][0], by_position[tile][1], mean_mask, mean_mask};
            mma<T>(values, all_masks, transposes[b][half], average[b][half]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float2 value = {values[2 * i], values[2 * i + 1]};
              if (kScaled) value = make_float2(value.x * inverse, value.y * inverse);
              if constexpr (kTapped) {
                const float2 more = unpacked<T>(upstream[2 * half + i]);
                value = make_float2(value.x + more.x, value.y + more.y);
              }
              gradient[2 * half + i] = packed<T>(value.x, value.y);
            }
          }
          store_matrix(real ? address(z + straight, tile, b) : base + cut.spare, gradient);
        }
      }
    };
    if (tapped)
      make_gradients(std::true_type());
    else
      make_gradients(std::false_type());
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) store(z);
    if (++stage == cut.stages) stage = 0, parity ^= 1;
  }

  if (a.dw != nullptr && column < a.heads) {
    float* dw = a.dw + (static_cast<int64_t>(blockIdx.x) * a.heads + column) * a.channels + first_channel + row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      dw[16 * b] = sums[b][0] * inverse;
      dw[16 * b + 8] = sums[b][2] * inverse;
    }
  }
  if (lane == 0) bulk_wait_read<0>();
#endif  // AR_HOPPER
}

Slices backward_slices(const BackwardSweep& a) {
  const int maps = a.upstream.data == nullptr ? 1 : 2;
  Slices cut = best_slices(a.channels, a.positions, maps, a.images, processors());
  if (cut.stages == 0 || static_cast<int64_t>(a.images) * cut.tiles >= INT32_MAX / 2) return {};
  set_runs(&cut, a.images, cut.per_processor * processors());
  return cut;
}

int programs_of(const BackwardSweep& a, const Slices& cut) {
  return a.images * cut.tiles / cut.span * ((cut.span + cut.run - 1) / cut.run);
}

template <class T, int kBlocks, int kTiles>
cudaError_t sweep(const BackwardSweep& a, const Slices& cut, cudaStream_t stream) {
  CUtensorMap z, upstream, dz;
  const auto encoded = [&](CUtensorMap* tensor, const FlatMap& map) {  // a box is what a warp has of a tile
    return encode<T>(tensor, map, a.images, a.channels, a.positions, 16 * cut.blocks, cut.tile);
  };
  if (!encoded(&z, a.z) || !encoded(&dz, a.dz)) return cudaErrorInvalidValue;
  if (!encoded(&upstream, a.upstream.data == nullptr ? a.z : a.upstream)) return cudaErrorInvalidValue;
  return launch<backward_kernel<T, kBlocks, kTiles>>(programs_of(a, cut), 32 * cut.warps, cut.bytes, stream, z,
                                                     upstream, dz, a, cut);
}

template <class T>
cudaError_t sweep(const BackwardSweep& a, cudaStream_t stream) {
  const Slices cut = backward_slices(a);
  if (cut.blocks == 8) return sweep<T, 8, 1>(a, cut, stream);
  if (cut.sixteens == 1) return sweep<T, 4, 1>(a, cut, stream);
  return sweep<T, 4, 2>(a, cut, stream);
}

}  // namespace

bool can_sweep_backward(const BackwardSweep& a) {
  if (a.kind != Kind::kHalf && a.kind != Kind::kBFloat16) return false;
  if (a.heads < 1 || a.heads > kHeads || a.images < 1 || a.dz.data == nullptr) return false;
  const bool upstream = a.upstream.data == nullptr || is_channels_last(a.upstream);
  return is_channels_last(a.z) && upstream && is_channels_last(a.dz) && backward_slices(a).stages > 0;
}

int backward_programs(const BackwardSweep& a) { return programs_of(a, backward_slices(a)); }

cudaError_t sweep_backward(const BackwardSweep& a, cudaStream_t stream) {
  if (!can_sweep_backward(a)) return cudaErrorInvalidValue;
  return a.kind == Kind::kHalf ? sweep<__half>(a, stream) : sweep<__nv_bfloat16>(a, stream);
}

}  // namespace ar_kernels
