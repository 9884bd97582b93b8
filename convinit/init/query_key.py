"""Query and key weights [heads, D, r]: impulses, mimetic, random, and controls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit._checks import check_offsets, check_real, check_tensor
from convinit.fit import QKFit, fit_qk, fit_targets
from convinit.fit.api import Solver
from convinit.init._shared import mimetic_svd, rand, rounded, uniform
from convinit.init.level import Level
from convinit.init.options import InitOptions
from convinit.offsets import impulse_targets


@torch.no_grad()
def impulse_qk_(
    wq: Tensor,
    wk: Tensor,
    pos_embed: Tensor,
    offsets: Tensor,
    grid_size: Sequence[int],
    *,
    scale: float,
    fit: str | Solver = "newton",
    weight_norm: float | Tensor | None = None,
    peak: float | None = None,
    padding_mode: str = "zeros",
    generator: torch.Generator | None = None,
) -> QKFit:
    """Fit every head's attention map to the impulse convolution of its offset.

    softmax(scale · P wq[h] wk[h]ᵀ Pᵀ) ≈ impulse_matrix(offsets[h])

    Args:
        wq, wk: [heads, D, r], written in place.
        pos_embed: P [N, D], as the queries and keys will see it.
        offsets: [heads, 2] int64 (dy, dx); see :func:`convinit.sample_offsets`.
        grid_size: (H, W) with H·W = N.
        scale, fit, weight_norm, peak, padding_mode, generator: see :func:`convinit.fit_qk`.

    Returns:
        The :class:`~convinit.QKFit`: what was reached (mse, peak, hit_rate, weight_norm), head by head.

    Raises:
        ValueError: the shapes do not agree, or :func:`convinit.fit_qk` refuses its input.

    Source: arXiv 2401.12511.
    """
    heads, dim, rank = _check_qk(wq, wk)
    _check_pos_embed(pos_embed, dim)
    offsets = check_offsets(offsets, heads)
    result = fit_qk(
        pos_embed,
        offsets,
        grid_size,
        rank,
        scale=scale,
        fit=fit,
        weight_norm=weight_norm,
        peak=peak,
        padding_mode=padding_mode,
        generator=generator,
    )
    _write_(wq, wk, result.wq, result.wk)
    return result


@torch.no_grad()
def scrambled_qk_(
    wq: Tensor,
    wk: Tensor,
    pos_embed: Tensor,
    *,
    scale: float,
    fit: str | Solver = "newton",
    weight_norm: float | Tensor | None = None,
    peak: float | None = None,
    generator: torch.Generator | None = None,
) -> QKFit:
    """Control: fit every head's map to a random permutation of the tokens instead of a convolution.

    Same solver, one target a row, yet no structure in space. At the same weight norm the maps come out
    flatter than impulses, for scrambled targets are harder to fit: compare ``peak`` as well.

    Args:
        wq, wk: [heads, D, r], written in place.
        pos_embed: P [N, D].
        scale, fit, weight_norm, peak: see :func:`convinit.fit_targets`.
        generator: CPU generator of the permutations and of the fit.

    Returns:
        The :class:`~convinit.QKFit`.
    """
    heads, dim, rank = _check_qk(wq, wk)
    _check_pos_embed(pos_embed, dim)
    targets = rand((heads, pos_embed.shape[0]), generator).argsort(dim=1)  # a permutation for each head
    result = fit_targets(
        pos_embed,
        targets,
        rank,
        scale=scale,
        fit=fit,
        weight_norm=weight_norm,
        peak=peak,
        generator=generator,
    )
    _write_(wq, wk, result.wq, result.wk)
    return result


@torch.no_grad()
def norm_matched_qk_(
    wq: Tensor, wk: Tensor, weight_norm: float | Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Control: random directions with ‖wq[h]‖_F = ‖wk[h]‖_F = weight_norm.

    Args:
        wq, wk: [heads, D, r], written in place.
        weight_norm: the norm of every head, or a tensor [heads], for example ``QKFit.weight_norm``.
        generator: CPU generator.

    Returns:
        (wq, wk).
    """
    heads, _, _ = _check_qk(wq, wk)
    if not isinstance(weight_norm, Tensor):
        weight_norm = torch.tensor(check_real("weight_norm", weight_norm), dtype=torch.float64, device="cpu")
    check_tensor("weight_norm", weight_norm, f"[{heads}]", values=True)
    if weight_norm.shape not in ((), (heads,)):
        raise ValueError(
            f"weight_norm must be a number or [{heads}], one for each head, got {list(weight_norm.shape)}"
        )
    if not bool((weight_norm.isfinite() & (weight_norm >= 0)).all()):
        raise ValueError(f"weight_norm must be finite and at least 0, got {weight_norm.tolist()}")
    norm = weight_norm.to("cpu", torch.float32)
    values = [uniform(wq.shape, 1.0, generator) for _ in range(2)]
    _write_(wq, wk, *(w * (norm / w.flatten(1).norm(dim=1)).view(-1, 1, 1) for w in values))
    return wq, wk


