"""The training engine: steps over epochs, on Hugging Face Accelerate, resumable at every step.

All that a step draws comes from (seed, step, process) alone, and an epoch's order and augmentation from
(seed, epoch). So there is no random state to keep: weights, optimiser, schedule and the number of the step
are the whole state of a run.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from convinit.train.accelerator import plain_accelerator
from convinit.train.build import build_model, check_model
from convinit.train.checkpoint import (
    load_optimizer_,
    optimizer_state,
    read_progress,
    read_tensors,
)
from convinit.train.config import Config
from convinit.train.config_files import read_toml
from convinit.train.data import (
    Augmented,
    ImageData,
    augmentation,
    load_data,
    shift_images,
    test_loader,
    train_loader,
)
from convinit.train.data.draws import derived_seed
from convinit.train.optim import MovingAverage, make_mix, make_optimizer, make_schedule

_LAST = 8  # losses that a report on NaN shows
_SAME = 1e-3  # means of the same images differ by less, whatever decodes them


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done and tested.
        batch: batches done of the epoch after those.
        loss_sum, images: of that epoch's batches so far: loss times images, and images.
        window: [loss, gradient norm] of the steps since the last record.
        seconds: of training, over all sittings.
        best: the highest accuracy so far after an epoch, on validation images if there are any; -1 before.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    images: int = 0
    window: list[list[float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    best: float = -1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        model: its name.
        parameters, trained: numbers, all and those that are trained.
        train_images, val_images, test_images, num_classes: of the data.
        image: (channels, height, width).
        steps_per_epoch, steps: optimiser steps.
        checkpoint_bytes: size of a checkpoint.
        device, precision, processes: where and how.
    """

    model: str
    parameters: int
    trained: int
    train_images: int
    val_images: int
    test_images: int
    num_classes: int
    image: tuple[int, int, int]
    steps_per_epoch: int
    steps: int
    checkpoint_bytes: int
    device: str
    precision: str
    processes: int


