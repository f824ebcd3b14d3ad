// Which target's kernels run: the widest that the machine has instructions for, or what AR_KERNELS_TARGET names.

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "targets.h"

#define AR_DECLARE_TARGET(target)                                                                               \
  namespace target {                                                                                            \
  int64_t forward_scratch(const ForwardArguments&);                                                             \
  int64_t forward_part(const ForwardArguments&);                                                                \
  void attend_forward(const ForwardArguments&, int64_t begin, int64_t end, void* memory);                       \
  void merge_splits(const ForwardArguments&, int64_t begin, int64_t end);                                       \
  int64_t backward_scratch(const BackwardArguments&);                                                           \
  void attend_backward(const BackwardArguments&, int64_t begin, int64_t end, void* memory);                     \
  int64_t forward3x3_scratch(const ForwardArguments&);                                                          \
  void attend3x3_forward(const ForwardArguments&, Stage, int64_t begin, int64_t end, void* memory);             \
  int64_t backward3x3_scratch(const BackwardArguments&);                                                        \
  void attend3x3_backward(const BackwardArguments&, Stage, int64_t begin, int64_t end, void* memory);           \
  void weight_sums(Kind, const void* rows, const void* weights, int64_t count, int64_t heads, int64_t channels, \
                   void* out, int64_t begin, int64_t end);                                                      \
  void rectify_forward(const RectifyArguments&, int64_t begin, int64_t end, void* memory);                      \
  void rectify_backward(const RectifyArguments&, int64_t begin, int64_t end, void* memory);                     \
  int64_t product_lanes();                                                                                      \
  void multiply(const ProductArguments&, int64_t begin, int64_t end);                                           \
  inline constexpr Kernels kKernels = {#target,                                                                 \
                                       &forward_scratch,                                                        \
                                       &forward_part,                                                           \
                                       &attend_forward,                                                         \
                                       &merge_splits,                                                           \
                                       &backward_scratch,                                                       \
                                       &attend_backward,                                                        \
                                       &forward3x3_scratch,                                                     \
                                       &attend3x3_forward,                                                      \
                                       &backward3x3_scratch,                                                    \
                                       &attend3x3_backward,                                                     \
                                       &weight_sums,                                                            \
                                       &rectify_forward,                                                        \
                                       &rectify_backward,                                                       \
                                       &product_lanes,                                                          \
                                       &multiply};                                                              \
  }

namespace ar_kernels {

AR_DECLARE_TARGET(portable)
#if defined(__x86_64__)
AR_DECLARE_TARGET(avx2)
AR_DECLARE_TARGET(avx512)
#endif

namespace {

struct Target {
  const Kernels* kernels;
  bool runs_here;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Target targets[] = {{&avx512::kKernels, avx512}, {&avx2::kKernels, avx2}, {&portable::kKernels, true}};
#else
  const Target targets[] = {{&portable::kKernels, true}};
#endif
  const char* named = std::getenv("AR_KERNELS_TARGET");
  std::string known;
  for (const Target& target : targets) {
    if (named == nullptr || *named == '\0') {
      if (target.runs_here) return *target.kernels;
    } else if (std::string(named) == target.kernels->target) {
      STD_TORCH_CHECK(target.runs_here, "AR_KERNELS_TARGET must name instructions that this CPU has, got ", named);
      return *target.kernels;
    }
    known += (known.empty() ? "" : ", ") + std::string(target.kernels->target);
  }
  STD_TORCH_CHECK(false, "AR_KERNELS_TARGET must be one of ", known, ", got ", named);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ar_kernels
