"""Data sets that torchvision reads.

torchvision unpickles the CIFAR files itself, and only after their MD5 sums were found right.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convinit._optional import require
from convinit.train.config import near
from convinit.train.data.images import ImageFiles, ImageTensors
from convinit.train.data.own import read_datasets
from convinit.train.data.parts import Parts


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


def read_stl10(root: Path, download: bool) -> tuple[ImageTensors, ImageTensors, tuple[str, ...]]:
    """Labelled training set, test set and class names of STL-10."""
    stl10 = require("torchvision.datasets", "the data set 'stl10'").STL10
    folder = root / stl10.base_folder
    files = [(folder / file, md5) for file, md5 in [*stl10.train_list, *stl10.test_list]]
    source = f"the archive {stl10.filename} from {stl10.url}, unpacked so that {folder} holds it"
    try:
        sets = [stl10(root, split=split, download=download) for split in ("train", "test")]
    except Exception as error:
        raise _explained("stl10", files, source, download, error) from error
    train, test = (_tensors(part.data, part.labels, 10, f"stl10 in {root}", source, side=96) for part in sets)
    return train, test, tuple(getattr(sets[0], "classes", map(str, range(10))))


# Class of torchvision, names of its splits for training and test, where it has the paths, and what is needed.
_IN_FILES = {
    "food101": (
        "Food101", "train", "test", "_image_files", "food-101/ with images/ and meta/, of food-101.tar.gz",
    ),
    "flowers102": (
        "Flowers102", "train", "test", "_image_files",
        "flowers-102/ with jpg/ of 102flowers.tgz, imagelabels.mat and setid.mat",
    ),
    "pets": (
        "OxfordIIITPet", "trainval", "test", "_images",
        "oxford-iiit-pet/ with images/ and annotations/, of images.tar.gz and annotations.tar.gz",
    ),
}  # fmt: skip


def read_files(name: str, root: Path, download: bool) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """Training set, test set and class names of "food101", "flowers102" or "pets"; images in files.

    Split as published: of Flowers-102 the 1,020 images for training without the 1,020 for validation, of the
    pets both.
    """
    kind, *splits, paths, needed = _IN_FILES[name]
    cls = getattr(require("torchvision.datasets", f"the data set {name!r}"), kind)
    if name == "flowers102":
        require("scipy.io", f"the data set {name!r}")
    try:
        sets = [cls(root, split=split, download=download) for split in splits]
    except Exception as error:
        raise _explained(name, [], f"{root}/{needed}", download, error) from error
    names = tuple(sets[0].classes)
    parts = [ImageFiles([*map(str, getattr(part, paths))], torch.tensor(part._labels)) for part in sets]
    for part in parts:
        if not len(part) or part.labels.min() < 0 or part.labels.max() >= len(names):
            raise ValueError(f"{root} must hold images of {len(names)} classes; needed is {root}/{needed}")
        missing = next((path for path in part.paths if not Path(path).is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{missing} is missing; needed is {root}/{needed}")
    return parts[0], parts[1], names


def read_torchvision(
    kind: str, root: Path, download: bool, options: Mapping[str, Any], test_fraction: float, split_seed: int
) -> Parts:
    """Training set, test set and class names of any data set of images and classes that torchvision has.

    Its argument `train` or `split` parts it; of a split "test" and "val", test. Without such an argument a
    stratified share becomes the test set. Images in files are read as those in folders are.

    Args:
        kind: the name of its class in `torchvision.datasets`.
        root, download: of the class; download only where it has that argument.
        options: of its other arguments.
    """
    source = f"torchvision:{kind}"
    datasets = require("torchvision.datasets", f"the data set {source!r}")
    cls: Any = getattr(datasets, kind) if kind in datasets.__all__ else None
    taken = {} if cls is None else _parameters(cls)
    if "root" not in taken:
        known = [name for name in datasets.__all__ if name != kind]
        raise ValueError(f"torchvision has no such data set in files, got {source!r}{near(kind, known)}")
    for option in options:
        if option not in taken or option in _GIVEN:
            free = [name for name in taken if name not in _GIVEN]
            raise ValueError(
                f"data.options must be among {', '.join(free)} for {source}, got {option!r}"
                f"{near(option, free)}"
            )
    given = {**options, **({"loader": str} if "loader" in taken else {})}  # paths, to be decoded later
    if "download" in taken:
        given["download"] = download
    elif download:
        raise ValueError(f"download must not be set for {source}, which torchvision does not fetch")

    needed = [
        name for name, each in taken.items() if each.default is each.empty and name not in ("root", *given)
    ]
    if needed:
        raise ValueError(
            f"data.options must give {' and '.join(needed)} for {source}, as does --set "
            f"data.options={needed[0]}=..."
        )

    def part(**split: Any) -> Any:
        try:
            return cls(str(root), **given, **split)
        except Exception as error:
            if isinstance(error, ValueError) and "Unknown value" in str(error):
                raise ValueError(f"{source} is not read: {error}") from error
            cure = f"download=True {'failed' if download else 'fetches it, where torchvision can'}"
            raise FileNotFoundError(
                f"{source} cannot be read from {root}: {type(error).__name__}: {error}; {cure}"
            ) from error

    if "train" in taken and "train" not in options:
        train, test = part(train=True), part(train=False)
    elif "split" in taken and "split" not in options:
        default = taken["split"].default
        first = default if isinstance(default, str) and default.startswith("train") else "train"
        train, test = part(split=first), _tested(part)
    else:
        train, test = part(), None
    return read_datasets(train, test, test_fraction, split_seed, source=source, random=False)


def _tested(part: Callable[..., Any]) -> Any:
    """The split to test on; one whose labels are kept secret is passed over."""
    for name in ("test", "val", "valid"):
        with contextlib.suppress(ValueError):  # it has no split of that name
            found = part(split=name)
            if found[0][1] is not None:
                return found
    return None


# Arguments that are given for the user, or that would change what items are.
_GIVEN = ("root", "download", "loader", "transform", "target_transform", "transforms")


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class, those that it hands on to its bases among them."""
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__[:-1]:
        own = inspect.signature(vars(each)["__init__"]).parameters if "__init__" in vars(each) else {}
        found = {**{name: value for name, value in own.items() if value.kind not in _STARRED}, **found}
        if own and not any(value.kind is inspect.Parameter.VAR_KEYWORD for value in own.values()):
            break
    return {name: value for name, value in found.items() if name != "self"}


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _explained(
    name: str, files: Sequence[tuple[Path, str]], source: str, download: bool, error: Exception
) -> FileNotFoundError | ValueError:
    """Why torchvision could not read the files, of which it says only that something is wrong."""
    md5_of = require("torchvision.datasets.utils", name).calculate_md5
    cure = f"needed is {source}; download=True fetches it"
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
    images: np.ndarray, labels: Sequence[int], classes: int, where: str, source: str, side: int = 32
) -> ImageTensors:
    """[n, 3, side, side] uint8 and n labels as tensors; ValueError where they are not that."""
    targets = np.atleast_1d(np.asarray(labels, dtype=np.int64))
    if images.dtype != np.uint8 or images.shape[1:] != (3, side, side):
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(
            f"{where} must hold uint8 images [n, 3, {side}, {side}], got {found}; needed is {source}"
        )
    if len(images) != len(targets):
        raise ValueError(
            f"{where} must hold a label for each image, got {len(images)} images and {len(targets)} labels; "
            f"needed is {source}"
        )
    if len(targets) and not 0 <= targets.min() <= targets.max() < classes:
        found = f"{targets.min()} to {targets.max()}"
        raise ValueError(f"{where} must hold labels 0 to {classes - 1}, got {found}; needed is {source}")
    return ImageTensors(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(targets))
