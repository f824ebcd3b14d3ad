// How work is shared: in order, and as evenly as it can be.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define AR_ANYWHERE __host__ __device__
#else
#define AR_ANYWHERE
#endif

namespace ar_kernels {

// Of `count` things that groups share the first one of a group; the next group's is its end.
AR_ANYWHERE constexpr int64_t first_of(int64_t group, int64_t groups, int64_t count) { return count * group / groups; }

}  // namespace ar_kernels
