"""What the readers of data sets return: the parts of one, with its classes numbered alike in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convinit.train.config import near
from convinit.train.data.images import Images
from convinit.train.data.subsets import check_fraction, stratified_order


class Parts(NamedTuple):
    """A data set as it was read.

    Attributes:
        train, test: images.
        class_names: a name for each class.
        val: images to validate on, if the data set has some of its own.
    """

    train: Any
    test: Any
    class_names: tuple[str, ...]
    val: Any = None


def numbered(
    labels: Mapping[str, Sequence[int | str]], class_names: Sequence[str] | None, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Class indices of each part [n] int64, and the classes' names.

    Args:
        labels: "train", and perhaps "val" and "test" → labels of the images.
        class_names: labels are indices of these; None: the classes are the training labels in sorted order.
        source: of the data, for messages.

    Raises:
        ValueError: labels are no classes of the training set, or there are fewer than two.
    """
    if class_names is None:
        kinds = {type(label) for label in labels["train"]}
        if len(kinds) > 1:
            raise ValueError(f"the labels of {source} must be all numbers or all texts, got both")
        classes: Sequence[Any] = sorted(set(labels["train"]))
        class_names = tuple(map(str, classes))
    else:
        classes = range(len(class_names))
    index_of = {label: index for index, label in enumerate(classes)}
    indices = {}
    for part, own in labels.items():
        kind = {"train": "training", "val": "validation"}.get(part, part)
        if not own:
            raise ValueError(f"{source} has no {kind} images")
        unknown = sorted(set(own) - set(index_of), key=str)
        if unknown and -1 in unknown:
            raise ValueError(f"{source} has {kind} images without a label: theirs is -1")
        if unknown:
            raise ValueError(
                f"{source} has {kind} images of the class {unknown[0]!r}, which is none of the "
                f"{len(classes)} of its training images{near(str(unknown[0]), class_names)}"
            )
        indices[part] = torch.tensor([index_of[label] for label in own])
    if len(indices["train"].unique()) < 2:
        only = class_names[int(indices["train"][0])]
        raise ValueError(f"{source} must have training images of at least 2 classes, got {only!r} alone")
    return indices, tuple(class_names)


def complete(parts: Mapping[str, Images], names: Sequence[str], fraction: float, seed: int) -> Parts:
    """A data set of "train" and perhaps "val" and "test": the test images are those to validate on, or else
    a stratified share of the training images, where it has none."""
    parts = dict(parts)
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if "test" not in parts:
        parts["train"], parts["test"] = split_off_test(parts["train"], names, fraction, seed)
    return Parts(parts["train"], parts["test"], tuple(names), parts.get("val"))


def split_off_test(images: Images, names: Sequence[str], fraction: float, seed: int) -> tuple[Any, Any]:
    """Images to train on and to test on, a stratified share of those that are not split yet."""
    count = max(1, round(check_fraction("test_fraction", fraction) * len(images)))
    order = stratified_order(images.labels, seed)
    train, test = (images.take(np.sort(part)) for part in (order[count:], order[:count]))
    for name, left, tested in zip(
        names,
        torch.bincount(train.labels, minlength=len(names)).tolist(),
        torch.bincount(test.labels, minlength=len(names)).tolist(),
        strict=True,
    ):
        if (left == 0 or tested == 0) and left + tested:
            raise ValueError(
                f"the class {name!r} has {left + tested} images, of which test_fraction = {fraction} "
                f"leaves {left} to train on and {tested} to test on; add images or change test_fraction"
            )
    return train, test
