"""The best impulse that rotary position embedding carries: how much each frequency pair is to count.

Query and key biases give a token logits that depend on the displacement δ of the other token alone,
ℓ(δ) = Σ_m w_m cos(θ_m · (δ − offset)), with w ≥ 0 and θ_m = (θ_y, θ_x) the turn of pair m from one token to
the next. Against the target, where every cosine is 1, that is linear in w with features
f_m(δ) = cos(θ_m · (δ − offset)) − 1 ≤ 0. So the mean log attention on the target,

    J(w) = −mean_n log Σ_{n + δ on the grid} exp(Σ_m w_m f_m(δ)),

is concave, and no w_m lowers it. Solved here: maximise J for a given Σ w, which is the squared norm of the
biases times the scale; or follow those maxima to the Σ w that gives a wanted peak. A primal-dual
interior-point method takes some ten Newton steps (Nocedal and Wright, Numerical Optimization, ch. 14 and 19).

As ℓ depends on δ alone, the sums over rows are sums over windows of the (2H − 1) × (2W − 1) displacements: an
iteration costs H · W · r² multiplications, not (H · W)² · r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Logits of this size are beyond what any map needs and soon beyond what half precision holds.
LARGEST_TOTAL = 1e3
_FIRST_TOTAL = 5.0  # where a search for a peak starts; each step raises logit(peak) by at most
_LARGEST_RISE = 1.0
_TOLERANCE = 1e-4  # in J: nats by which a map of the same norm could be better; and in logit(peak)
_MAX_ITERATIONS = 60


class RotaryImpulse:
    """The problem of one offset on one grid: displacements that count, and their features.

    Args:
        steps: θ [2, m] float64: the turn of each pair from one token to the next below and to the next right.
        offset: (dy, dx), with a target on the grid for some row.
        grid_size: (H, W).
    """

    def __init__(self, steps: Tensor, offset: Sequence[int], grid_size: tuple[int, int]) -> None:
        (dy, dx), (height, width) = offset, grid_size
        y, x = (torch.arange(1 - size, size, device="cpu") - by for size, by in ((height, dy), (width, dx)))
        self.features = (
            torch.cos(y[:, None, None] * steps[0] + x[:, None] * steps[1]) - 1
        )  # [2H − 1, 2W − 1, m]
        self.rows_y, self.rows_x = _windows(height, dy), _windows(width, dx)

    def row_sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """exp(f · w) [2H − 1, 2W − 1], and its sum over the window of each row that has a target."""
        weights = torch.exp(self.features @ w)
        return weights, self.rows_y @ weights @ self.rows_x.mT

    def peak(self, w: Tensor) -> float:
        return self.row_sums(w)[1].reciprocal().mean().item()

    def derivatives(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """∇J [m], −∇²J [m, m], the peak and its gradient [m]."""
        weights, sums = self.row_sums(w)
        on_target, pairs = sums.reciprocal(), w.shape[0]
        share = weights * (self.rows_y.mT @ on_target @ self.rows_x) / sums.numel()  # mean attention at δ
        mean = self.rows_y @ (weights[..., None] * self.features).flatten(1)
        mean = self.rows_x @ mean.view(-1, weights.shape[1], pairs) * on_target[..., None]
        mean, on_target = mean.view(-1, pairs), on_target.flatten()  # mean of the features in each row
        features = self.features.view(-1, pairs)
        curvature = (features * share.view(-1, 1)).mT @ features - mean.mT @ mean / len(mean)
        return -mean.mean(dim=0), curvature, on_target.mean(), -(on_target @ mean) / len(mean)


def best_for_total(problem: RotaryImpulse, total: float) -> Tensor:
    """w [m] of the highest J with Σ w = total."""
    return _newton(problem, total, None)


def best_for_peak(problem: RotaryImpulse, peak: float) -> Tensor:
    """w [m] of the smallest Σ w whose best J has this peak.

    Where that is out of reach: of Σ w = LARGEST_TOTAL, or 0 if uniform attention is as sharp already.
    """
    nothing = problem.features.new_zeros(problem.features.shape[2])
    if problem.peak(nothing) >= peak:
        return nothing
    w = _newton(problem, _FIRST_TOTAL, peak)
    return w if w.sum() < LARGEST_TOTAL else best_for_total(problem, LARGEST_TOTAL)


def _newton(problem: RotaryImpulse, total: float, peak: float | None) -> Tensor:
    """Newton steps on  ∇J + z = λ,  w z = μ → 0  and  Σ w = total, or if given logit(peak)."""
    pairs = problem.features.shape[2]
    w = problem.features.new_full((pairs,), total / pairs)
    multiplier, z = None, w
    for _ in range(_MAX_ITERATIONS):
        gradient, curvature, reached, peak_gradient = problem.derivatives(w)
        if peak is None:
            goal, missing = torch.ones_like(w), total - w.sum()
        else:
            goal = peak_gradient / (reached * (1 - reached))
            missing = math.log(peak / (1 - peak)) - torch.logit(reached)
        gap = gradient.max() * w.sum() - gradient @ w
        if max(gap, missing.abs()) < _TOLERANCE or (peak is not None and w.sum() > LARGEST_TOTAL):
            break
        if multiplier is None:
            multiplier = 1.1 * gradient.max()
            z = multiplier - gradient
        mu = 0.1 * (w @ z) / pairs
        system = w.new_zeros(pairs + 1, pairs + 1)
        system[:-1, :-1] = curvature + torch.diag(z / w)
        system[:-1, -1], system[-1, :-1] = 1, goal
        right = torch.cat(
            [gradient - multiplier + mu / w, missing.clamp(-_LARGEST_RISE, _LARGEST_RISE)[None]]
        )
        solution = torch.linalg.solve(system, right)
        dw, dz = solution[:-1], mu / w - z - z / w * solution[:-1]
        w = w + _longest_step(w, dw) * dw
        z, multiplier = z + (share := _longest_step(z, dz)) * dz, multiplier + share * solution[-1]
    return w


def _longest_step(values: Tensor, change: Tensor) -> Tensor:
    """At most 1, and so that positive values stay so."""
    return 0.95 / (-change / values).max().clamp(min=0.95)


def _windows(size: int, offset: int) -> Tensor:
    """1 where a row with a target has a token at displacement 1 − size … size − 1: [rows, 2 size − 1]."""
    row = torch.arange(max(0, -offset), min(size, size - offset), device="cpu")[:, None]
    column = row + torch.arange(1 - size, size, device="cpu")
    return ((column >= 0) & (column < size)).double()
