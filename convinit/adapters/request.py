"""What was asked of `init_vit_`, checked once and handed to every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convinit._checks import check_choice, check_generator, check_real
from convinit.init.options import InitOptions

POSITIONS = ("subspace", "new", "keep")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request(InitOptions):
    """The options of :func:`convinit.init_vit_` that say how attentions are set."""

    alpha: float | None
    position: str | None
    pos_embed_gain: float | None
    generator: torch.Generator | None
    model: nn.Module
    images: Any
    shared: bool
    position_was_given: bool = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("position_was_given", self.position is not None)
        if self.position is None:
            new = self.undisturbed and self.pos_embed_gain is None
            self._set("position", "subspace" if new else "keep")
        check_choice("position", self.position, POSITIONS)
        if self.pos_embed_gain is not None and self.position != "keep":
            raise ValueError(
                "give position or pos_embed_gain, not both: a gain enlarges the position embedding as it is; "
                f"got {self.position!r} and {self.pos_embed_gain}"
            )
        for name, upper in (("pos_embed_gain", math.inf), ("alpha", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            value = check_real(name, value)
            self._set(name, value)  # NumPy's numbers too as a float
            lowest = value >= 0 if name == "alpha" else value > 0
            if not (lowest and value < upper):
                bracket = "[" if name == "alpha" else "("
                raise ValueError(f"{name} must lie in {bracket}0, {upper}), got {value}")
        check_generator(self.generator)

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

    def check_biases(
        self, root: nn.Module, *, controls: Sequence[str], padding_modes: Sequence[str] = ("zeros",)
    ) -> None:
        """For models whose impulses are made by biases instead of a fit, with the controls that they have."""
        for name, value, known in (
            ("padding_mode", self.padding_mode, padding_modes),
            ("fit", self.fit, ("newton",)),
            ("method", self.method, ("impulse", *controls, "mimetic", "random", "default")),
        ):
            if value not in known and not (name == "fit" and self.by_newton):
                raise ValueError(
                    f"{name} must be {' or '.join(known)} for {type(root).__name__}, whose biases depend on "
                    f"the shift between tokens alone, got {value!r}"
                )
