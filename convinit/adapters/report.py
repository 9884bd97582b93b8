"""`InitReport`: what `init_vit_` did to every head, and how sharp its map came out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convinit.fit.result import map_metrics

if TYPE_CHECKING:
    from convinit.adapters.layout import Layout

_NUMBERS = ("mse", "peak", "hit_rate", "weight_norm", "prefix")


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


def no_figures(num_heads: int) -> dict[str, Tensor]:
    """Those figures of heads that have no target."""
    nothing = torch.full((num_heads,), torch.nan, dtype=torch.float64, device="cpu")
    return {"mse": nothing, "peak": nothing, "hit_rate": nothing, "prefix": nothing}


@dataclass(eq=False, repr=False)
class InitReport:
    """What :func:`convinit.init_vit_` did, layer by layer and head by head.

    ``print(report)`` shows a table; ``report.to_pandas()`` and ``report.to_json()`` take it elsewhere.

    Attributes:
        records: one :class:`LayerRecord` a layer that was set.
        grid_size: (H, W) of the patch tokens (of the first, where a model has several grids).
        method: by which queries and keys were set.
        seconds: wall-clock time.
        notes: what should be known of the whole model.
        places: for each record the layout and the number of the attention in it. They refer to the model's
            own parameters, and so follow the model as it trains.
    """

    records: list[LayerRecord]
    grid_size: tuple[int, int]
    method: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    places: Sequence[tuple[Layout, int]] = ()

    @property
    def attentions(self) -> list[Any]:
        """The model's own attentions, one for each record."""
        return [layout.attentions[i] for layout, i in self.places]

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the patch tokens of each record; in Swin of a window."""
        return [layout.grid_of(i) for layout, i in self.places]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary a head: layer, name, head, dy, dx and the figures as Python numbers."""
        for record in self.records:
            for head in range(len(record.weight_norm)):
                dy, dx = (None, None) if record.offsets is None else record.offsets[head].tolist()
                row = {"layer": record.layer, "name": record.name, "head": head, "dy": dy, "dx": dx}
                row |= {name: float(getattr(record, name)[head]) for name in _NUMBERS}
                for name in ("peak_on_images", "prefix_on_images"):
                    values = getattr(record, name)
                    row[name] = None if values is None else float(values[head])
                yield row | {"note": record.note}

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each head (needs pandas)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas, which is not installed; get it with: pip install pandas"
            ) from error
        return pandas.DataFrame(list(self.rows()))

    def to_json(self, *, indent: int | None = 1) -> str:
        """JSON text with the settings and a list of all heads; a figure that does not exist is null."""
        heads = [
            {
                key: None if isinstance(value, float) and value != value else value
                for key, value in row.items()
            }
            for row in self.rows()
        ]
        content = {
            "method": self.method,
            "grid_size": list(self.grid_size),
            "seconds": self.seconds,
            "notes": self.notes,
            "heads": heads,
        }
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        rows = list(self.rows())
        on_images = any(row["peak_on_images"] is not None for row in rows)
        head = f"{'layer':>5} {'head':>5} {'offset':>9} {'mse':>10} {'peak':>7} {'hit rate':>9}"
        head += f" {'weight norm':>12} {'to prefix':>10}" + f" {'on images':>10}" * on_images
        lines = [head]
        for row in rows:
            offset = "-" if row["dy"] is None else f"({row['dy']:+d},{row['dx']:+d})"
            line = f"{row['layer']:>5} {row['head']:>5} {offset:>9} {row['mse']:>10.2e} {row['peak']:>7.3f}"
            line += f" {row['hit_rate']:>9.3f} {row['weight_norm']:>12.2f} {row['prefix']:>10.3f}"
            if on_images:
                line += (
                    f" {row['peak_on_images']:>10.3f}" if row["peak_on_images"] is not None else f" {'-':>10}"
                )
            lines.append(line)
        lines.append(self.summary())
        lines += [f"layer {record.layer}: {record.note}" for record in self.records if record.note]
        return "\n".join(lines + self.notes)

    def summary(self) -> str:
        """One line: how many heads, in what time, and their mean figures."""
        heads = sum(len(record.weight_norm) for record in self.records)
        text = f"{len(self.records)} layers, {heads} heads by {self.method!r} in {self.seconds:.2f} s"
        peaks = (
            torch.cat([record.peak for record in self.records])
            if self.records
            else torch.empty(0, device="cpu")
        )
        peaks = peaks[~peaks.isnan()]
        if len(peaks):
            hits = torch.cat([record.hit_rate for record in self.records])
            text += f": peak {peaks.mean():.3f} (lowest {peaks.min():.3f}), hit rate {hits.nanmean():.3f}"
        seen = [record.peak_on_images for record in self.records if record.peak_on_images is not None]
        if seen:
            text += f", peak on images {torch.cat(seen).nanmean():.3f}"
        return text

    def __repr__(self) -> str:
        return f"<InitReport: {self.summary()}>"
