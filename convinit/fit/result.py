"""What a fit returns, and the metrics by which attention maps are judged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PEAK_TOLERANCE = 0.02


def attention_maps(wq: Tensor, wk: Tensor, pos_embed: Tensor, scale: float) -> Tensor:
    """softmax(scale · (P W_q)(P W_k)ᵀ): wq, wk [B, D, r], pos_embed [N, D] -> [B, N, N]."""
    return torch.softmax(scale * (pos_embed @ wq) @ (pos_embed @ wk).mT, dim=-1)


def norms_of(w: Tensor) -> Tensor:
    """Norms [B] in float64 of w [B, ...], whose squares may be beyond float64."""
    w = w.flatten(1)
    # A few at a time, for torch makes a copy in float64.
    norms = torch.cat([torch.linalg.vector_norm(few, dim=1, dtype=torch.float64) for few in w.split(8)])
    if ((norms > 1e-140) & norms.isfinite()).all():
        return norms
    w = w.double()
    top = w.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return top[:, 0] * (w / top).norm(dim=1)


def map_metrics(attention: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mse, peak and hit_rate [B] of attention [B, N, N] against targets [B, N] (-1: a zero row)."""
    inside = targets >= 0
    column = targets.clamp(min=0)[:, :, None]
    on_target = attention.gather(2, column)[:, :, 0]
    others = attention.scatter(2, column, 0.0)  # the one copy of what may be large
    squares = torch.linalg.vector_norm(others, dim=(1, 2)).square() + (
        on_target - inside.to(others)
    ).square().sum(1)
    hit = on_target > others.amax(dim=2)  # a tie with another token is none
    rows = inside.sum(dim=1).clamp(min=1)
    return (
        squares / (attention.shape[1] * attention.shape[2]),
        (on_target * inside).sum(dim=1) / rows,
        (hit & inside).sum(dim=1, dtype=attention.dtype) / rows,
    )


def warn_if_missed(peak: float, reached: Tensor, remedy: str, *, stacklevel: int) -> None:
    """Warns if heads [B] missed the wanted peak; `remedy` says what to do where they got less."""
    missed = (reached - peak).abs() > _PEAK_TOLERANCE
    if not missed.any():
        return
    if not (reached < peak).any():
        remedy = "A uniform map has that much already; ask for more."
    warnings.warn(
        f"peak={peak} was not reached by {int(missed.sum())} of {len(reached)} heads: they got "
        f"{reached[missed].min():.3f} to {reached[missed].max():.3f} (the fit's peak has all). {remedy}",
        stacklevel=stacklevel + 1,
    )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MapFit:
    """How well the attention maps of B heads meet their targets; each kind of fit adds what it wrote.

    Attributes:
        mse: [B] float64, mean over all N² entries of (attention − M)², the papers' loss.
        peak: [B] float64, mean attention on the target, over the rows that have one.
        hit_rate: [B] float64, share of those rows whose largest attention is the target.
        weight_norm: [B] float64, the norm of what was written for the head; each kind says which.
        targets: [B, N] int64, the column that each row is to look at; −1 where M has a zero row.
        offsets: [B, 2] int64, or None where the fit was to arbitrary targets.
        seconds: wall-clock time of the fit.
    """

    mse: Tensor
    peak: Tensor
    hit_rate: Tensor
    weight_norm: Tensor
    targets: Tensor
    offsets: Tensor | None
    seconds: float

    def table(self) -> str:
        """One line a head: offset, mse, peak, hit rate and weight norm."""
        lines = [f"{'head':>5} {'offset':>9} {'mse':>10} {'peak':>7} {'hit rate':>9} {'weight norm':>12}"]
        for b in range(len(self.mse)):
            offset = "-" if self.offsets is None else "({:+d},{:+d})".format(*self.offsets[b].tolist())
            lines.append(
                f"{b:>5} {offset:>9} {self.mse[b]:>10.3e} {self.peak[b]:>7.3f} {self.hit_rate[b]:>9.3f} "
                f"{self.weight_norm[b]:>12.3f}"
            )
        return "\n".join(lines)

    def _details(self) -> str:
        """What __repr__ says beside the metrics."""
        return f"N={self.targets.shape[1]}"

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({len(self.mse)} heads, {self._details()}"
        if len(self.mse) == 0:
            return head + ")"

        def span(values: Tensor, digits: str) -> str:
            low, high = values.min().item(), values.max().item()
            text = f"{values.mean().item():{digits}}"
            return (
                text
                if f"{low:{digits}}" == f"{high:{digits}}"
                else f"{text} [{low:{digits}}, {high:{digits}}]"
            )

        return (
            f"{head}, {self.seconds:.2f} s)\n  mse {span(self.mse, '.2e')}, peak {span(self.peak, '.3f')}, "
            f"hit_rate {span(self.hit_rate, '.3f')}, weight_norm {span(self.weight_norm, '.2f')}"
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class QKFit(MapFit):
    """Query and key weights of B heads, and how well their attention maps meet their targets.

    Attributes:
        wq, wk: [B, D, r], on the device and in the dtype of `pos_embed`. As `nn.Linear` weights [B·r, D]:
            `wq.mT.reshape(-1, D)`.
        mse, peak, hit_rate, targets, offsets, seconds: see :class:`MapFit`.
        weight_norm: [B] float64, √(‖W_q‖_F · ‖W_k‖_F).
        pos_embed: [N, D], what was fitted against.
        scale: the softmax temperature.
        fit: the solver with its options.
    """

    wq: Tensor
    wk: Tensor
    pos_embed: Tensor
    scale: float
    fit: object

    def attention_map(self, heads: int | slice | Sequence[int] | None = None) -> Tensor:
        """softmax(scale · (P W_q)(P W_k)ᵀ) of the chosen heads (default: all), [heads, N, N]."""
        chosen = [heads] if isinstance(heads, int) else slice(None) if heads is None else heads
        return attention_maps(self.wq[chosen], self.wk[chosen], self.pos_embed, self.scale)

    def _details(self) -> str:
        _, dim, rank = self.wq.shape
        return f"N={self.pos_embed.shape[0]}, D={dim}, r={rank}, {self.fit}"
