"""`convinit reproduce`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Sheet

from convinit._files import empty_removed
from convinit.cli.errors import say
from convinit.cli.progress import bar

if TYPE_CHECKING:
    from convinit.reproduce.table import Table


def reproduce(
    table: Annotated[
        list[str] | None, typer.Argument(help="Experiments, or all. Without any, they are listed.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="digits: small versions, minutes to an hour each on 2 CPU cores. fashion-mnist: few real "
            "images, minutes of a GPU. cifar10, cifar100, svhn, tiny-imagenet: the papers' size. Without a "
            "TABLE the tables of each are listed."
        ),
    ] = "digits",
    root: Annotated[
        Path | None, typer.Option(help="Folder of the data set; digits come with scikit-learn.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the data set into --root if it is not there.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs and of the tables, for all tables and data sets.")
    ] = Path("convinit-reproduce"),
    seeds: Annotated[
        int, typer.Option(help="Seeds 0, 1, … of initial weights, image order and augmentation.")
    ] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at once.", show_default="one a GPU; without, one a CPU of one thread each"),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="A setting of all runs, as in convinit train's config files, such as recipe.epochs=50; may "
            "be repeated.",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the trained weights of each run.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say which runs are to do and how long they take; run nothing, and fetch no data.",
        ),
    ] = False,
) -> None:
    """Repeat the papers' experiments, with controls, seeds and shifted test images beside each.

    Every run is kept as it is finished, and tables share runs: after Ctrl-C, kill -9 or a crash the same
    command goes on where it was, in the middle of a run too. Writes DATA-TABLE.md, .csv and .png: the table,
    what it shows and what it does not.

    Examples:

    - `convinit reproduce alpha`

    - `convinit reproduce models shift --seeds 5`

    - `convinit reproduce convergence --data cifar10 --root ~/data --dry-run`

    - `convinit reproduce all --data cifar100 --root ~/data --set data.workers=12 --set recipe.epochs=100`
    """
    if not table:
        _list_tables()
        return
    from convinit.reproduce.tables import declared, tables_of

    names = [*tables_of(data)] if "all" in table else [*dict.fromkeys(table)]
    tables = [declared(name, data) for name in names]  # a typo needs no PyTorch
    from convinit._processes import cpus
    from convinit.train.config_files import parse_settings

    in_memory = data in ("digits", "fashion-mnist")
    given: dict[str, Any] = {} if in_memory else {"data.workers": min(8, (cpus() - 1) // _gpus())}
    given |= {} if root is None else {"data.root": str(root.expanduser())}
    given |= {"data.download": True} if download else {}
    given |= parse_settings(setting or ())
    # What the tables depend on, to be said in them; not where things are.
    options = [] if data == "digits" else ["--data", data]
    options += [] if seeds == 3 else ["--seeds", str(seeds)]
    options += [word for each in setting or () for word in ("--set", each)]
    run_tables(
        {shlex.join(["convinit", "reproduce", each.name, *options]): each for each in tables},
        given, out, seeds=seeds, jobs=jobs, keep_checkpoints=keep_checkpoints, dry_run=dry_run,
    )  # fmt: skip


def run_tables(
    tables: Mapping[str, Table],
    given: Mapping[str, Any],
    out: Path,
    *,
    seeds: int,
    jobs: int | None,
    keep_checkpoints: bool = False,
    dry_run: bool = False,
) -> None:
    """Does the runs of tables that are not in a folder yet, then prints the tables and writes their pages.

    Args:
        tables: by the command that makes each, as its page says.
        given: "section.key" → value for all runs; what surrounds a run, such as a folder, is not in the names
            of the pages.
        out: folder of the runs and of the pages.
        seeds: how many.
        jobs: runs at once; None chooses.
        keep_checkpoints: of all runs, not just of those whose heads a page shows.
        dry_run: say what there is to do, and do nothing.
    """
    from convinit import reproduce as api
    from convinit._checks import check_int
    from convinit.reproduce.cells import CELLS, identity
    from convinit.reproduce.grid import check_data, jobs_for
    from convinit.train.config import field_of
    from convinit.train.run import RunInterrupted

    check_int("seeds", seeds)
    if jobs is not None:
        check_int("jobs", jobs)
    grids = [api.Grid.of(each, range(seeds), given) for each in tables.values()]
    todo = api.unfinished(grids, out)
    at_once = jobs_for(todo, jobs) if todo else 0
    found = check_data(grids, fetch=not dry_run) if todo or dry_run else {}
    if dry_run:
        _print_plan(grids, out, found, at_once)
        return
    kept = todo if keep_checkpoints else [grid.of_heads() for grid in grids if grid.table.heads]
    start = time.perf_counter()
    errors: list[str] = []
    interrupted, dead = False, None
    try:
        with empty_removed(out / CELLS):
            (out / CELLS).mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows now
            errors = _run(grids, todo, out, jobs, {identity(config) for config in kept})
    except (KeyboardInterrupt, RunInterrupted):
        interrupted = True
    except RuntimeError as error:
        dead = error
    settled = {key: value for key, value in given.items() if field_of(key).metadata["fixed"]}
    written = _report(dict(zip(tables, grids, strict=True)), out, settled)
    if written:
        Console().print(
            "Written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True, markup=False
        )
    if interrupted:
        say(
            f"interrupted: finished runs are kept in {out}, and what those in progress had saved. To go on: "
            f"{shlex.join(['convinit', *sys.argv[1:]])}",
            style="yellow",
        )
        raise typer.Exit(130)
    if dead is not None:
        raise dead
    if todo:
        seconds = time.perf_counter() - start
        Console().print(f"{seconds:.0f} s for {len(todo)} runs, {at_once} at once.", highlight=False)
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(todo)} runs could not be made: {errors[0]}")


def _list_tables() -> None:
    from convinit.reproduce.tables import DATA, data_of, declared, tables_of

    console = Console()
    by_data: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for data in DATA for name in tables_of(data)):
        by_data.setdefault(data_of(name), []).append(name)
    for data, names in by_data.items():
        sheet = Sheet(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name in names:
            table = declared(name, data[0])
            sheet.add_row(f"[bold]{name}[/bold]", f"{table.title}. {table.question}")
        sets = ", ".join(f"{each} (the default)" if each == DATA[0] else each for each in data)
        console.print(f"For --data {sets}:", highlight=False)
        console.print(sheet, "", highlight=False)
    console.print("Run one or several, or all: convinit reproduce TABLE --data NAME. More: --help")


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _names(grids: Sequence[Any]) -> dict[str, str]:
    """Identity → "table, row, column, seed" of each run, by the first table that has it."""
    from convinit.reproduce.cells import identity

    return {
        identity(config): f"{grid.table.name}, {row}, {column}, seed {config.run.seed}"
        for grid in reversed(grids)
        for (row, column), configs in reversed(grid.configs.items())
        for config in configs
    }


def _run(
    grids: Sequence[Any], todo: Sequence[Any], out: Path, jobs: int | None, keep: Collection[str]
) -> list[str]:
    """The runs that are missing; a bar where somebody looks, else a line a run. Returns what failed."""
    from convinit.reproduce import run_all
    from convinit.reproduce.cells import identity

    names = _names(grids)
    if kept := len(names) - len(todo):
        say(f"{kept} of {len(names)} runs are in {out} already", style="dim")
    finished = 0
    errors: list[str] = []

    def on_run(config: Any, outcome: Any) -> None:
        nonlocal finished
        finished += 1
        name = names[identity(config)]
        if "error" in outcome:
            errors.append(f"{name}: {outcome['error']}")
        wrong = outcome.get("error") or outcome.get("failed")
        if wrong or progress.disable:
            result = wrong or f"{outcome['accuracy']:.1%}"
            with progress.external_write_mode():
                say(f"{finished}/{len(todo)} {name}: {result}", style="yellow" if wrong else "")

    with bar(len(todo), "training", "runs", digits=1) as progress:
        run_all(
            todo,
            out,
            jobs=jobs,
            keep=keep,
            on_tick=progress.update,
            on_run=on_run,
        )
    return errors


def _report(grids: Mapping[str, Any], out: Path, given: Mapping[str, Any]) -> list[Path]:
    """Writes and prints the tables of what there is; `grids` by their commands."""
    from convinit.reproduce import Report, write_report
    from convinit.reproduce.conclusions import conclusions

    written: list[Path] = []
    console = Console()
    for command, grid in grids.items():
        report = Report(grid, grid.outcomes(out), given)
        if not report.counts()[0]:
            continue
        console.print(f"[bold]{grid.table.title}[/bold]\n{report.setting()}\n", highlight=False)
        for name, lines in report.tables():
            sheet = Sheet(
                box=None, padding=(0, 2, 0, 0), title=name or None, title_justify="left", title_style="italic"
            )
            for i, head in enumerate(lines[0]):
                sheet.add_column(head, justify="left" if i == 0 else "right")
            for line in lines[1:]:
                sheet.add_row(*line, style="bold" if line[0] == grid.table.ours else "")
            console.print(sheet)
            console.print()
        for sentence in conclusions(report):
            console.print(f"• {sentence}", highlight=False, markup=False)
        console.print()
        written += write_report(report, out, command)
    return written


def _print_plan(grids: Sequence[Any], out: Path, data: Any, at_once: int) -> None:
    from convinit.cli.train import duration
    from convinit.reproduce import unfinished
    from convinit.reproduce.cells import identity
    from convinit.reproduce.grid import count_steps, kind_of_step, measure_steps

    todo = unfinished(grids, out)
    kinds = len({kind_of_step(config) for config in todo})
    with bar(kinds, "measuring steps", "kinds of steps") as progress:
        times = measure_steps(todo, on_kind=progress.update)
    sheet = Sheet(box=None, padding=(0, 2, 0, 0))
    for head in ("table", "cells", "runs", "to do", "steps a run", "ms a step", "time"):
        sheet.add_column(head, justify="left" if head == "table" else "right")
    seen: set[str] = set()
    total = 0.0
    for grid in grids:
        own = [config for config in unfinished([grid], out) if identity(config) not in seen]
        seen |= {identity(config) for config in own}
        steps = [count_steps(config, data[config.data.name]) for config in own]
        each = [times[kind_of_step(config)] for config in own]
        seconds = sum(number * time for number, time in zip(steps, each, strict=True)) / max(at_once, 1)
        total += seconds
        sheet.add_row(
            grid.table.name,
            str(len(grid.configs)),
            str(len(grid.runs())),
            str(len(own)),
            _range([float(number) for number in steps], 1, "{:,.0f}"),
            _range(each, 1000, "{:,.1f}"),
            duration(seconds),
        )
    Console().print(sheet, highlight=False)
    Console().print(
        f"{len(todo)} runs to do, {at_once} at once on {_device(todo)}: about {duration(total)} by the steps "
        "as measured now, without tests, reading or fits. Runs that tables share stand in the first of them.",
        highlight=False,
    )


def _range(values: Sequence[float], unit: float, form: str) -> str:
    if not values:
        return "–"
    low, high = form.format(unit * min(values)), form.format(unit * max(values))
    return low if low == high else f"{low} to {high}"


def _device(configs: Sequence[Any]) -> str:
    import torch

    from convinit._processes import cpus

    if torch.cuda.is_available() and not all(config.run.cpu for config in configs):
        return torch.cuda.get_device_name(0)
    return f"{cpus()} CPUs"
