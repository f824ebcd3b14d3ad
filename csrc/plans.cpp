// Plans: what one call of a Triton operator launched and allocated, to be repeated on other tensors without Python.
//
// ar_kernels/plans.py records them. A plan is found by all that the Python launchers go by: options, and each tensor's
// dtype, device, sizes and strides. Kernels are those that Triton compiled, by their handles; the driver is opened at
// run time, so this needs no CUDA to be built and loads where there is none.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "filling.h"
#include "handover.h"
#include "stream.h"

namespace ar_kernels {

namespace {

Filling fillings[kFillings] = {
    {"sweep_forward_", "tt???tt????????", nullptr},
    {"sweep_backward_", "t?t???????????????????", nullptr},
};

using Numbers = std::vector<int64_t>;
using Handles = std::vector<AtenTensorHandle>;  // of tensors that another owns, null for None

constexpr int64_t kAlignment = 16;   // Triton compiles a kernel of its own for pointers that are no multiple of it
constexpr size_t kMostPlans = 1024;  // then all are forgotten: as many as the launchers keep
constexpr size_t kTrailing = 2;      // pointers to scratch of Triton's own, which these kernels do not use
constexpr int64_t kWarp = 32;
constexpr int64_t kMostShared = 1 << 16;  // bytes of an allocation that shares one with others
constexpr int64_t kApart = 512;           // at multiples of as many bytes, as PyTorch's own blocks

// ---------------------------------------------------------------------------------------------- the driver

struct Driver {
  int (*launch)(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra);
  int (*parameter)(void* function, size_t index, size_t* offset, size_t* size);
  int (*context)(void** context);
  int (*enter)(void* context);
  int (*name_of)(int error, const char** name);
};

Driver driver = {};

// Opens the CUDA driver's library; "" or what is missing.
std::string open_driver(std::string path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    void* address = dlsym(library, name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
    if (address == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
  Driver opened = {};
  find(opened.launch, "cuLaunchKernel");
  find(opened.parameter, "cuFuncGetParamInfo");
  find(opened.context, "cuCtxGetCurrent");
  find(opened.enter, "cuCtxSetCurrent");
  find(opened.name_of, "cuGetErrorName");
  if (!missing.empty()) return path + " has no " + missing;
  driver = opened;
  return "";
}

void check(int error, const char* call) {
  if (error == 0) return;
  const char* name = nullptr;
  driver.name_of(error, &name);
  STD_TORCH_CHECK(false, call, " failed: ", name == nullptr ? std::to_string(error) : name);
}

void* current_context() {
  void* context = nullptr;
  check(driver.context(&context), "cuCtxGetCurrent");
  return context;
}

// ---------------------------------------------------------------------------------------------- plans

// A tensor, but for where it is.
struct Layout {
  Numbers sizes, strides;
  ScalarType dtype;
  int32_t dtype_number;  // PyTorch's own
};

// An integer (slot -1), or the address of a slot (the operator's tensors, then the allocations) and bytes beyond it.
struct Parameter {
  int64_t slot, value;
};

enum class Kind : int64_t { kLaunch = 0, kProduct = 1, kConversion = 2, kFilling = 3 };

struct Step {
  Kind kind;
  // A launch of a kernel.
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Parameter> parameters;  // or a filling's: slots, -1 for None
  const Filling* filling;
  std::vector<Layout> layouts;  // of a filling's tensors
  // PyTorch's product of two slots, each as it is or transposed, or one slot in the dtype of the result.
  int64_t from[2];
  bool transposed[2];
  size_t result;
  std::vector<size_t> before, after;  // allocations that a kernel is the first, or the step the last, to use
};

struct Plan {
  void* context;
  std::vector<Layout> allocations;
  std::vector<int64_t> outputs;  // allocations; -1: None
  std::vector<Step> steps;       // none: there can be no plan
};

struct Hash {
  size_t operator()(const Numbers& key) const {
    uint64_t hash = key.size();
    for (const int64_t value : key) {
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

std::shared_mutex mutex;
std::unordered_map<Numbers, std::shared_ptr<const Plan>, Hash> plans;

int32_t device_type(AtenTensorHandle tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  return type;
}

int32_t device_index(AtenTensorHandle tensor) {
  int32_t index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return index;
}

int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  return dtype;
}

struct Shape {
  int64_t dim, *sizes, *strides;
};

Shape shape_of(AtenTensorHandle tensor) {
  Shape shape;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &shape.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &shape.sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &shape.strides));
  return shape;
}

char* address_of(AtenTensorHandle tensor) {
  void* address;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  return static_cast<char*>(address);
}

Handles handles_of(const Tensors& tensors) {
  Handles handles;
  for (const std::optional<Tensor>& tensor : tensors) handles.push_back(tensor.has_value() ? tensor->get() : nullptr);
  return handles;
}

void check_first(const Handles& tensors) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0] != nullptr, "tensors must begin with one, got None or none");
}

// What a plan is found by, and the tensors' addresses.
void describe(const Handles& tensors, const Numbers& options, Numbers& key, std::vector<char*>& addresses) {
  key.assign(options.begin(), options.end());
  addresses.clear();
  for (const AtenTensorHandle tensor : tensors) {
    if (tensor == nullptr) {
      key.push_back(-1);
      addresses.push_back(nullptr);
      continue;
    }
    const Shape shape = shape_of(tensor);
    key.push_back(shape.dim);
    key.push_back(int64_t{dtype_of(tensor)} << 32 | int64_t{device_type(tensor)} << 16 | device_index(tensor));
    key.insert(key.end(), shape.sizes, shape.sizes + shape.dim);
    key.insert(key.end(), shape.strides, shape.strides + shape.dim);
    addresses.push_back(address_of(tensor));
  }
  // Of tensors in one place a record cannot tell which was used: it is right wherever the same ones are.
  bool odd = false;  // a kernel for unaligned addresses is another one
  for (size_t i = 0; i < addresses.size(); ++i) {
    odd = odd || reinterpret_cast<uintptr_t>(addresses[i]) % kAlignment != 0;
    const size_t first = std::find(addresses.begin(), addresses.begin() + i, addresses[i]) - addresses.begin();
    if (first < i && addresses[i] != nullptr) key.push_back(static_cast<int64_t>(i << 8 | first));
  }
  key.push_back(odd);
}

std::shared_ptr<const Plan> find_plan(const Numbers& key) {
  const std::shared_lock lock(mutex);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

// PyTorch could not do its part, for want of memory as a rule. The ordinary way raises the error that it has for that.
struct Refused {};

void ask(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw Refused();
}

Owned allocate(const Layout& allocation, int32_t type, int32_t index) {
  AtenTensorHandle tensor;
  ask(aoti_torch_empty_strided(static_cast<int64_t>(allocation.sizes.size()), allocation.sizes.data(),
                               allocation.strides.data(), allocation.dtype_number, type, index, &tensor));
  return Owned(tensor);
}

Tensor transpose(AtenTensorHandle tensor) {
  const Shape shape = shape_of(tensor);
  STD_TORCH_CHECK(shape.dim == 2, "a factor must be a matrix, got ", shape.dim, " dimensions");
  const int64_t sizes[] = {shape.sizes[1], shape.sizes[0]}, strides[] = {shape.strides[1], shape.strides[0]};
  AtenTensorHandle turned;  // the last argument, whatever its name, is added to the tensor's own offset
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor, 2, sizes, strides, 0, &turned));
  return Tensor(turned);
}

