"""A run of a few steps, for the tests of training."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from convinit.train.checkpoint import checkpoints
from convinit.train.config import Config
from convinit.train.config_files import resolve

# Processes forked from one that has imported everything, but started no thread: they start in no time.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["convinit.train.run", "convinit.cli.app", "sklearn.datasets", "torch._dynamo", "training"]
)

# 4 steps an epoch, the last on a smaller batch; dropout draws, the schedule moves, the average lags.
SMALL = {
    "model.dim": 32, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 32,
    "model.options": {"proj_drop": 0.1}, "data.train_count": 110, "recipe.batch_size": 32, "recipe.epochs": 3,
    "recipe.schedule": "cosine", "recipe.warmup_epochs": 0.5, "recipe.lr": 0.01, "recipe.clip": 1.0,
    "recipe.ema": 0.9, "recipe.label_smoothing": 0.1, "run.log_every": 3, "run.checkpoint_steps": 2,
    "run.tracker": "none", "run.threads": "none", "run.eval_batch_size": 500,
}  # fmt: skip


def small(**changes: Any) -> Config:
    """The small run; section__key=value changes it."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve("quick", given=SMALL | given)


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    folder = checkpoints(out)[-1]
    return {
        f"{path.stem}/{name}": each
        for path in folder.glob("*.safetensors")
        for name, each in load_file(path).items()
    }


def records(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_run(out: Path, expected: Path) -> None:
    ours, theirs = final_tensors(out), final_tensors(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, each in theirs.items():
        assert torch.equal(ours[name], each), name
    assert records(out) == records(expected)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
