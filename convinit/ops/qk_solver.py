"""The polish of the Q/K fit: the attention map closest to given targets, for many problems in one basis."""

from __future__ import annotations

import torch
from torch import Tensor

from convinit import _library  # noqa: F401  registers torch.ops.convinit

DIAGNOSTICS = ("mse", "peak", "hit_rate", "weight_norm", "iterations", "evaluations")


def qk_solver(
    xq: Tensor,
    xk: Tensor,
    targets: Tensor,
    wq_starts: Tensor,
    wk_starts: Tensor,
    *,
    scale: float,
    weight_norm: Tensor | None = None,
    peak: float | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-2,
    monitor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises the mse of attention maps under a weight norm, or at the norm that gives a peak.

    For each problem b, with A = softmax(scale · (xq W_q)(xk W_k)ᵀ) and M[n, m] = (targets[b, n] == m):

        min mean((A − M)²)   subject to   ‖W_q‖_F = ‖W_k‖_F = weight_norm[b]

    by limited-memory BFGS on the directions of both factors, from the most promising of S starts. With `peak`
    the norm is a variable too, set so that the mean attention on the target is `peak`. Loss and gradient are
    taken in float32, sums and steps in float64.

    CPU: problems run in parallel, each on one thread; the result does not depend on the number of threads.
    CUDA: problems run at once, each on several thread blocks, in one launch that the host need not wait for;
    the same inputs on the same GPU give the same bits. Both follow one search, which rounding parts: at a
    weight norm each mse on CUDA is within 2 % of the CPU's. At a peak that is not guaranteed: the mean
    attention on the target is within 0.01 of the CPU's and the median mse within 5 %, but a problem may end
    in another minimum (14 % from the CPU's was seen; tests and benchmarks allow 20 %).

    Args:
        xq, xk: [N, dq], [N, dk] float64: the tokens in the query's and the key's basis.
        targets: [B, N] int64: the column that row n is to look at, or −1 for none.
        wq_starts, wk_starts: [S, B, dq, r], [S, B, dk, r] float64; of each only the direction counts.
        scale: softmax temperature, positive.
        weight_norm: [B] float64, or None when `peak` is given.
        peak: wanted mean attention on the target, in (0, 1). Where the rank cannot reach it, the norm is
            raised until that no longer helps; the diagnostics tell.
        max_iterations: bound on the descent; with `peak`, on a third of all descents together.
        tolerance: stop when ten iterations together lower the mse by less than this share of it.
        monitor: int64 [3] on the CPU, or None: how another thread ends the call and sees how far it is. The
            op stops when the first number is not 0, and what is not solved by then has undefined results; it
            counts problems solved in the second, evaluations of the loss in the third. CUDA uses none of it.

    Returns:
        W_q [B, dq, r], W_k [B, dk, r] and diagnostics [B, 6] (columns: `DIAGNOSTICS`), all float64.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or on a CPU a target is out of range; on CUDA that
            makes its problem's results NaN (`convinit.fit_qk` checks its arguments and explains them).

    Source: the loss is that of arXiv 2401.12511; the constraint and the method are ours.
    """
    return torch.ops.convinit.qk_solver(
        xq, xk, targets, wq_starts, wk_starts, scale, weight_norm, peak or 0.0, max_iterations, tolerance,
        monitor,
    )  # fmt: skip


def qk_solver_reference(
    xq: Tensor,
    xk: Tensor,
    targets: Tensor,
    wq_starts: Tensor,
    wk_starts: Tensor,
    *,
    scale: float,
    weight_norm: Tensor,
    max_iterations: int = 150,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_solver` at a given weight norm in plain PyTorch: autograd and torch.optim.LBFGS; one start."""
    mask = (targets >= 0)[:, :, None]
    target_map = xq.new_zeros(*targets.shape, targets.shape[1])
    target_map.scatter_(2, targets.clamp(min=0)[:, :, None], mask.to(xq.dtype))
    solutions = []
    for b in range(targets.shape[0]):
        factors = [(w[0, b] / w[0, b].norm()).contiguous().requires_grad_() for w in (wq_starts, wk_starts)]

        def weights(factors=factors, norm=weight_norm[b]):
            return [w * (norm / w.norm()) for w in factors]

        def loss(b=b, weights=weights):
            wq, wk = weights()
            attention = torch.softmax(scale * (xq @ wq) @ (xk @ wk).T, dim=-1)
            return (attention - target_map[b]).square().mean()

        optimizer = torch.optim.LBFGS(
            factors, max_iter=max_iterations, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        solutions.append([w.detach() for w in weights()] + [loss().detach()])
    wq, wk, mse = (torch.stack(column) for column in zip(*solutions, strict=True))
    return wq, wk, mse


@torch.library.register_fake("convinit::qk_solver")
def _(
    xq, xk, targets, wq_starts, wk_starts, scale, weight_norm, peak, max_iterations, tolerance, monitor=None
):
    problems, rank = wq_starts.shape[1], wq_starts.shape[3]
    return (
        xq.new_empty((problems, xq.shape[1], rank)),
        xq.new_empty((problems, xk.shape[1], rank)),
        xq.new_empty((problems, len(DIAGNOSTICS))),
    )
