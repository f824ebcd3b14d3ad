// Runs the kernels of csrc/cuda on a CPU, thread for thread: to find mistakes where there is no GPU, and those that a
// GPU hides.
//
// Every thread of a kernel is a fiber. The fibers of a cluster take turns, or go on in a random order; they switch only
// inside the functions below. Clusters come one after another, so none may wait for another. All is one thread of the
// system, and nothing here need be atomic.
//
// What was never written reads as NaN: shared memory when a block starts, and what a copy is to bring from when it is
// asked for until it is there, some random time later. A copy from shared memory reads it, and then writes, some random
// time after it was asked for. So what does not wait goes wrong. Named at once are: accesses outside of shared memory
// or not aligned, barriers that are told too little or too much, deadlocks, copies from bytes that were written and not
// fenced, writes under a copy, lanes that are not where their warp is, blocks of a cluster that have not started or
// have left.
//
// Not modelled: what the memory model allows beyond any order of the threads (a forgotten fence between threads, reads
// that are still under way when a copy is asked for); the copy engine's order with global memory that was written
// through pointers; time; and, through pointers, bank conflicts.
#pragma once

#include <stddef.h>
#include <stdint.h>

// What Python is to find in the library.
#define AR_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

// Where a kernel calls: the default of a last argument, so that it is the caller's place and not ours.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch with this message, and with who was running and where.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The first thing that every function does: where the thread is. Counts the calls, and may let others run.
void enter(const char* name, Site site);

uint8_t* shared_memory();
uint32_t shared_address(const void* pointer);

void barrier_init(uint32_t barrier, uint32_t arrivals);
void fence_barrier_init();
void barrier_arrive(uint32_t barrier, uint32_t bytes);
bool barrier_passed(uint32_t barrier, uint32_t parity, bool of_cluster);
void barrier_wait(uint32_t barrier, uint32_t parity, bool of_cluster);
// A test outside of barrier_wait, which the kernel repeats in a loop of its own.
bool barrier_polled(uint32_t barrier, uint32_t parity);

void fence_proxy_async();
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void bulk_store(void* to, uint32_t from, uint32_t bytes);
void tensor_load(uint32_t to, const void* map, int rank, const int32_t* coordinates, uint32_t barrier);
void tensor_store(const void* map, uint32_t from, int rank, const int32_t* coordinates);
void bulk_commit();
void bulk_wait(int pending, bool read);

void block_sync();
bool named_sync(int name, int threads, bool predicate);

uint32_t cluster_rank();
uint32_t cluster_address(uint32_t address, uint32_t rank);
void store_to_cluster(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void cluster_arrive();
void cluster_wait();

// What lanes of a warp do together: the last of `mask` to come calls `operation` for all, with each lane's argument
// (null for those outside of the mask). Where one instruction must be reached by all, all must come from one line.
using Operation = void (*)(void* const (&arguments)[32], uint32_t mask);
void together(const char* name, uint32_t mask, void* argument, Operation operation, bool one_instruction);

void load_matrices(uint32_t* to, int count, uint32_t row, bool transposed);
void store_matrices(uint32_t row, const uint32_t* from, int count);
uint32_t move_matrix(uint32_t matrix);
void multiply(float* c, const uint32_t* a, const uint32_t* b, int k, bool is_half);

float float_of_half(uint16_t bits);
uint16_t half_of_float(float value);
float float_of_bfloat16(uint16_t bits);
uint16_t bfloat16_of_float(float value);

// The runtime's side.
struct Launch {
  uint32_t grid[3], block[3], cluster;
  size_t shared_bytes;
  const void* kernel;
  void (*call)(void* arguments);
  void* arguments;
};
bool launch(const Launch& launch);
void refuse(const char* why);  // what the runtime or the driver would answer with an error alone
bool allow_shared(const void* kernel, int bytes);
int multiprocessors();

}  // namespace emulator
