"""Image data sets to index: uint8 tensors in memory, and files decoded when they are asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
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


def hidden(name: str) -> bool:
    """Whether a name is of no data: ".git", macOS's "._0.png" and "__MACOSX", what a NAS adds."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")


def image_paths(folder: str, on_error: Callable[[OSError], None], *, follow_links: bool = False) -> list[str]:
    """The files in a folder, at any depth, with a suffix of a format that Pillow reads; no hidden ones.

    Args:
        folder: its path.
        on_error: told of a folder that cannot be listed.
        follow_links: search linked folders too.
    """
    image = require("PIL.Image", "reading image files")
    suffixes = {suffix for suffix, kind in image.registered_extensions().items() if kind in image.OPEN}
    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not hidden(name))
        kept = (name for name in sorted(names) if not hidden(name))
        found += [os.path.join(place, name) for name in kept if os.path.splitext(name)[1].lower() in suffixes]
    return found


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
    """`decode`d in RGB; an error with the path where the file is missing or cannot be decoded."""
    try:
        return decode(path, channels=3)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing, though it was there when the data set was read"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise OSError(
            f"{path} cannot be decoded as an image ({type(error).__name__}: {error}); "
            "replace the file with an undamaged copy, or remove it"
        ) from error


def decode(path: str, channels: int) -> Any:
    """A file as a PIL image in RGB or greyscale, 8 bits, upright: the one reader of training and prediction.

    Deep greyscale keeps its intensity: white is the largest number of its bits, and 1 in floats. EXIF's
    orientation is applied, as viewers do.

    Args:
        path: of the file; of several frames the first is taken.
        channels: 3 (RGB) or 1 (greyscale).

    Raises:
        ValueError: greyscale whose white is unknown: integers of 32 bits, signed ones, floats beyond 0 to 1.
        OSError, or anything that Pillow's decoders raise: it is missing or damaged.
    """
    from PIL import Image, ImageOps

    # A file, not its path: Pillow maps raw TIFFs of a path into memory, those on their side in wrong rows.
    with open(path, "rb") as file, Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
            pixels = _intensity(upright, str(image.format), getattr(image, "tag_v2", {}))
            upright = Image.fromarray(pixels.mul_(255).round_().to(torch.uint8).numpy())
        return upright.convert("RGB" if channels == 3 else "L")


def _intensity(image: Any, kind: str, tags: Mapping[int, Any]) -> Tensor:
    """Greyscale of more than 8 bits as [H, W] float64, black 0 and white 1; `tags` are TIFF's."""
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2  # BitsPerSample, SampleFormat
    pixels = torch.from_numpy(np.array(image, dtype=np.float64))
    if image.mode == "F" and kind in ("TIFF", "PPM"):
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(
                f"float greyscale must lie in 0 (black) to 1 (white), got {pixels.min():g} to "
                f"{pixels.max():g}; save it as 8 or 16 bits"
            )
    elif image.mode != "F" and kind in ("PNG", "PPM", "JPEG2000", "TIFF") and bits <= 16 and not signed:
        pixels /= 2**bits - 1
    else:
        raise ValueError(
            f"greyscale of Pillow's mode {image.mode} in {kind} has no known white; save it as 8 or 16 bits"
        )
    return 1 - pixels if tags.get(262) == 0 else pixels  # PhotometricInterpretation: white is 0
