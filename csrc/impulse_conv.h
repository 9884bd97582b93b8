// The op's interface, and what its CPU and CUDA kernels check and arrange alike.
#pragma once

#include <optional>

#include "checks.h"

namespace convinit {

// out[b, c, i, j] = gain[c] x[b, c, i + dy_c, j + dx_c] + bias[c], with zeros around x [B, C, H, W]; offsets [C, 2].
Tensor impulse_conv_cpu(const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& gain,
                        const std::optional<Tensor>& bias);

inline void check_per_channel(const Tensor& x, const std::optional<Tensor>& factor) {
  STD_TORCH_CHECK(!factor || (factor->dim() == 1 && factor->size(0) == x.size(1)),
                  "convinit: gain and bias must have shape [C]");
}

inline void check_impulse_conv(const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& gain,
                               const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 4, "convinit: x must have shape [B, C, H, W]");
  STD_TORCH_CHECK(offsets.dim() == 2 && offsets.size(0) == x.size(1) && offsets.size(1) == 2,
                  "convinit: offsets must have shape [C, 2]");
  CONVINIT_CHECK_DTYPE(offsets, Long);
  STD_TORCH_CHECK(x.size(2) == 0 || x.size(3) <= INT32_MAX / x.size(2), "convinit: H * W must be below 2^31");
  check_per_channel(x, gain);
  check_per_channel(x, bias);
}

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (x.size(axis) == 1) continue;
    if (x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

// What the kernels take: x without gaps, in one of two layouts, and a result of the same layout. The fake kernel in
// Python chooses alike.
struct ImpulseConvTensors {
  Tensor x, out, offsets;
  bool channels_last;

  ImpulseConvTensors(const Tensor& input, const Tensor& shifts)
      : x(input.is_contiguous() || is_channels_last(input) ? input : torch::stable::contiguous(input)),
        out(torch::stable::empty_like(x)), offsets(torch::stable::contiguous(shifts)),
        channels_last(!x.is_contiguous()) {}
};

// gain or bias in the dtype of the arithmetic: float32, or float64 for float64.
inline std::optional<Tensor> for_arithmetic(const std::optional<Tensor>& factor, const Tensor& x) {
  if (!factor) return std::nullopt;
  const auto dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(torch::stable::to(*factor, dtype));
}

}  // namespace convinit
