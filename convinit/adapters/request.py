"""What was asked of `init_vit_`, checked once and handed to every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from convinit._checks import check_generator, check_padding_mode, check_real
from convinit.fit import Adam, Newton
from convinit.fit.api import DEFAULT_PEAK, METHODS, Method

UNFITTED = ("mimetic", "norm_matched", "scrambled", "position_only", "keep")
POSITIONS = ("subspace", "new", "keep")
VALUES = ("mimetic", "keep")


@dataclass(frozen=True)
class Request:
    """The options of :func:`convinit.init_vit_` that say how attentions are set."""

    method: str | Method
    weight_norm: float | None
    peak: float | None
    alpha: float | None
    position: str
    pos_embed_gain: float | None
    values: str
    padding_mode: str
    generator: torch.Generator | None
    position_was_given: bool
    model: nn.Module
    images: Any
    shared: bool

    def __post_init__(self) -> None:
        known = (*METHODS, *UNFITTED)
        if not (isinstance(self.method, Method) or self.method in known):
            raise ValueError(
                f"method must be one of {', '.join(known)} or a convinit.fit.Newton, Adam or SVD, "
                f"got {self.method!r}"
            )
        if self.values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}, got {self.values!r}")
        if self.weight_norm is not None and self.peak is not None:
            raise ValueError(
                "give weight_norm or peak, not both: one follows from the other; "
                f"got {self.weight_norm} and {self.peak}"
            )
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {self.position!r}")
        if self.pos_embed_gain is not None and self.position != "keep":
            raise ValueError(
                "give position or pos_embed_gain, not both: a gain enlarges the position embedding as it is; "
                f"got {self.position!r} and {self.pos_embed_gain}"
            )
        for name, upper in (
            ("weight_norm", math.inf),
            ("pos_embed_gain", math.inf),
            ("peak", 1),
            ("alpha", 1),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            value = check_real(name, value)
            object.__setattr__(self, name, value)  # NumPy's numbers too as a float
            lowest = value >= 0 if name == "alpha" else value > 0
            if not (lowest and value < upper):
                bracket = "[" if name == "alpha" else "("
                raise ValueError(f"{name} must lie in {bracket}0, {upper}), got {value}")
        check_generator(self.generator)
        check_padding_mode(self.padding_mode)
        goals = [name for name in ("weight_norm", "peak") if getattr(self, name) is not None]
        if goals and not (self.fits and not self.by_papers):
            raise ValueError(
                f"{goals[0]} must be None with method {self.method!r}, which does not aim at one"
            )

    @property
    def target_peak(self) -> float | None:
        """The peak that is wanted; None where a weight norm is, or where the papers' methods decide."""
        if self.weight_norm is not None or self.by_papers or not self.fits:
            return None
        return DEFAULT_PEAK if self.peak is None else float(self.peak)

    @property
    def by_papers(self) -> bool:
        return self.method in ("adam", "svd") or not isinstance(self.method, (str, Newton))

    @property
    def fits(self) -> bool:
        """Whether queries and keys are fitted, as impulses or as a control that needs the same fit."""
        return self.method not in ("mimetic", "position_only", "keep")

    def draw_seed(self) -> int:
        """A seed for draws that not every call makes."""
        return int(torch.randint(2**62, (), generator=self.generator, device="cpu"))

    def refuse_additive(self, root: nn.Module) -> None:
        """For models whose maps do not come from a position embedding that is added to the tokens."""
        if self.method == "position_only":
            raise ValueError(
                f"method must not be position_only for {type(root).__name__}: it adds no position embedding"
            )
        given = {"alpha": self.alpha is not None, "pos_embed_gain": self.pos_embed_gain is not None}
        for name, was_given in {**given, "position": self.position_was_given}.items():
            if was_given:
                raise ValueError(
                    f"{name} must be None for {type(root).__name__}: its attention maps do not depend on a "
                    "position embedding that is added to the tokens"
                )

    def biases_method(self, root: nn.Module) -> str:
        """The method, where impulses are made by biases instead of a fit."""
        known = ("newton", "norm_matched", "mimetic", "keep")
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be zeros for {type(root).__name__}, whose biases depend on the shift "
                f"between tokens alone, got {self.padding_mode!r}"
            )
        method = "newton" if isinstance(self.method, Newton) else self.method
        if method not in known:
            raise ValueError(
                f"method must be one of {', '.join(known)} for {type(root).__name__}, whose biases depend on "
                f"the shift between tokens alone, got {self.method!r}"
            )
        return str(method)

    def fit_method(self, num_heads: int) -> str | Method:
        """The method that the fit is made with; the papers' Adam rescales layer by layer of `num_heads`."""
        if self.method in UNFITTED:
            return "newton"
        if self.method == "adam":
            return Adam(heads=num_heads)
        if isinstance(self.method, Adam) and self.method.heads == 0:
            return replace(self.method, heads=num_heads)
        return self.method
