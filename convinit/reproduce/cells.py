"""One run of a grid: trained, tested on shifted images, and kept in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import convinit
from convinit._files import empty_removed, write_whole
from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention
from convinit.offsets import attention_on_targets
from convinit.serve.trained import load_trained
from convinit.train import checkpoint
from convinit.train.config import Config, field_of
from convinit.train.engine import Engine, make_accelerator
from convinit.train.records import read_records
from convinit.train.run import METRICS, RunInterrupted, Watcher, run_training

CELLS = "cells"
OUTCOME = "cell.json"
SHIFTS = (1, 2, 4)  # pixels
_DIRECTIONS = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
_MAP_IMAGES = 64  # test images over which attention maps are averaged


def identity(config: Config) -> str:
    """The same for two runs if they are the same: of all settings but those that only surround a run.

    Settings that came later count only where they are set, so that runs that were kept before are found.
    """
    settled = {}
    for key, each in config.flat().items():
        field = field_of(key)
        if field.metadata["fixed"] and not (field.metadata["later"] and each == field.default):
            settled[key] = each
    text = json.dumps(settled, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder_of(config: Config, out: Path) -> Path:
    """Where a run is kept: `out`/cells/DATA-MODEL-INIT-IDENTITY-seedN."""
    model = config.model.name + (f"-{config.model.variant}" if config.model.variant else "")
    parts = (config.data.name, model, config.init.method, identity(config), f"seed{config.run.seed}")
    return out / CELLS / "-".join(parts)


def read_outcome(config: Config, out: Path) -> dict[str, Any] | None:
    """The outcome of a finished run; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder_of(config, out) / OUTCOME
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        if outcome["identity"] != identity(config):
            raise ValueError("it is of another run")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no outcome of this run ({error}); remove its folder to run it anew"
        ) from error
    return outcome


def is_done(config: Config, out: Path, keep_checkpoint: bool) -> bool:
    """Whether a run has its outcome and, where that is to be kept and it did not fail, its checkpoint.

    Raises:
        ValueError: the outcome is damaged.
    """
    outcome = read_outcome(config, out)
    if outcome is None or "failed" in outcome or not keep_checkpoint:
        return outcome is not None
    return bool(checkpoint.checkpoints(folder_of(config, out)))


