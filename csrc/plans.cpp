// Plans: what one call of a Triton operator launched and allocated, to be repeated on other tensors without Python.
//
// ar_kernels/plans.py records them. A plan is found by all that the Python launchers go by: options, and each tensor's
// dtype, device, sizes and strides. Kernels are those that Triton compiled, by their handles; the driver is opened at
// run time, so this needs no CUDA to be built and loads where there is none.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__)  // defined by a torch with CUDA alone
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace ar_kernels {

namespace {

using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;
using Tensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kAlignment = 16;    // Triton compiles a kernel of its own for pointers that are no multiple of it
constexpr size_t kMostPlans = 1024;   // then all are forgotten: as many as the launchers keep
constexpr size_t kTrailing = 2;       // pointers to scratch of Triton's own, which these kernels do not use
constexpr int64_t kWarp = 32;

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

void* current_stream(int32_t device) {
  void* stream = nullptr;
#if defined(__linux__)
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  return stream;
}

// ---------------------------------------------------------------------------------------------- plans

struct Allocation {
  Numbers sizes, strides;
  int32_t dtype;
};

// An integer (slot -1), or the address of a slot (the operator's tensors, then the allocations) and bytes beyond it.
struct Parameter {
  int64_t slot, value;
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Parameter> parameters;
  std::vector<size_t> before, after;  // allocations that it is the first, or the last, to use
};

struct Plan {
  void* context;
  std::vector<Allocation> allocations;
  std::vector<int64_t> outputs;  // allocations; -1: empty
  std::vector<Launch> launches;  // none: there can be no plan
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

int32_t device_type(const Tensor& tensor) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

int32_t device_index(const Tensor& tensor) {
  int32_t index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

struct Shape {
  int64_t dim, *sizes, *strides;
};

Shape shape_of(const Tensor& tensor) {
  Shape shape;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &shape.dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &shape.sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &shape.strides));
  return shape;
}

char* address_of(const Tensor& tensor) {
  void* address;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &address));
  return static_cast<char*>(address);
}

// What a plan is found by, and the tensors' addresses.
void describe(const Tensors& tensors, const Numbers& options, Numbers& key, std::vector<char*>& addresses) {
  key.assign(options.begin(), options.end());
  addresses.clear();
  for (const std::optional<Tensor>& tensor : tensors) {
    if (!tensor.has_value()) {
      key.push_back(-1);
      addresses.push_back(nullptr);
      continue;
    }
    const Shape shape = shape_of(*tensor);
    key.push_back(shape.dim);
    key.push_back(int64_t{dtype_of(*tensor)} << 32 | int64_t{device_type(*tensor)} << 16 | device_index(*tensor));
    key.insert(key.end(), shape.sizes, shape.sizes + shape.dim);
    key.insert(key.end(), shape.strides, shape.strides + shape.dim);
    addresses.push_back(address_of(*tensor));
  }
  // A kernel for unaligned addresses is another one; and of tensors in one place a record cannot tell which was used.
  bool odd = false;
  for (size_t i = 0; i < addresses.size(); ++i) {
    odd = odd || reinterpret_cast<uintptr_t>(addresses[i]) % kAlignment != 0;
    for (size_t j = 0; j < i && addresses[i] != nullptr; ++j) odd = odd || addresses[i] == addresses[j];
  }
  key.push_back(odd);
}

std::shared_ptr<const Plan> find_plan(const Numbers& key) {
  const std::shared_lock lock(mutex);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

Tensor allocate(const Allocation& allocation, int32_t type, int32_t index) {
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(allocation.sizes.size()),
                                                         allocation.sizes.data(), allocation.strides.data(),
                                                         allocation.dtype, type, index, &tensor));
  return Tensor(tensor);
}

