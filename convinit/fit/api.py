"""`fit_qk` and `fit_targets`: checks, the choice of solver, and the result's metrics."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit import _library
from convinit._checks import (
    came,
    check_choice,
    check_finite,
    check_generator,
    check_grid_size,
    check_int,
    check_number,
    check_offsets,
    check_tensor,
)
from convinit.fit import newton, papers
from convinit.fit.result import QKFit, attention_maps, map_metrics, norms_of, warn_if_missed
from convinit.offsets import impulse_targets

Solver = newton.Newton | papers.Adam | papers.SVD

SOLVERS: dict[str, Solver] = {"newton": newton.Newton(), "adam": papers.Adam(), "svd": papers.SVD()}
# Below this rms no norm has been in front of P, and above this weight norm something ought to be.
SMALLEST_POSITION = 0.1
_LARGEST_NORM = 100.0
_MAP_ENTRIES = 2**20  # of maps that are measured at once
# Digits, 20 epochs, 3 seeds: peaks 0.5 and 0.7 kept 72 and 69 % on shifted images, 0.8 and 0.9 kept 64 and
# 61 %. Speed of learning was not clearly apart.
DEFAULT_PEAK = 0.7


@torch.no_grad()
def fit_qk(
    pos_embed: Tensor,
    offsets: Tensor,
    grid_size: Sequence[int],
    rank: int,
    *,
    scale: float,
    fit: str | Solver = "newton",
    weight_norm: float | Tensor | None = None,
    peak: float | None = None,
    padding_mode: str = "zeros",
    generator: torch.Generator | None = None,
) -> QKFit:
    """Fits query and key weights whose attention on a position embedding is a random impulse convolution.

    softmax(scale · (P W_q[b]) (P W_k[b])ᵀ) ≈ impulse_matrix(offsets[b])

    Args:
        pos_embed: P [N, D], any floating dtype: what the attention layer sees, so LayerNorm(P) where it comes
            after a norm, and multiplied by 1 − alpha (or any gain) where the layer does so. On a CUDA device
            the iterations run there, if the CUDA ops are built.
        offsets: [B, 2], any integer dtype: (dy, dx) in tokens, one per head, at most the grid's size.
        grid_size: (H, W); N = H · W tokens, row-major.
        rank: head dimension r, at most D.
        scale: softmax temperature σ, positive; usually r**-0.5.
        fit: the solver: "newton" (ours), "adam" (arXiv 2401.12511, 2404.01139), "svd" (arXiv 2505.19985), or
            one of `convinit.fit.Newton`, `Adam`, `SVD` with options.
        weight_norm: "newton" only: the Frobenius norm of W_q and of W_k, one number or [B]; more is sharper.
        peak: "newton" only: the wanted mean attention on the target, in (0, 1); the norm follows. If
            neither is given, peak = 0.7. A map too sharp is hard to unlearn.
        padding_mode: where rows look whose target leaves the grid: "zeros" (nowhere), "replicate",
            "circular", "reflect".
        generator: CPU generator for all draws.

    Returns:
        QKFit with wq, wk [B, D, r] on the device and in the dtype of `pos_embed`, and mse, peak, hit_rate,
        weight_norm [B] of these weights, as rounded to that dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value, or the dtype of `pos_embed`
            does not hold the fitted weights: whatever is returned is finite.

    Warns:
        UserWarning: the wanted peak is out of reach; the best map is returned. Or P is so small that it must
            be missing the LayerNorm in front of the attention.

    Source: arXiv 2401.12511, states the problem (mse of the maps). "newton" departs from
    it: it solves in the row space of P, once per distinct offset, under an exact weight norm.
    """
    height, width = check_grid_size(grid_size)
    offsets, targets = impulses(offsets, (height, width), padding_mode=padding_mode)
    _check_pos_embed(pos_embed)
    if pos_embed.shape[0] != height * width:
        raise ValueError(
            f"pos_embed must have a row for each of {height} x {width} tokens, [{height * width}, D], got "
            f"{list(pos_embed.shape)}; leave class and register tokens out"
        )
    return _fit(pos_embed, targets, rank, scale, fit, weight_norm, peak, generator, offsets, (height, width))


@torch.no_grad()
def fit_targets(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    *,
    scale: float,
    fit: str | Solver = "newton",
    weight_norm: float | Tensor | None = None,
    peak: float | None = None,
    generator: torch.Generator | None = None,
) -> QKFit:
    """Fits query and key weights to any one-hot attention maps; `fit_qk` for targets other than a shift.

    softmax(scale · (P W_q[b]) (P W_k[b])ᵀ)[n] ≈ one_hot(targets[b, n])

    For controls (a random permutation instead of a shift), or for other structures than a square grid.

    Args:
        targets: [B, N] int64: the token that each token is to look at; −1 for a row that is to look nowhere.
        Others: as in `fit_qk`.

    Returns, raises, warns: as `fit_qk`; `QKFit.offsets` is None.
    """
    _check_pos_embed(pos_embed)
    n = pos_embed.shape[0]
    check_tensor("targets", targets, f"[B, {n}]", dims=2, dtypes=(torch.int64,), values=True)
    if targets.shape[1] != n:
        raise ValueError(
            f"targets must have shape [B, {n}], one token per row of pos_embed, got {list(targets.shape)}"
        )
    if ((targets < -1) | (targets >= n)).any():
        raise ValueError(
            f"targets must lie in [-1, {n - 1}], got {targets.min().item()} to {targets.max().item()}"
        )
    if (targets < 0).all(dim=1).any():
        raise ValueError(
            "targets must have at least one row with a target in each head, got a head of -1 alone"
        )
    return _fit(pos_embed, targets, rank, scale, fit, weight_norm, peak, generator, None, None)


def impulses(
    offsets: Tensor, grid_size: tuple[int, int], *, padding_mode: str = "zeros"
) -> tuple[Tensor, Tensor]:
    """`offsets` [B, 2] as int64 and their targets [B, N]; refuses what leaves no target on the grid."""
    height, width = grid_size
    offsets = check_offsets(offsets, values=True)
    reach = torch.tensor([height, width], device=offsets.device)
    outside = ((offsets < -reach) | (offsets > reach)).any(dim=1)
    if outside.any():
        worst = tuple(offsets[outside][0].tolist())
        raise ValueError(f"offsets must lie in [-H, H] x [-W, W] of the {height} x {width} grid, got {worst}")
    targets = impulse_targets(offsets, grid_size, padding_mode=padding_mode)
    empty = (targets < 0).all(dim=1)
    if empty.any():
        raise ValueError(
            f"offsets must leave some target on the {height} x {width} grid, but "
            f"{tuple(offsets[empty][0].tolist())} leaves none with padding_mode='zeros'"
        )
    return offsets, targets


def grid_symmetries(height: int, width: int) -> Tensor:
    """The token permutations [G, N] that mirror the grid, and where it is square also transpose it."""
    grid = torch.arange(height * width).view(height, width)
    images = [grid, grid.flip(0), grid.flip(1), grid.flip(0, 1)]
    if height == width:
        images += [image.T for image in images]
    return torch.stack([image.flatten() for image in images])


def _fit(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    scale: float,
    fit: str | Solver,
    weight_norm: float | Tensor | None,
    peak: float | None,
    generator: torch.Generator | None,
    offsets: Tensor | None,
    grid_size: tuple[int, int] | None,
) -> QKFit:
    start = time.perf_counter()
    solver = check_solver(fit)
    check_generator(generator)
    rank = check_int("rank", rank)
    if rank > pos_embed.shape[1]:
        raise ValueError(f"rank must be at most D = {pos_embed.shape[1]}, got {rank}")
    scale = check_number("scale", scale)
    # Bases, starts and draws are made on the CPU, the same for every device, and also where the user has set
    # another default device; the iterations run where pos_embed is.
    device = _library.op_device(pos_embed.device)
    with torch.device("cpu"):
        P, targets = pos_embed.detach().cpu().clone(), targets.cpu().clone()
        if isinstance(solver, newton.Newton):
            weight_norm, peak = check_goal(weight_norm, peak, len(targets))
        elif weight_norm is not None or peak is not None:
            raise ValueError(
                f"weight_norm and peak belong to fit='newton', got fit={fit!r}; "
                "the papers' fits are steered by their own options"
            )
        if isinstance(solver, papers.Adam):
            wq, wk = papers.fit_adam(
                P, targets, rank, scale=scale, options=solver, generator=generator, device=device
            )
        else:
            unit_P, unit_scale, exponent = _in_units(P, scale)
            if isinstance(solver, newton.Newton):
                symmetries = torch.arange(len(P))[None] if grid_size is None else grid_symmetries(*grid_size)
                wq, wk = newton.fit(
                    unit_P, targets, rank, scale=unit_scale, options=solver, peak=peak, symmetries=symmetries,
                    weight_norm=None if weight_norm is None else newton.times_two_to(exponent, weight_norm),
                    exponent=-exponent, generator=generator, device=device,
                )  # fmt: skip
            else:
                wq, wk = papers.fit_svd(unit_P, targets, rank, options=solver, generator=generator)
        wq, wk, metrics = _rounded(wq, wk, P, targets, scale, solver)
        if peak is not None:
            remedy = f"Rank {rank} or this position embedding allows no sharper map; ask for less."
            warn_if_missed(peak, metrics["peak"], remedy, stacklevel=4)  # fit_qk's caller, past its decorator
            _warn_of_small_position(P, metrics["weight_norm"], stacklevel=5)
    device = pos_embed.device
    return QKFit(
        wq=wq.to(device), wk=wk.to(device), **metrics, targets=targets.to(device),
        offsets=None if offsets is None else offsets.to(device), pos_embed=P.to(device), scale=scale,
        fit=solver, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _warn_of_small_position(P: Tensor, weight_norm: Tensor, *, stacklevel: int) -> None:
    size = P.double().square().mean().sqrt().item()
    if size < SMALLEST_POSITION and (weight_norm > _LARGEST_NORM).any():
        warnings.warn(
            f"pos_embed is so small (rms {size:.2g}) that queries and keys get weights of norm "
            f"{weight_norm.max().item():.3g}, with which any content saturates the maps. Attention behind a "
            "LayerNorm sees LayerNorm(P), of rms 1: pass F.layer_norm(pos_embed, pos_embed.shape[1:])",
            stacklevel=stacklevel,
        )


def _in_units(P: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """P / 2^e in float64 with a largest entry in [½, 1), scale / 4^k in [½, 2), and e + k.

    scale · (P W_q)(P W_k)ᵀ stays as it is if W is 2^(e + k) times as large. Powers of two change no digit,
    but products of small or large numbers stay within the range of the dtype.
    """
    exponent = math.frexp(P.double().abs().max().item())[1]
    k = math.frexp(scale)[1] // 2
    return newton.times_two_to(-exponent, P.double()), math.ldexp(scale, -2 * k), exponent + k


def _rounded(
    wq: Tensor, wk: Tensor, P: Tensor, targets: Tensor, scale: float, solver: Solver
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The weights in the dtype of P, and their metrics; ValueError if that dtype does not hold them."""
    rounded = [w.to(P.dtype) for w in (wq, wk)]
    norms_before = [norms_of(w) for w in (wq, wk)]
    if not all(norms.isfinite().all() for norms in norms_before):
        raise ValueError(
            f"the fit left the range of numbers, with scale = {scale:.3g} and fit = {solver}: give a "
            "scale, a weight_norm, a learning rate or a pos_embed closer to 1"
        )
    norms_after = [norms_of(w) for w in rounded]
    for norms, kept in zip(norms_before, norms_after, strict=True):
        if not ((kept - norms).abs() <= 0.01 * norms).all():
            raise ValueError(
                f"pos_embed has the dtype {P.dtype}, which does not hold the fitted weights, of norms "
                f"{norms.min():.3g} to {norms.max():.3g}: pass pos_embed in a wider dtype, or ask for "
                "another scale or weight_norm"
            )
    wq, wk = rounded
    metrics = _measure(wq, wk, P, targets, scale)
    metrics["weight_norm"] = norms_after[0].sqrt() * norms_after[1].sqrt()
    if not all(values.isfinite().all() for values in metrics.values()):
        raise ValueError(
            f"scale = {scale:.3g} and weight_norm up to {metrics['weight_norm'].max():.3g} make logits "
            "beyond the range of numbers: give smaller ones"
        )
    return wq, wk, metrics


