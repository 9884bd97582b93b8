"""What `convinit train` shows while it runs: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from convinit.cli.errors import say
from convinit.train.engine import Engine
from convinit.train.run import Watcher


@contextlib.contextmanager
def watcher(epochs: int, out: Path) -> Iterator[Watcher]:
    """A watcher of a run in the folder `out`, for the terminal or for a log, whichever standard error is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(epochs, out)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, epochs, out)


class Lines(Watcher):
    """A line for each epoch, and one in ten seconds at most in between."""

    def __init__(self, epochs: int, out: Path) -> None:
        self.epochs, self.out = epochs, out
        self._said = time.monotonic()

    def begins(self, engine: Engine) -> None:
        plan, step = engine.plan(), engine.progress.step
        going = f"going on after step {step:,} of" if step else "training"
        say(
            f"{going} {plan.steps:,} steps: {plan.model}, {plan.parameters:,} parameters, "
            f"{plan.train_images:,} images, {plan.device}, into {self.out}",
            style="",
        )

    def recorded(self, record: dict[str, Any]) -> None:
        if record["kind"] == "epoch":
            say(_epoch_line(record, self.epochs), style="")
        elif time.monotonic() - self._said > 10:
            say(
                f"epoch {record['epoch']:.2f}/{self.epochs}, step {record['step']}: "
                f"loss {record['loss']:.4f}, {record['images_per_second']:,.0f} images/s",
                style="",
            )
        else:
            return
        self._said = time.monotonic()

    def saved(self, checkpoint: Path) -> None:
        say(f"saved {checkpoint}", style="")


class Bar(Watcher):
    """One bar over all steps, with loss, accuracy and images a second."""

    def __init__(self, progress: Progress, epochs: int, out: Path) -> None:
        self.progress, self.epochs, self.out = progress, epochs, out
        self.task: TaskID | None = None
        self._loss, self._accuracy = "", ""

    def begins(self, engine: Engine) -> None:
        plan, progress = engine.plan(), engine.progress
        self.progress.console.print(f"into {self.out}", highlight=False, markup=False)
        self.task = self.progress.add_task(
            self._name(progress.epoch), total=plan.steps, completed=progress.step, figures=f"{plan.device}"
        )

    def stepped(self, images: int) -> None:
        if self.task is not None:
            self.progress.advance(self.task)

    def testing(self) -> None:
        if self.task is not None:
            self.progress.update(self.task, description="testing")

    def recorded(self, record: dict[str, Any]) -> None:
        if self.task is None:
            return
        if record["kind"] == "train":
            self._loss = f"loss {record['loss']:.3f}, {record['images_per_second']:,.0f} images/s"
        else:
            if (share := record.get("val_top1", record.get("top1"))) is not None:
                self._accuracy = f", top-1 {share:.1%}"
            self.progress.update(self.task, description=self._name(record["epoch"]))
            self.progress.console.print(_epoch_line(record, self.epochs), highlight=False, markup=False)
        self.progress.update(self.task, figures=self._loss + self._accuracy)

    def _name(self, epochs_done: int) -> str:
        return f"epoch {min(epochs_done + 1, self.epochs)}/{self.epochs}"


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    text = f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}"
    names = {
        "val_top1": "validation top-1", "ema_val_top1": "average's validation top-1",
        "top1": "top-1", "top5": "top-5", "ema_top1": "average's top-1",
    }  # fmt: skip
    return text + "".join(f", {words} {record[key]:.2%}" for key, words in names.items() if key in record)
