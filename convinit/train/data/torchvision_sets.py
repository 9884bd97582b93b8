"""CIFAR-10, CIFAR-100 and SVHN, read by torchvision.

torchvision unpickles the CIFAR files itself, and only after their MD5 sums were found right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from convinit.train.data.images import ImageTensors, require


def read_cifar(name: str, root: Path, download: bool) -> tuple[ImageTensors, ImageTensors, tuple[str, ...]]:
    """Training set, test set and class names of "cifar10" or "cifar100"."""
    datasets = require("torchvision.datasets", f"the data set {name!r}")
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    files = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    files = [(root / cls.base_folder / file, md5) for file, md5 in files]
    source = f"the archive {cls.filename} from {cls.url}, unpacked so that {root / cls.base_folder} holds it"
    try:
        # Training first: with download=True that brings the test files too.
        sets = [cls(root, train=train, download=download and train) for train in (True, False)]
    except Exception as error:
        raise _explained(name, files, source, download, error) from error
    names = tuple(sets[0].classes)
    train, test = (
        _tensors(part.data.transpose(0, 3, 1, 2), part.targets, len(names), f"{name} in {root}", source)
        for part in sets
    )
    return train, test, names


def read_svhn(root: Path, download: bool) -> tuple[ImageTensors, ImageTensors, tuple[str, ...]]:
    """Training set, test set and class names of SVHN's cropped digits."""
    svhn = require("torchvision.datasets", "the data set 'svhn'").SVHN
    require("scipy.io", "the data set 'svhn'")
    parts = []
    for split in ("train", "test"):
        url, file, md5 = svhn.split_list[split]
        source = f"the file {file} from {url}, lying in {root}"
        try:
            part = svhn(root, split=split, download=download)
        except Exception as error:
            raise _explained("svhn", [(root / file, md5)], source, download, error) from error
        parts.append(_tensors(part.data, part.labels, 10, str(root / file), source))
    return parts[0], parts[1], tuple("0123456789")


def _explained(
    name: str, files: Sequence[tuple[Path, str]], source: str, download: bool, error: Exception
) -> FileNotFoundError | ValueError:
    """Why torchvision could not read the files, of which it says only that something is wrong."""
    md5_of = require("torchvision.datasets.utils", name).calculate_md5
    cure = f"needed is {source}; load_data({name!r}, root, download=True) fetches it"
    if download:
        cure = f"needed is {source}; download=True failed with {type(error).__name__}: {error}"
    for path, expected in files:
        if not path.is_file():
            return FileNotFoundError(f"{path} is missing; {cure}")
        found = md5_of(path)
        if found != expected:
            return ValueError(
                f"{path} is damaged or incomplete (its MD5 is {found}, expected {expected}); delete it; "
                f"{cure}"
            )
    return ValueError(f"{name} cannot be read: {type(error).__name__}: {error}; {cure}")


def _tensors(
    images: np.ndarray, labels: Sequence[int], classes: int, where: str, source: str
) -> ImageTensors:
    """[n, 3, 32, 32] uint8 and n labels as tensors; ValueError where they are not that."""
    targets = np.atleast_1d(np.asarray(labels, dtype=np.int64))
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(f"{where} must hold uint8 images [n, 3, 32, 32], got {found}; needed is {source}")
    if len(images) != len(targets):
        raise ValueError(
            f"{where} must hold a label for each image, got {len(images)} images and {len(targets)} labels; "
            f"needed is {source}"
        )
    if len(targets) and not 0 <= targets.min() <= targets.max() < classes:
        found = f"{targets.min()} to {targets.max()}"
        raise ValueError(f"{where} must hold labels 0 to {classes - 1}, got {found}; needed is {source}")
    return ImageTensors(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(targets))
