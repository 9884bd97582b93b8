"""Impulses through query and key biases, for attention with rotary position embedding (RoPE).

RoPE turns pair m of a query or key at token n by the angle θ_m(n). Where the angles are linear in the
token's row and column, a shift is a rotation: biases bq and bk = bq turned back by the offset's angle give
logits that are highest at token + offset, the same in every row and whatever the image shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convinit._checks import came, check_choice, check_finite, check_grid_size, check_number, check_tensor
from convinit.fit.api import check_goal, impulses
from convinit.fit.result import MapFit, map_metrics, norms_of, warn_if_missed
from convinit.fit.rotary import LARGEST_TOTAL, RotaryImpulse, best_for_peak, best_for_total
from convinit.init._shared import first_of_each, rand, rounded

PAIRS = ("interleaved", "half")
_LINEARITY_TOLERANCE = 1e-2  # rad; half-precision tables of sines pass


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RotaryFit(MapFit):
    """Query and key biases of B heads, and how well their attention maps meet their targets.

    Attributes:
        bq, bk: [B, r], as written.
        mse, peak, hit_rate, targets, offsets, seconds: see :class:`convinit.fit.result.MapFit`.
        weight_norm: [B] float64, √(‖bq‖ · ‖bk‖).
        angles: [N, m] or [B, N, m], as given.
        scale: the softmax temperature.
        pairs: "interleaved" or "half".
    """

    bq: Tensor
    bk: Tensor
    angles: Tensor
    scale: float
    pairs: str

    def attention_map(self) -> Tensor:
        """The softmax maps of the biases alone, [B, N, N] float64."""
        q, k = (_as_pairs(b, self.angles.shape[-1], self.pairs) for b in (self.bq, self.bk))
        return _attention(q, k, self.angles.to(self.bq.device, torch.float64), self.scale)

    def _details(self) -> str:
        return f"N={self.targets.shape[1]}, r={self.bq.shape[1]}, {self.angles.shape[-1]} pairs"


@torch.no_grad()
def rotary_impulse_qk_(
    bq: Tensor,
    bk: Tensor,
    angles: Tensor,
    offsets: Tensor,
    grid_size: Sequence[int],
    *,
    scale: float,
    peak: float | None = None,
    weight_norm: float | Tensor | None = None,
    pairs: str = "interleaved",
    generator: torch.Generator | None = None,
) -> RotaryFit:
    """Set query and key biases so that rotary attention starts as each head's impulse convolution.

    As complex numbers, a pair of entries each:  bq_m = a_m e^{iψ_m},  bk_m = bq_m e^{−i φ_m},  φ_m the angle
    of the offset. With q = bq and k = bk at every token, turned by its angles, the logits are

        scale · Σ_m a_m² cos(θ_m(n') − θ_m(n) − φ_m),   highest at token n' = n + offset.

    The amplitudes a_m are those of the sharpest map (highest mean log attention on the target) at their norm;
    the phases ψ_m are free and drawn. Heads with one offset and one set of angles are solved once.

    Args:
        bq, bk: [heads, r], written in place: the biases of query and key of each head.
        angles: [N, m] or, where heads differ, [heads, N, m] with m ≤ r/2 pairs: the angles in rad, up to
            whole turns, by which the model turns the tokens of the grid, row-major, without class and
            register tokens; see :func:`rotary_angles`. Where m < r/2, the first 2m entries of a head are
            turned and the rest of the bias is set to zero; if the model turns others, pass views of those.
        offsets: [heads, 2], any integer dtype: (dy, dx) in tokens.
        grid_size: (H, W) with H·W = N.
        scale: softmax temperature; usually r**-0.5.
        peak: the wanted mean attention on the target, in (0, 1), at the smallest norm that gives it. If
            neither is given, that of :func:`convinit.fit_qk`.
        weight_norm: instead of `peak`, √(‖bq‖ · ‖bk‖) of every head, or a tensor [heads].
        pairs: which entries make pair j of m: "interleaved": 2j and 2j + 1; "half": j and j + m.
        generator: CPU generator of the phases.

    Returns:
        The :class:`RotaryFit`: what was reached (mse, peak, hit_rate, weight_norm), head by head.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value, or the angles are not linear in
            the token's row and column.

    Warns:
        UserWarning: the wanted peak is out of reach; the best map within logits of 1,000 is set.

    Tokens that the model does not turn, such as class tokens, act as a token of the grid whose angles are all
    zero: they look at, and are looked at from, wherever that would be.

    Source: ours. The papers have no rotary models; the target map is that of arXiv 2401.12511.
    """
    start = time.perf_counter()
    height, width = check_grid_size(grid_size)
    _check_biases(bq, bk, angles, height * width, pairs)
    heads, count = bq.shape[0], angles.shape[-1]
    offsets, targets = impulses(offsets, (height, width))
    if len(offsets) != heads:
        raise ValueError(
            f"offsets must be [{heads}, 2], one row for each head of bq, got {list(offsets.shape)}"
        )
    scale = check_number("scale", scale)
    norms, peak = check_goal(weight_norm, peak, heads)
    phases = 2 * math.pi * rand((heads, count), generator).double()
    offsets, targets, turns = offsets.cpu(), targets.cpu(), angles.detach().to("cpu", torch.float64)
    steps = _steps(turns, height, width).expand(heads, -1, -1)
    amplitudes, problem_of_head = _amplitudes(steps, offsets, (height, width), scale, norms, peak)
    q = torch.polar(amplitudes[problem_of_head], phases)
    of_offset = (offsets.double()[:, None] @ steps)[:, 0]
    k = q * torch.polar(torch.ones_like(of_offset), -of_offset)
    new_bq, new_bk = (
        rounded(name, bias, _entries(values, bias.shape, pairs)).cpu() if not bias.is_meta
        else _entries(values, bias.shape, pairs)
        for name, bias, values in (("bq", bq, q), ("bk", bk, k))
    )  # fmt: skip
    q, k = (_as_pairs(b, count, pairs) for b in (new_bq, new_bk))
    metrics = steps.new_empty(3, heads)
    for head in range(heads):
        of_head = turns if turns.dim() == 2 else turns[head]
        attention = _attention(q[head, None], k[head, None], of_head, scale)
        metrics[:, head] = torch.cat(map_metrics(attention, targets[head, None]))
    if not metrics.isfinite().all():
        raise ValueError(f"weight_norm = {came(weight_norm)} makes logits beyond the range of numbers")
    mse, reached, hit_rate = metrics
    if peak is not None:
        remedy = f"These angles allow no sharper map within logits of {LARGEST_TOTAL:g}; ask for less."
        warn_if_missed(peak, reached, remedy, stacklevel=3)
    bq.copy_(new_bq)
    bk.copy_(new_bk)
    device = bq.device
    return RotaryFit(
        bq=bq.clone(), bk=bk.clone(), mse=mse, peak=reached, hit_rate=hit_rate,
        weight_norm=norms_of(new_bq).sqrt() * norms_of(new_bk).sqrt(), targets=targets.to(device),
        offsets=offsets.to(device), angles=angles.detach(), scale=scale, pairs=pairs,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def rotary_angles(sin: Tensor, cos: Tensor, *, pairs: str = "interleaved") -> Tensor:
    """The angles of a table of sines and cosines, as models keep it for all entries of a head.

    angles = atan2(sin, cos), once for each pair.

    Args:
        sin, cos: [..., N, 2m]; timm's embeddings are torch.cat([sin, cos], dim=-1).
        pairs: "interleaved" or "half", as the model pairs its entries.

    Returns:
        angles [..., N, m] float64, in (−π, π].

    Raises:
        ValueError: shapes differ, or the two entries of a pair do, which is so with the wrong `pairs`.
    """
    for name, table in (("sin", sin), ("cos", cos)):
        check_tensor(name, table, "[..., N, 2m]", values=True)
    if sin.shape != cos.shape or sin.dim() < 2 or sin.shape[-1] % 2:
        raise ValueError(
            f"sin and cos must both be [..., N, 2m], got {list(sin.shape)} and {list(cos.shape)}"
        )
    _check_pairs(pairs)
    both = torch.atan2(sin.detach().double(), cos.detach().double())
    first, second = _split(both, pairs)
    if not torch.equal(first, second):
        other = PAIRS[1 - PAIRS.index(pairs)]
        raise ValueError(f"pairs = {pairs!r} joins entries of different angles; try {other!r}")
    return first


def _steps(turns: Tensor, height: int, width: int) -> Tensor:
    """θ [1 or heads, 2, m] in (−π, π]: by how much the angles grow from row to row and column to column."""
    at = torch.polar(torch.ones_like(turns), turns).view(-1, height, width, turns.shape[-1])
    down = (at[:, 1:] * at[:, :-1].conj()).sum(dim=(1, 2)).angle()
    right = (at[:, :, 1:] * at[:, :, :-1].conj()).sum(dim=(1, 2)).angle()
    y, x = torch.arange(height, device="cpu")[:, None, None], torch.arange(width, device="cpu")[:, None]
    linear = y * down[:, None, None] + x * right[:, None, None]
    beside = at * torch.polar(torch.ones_like(linear), -linear)
    error = (beside * beside.sum(dim=(1, 2), keepdim=True).conj()).angle().abs()
    if error.max() > _LINEARITY_TOLERANCE:
        head, _, _, pair = torch.unravel_index(error.argmax(), error.shape)
        raise ValueError(
            f"angles must be linear in the row and the column of the {height} x {width} grid, row-major, for "
            f"then alone a shift is a rotation; those of pair {pair}, head {head} deviate by up to "
            f"{error.max():.2g} rad. Leave out class tokens, and check the order of the tokens"
        )
    steps = torch.stack([down, right], dim=1)
    still = steps.abs().amax(dim=(1, 2)) < _LINEARITY_TOLERANCE / max(height, width)
    if still.any():
        raise ValueError("angles must differ between tokens, got a head whose tokens are all turned alike")
    return steps


def _amplitudes(
    steps: Tensor,
    offsets: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    norms: Tensor | None,
    peak: float | None,
) -> tuple[Tensor, Tensor]:
    """a [problems, m] of each distinct problem, and which of them is that of each head [heads]."""
    # Opposite offsets are one problem: turning the grid by 180° makes one of the other.
    backwards = (offsets[:, 0] < 0) | ((offsets[:, 0] == 0) & (offsets[:, 1] < 0))
    offsets = torch.where(backwards[:, None], -offsets, offsets)
    goals = steps.new_zeros(len(offsets)) if norms is None else scale * norms.square()
    keys = torch.cat([offsets.double(), goals[:, None], steps.flatten(1)], dim=1)
    keys, problem_of_head = torch.unique(keys, dim=0, return_inverse=True)
    weights = steps.new_empty(len(keys), steps.shape[2])
    for u, head in enumerate(first_of_each(problem_of_head, len(keys))):
        problem = RotaryImpulse(steps[head], offsets[head].tolist(), grid_size)
        weights[u] = (
            best_for_total(problem, goals[head].item()) if peak is None else best_for_peak(problem, peak)
        )
    return (weights / scale).sqrt(), problem_of_head


def _attention(q: Tensor, k: Tensor, angles: Tensor, scale: float) -> Tensor:
    """Maps [B, N, N] of complex biases [B, m] that tokens turn by angles [N, m] or [B, N, m]."""
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_real(b[:, None] * turn).flatten(2) for b in (q, k))
    return torch.softmax(scale * q @ k.mT, dim=-1)


def _split(entries: Tensor, pairs: str) -> Sequence[Tensor]:
    """The first and the second entries of the pairs, as views: [..., 2m] -> two [..., m]."""
    return entries.unflatten(-1, (-1, 2)).unbind(-1) if pairs == "interleaved" else entries.chunk(2, dim=-1)


def _as_pairs(bias: Tensor, count: int, pairs: str) -> Tensor:
    return torch.complex(*_split(bias[:, : 2 * count].double(), pairs))


def _entries(values: Tensor, shape: torch.Size, pairs: str) -> Tensor:
    """Complex values [heads, m] as the first 2m entries of biases [heads, r] float64, the rest zero."""
    new = torch.zeros(shape, dtype=torch.float64, device="cpu")
    first, second = _split(new[:, : 2 * values.shape[1]], pairs)
    first.copy_(values.real)
    second.copy_(values.imag)
    return new


def _check_pairs(pairs: str) -> None:
    check_choice("pairs", pairs, PAIRS)


def _check_biases(bq: Tensor, bk: Tensor, angles: Tensor, tokens: int, pairs: str) -> None:
    _check_pairs(pairs)
    for name, tensor in (("bq", bq), ("bk", bk)):
        check_tensor(name, tensor, "[heads, r]", dims=2)
    check_tensor("angles", angles, f"[{tokens}, m] or [heads, {tokens}, m]", values=True)
    if bq.shape != bk.shape:
        raise ValueError(f"bq and bk must both be [heads, r], got {list(bq.shape)} and {list(bk.shape)}")
    heads, rank = bq.shape
    if angles.shape[:-1] not in ((tokens,), (heads, tokens)) or not 1 <= angles.shape[-1] <= rank // 2:
        raise ValueError(
            f"angles must be [{tokens}, m] or [{heads}, {tokens}, m] with 1 <= m <= r/2 = {rank // 2}, for "
            f"the {tokens} tokens of the grid alone, got {list(angles.shape)}"
        )
    check_finite("angles", angles)
