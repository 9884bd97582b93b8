"""What was asked of `init_vit_`, checked once and handed to every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from convinit._checks import check_generator, check_padding_mode, check_real
from convinit.fit import Adam, Newton
from convinit.fit.api import DEFAULT_PEAK, METHODS, Method

UNFITTED = ("mimetic", "norm_matched", "scrambled", "keep")
VALUES = ("mimetic", "keep")


@dataclass(frozen=True)
class Request:
    """The options of :func:`convinit.init_vit_` that say how attentions are set."""

    method: str | Method
    weight_norm: float | None
    peak: float | None
    alpha: float | None
    pos_embed_gain: float | None
    values: str
    padding_mode: str
    generator: torch.Generator | None

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
        if goals and (self.method in ("mimetic", "keep") or self.by_papers):
            raise ValueError(
                f"{goals[0]} must be None with method {self.method!r}, which does not aim at one"
            )

    @property
    def target_peak(self) -> float | None:
        """The peak that is wanted; None where a weight norm is, or where the papers' methods decide."""
        if self.weight_norm is not None or self.by_papers or self.method in ("mimetic", "keep"):
            return None
        return DEFAULT_PEAK if self.peak is None else float(self.peak)

    @property
    def by_papers(self) -> bool:
        return self.method in ("adam", "svd") or not isinstance(self.method, (str, Newton))

    def refuse_additive(self, root: nn.Module) -> None:
        """For models whose maps do not come from a position embedding that is added to the tokens."""
        for name in ("alpha", "pos_embed_gain"):
            if getattr(self, name) is not None:
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
