"""Images and labels in one .npz file, as `numpy.savez` writes it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from convinit.train.data.images import ImageTensors
from convinit.train.data.parts import Parts, complete, numbered

# Names of a part's two arrays: ours, which are MedMNIST's, and Keras'.
_NAMES = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"), ("x", "y")),
    "val": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
_NEEDED = (
    "needed are the arrays images and labels, or train_images, train_labels, test_images and test_labels, "
    "as numpy.savez(file, images=..., labels=...) writes them"
)


def read_npz(path: Path, test_fraction: float, split_seed: int) -> Parts:
    """Training set, test set, class names and, if it is there, the validation set of a .npz file.

    Images are [n, H, W], [n, H, W, C] or [n, C, H, W] of uint8, or of floats from 0 to 1, which are rounded
    to 8 bits; labels are [n] or [n, 1] numbers or texts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"root must be the .npz file, but {path} is no file; {_NEEDED}")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            names = {
                part: found
                for part, pairs in _NAMES.items()
                if (found := next((pair for pair in pairs if pair[0] in file or pair[1] in file), None))
            }
            if "train" not in names:
                raise ValueError(f"it holds {', '.join(file) or 'nothing'}")
            missing = next((name for pair in names.values() for name in pair if name not in file), None)
            if missing:
                raise ValueError(f"it lacks {missing}")
            arrays = {part: (file[images], file[labels]) for part, (images, labels) in names.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be used: {error}; {_NEEDED}") from error
    labels = {
        part: _labels(own, f"{names[part][1]} in {path}", len(images))
        for part, (images, own) in arrays.items()
    }
    indices, classes = numbered(labels, None, str(path))
    parts = {
        part: ImageTensors(_images(images, f"{names[part][0]} in {path}"), indices[part])
        for part, (images, _) in arrays.items()
    }
    channels = {each.images.shape[1] for each in parts.values()}
    if len(channels) > 1:
        raise ValueError(f"all images in {path} must have as many channels, got {sorted(channels)}")
    return complete(parts, classes, test_fraction, split_seed)


def _images(pixels: np.ndarray, what: str) -> torch.Tensor:
    """[n, C, H, W] uint8."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[-1] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"{what} must be [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3, got "
            f"{list(pixels.shape)}"
        )
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and 0 <= low <= high <= 1:
        pixels = np.rint(pixels * 255)
    elif pixels.dtype.kind not in "iu" or low < 0 or high > 255:
        raise ValueError(
            f"{what} must be whole numbers from 0 to 255 or floats from 0 to 1, got {pixels.dtype} from "
            f"{low:.4g} to {high:.4g}"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.uint8))


def _labels(labels: np.ndarray, what: str, count: int) -> list[int | str]:
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.shape != (count,) or flat.dtype.kind not in "iuU":
        raise ValueError(
            f"{what} must hold a whole number or a text for each of {count} images, got {labels.dtype} of "
            f"shape {list(labels.shape)}"
        )
    return flat.tolist()
