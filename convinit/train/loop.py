"""A training loop for classifiers; Hugging Face Accelerate places it on devices and sets the precision."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from convinit._checks import check_int
from convinit.train.accelerator import check_accelerator, plain_accelerator
from convinit.train.data.subsets import check_real


@dataclass(frozen=True)
class EpochRecord:
    """The result of one epoch.

    Attributes:
        epoch: counted from 1.
        loss: mean training cross-entropy of the epoch.
        accuracy: share of correct test images after the epoch, 0 to 1.
        lr: learning rate of the last step.
        seconds: wall-clock time of the epoch with its test.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


def train(
    model: nn.Module,
    train_batches: DataLoader,
    test_batches: DataLoader,
    *,
    epochs: int,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    accelerator: Accelerator | None = None,
) -> Iterator[EpochRecord]:
    """Trains in place with AdamW under a one-cycle schedule, yielding a record after every epoch.

    Nothing happens until the first record is asked for; stopping early leaves the model as it then is.

    Args:
        model: images [B, ...] → logits [B, classes]; moved to the accelerator's device.
        train_batches, test_batches: DataLoaders of (images, labels); see `convinit.train.batches`. All
            randomness of the loop is in their generators.
        epochs: passes over the training images.
        lr: the largest learning rate, reached after 30 % of the steps.
        weight_decay: of AdamW, on all parameters.
        accelerator: device and mixed precision, of one process; None means float32, on the GPU where there
            is one.

    Raises:
        TypeError, ValueError: epochs or a rate is out of range, there is nothing to train on, or the
            accelerator accumulates gradients.
        FloatingPointError: the loss became NaN or infinite.
    """
    check_int("epochs", epochs)
    lr, weight_decay = check_real("lr", lr), check_real("weight_decay", weight_decay)
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    if len(train_batches) == 0:
        raise ValueError("train_batches must hold at least one batch, got none")
    chosen = plain_accelerator() if accelerator is None else check_accelerator(accelerator)
    return _train(model, train_batches, test_batches, epochs, lr, weight_decay, chosen)


def _train(
    model: nn.Module,
    train_batches: DataLoader,
    test_batches: DataLoader,
    epochs: int,
    lr: float,
    weight_decay: float,
    accelerator: Accelerator,
) -> Iterator[EpochRecord]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    model, optimizer, train_batches, test_batches = accelerator.prepare(
        model, optimizer, train_batches, test_batches
    )
    # Made after `prepare`, which shortens the loader to this process's share: one step of it a step of ours.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer.optimizer, max_lr=lr, total_steps=epochs * len(train_batches)
    )
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        total, count = torch.zeros((), device=accelerator.device), 0
        for images, labels in train_batches:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            last_lr = float(schedule.get_last_lr()[0])
            schedule.step()
            total += loss.detach() * len(labels)
            count += len(labels)
        mean_loss = (total / count).item()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the training loss became {mean_loss} in epoch {epoch}; lower lr (it is {lr})"
            )
        test_accuracy = accuracy(model, test_batches)
        yield EpochRecord(epoch, mean_loss, test_accuracy, last_lr, time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """The share of images that a model classifies correctly, in evaluation mode.

    Args:
        model: images [B, ...] → logits [B, classes].
        batches: DataLoader of (images, labels); moved to the model's device batch by batch.

    Raises:
        ValueError: there are no images.
    """
    device = next(model.parameters()).device
    model.eval()
    correct, count = torch.zeros((), dtype=torch.int64, device=device), 0
    for images, labels in batches:
        correct += (model(images.to(device)).argmax(dim=1) == labels.to(device)).sum()
        count += len(labels)
    if count == 0:
        raise ValueError("batches must hold at least one image to measure accuracy on, got none")
    return correct.item() / count
