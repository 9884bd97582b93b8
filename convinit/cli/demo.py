"""`convinit demo`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

_SEEDS, _QUICK_SEEDS = 3, 1


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="About a minute on 2 idle CPU cores: one seed, 5 epochs, four of the seven initialisations.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the pictures.")] = Path(
        "convinit-demo"
    ),
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds 0, 1, … of initial weights and image order.", show_default="3; --quick 1"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at once, one thread each.", show_default="one a CPU")
    ] = None,
) -> None:
    """Train a small Vision Transformer on real images from different initial weights, and compare.

    The images are scikit-learn's 8×8 digits, one token a pixel; nothing is downloaded. Takes about
    3 minutes on 2 idle CPU cores. Finished runs are kept as they come: after Ctrl-C the same command goes on
    where it was.

    Prints a table with what it shows and what it does not. Writes a page (digits-demo.md; with --quick
    digits-demo-epochs=5.md), all numbers as CSV, and three pictures: learning curves, and where each head
    looks before and after training.
    It is the table "demo" of convinit reproduce, which has more options.

    Examples:

    - `convinit demo --quick`

    - `convinit demo`

    - `convinit reproduce demo --seeds 5 --set recipe.epochs=40 --out long`
    """
    from convinit.cli.reproduce import run_tables
    from convinit.reproduce.demo import QUICK
    from convinit.reproduce.tables import declared

    table = declared("demo")
    settings: dict[str, Any] = {}
    number = _QUICK_SEEDS if quick else _SEEDS
    command = ["convinit", "demo"]
    if quick:
        table = replace(table, rows=tuple(row for row in table.rows if row.label in QUICK))
        settings = {"recipe.epochs": 5}
        command.append("--quick")
    if seeds is not None:
        number = seeds
        command += ["--seeds", str(seeds)]
    run_tables({shlex.join(command): table}, settings, out, seeds=number, jobs=jobs)
