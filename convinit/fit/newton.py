"""Our fit: a reduced basis, one problem per distinct target, a closed-form start, and a quasi-Newton polish.

1. Reduced basis. Only directions in which P varies can carry a map, and a constant added to a row of logits
changes
   nothing. So queries live in the row space of P, keys in that of the centred P: a 512-dimensional sin-cos
   embedding of a 16 × 16 grid leaves 19 and 20 unknowns a column. Weights outside these spaces would only add
   norm.
2. One problem per distinct target: heads that share one get the same map from different weights, (W_q R, W_k
R) with R
   a random rotation of the head's space.
3. Start. Ridge least squares of the logits to the centred target, C = argmin ‖Xq C Xkᵀ − M‖² + λ‖C‖², is
elementwise in
   the two bases; the balanced factors of its rank-r truncation are the start.
4. Polish: `convinit.ops.qk_solver`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from convinit._progress import progress
from convinit.ops.qk_solver import DIAGNOSTICS, qk_solver

# Directions this much weaker than the strongest cannot carry a map at any sensible norm.
_SMALLEST_DIRECTION = 1e-4
# λ relative to the fourth power of the largest singular value: the first suits flat spectra (learned
# embeddings), the second steep ones (sin-cos); the solver takes the better start.
_RIDGES = (1.0, 1e-2)
_PEAK_TOLERANCE = 0.02
_EXACT_SVD = 256  # matrices up to this size are decomposed exactly


@dataclass(frozen=True)
class Newton:
    """Options of method "newton".

    Attributes:
        max_iterations: bound on the quasi-Newton iterations of one problem.
        tolerance: stop when ten iterations together lower the mse by less than this share of it.
    """

    max_iterations: int = 200
    tolerance: float = 1e-2


def fit(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    *,
    scale: float,
    method: Newton,
    weight_norm: Tensor | None,
    peak: float | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """W_q, W_k [B, D, r] and metrics [B]; arguments as checked by `convinit.fit.api`, all on the CPU."""
    P = pos_embed.double()
    distinct_targets, distinct_norms, problem_of_head = _distinct(targets, weight_norm)
    Vq, Xq = row_space(P)
    Vk, Xk = row_space(P - P.mean(dim=0))
    starts = ridge_starts(Xq, Xk, distinct_targets, min(rank, Xq.shape[1], Xk.shape[1]))
    wq, wk, diagnostics = _solve(Xq, Xk, distinct_targets, *starts, scale, distinct_norms, peak, method)
    if peak is not None:
        _warn_if_missed(peak, diagnostics[problem_of_head, DIAGNOSTICS.index("peak")], rank)

    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    rotation = random_rotations(len(targets), rank, wq.shape[2], generator).to(dtype)  # [B, k, r]
    wq, wk = ((V @ w).to(dtype)[problem_of_head] @ rotation for V, w in ((Vq, wq), (Vk, wk)))
    metrics = {name: diagnostics[problem_of_head, i] for i, name in enumerate(DIAGNOSTICS[:4])}
    return wq, wk, metrics


def row_space(P: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis V [D, ρ] of the row space of P [N, D], strongest first, and X = P V [N, ρ]."""
    n, dim = P.shape
    # Squaring P halves the digits of the small singular values; those kept have plenty left in float64.
    energy, V = torch.linalg.eigh(P @ P.T if n < dim else P.T @ P)
    kept = energy > _SMALLEST_DIRECTION**2 * energy[-1]
    energy, V = energy[kept].flip(0), V[:, kept].flip(1)
    if n < dim:
        V = (P.T @ V) / energy.sqrt()
    return V, P @ V


