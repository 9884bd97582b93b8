"""Optimiser, learning rate and mixing of images, as a recipe says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from convinit.train.config import RecipeConfig

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_optimizer(model: nn.Module, recipe: RecipeConfig) -> Optimizer:
    """torch's Adam, AdamW or SGD over the parameters that are trained, in the fused implementation.

    With ``decay="matrices"`` weight decay is left off biases, norms and what the model's own
    ``no_weight_decay()`` names (position embeddings, tokens).

    Raises:
        ValueError: the model has no trainable parameter.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ValueError("the model must have parameters that are trained, got none")
    spared: set[str] = set()
    if recipe.decay == "matrices":
        own = getattr(model, "no_weight_decay", None)
        spared = set(own()) if callable(own) else set()
        spared |= {name for name, each in trained.items() if each.dim() < 2}
    groups: list[dict[str, Any]] = [
        {"params": [each for name, each in trained.items() if name not in spared]},
        {"params": [each for name, each in trained.items() if name in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, **common)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, **common)


def make_schedule(
    optimizer: Optimizer, recipe: RecipeConfig, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """torch's schedules, to be stepped after every step of the optimiser.

    A linear warm-up from ``warmup_lr``, then cosine to ``min_lr`` or constant; one-cycle has its own.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=total)
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    rest = max(total - warmup, 1)
    after: lr_scheduler.LRScheduler
    if recipe.schedule == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, rest, eta_min=recipe.min_lr)
    else:
        after = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if warmup == 0:
        return after
    rise = lr_scheduler.LinearLR(optimizer, recipe.warmup_lr / recipe.lr, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, after], milestones=[warmup])


def make_mix(recipe: RecipeConfig, num_classes: int) -> Mix | None:
    """torchvision's Mixup, CutMix or either at random: images, labels [B] → images, shares [B, classes].

    They draw from torch's own generator.

    Raises:
        ImportError: torchvision is needed and cannot be imported.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            f"mixup and cutmix need torchvision, which cannot be imported ({error}); pip install torchvision"
        ) from error
    mixes: list[Any] = []
    if recipe.mixup:
        mixes.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        mixes.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    return mixes[0] if len(mixes) == 1 else v2.RandomChoice(mixes)