def _measure(wq: Tensor, wk: Tensor, P: Tensor, targets: Tensor, scale: float) -> dict[str, Tensor]:
    """The metrics of given weights in float64, a few heads at a time: they have N² entries each."""
    few = max(1, _MAP_ENTRIES // len(P) ** 2)
    P, groups = P.double(), zip(*(x.split(few) for x in (wq, wk, targets)), strict=True)
    rows = [map_metrics(attention_maps(q.double(), k.double(), P, scale), target) for q, k, target in groups]
    mse, peak, hit_rate = torch.cat([torch.stack(row) for row in rows], dim=1)
    return {"mse": mse, "peak": peak, "hit_rate": hit_rate}


def _check_pos_embed(pos_embed: Tensor) -> None:
    check_tensor("pos_embed", pos_embed, "[N, D] (no batch dimension)", dims=2, values=True)
    if 0 in pos_embed.shape:
        raise ValueError(f"pos_embed must have shape [N, D], neither of them 0, got {list(pos_embed.shape)}")
    check_finite("pos_embed", pos_embed)
    if (pos_embed == pos_embed[:1]).all():
        raise ValueError(
            "pos_embed must differ between tokens, got the same row everywhere: no map can be told from it"
        )


def check_solver(fit: object) -> Solver:
    """`fit`, a name or options, as options."""
    if isinstance(fit, Solver):
        return fit
    if not isinstance(fit, str):
        raise TypeError(
            f"fit must be one of {', '.join(SOLVERS)} or a convinit.fit.Newton, Adam or SVD, got {came(fit)}"
        )
    return SOLVERS[check_choice("fit", fit, tuple(SOLVERS))]


def check_goal(
    weight_norm: float | Tensor | None, peak: float | None, heads: int
) -> tuple[Tensor | None, float | None]:
    """weight_norm as [heads] float64, or else peak as a float."""
    if weight_norm is not None and peak is not None:
        raise ValueError(
            "give weight_norm or peak, not both: one follows from the other; "
            f"got {came(weight_norm)} and {peak}"
        )
    if weight_norm is None:
        peak = check_number("peak", DEFAULT_PEAK if peak is None else peak)
        if peak >= 1:
            raise ValueError(f"peak must be below 1 (a softmax never reaches it), got {peak}")
        return None, peak
    if not isinstance(weight_norm, Tensor):
        weight_norm = check_number("weight_norm", weight_norm)
        return torch.full((heads,), weight_norm, dtype=torch.float64, device="cpu"), None
    check_tensor("weight_norm", weight_norm, f"[{heads}]", values=True)
    if weight_norm.shape not in ((), (heads,)):
        raise ValueError(
            f"weight_norm must be a number or a tensor [{heads}], one per head, got {list(weight_norm.shape)}"
        )
    if not (weight_norm.isfinite() & (weight_norm > 0)).all():
        raise ValueError(f"weight_norm must be positive and finite, got {weight_norm.tolist()}")
    return weight_norm.detach().cpu().double().expand(heads), None
