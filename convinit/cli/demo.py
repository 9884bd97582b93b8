"""`convinit demo`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from convinit.cli.errors import say
from convinit.cli.progress import runs_progress
from convinit.demo.arms import ARMS, GRID_SIZE, OURS, QUICK

if TYPE_CHECKING:
    from convinit.demo.runs import Run, Settings
    from convinit.demo.summary import Row

_FULL, _QUICK = (3, 8), (1, 5)  # seeds, epochs


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Under a minute: one seed, 5 epochs, four of the seven initialisations."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, table.md and the figures.")] = Path(
        "convinit-demo"
    ),
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds 0, 1, … of initial weights and image order.", show_default="3; --quick 1"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="8; --quick 5")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help=f"What to compare; may be repeated. Of: {', '.join(ARMS)}.", show_default="all"),
    ] = None,
    train_images: Annotated[
        int, typer.Option(help="Training images, of 1,797; the rest is for testing.")
    ] = 1000,
    test_images: Annotated[int | None, typer.Option(help="Test images.", show_default="all the rest")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at once, one thread each.", show_default="one a CPU")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Take finished runs with the same settings from the folder, or run them anew."),
    ] = True,
) -> None:
    """Train a small Vision Transformer on real images from different initial weights, and compare.

    The images are scikit-learn's 8×8 digits, one token a pixel; nothing is downloaded. Takes less than
    4 minutes on 2 idle CPU cores. Finished runs are kept as they come: after Ctrl-C the same command goes on
    where it was.

    Prints a table with what it shows and what it does not; writes results.json (every run's curve, settings,
    versions, times), table.md, curves.png, attention.png and maps.png.

    Examples:

    - `convinit demo --quick`

    - `convinit demo`

    - `convinit demo --arm default --arm impulse-vo --seeds 5 --epochs 40 --out long`
    """
    from convinit._checks import check_int
    from convinit._processes import cpus
    from convinit.demo.runs import Settings, load_runs, save_runs
    from convinit.demo.summary import as_json, conclusions, markdown, setting, summarize

    default_seeds, default_epochs = _QUICK if quick else _FULL
    number = check_int("seeds", default_seeds if seeds is None else seeds)
    arms = tuple(dict.fromkeys(arm)) if arm else QUICK if quick else tuple(ARMS)
    settings = Settings(
        epochs=check_int("epochs", default_epochs if epochs is None else epochs),
        num_train=train_images,
        num_test=test_images,
    )
    start = time.perf_counter()
    runs, fresh = _run(out, arms, range(number), settings, cpus() if jobs is None else jobs, resume)
    rows = summarize(runs)
    text = conclusions(rows, settings.epochs)
    if quick:
        text.append("Quick: fewer seeds, epochs and initialisations than convinit demo; rougher figures.")
    console = Console()
    console.print(setting(runs), highlight=False)
    console.print()
    console.print(_table(rows, settings.epochs))
    console.print()
    for sentence in text:
        console.print(f"• {sentence}", highlight=False)
    console.print()
    save_runs(out, load_runs(out), summary=as_json(rows), text=text)
    (out / "table.md").write_text(
        f"{setting(runs)}\n\n{markdown(rows, settings.epochs, text)}", encoding="utf-8"
    )
    written = [out / "results.json", out / "table.md", *_figures(out, runs, settings.epochs)]
    console.print("Written: " + ", ".join(str(path) for path in written), highlight=False, soft_wrap=True)
    kept = "" if fresh == len(runs) else f" ({len(runs) - fresh} were here already)"
    console.print(
        f"{time.perf_counter() - start:.0f} s for {fresh} runs{kept}; "
        f"all {len(runs)} took {sum(run['cpu_seconds'] for run in runs):.0f} s of CPU time.",
        highlight=False,
        soft_wrap=True,
    )


def _run(
    out: Path, arms: Sequence[str], seeds: Sequence[int], settings: Settings, jobs: int, resume: bool
) -> tuple[list[Run], int]:
    """All runs, and how many of them were made now; a bar where somebody is looking, else a line a run."""
    from convinit.demo.runs import run_demo

    console = Console(stderr=True)
    total, fresh = len(arms) * len(seeds), 0
    progress = runs_progress(console, "epochs")
    task = progress.add_task(f"training {total} networks", total=total * settings.epochs)

    def on_plan(kept: int) -> None:
        progress.update(task, total=(total - kept) * settings.epochs)
        if kept:
            say(f"{kept} of {total} runs are in {out} already", style="dim")

    def on_run(run: Run) -> None:
        nonlocal fresh
        fresh += 1
        label = ARMS[run["identity"]["arm"]].label
        if not console.is_terminal:
            seed, seconds = run["identity"]["seed"], run["seconds"]
            say(f"{label}, seed {seed}: {run['accuracy']:.1%} in {seconds:.0f} s", style="")

    try:
        with progress:
            runs = run_demo(
                out,
                arms,
                seeds,
                settings,
                jobs=jobs,
                resume=resume,
                on_plan=on_plan,
                on_epoch=lambda arm, seed, epoch: progress.advance(task),
                on_run=on_run,
            )
    except KeyboardInterrupt:
        say(
            f"interrupted: {fresh} finished runs of this call are kept in {out}. To go on: "
            f"{shlex.join(['convinit', *(word for word in sys.argv[1:] if word != '--no-resume')])}",
            style="yellow",
        )
        raise typer.Exit(130) from None
    return runs, fresh


def _table(rows: Sequence[Row], epochs: int) -> Table:
    from convinit.demo.summary import cells, columns

    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns(epochs)):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row), style="bold" if row.arm == OURS else "")
    return table


def _figures(out: Path, runs: Sequence[Run], epochs: int) -> list[Path]:
    import torch

    from convinit.demo.runs import load_maps
    from convinit.demo.summary import GOAL
    from convinit.viz import attention_filters, attention_maps, learning_curves

    curves = {}
    for key in dict.fromkeys(run["identity"]["arm"] for run in runs):
        own = [run["curve"] for run in runs if run["identity"]["arm"] == key]
        curves[ARMS[key].label] = 100 * torch.tensor(
            [[record["accuracy"] for record in curve] for curve in own]
        )
    seeds = len({run["identity"]["seed"] for run in runs})
    num_train = runs[0]["identity"]["settings"]["num_train"]
    band = f", band: {seeds} seeds" if seeds > 1 else ""
    figures = {
        "curves.png": learning_curves(
            curves, goal=100 * GOAL, title=f"8×8 digits, {num_train:,} training images{band}"
        )
    }
    ours = [run for run in runs if (run["identity"]["arm"], run["identity"]["seed"]) == (OURS, 0)]
    for run in ours:
        maps = load_maps(out, run)
        tensors = maps["offsets"], maps["start"], maps["trained"], GRID_SIZE
        when = f"before and after {epochs} epochs"
        figures["attention.png"] = attention_filters(
            *tensors, title=f"Where each head looks, relative to the query (centre), {when}"
        )
        figures["maps.png"] = attention_maps(*tensors, title=f"Attention maps of every head, {when}")
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=130)
    return [out / name for name in figures]