def make_accelerator(config: Config, **options: Any) -> Accelerator:
    """Accelerate's Accelerator for a config.

    Raises:
        ValueError: this device does not support the precision.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    accelerator = plain_accelerator(precision=config.recipe.precision, cpu=config.run.cpu, **options)
    if config.recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("recipe.precision must be no or bf16 on the CPU, got fp16")
    return accelerator


class Engine:
    """Model, data, optimiser and schedule of a run, and single steps of it. `convinit.train.run` drives it.

    Args:
        config: the run.
        accelerator: from `make_accelerator`.
        checkpoint: to go on from; None starts anew.
        dataset: where data.name is "dataset", as in `load_data`.

    Attributes:
        progress: where it is; `step` and the caller change it.

    Raises:
        ValueError: config, data, model or checkpoint do not fit together. OSError: data cannot be read.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        checkpoint: Path | None = None,
        dataset: Any = None,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        recipe, seed = config.recipe, config.run.seed
        check_model(config.model)  # before data are fetched for it
        with accelerator.main_process_first():  # one process downloads
            self.data = _load(config, dataset)
        train_images = augmentation(config.data.augment, self.data, config.data.augment_options)
        self.train_set = Augmented(self.data.train, train_images, seed, config.data.aug_repeats)
        self.test_set = Augmented(self.data.test, augmentation("none", self.data))
        self.val_set = self.data.val and Augmented(self.data.val, augmentation("none", self.data))
        assert self.data.image_size is not None  # `augmentation` refuses None

        self.batch_sizes = _batch_sizes(len(self.data.train), recipe.batch_size, recipe.drop_last)
        self.inner = build_model(
            config,
            image_size=self.data.image_size,
            channels=self.data.channels,
            num_classes=self.data.num_classes,
        )
        self.inner = self._fit_for_processes(self.inner).to(accelerator.device)
        optimizer = make_optimizer(self.inner, recipe)
        self.schedule = make_schedule(optimizer, recipe, len(self.batch_sizes))
        self.mix = make_mix(recipe, self.data.num_classes)
        self.ema: MovingAverage | None = None
        if recipe.ema is not None:  # before `prepare`, whose forward would go on calling the original
            self.ema = MovingAverage(self.inner, recipe.ema)
        self._finite_at_start = [name for name, each in self.inner.state_dict().items() if _finite([each])]
        self.progress = Progress()
        if checkpoint is not None:
            self._restore(checkpoint, optimizer)
        if recipe.compile:
            self.inner.compile()
        self.model, self.optimizer = accelerator.prepare(self.inner, optimizer)
        self._parameters = [each for each in self.inner.parameters() if each.requires_grad]
        self._recent = torch.zeros(config.run.log_every, 2, device=accelerator.device)  # loss, gradient norm
        self._filled: list[int] = []  # images of the steps in it
        self._last_losses: list[float] = []

    def _fit_for_processes(self, model: nn.Module) -> nn.Module:
        norms = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
        if self.accelerator.num_processes == 1 or not norms:
            return model
        if self.accelerator.device.type != "cuda":
            raise ValueError(
                f"a model with BatchNorm must be trained by one process on {self.accelerator.device.type}, "
                f"got {self.accelerator.num_processes}: each would norm by its own part of a batch"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batch_sizes)

    def plan(self) -> Plan:
        """The plan of the run."""
        assert self.data.image_size is not None
        return Plan(
            model=self.config.model.name,
            parameters=sum(each.numel() for each in self.inner.parameters()),
            trained=sum(each.numel() for each in self._parameters),
            train_images=len(self.data.train),
            val_images=0 if self.data.val is None else len(self.data.val),
            test_images=len(self.data.test),
            num_classes=self.data.num_classes,
            image=(self.data.channels, *self.data.image_size),
            steps_per_epoch=self.steps_per_epoch,
            steps=self.steps_per_epoch * self.config.recipe.epochs,
            checkpoint_bytes=self.checkpoint_bytes(),
            device=str(self.accelerator.device),
            precision=self.config.recipe.precision,
            processes=self.accelerator.num_processes,
        )

    # --- steps ----------------------------------------------------------------------------------------------

    def batches(self) -> Any:
        """The batches of this epoch that are still to do, on the device."""
        loader = train_loader(
            self.train_set,
            self.config.recipe.batch_size,
            seed=self.config.run.seed,
            epoch=self.progress.epoch,
            start_batch=self.progress.batch,
            num_workers=self.config.data.workers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            drop_last=self.config.recipe.drop_last,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return self._on_device(loader)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimiser step on this process's part of a batch."""
        seed, step = self.config.run.seed, self.progress.step
        size = self.batch_sizes[self.progress.batch]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.mix is not None:
            torch.manual_seed(derived_seed("mix", seed, step))  # all processes mix alike
            images, labels = self.mix(images, labels)
        torch.manual_seed(derived_seed("step", seed, step, rank))
        self.model.train()
        losses = F.cross_entropy(
            self.model(images), labels, reduction="sum", label_smoothing=self.config.recipe.label_smoothing
        )
        # So the gradients' mean over the processes is that of the batch, also where its parts differ in size.
        loss = losses * (world / size)
        self.accelerator.backward(loss)
        if self.config.recipe.clip is None:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        else:
            norm = self.accelerator.clip_grad_norm_(self._parameters, self.config.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.inner)
        # Kept on the device: reading them each step would make it wait for the host.
        self._recent[len(self._filled)] = torch.stack([loss.detach(), norm])
        self._filled.append(size)
        self.progress.step += 1
        self.progress.batch += 1
        if len(self._filled) == len(self._recent):
            self.collect()

    def collect(self) -> None:
        """Reads loss and gradient norm of the steps since the last call into `progress`.

        Raises:
            FloatingPointError: the loss of a step was NaN or infinite, or its gradient without fp16 scaling.
        """
        if not self._filled:
            return
        first = self.progress.step - len(self._filled)
        rows = self.accelerator.reduce(self._recent[: len(self._filled)].clone(), "mean").tolist()
        sizes, self._filled = self._filled, []
        scaled = self.accelerator.scaler is not None  # which skips steps of infinite gradients by itself
        for i, ((loss, norm), size) in enumerate(zip(rows, sizes, strict=True)):
            self._last_losses = [*self._last_losses, loss][-_LAST:]
            if not (math.isfinite(loss) and (scaled or math.isfinite(norm))):
                lasts = ", ".join(f"{each:.4g}" for each in self._last_losses)
                raise FloatingPointError(
                    f"the loss became {loss} at step {first + i + 1} (epoch {self.progress.epoch + 1}, "
                    f"learning rate {self.lr:.3g}, gradient norm {norm:.3g}; last losses {lasts}); lower "
                    "the learning rate, warm it up or clip the gradient"
                )
            self.progress.window.append([loss, norm])
            self.progress.loss_sum += loss * size
            self.progress.images += size

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    # --- test -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, stopped: Any = lambda: False, *, val: bool = False, shift: tuple[int, int] = (0, 0)
    ) -> dict[str, float] | None:
        """Loss, top-1 and, with more than 5 classes, top-5 on the test images; of the average too, if any.

        Args:
            stopped: asked between batches; once it says True, the test is given up.
            val: on the validation images instead; names then begin with "val_".
            shift: (dy, dx) in pixels by which the images are moved first, the data's mean colour coming in.

        Returns:
            Names → figures; shares of 1. None if it was given up.
        """
        models = {"": self.inner} if self.ema is None else {"": self.inner, "ema_": self.ema.module}
        images_of = self.val_set if val else self.test_set
        assert images_of is not None
        loader = test_loader(
            images_of,
            self.config.run.eval_batch_size,
            num_workers=self.config.data.workers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        ranks = min(5, self.data.num_classes)
        sums = torch.zeros(len(models), 3, dtype=torch.float64, device=self.accelerator.device)
        for model in models.values():
            model.eval()
        for images, labels in self._on_device(loader):
            for row, model in zip(sums, models.values(), strict=True):
                with self.accelerator.autocast():
                    logits = model(shift_images(images, *shift) if any(shift) else images)
                logits = logits.float()
                hits = logits.topk(ranks, dim=1).indices == labels[:, None]
                row += torch.stack(
                    [F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum()]
                )
            if stopped():
                return None
        shares = (self.accelerator.reduce(sums, "sum") / len(images_of)).tolist()
        figures: dict[str, float] = {}
        for prefix, (loss, top1, top5) in zip(models, shares, strict=True):
            names = ("val_loss", "val_top1", "val_top5") if val else ("test_loss", "top1", "top5")
            found = dict(zip(names, (loss, top1, top5), strict=True))
            if self.data.num_classes <= 5:
                del found[names[2]]
            figures |= {f"{prefix}{name}": each for name, each in found.items()}
        return figures

    def _on_device(self, loader: Any) -> Any:
        device = self.accelerator.device
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that a run goes on from: tensors by file, and JSON-able numbers.

        Raises:
            FloatingPointError: a weight is NaN or infinite.
        """
        self.collect()
        weights = self.inner.state_dict()
        optimizer, numbers = optimizer_state(self.optimizer.optimizer)
        tensors = {"model": weights, "optimizer": optimizer}
        watched = [weights[name] for name in self._finite_at_start] + list(optimizer.values())
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
            watched += [tensors["ema"][name] for name in self._finite_at_start]
            numbers["averaged"] = int(self.ema.n_averaged)
        if not _finite(watched):
            raise FloatingPointError(
                f"weights or optimiser became NaN or infinite by step {self.progress.step} (learning rate "
                f"{self.lr:.3g}), so this state is not saved; lower the learning rate, warm it up or clip "
                "the gradient"
            )
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        schedule = self.schedule.state_dict()
        numbers_of_run = {
            "progress": dataclasses.asdict(self.progress),
            "train_images": len(self.train_set),
            "data": self.data.digest(),
            # What must be known to use the weights without the data set.
            "images": {
                name: getattr(self.data, name)
                for name in ("image_size", "mean", "std", "class_names", "crop_pct")
            },
        }
        return tensors, {**numbers_of_run, "optimizer": numbers, "schedule": schedule, "scaler": scaler}

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint, to a few kilobytes."""
        weights = sum(each.nbytes for each in self.inner.state_dict().values())
        trained = sum(each.nbytes for each in self._parameters)
        moments = 2 if self.config.recipe.optimizer != "sgd" else bool(self.config.recipe.momentum)
        return weights * (1 if self.ema is None else 2) + moments * trained + 65536

    def _restore(self, checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
        saved = read_progress(checkpoint)
        model, moments = read_tensors(checkpoint, "model"), read_tensors(checkpoint, "optimizer")
        average = {} if self.ema is None else read_tensors(checkpoint, "ema")
        self._check_same_data(saved, checkpoint)
        try:
            self.progress = Progress(**saved["progress"])
            self.inner.load_state_dict(model)
            load_optimizer_(optimizer, moments, saved["optimizer"])
            if Config.of(read_toml(checkpoint / "config.toml")).recipe.epochs == self.config.recipe.epochs:
                self.schedule.load_state_dict(saved["schedule"])
            else:  # the longer run's learning rate, at its place
                step = self.progress.step
                place = {"last_epoch": step - 1, "_step_count": step}
                self.schedule.load_state_dict({**self.schedule.state_dict(), **place})
                self.schedule.step()
            if self.ema is not None:
                self.ema.module.load_state_dict(average)
                self.ema.n_averaged.fill_(saved["optimizer"]["averaged"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{checkpoint} is not of this run: {error}") from error

    def _check_same_data(self, saved: dict[str, Any], checkpoint: Path) -> None:
        if saved.get("train_images") != len(self.train_set):
            raise ValueError(
                f"the data must be those of {checkpoint}, {saved.get('train_images')} training images, got "
                f"{len(self.train_set)}"
            )
        if saved.get("data") != self.data.digest():
            raise ValueError(
                f"the data must be those of {checkpoint}, but classes, image size or the order of the labels "
                "differ"
            )
        for name in ("mean", "std"):  # measured ones tell other pixels
            theirs, ours = saved["images"][name], getattr(self.data, name)
            if len(theirs) != len(ours) or any(abs(a - b) > _SAME for a, b in zip(theirs, ours, strict=True)):
                raise ValueError(
                    f"the data must be those of {checkpoint}, whose {name} is {theirs}, got {list(ours)}"
                )


def _load(config: Config, dataset: Any) -> ImageData:
    data = config.data
    return load_data(
        data.name,
        data.root,
        dataset=dataset,
        options=data.options,
        mean=data.mean,
        std=data.std,
        train_count=data.train_count,
        train_fraction=data.train_fraction,
        val_fraction=data.val_fraction,
        seed=data.seed,
        download=data.download,
        image_size=data.image_size,
        crop_pct=data.crop_pct,
    )


def _batch_sizes(images: int, batch_size: int, drop_last: bool) -> list[int]:
    """The sizes of an epoch's batches; `train_loader` refuses what has none."""
    whole, rest = divmod(images, batch_size)
    return [batch_size] * whole + [rest] * bool(rest and not (drop_last and whole))


@torch.no_grad()
def _finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite. Waits once for each device: a module's extra state is on the CPU."""
    found: dict[torch.device, list[Tensor]] = {}
    for each in tensors:
        if each.is_floating_point() and each.numel():
            found.setdefault(each.device, []).append(each.isfinite().all())
    return all(bool(torch.stack(flags).all()) for flags in found.values())
