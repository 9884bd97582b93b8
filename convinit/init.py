"""Initialisers in the style of ``torch.nn.init``: in place, under ``no_grad``, returning what they wrote.

Every draw is made on the CPU in float32 and then copied to the tensor, so that one seed gives one result
on every device and for every dtype. ``generator`` is therefore a CPU generator; None means torch's own.

=====================  ======================================================================
query/key weights      ``impulse_qk_``  ``mimetic_qk_``  ``random_qk_``
controls for them      ``scrambled_qk_``  ``norm_matched_qk_``
value/output weights   ``mimetic_vo_``
depthwise filters      ``random_filter_``  ``impulse_filter_``  ``box_filter_``  ``gaussian_filter_``
                       ``softmax_filter_``
mixing matrices        ``impulse_mixing_``  ``permutation_mixing_``  ``full_permutation_mixing_``
linear, convolution    ``default_``
=====================  ======================================================================

A query/key pair is ``wq, wk [heads, D, r]`` with q = x @ wq[h]. The weight of an ``nn.Linear`` is such a
tensor as a view: ``linear.weight.view(heads, r, D).mT``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convinit.fit import QKFit, fit_qk, fit_targets
from convinit.fit.api import Method
from convinit.offsets import check_generator, check_grid_size, check_int, check_offsets, sample_offsets
from convinit.ops.impulse_matrix import impulse_matrix

__all__ = [
    "box_filter_",
    "default_",
    "full_permutation_mixing_",
    "gaussian_filter_",
    "impulse_filter_",
    "impulse_mixing_",
    "impulse_qk_",
    "mimetic_qk_",
    "mimetic_vo_",
    "norm_matched_qk_",
    "permutation_mixing_",
    "random_filter_",
    "random_qk_",
    "scrambled_qk_",
    "softmax_filter_",
]


# --- query/key weights ------------------------------------------------------------------------------------


@torch.no_grad()
def impulse_qk_(
    wq: Tensor,
    wk: Tensor,
    pos_embed: Tensor,
    offsets: Tensor,
    grid_size: Sequence[int],
    *,
    scale: float,
    method: str | Method = "newton",
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
        scale, method, weight_norm, peak, padding_mode, generator: see :func:`convinit.fit_qk`.

    Returns:
        The :class:`~convinit.QKFit`: what was reached (mse, peak, hit_rate, weight_norm), head by head.

    Raises:
        ValueError: the shapes do not agree, or :func:`convinit.fit_qk` refuses its input.

    Source: arXiv 2401.12511.
    """
    heads, _, rank = _check_qk(wq, wk, pos_embed)
    offsets = check_offsets(offsets)
    if offsets.shape[0] != heads:
        raise ValueError(
            f"offsets must be [{heads}, 2], one row for each head of wq, got {list(offsets.shape)}"
        )
    fit = fit_qk(
        pos_embed,
        offsets,
        grid_size,
        rank,
        scale=scale,
        method=method,
        weight_norm=weight_norm,
        peak=peak,
        padding_mode=padding_mode,
        generator=generator,
    )
    wq.copy_(fit.wq)
    wk.copy_(fit.wk)
    return fit


