"""Data sets that are folders of image files: Tiny-ImageNet as its archive unpacks, and one's own images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch

from convinit.train.data.images import ImageFiles, hidden, image_paths
from convinit.train.data.parts import Parts, complete, numbered

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


# How people name the parts of a data set that is split.
_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read_folder(root: Path, test_fraction: float, split_seed: int) -> Parts:
    """Training set, test set, class names and perhaps validation set of images in a folder for each class.

    `root` holds train/ and test/ or val/, each with the class folders; of all three, val/ is to validate on.
    Or it holds the class folders, and a stratified share of the images becomes the test set.
    """
    found = {
        part: [root / name for name in _folders(root) if name.lower() in words]
        for part, words in _PARTS.items()
    }
    places = {part: own[0] for part, own in found.items() if own}
    twice = next((own for own in found.values() if len(own) > 1), None)
    if twice or (places and ("train" not in places or len(places) == 1)):
        there = ", ".join(f"{place.name}/" for place in (twice or places.values()))
        raise FileNotFoundError(
            f"{root} must hold train/ and test/ or val/, each once, or else class folders alone, got {there}"
        )
    read = {part: _class_folders(place) for part, place in (places or {"train": root}).items()}
    indices, names = numbered({part: labels for part, (_, labels) in read.items()}, None, str(root))
    images = {part: ImageFiles(paths, indices[part], channels=None) for part, (paths, _) in read.items()}
    return complete(images, names, test_fraction, split_seed)


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(each.name for each in entries if each.is_dir() and not hidden(each.name))
    except OSError as error:
        _raise(error)


def _class_folders(root: Path) -> tuple[list[str], list[int | str]]:
    """The images under a folder of class folders, which may be links, and the folder's name of each."""
    layout = f"{root} must hold a folder for each class with its images"
    names = _folders(root)
    if not names:
        loose = image_paths(str(root), _raise)
        if loose:
            raise ValueError(
                f"{layout}, got {len(loose)} images outside any folder, such as {Path(loose[0]).name}; move "
                "those of each class into a folder of its own"
            )
        raise FileNotFoundError(f"{layout}, got {_kinds(root) or 'an empty folder'}")
    if len(names) == 1:
        inner = _folders(root / names[0])
        hint = f"; are the classes those of {root / names[0]}?" if len(inner) > 1 else ""
        raise ValueError(f"{layout}, of at least 2 classes, got {names[0]}/ alone{hint}")
    paths: list[str] = []
    labels: list[int | str] = []
    for name in names:
        found = image_paths(str(root / name), _raise, follow_links=True)
        if not found:
            kinds = _kinds(root / name)
            raise FileNotFoundError(
                f"{layout}, but {root / name} has none that Pillow reads"
                + (f", only {kinds}" if kinds else ": it is empty")
            )
        paths += found
        labels += [name] * len(found)
    return paths, labels


def _kinds(folder: Path) -> str:
    """What files a folder holds, as "3 files .heic, 1 file .txt"; "" if none."""
    counts = Counter(
        Path(name).suffix.lower() or "without a suffix"
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not hidden(name)
    )
    return ", ".join(f"{count} file{'s' * (count > 1)} {kind}" for kind, count in sorted(counts.items()))


def _raise(error: OSError) -> NoReturn:
    raise OSError(f"{error.filename} cannot be listed: {error.strerror}") from error
