"""Data sets that were made in Python: map-style, of (image, label)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from convinit._progress import progress
from convinit.train.data.draws import seeded
from convinit.train.data.images import ImageItems
from convinit.train.data.parts import Parts, complete, numbered

_COMPARED = 32  # items whose labels are compared with those that a data set lists


def read_datasets(
    train: Any,
    test: Any | None,
    test_fraction: float,
    split_seed: int,
    *,
    source: str = "dataset",
    random: bool = True,
) -> Parts:
    """Training set, test set and class names of two data sets, or of one that is not split yet.

    Labels come from the attribute `targets` or `labels`, if there is one, as torchvision has it, and names
    from `classes`; otherwise all items are met once for their labels.

    Args:
        train, test: map-style, of (image, label).
        test_fraction, split_seed: of the share that becomes the test set where `test` is None.
        source: what messages call them.
        random: whether they may draw, as transforms of their own do.
    """
    given = {"train": train} if test is None else {"train": train, "test": test}
    labels = {part: all_labels(dataset, f"the {part} part of {source}") for part, dataset in given.items()}
    indices, names = numbered(labels, class_names(train, labels["train"]), source)
    images = {part: ImageItems(given[part], indices[part], random=random) for part in given}
    return complete(images, names, test_fraction, split_seed)


def all_labels(dataset: Any, what: str) -> list[int | str]:
    """The label of each item.

    Raises:
        TypeError, ValueError: an item is no pair of an image and a label.
    """
    if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{what} must be a map-style data set, with a length and items (image, label), got "
            f"{type(dataset).__name__}"
        )
    total = len(dataset)
    listed = _listed(dataset)
    if listed is not None and len(listed) == total:
        compared = sorted(set(np.linspace(0, total - 1, min(total, _COMPARED)).astype(int).tolist()))
        if all(listed[index] == _label(dataset, index, what) for index in compared):
            return listed
    return [_label(dataset, index, what) for index in progress(range(total), "reading labels")]


def _listed(dataset: Any) -> list[Any] | None:
    """The labels that a data set lists beside its items, if it does."""
    if isinstance(dataset, Subset):
        whole = _listed(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_listed(part) for part in dataset.datasets]
        return None if None in parts else [label for part in parts for label in part or []]
    for name in ("targets", "labels"):
        listed: Any = getattr(dataset, name, None)
        if hasattr(listed, "__len__") and hasattr(listed, "__iter__"):
            return [_plain(label) for label in listed]
    return None


def _label(dataset: Any, index: int, what: str) -> int | str:
    with seeded("labels", index):
        item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{len(item)} things" if isinstance(item, tuple | list) else type(item).__name__
        raise TypeError(f"items of {what} must be pairs (image, label), got {got}")
    label = _plain(item[1])
    if not isinstance(label, int | str):
        raise TypeError(f"labels of {what} must be whole numbers or texts, got {label!r:.60}")
    return int(label) if isinstance(label, bool) else label


def _plain(label: Any) -> Any:
    """NumPy's and torch's numbers as Python's."""
    try:
        return label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError):  # several numbers
        return label


def class_names(dataset: Any, labels: Sequence[int | str]) -> tuple[str, ...] | None:
    """The names that a data set gives to the classes 0, 1, ..., if it does and they are enough."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    names = getattr(dataset, "classes", getattr(dataset, "categories", None))
    if not isinstance(names, list | tuple) or any(isinstance(label, str) for label in labels):
        return None
    # ImageNet has several words for a class.
    texts = tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    return texts if labels and 0 <= min(labels) and max(labels) < len(texts) else None  # type: ignore[operator]
