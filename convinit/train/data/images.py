"""Image data sets to index: uint8 tensors in memory, and files decoded when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convinit._optional import require


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
    """Images in files, decoded when they are asked for.

    Args:
        paths: n files that Pillow can read.
        labels: [n] int64.
        channels: 3 (RGB), 1 (greyscale), or None: as each file is stored.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, channels: int | None = 3) -> None:
        require("PIL", "reading image files")
        self.paths, self.labels, self.channels = list(paths), labels, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(self.paths[index], self.channels), int(self.labels[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageFiles:
        """The data set of these images alone."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageFiles([self.paths[i] for i in chosen.tolist()], self.labels[chosen], self.channels)


class ImageItems(Dataset):
    """Images that another data set gives when they are asked for.

    Args:
        dataset: map-style, of (image, anything); images as `as_image` takes them.
        labels: [n] int64.
        channels: 3, 1, or None: as each image is given.
        random: whether the data set may draw, as transforms of its own do.
        indices: of the images in the data set; None means all n.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor,
        channels: int | None = None,
        *,
        random: bool = False,
        indices: Tensor | None = None,
    ) -> None:
        self.dataset, self.labels, self.channels, self.random = dataset, labels, channels, random
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.dataset[int(self.indices[index])]
        return as_image(image, self.channels), int(self.labels[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageItems:
        """The data set of these images alone."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageItems(
            self.dataset, self.labels[chosen], self.channels, random=self.random, indices=self.indices[chosen]
        )


Images = ImageTensors | ImageFiles | ImageItems


def as_image(image: Any, channels: int | None) -> Any:
    """A PIL image in RGB or greyscale, or uint8 [C, H, W], of what a data set gives.

    Args:
        image: PIL image; path of a file; tensor [C, H, W] or [H, W], or NumPy array [H, W] or [H, W, C], of
            uint8, or of floats from 0 to 1, which are rounded to 8 bits.
        channels: 3, 1 (grey becomes RGB, but not RGB grey where it is no PIL image), or None: as it is.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return _upright(image, channels)
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), channels)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
        if image.dim() == 3 and image.shape[-1] in (1, 3):
            image = image.permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(
            "an image must be a PIL image, a path, a tensor [C, H, W] or an array [H, W, C], got "
            f"{type(image).__name__}"
        )
    image = image.unsqueeze(0) if image.dim() == 2 else image
    wanted = (1, 3) if channels is None else tuple({1, channels})
    if image.dim() != 3 or image.shape[0] not in wanted:
        raise ValueError(
            f"an image must be [C, H, W] with C = {' or '.join(map(str, wanted))}, got {list(image.shape)}"
        )
    return _eight_bits(image).expand(channels or -1, -1, -1)


def _eight_bits(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"pixels must be uint8, or floats from 0 to 1, got {image.dtype}")
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"float pixels must lie in 0 to 1, got {low:.3g} to {high:.3g}; leave normalisation to data.mean "
            "and data.std"
        )
    return image.mul(255).round().to(torch.uint8)


def read_image(path: str, channels: int | None = 3) -> Any:
    """`decode`d; an error with the path where the file is missing or cannot be decoded."""
    try:
        return decode(path, channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing, though it was there when the data set was read"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise OSError(
            f"{path} cannot be decoded as an image ({type(error).__name__}: {error}); "
            "replace the file with an undamaged copy, or remove it"
        ) from error


def decode(source: str | bytes, channels: int | None) -> Any:
    """A file as a PIL image in RGB or greyscale, 8 bits, upright: the one reader of training and prediction.

    Deep greyscale keeps its intensity: white is the largest number of its bits, and 1 in floats. EXIF's
    orientation is applied, as viewers do.

    Args:
        source: path of the file, or its bytes; of several frames the first is taken.
        channels: 3 (RGB), 1 (greyscale), or None: greyscale where it is stored so, else RGB.

    Raises:
        ValueError: greyscale whose white is unknown: integers of 32 bits, signed ones, floats beyond 0 to 1.
        OSError, or anything that Pillow's decoders raise: it is missing or damaged.
    """
    from PIL import Image

    # A file, not its path: Pillow maps raw TIFFs of a path into memory, those on their side in wrong rows.
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        with Image.open(file) as image:
            return _upright(image, channels)


def _upright(image: Any, channels: int | None) -> Any:
    """A PIL image as `decode` gives it."""
    from PIL import Image, ImageOps

    kind, tags = str(image.format), getattr(image, "tag_v2", {})
    upright = ImageOps.exif_transpose(image)
    grey = upright.mode in ("1", "L", "LA", "La")
    if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
        pixels, grey = _intensity(upright, kind, tags), True
        upright = Image.fromarray(pixels.mul_(255).round_().to(torch.uint8).numpy())
    return upright.convert("L" if channels == 1 or (channels is None and grey) else "RGB")


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
