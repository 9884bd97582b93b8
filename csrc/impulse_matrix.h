#pragma once

#include "checks.h"

namespace convinit {

// Where a row points whose target leaves the grid; the meanings are those of torch.nn.functional.pad.
// The order is that of PADDING_MODES in convinit/offsets.py.
enum class PaddingMode : int64_t { zeros, replicate, circular, reflect };

// The impulse matrices [B, N, N] of offsets [B, 2] (dy, dx) on a height x width grid of N tokens.
Tensor impulse_matrix_cpu(const Tensor& offsets, int64_t height, int64_t width, int64_t padding_mode,
                          ScalarType dtype);

}  // namespace convinit
