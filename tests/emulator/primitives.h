// The functions that csrc/cuda/primitives.cuh has in PTX, by the emulator.
#pragma once

#include "cuda.h"
#include "cuda_runtime.h"

namespace ar_kernels {

using emulator::Site;

inline uint8_t* shared_memory() { return emulator::shared_memory(); }

inline uint32_t shared_address(const void* pointer, Site site = Site::here()) {
  emulator::enter("shared_address", site);
  return emulator::shared_address(pointer);
}

inline void pause(uint32_t) {}

inline uint32_t kept(uint32_t value) { return value; }

// ------------------------------------------------------------------------------------------------ mbarrier

inline void barrier_init(uint32_t barrier, uint32_t arrivals, Site site = Site::here()) {
  emulator::enter("barrier_init", site);
  emulator::barrier_init(barrier, arrivals);
}

inline void fence_barrier_init(Site site = Site::here()) {
  emulator::enter("fence_barrier_init", site);
  emulator::fence_barrier_init();
}

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes, Site site = Site::here()) {
  emulator::enter("barrier_arrive_expect", site);
  emulator::barrier_arrive(barrier, bytes);
}

inline void barrier_arrive(uint32_t barrier, Site site = Site::here()) {
  emulator::enter("barrier_arrive", site);
  emulator::barrier_arrive(barrier, 0);
}

inline bool barrier_passed(uint32_t barrier, uint32_t parity, Site site = Site::here()) {
  emulator::enter("barrier_passed", site);
  return emulator::barrier_polled(barrier, parity);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity, Site site = Site::here()) {
  emulator::enter("barrier_wait", site);
  emulator::barrier_wait(barrier, parity, false);
}

inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity, Site site = Site::here()) {
  emulator::enter("barrier_wait_cluster", site);
  emulator::barrier_wait(barrier, parity, true);
}

// ------------------------------------------------------------------------------------------------ copy engine

inline void fence_proxy_async(Site site = Site::here()) {
  emulator::enter("fence_proxy_async", site);
  emulator::fence_proxy_async();
}

inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t,
                      Site site = Site::here()) {
  emulator::enter("bulk_load", site);
  emulator::bulk_load(to, from, bytes, barrier);
}

inline void bulk_store(void* to, uint32_t from, uint32_t bytes, uint64_t, Site site = Site::here()) {
  emulator::enter("bulk_store", site);
  emulator::bulk_store(to, from, bytes);
}

inline void bulk_commit(Site site = Site::here()) {
  emulator::enter("bulk_commit", site);
  emulator::bulk_commit();
}

template <int kPending>
void bulk_wait_read(Site site = Site::here()) {
  emulator::enter("bulk_wait_read", site);
  emulator::bulk_wait(kPending, true);
}

template <int kPending>
void bulk_wait(Site site = Site::here()) {
  emulator::enter("bulk_wait", site);
  emulator::bulk_wait(kPending, false);
}

inline void tensor_load(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y, int32_t z, uint32_t barrier,
                        uint64_t, Site site = Site::here()) {
  emulator::enter("tensor_load", site);
  const int32_t at[] = {x, y, z};
  emulator::tensor_load(to, map, 3, at, barrier);
}

inline void tensor_load(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y, int32_t z, int32_t v,
                        uint32_t barrier, uint64_t, Site site = Site::here()) {
  emulator::enter("tensor_load", site);
  const int32_t at[] = {x, y, z, v};
  emulator::tensor_load(to, map, 4, at, barrier);
}

inline void tensor_store(const CUtensorMap* map, uint32_t from, int32_t x, int32_t y, int32_t z, uint64_t,
                         Site site = Site::here()) {
  emulator::enter("tensor_store", site);
  const int32_t at[] = {x, y, z};
  emulator::tensor_store(map, from, 3, at);
}

inline void tensor_store(const CUtensorMap* map, uint32_t from, int32_t x, int32_t y, int32_t z, int32_t v, uint64_t,
                         Site site = Site::here()) {
  emulator::enter("tensor_store", site);
  const int32_t at[] = {x, y, z, v};
  emulator::tensor_store(map, from, 4, at);
}

inline void prefetch_l2(const void*) {}
inline void prefetch_l1(const void*) {}

// ------------------------------------------------------------------------------------------------ barriers of warps

inline void named_sync(int name, int threads, Site site = Site::here()) {
  emulator::enter("named_sync", site);
  emulator::named_sync(name, threads, false);
}

inline bool named_any(int name, int threads, bool predicate, Site site = Site::here()) {
  emulator::enter("named_any", site);
  return emulator::named_sync(name, threads, predicate);
}

// ------------------------------------------------------------------------------------------------ clusters

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }

inline uint32_t cluster_address(uint32_t address, uint32_t rank, Site site = Site::here()) {
  emulator::enter("cluster_address", site);
  return emulator::cluster_address(address, rank);
}

inline void store_to_cluster(uint32_t to, float4 value, uint32_t barrier, Site site = Site::here()) {
  emulator::enter("store_to_cluster", site);
  emulator::store_to_cluster(to, &value, 16, barrier);
}

inline void cluster_arrive(Site site = Site::here()) {
  emulator::enter("cluster_arrive", site);
  emulator::cluster_arrive();
}

inline void cluster_wait(Site site = Site::here()) {
  emulator::enter("cluster_wait", site);
  emulator::cluster_wait();
}

// ------------------------------------------------------------------------------------------------ matrix products

template <int kMatrices>
void load_matrix(uint32_t (&to)[kMatrices], uint32_t row, Site site = Site::here()) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulator::enter("load_matrix", site);
  emulator::load_matrices(to, kMatrices, row, false);
}

template <int kMatrices>
void load_matrix_transposed(uint32_t (&to)[kMatrices], uint32_t row, Site site = Site::here()) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulator::enter("load_matrix_transposed", site);
  emulator::load_matrices(to, kMatrices, row, true);
}

template <int kMatrices>
void store_matrix(uint32_t row, const uint32_t (&from)[kMatrices], Site site = Site::here()) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulator::enter("store_matrix", site);
  emulator::store_matrices(row, from, kMatrices);
}

inline uint32_t transposed(uint32_t matrix, Site site = Site::here()) {
  emulator::enter("transposed", site);
  return emulator::move_matrix(matrix);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  emulator::enter("mma", site);
  const uint32_t b[2] = {b0, b1};
  emulator::multiply(c, a, b, 16, std::is_same_v<T, __half>);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[2], uint32_t b, Site site = Site::here()) {
  static_assert(sizeof(T) == 2, "T is __half or __nv_bfloat16");
  emulator::enter("mma", site);
  emulator::multiply(c, a, &b, 8, std::is_same_v<T, __half>);
}

inline float power_of_two(float power) { return exp2f(power); }
inline float maximum(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }

}  // namespace ar_kernels
