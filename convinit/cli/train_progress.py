"""What `convinit train` shows while it runs: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convinit.cli.errors import say
from convinit.cli.progress import bar
from convinit.train.engine import Engine
from convinit.train.run import Watcher


@contextlib.contextmanager
def watcher(epochs: int, out: Path) -> Iterator[Watcher]:
    """A watcher of a run in the folder `out`, for the terminal or for a log, whichever standard error is."""
    if not sys.stderr.isatty():
        yield Lines(epochs, out)
        return
    watching = Bar(epochs, out)
    try:
        yield watching
    finally:
        watching.close()


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
    """One bar over all steps, with loss, accuracy and images a second, on standard error."""

    def __init__(self, epochs: int, out: Path, **options: Any) -> None:
        self.epochs, self.out = epochs, out
        self.options = options  # of tqdm
        self.bar: Any = None
        self._loss, self._accuracy = "", ""

    def begins(self, engine: Engine) -> None:
        plan, progress = engine.plan(), engine.progress
        self.bar = bar(
            plan.steps, self._name(progress.epoch), "steps", initial=progress.step, postfix=plan.device,
            **self.options,
        )  # fmt: skip
        self._say(f"into {self.out}")

    def stepped(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update()

    def testing(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str("testing")

    def recorded(self, record: dict[str, Any]) -> None:
        if self.bar is None:
            return
        if record["kind"] == "train":
            self._loss = f"loss {record['loss']:.3f}, {record['images_per_second']:,.0f} images/s"
        else:
            if (share := record.get("val_top1", record.get("top1"))) is not None:
                self._accuracy = f", top-1 {share:.1%}"
            self.bar.set_description_str(self._name(record["epoch"]), refresh=False)
            self._say(_epoch_line(record, self.epochs))
        self.bar.set_postfix_str(self._loss + self._accuracy)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()

    def _say(self, line: str) -> None:
        self.bar.write(line, file=self.bar.fp)

    def _name(self, epochs_done: int) -> str:
        return f"epoch {min(epochs_done + 1, self.epochs)}/{self.epochs}"


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    text = f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}"
    names = {
        "val_top1": "validation top-1", "ema_val_top1": "average's validation top-1",
        "top1": "top-1", "top5": "top-5", "ema_top1": "average's top-1",
    }  # fmt: skip
    return text + "".join(f", {words} {record[key]:.2%}" for key, words in names.items() if key in record)
