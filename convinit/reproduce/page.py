"""The files of a table: its page, its CSV and its pictures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convinit._files import write_whole
from convinit.reproduce.cells import read_heads
from convinit.reproduce.conclusions import conclusions
from convinit.reproduce.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(report: Report, out: Path, command: str) -> list[Path]:
    """Writes the page, the CSV and the pictures of a table into a folder; returns their paths.

    Args:
        report: the table.
        out: the folder; its runs are in it, too.
        command: that made it.
    """
    pictures = {f"{report.stem()}{each.suffix}.png": each for each in _pictures(report, out)}
    shown = [f"{each.text}\n\n![{each.title}]({name})".strip() for name, each in pictures.items()]
    page = report.markdown(command, conclusions(report), shown)
    texts = {f"{report.stem()}.md": page, f"{report.stem()}.csv": report.csv()}
    for name, text in texts.items():
        write_whole(out / name, text)
    for name, each in pictures.items():
        each.figure.savefig(out / name, dpi=each.dpi)
    return [out / name for name in (*texts, *pictures)]


@dataclass(frozen=True, eq=False)
class _Picture:
    """suffix: of the file's name. text: what stands above it."""

    suffix: str
    title: str
    figure: Figure
    text: str = ""
    dpi: int = 130


def _pictures(report: Report, out: Path) -> list[_Picture]:
    from convinit.viz import attention_filters, attention_maps, temperature_maps

    table, main = report.grid.table, report.figure()
    pictures = [] if main is None else [_Picture("", table.title, main)]
    heads = None
    try:
        heads = read_heads(report.grid.of_heads(), out) if table.heads else None
    except (ValueError, OSError) as error:  # the numbers must not be lost for that
        warnings.warn(f"the heads are not drawn: {error}; then give the same command again", stacklevel=3)
    if heads is not None:
        before, after = heads
        tensors = before.offsets, before.maps, after.maps, before.grid_size
        when = f"before and after training, from {table.ours} weights"
        for suffix, draw, what in (
            ("-heads", attention_filters, "Where each head looks, relative to the query (centre)"),
            ("-maps", attention_maps, "Attention maps of every head"),
        ):
            pictures.append(_Picture(suffix, what, draw(*tensors, title=f"{what}, {when}")))
    if table.name == "sigma":
        _, maps = temperature_maps(generator=torch.Generator().manual_seed(0))
        title = "Maps of random queries and keys"
        pictures.append(_Picture("-maps", title, maps, _FIGURE_5, dpi=200))  # a token is two pixels
    return pictures


_FIGURE_5 = (
    "Figure 5 of the paper illustrates σ: softmax(σ Q Kᵀ) on 16 × 16 tokens with random Q and K is nearly "
    "uniform at σ = 1 and binary at σ = 10,000, near a random permutation matrix: every row chooses one "
    "column, though rows choose freely (62 % of the columns are chosen). Such a map hardly lets a gradient "
    "through, so a very large σ is hard to train. Every map has its own scale of colours."
)
