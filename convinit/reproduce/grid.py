"""Running a table's cells, several at once, and what that will cost."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convinit._processes import cpus, in_processes
from convinit.reproduce.cells import identity, is_done, read_outcome, run_cell
from convinit.reproduce.table import Choice, Settings, Table
from convinit.train.config import Config
from convinit.train.data import ImageData, load_data
from convinit.train.data.subsets import split_indices
from convinit.train.run import measure

Cell = tuple[str, str]  # labels of row and column


@dataclass(frozen=True)
class Grid:
    """A table with its seeds: cell → the configs of its runs, one a seed.

    Attributes:
        table: what is varied.
        seeds: of the runs.
        configs: (row label, column label) → one config a seed, for each of the table's learning rates.
    """

    table: Table
    seeds: tuple[int, ...]
    configs: Mapping[Cell, tuple[Config, ...]]

    @staticmethod
    def of(table: Table, seeds: Sequence[int], given: Settings) -> Grid:
        """A table's grid.

        Args:
            table: of `convinit.reproduce.declared`.
            seeds: of the runs.
            given: "section.key" → value for all cells.

        Raises:
            TypeError, ValueError: `given` does not fit the table.
        """

        def configs(row: Choice, column: Choice) -> tuple[Config, ...]:
            rates = table.rates or (None,)
            return tuple(table.config(row, column, seed, given, rate) for seed in seeds for rate in rates)

        cells = {(row.label, column.label): configs(row, column) for row, column in table.cells()}
        return Grid(table, tuple(seeds), cells)

    @property
    def data(self) -> str:
        """Name of the data set."""
        return next(iter(self.configs.values()))[0].data.name

    def runs(self) -> dict[str, Config]:
        """Identity → config of each run; runs that several cells share are there once. Seed by seed."""
        return {
            identity(config): config
            for seed in self.seeds
            for configs in self.configs.values()
            for config in configs
            if config.run.seed == seed
        }

    def of_heads(self) -> Config:
        """The run whose heads are shown: our row, the first column, the first seed."""
        return self.configs[self.table.ours, self.table.columns[0].label][0]

    def outcomes(self, out: Path) -> dict[Cell, list[dict[str, Any]]]:
        """The finished runs of every cell in a folder, in the order of the seeds.

        Raises:
            ValueError: an outcome is damaged.
        """
        return {
            cell: [each for config in configs if (each := read_outcome(config, out)) is not None]
            for cell, configs in self.configs.items()
        }


def unfinished(grids: Sequence[Grid], out: Path) -> list[Config]:
    """The runs that are not in `out` yet, each once; also those whose heads are shown, without a checkpoint.

    Raises:
        ValueError: an outcome is damaged.
    """
    runs: dict[str, Config] = {}
    for grid in grids:
        runs |= grid.runs()
    shown = {identity(grid.of_heads()) for grid in grids if grid.table.heads}
    return [config for key, config in runs.items() if not is_done(config, out, key in shown)]


def run_all(
    configs: Sequence[Config],
    out: Path,
    *,
    jobs: int | None = None,
    keep: Collection[str] = (),
    on_tick: Callable[[float], None] = lambda share: None,
    on_run: Callable[[Config, dict[str, Any]], None] = lambda config, outcome: None,
) -> None:
    """Does all runs, several at once; finished ones are kept as they come, stopped ones go on later.

    Args:
        configs: of `unfinished`.
        out: folder for all of them.
        jobs: runs at once; None means one a GPU, or, where runs have one thread each, one a CPU.
        keep: identities of runs whose last checkpoint is kept.
        on_tick: told the share of a run that has been done.
        on_run: told each run as it is finished, or cannot be made: {"error": what}.

    Raises:
        KeyboardInterrupt, RunInterrupted: it was asked to stop; the runs in progress have been saved.
        RuntimeError: a process died.
    """
    by_identity = {identity(config): config for config in configs}
    in_processes(
        run_cell,
        [(config, out, identity(config) in keep) for config in configs],
        on_tick=on_tick,
        on_done=lambda done: on_run(by_identity[done[0]], done[1]),
        workers=_workers(configs, jobs),
    )


def jobs_for(configs: Sequence[Config], jobs: int | None = None) -> int:
    """How many runs `run_all` does at once."""
    return min(len(configs), len(_workers(configs, jobs)))


def _workers(configs: Sequence[Config], jobs: int | None) -> list[dict[str, str]]:
    on_cpu = all(config.run.cpu for config in configs) or not torch.cuda.is_available()
    if on_cpu:
        single = all(config.run.threads == 1 for config in configs)
        return [{}] * (jobs or (cpus() if single else 1))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # CUDA ignores what stands behind an invalid entry
    gpus = [each.strip() for each in named.split(",")][:count] if named else [str(i) for i in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]


# --- what it will cost --------------------------------------------------------------------------------------


def check_data(grids: Sequence[Grid], *, fetch: bool = True) -> dict[str, ImageData]:
    """Reads each data set once, so that what is missing shows before hours are spent.

    Args:
        grids: whose data sets.
        fetch: those that are missing, where the settings say so.

    Raises:
        As `convinit.train.load_data`.
    """
    found: dict[str, ImageData] = {}
    for grid in grids:
        data = next(iter(grid.configs.values()))[0].data
        if data.name not in found:
            found[data.name] = load_data(data.name, data.root, download=fetch and data.download)
    return found


def count_steps(config: Config, data: ImageData) -> int:
    """Optimiser steps of a run on a data set that was read whole."""
    part = config.data
    chosen, _ = split_indices(
        data.train.labels,
        count=part.train_count,
        fraction=part.train_fraction,
        val_fraction=part.val_fraction,
        seed=part.seed,
    )
    images = len(chosen)
    size = config.recipe.batch_size
    batches = images // size if config.recipe.drop_last and images >= size else math.ceil(images / size)
    return batches * config.recipe.epochs


def kind_of_step(config: Config) -> str:
    """Runs of one kind take as long for a step."""
    options = {name: each for name, each in config.model.options.items() if name != "scale"}
    model = dataclasses.replace(config.model, alpha=None, options=options)
    data, recipe = config.data, config.recipe
    loading = (data.name, data.augment, data.image_size, data.workers)
    return repr((model, loading, recipe.batch_size, recipe.precision, recipe.compile))


def measure_steps(
    configs: Sequence[Config], *, on_kind: Callable[[], None] = lambda: None, seconds: float = 2.0
) -> dict[str, float]:
    """Seconds of a step, measured now, for each kind of step that there is among some runs.

    Args:
        configs: the runs.
        on_kind: told when a kind has been measured.
        seconds: of measuring, for each kind, and as long as three steps take.
    """
    times: dict[str, float] = {}
    for config in configs:
        kind = kind_of_step(config)
        if kind not in times:
            init = dataclasses.replace(config.init, fit="newton")  # Adam takes minutes, and no step longer
            times[kind] = measure(dataclasses.replace(config, init=init), seconds=seconds)[1]
            on_kind()
    return times
