"""Parts of a training set: stratified by class, seeded and nested."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from convinit._checks import check_int, check_real
from convinit.train.data.draws import permutation


def stratified_order(labels: Tensor, seed: int) -> np.ndarray:
    """All indices of a data set, in the order in which subsets take them.

    The r-th image of a class of n (r from 0, in a random order) comes at r / n; the classes at the same place
    come in a random order. So the first k indices are a stratified subset for every k: classes in proportion
    (Adams' method of apportionment; equal classes differ by at most one image), none left out once k reaches
    the number of classes, and each subset within all larger ones.

    Args:
        labels: [n] int64.
        seed: of both orders, at least 0. The same seed gives the same order on every machine.

    Returns:
        [n] int64.
    """
    check_int("seed", seed, minimum=0)
    shuffled = permutation(len(labels), "images", seed)
    _, class_of, sizes = np.unique(labels.numpy()[shuffled], return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)  # of an image within its class
    rank[class_of.argsort(kind="stable")] = np.concatenate([np.arange(size) for size in sizes])
    turn = permutation(len(sizes), "classes", seed)
    return shuffled[np.lexsort((turn[class_of], rank / sizes[class_of]))]


def split_indices(
    labels: Tensor,
    *,
    count: int | None = None,
    fraction: float | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to validate on, both stratified and ascending.

    Validation takes the end of `stratified_order` and training its beginning, so that training images of one
    seed are nested, whether or not there are validation images.

    Args:
        labels: [n] int64 of the whole set.
        count: images to train on; or
        fraction: the share to train on of those that are not for validation, above 0 to 1. With neither, all
            of them.
        val_fraction: share of the whole set to validate on, above 0 and below 1. Default: none.
        seed: as in `stratified_order`.

    Raises:
        TypeError, ValueError: a number is of the wrong type or out of range, or both are given.
    """
    total = len(labels)
    if count is not None and fraction is not None:
        raise ValueError(f"give train_count or train_fraction, not both, got {count} and {fraction}")
    held_out = 0
    if val_fraction is not None:
        held_out = max(1, round(check_fraction("val_fraction", val_fraction) * total))
    left = total - held_out
    if left < 1:
        raise ValueError(f"val_fraction must leave images to train on, got {val_fraction} of {total} images")
    if fraction is not None:
        count = max(1, round(check_fraction("train_fraction", fraction) * left))
    elif count is None:
        count = left
    if check_int("train_count", count) > left:
        kept = f"; {held_out} of {total} are for validation" if held_out else ""
        raise ValueError(
            f"train_count must be at most {left}, the number of training images, got {count}{kept}"
        )
    order = stratified_order(labels, seed)
    return np.sort(order[:count]), np.sort(order[left:])


def check_fraction(name: str, value: float) -> float:
    """`value` as a float above 0, at most 1; TypeError or ValueError otherwise."""
    value = check_real(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    return value
