// The stream that kernels are started on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#if defined(__linux__)  // defined by a torch with CUDA alone; weak, so that the library loads in every other
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace ar_kernels {

// A cudaStream_t: PyTorch's current stream of a device.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
#if defined(__linux__)
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  return stream;
}

}  // namespace ar_kernels