Tensor product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  ask(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor convert(const Tensor& tensor, ScalarType dtype) {
  try {
    return torch::stable::to(tensor, dtype);
  } catch (const std::runtime_error&) {
    throw Refused();
  }
}

// Calls the steps of a plan, one after another.
class Run {
 public:
  Run(const Plan& plan, Handles tensors, std::vector<char*>& addresses)
      : plan_(plan), given_(tensors.size()), slots_(std::move(tensors)), addresses_(addresses) {
    type_ = device_type(slots_[0]);
    index_ = device_index(slots_[0]);
    if (type_ == aoti_torch_device_type_cuda()) {
      guard_.emplace(index_);
      stream_ = current_stream(index_);
    }
    if (current_context() != plan.context) check(driver.enter(plan.context), "cuCtxSetCurrent");  // a new thread
    allocated_.resize(plan.allocations.size());
    slots_.resize(given_ + allocated_.size());
    addresses_.resize(slots_.size());
  }

  void step(const Step& step) {
    for (const size_t i : step.before) keep(i, allocate(plan_.allocations[i], type_, index_));
    if (step.kind == Kind::kLaunch) {
      launch(step);
    } else if (step.kind == Kind::kFilling) {
      fill(step);
    } else if (step.kind == Kind::kProduct) {
      const Tensor made = product(factor(step, 0), factor(step, 1));
      if (dtype_of(made.get()) != plan_.allocations[step.result].dtype_number) throw Refused();
      keep(step.result, another(made.get()));
    } else {
      keep(step.result, another(convert(own(slots_[step.from[0]]), plan_.allocations[step.result].dtype).get()));
    }
    for (const size_t i : step.after) allocated_[i].reset();
  }

  std::vector<Owned> outputs() {
    std::vector<Owned> found;
    for (const int64_t i : plan_.outputs) {
      if (i >= 0 && allocated_[i] == nullptr) keep(i, allocate(plan_.allocations[i], type_, index_));  // it is empty
      found.push_back(i < 0 ? nullptr : std::move(allocated_[i]));
    }
    return found;
  }

 private:
  void keep(size_t i, Owned tensor) {
    slots_[given_ + i] = tensor.get();
    addresses_[given_ + i] = address_of(tensor.get());
    allocated_[i] = std::move(tensor);
  }

  Tensor factor(const Step& step, int i) const {
    const AtenTensorHandle tensor = slots_[step.from[i]];
    return step.transposed[i] ? transpose(tensor) : own(tensor);
  }

  char* address(const Parameter& parameter) const { return addresses_[parameter.slot] + parameter.value; }

  void launch(const Step& step) {
    values_.assign(step.parameters.size() + kTrailing, 0);
    parameters_.resize(values_.size());
    for (size_t i = 0; i < step.parameters.size(); ++i) {
      const Parameter& parameter = step.parameters[i];
      values_[i] = parameter.slot < 0 ? parameter.value : reinterpret_cast<int64_t>(address(parameter));
    }
    for (size_t i = 0; i < values_.size(); ++i) parameters_[i] = &values_[i];
    check(driver.launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1, step.shared,
                        stream_, parameters_.data(), nullptr),
          "cuLaunchKernel");
  }

  void fill(const Step& step) {
    views_.assign(step.parameters.size(), {});
    for (size_t i = 0; i < step.parameters.size(); ++i) {
      if (step.parameters[i].slot < 0) continue;
      const Layout& layout = step.layouts[i];
      views_[i] = {address(step.parameters[i]), layout.sizes.data(), layout.strides.data(),
                   static_cast<int64_t>(layout.sizes.size()), layout.dtype};
    }
    step.filling->fill(views_.data(), stream_);
  }

  const Plan& plan_;
  const size_t given_;
  Handles slots_;                  // the tensors that were given, then those allocated
  std::vector<char*>& addresses_;  // theirs
  std::vector<Owned> allocated_;
  int32_t type_, index_;
  void* stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::vector<int64_t> values_;
  std::vector<void*> parameters_;
  std::vector<View> views_;
};

