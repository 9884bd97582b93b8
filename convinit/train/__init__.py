"""Training: data sets and a small loop on Hugging Face Accelerate (extra `train`)."""

from convinit.train.data import ImageSplit, batches, load_digits_split, shift_images
from convinit.train.loop import EpochRecord, accuracy, train

__all__ = [
    "EpochRecord",
    "ImageSplit",
    "accuracy",
    "batches",
    "load_digits_split",
    "shift_images",
    "train",
]
