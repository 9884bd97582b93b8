// The op `qk_adam` on CUDA: arguments, workspace, launch. qk_adam_kernel.cuh has what runs on the device; on a CPU the op
// is plain PyTorch (convinit/ops/qk_adam.py, which describes arguments and results).
#include <climits>

#include "cuda_op.h"
#include "qk_adam_kernel.cuh"

namespace convinit {
namespace {

void check_qk_adam(const Tensor& tokens, const Tensor& directions, const Tensor& targets, const Tensor& wq,
                   const Tensor& wk, const Tensor& moments, int64_t heads, int64_t first_step, int64_t steps) {
  CONVINIT_CHECK_DTYPE(tokens, Float);
  CONVINIT_CHECK_DTYPE(directions, Float);
  CONVINIT_CHECK_DTYPE(targets, Long);
  CONVINIT_CHECK_DTYPE(wq, Float);
  CONVINIT_CHECK_DTYPE(wk, Float);
  CONVINIT_CHECK_DTYPE(moments, Float);
  STD_TORCH_CHECK(tokens.dim() == 2 && directions.dim() == 2 && targets.dim() == 2 && wq.dim() == 3 &&
                      wk.dim() == 3 && moments.dim() == 5,
                  "convinit: tokens, directions and targets must be 2-D, wq and wk 3-D, moments 5-D");
  const int64_t n = tokens.size(0), basis = tokens.size(1), dim = directions.size(0);
  const int64_t problems = wq.size(0), rank = wq.size(2);
  const auto is_weight = [&](const Tensor& w, int64_t first) {
    return w.size(first) == problems && w.size(first + 1) == dim && w.size(first + 2) == rank && w.is_contiguous();
  };
  STD_TORCH_CHECK(directions.size(1) == basis && targets.size(0) == problems && targets.size(1) == n &&
                      is_weight(wq, 0) && is_weight(wk, 0) && moments.size(0) == 2 && moments.size(1) == 2 &&
                      is_weight(moments, 2) && n > 0 && basis > 0 && dim > 0 && rank > 0,
                  "convinit: shapes of tokens, directions, targets, wq, wk and moments do not fit, or the last three "
                  "are not contiguous");
  STD_TORCH_CHECK(heads > 0 && first_step >= 0 && steps >= 0, "convinit: heads must be positive, steps not negative");
  CONVINIT_CHECK_SAME_DEVICE(directions, tokens);
  CONVINIT_CHECK_SAME_DEVICE(targets, tokens);
  CONVINIT_CHECK_SAME_DEVICE(wq, tokens);
  CONVINIT_CHECK_SAME_DEVICE(wk, tokens);
  CONVINIT_CHECK_SAME_DEVICE(moments, tokens);
  // Within a head the kernel counts with 32 bits.
  STD_TORCH_CHECK((n + dim + kTile) * (2 * basis + rank + kStride) < INT_MAX && 2 * basis * rank < INT_MAX &&
                      problems < INT_MAX,
                  "convinit: the problem is too large for the CUDA kernel");
}

}  // namespace

Tensor qk_adam_cuda(const Tensor& tokens_, const Tensor& directions_, const Tensor& targets_, Tensor wq, Tensor wk,
                    Tensor moments, double scale, int64_t heads, double lr, int64_t first_step, int64_t steps) {
  check_qk_adam(tokens_, directions_, targets_, wq, wk, moments, heads, first_step, steps);
  const torch::stable::accelerator::DeviceGuard guard(tokens_.get_device_index());

  const Tensor tokens = torch::stable::contiguous(tokens_), directions = torch::stable::contiguous(directions_);
  const Tensor targets = torch::stable::contiguous(targets_);
  const int64_t n = tokens.size(0), basis = tokens.size(1), dim = directions.size(0);
  const int64_t problems = wq.size(0), rank = wq.size(2);
  Tensor loss = torch::stable::new_zeros(tokens, {problems});
  if (problems == 0 || steps == 0) return loss;

  QKAdamArgs args{};
  args.shape = {static_cast<int>(n), static_cast<int>(basis), static_cast<int>(basis), static_cast<int>(rank),
                static_cast<float>(scale)};
  args.problems = static_cast<int>(problems);
  args.dim = static_cast<int>(dim);
  args.first_step = first_step;
  args.steps = steps;
  args.lr = lr;
  args.beta1 = 0.9;
  args.beta2 = 0.999;
  args.eps = 1e-8;
  args.heads = static_cast<double>(heads);
  args.tokens = tokens.const_data_ptr<float>();
  args.directions = directions.const_data_ptr<float>();
  args.targets = targets.const_data_ptr<int64_t>();
  args.wq = wq.mutable_data_ptr<float>();
  args.wk = wk.mutable_data_ptr<float>();
  args.moments = moments.mutable_data_ptr<float>();
  args.loss = loss.mutable_data_ptr<float>();

  check_cuda(plan_qk_adam(args), "qk_adam");
  Carver size;
  args.carve(size);
  Tensor workspace = torch::stable::new_empty(tokens, {static_cast<int64_t>(size.bytes())}, ScalarType::Byte);
  Carver carver(workspace.mutable_data_ptr<uint8_t>());
  args.carve(carver);
  check_cuda(launch_qk_adam(args, current_stream(tokens)), "qk_adam");
  return loss;
}

}  // namespace convinit

STABLE_TORCH_LIBRARY_IMPL(convinit, CUDA, m) {
  m.impl("qk_adam", TORCH_BOX(&convinit::qk_adam_cuda));
}
