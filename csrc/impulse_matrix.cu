// The op `impulse_matrix` on CUDA: arguments, launch. impulse_matrix_kernel.cuh has what runs on the device.
//
// Offsets are read on the device, so the host never waits for them and the launch can be captured in a CUDA graph.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>

#include "cuda_op.h"
#include "impulse_matrix.h"
#include "impulse_matrix_kernel.cuh"

namespace convinit {
namespace {

struct Bits {
  uint64_t one;
  int itemsize;
};

Bits bits(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return {std::bit_cast<uint64_t>(1.0), 8};
    case ScalarType::Float: return {std::bit_cast<uint32_t>(1.0f), 4};
    case ScalarType::Half: return {torch::headeronly::Half(1.0f).x, 2};
    case ScalarType::BFloat16: return {torch::headeronly::BFloat16(1.0f).x, 2};
    case ScalarType::Bool: return {1, 1};
    default: STD_TORCH_CHECK(false, "convinit: dtype must be float64, float32, float16, bfloat16 or bool");
  }
}

}  // namespace

Tensor impulse_matrix_cuda(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode,
                           ScalarType dtype) {
  check_impulse_matrix(offsets, height, width, padding_mode);
  const auto [one, itemsize] = bits(dtype);
  const torch::stable::accelerator::DeviceGuard guard(offsets.get_device_index());

  const int64_t batch = offsets.size(0), tokens = height * width;
  Tensor out = torch::stable::new_empty(offsets, {batch, tokens, tokens}, dtype);
  if (batch == 0) return out;

  const Tensor packed = torch::stable::contiguous(offsets);
  ImpulseMatrixArgs args{};
  args.out = out.data_ptr();
  args.offsets = packed.const_data_ptr<int64_t>();
  args.batch = batch;
  args.height = static_cast<int>(height);
  args.width = static_cast<int>(width);
  args.padding_mode = static_cast<PaddingMode>(padding_mode);
  args.one = one;
  check_cuda(launch_impulse_matrix(args, itemsize, current_stream(offsets)), "impulse_matrix");
  return out;
}

}  // namespace convinit

STABLE_TORCH_LIBRARY_IMPL(convinit, CUDA, m) { m.impl("impulse_matrix", TORCH_BOX(&convinit::impulse_matrix_cuda)); }
