"""Attention maps of a model that `init_vit_` has set: of its positions alone, or on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convinit.adapters.layout import is_sharded, reshard_
from convinit.records import measured

if TYPE_CHECKING:
    from convinit.adapters.report import InitReport


class _Enough(Exception):  # noqa: N818
    """Ends a forward pass of which nothing more is needed."""


@torch.no_grad()
def watch_inputs(
    attentions: Sequence[Any],
    model: nn.Module,
    images: Any,
    use: Callable[[int, Tensor], None],
    *,
    to_the_end: bool = True,
) -> None:
    """Runs the model once and calls ``use(i, x)`` before attention i sees x [B, T, D].

    In evaluation mode; the mode of every module is put back, also after an error. Without `to_the_end` the
    pass ends before the last attention.
    """
    handles, modes = [], [(module, module.training) for module in model.modules()]
    unseen, using = set(range(len(attentions))), [False]

    def watch(i: int, attention: Any) -> None:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            using[0] = True  # what `use` raises is not the model's
            use(i, x.detach() if getattr(attention, "batch_first", True) else x.detach().transpose(0, 1))
            using[0] = False
            unseen.discard(i)
            if not (unseen or to_the_end):
                raise _Enough

        handles.append(attention.reads.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        for i, attention in enumerate(attentions):
            watch(i, attention)
        model.eval()
        # Some models draw even then, such as masked autoencoders. Named devices: fork_rng warns of all GPUs.
        gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        with torch.random.fork_rng(devices=gpus), without_autocast(model):
            model(images)
    except _Enough:
        pass
    except Exception as error:
        if using[0]:
            raise
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be a batch as the model takes it, but it could not be run on {shape}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        reshard_(model)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast rounds what is computed, and keeps copies of weights that are changed here."""
    with ExitStack() as contexts:
        for kind in {"cpu", *(parameter.device.type for parameter in model.parameters())}:
            contexts.enter_context(torch.autocast(kind, enabled=False))
        yield
    torch.clear_autocast_cache()


@torch.no_grad()
def output_of(part: nn.Module, model: nn.Module, images: Any) -> Tensor:
    """What a part of the model makes when the model runs on the images; the pass ends there."""
    made: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        made.append(output)
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            raise _Enough

    handle = part.register_forward_hook(hook)
    try:
        watch_inputs([], model, images, lambda i, x: None)
    finally:
        handle.remove()
    if not made:
        raise ValueError(f"model must run the {type(part).__name__} that makes its tokens, but does not")
    return made[0]


def on_images(report: InitReport, model: nn.Module, images: Any, use: Callable[[int, Tensor], None]) -> None:
    """Runs the model once and calls ``use(i, maps)`` for each record i, maps [B, heads, T, T]."""
    attentions = report.attentions
    watch_inputs(attentions, model, images, lambda i, x: use(i, attentions[i].attention_map(x)))


@torch.no_grad()
def head_maps(report: InitReport, model: nn.Module | None = None, images: Any = None) -> list[Tensor]:
    """What the patches of every head pay to each other now, after whatever training the model has had.

    softmax(scale · q kᵀ)[n:, n:], n class and register tokens: with any, rows add up to less than 1

    Args:
        report: of :func:`convinit.init_vit_`.
        model, images: the model, and a batch as it takes it: the mean map over the batch. None: the maps that
            the positions alone make.

    Returns:
        For each record of the report [heads, N, N], float32 on the CPU.

    Raises:
        ValueError: images without the model, or a model that drops or masks tokens.
    """
    counts = [math.prod(grid) for grid in report.grid_sizes]
    if (model is None) != (images is None):
        raise ValueError("give model and images together, or neither for the maps of the positions alone")
    found: dict[int, Tensor] = {}
    report.check_in_use()
    if model is None:
        for i, (layout, layer) in enumerate(report.places):
            found[i] = layout.position_maps(layer)
    else:
        on_images(report, model, images, lambda i, maps: found.__setitem__(i, maps.mean(dim=0)))
    maps = []
    for i, (count, (layout, layer)) in enumerate(zip(counts, report.places, strict=True)):
        expected = layout.num_tokens(layer)
        if i not in found or found[i].shape[-1] != expected:
            raise ValueError(
                f"model must show {expected} tokens to {report.records[i].name or 'its attention'}, got "
                f"{found[i].shape[-1] if i in found else 'no call of it'}: are the images of another size, "
                "or does it drop or mask tokens?"
            )
        maps.append(found[i][:, -count:, -count:].float().cpu())
    return maps


def measure_on_images_(report: InitReport, model: nn.Module, images: Any) -> InitReport:
    """Fills peak_on_images and prefix_on_images of the report: means over the batch."""

    notes: set[str] = set()

    def use(i: int, maps: Tensor) -> None:
        record = report.records[i]
        targets, (layout, layer) = record.targets, report.places[i]
        if targets is None:
            return
        if maps.shape[-1] != layout.num_tokens(layer):  # rows are no longer the places of the grid
            notes.add(
                f"peak on images: not measured, for the layers saw {maps.shape[-1]} tokens in place of "
                f"{layout.num_tokens(layer)} (images of another size, or tokens dropped or masked)"
            )
            return
        metrics = [measured(one, targets) for one in maps]
        record.peak_on_images = torch.stack([each["peak"] for each in metrics]).mean(dim=0)
        record.prefix_on_images = torch.stack([each["prefix"] for each in metrics]).mean(dim=0)

    on_images(report, model, images, use)
    report.notes += sorted(notes)
    return report
