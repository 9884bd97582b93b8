"""Training: data sets and a small loop on Hugging Face Accelerate (extra `train`)."""

from convinit.train.data import (
    Augmented,
    AugmentOptions,
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
from convinit.train.loop import EpochRecord, accuracy, train

__all__ = [
    "AugmentOptions",
    "Augmented",
    "EpochRecord",
    "ImageData",
    "ImageSplit",
    "accuracy",
    "augmentation",
    "batches",
    "load_data",
    "load_digits_split",
    "shift_images",
    "test_loader",
    "train",
    "train_loader",
]
