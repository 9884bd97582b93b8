"""A whole training run: an `Engine`, and beside it what is written, kept, shown and asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from convinit._files import empty_removed
from convinit.train import checkpoint
from convinit.train.config import Config
from convinit.train.config_files import read_toml, to_toml
from convinit.train.engine import Engine, Plan, make_accelerator
from convinit.train.records import Records, read_records
from convinit.train.signals import StopRequest

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # where Accelerate puts its curves
# What `convinit.serve.draw_run` makes of a run.
PICTURES = ("curves.png", "filters.png", "drift.png", "init_report.txt", "init_report.json")


class RunInterrupted(Exception):  # noqa: N818 (no error: it did as it was told)
    """A run was asked to stop, and did.

    Attributes:
        signum: by which signal.
        checkpoint: the state that it goes on from.
    """

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signum}; saved {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint

    def __reduce__(self) -> tuple[type, tuple[int, Path]]:
        return type(self), (self.signum, self.checkpoint)  # through a process pool, too


class Watcher:
    """Told what a run does; does nothing itself. Only the main process's is told."""

    def begins(self, engine: Engine) -> None:
        """Before the first step of this call; `engine.progress` says what is done already."""

    def stepped(self, images: int) -> None:
        """After a step on so many images, of all processes."""

    def recorded(self, record: dict[str, Any]) -> None:
        """When a line of metrics.jsonl is written: {"kind": "train" or "epoch", ...}."""

    def testing(self) -> None:
        """Before a test."""

    def saved(self, checkpoint: Path) -> None:
        """When a checkpoint is complete."""

    def ended(self, engine: Engine) -> None:
        """When the run is complete; `engine.inner` has its last weights."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        figures: of the last epoch, as in metrics.jsonl.
        checkpoint: the last one; its model.safetensors holds the weights.
        steps: done in this call; 0 if the run was finished before.
    """

    figures: dict[str, Any]
    checkpoint: Path
    steps: int