@torch.no_grad()
def mimetic_qk_(
    wq: Tensor,
    wk: Tensor,
    *,
    noise: float = 0.7,
    identity: float = 0.7,
    distribution: str = "normal",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mimetic initialisation: wq[h] wk[h]ᵀ is the best rank-r part of noise · Z + identity · I.

    noise · Z + identity · I = U S Vᵀ,   wq = U_r √S_r,   wk = V_r √S_r;   Z [D, D], one for each head.

    Args:
        wq, wk: [heads, D, r] with r ≤ D, written in place.
        noise, identity: the two weights.
        distribution: entries of Z, "normal" N(0, 1/D) or "uniform" U(±√(1/D)).
        generator: CPU generator.

    Returns:
        (wq, wk).

    Source: arXiv 2305.09828 (normal); the code of arXiv 2401.12511 draws uniformly.
    """
    heads, dim, rank = _check_qk(wq, wk)
    if rank > dim:
        raise ValueError(f"wq must have r <= D for mimetic weights, got r = {rank} and D = {dim}")
    u, s, vh = mimetic_svd((heads, dim, dim), noise, identity, distribution, generator, truncated=True)
    root = s[:, :rank].sqrt().unsqueeze(1)
    _write_(wq, wk, u[:, :, :rank] * root, vh[:, :rank].mT * root)
    return wq, wk


@torch.no_grad()
def random_qk_(wq: Tensor, wk: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The papers' random weights: U(±√(1/D)), as ``nn.Linear`` draws them.

    Args:
        wq, wk: [heads, D, r], written in place. Of Model III, whose factors have a row for each token, D is
            the number of tokens.
        generator: CPU generator.

    Returns:
        (wq, wk).

    Source: arXiv 2401.12511.
    """
    _, dim, _ = _check_qk(wq, wk)
    bound = math.sqrt(1 / max(dim, 1))
    wq.copy_(uniform(wq.shape, bound, generator))
    wk.copy_(uniform(wk.shape, bound, generator))
    return wq, wk


def fitted_qk(
    options: InitOptions,
    pos_embed: Tensor,
    offsets: Tensor,
    grid_size: Sequence[int],
    rank: int,
    *,
    scale: float,
    num_heads: int,
    generator: torch.Generator | None,
    unequal_tokens: bool = False,
    class_tokens: bool = False,
) -> tuple[Tensor, Tensor, Tensor, QKFit | None]:
    """Impulses of all heads, or a control in their place.

    Args:
        options: with ``fits``.
        num_heads: of a layer; there may be several.
        unequal_tokens: content will make tokens show unequal multiples of P, see `init.level`.
        class_tokens: there are tokens without P.
        Others: as in :func:`convinit.fit_qk`.

    Returns:
        wq, wk [B, D, r]; targets [B, N]; the fit of the impulses, from which a control takes its weight norm.
        None: a norm was given.
    """
    impulses, weight_norm = None, options.weight_norm
    level, fitted_to, fitted_rank = None, pos_embed, rank
    if unequal_tokens and options.target_peak is not None:
        level = Level.of(pos_embed, rank)
        if level is not None:
            fitted_to, fitted_rank = level.fitted_to, level.fitted_rank
    if options.method == "impulse" or weight_norm is None:
        impulses = fit_qk(
            fitted_to,
            offsets,
            grid_size,
            fitted_rank,
            scale=scale,
            fit=options.solver(num_heads),
            weight_norm=weight_norm,
            peak=options.peak,
            padding_mode=options.padding_mode,
            generator=generator,
        )
        fitted_norms = impulses.weight_norm
        if level is not None:
            impulses = level.levelled(impulses, generator, class_tokens=class_tokens)
        wq, wk, norms, targets = impulses.wq, impulses.wk, impulses.weight_norm, impulses.targets
        if options.method != "impulse":  # controls are written in their place
            wq, wk = torch.empty_like(wq), torch.empty_like(wk)
    else:
        wq, wk = pos_embed.new_empty(2, len(offsets), pos_embed.shape[1], rank)
        norms = fitted_norms = torch.full((len(offsets),), weight_norm, dtype=torch.float64, device="cpu")
        targets = impulse_targets(offsets, grid_size, padding_mode=options.padding_mode)
    if options.method == "norm_matched":
        norm_matched_qk_(wq, wk, norms, generator=generator)
    elif options.method == "scrambled":
        fitted = wq[..., :fitted_rank], wk[..., :fitted_rank]
        control = scrambled_qk_(
            *fitted, fitted_to, scale=scale, weight_norm=fitted_norms, generator=generator
        )
        targets = control.targets
        if level is not None:
            control = level.levelled(control, generator, class_tokens=class_tokens)
            to_norm = (norms / control.weight_norm)[:, None, None]
            wq, wk = ((to_norm * w).to(w) for w in (control.wq, control.wk))
    return wq, wk, targets, impulses


def _check_qk(wq: Tensor, wk: Tensor) -> tuple[int, int, int]:
    check_tensor("wq", wq, "[heads, D, r]", dims=3)
    check_tensor("wk", wk, "[heads, D, r]", dims=3)
    if wq.shape != wk.shape:
        raise ValueError(f"wq and wk must both be [heads, D, r], got {list(wq.shape)} and {list(wk.shape)}")
    heads, dim, rank = wq.shape
    return heads, dim, rank


def _check_pos_embed(pos_embed: Tensor, dim: int) -> None:
    check_tensor("pos_embed", pos_embed, f"[N, {dim}]", dims=2, values=True)
    if pos_embed.shape[1] != dim:
        raise ValueError(f"pos_embed must be [N, {dim}], D as in wq, got {list(pos_embed.shape)}")


def _write_(wq: Tensor, wk: Tensor, new_wq: Tensor, new_wk: Tensor) -> None:
    """Both or none: what a dtype does not hold is refused before anything is written."""
    new = rounded("wq", wq, new_wq), rounded("wk", wk, new_wk)
    wq.copy_(new[0])
    wk.copy_(new[1])
