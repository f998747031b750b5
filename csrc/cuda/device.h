// Questions to the CUDA runtime, for the binding. Free of torch.
#pragma once

namespace tcompress::cuda {

// Makes `device` current for this library's copy of the runtime, which is linked statically.
void set_device(int device);
int multiprocessors(int device);

}  // namespace tcompress::cuda
