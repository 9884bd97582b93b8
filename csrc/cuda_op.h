// What every CUDA op needs beside checks.h: the current stream, and CUDA errors in words.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

#include "checks.h"

namespace convinit {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be reported again by whoever asks next
  const bool unserved = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                        error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "convinit: " + std::string(op) + " failed on this GPU: " + cudaGetErrorString(error) +
                             (unserved ? ". convinit.build_info() tells which GPUs and drivers this build serves; "
                                         "on the CPU it works without them"
                                       : ""));
}

}  // namespace convinit

#define CONVINIT_CHECK_SAME_DEVICE(tensor, other)                                                  \
  STD_TORCH_CHECK((tensor).is_cuda() && (tensor).get_device_index() == (other).get_device_index(), \
                  "convinit: " #tensor " must be on the same CUDA device as " #other)