// The call's outputs, null for None; nothing where no plan is known, one None where there is none to be followed.
std::vector<Owned> replay_handles(Handles tensors, const Numbers& options) {
  check_first(tensors);
  thread_local Numbers key;
  thread_local std::vector<char*> addresses;
  describe(tensors, options, key, addresses);
  const std::shared_ptr<const Plan> plan = find_plan(key);
  if (plan == nullptr) return {};
  if (plan->steps.empty()) return std::vector<Owned>(1);
  try {
    Run run(*plan, std::move(tensors), addresses);
    for (const Step& step : plan->steps) run.step(step);
    return run.outputs();
  } catch (const Refused&) {
    return std::vector<Owned>(1);
  }
}

Tensors replay(Tensors tensors, Numbers options) {
  Tensors found;
  for (Owned& output : replay_handles(handles_of(tensors), options))
    found.push_back(output == nullptr ? std::nullopt : std::optional(Tensor(output.release())));
  return found;
}

// ---------------------------------------------------------------------------------------------- recording

class Reader {
 public:
  explicit Reader(const Numbers& numbers) : numbers_(numbers) {}
  bool done() const { return at_ == numbers_.size(); }
  int64_t next(int64_t least, int64_t most) {
    STD_TORCH_CHECK(!done(), "a plan ends too early");
    const int64_t value = numbers_[at_++];
    STD_TORCH_CHECK(value >= least && value <= most, "a plan's number must be from ", least, " to ", most, ", got ",
                    value);
    return value;
  }
  int64_t next() { return next(INT64_MIN, INT64_MAX); }

