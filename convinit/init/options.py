"""How queries, keys and values start: the options that layers, models, `init_vit_` and training share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convinit._checks import (
    check_choice,
    check_kernel_size,
    check_offsets,
    check_padding_mode,
)
from convinit.fit import Adam, Newton
from convinit.fit.api import DEFAULT_PEAK, Solver, check_goal, check_solver
from convinit.offsets import sample_offsets

DRAWN = ("mimetic", "random")
FITTED = ("impulse", "scrambled", "norm_matched")
METHODS = ("impulse", "mimetic", "random", "default", "scrambled", "norm_matched", "position_only")
VALUES = ("mimetic", "default")
DISTRIBUTIONS = ("normal", "uniform")

# The head order of the code of arXiv 2505.19985, as (dy, dx): centre, up, right, left, down, then corners.
FIXED_ORDER = ((0, 0), (-1, 0), (0, 1), (0, -1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class InitOptions:
    """Checked when it is made.

    Attributes:
        method: what queries and keys start as, one of `METHODS`.
        fit: the solver of the impulses, see :func:`convinit.fit_qk`; a control takes its weight norm from it.
        values: of values and output layer: "mimetic" or "default", as they were drawn.
        kernel_size: f; None: see `window`.
        peak, weight_norm: how sharp; neither: `DEFAULT_PEAK`.
        padding_mode: of the impulse matrices.
        offsets: how heads are dealt theirs, see `deal`; or theirs, [heads, 2] or [layers, heads, 2].
        distribution: of the noise in mimetic queries and keys.
    """

    method: str = "impulse"
    fit: str | Solver = "newton"
    values: str = "mimetic"
    kernel_size: int | None = None
    peak: float | None = None
    weight_norm: float | None = None
    padding_mode: str = "zeros"
    offsets: Tensor | str | None = None
    distribution: str = "normal"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_solver(self.fit)
        check_choice("values", self.values, VALUES)
        check_padding_mode(self.padding_mode)
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        if self.kernel_size is not None:
            self._set("kernel_size", check_kernel_size(self.kernel_size))
        for name in ("peak", "weight_norm"):
            if getattr(self, name) is not None and not (self.fits and self.by_newton):
                raise ValueError(
                    f"{name} must be None with method={self.method!r} and fit={self.fit!r}, which do not aim "
                    "at one"
                )
        norms, peak = check_goal(self.weight_norm, self.peak, 1)
        self._set("weight_norm", None if norms is None else norms.item())  # NumPy's numbers too as a float
        self._set("peak", None if self.peak is None else peak)
        if isinstance(self.offsets, str):
            if self.offsets not in ("random", "fixed"):
                raise ValueError(f'offsets must be None, "random", "fixed" or a tensor, got {self.offsets!r}')
            if self.offsets == "fixed" and self.kernel_size not in (None, 3):
                raise ValueError(f'kernel_size must be 3 with offsets="fixed", got {self.kernel_size}')
        elif self.offsets is not None:
            given = self.offsets
            if isinstance(given, Tensor) and given.dim() == 3:
                given = given.flatten(0, 1)
            self._set("offsets", check_offsets(given, values=True).detach().to("cpu", copy=True))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def rule(self) -> str:
        """By which heads got their offsets: "stratified", "random", "fixed" or "given"."""
        return "given" if isinstance(self.offsets, Tensor) else self.offsets or "stratified"

    @property
    def fits(self) -> bool:
        """Whether queries and keys are fitted, as impulses or as a control that needs the same fit."""
        return self.method in FITTED

    @property
    def draws(self) -> bool:
        """Whether queries and keys are drawn anew, without a fit."""
        return self.method in DRAWN

    @property
    def by_newton(self) -> bool:
        """Whether the fit is ours, which aims at a peak or a weight norm; the papers' have other options."""
        return isinstance(check_solver(self.fit), Newton)

    @property
    def undisturbed(self) -> bool:
        """Whether P, where it is added to the tokens, gets a subspace of its own; see `init.subspace`."""
        return (self.fits and self.by_newton) or self.method == "position_only"

    @property
    def target_peak(self) -> float | None:
        """The peak that is wanted; None where a weight norm is, or where the papers' fits decide."""
        if self.weight_norm is not None or not (self.fits and self.by_newton):
            return None
        return DEFAULT_PEAK if self.peak is None else self.peak

    def solver(self, num_heads: int) -> Solver:
        """`fit` with its options; the papers' Adam rescales layer by layer of `num_heads`."""
        solver = check_solver(self.fit)
        if isinstance(solver, Adam) and solver.heads == 0:
            return replace(solver, heads=num_heads)
        return solver

    def window(self, grid_sizes: Sequence[tuple[int, int]]) -> int:
        """f for layers on these grids. None means half the grid, odd, 3 to 7; and 3 with offsets="fixed".

        On 14 × 14 tokens 7 was better than 3 by 0.9 to 3.5 points in six of six pairs of runs, on 7 × 7 and
        8 × 8 nothing was better than 3; docs/init_vit has the sweep.
        """
        size = self.kernel_size
        if size is None:
            side = min(min(grid_size) for grid_size in grid_sizes)
            half = min(max(3, (side // 2 - 1) // 2 * 2 + 1), 7, 2 * side - 1)
            size = 3 if self.rule == "fixed" else half
        if self.fits and self.rule != "given":
            for grid_size in grid_sizes:
                check_kernel_size(size, grid_size)
        return size

    def deal(self, heads: Sequence[int], kernel_size: int, generator: torch.Generator | None) -> list[Tensor]:
        """The offsets [heads, 2] of each layer.

        None deals them out so that every f² heads in a row cover the window once, over all layers; "random"
        draws each by itself; "fixed" is the order of arXiv 2505.19985, the same in every layer. Given offsets
        draw as None does, so that one seed gives them the weights that they would have had if drawn.
        """
        if self.rule == "fixed":
            order = torch.tensor(FIXED_ORDER, device="cpu")
            return [order[torch.arange(count, device="cpu") % len(order)] for count in heads]
        total, independent = sum(heads), self.rule == "random"
        drawn = sample_offsets(total, kernel_size, stratified=not independent, generator=generator)
        if isinstance(self.offsets, Tensor):
            if len(self.offsets) != total:
                raise ValueError(
                    f"offsets must be [{total}, 2], one row for each head of {len(heads)} layers, got "
                    f"{list(self.offsets.shape)}"
                )
            return list(self.offsets.split(list(heads)))
        return list(drawn.split(list(heads)))
