#include "qk_solver.h"

#include <algorithm>

#include "qk_problem.h"

namespace convinit {
namespace {

void check_targets(const int64_t* targets, int64_t count, int64_t tokens) {
  const auto [low, high] = std::minmax_element(targets, targets + count);
  STD_TORCH_CHECK(count == 0 || (*low >= -1 && *high < tokens), "convinit: targets must lie in [-1, N)");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> qk_solver_cpu(const Tensor& xq_, const Tensor& xk_, const Tensor& targets_,
                                                 const Tensor& wq_starts_, const Tensor& wk_starts_, double scale,
                                                 const std::optional<Tensor>& weight_norm_, double peak,
                                                 int64_t max_iterations, double tolerance,
                                                 const std::optional<Tensor>& monitor_) {
  check_qk_solver(xq_, xk_, targets_, wq_starts_, wk_starts_, weight_norm_, peak, max_iterations);
  if (monitor_) {
    CONVINIT_CHECK_DTYPE(*monitor_, Long);
    STD_TORCH_CHECK(monitor_->is_contiguous() && monitor_->numel() == 3, "convinit: monitor must have three entries");
  }
  const int64_t tokens = xq_.size(0), dq = xq_.size(1), dk = xk_.size(1);
  const int64_t num_starts = wq_starts_.size(0), problems = wq_starts_.size(1), rank = wq_starts_.size(3);

  const Tensor xq = torch::stable::contiguous(xq_), xk = torch::stable::contiguous(xk_);
  const Tensor targets = torch::stable::contiguous(targets_);
  const Tensor wq_starts = torch::stable::contiguous(wq_starts_), wk_starts = torch::stable::contiguous(wk_starts_);
  check_targets(targets.const_data_ptr<int64_t>(), problems * tokens, tokens);
  std::optional<Tensor> weight_norm;
  if (weight_norm_) weight_norm = torch::stable::contiguous(*weight_norm_);

  Tensor wq = torch::stable::new_empty(xq, {problems, dq, rank});
  Tensor wk = torch::stable::new_empty(xq, {problems, dk, rank});
  Tensor diagnostics = torch::stable::new_empty(xq, {problems, kDiagnostics});
  if (problems == 0) return {wq, wk, diagnostics};

  const QKBasis basis(xq.const_data_ptr<double>(), dq, xk.const_data_ptr<double>(), dk, tokens, rank, scale,
                      QKMonitor(monitor_ ? monitor_->mutable_data_ptr<int64_t>() : nullptr));
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const double* start_q = wq_starts.const_data_ptr<double>();
  const double* start_k = wk_starts.const_data_ptr<double>();
  const double* norm = weight_norm ? weight_norm->const_data_ptr<double>() : nullptr;
  double* out_q = wq.mutable_data_ptr<double>();
  double* out_k = wk.mutable_data_ptr<double>();
  double* out_diagnostics = diagnostics.mutable_data_ptr<double>();

  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::vector<QKStart> starts;
      for (int64_t s = 0; s < num_starts; ++s) {
        const int64_t problem = s * problems + b;
        starts.push_back({start_q + problem * dq * rank, start_k + problem * dk * rank});
      }
      const QKSolution solution = solve_qk(basis, target + b * tokens, starts,
                                           {.weight_norm = norm ? norm[b] : 0,
                                            .peak = norm ? 0 : peak,
                                            .num_starts = num_starts,
                                            .max_iterations = max_iterations,
                                            .tolerance = tolerance});
      std::copy(solution.wq.begin(), solution.wq.end(), out_q + b * dq * rank);
      for (int64_t c = 0; c < rank; ++c)
        for (int64_t i = 0; i < dk; ++i) out_k[(b * dk + i) * rank + c] = solution.wk_t[c * dk + i];
      const double values[kDiagnostics] = {solution.metrics.mse,        solution.metrics.peak,
                                           solution.metrics.hit_rate,   solution.weight_norm,
                                           double(solution.iterations), double(solution.evaluations)};
      std::copy(values, values + kDiagnostics, out_diagnostics + b * kDiagnostics);
      basis.monitor.count_problem();
    }
  };
  torch::stable::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
    try {
      solve(begin, end);
    } catch (const QKMonitor::Stopped&) {  // whoever told so knows
    }
  });
  return {wq, wk, diagnostics};
}

}  // namespace convinit
