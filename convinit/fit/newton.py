"""Our fit: a reduced basis, one problem per distinct target, a closed-form start, and a quasi-Newton polish.

1. Reduced basis. Only directions in which P varies can carry a map, and a constant added to a row of logits
   changes nothing. So queries live in the row space of P, keys in that of the centred P: a 512-dimensional
   sin-cos embedding of a 16 × 16 grid leaves 21 and 20 unknowns a column. Weights outside these spaces would
   only add norm.
2. One problem per distinct target. Heads that share one get the same map from other weights, (W_q R, W_k R)
   with R a random rotation of the head's space. Where mirroring the grid merely turns P, as it does sin-cos
   embeddings, mirrored targets are one problem too: the 25 offsets of a 5 × 5 window are 6 on a square grid.
3. Start. Ridge least squares of the logits to the centred target, C = argmin ‖Xq C Xkᵀ − M‖² + λ‖C‖², is
   elementwise in the two bases; the balanced factors of its rank-r truncation are the start.
4. Polish: `convinit.ops.qk_solver`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from convinit._checks import check_int, check_real
from convinit._progress import interruptible
from convinit.ops.qk_solver import DIAGNOSTICS, qk_solver

# Directions this much weaker than the strongest cannot carry a map at any sensible norm.
_SMALLEST_DIRECTION = 1e-4
# λ relative to the fourth power of the largest singular value: the first suits flat spectra (learned
# embeddings), the second steep ones (sin-cos); the solver takes the better start.
_RIDGES = (1.0, 1e-2)
_SYMMETRY_TOLERANCE = 1e-3
_EXACT_SVD = 256  # matrices up to this size are decomposed exactly


@dataclass(frozen=True)
class Newton:
    """Options of ``fit="newton"``.

    Attributes:
        max_iterations: bound on the quasi-Newton iterations of one problem.
        tolerance: stop when ten iterations together lower the mse by less than this share of it.
    """

    max_iterations: int = 200
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        check_int("max_iterations", self.max_iterations, minimum=0, maximum=2**31 - 1)
        if check_real("tolerance", self.tolerance) < 0:
            raise ValueError(f"tolerance must be finite and at least 0, got {self.tolerance}")


def fit(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    *,
    scale: float,
    options: Newton,
    weight_norm: Tensor | None,
    peak: float | None,
    symmetries: Tensor,
    exponent: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """2^exponent · W_q, W_k [B, D, r] float64; arguments as checked by `convinit.fit.api`, all on the CPU.

    device: where the solver runs; all else is small.
    symmetries [G, N]: permutations of the tokens that may leave P's Gram matrix as it is; the identity first.
    """
    P = pos_embed.double()
    # Where singular values coincide, as those of sin-cos do, rounding chooses their vectors; on one thread
    # the choice is always the same. The solver does not depend on the number of threads.
    with one_thread():
        (Vq, Xq), (Vk, Xk) = reduced_bases(P)
        symmetries, turns_q, turns_k = true_symmetries(symmetries, Xq, Xk)
        problems, norms, problem_of_head, symmetry_of_head = distinct_problems(
            targets, weight_norm, symmetries
        )
        starts = ridge_starts(Xq, Xk, problems, min(rank, Xq.shape[1], Xk.shape[1]))
    wq, wk = _solve(Xq, Xk, problems, *starts, scale, norms, peak, options, device)
    with one_thread():
        rotation = random_rotations(len(targets), rank, wq.shape[2], generator)  # [B, k, r]
        wq, wk = (
            V @ (turns[symmetry_of_head] @ times_two_to(exponent, w)[problem_of_head] @ rotation)
            for V, turns, w in ((Vq, turns_q, wq), (Vk, turns_k, wk))
        )
    return wq, wk


def times_two_to(exponent: int, x: Tensor) -> Tensor:
    if abs(exponent) < 1000:
        return x * 2.0**exponent
    half = exponent // 2  # 2^exponent itself may be beyond a float
    return x * 2.0**half * 2.0 ** (exponent - half)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def reduced_bases(P: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Orthonormal bases V [D, ρ] of queries and of keys, each with the tokens in it, X = P V [N, ρ].

    Keys: the row space of the centred P, and the centred P in it. Queries: the same and the mean of P, which
    they do feel; turned so that the columns of X are orthogonal, strongest first.
    """
    mean = P.mean(dim=0)
    centred = P - mean
    n, dim = P.shape
    # Squaring P halves the digits of the small singular values; those kept have plenty left in float64.
    energy, V = torch.linalg.eigh(centred @ centred.T if n < dim else centred.T @ centred)
    floor = _SMALLEST_DIRECTION**2 * energy[-1]
    energy, V = energy[energy > floor].flip(0), V[:, energy > floor].flip(1)
    Vk = (centred.T @ V) / energy.sqrt() if n < dim else V

    beside = mean - Vk @ (Vk.T @ mean)
    Vq = (
        torch.cat([Vk, (beside / beside.norm())[:, None]], dim=1) if n * beside.square().sum() > floor else Vk
    )
    Vq = Vq @ torch.linalg.eigh((P @ Vq).T @ (P @ Vq)).eigenvectors.flip(1)
    return (Vq, P @ Vq), (Vk, centred @ Vk)


