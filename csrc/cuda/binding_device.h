// What the CUDA bindings share: torch's current stream and device, checks. Include in csrc/cuda/bindings*.cpp alone.
//
// It links nothing of torch's CUDA: the stream is looked up in the process, so that the module loads where torch is
// built for the CPU alone.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../binding_linear.h"
#include "device.h"
#include "int8_linear.h"

namespace {

namespace cuda = tcompress::cuda;

constexpr int64_t kRowBytes = 16;  // rows of operands start at multiples of this

int64_t padded(int64_t bytes) { return (bytes + kRowBytes - 1) / kRowBytes * kRowBytes; }

cuda::StreamHandle current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  require(get != nullptr, "tcompress: CUDA: expected a torch with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cuda::StreamHandle>(stream);
}

// The device of `x` is current while this lives.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;
  cuda::StreamHandle stream;

  explicit OnDevice(const Tensor& x)
      : guard(x.get_device_index()), device(x.get_device_index()), stream(current_stream(device)) {
    cuda::set_device(device);
  }
};

void on_same_device(const Tensor& x, const std::optional<Tensor>& t) {
  require(!t.has_value() || (t->is_cuda() && t->get_device_index() == x.get_device_index()),
          "tcompress: tensors: expected all on one CUDA device");
}

}  // namespace
