"""Training as `convinit train` does it: images a second, reading and augmentation included.

    python -m pytest benchmarks/bench_train.py -s --benchmark-json train.json

The engine against the loop that people write by hand, on the same images in the same order: a DataLoader,
cross-entropy, backward, the optimiser's step, the loss read every step. Once with our model and once with the
papers' eager one. The engine reads losses now and then only, draws everything from (seed, step) and keeps the
gradient's norm and whatever a resumed run needs. The losses of the first steps are checked to be the same.

The images are the 8×8 digits, at the papers' size enlarged to 32×32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import papers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from convinit.train.config import Config
from convinit.train.config_files import resolve
from convinit.train.data.loaders import train_loader
from convinit.train.engine import Engine, make_accelerator
from convinit.train.optim import make_optimizer

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
BATCH = 512 if CUDA else 16  # 512: the papers'

_COMMON = {"init.method": "random", "recipe.schedule": "constant", "run.log_every": 20}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # steps of a call, settings of the preset "quick"
    "digits, the demo's ViT, batch 64": (8, {"run.cpu": not CUDA, "run.threads": "none"}),
    f"Model I at the papers' size, batch {BATCH}": (
        8 if CUDA else 2,
        {
            "model.patch_size": 2, "model.dim": 512, "model.depth": 6, "model.heads": 8, "model.mlp_dim": 512,
            "data.image_size": 32, "data.augment": "paper", "recipe.batch_size": BATCH,
            "recipe.precision": "bf16" if CUDA else "no", "run.cpu": not CUDA, "run.threads": "none",
        },
    ),
}  # fmt: skip


def make_engine(settings: dict[str, Any]) -> Engine:
    config = resolve("quick", None, {**_COMMON, **settings})
    return Engine(config, make_accelerator(config))


def by_engine(engine: Engine, steps: int) -> Callable[[], list[float]]:
    """`steps` steps of the engine, from the first batch of an epoch on; their losses."""

    def run() -> list[float]:
        engine.progress.batch = 0
        for images, labels in engine.batches():
            engine.step(images, labels)
            if engine.progress.batch == steps:
                break
        engine.collect()
        losses = [loss for loss, _ in engine.progress.window]
        engine.progress.window.clear()
        return losses

    return run


def by_hand(engine: Engine, model: nn.Module, config: Config, steps: int) -> Callable[[], list[float]]:
    """The same steps in a plain loop."""
    device = engine.accelerator.device
    optimizer = make_optimizer(model, config.recipe)
    sampler = train_loader(engine.train_set, config.recipe.batch_size, seed=config.run.seed, epoch=0).sampler
    order = [i for batch in sampler for i in batch]
    loader = DataLoader(engine.train_set, config.recipe.batch_size, sampler=order, pin_memory=CUDA)
    autocast = functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=config.recipe.precision == "bf16"
    )

    def run() -> list[float]:
        model.train()
        losses = []
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
        return losses

    return run


@pytest.mark.parametrize("case", CASES)
def bench_train(compare, case):
    steps, settings = CASES[case]
    ours, plain, theirs = (make_engine(settings) for _ in range(3))
    steps = min(steps, ours.steps_per_epoch)
    papers_model = papers.simple_vit(theirs.inner)
    reference = make_engine(settings)
    expected = torch.tensor(by_hand(reference, reference.inner, reference.config, steps)())

    def check(name: str, losses: list[float]) -> None:
        tolerance = 0.05 if ours.config.recipe.precision == "bf16" else 1e-3
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=tolerance, atol=0)

    compare(
        "train",
        case,
        {
            "papers' eager, plain loop": by_hand(theirs, papers_model, theirs.config, steps),
            "convinit's model, plain loop": by_hand(plain, plain.inner, plain.config, steps),
            "convinit": by_engine(ours, steps),
        },
        baseline="papers' eager, plain loop",
        check=check,
        dtype=torch.bfloat16 if ours.config.recipe.precision == "bf16" else torch.float32,
        device="cuda" if CUDA else "cpu",
        images=sum(ours.batch_sizes[:steps]),
        capture=False,
    )
