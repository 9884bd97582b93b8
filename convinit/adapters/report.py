"""`InitReport`: what `init_vit_` did to every head, and how sharp its map came out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from convinit._optional import require
from convinit.records import LayerRecord

if TYPE_CHECKING:
    from convinit.adapters.layout import Layout

_WIDTH = 100  # columns of a terminal
_FAR = 0.1  # a peak on images that misses what was asked by more warns
_NUMBERS = ("mse", "peak", "hit_rate", "weight_norm", "prefix")


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
        options: of the call, by their names; `position` as it was done: "new", P was replaced; "subspace", P
            was kept and got a subspace; "keep". The seed of its generator.
        images: what peaks were measured on, "yours" or "synthetic".
        places: for each record the layout and the number of the attention in it. They refer to the model's
            own parameters, and so follow the model as it trains.
    """

    records: list[LayerRecord]
    grid_size: tuple[int, int]
    method: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    places: Sequence[tuple[Layout, int]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    images: str = "synthetic"

    @property
    def attentions(self) -> list[Any]:
        """The model's own attentions, one for each record."""
        return [layout.attentions[i] for layout, i in self.places]

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the patch tokens of each record; in Swin of a window."""
        return [layout.grid_of(i) for layout, i in self.places]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary a head: layer, name, head, dy, dx and the metrics as Python numbers."""
        for record in self.records:
            for head in range(len(record.weight_norm)):
                dy, dx = (None, None) if record.offsets is None else record.offsets[head].tolist()
                row = {"layer": record.layer, "name": record.name, "head": head, "dy": dy, "dx": dx}
                row |= {name: float(getattr(record, name)[head]) for name in _NUMBERS}
                for name in ("peak_on_images", "prefix_on_images"):
                    values = getattr(record, name)
                    row[name] = None if values is None else float(values[head])
                row |= {"asked_peak": record.asked_peak, "share": record.share}
                yield row | {"note": record.note}

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each head (needs pandas)."""
        return require("pandas", "to_pandas", "pandas").DataFrame(list(self.rows()))

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
            "options": self.options,
            "images": self.images,
            "seconds": self.seconds,
            "notes": self.notes,
            "heads": heads,
        }
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        rows = list(self.rows())
        lines = [self.summary()]
        settings = ", ".join(f"{name}={value}" for name, value in self.options.items())
        lines += textwrap.wrap(f"method={self.method}, {settings}", _WIDTH) if settings else []
        head = f"{'layer':>5} {'head':>4} {'offset':>9} {'mse':>9} {'hit rate':>8} {'weight norm':>11} "
        lines.append(head + f"{'to prefix':>9} {'peak':>6} {'asked':>6} {'on images':>9} {'share':>6}")
        for row in rows:
            offset = "-" if row["dy"] is None else f"({row['dy']:+d},{row['dx']:+d})"
            line = (
                f"{row['layer']:>5} {row['head']:>4} {offset:>9} {row['mse']:>9.2e} {row['hit_rate']:>8.3f} "
            )
            line += f"{row['weight_norm']:>11.2f} {row['prefix']:>9.3f} {row['peak']:>6.3f}"
            for name, width in (("asked_peak", 6), ("peak_on_images", 9), ("share", 6)):
                line += f" {'-':>{width}}" if row[name] is None else f" {row[name]:>{width}.3f}"
            lines.append(line)
        lines += [f"layer {record.layer}: {record.note}" for record in self.records if record.note]
        return "\n".join(lines + self.notes)

    def summary(self) -> str:
        """One line: the peak on images and the one that was asked, how many heads, in what time."""
        heads = sum(len(record.weight_norm) for record in self.records)
        text = f"{len(self.records)} layers, {heads} heads by {self.method!r} in {self.seconds:.2f} s"
        seen = [record.peak_on_images for record in self.records if record.peak_on_images is not None]
        if not seen:
            return text
        on = "your images" if self.images == "yours" else "synthetic images (images=batch does better)"
        asked = [record.asked_peak for record in self.records if record.asked_peak is not None]
        wanted = f", {sum(asked) / len(asked):.2f} was asked" if asked else ""
        return f"peak {torch.cat(seen).nanmean():.2f} on {on}{wanted}; {text}"

    def missed(self) -> str | None:
        """A warning where a layer's peak on images is far from the one that was asked; None: nowhere."""
        far = {
            record.layer: float(record.peak_on_images.mean())
            for record in self.records
            if record.asked_peak is not None
            and record.peak_on_images is not None
            and abs(float(record.peak_on_images.mean()) - record.asked_peak) > _FAR
        }
        if not far:
            return None
        asked = next(record.asked_peak for record in self.records if record.layer in far)
        layers = ", ".join(f"{peak:.2f} in layer {layer}" for layer, peak in list(far.items())[:4])
        more = f" and {len(far) - 4} more" if len(far) > 4 else ""
        hint = (
            "ask for another peak, or for a larger head dimension"
            if self.options.get("position") != "keep"
            else 'position="subspace", the default where a model allows it, keeps it'
        )
        return (
            f"the mean attention on the target, on {self.images.replace('yours', 'your')} images, is {layers}"
            f"{more}; {asked:.2f} was asked: {hint}"
        )

    def check_in_use(self) -> None:
        """Raises ValueError where the model has got other tensors than those that were set."""
        for layout in {id(layout): layout for layout, _ in self.places}.values():
            layout.check_in_use()

    def __repr__(self) -> str:
        return f"<InitReport: {self.summary()}>"