 private:
  const Numbers& numbers_;
  size_t at_ = 0;
};

// That the kernel takes what it will be given: as many parameters, of the same sizes.
void check_kernel(const Step& launch) {
  const size_t count = launch.parameters.size() + kTrailing;
  size_t offset = 0, size = 0;
  for (size_t i = 0; i < count; ++i) {
    check(driver.parameter(launch.function, i, &offset, &size), "cuFuncGetParamInfo");
    const bool is_pointer = i >= launch.parameters.size() || launch.parameters[i].slot >= 0;
    STD_TORCH_CHECK(is_pointer ? size == 8 : size <= 8, "parameter ", i, " of a kernel must have 8 bytes, got ", size);
  }
  STD_TORCH_CHECK(driver.parameter(launch.function, count, &offset, &size) != 0, "a kernel must take ", count,
                  " parameters, got more");
}

Layout layout_of(AtenTensorHandle tensor) {
  const Shape shape = shape_of(tensor);
  return {Numbers(shape.sizes, shape.sizes + shape.dim), Numbers(shape.strides, shape.strides + shape.dim),
          own(tensor).scalar_type(), dtype_of(tensor)};
}

int64_t bytes_of(const Layout& allocation) {
  int64_t last = 0;
  for (size_t i = 0; i < allocation.sizes.size(); ++i) {
    if (allocation.sizes[i] == 0) return 0;
    last += (allocation.sizes[i] - 1) * allocation.strides[i];
  }
  return (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(allocation.dtype_number));
}

