"""CIFAR-10's files in their genuine format, with a few images, for the tests of data and of experiments."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its `str`: keys, labels' names and pixels of the real CIFAR files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_pickle(path: Path, value: object) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)


def write_cifar10(root: Path, monkeypatch, per_batch: int = 10, labels_short: int = 0) -> np.ndarray:
    """The python version's files, small; torchvision is told their MD5 sums."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    images = pixels(6 * per_batch)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = images[i * per_batch : (i + 1) * per_batch]
        labels = [j % 10 for j in range(per_batch - labels_short)]
        files = [f"{j}.png".encode() for j in range(per_batch)]
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": part.reshape(per_batch, -1)}
        write_pickle(folder / name, batch | {b"filenames": files})
    classes = [
        b"airplane",
        b"automobile",
        b"bird",
        b"cat",
        b"deer",
        b"dog",
        b"frog",
        b"horse",
        b"ship",
        b"truck",
    ]
    meta = {b"num_cases_per_batch": per_batch, b"label_names": classes, b"num_vis": 3072}
    write_pickle(folder / "batches.meta", meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(folder / name)] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    return images