@torch.no_grad()
def scrambled_qk_(
    wq: Tensor,
    wk: Tensor,
    pos_embed: Tensor,
    *,
    scale: float,
    method: str | Method = "newton",
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
        scale, method, weight_norm, peak: see :func:`convinit.fit_targets`.
        generator: CPU generator of the permutations and of the fit.

    Returns:
        The :class:`~convinit.QKFit`.
    """
    heads, _, rank = _check_qk(wq, wk, pos_embed)
    targets = _rand((heads, pos_embed.shape[0]), generator).argsort(dim=1)  # a permutation for each head
    fit = fit_targets(
        pos_embed,
        targets,
        rank,
        scale=scale,
        method=method,
        weight_norm=weight_norm,
        peak=peak,
        generator=generator,
    )
    wq.copy_(fit.wq)
    wk.copy_(fit.wk)
    return fit


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
    norm = torch.as_tensor(weight_norm).to("cpu", torch.float32)
    if norm.dim() > 1 or (norm.dim() == 1 and norm.shape[0] != heads):
        raise ValueError(
            f"weight_norm must be a number or [{heads}], one for each head, got {list(norm.shape)}"
        )
    if not bool((norm.isfinite() & (norm >= 0)).all()):
        raise ValueError(f"weight_norm must be finite and at least 0, got {norm.tolist()}")
    for weight in (wq, wk):
        values = _uniform(weight.shape, 1.0, generator)
        values *= (norm / values.flatten(1).norm(dim=1)).view(-1, 1, 1)
        weight.copy_(values)
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
    u, s, vh = _mimetic_svd((heads, dim, dim), noise, identity, distribution, generator)
    root = s[:, :rank].sqrt().unsqueeze(1)
    wq.copy_(u[:, :, :rank] * root)
    wk.copy_(vh[:, :rank].mT * root)
    return wq, wk


@torch.no_grad()
def random_qk_(wq: Tensor, wk: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The papers' random weights: U(±√(1/(r·heads))).

    Args:
        wq, wk: [heads, D, r], written in place.
        generator: CPU generator.

    Returns:
        (wq, wk).
    """
    heads, _, rank = _check_qk(wq, wk)
    bound = math.sqrt(1 / max(rank * heads, 1))
    wq.copy_(_uniform(wq.shape, bound, generator))
    wk.copy_(_uniform(wk.shape, bound, generator))
    return wq, wk


# --- value/output weights ---------------------------------------------------------------------------------


@torch.no_grad()
def mimetic_vo_(
    wv: Tensor,
    wo: Tensor,
    *,
    noise: float = 0.4,
    identity: float = -0.4,
    distribution: str = "normal",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mimetic initialisation of values and output layer: wv @ wo ≈ noise · Z + identity · I.

    noise · Z + identity · I = U S Vᵀ,   wv = U √S,   wo = √S Vᵀ;   Z [D, D], over all heads together.

    With heads·r < D the product is the best one of that rank. With heads·r > D the columns of wv beyond D
    are U(±√(1/D)) and the rows of wo that meet them are 0: the product is exact, and they can still learn.

    Args:
        wv: [D, heads·r], v = x @ wv; of an ``nn.Linear``: ``linear.weight.mT``. Written in place.
        wo: [heads·r, D], y = out @ wo. Written in place.
        noise, identity, distribution, generator: see :func:`mimetic_qk_`.

    Returns:
        (wv, wo).

    Source: arXiv 2305.09828.
    """
    if wv.dim() != 2 or wo.dim() != 2 or wv.shape != wo.shape[::-1]:
        raise ValueError(
            f"wv and wo must be [D, heads·r] and [heads·r, D], got {list(wv.shape)} and {list(wo.shape)}"
        )
    _check_floating("wv", wv)
    _check_floating("wo", wo)
    dim, inner = wv.shape
    u, s, vh = _mimetic_svd((dim, dim), noise, identity, distribution, generator)
    rank = min(dim, inner)
    root = s[:rank].sqrt()
    wv[:, :rank] = (u[:, :rank] * root).to(wv)
    wo[:rank] = (root.unsqueeze(1) * vh[:rank]).to(wo)
    if inner > dim:
        wv[:, dim:] = _uniform((dim, inner - dim), math.sqrt(1 / dim), generator).to(wv)
        wo[dim:] = 0
    return wv, wo


# --- depthwise filters [C, 1, f, f] -----------------------------------------------------------------------
# All but softmax have a mean second moment Σ w² of 1/3 over the f² cells, that of the random filter.


@torch.no_grad()
def random_filter_(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """U(±1/f), the default of a depthwise ``nn.Conv2d``.

    Args:
        weight: [C, 1, f, f], written in place.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    return weight.copy_(_uniform(weight.shape, 1 / size, generator))


@torch.no_grad()
def impulse_filter_(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """√(1/3) at one random cell of every filter, 0 elsewhere.

    Args:
        weight: [C, 1, f, f], written in place.
        generator: CPU generator.
    """
    return box_filter_(weight, 1, generator=generator)


@torch.no_grad()
def box_filter_(weight: Tensor, num_cells: int, *, generator: torch.Generator | None = None) -> Tensor:
    """√(1/(3m)) at m different random cells of every filter, 0 elsewhere.

    Args:
        weight: [C, 1, f, f], written in place.
        num_cells: m, 1 to f².
        generator: CPU generator.
    """
    size = _check_filter(weight)
    if check_int("num_cells", num_cells) > size * size:
        raise ValueError(f"num_cells must be at most {size * size}, the cells of a filter, got {num_cells}")
    order = _rand((weight.shape[0], size * size), generator).argsort(dim=1)
    filters = torch.zeros(weight.shape[0], size * size, device="cpu")
    filters.scatter_(1, order[:, :num_cells], math.sqrt(1 / (3 * num_cells)))
    return weight.copy_(filters.view(weight.shape))


@torch.no_grad()
def gaussian_filter_(
    weight: Tensor, variance: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """A Gaussian around one random cell of every filter, cut off at the filter's edge.

    w ∝ exp(−(Δy² + Δx²) / (2 variance)), all filters divided by one number so that the mean of Σ w² is 1/3.

    Args:
        weight: [C, 1, f, f], written in place.
        variance: in cells², > 0.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"variance must be a positive number, got {variance}")
    if weight.shape[0] == 0:
        return weight
    check_generator(generator)
    centre = torch.randint(size, (2, weight.shape[0], 1), generator=generator, device="cpu")
    cells = torch.arange(size, device="cpu")
    y, x = ((cells - centre) ** 2 / (-2 * variance)).exp()
    filters = y.unsqueeze(2) * x.unsqueeze(1)
    filters /= (3 * filters.square().sum(dim=(1, 2)).mean()).sqrt()
    return weight.copy_(filters.unsqueeze(1))


@torch.no_grad()
def softmax_filter_(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The softmax over the f² cells of U(±1/f): positive, near-uniform filters of sum 1.

    As in the papers, the filter is not rescaled: Σ w² ≈ 1/f². To train the numbers under the softmax
    instead of the filter, use :class:`convinit.nn.SpatialConv`.

    Args:
        weight: [C, 1, f, f], written in place.
        generator: CPU generator.
    """
    size = _check_filter(weight)
    logits = _uniform(weight.shape, 1 / size, generator)
    return weight.copy_(logits.flatten(1).softmax(dim=1).view(weight.shape))


# --- mixing matrices [C, N, N] ----------------------------------------------------------------------------

_GAIN = math.sqrt(1 / 3)  # the second moment of a row is that of a filter


@torch.no_grad()
def impulse_mixing_(
    weight: Tensor,
    grid_size: Sequence[int],
    kernel_size: int,
    *,
    gain: float = _GAIN,
    padding_mode: str = "zeros",
    generator: torch.Generator | None = None,
) -> Tensor:
    """gain · the impulse matrix of a random offset: an impulse filter written as a matrix.

    Args:
        weight: [C, N, N], written in place.
        grid_size: (H, W) with H·W = N.
        kernel_size: offsets are drawn from the f×f window.
        gain: value of the impulse.
        padding_mode: see :func:`convinit.impulse_matrix`.
        generator: CPU generator.
    """
    num_tokens = _check_mixing(weight)
    height, width = check_grid_size(grid_size)
    if height * width != num_tokens:
        raise ValueError(
            f"grid_size must have H·W = {num_tokens} tokens, N of weight, got {height} x {width}"
        )
    offsets = sample_offsets(weight.shape[0], kernel_size, generator=generator)
    matrix = impulse_matrix(
        offsets, (height, width), padding_mode=padding_mode, dtype=torch.float32, device="cpu"
    )
    return weight.copy_(matrix.mul_(gain))


@torch.no_grad()
def permutation_mixing_(
    weight: Tensor, *, gain: float = _GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """Every output pixel takes gain · a random input pixel, drawn with replacement (the papers' "rand*").

    Args:
        weight: [C, N, N], written in place.
        gain: value of the one entry of a row.
        generator: CPU generator.
    """
    num_tokens = _check_mixing(weight)
    check_generator(generator)
    columns = torch.randint(num_tokens, weight.shape[:2], generator=generator, device="cpu")
    return _one_hot_rows_(weight, columns, gain)


@torch.no_grad()
def full_permutation_mixing_(
    weight: Tensor, *, gain: float = _GAIN, generator: torch.Generator | None = None
) -> Tensor:
    """gain · a random permutation matrix: every input pixel goes to exactly one output pixel.

    Args:
        weight: [C, N, N], written in place.
        gain: value of the one entry of a row and column.
        generator: CPU generator.
    """
    _check_mixing(weight)
    columns = _rand(weight.shape[:2], generator).argsort(dim=1)
    return _one_hot_rows_(weight, columns, gain)


# --- linear layers and convolutions -----------------------------------------------------------------------


@torch.no_grad()
def default_(
    weight: Tensor, bias: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """What ``nn.Linear`` and ``nn.Conv2d`` start from, U(±√(1/fan_in)), drawn from a CPU generator.

    Args:
        weight: [out, in, ...], written in place; fan_in is the product of all sizes but the first.
        bias: [out] or None, drawn from the same interval.
        generator: CPU generator.
    """
    _check_floating("weight", weight)
    bound = math.sqrt(1 / max(math.prod(weight.shape[1:]), 1))
    weight.copy_(_uniform(weight.shape, bound, generator))
    if bias is not None:
        bias.copy_(_uniform(bias.shape, bound, generator))
    return weight


# --- shared -----------------------------------------------------------------------------------------------


def _rand(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    check_generator(generator)
    return torch.rand(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def _uniform(shape: Sequence[int], bound: float, generator: torch.Generator | None) -> Tensor:
    return _rand(shape, generator).mul_(2).sub_(1).mul_(bound)


def _mimetic_svd(
    shape: tuple[int, ...],
    noise: float,
    identity: float,
    distribution: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = shape[-1]
    if distribution == "normal":
        check_generator(generator)
        z = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).div_(math.sqrt(dim))
    elif distribution == "uniform":
        z = _uniform(shape, math.sqrt(1 / dim), generator)
    else:
        raise ValueError(f'distribution must be "normal" or "uniform", got {distribution!r}')
    matrix = noise * z.double() + identity * torch.eye(dim, dtype=torch.float64, device="cpu")
    return torch.linalg.svd(matrix)


def _one_hot_rows_(weight: Tensor, columns: Tensor, value: float) -> Tensor:
    return weight.zero_().scatter_(2, columns.unsqueeze(2).to(weight.device), value)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_qk(wq: Tensor, wk: Tensor, pos_embed: Tensor | None = None) -> tuple[int, int, int]:
    _check_floating("wq", wq)
    _check_floating("wk", wk)
    if wq.dim() != 3 or wq.shape != wk.shape:
        raise ValueError(f"wq and wk must both be [heads, D, r], got {list(wq.shape)} and {list(wk.shape)}")
    heads, dim, rank = wq.shape
    if pos_embed is not None and (pos_embed.dim() != 2 or pos_embed.shape[1] != dim):
        raise ValueError(f"pos_embed must be [N, {dim}], D as in wq, got {list(pos_embed.shape)}")
    return heads, dim, rank


def _check_filter(weight: Tensor) -> int:
    _check_floating("weight", weight)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3] or weight.shape[2] < 1:
        raise ValueError(f"weight must be depthwise filters [C, 1, f, f], got {list(weight.shape)}")
    return weight.shape[2]


def _check_mixing(weight: Tensor) -> int:
    _check_floating("weight", weight)
    if weight.dim() != 3 or weight.shape[1] != weight.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"weight must be mixing matrices [C, N, N], got {list(weight.shape)}")
    return weight.shape[1]