def ridge_starts(Xq: Tensor, Xk: Tensor, targets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors [S, B, ρ, rank] of the ridge solutions for targets [B, N].

    Xq [N, ρq] and Xk [N, ρk] have orthogonal columns, those of Xk with mean zero. So the centring of M drops
    out and C = Xqᵀ M Xk / (σq² σk² + λ), σ the column norms.
    """
    sq, sk = Xq.norm(dim=0), Xk.norm(dim=0)
    target_keys = Xk[targets.clamp(min=0)] * (targets >= 0)[:, :, None]  # M Xk [B, N, ρk]
    overlap = Xq.T @ target_keys  # [B, ρq, ρk]
    ridge = torch.tensor(_RIDGES, dtype=Xq.dtype)[:, None, None, None] * sk[0] ** 4
    U, S, Vh = _truncated_svd(overlap / ((sq[:, None] * sk) ** 2 + ridge), rank)
    return U * S.sqrt()[..., None, :], Vh.mT * S.sqrt()[..., None, :]


def _truncated_svd(C: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples of C [..., m, n]: U [..., m, rank], S [..., rank], Vh [..., rank, n].

    Large matrices: randomised range finder with power iterations (Halko, Martinsson, Tropp, SIAM Review 53,
    2011); the result only starts an optimisation, and the seed is fixed.
    """
    if min(C.shape[-2:]) > max(_EXACT_SVD, 2 * rank):
        probe = torch.randn(C.shape[-1], rank + 8, dtype=C.dtype, generator=torch.Generator().manual_seed(0))
        Q = torch.linalg.qr(C @ probe).Q
        for _ in range(2):
            Q = torch.linalg.qr(C @ torch.linalg.qr(C.mT @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ C, full_matrices=False)
        U = Q @ U
    else:
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def random_rotations(count: int, size: int, rows: int, generator: torch.Generator | None) -> Tensor:
    """The first `rows` rows of `count` uniformly distributed rotations of a `size`-dimensional space."""
    normal = torch.randn(count, size, rows, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(normal)
    # QR leaves the signs of R's diagonal open; fixing them makes Q uniform (Mezzadri, Notices of the AMS 54,
    # 2007).
    return (Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]).mT


def _distinct(targets: Tensor, weight_norm: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Distinct problems among heads: their targets [U, N] and norms [U], and the problem of each head [B]."""
    if weight_norm is None:
        distinct, problem_of_head = torch.unique(targets, dim=0, return_inverse=True)
        return distinct, None, problem_of_head
    norms, norm_index = torch.unique(weight_norm, return_inverse=True)
    keys, problem_of_head = torch.unique(
        torch.cat([targets, norm_index[:, None]], dim=1), dim=0, return_inverse=True
    )
    return keys[:, :-1].contiguous(), norms[keys[:, -1]], problem_of_head


def _solve(Xq, Xk, targets, wq_starts, wk_starts, scale, weight_norm, peak, method: Newton):
    """`qk_solver` a few problems at a time, so that a long fit shows its progress and can be interrupted."""
    chunk = 4 * torch.get_num_threads()
    results = []
    for i in progress(range(0, max(len(targets), 1), chunk), "fitting queries and keys"):
        here = slice(i, i + chunk)
        results.append(
            qk_solver(
                Xq, Xk, targets[here], wq_starts[:, here], wk_starts[:, here], scale=scale,
                weight_norm=None if weight_norm is None else weight_norm[here], peak=peak,
                max_iterations=method.max_iterations, tolerance=method.tolerance,
            )
        )  # fmt: skip
    return (torch.cat(parts) for parts in zip(*results, strict=True))


def _warn_if_missed(peak: float, reached: Tensor, rank: int) -> None:
    missed = (reached - peak).abs() > _PEAK_TOLERANCE
    if missed.any():
        warnings.warn(
            f"peak={peak} was not reached by {int(missed.sum())} of {len(reached)} heads: they got "
            f"{reached[missed].min():.3f} to {reached[missed].max():.3f} (QKFit.peak has all). "
            f"Rank {rank} or this position embedding allows no sharper map; ask for less or raise the rank.",
            stacklevel=5,
        )
