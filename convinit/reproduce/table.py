"""An experiment as a declared grid: what is varied, how it is set, and what is read off.

A cell is a row and a column of a table; with a seed it is one training run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convinit.train.config import Config
from convinit.train.config_files import resolve

Settings = Mapping[str, Any]  # "section.key" → value


@dataclass(frozen=True)
class Choice:
    """A row or a column of a table.

    Attributes:
        label: its name.
        settings: what it sets.
        everywhere: of a row: the columns' settings do not concern it, so all its cells are one.
        control: of a row: it breaks the structure of the row that it is judged against.
        against: of a row: label of the row it is judged against, where that is not the table's own.
        times: of a column: its runs take so many times the epochs, for data sets cut to the inverse of it.
        x: of a column: where it stands on the axis of a figure.
    """

    label: str
    settings: Settings = field(default_factory=dict)
    everywhere: bool = False
    control: bool = False
    against: str = ""
    times: float = 1.0
    x: float | None = None


@dataclass(frozen=True)
class Table:
    """An experiment.

    Attributes:
        name: as in ``convinit reproduce NAME``.
        title, question: what it is, and what it asks.
        preset: of `convinit.train.config_files`, from which all cells start.
        settings: what all cells set.
        rows, columns: what is varied. A table with one column shows `readings` side by side instead.
        column_title: what the columns vary.
        figure: "lines" over the columns' x, "dots", "curves" over the epochs or "shifts" over pixels.
        readings: names for `convinit.reproduce.readings`; the first is the one that counts.
        ours: label of the row that the others are compared with.
        log_x: whether the figure's axis is logarithmic.
        heads: whether the page shows where the heads of `ours` look, before and after training.
        without: (row, column) labels of cells that do not exist.
        rates: learning rates that each cell is run with; its figures are those of the rate that is best on
            validation images. None of its own: the preset's.
        note: what a reader must know of it.
    """

    name: str
    title: str
    question: str
    preset: str
    settings: Settings
    rows: tuple[Choice, ...]
    columns: tuple[Choice, ...]
    column_title: str
    figure: str
    readings: tuple[str, ...] = ("accuracy", "shifted-1")
    ours: str = "impulse"
    log_x: bool = False
    heads: bool = False
    without: frozenset[tuple[str, str]] = frozenset()
    rates: tuple[float, ...] = ()
    note: str = ""

    def cells(self) -> list[tuple[Choice, Choice]]:
        """(row, column) of all cells that exist, row by row."""
        pairs = [(row, column) for row in self.rows for column in self.columns]
        return [pair for pair in pairs if (pair[0].label, pair[1].label) not in self.without]

    def config(
        self, row: Choice, column: Choice, seed: int, given: Settings, rate: float | None = None
    ) -> Config:
        """The run of a cell.

        Args:
            row, column: from `cells`.
            rate: one of `rates`.
            seed: of initial weights, image order and augmentation.
            given: settings of all cells. Tables are added to the table's own; a row that is about its values
                keeps them.

        Raises:
            ValueError: `given` sets what the table varies or what its labels and readings rest on, or a value
                is wrong.
        """
        varied = [each.settings for each in (*self.rows, *self.columns)]
        whole = {key for layer in varied for key, each in layer.items() if not isinstance(each, dict)}
        taken = (whole - _MAY_BE_SET | _NOT_TO_SET) & set(given)
        if self.rates:
            taken |= {"recipe.lr", "data.val_fraction", "data.seed"} & set(given)
        if any(each.times != 1 for each in self.columns):  # their epochs rest on it
            taken |= {"recipe.batch_size"} & set(given)
        for layer in (self.settings, *varied):
            for key, own in layer.items():
                if isinstance(own, dict) and isinstance(given.get(key), dict):
                    taken |= {f"{key}.{name}" for name in set(own) & set(given[key])}
        if taken:
            raise ValueError(
                f"table {self.name!r} sets {', '.join(sorted(taken))} itself; it cannot be set for all runs"
            )
        settings: dict[str, Any] = {"run.tracker": "none", "run.keep": 1}
        for layer in (self.settings, given, {} if row.everywhere else column.settings, row.settings):
            for key, each in layer.items():
                merged = isinstance(each, dict) and isinstance(settings.get(key), dict)
                settings[key] = {**settings[key], **each} if merged else each
        settings["run.seed"] = seed
        if settings.get("data.val_fraction") is not None:  # images are drawn anew, too
            settings["data.seed"] = seed
        if rate is not None:
            settings["recipe.lr"] = rate
        try:
            config = resolve(self.preset, None, settings)
            if column.times == 1 or row.everywhere:
                return config
            settings["recipe.epochs"] = max(1, round(config.recipe.epochs * column.times))
            settings["run.eval_every"] = max(1, round(column.times))
            if column.times > 8:  # loader processes would start anew for each of many short epochs
                settings["data.workers"] = 0
            return resolve(self.preset, None, settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"table {self.name!r}, row {row.label!r}: {error}") from error


_MAY_BE_SET = {"init.values"}  # though rows about them keep theirs
_NOT_TO_SET = {
    "model.name", "model.variant", "data.name", "run.seed", "run.eval_every", "run.keep", "run.tracker",
}  # fmt: skip
