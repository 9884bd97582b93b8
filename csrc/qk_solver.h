// The op's interface, and what its CPU and CUDA kernels check alike.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"

namespace convinit {

// The best attention maps for B problems that share one basis; convinit/ops/qk_solver.py describes arguments and results.
// Problems are solved in parallel, each by one thread, so that the result does not depend on the number of threads.
// What is not solved yet when `monitor` says stop (see qk_objective.h) is left unwritten.
std::tuple<Tensor, Tensor, Tensor> qk_solver_cpu(const Tensor& xq, const Tensor& xk, const Tensor& targets,
                                                 const Tensor& wq_starts, const Tensor& wk_starts, double scale,
                                                 const std::optional<Tensor>& weight_norm, double peak,
                                                 int64_t max_iterations, double tolerance,
                                                 const std::optional<Tensor>& monitor);

inline void check_qk_solver(const Tensor& xq, const Tensor& xk, const Tensor& targets, const Tensor& wq_starts,
                            const Tensor& wk_starts, const std::optional<Tensor>& weight_norm, double peak,
                            int64_t max_iterations) {
  CONVINIT_CHECK_DTYPE(xq, Double);
  CONVINIT_CHECK_DTYPE(xk, Double);
  CONVINIT_CHECK_DTYPE(wq_starts, Double);
  CONVINIT_CHECK_DTYPE(wk_starts, Double);
  CONVINIT_CHECK_DTYPE(targets, Long);
  STD_TORCH_CHECK(xq.dim() == 2 && xk.dim() == 2 && targets.dim() == 2 && wq_starts.dim() == 4 && wk_starts.dim() == 4,
                  "convinit: xq and xk must be 2-D, targets 2-D, wq_starts and wk_starts 4-D");
  const int64_t tokens = xq.size(0), dq = xq.size(1), dk = xk.size(1);
  const int64_t num_starts = wq_starts.size(0), problems = wq_starts.size(1), rank = wq_starts.size(3);
  STD_TORCH_CHECK(xk.size(0) == tokens && targets.size(0) == problems && targets.size(1) == tokens &&
                      wq_starts.size(2) == dq && wk_starts.size(0) == num_starts && wk_starts.size(1) == problems &&
                      wk_starts.size(2) == dk && wk_starts.size(3) == rank && num_starts > 0 && tokens > 0 && dq > 0 &&
                      dk > 0 && rank > 0,
                  "convinit: shapes of xq, xk, targets, wq_starts and wk_starts do not fit");
  STD_TORCH_CHECK(weight_norm.has_value() != (peak > 0), "convinit: give weight_norm or a positive peak");
  STD_TORCH_CHECK(max_iterations >= 0 && max_iterations <= INT32_MAX, "convinit: max_iterations must lie in [0, 2^31)");
  if (!weight_norm) return;
  CONVINIT_CHECK_DTYPE(*weight_norm, Double);
  STD_TORCH_CHECK(weight_norm->numel() == problems, "convinit: weight_norm must have one entry per problem");
}

}  // namespace convinit
