"""Data sets of the Hugging Face Hub, and local ones that the `datasets` library reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convinit._optional import require
from convinit.train.data.images import ImageItems, decode
from convinit.train.data.parts import Parts, complete, numbered

_SPLITS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_LABELS = ("label", "labels", "fine_label", "target")


class _Rows:
    """Rows of a table as pairs of an image and a label; images are decoded here, as those in files are."""

    def __init__(self, table: Any, image: str, label: str) -> None:
        self.table, self.image, self.label = table, image, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.table[index]
        stored = row[self.image]
        try:
            return decode(stored["bytes"] or stored["path"], None), row[self.label]
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise OSError(
                f"row {index} of column {self.image!r} cannot be decoded as an image "
                f"({type(error).__name__}: {error})"
            ) from error


def read_hugging_face(
    name: str,
    cache: Path | None,
    download: bool,
    options: Mapping[str, Any],
    test_fraction: float,
    split_seed: int,
) -> Parts:
    """Training set, test set, class names and perhaps validation set of a data set of images and labels.

    Args:
        name: on the Hub, or a local folder of Parquet or other files, or one of `save_to_disk`.
        cache: where `datasets` keeps what it fetched; None means its own place.
        download: fetch it if it is not in the cache.
        options: of `datasets.load_dataset`, such as name=SUBSET or revision=TAG.
    """
    source = f"hf:{name}"
    datasets = require("datasets", f"the data set {source!r}", "datasets")
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"data.name is {source!r}, but {folder} is no folder")
    try:
        if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            with _offline(datasets, not download and not folder.is_dir()):
                path = str(folder) if folder.is_dir() else name
                loaded = datasets.load_dataset(path, cache_dir=cache and str(cache), **options)
    except Exception as error:
        if download or folder.is_dir():
            raise ValueError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
        raise FileNotFoundError(
            f"{source} is not in the cache of datasets ({type(error).__name__}); download=True fetches it"
        ) from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    tables = {
        part: loaded[found]
        for part, names in _SPLITS.items()
        if (found := next((each for each in names if each in loaded), None))
    }
    if "train" not in tables:
        if len(loaded) > 1:
            raise ValueError(f"{source} must have a split train, got {', '.join(loaded)}")
        tables = {"train": next(iter(loaded.values()))}
    image, label = _columns(datasets, tables["train"].features, source)
    labels = {part: table[label][:] for part, table in tables.items()}
    if "test" in labels and "val" in labels and set(labels["test"]) == {-1}:  # they are kept secret
        del tables["test"], labels["test"]
    feature = tables["train"].features[label]
    indices, names = numbered(labels, getattr(feature, "names", None), source)
    images = {
        part: ImageItems(
            _Rows(table.cast_column(image, datasets.Image(decode=False)), image, label), indices[part]
        )
        for part, table in tables.items()
    }
    return complete(images, names, test_fraction, split_seed)


def _columns(datasets: Any, features: Mapping[str, Any], source: str) -> tuple[str, str]:
    """The names of the columns of images and labels."""
    # Parquet that another library wrote has no Image, but the same two fields.
    images = [
        name
        for name, each in features.items()
        if isinstance(each, datasets.Image) or (isinstance(each, dict) and {"bytes", "path"} <= set(each))
    ]
    labels = [name for name in _LABELS if name in features]
    labels = labels or [name for name, each in features.items() if isinstance(each, datasets.ClassLabel)]
    if len(images) != 1 or not labels:
        listed = ", ".join(f"{name} ({type(each).__name__})" for name, each in features.items())
        raise ValueError(
            f"{source} must have one column of images and a column label, got {listed}; its rename_column "
            "and save_to_disk make a folder for hf:FOLDER"
        )
    return images[0], labels[0]


@contextlib.contextmanager
def _offline(datasets: Any, wanted: bool) -> Iterator[None]:
    """Keeps `datasets` from the network, as its environment variable HF_HUB_OFFLINE does."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = wanted or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
