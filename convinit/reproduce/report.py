"""A table as Markdown, CSV and figure: every number and sentence is made from the runs."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from convinit.reproduce import readings
from convinit.reproduce.grid import Cell, Grid
from convinit.reproduce.mean_sd import MeanSd, clearly, over_seeds
from convinit.reproduce.papers import USUAL_ROWS
from convinit.reproduce.table import Choice
from convinit.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Standing = Literal["above", "alike", "below", "unjudged"]
MARKS: Mapping[str | None, str] = {"above": "▲", "alike": "≈", "unjudged": "?"}  # below: none
_NOT_JUDGED = ("start-peak", "trained-peak", "epochs-to")
_COLUMNS = (
    "table", "data", "row", "column", "reading", "mean", "sd", "seeds", "values",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A grid with its finished runs.

    Attributes:
        grid: what was asked for.
        outcomes: (row, column) → finished runs.
        given: settings of all runs beside the table's own; they are part of the files' names.
    """

    grid: Grid
    outcomes: Mapping[Cell, Sequence[Mapping[str, Any]]]
    given: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def chosen(self) -> dict[Cell, Sequence[Mapping[str, Any]]]:
        """The runs of each cell at the learning rate that is best on validation images."""
        if not self.grid.table.rates:
            return dict(self.outcomes)
        return {cell: _at_best_rate(found) for cell, found in self.outcomes.items()}

    def values(self, cell: Cell, reading: str) -> list[float]:
        """A reading of a cell's runs in %, without those that do not have it."""
        found = [readings.value(reading, outcome) for outcome in self.chosen.get(cell, ())]
        return [each for each in found if each is not None]

    def mean(self, cell: Cell, reading: str) -> MeanSd | None:
        values = self.values(cell, reading)
        return over_seeds(values) if values else None

    def judged(self, reading: str) -> bool:
        """Whether the rows' means of a reading are compared: not those of which more is not better."""
        table = self.grid.table
        return not table.rates and len(self.grid.seeds) > 1 and not reading.startswith(_NOT_JUDGED)

    def standing(self, cell: Cell, reading: str) -> Standing | None:
        """How a cell's mean stands to that of the row it is judged against; None for such a row itself.

        Two means are clearly apart if they differ by more than twice the standard error of the difference.
        They are compared where both have as many runs, two at least.
        """
        table = self.grid.table
        row = next(row for row in table.rows if row.label == cell[0])
        rival = (row.against or table.ours, cell[1])
        if not self.judged(reading) or row.label == rival[0] or rival not in self.grid.configs:
            return None
        mean, other = self.mean(cell, reading), self.mean(rival, reading)
        if mean is None or other is None or not mean.n == other.n >= 2:
            return "unjudged"
        if clearly(mean, other):
            return "above"
        return "below" if clearly(other, mean) else "alike"

    def title(self, reading: str) -> str:
        return readings.title(reading, self._config().recipe.epochs)

    def counts(self) -> tuple[int, int]:
        """Finished runs and all runs; one that several cells share counts once."""
        done = {outcome["identity"] for found in self.outcomes.values() for outcome in found}
        return len(done), len(self.grid.runs())

    # --- text -----------------------------------------------------------------------------------------------

    def markdown(self, command: str, sentences: Sequence[str], pictures: Sequence[str] = ()) -> str:
        """The page: setting, tables, sentences that say what they show, and pictures, in Markdown already."""
        table = self.grid.table
        parts = [f"# {table.title}", f"{table.question} {table.note}".strip(), self.setting()]
        for name, rows in self.tables():
            parts += [f"**{name[:1].upper()}{name[1:]}**"] if name else []
            parts.append(_markdown(rows, table.ours))
        if sentences:
            parts.append("\n".join(f"- {each}" for each in sentences))
        parts += pictures
        parts.append(f"Made by `{command}`; [all figures]({self.stem()}.csv).")
        return "\n\n".join(parts) + "\n"

    def stem(self) -> str:
        """Name of the files, without ending; other settings, other files."""
        given = [f"{key.partition('.')[2]}={value}" for key, value in self.given.items()]
        name = "-".join([self.grid.data, self.grid.table.name, *given])
        return re.sub(r"[^\w.=-]+", "_", name)

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """(name, lines of cells, the first of them the head): one for each reading, or one for all."""
        table = self.grid.table
        if len(table.columns) == 1:
            column = table.columns[0].label
            head = ["", *(self.title(reading) for reading in table.readings)]
            body = [
                [r.label, *(self._text((r.label, column), x) for x in table.readings)] for r in table.rows
            ]
            return [("", [head, *body])]
        head = ["", *(column.label for column in table.columns)]
        return [
            (
                self.title(reading),
                [head, *([r.label, *(self._text((r.label, c.label), reading) for c in table.columns)]
                         for r in table.rows)],
            )
            for reading in table.readings
        ]  # fmt: skip

    def _text(self, cell: Cell, reading: str) -> str:
        if cell not in self.grid.configs:
            return ""
        mean, runs = self.mean(cell, reading), self.chosen[cell]
        failed = sum("failed" in each for each in runs)
        if mean is None:
            return (
                "diverged" if failed else "not reached" if reading.startswith("epochs-to") and runs else "–"
            )
        words = [f"{mean}"]
        if failed:
            words.append(f"({failed} of {len(runs)} diverged)")
        elif mean.n < len(runs):
            words.append(f"({mean.n} of {len(runs)})")  # the others did not get there
        standing = self.standing(cell, reading)
        return " ".join([*words, *([MARKS[standing]] if standing in MARKS else [])])

    def setting(self) -> str:
        """What was done, in a paragraph."""
        table, config, seeds = self.grid.table, self._config(), self.grid.seeds
        recipe, (done, total) = config.recipe, self.counts()
        epochs = sorted({each.recipe.epochs for configs in self.grid.configs.values() for each in configs})
        runs = [each for found in self.outcomes.values() for each in found if "failed" not in each]
        named = {"width": config.model.dim, "depth": config.model.depth}
        size = ", ".join(f"{key} {value}" for key, value in named.items() if value is not None)
        words = [f"Data: {self.grid.data}."]
        if runs:
            images = " or ".join(f"{n:,}" for n in sorted({each["train_images"] for each in runs}))
            test = "" if "validation" in table.readings else f" and {runs[0]['test_images']:,} test"
            words = [
                f"Data: {self.grid.data}, {images} training{test} images, augmentation {config.data.augment}."
            ]
        ours = [configs[0] for cell, configs in self.grid.configs.items() if cell[0] == table.ours]
        models = " or ".join(dict.fromkeys(each.model.name for each in ours))
        words.append(f"Model: {models}{f' ({size})' if size else ''}.")
        if config.model.name != "convmixer":
            kind = "mimetic" if config.init.values == "mimetic" else "as nn.Linear's"
            words.append(f"Values and output layer start {kind}, unless said.")
        words += [
            f"Training: {' or '.join(map(str, epochs))} epochs of {recipe.optimizer} at {self._rates()} "
            f"({recipe.schedule}) in batches of {recipe.batch_size}"
            f"{'' if recipe.precision == 'no' else f', in {recipe.precision}'}.",
            f"{len(seeds)} seeds, mean ± standard deviation."
            if len(seeds) > 1
            else f"Seed {seeds[0]} alone.",
        ]
        if any(reading.startswith("shifted") for reading in table.readings):
            words.append(
                "Shifted: accuracy on test images moved up, down, left and right by so many pixels, the mean "
                "colour coming in."
            )
        if chosen := self._chosen_rates():
            words.append(f"Rates chosen: {chosen}.")
        if done < total:
            words.append(f"**Unfinished: {done} of {total} runs.**")
        if runs:
            versions = [
                f"{name} {', '.join(sorted({each['environment'][name] for each in runs}))}"
                for name in ("convinit", "torch")
            ]
            devices = sorted({each["device"] for each in runs})
            days = sorted({each["finished"][:10] for each in runs})
            seconds = sum({each["identity"]: each["seconds"] for each in runs}.values())
            words.append(
                f"Made with {' and '.join(versions)} on {', '.join(devices)}, "
                f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, in {seconds:,.0f} s of training in all."
            )
        return " ".join(words)

    def _chosen_rates(self) -> str:
        """ "0.001 for cell, cell; 0.002 for ..." of a table that tries several."""
        cells: dict[float, list[str]] = {}
        for (row, column), runs in self.chosen.items():
            if self.grid.table.rates and runs:
                name = row if len(self.grid.table.columns) == 1 else f"{row} ({column})"
                cells.setdefault(runs[0]["config"]["recipe"]["lr"], []).append(name)
        return "; ".join(f"{rate:g} for {', '.join(cells[rate])}" for rate in sorted(cells))

    def paired(self, mine: Cell, theirs: Cell, reading: str) -> list[float]:
        """The differences between two cells' runs of the same seeds, where both have the reading."""

        def by_seed(cell: Cell) -> dict[int, float | None]:
            runs = self.chosen.get(cell, ())
            return {run["config"]["run"]["seed"]: readings.value(reading, run) for run in runs}

        ours, others = by_seed(mine), by_seed(theirs)
        pairs = [(ours[seed], others[seed]) for seed in ours if seed in others]
        return [a - b for a, b in pairs if a is not None and b is not None]

    def _rates(self) -> str:
        rates = self.grid.table.rates or (self._config().recipe.lr,)
        return " or ".join(f"{rate:g}" for rate in rates)

    def _config(self) -> Config:
        """Of our row, from which the setting is told; what rows and columns change, their labels say."""
        own = [configs for (row, _), configs in self.grid.configs.items() if row == self.grid.table.ours]
        return own[-1][0]

    def csv(self) -> str:
        """A line for each cell and reading."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for cell, reading in itertools.product(self.grid.configs, self.grid.table.readings):
            values, mean = self.values(cell, reading), self.mean(cell, reading)
            numbers = ["", "", 0] if mean is None else [
                f"{mean.mean:.3f}", "" if mean.sd is None else f"{mean.sd:.3f}", mean.n,
            ]  # fmt: skip
            line = [self.grid.table.name, self.grid.data, *cell, self.title(reading), *numbers]
            writer.writerow([*line, " ".join(f"{each:.3f}" for each in values)])
        return text.getvalue()

    # --- figure ---------------------------------------------------------------------------------------------

    def figure(self) -> Figure | None:
        """The picture of the table; None as long as there are no runs."""
        from convinit.viz import grid_dots, grid_lines, learning_curves

        table = self.grid.table
        if all("failed" in each for found in self.outcomes.values() for each in found):
            return None
        seeds = len(self.grid.seeds)
        heading = f"{table.title}; {self.grid.data}, {seeds} seed{'s' * (seeds != 1)}"
        # Rows that most tables have come first, and so have the same colours everywhere.
        rows = sorted(table.rows, key=lambda row: table.figure != "dots" and row.label not in USUAL_ROWS)
        if table.figure == "curves":
            goals = [
                float(x.removeprefix("epochs-to-")) for x in table.readings if x.startswith("epochs-to-")
            ]
            return learning_curves(self._curves(rows), goal=goals[0] if goals else None, title=heading)
        if table.figure == "shifts":
            column = table.columns[0].label
            values = {
                row.label: torch.stack([self._seeds((row.label, column), x) for x in table.readings])
                for row in rows
            }
            return grid_lines(
                {self.title("accuracy"): values},
                [0.0, *(float(x.removeprefix("shifted-")) for x in table.readings[1:])],
                xlabel="shift of the test images, pixels",
                title=heading,
            )
        panels = {
            self.title(reading): {
                row.label: torch.stack([self._seeds((row.label, c.label), reading) for c in table.columns])
                for row in rows
            }
            for reading in table.readings[:2]
        }
        if table.figure == "dots":
            return grid_dots(panels, [column.label for column in table.columns], title=heading)
        x = [column.x for column in table.columns if column.x is not None]
        return grid_lines(panels, x, xlabel=table.column_title, log_x=table.log_x, title=heading)

    def _seeds(self, cell: Cell, reading: str) -> Tensor:
        """Values [seeds], NaN where there is none."""
        values = self.values(cell, reading)
        missing = [float("nan")] * (len(self.grid.seeds) - len(values))
        return torch.tensor([*values, *missing], dtype=torch.float64)

    def _curves(self, rows: Sequence[Choice]) -> dict[str, Tensor]:
        column = self.grid.table.columns[0].label
        curves = {}
        for row in rows:
            runs = [each for each in self.chosen[row.label, column] if "failed" not in each]
            if runs:
                own = [[100 * accuracy for _, accuracy in each["curve"]] for each in runs]
                curves[row.label] = torch.tensor(own, dtype=torch.float64)
        return curves


def _at_best_rate(outcomes: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        by_rate.setdefault(outcome["config"]["recipe"]["lr"], []).append(outcome)
    if not by_rate:
        return ()

    def on_validation(rate: float) -> tuple[int, float]:
        shares = [each["validation"] for each in by_rate[rate] if "failed" not in each]
        return len(shares), sum(shares) / max(1, len(shares))  # a rate that diverges for a seed is not taken

    return by_rate[max(by_rate, key=on_validation)]


def _markdown(lines: Sequence[Sequence[str]], bold: str) -> str:
    head, *body = lines
    rows = [head, ["---"] * len(head)]
    rows += [[f"**{each}**" if each and line[0] == bold else each for each in line] for line in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)
