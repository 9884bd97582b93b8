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


def subset_indices(
    labels: Tensor, *, count: int | None = None, fraction: float | None = None, seed: int = 0
) -> np.ndarray:
    """Indices of a stratified subset, ascending: the first `count` of `stratified_order`.

    Args:
        labels: [n] int64 of the whole set.
        count: images to take, 1 to n.
        fraction: or their share, above 0 to 1; the count is round(fraction · n), at least 1. With neither,
            all of them.
        seed: as in `stratified_order`.

    Raises:
        TypeError, ValueError: a number is of the wrong type or out of range, or both are given.
    """
    total = len(labels)
    if count is not None and fraction is not None:
        raise ValueError(f"give train_count or train_fraction, not both, got {count} and {fraction}")
    if fraction is not None:
        count = max(1, round(check_fraction("train_fraction", fraction) * total))
    elif count is None:
        count = total
    if check_int("train_count", count) > total:
        raise ValueError(f"train_count must be at most {total}, the number of training images, got {count}")
    return np.sort(stratified_order(labels, seed)[:count])


def check_fraction(name: str, value: float) -> float:
    """`value` as a float above 0, at most 1; TypeError or ValueError otherwise."""
    value = check_real(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    return value
