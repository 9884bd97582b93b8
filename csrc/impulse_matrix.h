// The op's interface, and what its CPU and CUDA kernels check alike.
#pragma once

#include "axis_target.h"
#include "checks.h"

namespace convinit {

// The impulse matrices [B, N, N] of offsets [B, 2] (dy, dx) on a height x width grid of N tokens.
Tensor impulse_matrix_cpu(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode, ScalarType dtype);

inline void check_impulse_matrix(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode) {
  STD_TORCH_CHECK(offsets.dim() == 2 && offsets.size(1) == 2, "convinit: offsets must have shape [B, 2]");
  CONVINIT_CHECK_DTYPE(offsets, Long);
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT32_MAX / width,
                  "convinit: height and width must be positive, and height * width below 2^31");
  STD_TORCH_CHECK(padding_mode >= 0 && padding_mode <= static_cast<int64_t>(PaddingMode::reflect),
                  "convinit: padding_mode must be 0, 1, 2 or 3");
}

}  // namespace convinit
