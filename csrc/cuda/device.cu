#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "device.h"

namespace tcompress::cuda {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("tcompress: CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

void set_device(int device) { check(cudaSetDevice(device)); }

int multiprocessors(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  int count = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kDevices) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace tcompress::cuda
