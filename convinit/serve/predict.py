"""Classifying image files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convinit._checks import check_int
from convinit._optional import require
from convinit._progress import progress
from convinit.serve.trained import ImageSpec, TrainedModel
from convinit.train.data.augment import normalise, resize_and_crop
from convinit.train.data.images import decode, image_paths

__all__ = ["Prediction", "Unreadable", "image_files", "predict", "read_batch"]


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for an image.

    Attributes:
        path: of the image.
        classes: names, the likeliest first.
        indices: of these classes among the model's outputs.
        probabilities: softmax of the logits.
    """

    path: str
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that could not be read.

    Attributes:
        path: of it.
        reason: in words.
    """

    path: str
    reason: str


def image_files(paths: Sequence[str | Path]) -> tuple[list[str], list[Unreadable]]:
    """The files given, and those in given folders, at any depth, whose suffix is that of an image format.

    Args:
        paths: files and folders. Hidden files and folders in folders are left out, and links to folders.

    Returns:
        Paths, each once, a folder's in sorted order; and what could not be listed.

    Raises:
        ImportError: Pillow is not installed.
    """
    _check_paths("paths", paths)
    files: dict[str, None] = {}  # a set that keeps its order
    failed: list[Unreadable] = []

    def note(error: OSError) -> None:
        failed.append(Unreadable(str(error.filename), f"cannot be listed: {error.strerror}"))

    for path in map(str, paths):
        if not os.path.isdir(path):
            files[path] = None
            continue
        files |= dict.fromkeys(image_paths(path, note))
    return list(files), failed


def read_batch(paths: Sequence[str | Path], spec: ImageSpec, *, most: int = 16) -> Tensor:
    """Some of the images among files and folders, evenly spaced, as a model takes them: [B, C, H, W].

    Args:
        paths: as `image_files` takes them.
        spec: what the model takes.
        most: B at most.

    Raises:
        ValueError: there is no image, or one cannot be read. ImportError: Pillow or torchvision is missing.
    """
    files, failed = image_files(paths)
    images = []
    count = min(check_int("most", most), len(files))
    for path in (files[i * len(files) // count] for i in range(count)):
        image = _read(path, spec)
        if isinstance(image, str):
            failed.append(Unreadable(path, image))
        else:
            images.append(image)
    if failed or not images:
        why = f"{failed[0].path}: {failed[0].reason}" if failed else "none is in a format that Pillow reads"
        raise ValueError(f"images must be files or folders of images, but {why}")
    return torch.stack(images)


def predict(
    trained: TrainedModel,
    files: Sequence[str | Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    device: torch.device | str = "auto",
) -> Iterator[Prediction | Unreadable]:
    """The likeliest classes of image files, which are resized and normalised as the test images in training.

    The next batch is decoded by threads while one is computed. A progress bar appears after two seconds.

    Args:
        trained: the model; its network is moved to the device.
        files: paths of images in any format that Pillow reads; see `image_files` for folders.
        top_k: classes for an image, at most as many as there are.
        batch_size: images at once.
        device: "auto" is the GPU where there is one.

    Returns:
        An iterator of one result a file, in their order; `Unreadable` where Pillow cannot decode it.

    Raises:
        ImportError: Pillow is not installed, or torchvision, which resizes.
        TypeError, ValueError: an argument is out of range, or there is no such device.
        FloatingPointError: the model's output for an image is NaN.
    """
    _check_paths("files", files)
    check_int("top_k", top_k)
    check_int("batch_size", batch_size)
    require("PIL.Image", "reading image files")
    trained.network.to(_device(device)).eval()
    return _predict(trained, [str(path) for path in files], top_k, batch_size)


def _predict(
    trained: TrainedModel, files: list[str], top_k: int, batch_size: int
) -> Iterator[Prediction | Unreadable]:
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def started(number: int) -> list[Future]:
            files = batches[number] if number < len(batches) else []
            return [pool.submit(_read, path, trained.images) for path in files]

        coming = started(0)
        for number in progress(range(len(batches)), "predicting", unit="batch"):
            images, coming = coming, started(number + 1)
            try:
                yield from _classified(trained, batches[number], [each.result() for each in images], top_k)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@torch.inference_mode()
def _classified(
    trained: TrainedModel, files: list[str], images: list[Tensor | str], top_k: int
) -> list[Prediction | Unreadable]:
    names = trained.images.class_names
    readable = [each for each in images if isinstance(each, Tensor)]
    rows: Iterator[tuple[list[float], list[int]]] = iter(())
    if readable:
        first = next(trained.network.parameters())
        logits = trained.network(torch.stack(readable).to(first)).float()
        if logits.shape != (len(readable), len(names)):
            raise ValueError(
                f"the model must give [{len(readable)}, {len(names)}] logits, one a class name, got "
                f"{list(logits.shape)}"
            )
        top = logits.softmax(dim=1).topk(min(top_k, len(names)), dim=1)
        rows = iter(zip(top.values.tolist(), top.indices.tolist(), strict=True))
    results: list[Prediction | Unreadable] = []
    for path, image in zip(files, images, strict=True):
        if isinstance(image, str):
            results.append(Unreadable(path, image))
            continue
        probabilities, indices = next(rows)
        if any(each != each for each in probabilities):
            raise FloatingPointError(f"the model's output for {path} is NaN; its weights are damaged")
        classes = tuple(names[index] for index in indices)
        results.append(Prediction(path, classes, tuple(indices), tuple(probabilities)))
    return results


def _read(path: str, spec: ImageSpec) -> Tensor | str:
    """[C, H, W], or why there is none."""
    try:
        image = decode(path, spec.channels)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return f"cannot be decoded as an image ({str(error) or type(error).__name__})"
    mean, std = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (spec.mean, spec.std))
    return normalise(resize_and_crop(image, spec.image_size, spec.crop_pct), mean, std)


def _check_paths(name: str, paths: Sequence[str | Path]) -> None:
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"{name} must be a list of paths, got the single one {str(paths)!r}")


def _device(device: torch.device | str) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be auto or one that this PyTorch can use, got {device!r}: {reason}"
        ) from error
    return chosen