def run_cell(
    config: Config, out: Path, keep_checkpoint: bool, tick: Callable[[float], None]
) -> tuple[str, dict[str, Any]]:
    """Trains, or goes on where it was stopped, measures, and keeps the outcome.

    Args:
        config: the run.
        out: folder of all of them.
        keep_checkpoint: keep the last checkpoint; its weights are not needed for the tables, but for pictures
            of heads. A run without it is done again.
        tick: told the share of the run that has been done since the last call.

    Returns:
        The run's identity, and {"accuracy", "validation" (None without such images), "curve" [[epoch,
        accuracy]], on validation images if there are any, "shifted" {pixels: {direction:
        accuracy}}, "peak" {"start", "trained"}, ...}, accuracies as shares of 1; or {"failed": why} where the
        loss became NaN; or {"error": what}, not kept, where the run could not be made.

    Raises:
        RunInterrupted: SIGTERM or SIGINT came.
    """
    folder = folder_of(config, out)
    try:
        with empty_removed(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with checkpoint.locked(folder, ".cell-lock"):
                done = read_outcome(config, out) if is_done(config, out, keep_checkpoint) else None
                return identity(config), done or _run(config, folder, keep_checkpoint, tick)
    except RunInterrupted:
        raise
    except Exception as error:  # of this run alone: others can go on
        return identity(config), {"identity": identity(config), "error": f"{type(error).__name__}: {error}"}


def _run(
    config: Config, folder: Path, keep_checkpoint: bool, tick: Callable[[float], None]
) -> dict[str, Any]:
    outcome: dict[str, Any] = {"identity": identity(config), "config": config.as_dict()}
    try:
        with warnings.catch_warnings():
            # Of a position embedding too small for its fit: tables with such rows say so themselves.
            warnings.filterwarnings("ignore", message="the position embedding makes up only")
            outcome |= _train_and_measure(config, folder, tick)
    except FloatingPointError as error:
        outcome["failed"] = str(error)
    outcome["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    outcome["environment"] = {**convinit.build_info(), "machine": platform.machine()}
    text = json.dumps(outcome, indent=1, ensure_ascii=False)
    write_whole(folder / OUTCOME, text, sync=True)  # the checkpoint goes next
    if not keep_checkpoint:
        for each in checkpoint.checkpoints(folder):
            checkpoint.discard(each)
    return outcome


def _train_and_measure(config: Config, folder: Path, tick: Callable[[float], None]) -> dict[str, Any]:
    watcher = _Cell(config, tick)
    result = run_training(config, folder, watcher=watcher)
    records = [each for each in read_records(folder / METRICS) if each.get("kind") == "epoch"]
    return {
        "accuracy": result.figures["top1"],
        "validation": result.figures.get("val_top1"),
        "epochs": config.recipe.epochs,
        "curve": [
            [each["epoch"], each.get("val_top1", each.get("top1"))]
            for each in records
            if "val_top1" in each or "top1" in each
        ],
        "loss": result.figures["loss"],
        "seconds": result.figures["seconds"],
        **watcher.figures,
    }


class _Cell(Watcher):
    """Tells of the share of a run that is done, epoch by epoch; measures the model before and after."""

    def __init__(self, config: Config, tick: Callable[[float], None]) -> None:
        self.config, self.epochs, self.tick = config, config.recipe.epochs, tick
        self.figures: dict[str, Any] = {}

    def begins(self, engine: Engine) -> None:
        if engine.progress.epoch:
            self.tick(engine.progress.epoch / self.epochs)
        # Where the run goes on, the model of its start has to be made again.
        first = Engine(self.config, make_accelerator(self.config)) if engine.progress.step else engine
        self.start = _peak(first)

    def ended(self, engine: Engine) -> None:
        self.figures = {"peak": {"start": self.start, "trained": _peak(engine)}, **_measure(engine)}

    def recorded(self, record: dict[str, Any]) -> None:
        if record["kind"] == "epoch":
            self.tick(1 / self.epochs)


def _measure(engine: Engine) -> dict[str, Any]:
    """Accuracy on shifted images, and the sizes of model and data."""
    shifted: dict[str, dict[str, float]] = {}
    for pixels in SHIFTS:
        shifted[str(pixels)] = {}
        for name, (dy, dx) in _DIRECTIONS.items():
            figures = engine.evaluate(shift=(pixels * dy, pixels * dx))
            assert figures is not None
            shifted[str(pixels)][name] = figures["top1"]
    plan = engine.plan()
    return {
        "shifted": shifted,
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "train_images": plan.train_images,
        "test_images": plan.test_images,
        "device": plan.device,
    }


@dataclass(frozen=True, eq=False)
class Heads:
    """Where the heads of a SimpleViT look.

    Attributes:
        offsets: [depth, heads, 2]. Controls have them, too: what they were not fitted to.
        maps: [depth, heads, N, N], attention averaged over test images.
        grid_size: of the N tokens.
    """

    offsets: Tensor
    maps: Tensor
    grid_size: tuple[int, int]


@torch.no_grad()
def _heads(engine: Engine) -> Heads | None:
    """The heads on test images; None for models other than a SimpleViT."""
    model = engine.inner
    if not isinstance(model, SimpleViT):
        return None
    images, _ = engine.test_set.batch(range(min(_MAP_IMAGES, len(engine.test_set))))
    maps = model.eval().attention_maps(images.to(engine.accelerator.device)).mean(dim=1)
    layers = [each for each in model.modules() if isinstance(each, ConvInitAttention)]
    return Heads(torch.stack([each.offsets for each in layers]), maps, model.grid_size)


def _peak(engine: Engine) -> float | None:
    """Mean attention on the targets of a SimpleViT's offsets, on test images; None for other models."""
    heads = _heads(engine)
    if heads is None:
        return None
    return attention_on_targets(heads.maps.flatten(0, 1), heads.offsets.flatten(0, 1), heads.grid_size)


def read_heads(config: Config, out: Path) -> tuple[Heads, Heads] | None:
    """The heads of a finished run before and after training; None where there are none to be read.

    Raises:
        ValueError, OSError: its checkpoint is damaged.
    """
    found = checkpoint.checkpoints(folder_of(config, out))
    outcome = read_outcome(config, out)
    if outcome is None or "failed" in outcome or not found:
        return None
    engine = Engine(config, make_accelerator(config))  # made anew, by config and seed
    before = _heads(engine)
    engine.inner.load_state_dict(load_trained(found[-1]).network.state_dict())
    after = _heads(engine)
    return None if before is None or after is None else (before, after)
