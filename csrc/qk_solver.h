#pragma once

#include <optional>
#include <tuple>

#include "checks.h"

namespace convinit {

// The best attention maps for B problems that share one basis; convinit/ops/qk_solver.py describes arguments and results.
// Problems are solved in parallel, each by one thread, so that the result does not depend on the number of threads.
std::tuple<Tensor, Tensor, Tensor> qk_solver_cpu(const Tensor& xq, const Tensor& xk, const Tensor& targets,
                                                 const Tensor& wq_starts, const Tensor& wk_starts, double scale,
                                                 const std::optional<Tensor>& weight_norm, double peak,
                                                 int64_t max_iterations, double tolerance);

}  // namespace convinit
