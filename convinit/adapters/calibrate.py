"""How sharp each layer's queries and keys must be for the tokens that it sees: measured, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convinit.adapters.layout import SelfAttention, Slot, is_sharded
from convinit.adapters.measure import watch_inputs

_ROWS, _IMAGES = 4096, 16  # queries that a gain is found with; images that are looked at together
_LOW, _HIGH = -2.0, 5.0  # log2 of the smallest and the largest gain
_STEPS = 128  # gains are powers of 2^(1/128), 0.5 % apart: rounding hides what devices and threads change
_LEAK = 0.05  # part of the tokens in V that is not P's, at most; bfloat16 alone makes 0.01


@dataclass(eq=False)
class Plan:
    """What one attention is to get.

    Attributes:
        weights: (wq, wk) [heads, D, r] for tokens that are P alone.
        targets: [heads, N] of those weights; None: they have none.
        offsets: of the heads, for models that keep them.
        aim: the impulse weights and targets that the gain is found with, where `weights` are a control of the
            same norm; None: `weights` themselves.
        goal: mean attention on the target that is wanted; None: gain 1.
    """

    weights: tuple[Tensor, Tensor]
    targets: Tensor | None
    offsets: Tensor | None = None
    aim: tuple[Tensor, Tensor, Tensor] | None = None
    goal: float | None = None


@dataclass(eq=False)
class Seen:
    """What was measured of one attention: figures as of `measured`, and the share of P in the tokens."""

    figures: dict[str, Tensor] | None = None
    share: float | None = None
    gain: float | None = None
    tokens: int = 0


@torch.no_grad()
def calibrate_(
    attentions: Mapping[int, SelfAttention],
    plans: Mapping[int, Plan],
    model: nn.Module,
    images: Any,
    *,
    position: tuple[Tensor, Tensor] | None,
    grid_size: tuple[int, int],
    prefix: int | None,
    shared: bool,
) -> dict[int, Seen]:
    """Writes queries and keys times the gain that gives each layer its peak, in one forward pass.

    softmax(gain² · scale · q kᵀ), mean over images, heads and patches on the target = goal

    A layer is set before it runs, so those behind it see what it makes.

    Args:
        attentions: by their number in the layout.
        plans: of those that are set; the others are only measured.
        model, images: what is run.
        position: V [D, k] and the tokens in it [N, k] of P alone; None: gains and shares are not looked for.
        grid_size, prefix: N = H·W patches behind `prefix` tokens, or any number of them with None; a layer
            that sees another number of tokens is not measured.
        shared: on several processes, which agree on the mean gain.

    Raises:
        ValueError: something else than P writes to V.
    """
    numbers = list(attentions)
    seen = {i: Seen() for i in numbers}

    def use(position_in_list: int, x: Tensor) -> None:
        i = numbers[position_in_list]
        attention, plan = attentions[i], plans.get(i)
        seen[i].tokens = x.shape[1]
        patches = math.prod(grid_size)
        if x.dim() != 3 or x.shape[1] < patches or prefix not in (None, x.shape[1] - patches):
            return
        if position is not None:
            seen[i].share = _share(attention.name, x, *position)
        if plan is None:
            return
        if position is not None and plan.goal is not None:
            assert plan.targets is not None
            wq, wk, targets = plan.aim or (*plan.weights, plan.targets)
            apply_(attention, wq, wk, 1.0)
            seen[i].gain = gain = _agree(_gain(attention, x, targets, plan.goal), shared)
            apply_(attention, *plan.weights, gain, plan.offsets)
        if plan.targets is not None:
            seen[i].figures = _measured(attention, x, plan.targets)

    # A layer that is sharded runs with the weights that it had gathered before it was set, so one more layer
    # is right after each pass.
    sharded = any(is_sharded(attention.query.weight.tensor) for attention in attentions.values())
    for _ in range(len(numbers) if sharded else 1):
        before = {i: each.gain for i, each in seen.items()}
        watch_inputs(list(attentions.values()), model, images, use, to_the_end=sharded)
        if before == {i: each.gain for i, each in seen.items()}:
            break
    return seen


def _measured(attention: SelfAttention, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    parts = [(on_target(attention.attention_map(part), targets), len(part)) for part in x.split(_IMAGES)]
    return {
        key: torch.stack([part[key] * count for part, count in parts]).sum(dim=0) / len(x)
        for key in parts[0][0]
    }


def on_target(maps: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """peak and prefix [heads] float64 of maps [B, heads, T, T], as of `measured`, means over the batch."""
    patches = maps[:, :, maps.shape[2] - targets.shape[1] :]
    prefix, targets = maps.shape[3] - targets.shape[1], targets.to(maps.device)
    inside = targets >= 0
    index = (prefix + targets.clamp(min=0))[None, :, :, None].expand(len(maps), -1, -1, 1)
    found = (patches.gather(3, index)[..., 0] * inside).double().mean(dim=0).sum(dim=1) / inside.sum(dim=1)
    return {"peak": found.cpu(), "prefix": patches[..., :prefix].double().sum(dim=3).mean(dim=(0, 2)).cpu()}


def apply_(
    attention: SelfAttention, wq: Tensor, wk: Tensor, gain: float, offsets: Tensor | None = None
) -> None:
    """Queries and keys times `gain`; behind qk_norm, which divides it out, by the weights of the norms."""
    norms = qk_norm_weights(attention)
    if norms is None:
        attention.set_qk_(gain * wq, gain * wk, offsets)
        return
    attention.set_qk_(wq, wk, offsets)
    for weight in norms:
        weight.write_(torch.full_like(weight.read(), gain))


def qk_norm_weights(attention: SelfAttention) -> list[Slot] | None:
    """The weights of its qk_norm; [] where they cannot be set, None without qk_norm."""
    if not attention.has_qk_norm:
        return None
    weights: list[Any] = [
        getattr(norm, "weight", None) for norm in (attention.query_norm, attention.key_norm)
    ]
    return [] if any(w is None or not w.requires_grad for w in weights) else [Slot(w) for w in weights]


def _share(name: str, x: Tensor, V: Tensor, alone: Tensor) -> float:
    """rms share of P in the patches of x [B, T, D]."""
    patches = x[:, x.shape[1] - len(alone) :].float()
    V, alone = V.to(patches), alone.to(patches)
    inside = patches @ V  # [B, N, k]
    along = (inside * alone).sum(dim=-1, keepdim=True) / alone.square().sum(dim=-1, keepdim=True)
    leak = float((inside - along * alone).norm() / inside.norm())
    if not leak < _LEAK:
        raise ValueError(
            f"model must let convinit see all that is added to its tokens, but {leak:.0%} of what "
            f"{name or 'the attention'} sees in the subspace of the position embedding comes from elsewhere "
            '(a layer that convinit does not know, or norms that are not as drawn); position="keep" does '
            "without that subspace"
        )
    return float(inside.norm() / (patches - patches.mean(dim=-1, keepdim=True)).norm())


def _gain(attention: SelfAttention, x: Tensor, targets: Tensor, goal: float) -> float:
    """log2 of the factor of queries and of keys with which the mean attention on the targets is `goal`."""
    patches = targets.shape[1]
    prefix = x.shape[1] - patches
    # Some patches of every image, for images differ more than the patches of one. The same at every call.
    count = min(max(round(_ROWS / (len(x) * len(targets))), 1), patches)
    drawn = torch.rand(len(x), patches, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    rows = drawn.argsort(dim=1)[:, :count].to(x.device)
    parts = []
    for part, own in zip(x.split(_IMAGES), rows.split(_IMAGES), strict=True):
        queries, keys = attention.queries_keys(part)  # [b, heads, T, r]
        index = (prefix + own)[:, None, :, None].expand(-1, len(targets), -1, queries.shape[3])
        parts.append(attention.scale * queries.gather(2, index) @ keys.mT)
    logits = torch.cat(parts)  # [B, heads, count, T]
    targets = targets.to(x.device)[:, rows].transpose(0, 1)  # [B, heads, count]
    inside = targets >= 0
    logits -= logits.gather(3, (prefix + targets.clamp(min=0))[..., None])

    def peak(log_gain: float) -> float:
        found = 1 / (4.0**log_gain * logits).exp_().sum(dim=-1)  # of a sum beyond float32: 0, as it should be
        return float((found * inside).sum() / inside.sum())

    low, high = _LOW, _HIGH
    below, above = peak(low), peak(high)
    if above < goal:  # too sharp a softmax settles on wrong tokens: the best there is
        candidates = [_LOW + i / 4 for i in range(int(4 * (_HIGH - _LOW)) + 1)]
        peaks = [peak(each) for each in candidates]
        if max(peaks) < goal:
            return next(c for c, p in zip(candidates, peaks, strict=True) if p > max(peaks) - 0.01)
        high, above = next((c, p) for c, p in zip(candidates, peaks, strict=True) if p >= goal)
    for halve in (True, True, True, False, False, False):  # there the peak is nearly linear
        share = 0.5 if halve else min(max((goal - below) / (above - below), 0.0), 1.0)
        middle = low + share * (high - low)
        found = peak(middle)
        if found < goal:
            low, below = middle, found
        else:
            high, above = middle, found
    return middle


def _agree(log_gain: float, shared: bool) -> float:
    """The gain, rounded, and the same on all processes."""
    if shared and dist.is_available() and dist.is_initialized():
        total = torch.tensor([log_gain, 1.0], dtype=torch.float64, device="cpu")
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
        log_gain = float(total[0] / total[1])
    return 2.0 ** (round(log_gain * _STEPS) / _STEPS)
