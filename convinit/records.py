"""Records of a model's heads: at the start, and while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convinit._optional import require
from convinit.fit.result import map_metrics

MEASURES = ("peak", "hit_rate", "distance")


@dataclass(eq=False)
class LayerRecord:
    """One layer's heads.

    Attributes:
        layer: its number in the model, from 0.
        name: of its attention, as in ``model.named_modules()``.
        offsets: [heads, 2] int64, (dy, dx); None where the heads have none (mimetic, scrambled).
        targets: [heads, N] int64, the token that each token is to look at; −1: nowhere. None: no target.
        mse, peak, hit_rate: [heads] float64, of the map that the positions alone make, as written to the
            model; NaN without targets. Class and register tokens compete for the attention there too.
        weight_norm: [heads] float64, √(‖W_q‖_F · ‖W_k‖_F); of biases or tables where those hold it.
        prefix: [heads] float64, mean attention of the patches on all class and register tokens.
        peak_on_images, prefix_on_images: [heads] float64, the same on a batch of images; None: not measured.
        asked_peak: the mean attention on the target that was wanted of the layer; None: none was.
        share: of P in the norm of the tokens that the layer saw on images; None: not measured.
        note: what should be known of this layer, or "".
    """

    layer: int
    name: str
    offsets: Tensor | None
    targets: Tensor | None
    mse: Tensor
    peak: Tensor
    hit_rate: Tensor
    weight_norm: Tensor
    prefix: Tensor
    peak_on_images: Tensor | None = None
    prefix_on_images: Tensor | None = None
    asked_peak: float | None = None
    share: float | None = None
    note: str = ""


def measured(maps: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """mse, peak, hit_rate and prefix [heads] of maps [heads, T, T] whose last N tokens are the patches."""
    maps = maps.double().cpu()
    prefix = maps.shape[-1] - targets.shape[-1]
    patches = maps[:, prefix:]  # [heads, N, T]
    mse, peak, hit_rate = map_metrics(patches[:, :, prefix:], targets.cpu())
    return {
        "mse": mse,
        "peak": peak,
        "hit_rate": hit_rate,
        "prefix": patches[:, :, :prefix].sum(dim=2).mean(dim=1),
    }


def no_metrics(num_heads: int) -> dict[str, Tensor]:
    """Those metrics of heads that have no target."""
    nothing = torch.full((num_heads,), torch.nan, dtype=torch.float64, device="cpu")
    return {"mse": nothing, "peak": nothing, "hit_rate": nothing, "prefix": nothing}


@dataclass(frozen=True, eq=False)
class DriftHistory:
    """Records over training, of the maps that the positions alone make.

    Attributes:
        steps: [records] int64, training steps done.
        layers: [layers] int64, their numbers in the model.
        peak, hit_rate: [records, layers, heads] float32, see :class:`convinit.InitReport`; NaN for heads that
            have no target, and beyond the heads of a layer that has fewer than others.
        distance: [records, layers, heads] float32, total variation between the head's map and its map at the
            start, ½ Σₘ |aₙₘ − bₙₘ|, mean over the patches n: the share of attention that has moved, 0 to 1.
    """

    steps: Tensor
    layers: Tensor
    peak: Tensor
    hit_rate: Tensor
    distance: Tensor

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each record and head (needs pandas)."""
        pandas = require("pandas", "to_pandas", "pandas")
        record, layer, head = (~self.distance.isnan()).nonzero(as_tuple=True)
        columns = {"step": self.steps[record], "layer": self.layers[layer], "head": head}
        columns |= {name: getattr(self, name)[record, layer, head] for name in MEASURES}
        return pandas.DataFrame({name: values.numpy() for name, values in columns.items()})
