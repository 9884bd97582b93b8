"""Data sets that are folders of image files: Tiny-ImageNet as its archive unpacks, and one's own images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from convinit.train.data.images import ImageFiles, hidden, image_paths
from convinit.train.data.subsets import check_fraction, stratified_order

_TINY = (
    "needed is the archive tiny-imagenet-200.zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip, "
    "unpacked and left as it is"
)


def read_tiny_imagenet(root: Path) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """Training set, validation set and class names of Tiny-ImageNet, in the layout of its archive.

    Classes are numbered in the order of their sorted WordNet ids. The validation images stay where they are;
    their classes are read from val_annotations.txt.
    """
    if not (root / "wnids.txt").exists() and (root / "tiny-imagenet-200").exists():
        root = root / "tiny-imagenet-200"
    wnids = sorted(fields[0] for fields in _table(root / "wnids.txt", 1))
    if not wnids or len(set(wnids)) < len(wnids):
        raise ValueError(
            f"{root / 'wnids.txt'} must list each WordNet id once, got {len(wnids)} lines; {_TINY}"
        )
    index_of = {wnid: index for index, wnid in enumerate(wnids)}
    words = {fields[0]: fields[1] for fields in _table(root / "words.txt", 2)}
    nameless = [wnid for wnid in wnids if wnid not in words]
    if nameless:
        raise ValueError(f"{root / 'words.txt'} has no line for {nameless[0]} of wnids.txt; {_TINY}")

    paths, labels = [], []
    for wnid, index in index_of.items():
        folder = root / "train" / wnid
        listed = [fields[0] for fields in _table(folder / f"{wnid}_boxes.txt", 5)]
        _check_same(folder / "images", listed, folder / f"{wnid}_boxes.txt")
        paths += [str(folder / "images" / name) for name in sorted(listed)]
        labels += [index] * len(listed)
    strangers = sorted({entry.name for entry in _entries(root / "train")} - set(wnids))
    if strangers:
        raise ValueError(f"{root / 'train' / strangers[0]} is not a class of wnids.txt; {_TINY}")
    train = ImageFiles(paths, torch.tensor(labels))

    annotations = root / "val" / "val_annotations.txt"
    rows = sorted(fields[:2] for fields in _table(annotations, 6))
    for name, wnid in rows:
        if wnid not in index_of:
            raise ValueError(f"{annotations} gives {name} the class {wnid}, which wnids.txt lacks; {_TINY}")
    folder = root / "val" / "images"
    _check_same(folder, [name for name, _ in rows], annotations)
    test = ImageFiles([str(folder / name) for name, _ in rows], torch.tensor([index_of[w] for _, w in rows]))
    return train, test, tuple(words[wnid] for wnid in wnids)


def _table(path: Path, columns: int) -> list[list[str]]:
    """The lines of a text file, cut at tabs; an error that names it where one has too few columns."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path} cannot be read ({error}); {_TINY}") from error
    rows = [line.split("\t") for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < columns:
            raise ValueError(
                f"{path} must have {columns} columns, got {len(row)} in line {number}: {row}; {_TINY}"
            )
    return rows


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not hidden(entry.name)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is missing; {_TINY}") from error


def _check_same(folder: Path, listed: Iterable[str], listing: Path) -> None:
    """Refuses a folder whose files are not just those that its listing names, each once."""
    listed = list(listed)
    if not listed:
        raise ValueError(f"{listing} names no images; {_TINY}")
    if len(set(listed)) < len(listed):
        raise ValueError(f"{listing} names an image twice; {_TINY}")
    found = {entry.name for entry in _entries(folder)}
    missing, extra = sorted(set(listed) - found), sorted(found - set(listed))
    if missing:
        what = f"is missing, one of {len(missing)} named in {listing}"
        raise FileNotFoundError(f"{folder / missing[0]} {what}; {_TINY}")
    if extra:
        what = f"is not named in {listing}, one of {len(extra)}"
        raise ValueError(f"{folder / extra[0]} {what}; {_TINY}")


def read_folder(
    root: Path, test_fraction: float, split_seed: int
) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """Training set, test set and class names of one's own images, a folder for each class.

    `root` holds train/ and val/ or test/ (val/ where there are both), each with the class folders; or it
    holds the class folders, and a stratified share of the images becomes the test set.
    """
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if not parts:
        images, names = _class_folders(root)
        return *_split(images, names, test_fraction, split_seed), names
    if "train" not in parts or len(parts) == 1:
        raise FileNotFoundError(
            f"{root} must hold train/ and val/ or test/, or else class folders alone, "
            f"got {', '.join(f'{name}/' for name in parts)}"
        )
    train, names = _class_folders(parts["train"])
    other = parts.get("val") or parts["test"]
    test, test_names = _class_folders(other)
    unknown = [name for name in test_names if name not in names]
    if unknown:
        raise ValueError(f"{other / unknown[0]} is a class that {parts['train']} lacks")
    renumbered = torch.tensor([names.index(name) for name in test_names])
    return train, ImageFiles(test.paths, renumbered[test.labels]), names


def _class_folders(root: Path) -> tuple[ImageFiles, tuple[str, ...]]:
    """The images under a folder of class folders, which may be links; classes in sorted order."""
    layout = f"{root} must hold a folder for each class with its images"
    try:
        with os.scandir(root) as entries:
            names = sorted(each.name for each in entries if each.is_dir() and not hidden(each.name))
    except OSError as error:
        _raise(error)
    if not names:
        raise FileNotFoundError(f"{layout}, got none")
    if len(names) < 2:
        raise ValueError(f"{layout}, at least 2, got {names}")
    paths: list[str] = []
    labels: list[int] = []
    for index, name in enumerate(names):
        found = image_paths(str(root / name), _raise, follow_links=True)
        if not found:
            raise FileNotFoundError(f"{layout}, but {root / name} has none that Pillow reads")
        paths += found
        labels += [index] * len(found)
    return ImageFiles(paths, torch.tensor(labels)), tuple(names)


def _raise(error: OSError) -> NoReturn:
    raise OSError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _split(
    images: ImageFiles, names: tuple[str, ...], test_fraction: float, seed: int
) -> tuple[ImageFiles, ImageFiles]:
    count = max(1, round(check_fraction("test_fraction", test_fraction) * len(images)))
    order = stratified_order(images.labels, seed)
    train, test = (images.take(np.sort(part)) for part in (order[count:], order[:count]))
    for name, left, tested in zip(
        names,
        torch.bincount(train.labels, minlength=len(names)).tolist(),
        torch.bincount(test.labels, minlength=len(names)).tolist(),
        strict=True,
    ):
        if left == 0 or tested == 0:
            raise ValueError(
                f"the class {name!r} has {left + tested} images, of which test_fraction = {test_fraction} "
                f"leaves {left} to train on and {tested} to test on; add images or change test_fraction"
            )
    return train, test