// Puts what is small, no output and used by our kernels alone into one allocation, the last, in place of one each: to
// allocate takes half as long as to launch. Those replaced stay listed and are never made: no step has them in
// `before`.
void share_scratch(Plan& plan, int64_t given) {
  const auto count = static_cast<int64_t>(plan.allocations.size());
  std::vector<bool> alone(count);
  for (const int64_t i : plan.outputs)
    if (i >= 0) alone[i] = true;
  for (const Step& step : plan.steps) {
    if (step.kind == Kind::kLaunch || step.kind == Kind::kFilling) continue;
    for (int i = 0; i < (step.kind == Kind::kProduct ? 2 : 1); ++i)
      if (step.from[i] >= given) alone[step.from[i] - given] = true;
    alone[step.result] = true;
  }
  std::vector<int64_t> places(count, -1);
  int64_t total = 0, shared = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bytes = bytes_of(plan.allocations[i]);
    if (alone[i] || bytes > kMostShared) continue;
    places[i] = total;
    total += (bytes + kApart - 1) / kApart * kApart;
    ++shared;
  }
  if (shared < 2 || plan.steps.empty()) return;
  plan.allocations.push_back({{total}, {1}, ScalarType::Byte, aoti_torch_dtype_uint8()});
  Step *first = nullptr, *last = nullptr;
  for (Step& step : plan.steps) {
    const auto drop = [&](std::vector<size_t>& indices) {
      const auto kept = std::remove_if(indices.begin(), indices.end(), [&](size_t i) { return places[i] >= 0; });
      const bool any = kept != indices.end();
      indices.erase(kept, indices.end());
      return any;
    };
    if (drop(step.before) && first == nullptr) first = &step;
    if (drop(step.after)) last = &step;
    for (Parameter& parameter : step.parameters) {
      if (parameter.slot < given || places[parameter.slot - given] < 0) continue;
      parameter.value += places[parameter.slot - given];
      parameter.slot = given + count;
    }
  }
  first->before.push_back(count);
  last->after.push_back(count);
}

// Keeps what a call with these tensors and options did. allocated: tensors like those that it allocated, on any device.
// outputs: which of them it returned, -1 for None. steps: each a Kind and, of a launch, the kernel's handle,
// the grid, warps, bytes of shared memory, the number of parameters, and of each parameter its slot and value; of a
// product, two slots, each with whether it is transposed, and the result; of a conversion, a slot and the result; of a
// filling, its number and a slot for each argument. None: there can be no plan.
void record(Tensors tensors, Numbers options, std::vector<Tensor> allocated, Numbers outputs, Numbers steps) {
  STD_TORCH_CHECK(driver.launch != nullptr, "the driver is not open");
  const Handles handles = handles_of(tensors);
  check_first(handles);
  std::optional<torch::stable::accelerator::DeviceGuard> guard;  // the current GPU may be another
  if (device_type(handles[0]) == aoti_torch_device_type_cuda()) guard.emplace(device_index(handles[0]));
  const auto plan = std::make_shared<Plan>();
  plan->context = current_context();
  for (const Tensor& tensor : allocated) plan->allocations.push_back(layout_of(tensor.get()));
  const int64_t given = static_cast<int64_t>(tensors.size()), made = static_cast<int64_t>(allocated.size());
  std::vector<int64_t> last(made, -1);  // the last step that uses an allocation
  Reader reader(steps);
  const auto use = [&](int64_t slot, Step& step) {
    if (slot < given) return;
    int64_t& before = last[slot - given];
    if (before < 0) step.before.push_back(slot - given);
    before = static_cast<int64_t>(plan->steps.size());
  };
  while (!reader.done()) {
    Step step = {};
    step.kind = static_cast<Kind>(reader.next(0, 3));
    if (step.kind == Kind::kLaunch) {
      step.function = reinterpret_cast<void*>(reader.next());
      for (unsigned& size : step.grid) size = static_cast<unsigned>(reader.next(1, INT32_MAX));
      step.threads = static_cast<unsigned>(reader.next(1, 32) * kWarp);
      step.shared = static_cast<unsigned>(reader.next(0, 1 << 20));
      for (int64_t count = reader.next(0, 4096); count > 0; --count) {
        const int64_t slot = reader.next(-1, given + made - 1);
        step.parameters.push_back({slot, reader.next()});
        use(slot, step);
      }
      check_kernel(step);
    } else if (step.kind == Kind::kFilling) {
      step.filling = &filling_of(reader.next(0, kFillings - 1));
      STD_TORCH_CHECK(step.filling->fill != nullptr, "the native library was built without ", step.filling->name);
      for (const char* argument = step.filling->arguments; *argument != 0; ++argument) {
        const int64_t slot = reader.next(*argument == 't' ? 0 : -1, given + made - 1);
        STD_TORCH_CHECK(slot < 0 || slot >= given || tensors[slot].has_value(), "slot ", slot, " must have a tensor");
        step.parameters.push_back({slot, 0});
        step.layouts.push_back(slot < 0       ? Layout()
                               : slot < given ? layout_of(handles[slot])
                                              : plan->allocations[slot - given]);
        use(slot, step);
      }
    } else {
      for (int i = 0; i < (step.kind == Kind::kProduct ? 2 : 1); ++i) {
        step.from[i] = reader.next(0, given + made - 1);
        STD_TORCH_CHECK(step.from[i] >= given ? last[step.from[i] - given] >= 0 : tensors[step.from[i]].has_value(),
                        "slot ", step.from[i], " must be written before it is read");
        if (step.kind == Kind::kProduct) step.transposed[i] = reader.next(0, 1) == 1;
        use(step.from[i], step);
      }
      step.result = static_cast<size_t>(reader.next(0, made - 1));
      STD_TORCH_CHECK(last[step.result] < 0, "allocation ", step.result, " is written twice");
      last[step.result] = static_cast<int64_t>(plan->steps.size());
    }
    plan->steps.push_back(std::move(step));
  }
  std::vector<bool> is_output(allocated.size());
  for (const int64_t i : outputs) {
    STD_TORCH_CHECK(i >= -1 && i < made, "an output must be one of ", made, " allocations, got ", i);
    STD_TORCH_CHECK(i < 0 || !is_output[i], "allocation ", i, " is returned twice");
    if (i >= 0) is_output[i] = true;
    plan->outputs.push_back(i);
  }
  for (int64_t i = 0; i < made && !plan->steps.empty(); ++i) {
    STD_TORCH_CHECK(last[i] >= 0 || (is_output[i] && bytes_of(plan->allocations[i]) == 0), "no step uses allocation ",
                    i);
    if (!is_output[i]) plan->steps[last[i]].after.push_back(i);
  }
  share_scratch(*plan, given);
  Numbers key;
  std::vector<char*> addresses;
  describe(handles, options, key, addresses);
  STD_TORCH_CHECK(key.back() == 0 || plan->steps.empty(), "tensors must be aligned");
  const std::unique_lock lock(mutex);
  if (plans.size() >= kMostPlans) plans.clear();
  plans[std::move(key)] = plan;
}

}  // namespace

