// The op `qk_solver` on CUDA: arguments, workspace, launch. qk_solver_kernel.cuh has what runs on the device.
//
// Two launches whatever the number of iterations, and no word to the host: targets that leave [-1, N) are seen on the
// device and make all results of their problem NaN.
#include <climits>

#include "cuda_op.h"
#include "qk_solver.h"
#include "qk_solver_kernel.cuh"

namespace convinit {
namespace {

void check_devices(const Tensor& xq, const Tensor& xk, const Tensor& targets, const Tensor& wq_starts,
                   const Tensor& wk_starts, const std::optional<Tensor>& weight_norm) {
  CONVINIT_CHECK_SAME_DEVICE(xk, xq);
  CONVINIT_CHECK_SAME_DEVICE(targets, xq);
  CONVINIT_CHECK_SAME_DEVICE(wq_starts, xq);
  CONVINIT_CHECK_SAME_DEVICE(wk_starts, xq);
  if (weight_norm) CONVINIT_CHECK_SAME_DEVICE(*weight_norm, xq);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> qk_solver_cuda(const Tensor& xq_, const Tensor& xk_, const Tensor& targets_,
                                                  const Tensor& wq_starts_, const Tensor& wk_starts_, double scale,
                                                  const std::optional<Tensor>& weight_norm_, double peak,
                                                  int64_t max_iterations, double tolerance,
                                                  const std::optional<Tensor>& /* monitor: of the CPU's alone */) {
  check_qk_solver(xq_, xk_, targets_, wq_starts_, wk_starts_, weight_norm_, peak, max_iterations);
  check_devices(xq_, xk_, targets_, wq_starts_, wk_starts_, weight_norm_);
  const torch::stable::accelerator::DeviceGuard guard(xq_.get_device_index());

  const Tensor xq = torch::stable::contiguous(xq_), xk = torch::stable::contiguous(xk_);
  const Tensor targets = torch::stable::contiguous(targets_);
  const Tensor wq_starts = torch::stable::contiguous(wq_starts_), wk_starts = torch::stable::contiguous(wk_starts_);
  std::optional<Tensor> weight_norm;
  if (weight_norm_) weight_norm = torch::stable::contiguous(*weight_norm_);
  const int64_t tokens = xq.size(0), dq = xq.size(1), dk = xk.size(1);
  const int64_t num_starts = wq_starts.size(0), problems = wq_starts.size(1), rank = wq_starts.size(3);
  // Within a problem the kernel counts with 32 bits.
  STD_TORCH_CHECK(
      (tokens + kTile) * (dq + dk + rank + kStride) < INT_MAX && (dq + dk) * rank < INT_MAX && problems < INT_MAX,
      "convinit: the problem is too large for the CUDA solver");

  Tensor wq = torch::stable::new_empty(xq, {problems, dq, rank});
  Tensor wk = torch::stable::new_empty(xq, {problems, dk, rank});
  Tensor diagnostics = torch::stable::new_empty(xq, {problems, kDiagnostics});
  if (problems == 0) return {wq, wk, diagnostics};

  QKSolverArgs args{};
  args.shape = {static_cast<int>(tokens), static_cast<int>(dq), static_cast<int>(dk), static_cast<int>(rank),
                static_cast<float>(scale)};
  args.options.peak = weight_norm ? 0 : peak;
  args.options.num_starts = num_starts;
  args.options.max_iterations = max_iterations;
  args.options.tolerance = tolerance;
  args.problems = static_cast<int>(problems);
  args.xq = xq.const_data_ptr<double>();
  args.xk = xk.const_data_ptr<double>();
  args.targets = targets.const_data_ptr<int64_t>();
  args.wq_starts = wq_starts.const_data_ptr<double>();
  args.wk_starts = wk_starts.const_data_ptr<double>();
  args.weight_norm = weight_norm ? weight_norm->const_data_ptr<double>() : nullptr;
  args.wq = wq.mutable_data_ptr<double>();
  args.wk = wk.mutable_data_ptr<double>();
  args.diagnostics = diagnostics.mutable_data_ptr<double>();

  check_cuda(plan_qk_solver(args), "qk_solver");
  Carver size;
  args.carve(size);
  Tensor workspace = torch::stable::new_empty(xq, {static_cast<int64_t>(size.bytes())}, ScalarType::Byte);
  Carver carver(workspace.mutable_data_ptr<uint8_t>());
  args.carve(carver);
  check_cuda(launch_qk_solver(args, current_stream(xq)), "qk_solver");
  return {wq, wk, diagnostics};
}

}  // namespace convinit

STABLE_TORCH_LIBRARY_IMPL(convinit, CUDA, m) { m.impl("qk_solver", TORCH_BOX(&convinit::qk_solver_cuda)); }
