// The op `cuda_config`: what only the CUDA compiler and the driver know, as "key=value" lines.
#include <cstring>

#include "cuda_op.h"

// __CUDA_ARCH_LIST__ has commas: 800,900. CONVINIT_PTX, from setup.py, is the same for PTX, of which nvcc says nothing.
#define CONVINIT_STRING_(...) #__VA_ARGS__
#define CONVINIT_STRING(...) CONVINIT_STRING_(__VA_ARGS__)

namespace convinit {
namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

Tensor cuda_config() {
  int driver = 0;  // stays 0.0 without one
  cudaDriverGetVersion(&driver);
  const std::string text =
      "cuda_compiled=" + version(CUDART_VERSION) + "\ncuda_driver=" + version(driver) +
      "\ncuda_architectures=" CONVINIT_STRING(__CUDA_ARCH_LIST__) "\ncuda_ptx=" CONVINIT_STRING(CONVINIT_PTX);
  Tensor out = torch::stable::empty({static_cast<int64_t>(text.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  return out;
}

}  // namespace convinit

STABLE_TORCH_LIBRARY_IMPL(convinit, CompositeExplicitAutograd, m) {
  m.impl("cuda_config", TORCH_BOX(&convinit::cuda_config));
}
