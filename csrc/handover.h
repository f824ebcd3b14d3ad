// The library's side of direct.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct.h"

#define AR_DIRECT extern "C" __attribute__((visibility("default")))

namespace ar_kernels {

using Tensors = std::vector<std::optional<torch::stable::Tensor>>;

// The same tensor, owned.
inline torch::stable::Tensor own(AtenTensorHandle tensor) {
  AtenTensorHandle another;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &another));
  return torch::stable::Tensor(another);
}

inline Tensors owned(const AtenTensorHandle* tensors, size_t count) {
  Tensors found(count);
  for (size_t i = 0; i < count; ++i)
    if (tensors[i] != nullptr) found[i] = own(tensors[i]);
  return found;
}

// Calls work(), which returns the outputs, and gives them to the caller.
template <class Work>
int64_t hand_over(AtenTensorHandle* outputs, size_t most, const char** error, const Work& work) {
  thread_local std::string message;
  size_t count = 0;
  try {
    const Tensors made = work();
    if (made.size() > most) throw std::runtime_error("there are more outputs than expected");
    for (; count < made.size(); ++count) {
      outputs[count] = nullptr;
      if (made[count].has_value())
        TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(made[count]->get(), outputs + count));
    }
    return static_cast<int64_t>(count);
  } catch (const std::exception& exception) {
    while (count > 0)
      if (outputs[--count] != nullptr) aoti_torch_delete_tensor_object(outputs[count]);
    message = exception.what();
    *error = message.c_str();
    return -1;
  }
}

}  // namespace ar_kernels
