// The dtypes that the kernels know.
#pragma once

namespace ar_kernels {

enum class Kind { kHalf, kBFloat16, kFloat, kDouble };

}  // namespace ar_kernels
