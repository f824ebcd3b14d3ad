// How work is shared: in order, and as evenly as it can be.
#pragma once

#include <stdint.h>

#include <type_traits>

#ifdef __CUDACC__
#define AR_ANYWHERE __host__ __device__
#else
#define AR_ANYWHERE
#endif

namespace ar_kernels {

// Of `count` things that groups share the first one of a group; the next group's is its end. The first groups have one
// more where there is a rest. A GPU divides ints in fewer instructions.
template <class Int = int64_t>
AR_ANYWHERE constexpr Int first_of(std::common_type_t<Int> group, std::common_type_t<Int> groups,
                                   std::common_type_t<Int> count) {
  const Int share = static_cast<std::make_unsigned_t<Int>>(count) / groups, rest = count - share * groups;
  return share * group + (group < rest ? group : rest);
}

}  // namespace ar_kernels
