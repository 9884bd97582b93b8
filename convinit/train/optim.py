"""Optimiser, learning rate and mixing of images, as a recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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

    Cosine to ``min_lr`` over all epochs but those of the cooldown, which stay there, or constant; a linear
    warm-up from ``warmup_lr`` stands in the place of the first epochs, as in timm. one-cycle has its own.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=total)
    warmup, lr = round(recipe.warmup_epochs * steps_per_epoch), recipe.lr
    total = max(1, total - round(recipe.cooldown_epochs * steps_per_epoch))

    def share(step: int) -> float:
        if step < warmup:
            return (recipe.warmup_lr + (lr - recipe.warmup_lr) * step / warmup) / lr
        if recipe.schedule == "constant":
            return 1.0
        end = recipe.min_lr / lr
        return end + (1 - end) * (1 + math.cos(math.pi * min(step / total, 1))) / 2

    return lr_scheduler.LambdaLR(optimizer, share)


class MovingAverage(AveragedModel):
    """Exponential moving average of the weights and, with the same decay, of BatchNorm's statistics.

    Averaged weights give other activations than the latest ones, whose statistics torch would copy. Other
    buffers are copied: they may be indices or masks.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's present weights in; the first ones are the average's start."""
        first = int(self.n_averaged) == 0
        before = [each.clone() for each in _statistics(self.module)]
        super().update_parameters(model)  # copies all buffers
        if not first:
            for now, old in zip(_statistics(self.module), before, strict=True):
                now.lerp_(old, self.decay)


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    found = [each for norm in norms for each in (norm.running_mean, norm.running_var)]
    return [each for each in found if each is not None]


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