def run_training(
    config: Config,
    out: str | Path,
    *,
    dataset: Any = None,
    resume: bool = True,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Result:
    """Trains as a config says, or goes on where an earlier call was stopped, even by kill -9.

    The weights come out the same, bit by bit on a CPU, however often the run was interrupted. With several
    processes (torchrun, accelerate launch) they equal one process's to rounding, since all of them share the
    same batches; only mixup and CutMix pair the images of each process among themselves.

    Args:
        config: the run.
        out: its folder: step-NNNNNN/ and, with validation images, best/ (see `convinit.train.checkpoint`),
            metrics.jsonl and, with tensorboard, its curves. Several processes must all see it.
        dataset: your own data in place of those that the config names: a pair of map-style data sets of
            (image, label), to train and to test on, or one of which a fifth becomes the test set; see
            :func:`load_data`. The config that is kept then has data.name "dataset".
        resume: go on from the latest checkpoint in `out`, if there is one; with more epochs than it had, too:
            the learning rate is then the longer run's, at its place. False starts anew, and refuses a folder
            that holds a run.
        overwrite: remove such a run first.
        watcher: told of steps, records and checkpoints.

    Raises:
        RunInterrupted: SIGTERM or SIGINT came; the step was finished and the state saved.
        FloatingPointError: the loss became NaN or infinite. Earlier checkpoints are kept.
        ValueError: the config does not fit the data, or the run in `out`. OSError: `out` or the data. Where
            `out` was not there, it is then removed as long as nothing of the run is in it.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a Config, such as Config.of(a dict) makes, got {type(config).__name__}"
        )
    if dataset is not None:
        config = replace(config, data=replace(config.data, name="dataset", root=None, options={}))
    out = Path(out)
    config_text = to_toml(config)
    tracker = _tracker(config.run.tracker)
    accelerator = make_accelerator(config, log_with=tracker, project_dir=str(out))
    main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(empty_removed(out))
            checkpoint.check_room(out, 0, config.run.keep)
            stack.enter_context(checkpoint.locked(out))
            checkpoint.clean(out)
            if not (resume or overwrite):
                _refuse_run(out)
        accelerator.wait_for_everyone()
        start = _latest(config, out) if resume and not overwrite else None
        engine = Engine(config, accelerator, start, dataset)
        if main:
            if overwrite:  # only now that data and model are known to be good
                _remove_run(out)
            checkpoint.check_room(out, engine.checkpoint_bytes(), config.run.keep)
        # What a watcher does at the end is no part of the run: Ctrl-C ends it at once.
        with StopRequest() as stop:
            drive = _Drive(engine, out, config_text, stop, watcher or Watcher(), start)
            stack.callback(drive.close)
            if main:
                drive.watcher.begins(engine)
            if tracker is not None:
                accelerator.init_trackers(
                    tracker,
                    config={key: str(value) for key, value in config.flat().items()}
                    if tracker == "wandb"
                    else None,
                    init_kwargs={
                        "tensorboard": {"purge_step": engine.progress.step + 1},
                        "wandb": {"dir": str(out)},
                    },
                )
            result = drive.run()
        if main:
            drive.watcher.ended(engine)
        return result


def measure(config: Config, *, seconds: float = 5.0) -> tuple[Plan, float]:
    """What a run would do, and the seconds that a step takes, measured for a while.

    Nothing is written, and no data are fetched.

    Raises:
        As `run_training`.
    """
    config = replace(config, data=replace(config.data, download=False))
    engine = Engine(config, make_accelerator(config))
    plan, times = engine.plan(), []
    start = time.perf_counter()
    batches = itertools.chain.from_iterable(_forever(engine))
    for images, labels in batches:
        engine.step(images, labels)
        engine.collect()  # waits for the device
        times.append(time.perf_counter() - start)
        # All processes stop together: a step needs each of them.
        late = torch.tensor([len(times) >= 3 and times[-1] > seconds], device=engine.accelerator.device)
        if engine.progress.step == plan.steps or engine.accelerator.gather(late.int()).any():
            break
    warm = len(times) // 3  # the first third warms up
    return plan, (times[-1] - times[warm]) / max(len(times) - 1 - warm, 1)


def _forever(engine: Engine) -> Iterator[Any]:
    while True:
        yield engine.batches()
        engine.progress.batch = 0


class _Drive:
    """One sitting of a run."""

    def __init__(
        self,
        engine: Engine,
        out: Path,
        config_text: str,
        stop: StopRequest,
        watcher: Watcher,
        start: Path | None,
    ) -> None:
        self.engine, self.out, self.config_text, self.stop, self.watcher = (
            engine,
            out,
            config_text,
            stop,
            watcher,
        )
        self.run_config = engine.config.run
        self.accelerator: Accelerator = engine.accelerator
        self.main = self.accelerator.is_main_process
        self.alone = self.accelerator.num_processes == 1
        self.last_saved = start
        self.saved_at = self.recorded_at = self.ticked_at = time.monotonic()
        self.figures: dict[str, Any] = {}
        self.records: Records | None = None
        if self.main:
            length = 0 if start is None else checkpoint.read_progress(start)["metrics_bytes"]
            self.records = Records(out / METRICS, length)

    def close(self) -> None:
        if self.records is not None:
            self.records.close()
        self.accelerator.end_training()

    def run(self) -> Result:
        progress, epochs = self.engine.progress, self.engine.config.recipe.epochs
        first = progress.step
        try:
            while progress.epoch < epochs:
                self._epoch()
                self._end_epoch(last=progress.epoch + 1 == epochs)
                every = self.run_config.checkpoint_epochs
                if progress.epoch == epochs or (every and progress.epoch % every == 0) or self._wishes()[1]:
                    self._save()
                self._stop_if_asked()
        except FloatingPointError as error:
            kept = "no checkpoint had been made" if self.last_saved is None else f"{self.last_saved} is kept"
            raise FloatingPointError(f"{error}; {kept}") from error
        last = checkpoint.checkpoints(self.out)[-1]
        if not self.figures and self.main:  # finished before
            tested = [each for each in read_records(self.out / METRICS) if each.get("kind") == "epoch"]
            if not tested:
                raise ValueError(
                    f"the run is finished and its weights are in {last}, but {self.out / METRICS}, which "
                    "held its figures, was removed or emptied; put it back, or train anew with --overwrite"
                )
            self.figures = tested[-1]
        return Result(self.figures, last, progress.step - first)

    def _epoch(self) -> None:
        progress, engine = self.engine.progress, self.engine
        if progress.batch == engine.steps_per_epoch:  # stopped before the epoch's test
            return
        for images, labels in engine.batches():
            engine.step(images, labels)
            if self.main:
                self.watcher.stepped(engine.batch_sizes[progress.batch - 1])
            at_record = progress.step % self.run_config.log_every == 0
            if at_record:
                engine.collect()
                self._record_steps()
            every = self.run_config.checkpoint_steps
            asked, due = self._wishes() if self.alone or at_record else (0, False)
            last = progress.batch == engine.steps_per_epoch
            if asked or (not last and (due or (every and progress.step % every == 0))):
                self._save()
            if asked:
                raise RunInterrupted(asked, self._saved())
            if last:  # a loader with workers may not know yet that this was its last batch
                return

    def _end_epoch(self, last: bool) -> None:
        progress, engine = self.engine.progress, self.engine
        engine.collect()
        self._record_steps()
        record: dict[str, Any] = {"kind": "epoch", "epoch": progress.epoch + 1, "step": progress.step}
        record["loss"] = progress.loss_sum / progress.images
        validates, better = engine.val_set is not None, False
        if last or (progress.epoch + 1) % self.run_config.eval_every == 0:
            if validates:
                record |= self._evaluate(val=True)
            if last or not validates:
                record |= self._evaluate(val=False)
            measured = "val_top1" if validates else "top1"
            better = record[measured] > progress.best or (
                validates and not (self.out / checkpoint.BEST).exists()
            )
            progress.best = record[measured] if better else progress.best
            record[f"best_{measured}"] = progress.best
            if validates and last:
                record["top1_of_best"] = record["top1"] if better else self._top1_of_best()
        record["seconds"] = self._tick()
        progress.epoch, progress.batch, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
        if validates and better:
            self._save_best()
        self.figures = record
        self._record(record)
        every = self.run_config.checkpoint_steps
        if every and progress.step % every == 0:
            self._save()

    def _evaluate(self, val: bool) -> dict[str, float]:
        if self.main:
            self.watcher.testing()
        figures = self.engine.evaluate(lambda: self.alone and bool(self.stop.signum), val=val)
        if figures is None:
            self._save()
            raise RunInterrupted(self.stop.signum, self._saved())
        return figures

    def _save_best(self) -> None:
        """Keeps the weights that do best on validation images, beside the checkpoints."""
        if self.main:
            tensors, state = self.engine.state()
            checkpoint.save_best(self.out, {"model": tensors["model"]}, state, self.config_text)
        else:
            self.engine.collect()
        self.accelerator.wait_for_everyone()

    def _top1_of_best(self) -> float:
        """Test accuracy of those weights."""
        inner = self.engine.inner
        last = {name: each.clone() for name, each in inner.state_dict().items()}
        inner.load_state_dict(checkpoint.read_tensors(self.out / checkpoint.BEST, "model"))
        figures = self._evaluate(val=False)
        inner.load_state_dict(last)
        return figures["top1"]

    def _wishes(self) -> tuple[int, bool]:
        """The signal that came to any process, or 0, and whether the clock asks for a checkpoint."""
        minutes = self.run_config.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        if self.alone:
            return self.stop.signum, due
        mine = torch.tensor([[self.stop.signum, int(due)]], device=self.accelerator.device)
        signum, anyone_due = self.accelerator.gather(mine).amax(dim=0).tolist()
        return signum, bool(anyone_due)

    def _stop_if_asked(self) -> None:
        asked, _ = self._wishes()
        if asked and self.engine.progress.epoch < self.engine.config.recipe.epochs:
            self._save()
            raise RunInterrupted(asked, self._saved())

    # --- writing --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        step = self.engine.progress.step
        self._tick()
        tensors, state = self.engine.state()
        if self.main:
            assert self.records is not None
            state["metrics_bytes"] = self.records.sync()
            path = checkpoint.save(
                self.out, step, tensors, state, self.config_text, keep=self.run_config.keep
            )
            self.watcher.saved(path)
        self.accelerator.wait_for_everyone()
        self.last_saved = self.out / f"step-{step:06d}"
        self.saved_at = time.monotonic()

    def _saved(self) -> Path:
        assert self.last_saved is not None
        return self.last_saved

    def _record_steps(self) -> None:
        """One record of the steps since the last one."""
        progress = self.engine.progress
        if not progress.window:
            return
        losses, norms = zip(*progress.window, strict=True)
        count = len(losses)
        progress.window.clear()
        now = time.monotonic()
        seconds, self.recorded_at = now - self.recorded_at, now
        self._record(
            {
                "kind": "train",
                "step": progress.step,
                "epoch": progress.epoch + progress.batch / self.engine.steps_per_epoch,
                "loss": sum(losses) / count,
                "grad_norm": sum(norms) / count,
                "lr": self.engine.lr,
                "images_per_second": count * self.engine.config.recipe.batch_size / max(seconds, 1e-9),
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        if self.records is not None:
            self.records.append(record)
            self.watcher.recorded(record)
        group = "train" if record["kind"] == "train" else "epoch"
        self.accelerator.log(
            {f"{group}/{key}": each for key, each in record.items() if key not in ("kind", "step")},
            step=record["step"],
        )

    def _tick(self) -> float:
        """Brings the seconds of training up to date and returns them."""
        now = time.monotonic()
        self.engine.progress.seconds += now - self.ticked_at
        self.ticked_at = now
        return self.engine.progress.seconds


def _tracker(name: str) -> str | None:
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"run.tracker is {name}, which is not installed; get it with: pip install {name}")
    return name


def _refuse_run(out: Path) -> None:
    """ValueError where the folder holds a run."""
    if checkpoint.checkpoints(out) or (out / METRICS).exists():
        raise ValueError(
            f"{out} holds a run, and none shall be gone on with: choose another folder, or remove "
            "that run with --overwrite"
        )


def _remove_run(out: Path) -> None:
    for path in checkpoint.checkpoints(out):
        checkpoint.discard(path)
    shutil.rmtree(out / checkpoint.BEST, ignore_errors=True)
    for name in (METRICS, *PICTURES):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)


def _latest(config: Config, out: Path) -> Path | None:
    """The checkpoint to go on from; ValueError where it is of another config."""
    found = checkpoint.checkpoints(out)
    if not found:
        return None
    checkpoint.read_progress(found[-1])
    theirs = Config.of(read_toml(found[-1] / "config.toml"))
    if config.recipe.epochs > theirs.recipe.epochs:  # it goes on for longer
        theirs = replace(theirs, recipe=replace(theirs.recipe, epochs=config.recipe.epochs))
    if differing := config.differing(theirs):
        raise ValueError(
            f"{out} holds a run with other settings: {'; '.join(differing)}. Give the same ones to go on "
            "with it, choose another folder with --out, or remove that run with --overwrite"
        )
    return found[-1]