def ridge_starts(Xq: Tensor, Xk: Tensor, targets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors [S, B, ρ, rank] of the ridge solutions for targets [B, N].

    Xq [N, ρq] and Xk [N, ρk] have orthogonal columns, those of Xk with mean zero. So the centring of M drops
    out and C = Xqᵀ M Xk / (σq² σk² + λ), σ the column norms.
    """
    sq, sk = Xq.norm(dim=0), Xk.norm(dim=0)
    ridge = torch.tensor(_RIDGES, dtype=Xq.dtype)[:, None, None, None] * sk[0] ** 4
    starts = []
    for few in targets.split(4) if len(targets) else (targets,):  # between which Ctrl-C is heard
        target_keys = Xk[few.clamp(min=0)] * (few >= 0)[:, :, None]  # M Xk [B, N, ρk]
        overlap = Xq.T @ target_keys  # [B, ρq, ρk]
        U, S, Vh = _truncated_svd(overlap / ((sq[:, None] * sk) ** 2 + ridge), rank)
        starts.append((U * S.sqrt()[..., None, :], Vh.mT * S.sqrt()[..., None, :]))
    wq, wk = (torch.cat(part, dim=1) for part in zip(*starts, strict=True))
    return wq, wk


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


def true_symmetries(permutations: Tensor, *bases: Tensor) -> tuple[Tensor, ...]:
    """The permutations [G, N] that merely turn each basis X [N, ρ], X[permutation] = X T, and T [G, ρ, ρ].

    The first must be the identity.
    """
    turns = [(X / X.square().sum(dim=0)).T @ X[permutations] for X in bases]  # least squares
    kept = torch.ones(len(permutations), dtype=torch.bool)
    for X, T in zip(bases, turns, strict=True):
        missed = (X @ T - X[permutations]).abs().amax(dim=(1, 2)) / X.abs().max()
        unequal = (T @ T.mT - torch.eye(T.shape[1], dtype=T.dtype)).abs().amax(dim=(1, 2))
        kept &= torch.maximum(missed, unequal) < _SYMMETRY_TOLERANCE
    kept[0] = True
    for T in turns:  # the identity, whatever rounding makes of it
        T[0] = torch.eye(T.shape[1], dtype=T.dtype)
    return permutations[kept], *(T[kept] for T in turns)


def distinct_problems(
    targets: Tensor, weight_norm: Tensor | None, symmetries: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Problems that differ by more than a symmetry, and how heads map to them.

    Returns their targets [U, N] and norms [U], and for each head [B] its problem and the symmetry that takes
    the head's targets to the problem's.
    """
    norms, norm_of_head = None, targets.new_zeros(len(targets))
    if weight_norm is not None:
        norms, norm_of_head = torch.unique(weight_norm, return_inverse=True)
    keys = torch.cat([targets, norm_of_head[:, None]], dim=1)
    keys, key_of_head = torch.unique(keys, dim=0, return_inverse=True)
    keys, problem_of_key, symmetry_of_key = _canonical(keys, symmetries)
    problems = keys[:, :-1].contiguous()
    return (
        problems,
        None if norms is None else norms[keys[:, -1]],
        problem_of_key[key_of_head],
        symmetry_of_key[key_of_head],
    )


def _canonical(keys: Tensor, symmetries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each key [U, N + 1] stands for its images under the symmetries: for the first of them in lexical order.

    Returns the distinct ones, and for each key which of them it is and by which symmetry.
    """
    targets, norm = keys[:, :-1], keys[:, -1:]
    images = []
    for permutation in symmetries:  # token n goes to permutation[n], and so does its target
        image = torch.empty_like(targets)
        image[:, permutation] = torch.where(targets < 0, -1, permutation[targets.clamp(min=0)])
        images.append(torch.cat([image, norm], dim=1))
    distinct, which = torch.unique(torch.cat(images), dim=0, return_inverse=True)
    first, symmetry = which.view(len(symmetries), len(keys)).min(dim=0)
    used, problem = torch.unique(first, return_inverse=True)
    return distinct[used], problem, symmetry


def _solve(
    Xq: Tensor,
    Xk: Tensor,
    targets: Tensor,
    wq_starts: Tensor,
    wk_starts: Tensor,
    scale: float,
    weight_norm: Tensor | None,
    peak: float | None,
    options: Newton,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The weights of `qk_solver` on `device`, as they come on the CPU; ValueError if they left float32."""
    inputs = (x.to(device) for x in (Xq, Xk, targets, wq_starts, wk_starts))
    with torch.inference_mode(False):  # which is not that of the thread that will write it
        monitor = torch.zeros(3, dtype=torch.int64)  # see QKMonitor in csrc/qk_objective.h
    call = partial(
        qk_solver, *inputs, scale=scale, weight_norm=None if weight_norm is None else weight_norm.to(device),
        peak=peak, max_iterations=options.max_iterations, tolerance=options.tolerance,
    )  # fmt: skip
    if device.type == "cpu":
        found = interruptible(partial(call, monitor=monitor), monitor, "fitting queries and keys")
    else:  # another thread would be on another stream
        found = call()
    wq, wk, diagnostics = (x.cpu() for x in found)
    if not diagnostics[:, : DIAGNOSTICS.index("iterations")].isfinite().all():
        raise ValueError(
            "weight_norm makes logits beyond the range of float32 with this scale and pos_embed, "
            f"mean attention came to {diagnostics[:, DIAGNOSTICS.index('peak')].tolist()}: give a smaller "
            "weight_norm, or a peak instead"
        )
    return wq, wk
