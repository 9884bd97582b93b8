"""Image data sets to index: uint8 tensors in memory, and files decoded when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


def require(module: str, what_for: str) -> ModuleType:
    """The module; ImportError that names the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what_for} needs {module.partition('.')[0]}, which is not installed; get it with: "
            "pip install 'convinit[train]'"
        ) from error


class ImageTensors(Dataset):
    """Images in memory.

    Args:
        images: [n, C, H, W] uint8.
        labels: [n] int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B], by one indexing."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], self.labels[chosen]

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageTensors:
        """The data set of these images alone."""
        return ImageTensors(*self.batch(indices))


class ImageFiles(Dataset):
    """Images in files, decoded to RGB when they are asked for.

    Args:
        paths: n files that Pillow can read.
        labels: [n] int64.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor) -> None:
        require("PIL", "reading image files")
        self.paths, self.labels = list(paths), labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(self.paths[index]), int(self.labels[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageFiles:
        """The data set of these images alone."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageFiles([self.paths[i] for i in chosen.tolist()], self.labels[chosen])


def read_image(path: str) -> Any:
    """A file as a PIL image in RGB; an error with the path where it is missing or cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing, though it was there when the data set was read"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise OSError(
            f"{path} cannot be decoded as an image ({type(error).__name__}: {error}); "
            "replace the file with an undamaged copy, or remove it"
        ) from error