// The operator's outputs, empty ones None; nothing where no plan is known, one None where there can be none.
Tensors replay(Tensors tensors, Numbers options) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].has_value(), "tensors must begin with one, got None or none");
  thread_local Numbers key;
  thread_local std::vector<char*> addresses;
  describe(tensors, options, key, addresses);
  const std::shared_ptr<const Plan> plan = find_plan(key);
  if (plan == nullptr) return {};
  if (plan->launches.empty()) return {std::nullopt};

  const int32_t type = device_type(*tensors[0]), index = device_index(*tensors[0]);
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;
  if (type == aoti_torch_device_type_cuda()) {
    guard.emplace(index);
    stream = current_stream(index);
  }
  if (current_context() != plan->context) check(driver.enter(plan->context), "cuCtxSetCurrent");  // a new thread

  Tensors allocated(plan->allocations.size());
  addresses.resize(tensors.size() + allocated.size());
  std::vector<int64_t> values;
  std::vector<void*> parameters;
  for (const Launch& launch : plan->launches) {
    for (const size_t i : launch.before) {
      allocated[i] = allocate(plan->allocations[i], type, index);
      addresses[tensors.size() + i] = address_of(*allocated[i]);
    }
    values.assign(launch.parameters.size() + kTrailing, 0);
    parameters.resize(values.size());
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& parameter = launch.parameters[i];
      values[i] = parameter.slot < 0 ? parameter.value
                                     : reinterpret_cast<int64_t>(addresses[parameter.slot]) + parameter.value;
    }
    for (size_t i = 0; i < values.size(); ++i) parameters[i] = &values[i];
    check(driver.launch(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1,
                        launch.shared, stream, parameters.data(), nullptr),
          "cuLaunchKernel");
    for (const size_t i : launch.after) allocated[i].reset();
  }
  Tensors outputs;
  for (const int64_t i : plan->outputs) outputs.push_back(i < 0 ? std::nullopt : std::move(allocated[i]));
  return outputs;
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
void check_kernel(const Launch& launch) {
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

// Keeps what a call with these tensors and options did. allocated: tensors like those that it allocated, on any device.
// outputs: which of them it returned, -1 for an empty one. launches: of each the kernel's handle, the grid, warps, bytes
// of shared memory, the number of parameters, and of each parameter its slot and value. None: there can be no plan.
void record(Tensors tensors, Numbers options, std::vector<Tensor> allocated, Numbers outputs, Numbers launches) {
  STD_TORCH_CHECK(driver.launch != nullptr, "the driver is not open");
  const auto plan = std::make_shared<Plan>();
  plan->context = current_context();
  for (const Tensor& tensor : allocated) {
    const Shape shape = shape_of(tensor);
    plan->allocations.push_back({Numbers(shape.sizes, shape.sizes + shape.dim),
                                 Numbers(shape.strides, shape.strides + shape.dim), dtype_of(tensor)});
  }
  const int64_t given = static_cast<int64_t>(tensors.size()), made = static_cast<int64_t>(allocated.size());
  Reader reader(launches);
  while (!reader.done()) {
    Launch launch = {};
    launch.function = reinterpret_cast<void*>(reader.next());
    for (unsigned& size : launch.grid) size = static_cast<unsigned>(reader.next(1, INT32_MAX));
    launch.threads = static_cast<unsigned>(reader.next(1, 32) * kWarp);
    launch.shared = static_cast<unsigned>(reader.next(0, 1 << 20));
    for (int64_t count = reader.next(0, 4096); count > 0; --count) {
      const int64_t slot = reader.next(-1, given + made - 1);
      launch.parameters.push_back({slot, reader.next()});
    }
    check_kernel(launch);
    plan->launches.push_back(std::move(launch));
  }
  std::vector<bool> is_output(allocated.size());
  for (const int64_t i : outputs) {
    STD_TORCH_CHECK(i >= -1 && i < made, "an output must be one of ", made, " allocations, got ", i);
    if (i >= 0) is_output[i] = true;
    plan->outputs.push_back(i);
  }
  for (int64_t i = 0; i < made && !plan->launches.empty(); ++i) {
    const auto uses = [&](const Launch& launch) {
      return std::any_of(launch.parameters.begin(), launch.parameters.end(),
                         [&](const Parameter& parameter) { return parameter.slot == given + i; });
    };
    const auto first = std::find_if(plan->launches.begin(), plan->launches.end(), uses);
    const auto last = std::find_if(plan->launches.rbegin(), plan->launches.rend(), uses);
    STD_TORCH_CHECK(first != plan->launches.end(), "no kernel uses allocation ", i);
    first->before.push_back(i);
    if (!is_output[i]) last->after.push_back(i);
  }
  Numbers key;
  std::vector<char*> addresses;
  describe(tensors, options, key, addresses);
  const std::unique_lock lock(mutex);
  if (plans.size() >= kMostPlans) plans.clear();
  plans[std::move(key)] = plan;
}

}  // namespace

STABLE_TORCH_LIBRARY(ar_kernels_plans, m) {
  m.def("open_driver(str path) -> str");
  m.def("replay(Tensor?[] tensors, int[] options) -> Tensor?[]");
  m.def("record(Tensor?[] tensors, int[] options, Tensor[] allocated, int[] outputs, int[] launches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ar_kernels_plans, CompositeExplicitAutograd, m) {
  m.impl("open_driver", TORCH_BOX(&open_driver));
  m.impl("replay", TORCH_BOX(&replay));
  m.impl("record", TORCH_BOX(&record));
}

}  // namespace ar_kernels
