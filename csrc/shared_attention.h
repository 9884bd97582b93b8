// One attention map for all images, on the CPU: map v, and the gradient of the map. float32, bfloat16 and float16 in
// memory; sums in float32.
#pragma once

#include "checks.h"

namespace convinit {

// Writes out [B, N, heads r] = map [heads, N, N] times v [B, heads, N, r], any strides of map and v.
void apply_map_cpu(const Tensor& map, const Tensor& v, Tensor out);

// Writes dmap [heads, N, N] = the sum over images of dout [B, N, heads r] times v^T. It does not depend on the number
// of threads.
void map_gradient_cpu(const Tensor& dout, const Tensor& v, Tensor dmap);

}  // namespace convinit
