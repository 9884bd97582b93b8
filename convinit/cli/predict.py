"""`convinit predict`."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convinit._files import empty_removed
from convinit.cli.errors import say
from convinit.train.config import check_choice_or_family

if TYPE_CHECKING:
    from convinit.serve import Prediction, Unreadable

_FORMATS = ("table", "json", "csv")


def predict_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run of convinit train, one of its checkpoints, or what save_pretrained wrote."
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders, which are searched at any depth.")
    ],
    top_k: Annotated[int, typer.Option(help="Classes for an image.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    format: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(_FORMATS)}.", show_default="as --out ends, else table"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write instead of the standard output.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, …; auto is the GPU where there is one.")
    ] = "auto",
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")] = False,
) -> None:
    """Classify images by a trained model.

    They are resized, cut and normalised as the test images were in training. Files that cannot be read are
    named on the standard error and left out; the exit code is then 1.

    Examples:

    - `convinit predict convinit-train photos/`

    - `convinit predict my-model a.jpg b.png --top-k 1 --out classes.csv`
    """
    suffix = "" if out is None else out.suffix[1:].lower()
    kind = format or (suffix if suffix in _FORMATS else "table")
    check_choice_or_family("format", kind, _FORMATS)
    from convinit.serve import Prediction, image_files, load_trained, predict

    with empty_removed(Path() if out is None else out.parent):
        if out is not None:  # what would stop the writing shows before the work, not after it
            out.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out.parent).close()
            if out.is_dir():
                raise IsADirectoryError(f"out must be a file, got the folder {out}")
        trained = load_trained(model, weights="ema" if ema else "model", device="cpu")
        files, failed = image_files(images)
        if not files and not failed:
            raise ValueError(f"there are no images in {', '.join(map(str, images))}")
        found: list[Prediction] = []
        try:
            for result in predict(trained, files, top_k=top_k, batch_size=batch_size, device=device):
                if isinstance(result, Prediction):
                    found.append(result)
                else:
                    failed.append(result)
        finally:  # interrupted, it gives what it has
            if found or not sys.exc_info()[0]:
                _write(found, kind, out)
            _name(failed)
        if failed:
            raise typer.Exit(1)


def _write(found: Sequence[Prediction], kind: str, out: Path | None) -> None:
    if kind == "table" and out is None:
        _table(found, Console())
        return
    if kind == "table":
        text = io.StringIO()
        _table(found, Console(file=text, width=10_000))
        content = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    else:
        content = as_json(found) if kind == "json" else as_csv(found)
    if out is None:
        typer.echo(content, nl=False)
        return
    # Names of files may be no text; they are written as the bytes that they are.
    out.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")


def as_json(found: Sequence[Prediction]) -> str:
    """A list of {"file", "predictions": [{"class", "index", "probability"}, ...]}."""
    names = ("class", "index", "probability")
    rows = [
        {"file": each.path, "predictions": [dict(zip(names, row, strict=True)) for row in _rows(each)]}
        for each in found
    ]
    return json.dumps(rows, indent=1) + "\n"  # in ASCII, for any terminal


def as_csv(found: Sequence[Prediction]) -> str:
    """A line for each class of each image: file, rank, class, index, probability."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "rank", "class", "index", "probability"])
    for each in found:
        writer.writerows([each.path, rank, *row] for rank, row in enumerate(_rows(each), 1))
    return text.getvalue()


def _rows(prediction: Prediction) -> list[tuple[str, int, float]]:
    return list(zip(prediction.classes, prediction.indices, prediction.probabilities, strict=True))


def _table(found: Sequence[Prediction], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("file", overflow="fold")
    for rank in range(1, max((len(each.classes) for each in found), default=1) + 1):
        table.add_column(f"top {rank}", overflow="fold")
    for each in found:
        cells = [f"{name} {100 * share:.1f} %" for name, _, share in _rows(each)]
        table.add_row(*(Text(cell) for cell in (each.path, *cells)))  # a name may look like markup
    console.print(table)


def _name(failed: Sequence[Unreadable]) -> None:
    for each in failed:
        say(f"{each.path}: {each.reason}", style="red")
    if failed:
        say(f"{len(failed)} could not be read and were left out", style="bold red")
