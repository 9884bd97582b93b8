// The CPU kernels of positional attention: softmax(scale (alpha q + q_pos)(alpha k + k_pos)^T) v and its gradients.
// float32, bfloat16 and float16 in memory, the position terms in a dtype of their own; arithmetic in float32.
#pragma once

#include <optional>

#include "checks.h"

namespace convinit {

// q, k, v [B, heads, N, r] and q_pos, k_pos [heads, N, r], any strides. Writes out [B, N, heads r] and the base-2
// log-sum-exp of the logits, lse [B, heads, N].
void positional_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_pos,
                              const std::optional<Tensor>& k_pos, Tensor out, Tensor lse, double scale, double alpha);

// Writes the gradients: dq, dk, dv [B, heads, N, r] and dq_pos, dk_pos [heads, N, r], any strides; those that are
// absent are not computed. The result does not depend on the number of threads.
void positional_attention_backward_cpu(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& q_pos, const std::optional<Tensor>& k_pos,
                                       std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                                       std::optional<Tensor> dq_pos, std::optional<Tensor> dk_pos, double scale,
                                       double alpha);

}  // namespace convinit
