"""The files of a table: its page, its CSV and its figures."""

from __future__ import annotations

from pathlib import Path

import torch

from convinit._files import write_whole
from convinit.reproduce.conclusions import conclusions
from convinit.reproduce.report import Report


def write_report(report: Report, out: Path, command: str) -> list[Path]:
    """Writes the page, the CSV and the figure of a table into a folder; returns their paths.

    Args:
        report: the table.
        out: the folder.
        command: that made it.
    """
    from convinit.viz import temperature_maps

    texts = {".md": report.markdown(command, conclusions(report)), ".csv": report.csv()}
    paths = []
    for suffix, text in texts.items():
        path = out / f"{report.stem()}{suffix}"
        write_whole(path, text)
        paths.append(path)
    picture = report.picture()
    if picture is not None:
        paths.append(out / f"{report.stem()}.png")
        picture.savefig(paths[-1], dpi=130)
    if report.grid.table.name == "sigma":
        paths.append(out / f"{report.stem()}-maps.png")
        _, maps = temperature_maps(generator=torch.Generator().manual_seed(0))
        maps.savefig(paths[-1], dpi=200)  # a token is two pixels
    return paths
