"""`fit_qk` and `fit_targets`: checks, the choice of method, and the result's figures."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit import _library
from convinit.fit import newton, papers
from convinit.fit.result import QKFit, attention_maps, map_metrics
from convinit.offsets import check_generator, check_grid_size, check_int, check_offsets, impulse_targets

Method = newton.Newton | papers.Adam | papers.SVD

METHODS: dict[str, Method] = {"newton": newton.Newton(), "adam": papers.Adam(), "svd": papers.SVD()}
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
    method: str | Method = "newton",
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
        method: "newton" (ours), "adam" (arXiv 2401.12511, 2404.01139), "svd" (arXiv 2505.19985), or one of
            `convinit.fit.Newton`, `Adam`, `SVD` with options.
        weight_norm: "newton" only: the Frobenius norm of W_q and of W_k, one number or [B]; more is sharper.
        peak: "newton" only: the wanted mean attention on the target, in (0, 1); the norm follows. If
            neither is given, peak = 0.7. A map too sharp is hard to unlearn.
        padding_mode: where rows look whose target leaves the grid: "zeros" (nowhere), "replicate",
            "circular", "reflect".
        generator: CPU generator for all draws.

    Returns:
        QKFit with wq, wk [B, D, r] on the device and in the dtype of `pos_embed`, and mse, peak, hit_rate,
        weight_norm [B].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.

    Warns:
        UserWarning: the wanted peak is out of reach; the best map is returned.

    Source: arXiv 2401.12511, states the problem (mse of the maps). Method "newton" departs from
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
    return _fit(
        pos_embed, targets, rank, scale, method, weight_norm, peak, generator, offsets, (height, width)
    )


@torch.no_grad()
def fit_targets(
    pos_embed: Tensor,
    targets: Tensor,
    rank: int,
    *,
    scale: float,
    method: str | Method = "newton",
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
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise TypeError(
            f"targets must be an int64 tensor [B, {n}], got {getattr(targets, 'dtype', type(targets))}"
        )
    if targets.dim() != 2 or targets.shape[1] != n:
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
    return _fit(pos_embed, targets, rank, scale, method, weight_norm, peak, generator, None, None)


def impulses(
    offsets: Tensor, grid_size: tuple[int, int], *, padding_mode: str = "zeros"
) -> tuple[Tensor, Tensor]:
    """`offsets` [B, 2] as int64 and their targets [B, N]; refuses what leaves no target on the grid."""
    height, width = grid_size
    offsets = check_offsets(offsets)
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


def _fit(pos_embed, targets, rank, scale, method, weight_norm, peak, generator, offsets, grid_size) -> QKFit:
    start = time.perf_counter()
    method = _check_method(method)
    check_generator(generator)
    if check_int("rank", rank) > pos_embed.shape[1]:
        raise ValueError(f"rank must be at most D = {pos_embed.shape[1]}, got {rank}")
    scale = check_number("scale", scale)
    # Bases, starts and draws are made on the CPU, the same for every device, and also where the user has set
    # another default device; the iterations run where pos_embed is.
    device = _library.op_device(pos_embed.device)
    with torch.device("cpu"):
        P, targets = pos_embed.detach().cpu().clone(), targets.cpu().clone()
        if isinstance(method, newton.Newton):
            weight_norm, peak = check_goal(weight_norm, peak, len(targets))
            symmetries = torch.arange(len(P))[None] if grid_size is None else grid_symmetries(*grid_size)
            wq, wk, metrics = newton.fit(
                P, targets, rank, scale=scale, method=method, weight_norm=weight_norm, peak=peak,
                symmetries=symmetries, generator=generator, device=device,
            )  # fmt: skip
        else:
            if weight_norm is not None or peak is not None:
                raise ValueError(
                    f"weight_norm and peak belong to method 'newton', got method={method}; "
                    "the papers' methods are steered by their own options"
                )
            if isinstance(method, papers.Adam):
                wq, wk = papers.fit_adam(
                    P, targets, rank, scale=scale, method=method, generator=generator, device=device
                )
            else:
                wq, wk = papers.fit_svd(P, targets, rank, method=method, generator=generator)
            metrics = _measure(wq, wk, P, targets, scale)
    device = pos_embed.device
    return QKFit(
        wq=wq.to(pos_embed), wk=wk.to(pos_embed), **metrics, targets=targets.to(device),
        offsets=None if offsets is None else offsets.to(device), pos_embed=P.to(device), scale=scale,
        method=method, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _measure(wq: Tensor, wk: Tensor, P: Tensor, targets: Tensor, scale: float) -> dict[str, Tensor]:
    """The figures of given weights in float64, head by head: N² entries each are enough to hold."""
    rows = [
        map_metrics(
            attention_maps(wq[b : b + 1].double(), wk[b : b + 1].double(), P.double(), scale),
            targets[b : b + 1],
        )
        for b in range(len(targets))
    ]
    mse, peak, hit_rate = (
        torch.cat([torch.stack(row) for row in rows], dim=1) if rows else torch.empty(3, 0).double()
    )
    weight_norm = (wq.double().norm(dim=(1, 2)) * wk.double().norm(dim=(1, 2))).sqrt()
    return {"mse": mse, "peak": peak, "hit_rate": hit_rate, "weight_norm": weight_norm}


def _check_pos_embed(pos_embed: Tensor) -> None:
    if not isinstance(pos_embed, Tensor) or not pos_embed.is_floating_point():
        found = getattr(pos_embed, "dtype", type(pos_embed).__name__)
        raise TypeError(f"pos_embed must be a floating-point tensor [N, D], got {found}")
    if pos_embed.dim() != 2 or 0 in pos_embed.shape:
        raise ValueError(
            f"pos_embed must have shape [N, D] (no batch dimension), got {list(pos_embed.shape)}"
        )
    if not pos_embed.isfinite().all():
        count = int((~pos_embed.isfinite()).sum())
        raise ValueError(
            f"pos_embed must be finite, got {count} NaN or infinite entries of {pos_embed.numel()}"
        )
    if (pos_embed == pos_embed[:1]).all():
        raise ValueError(
            "pos_embed must differ between tokens, got the same row everywhere: no map can be told from it"
        )


def _check_method(method: str | Method) -> Method:
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if isinstance(method, Method):
        return method
    raise ValueError(
        f"method must be one of {', '.join(METHODS)} or a convinit.fit.Newton, Adam or SVD, got {method!r}"
    )


def check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_goal(
    weight_norm: float | Tensor | None, peak: float | None, heads: int
) -> tuple[Tensor | None, float | None]:
    """weight_norm as [heads] float64, or else peak as a float."""
    if weight_norm is not None and peak is not None:
        raise ValueError(
            f"give weight_norm or peak, not both: one follows from the other; got {weight_norm} and {peak}"
        )
    if weight_norm is None:
        peak = check_number("peak", DEFAULT_PEAK if peak is None else peak)
        if peak >= 1:
            raise ValueError(f"peak must be below 1 (a softmax never reaches it), got {peak}")
        return None, peak
    if not isinstance(weight_norm, Tensor):
        weight_norm = check_number("weight_norm", weight_norm)
        return torch.full((heads,), weight_norm, dtype=torch.float64, device="cpu"), None
    if weight_norm.shape not in ((), (heads,)):
        raise ValueError(
            f"weight_norm must be a number or a tensor [{heads}], one per head, got {list(weight_norm.shape)}"
        )
    if not (weight_norm.isfinite() & (weight_norm > 0)).all():
        raise ValueError(f"weight_norm must be positive and finite, got {weight_norm.tolist()}")
    return weight_norm.detach().cpu().double().expand(heads), None
