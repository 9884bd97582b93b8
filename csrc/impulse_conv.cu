// The op `impulse_conv` on CUDA: arguments, launch. impulse_conv_kernel.cuh has what runs on the device.
#include "cuda_op.h"
#include "impulse_conv.h"
#include "impulse_conv_kernel.cuh"

namespace convinit {
namespace {

cudaError_t launch_for_dtype(ScalarType dtype, ImpulseConvArgs& args, cudaStream_t stream) {
  switch (dtype) {
    case ScalarType::Double: return launch_impulse_conv<PlainElement<double>>(args, stream);
    case ScalarType::Float: return launch_impulse_conv<PlainElement<float>>(args, stream);
    case ScalarType::Half: return launch_impulse_conv<HalfElement>(args, stream);
    case ScalarType::BFloat16: return launch_impulse_conv<BFloat16Element>(args, stream);
    default: STD_TORCH_CHECK(false, "convinit: x must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace

Tensor impulse_conv_cuda(const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& gain,
                         const std::optional<Tensor>& bias) {
  check_impulse_conv(x, offsets, gain, bias);
  CONVINIT_CHECK_SAME_DEVICE(offsets, x);
  if (gain) CONVINIT_CHECK_SAME_DEVICE(*gain, x);
  if (bias) CONVINIT_CHECK_SAME_DEVICE(*bias, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  const ImpulseConvTensors tensors(x, offsets);
  if (x.numel() == 0) return tensors.out;
  const auto gains = for_arithmetic(gain, x), biases = for_arithmetic(bias, x);
  ImpulseConvArgs args{};
  args.out = tensors.out.data_ptr();
  args.x = tensors.x.data_ptr();
  args.offsets = tensors.offsets.const_data_ptr<int64_t>();
  args.gain = gains ? gains->data_ptr() : nullptr;
  args.bias = biases ? biases->data_ptr() : nullptr;
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = static_cast<int>(x.size(2));
  args.width = static_cast<int>(x.size(3));
  args.channels_last = tensors.channels_last;
  check_cuda(launch_for_dtype(x.scalar_type(), args, current_stream(x)), "impulse_conv");
  return tensors.out;
}

}  // namespace convinit

STABLE_TORCH_LIBRARY_IMPL(convinit, CUDA, m) { m.impl("impulse_conv", TORCH_BOX(&convinit::impulse_conv_cuda)); }
