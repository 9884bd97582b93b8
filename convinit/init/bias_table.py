"""Impulses in a relative position bias table, as window attention (Swin) has it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convinit._checks import check_choice, check_grid_size, check_number, check_tensor
from convinit.fit.api import check_goal, impulses
from convinit.fit.result import MapFit, map_metrics
from convinit.init._shared import first_of_each, rounded


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BiasTableFit(MapFit):
    """A relative position bias table with an impulse for each of B heads, and the maps that it alone makes.

    Attributes:
        bias_table: [(2H − 1)(2W − 1), B], as written.
        value: the impulse's height, as the table's dtype holds it.
        mse, peak, hit_rate, targets, offsets, seconds: see :class:`convinit.fit.result.MapFit`; N = H · W
            tokens of one window.
        weight_norm: [B] float64, the norm of the head's column: `value`, times the root of the number of
            cells that have it.
    """

    bias_table: Tensor
    value: float

    def _details(self) -> str:
        return f"N={self.targets.shape[1]}, value={self.value:.2f}"


@torch.no_grad()
def impulse_bias_table_(
    table: Tensor,
    offsets: Tensor,
    window_size: Sequence[int],
    *,
    peak: float | None = None,
    value: float | None = None,
    padding_mode: str = "zeros",
) -> BiasTableFit:
    """Set a relative position bias table to one impulse a head, at its offset, and zero elsewhere.

    attention = softmax(logits + table[index]),  index = (y_q − y_k + H − 1)(2W − 1) + (x_q − x_k + W − 1)

    The index is of query less key, so the impulse of (dy, dx) stands at (H − 1 − dy)(2W − 1) + (W − 1 − dx).
    While the logits are zero, a row with its target in the window attends to it with exactly

        peak = e^value / (e^value + N − 1),   value = log(peak (N − 1) / (1 − peak)),   N = H · W,

    and a row without one looks everywhere alike. Masks, as those of shifted windows, make it sharper. With
    padding_mode="circular" up to four cells, H and W apart, hold the impulse: each row sees just one of them.

    Args:
        table: [(2H − 1)(2W − 1), heads], written in place; timm, torchvision and transformers name it
            relative_position_bias_table. Where a class token has rows too, pass a view without them.
        offsets: [heads, 2], any integer dtype: (dy, dx) in tokens.
        window_size: (H, W) of the window.
        peak: the wanted mean attention on the target, in (1/N, 1); if neither is given, that of
            :func:`convinit.fit_qk`.
        value: instead of `peak`, the impulse's height, positive.
        padding_mode: where tokens look whose target leaves the window, see :func:`convinit.impulse_matrix`:
            "zeros" or "circular"; the others would need cells that all tokens see.

    Returns:
        The :class:`BiasTableFit`: mse, peak, hit_rate, weight_norm, head by head.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.

    Source: arXiv 2505.19985 reports impulses for Swin; its code is not published; the formula is ours.
    """
    start = time.perf_counter()
    height, width = check_grid_size(window_size, "window_size")
    cells, tokens = (2 * height - 1) * (2 * width - 1), height * width
    check_tensor("table", table, f"[{cells}, heads]", dims=2)
    if table.shape[0] != cells:
        raise ValueError(
            f"table must be [{cells}, heads] for a {height} x {width} window, got {list(table.shape)}"
        )
    heads = table.shape[1]
    check_choice("padding_mode", padding_mode, ("zeros", "circular"))
    offsets, targets = impulses(offsets, (height, width), padding_mode=padding_mode)
    if len(offsets) != heads:
        raise ValueError(
            f"offsets must be [{heads}, 2], one row for each column of table, got {list(offsets.shape)}"
        )
    if value is None:
        _, peak = check_goal(None, peak, heads)
        assert peak is not None
        if peak * tokens <= 1:
            raise ValueError(f"peak must be above 1/N = {1 / tokens:.3g}, that of a uniform map, got {peak}")
        value = math.log(peak * (tokens - 1) / (1 - peak))
    elif peak is not None:
        raise ValueError(f"give peak or value, not both: one follows from the other; got {peak} and {value}")
    value = check_number("value", value)
    written = rounded("table", table, torch.tensor(value, dtype=torch.float64, device="cpu"))
    value = value if table.is_meta else written.item()

    shifts = torch.cartesian_prod(
        *(torch.arange(n - 1, -n, -1, device="cpu") for n in (height, width))
    )  # [cells, 2], of a key from its query
    apart = shifts.unsqueeze(1) - offsets.cpu()
    if padding_mode == "circular":
        apart %= torch.tensor([height, width], device="cpu")
    hit = (apart == 0).all(dim=2)
    table.copy_(hit * torch.tensor(value, dtype=torch.float64, device="cpu"))

    distinct, kind = torch.unique(offsets.cpu(), dim=0, return_inverse=True)
    metrics = torch.empty(3, len(distinct), dtype=torch.float64, device="cpu")
    for k, head in enumerate(first_of_each(kind, len(distinct))):
        target = targets[head].cpu()
        bias = torch.zeros(1, tokens, tokens, dtype=torch.float64, device="cpu")
        bias[0, target >= 0, target[target >= 0]] = value
        metrics[:, k] = torch.cat(map_metrics(bias.softmax(dim=-1), target[None]))
    mse, reached, hit_rate = metrics[:, kind]
    return BiasTableFit(
        mse=mse, peak=reached, hit_rate=hit_rate, weight_norm=value * hit.sum(dim=0).double().sqrt(),
        targets=targets.to(table.device), offsets=offsets.to(table.device), bias_table=table.clone(),
        value=value, seconds=time.perf_counter() - start,
    )  # fmt: skip
