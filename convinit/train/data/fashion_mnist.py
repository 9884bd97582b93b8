"""Fashion-MNIST from its four idx files, packed or not, which are read where they lie."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convinit._optional import require
from convinit.train.data.images import ImageTensors

USUAL = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Of pixels in [0, 1]. A mean of 0 leaves the background 0, so that padding looks like it; measured: 0.2860.
MEAN, STD = (0.0,), (0.3530,)
_NEEDED = (
    "needed are the files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, with or without .gz: on Debian and Ubuntu `apt-get install "
    f"dataset-fashion-mnist` puts them into {USUAL}; elsewhere download=True fetches them"
)


def read_fashion_mnist(root: Path, download: bool) -> tuple[ImageTensors, ImageTensors, tuple[str, ...]]:
    """Training set, test set and class names; images [n, 1, 28, 28] uint8.

    Args:
        root: the folder of the files, or one that has them in fashion-mnist or, as torchvision puts them, in
            FashionMNIST/raw.
        download: let torchvision fetch them into `root` if they are not there.
    """
    if download and _folder(root) is None:
        fashion = require("torchvision.datasets", "fetching the data set 'fashion-mnist'").FashionMNIST
        try:
            fashion(root, download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"{root} has no Fashion-MNIST, and fetching it failed: {error}; {_NEEDED}"
            ) from error
    folder = _folder(root)
    if folder is None:
        raise FileNotFoundError(f"{root} has no Fashion-MNIST; {_NEEDED}")
    train, test = (
        _part(_file(folder, f"{part}-images-idx3-ubyte"), _file(folder, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    return train, test, CLASSES


def _folder(root: Path) -> Path | None:
    places = (root, root / USUAL.name, root / "FashionMNIST" / "raw", root / "raw")
    return next((place for place in places if any(place.glob("train-images-idx3-ubyte*"))), None)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder / name} is missing, also with .gz; {_NEEDED}")


def _part(images: Path, labels: Path) -> ImageTensors:
    pixels, classes = _idx(images, 3), _idx(labels, 1).to(torch.int64)
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"{images} must hold images of 28 x 28, got {list(pixels.shape)}; {_NEEDED}")
    if len(pixels) != len(classes) or not len(classes) or classes.max() >= len(CLASSES):
        raise ValueError(
            f"{labels} must hold a label 0 to 9 for each of {len(pixels)} images, got {len(classes)} labels; "
            f"{_NEEDED}"
        )
    return ImageTensors(pixels.unsqueeze(1), classes)


def _idx(path: Path, dims: int) -> Tensor:
    """The uint8 array of an idx file: two zeros, 8 for uint8, the number of sizes, the sizes, the bytes."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_NEEDED}") from error
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(f"{path} is no idx file of bytes in {dims} dimensions; {_NEEDED}")
    shape = struct.unpack(f">{dims}I", content[4:start])
    if len(content) - start != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is damaged: {len(content) - start} bytes for {list(shape)}; {_NEEDED}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
