"""Loaders whose batches do not depend on the number of workers and processes, nor on an interruption."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from convinit._checks import check_int
from convinit.train.data.draws import permutation


def train_loader(
    dataset: Any,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader of (images, labels) over one epoch, in a random order that (seed, epoch) alone decides.

    Batch i is the same images whatever the number of processes; each process gets its slice of it. An
    `Augmented` data set draws as of this epoch. With its `aug_repeats` above 1 an image is so often in a
    batch or two, and the epoch has its length still, as with timm's RepeatAugSampler, which rounds it down to
    a multiple of 256.

    Args:
        dataset: map-style, of (tensor, class index).
        batch_size: images in a batch of all processes together, divisible by `world_size`.
        seed, epoch: of the order, from 0.
        start_batch: batches to leave out at the start, without loading them; all of them leaves none.
        num_workers: processes that load; 0 means this one. They live as long as the iteration.
        rank, world_size: this process and their number.
        drop_last: leave out the last batch where it is smaller. Else its slices may differ by one image
            between processes: weight each by its size.
        pin_memory: as in torch's DataLoader.

    Raises:
        TypeError, ValueError: a number is out of range, or a process would go without images in some batch.
    """
    check_int("seed", seed, minimum=0)
    check_int("epoch", epoch, minimum=0)
    check_int("start_batch", start_batch, minimum=0)
    total = _check(dataset, batch_size, num_workers, rank, world_size)
    if batch_size % world_size:
        raise ValueError(
            f"batch_size must be divisible by the number of processes, {world_size}, got {batch_size}"
        )
    last = total % batch_size
    if drop_last:
        total -= last
    elif 0 < last < world_size:
        raise ValueError(
            f"the last batch has {last} images for {world_size} processes; "
            "use drop_last=True or another batch_size"
        )
    if total == 0:
        raise ValueError(f"with drop_last, the data must fill a batch of {batch_size}, got {last} images")
    if start_batch > -(-total // batch_size):
        raise ValueError(f"start_batch must be at most {-(-total // batch_size)}, got {start_batch}")
    if hasattr(dataset, "set_epoch"):
        dataset = copy.copy(dataset)  # so that loaders of other epochs keep theirs
        dataset.set_epoch(epoch)
    repeats: int = getattr(dataset, "aug_repeats", 1)
    order = permutation(len(dataset), "order", seed, epoch)
    order = (order[:, None] + len(dataset) * np.arange(repeats)).flatten()[:total]
    batches = [order[i : i + batch_size] for i in range(0, total, batch_size)]
    # An image's repeats lie apart, for mixup and CutMix pair neighbours; timm's are on different processes.
    order = np.concatenate([batch[k::repeats] for batch in batches for k in range(repeats)])
    slices = _Slices(order, batch_size, start_batch, rank, world_size)
    return _loader(dataset, slices, num_workers, pin_memory)


def test_loader(
    dataset: Any,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader of (images, labels) in the data set's order, every image once over all processes.

    Nothing is repeated to make the processes' shares equal: they may differ by an image a batch, and a
    process may have no part in the last batch. So sum the correct answers and the images of each process
    over the processes, then divide.

    Args:
        dataset, batch_size, num_workers, rank, world_size, pin_memory: as in `train_loader`; batch_size may
            be any number.

    Raises:
        TypeError, ValueError: a number is out of range.
    """
    total = _check(dataset, batch_size, num_workers, rank, world_size)
    return _loader(
        dataset, _Slices(np.arange(total), batch_size, 0, rank, world_size), num_workers, pin_memory
    )


test_loader.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest makes of its name


class _Slices(Sampler[list[int]]):
    """A process's slices, where not empty, of the batches that an order is cut into."""

    def __init__(self, order: np.ndarray, batch_size: int, start: int, rank: int, world_size: int) -> None:
        batches = (order[i : i + batch_size] for i in range(start * batch_size, len(order), batch_size))
        slices = (b[len(b) * rank // world_size : len(b) * (rank + 1) // world_size] for b in batches)
        self.slices = [indices for indices in slices if len(indices)]

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.tolist() for indices in self.slices)


class _Batches(Dataset):
    """Whole batches of a data set: an index is a list of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> Any:
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        return default_collate([self.dataset[index] for index in indices])


def _loader(dataset: Dataset, slices: _Slices, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        _Batches(dataset),
        batch_size=None,  # the sampler's elements are batches already
        sampler=slices,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of the workers' seeds, so that torch's own generator is left alone
    )


def _check(dataset: Any, batch_size: int, num_workers: int, rank: int, world_size: int) -> int:
    check_int("batch_size", batch_size)
    check_int("num_workers", num_workers, minimum=0)
    check_int("world_size", world_size)
    if check_int("rank", rank, minimum=0) >= world_size:
        raise ValueError(f"rank must be below the number of processes, {world_size}, got {rank}")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got none")
    return len(dataset)
