"""The public names of convinit.train, all at once."""

from convinit.train.config import Config
from convinit.train.data import (
    Augmented,
    ImageData,
    ImageSplit,
    augmentation,
    batches,
    load_data,
    load_digits_split,
    shift_images,
    test_loader,
    train_loader,
)
from convinit.train.run import Result, RunInterrupted, Watcher, run_training

__all__ = [
    "Augmented",
    "Config",
    "ImageData",
    "ImageSplit",
    "Result",
    "RunInterrupted",
    "Watcher",
    "augmentation",
    "batches",
    "load_data",
    "load_digits_split",
    "run_training",
    "shift_images",
    "test_loader",
    "train_loader",
]