const Filling& filling_of(int64_t number) { return fillings[number]; }

STABLE_TORCH_LIBRARY(ar_kernels_plans, m) {
  m.def("open_driver(str path) -> str");
  m.def("replay(Tensor?[] tensors, int[] options) -> Tensor?[]");
  m.def("record(Tensor?[] tensors, int[] options, Tensor[] allocated, int[] outputs, int[] steps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_plans, CompositeExplicitAutograd, m) {
  m.impl("open_driver", TORCH_BOX(&open_driver));
  m.impl("replay", TORCH_BOX(&replay));
  m.impl("record", TORCH_BOX(&record));
}

}  // namespace ar_kernels

// Of what the library was built: csrc/node must have been built of the same.
AR_DIRECT const char* ar_kernels_sources() { return AR_SOURCES; }

AR_DIRECT ar_kernels::Fill ar_kernels_put_filling(int64_t number, ar_kernels::Fill fill) {
  return std::exchange(ar_kernels::fillings[number].fill, fill);
}

AR_DIRECT int64_t ar_kernels_replay(const AtenTensorHandle* tensors, size_t count, const int64_t* options,
                                    size_t options_count, AtenTensorHandle* outputs, size_t most, const char** error) {
  return ar_kernels::hand_over(outputs, most, error, [&] {
    return ar_kernels::replay_handles({tensors, tensors + count}, {options, options + options_count});
  });
}
