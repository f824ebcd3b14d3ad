// How csrc/node calls the library: by address, without the dispatcher, whose lists of tensors take longer than small
// calls do.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stddef.h>
#include <stdint.h>

namespace ar_kernels {

// (tensors, options) -> how many outputs there are; each is the caller's from now on. A null tensor is None. -1:
// `error` says why, until this thread's next call.
using Direct = int64_t (*)(const AtenTensorHandle* tensors, size_t count, const int64_t* options, size_t options_count,
                           AtenTensorHandle* outputs, size_t most, const char** error);

}  // namespace ar_kernels
