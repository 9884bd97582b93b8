"""Image data sets: read, cut to subsets, augmented and loaded."""

from convinit.train.data.augment import AUGMENTATIONS, Augmentation, Augmented, augmentation
from convinit.train.data.in_memory import ImageSplit, batches, load_digits_split, shift_images
from convinit.train.data.loaders import test_loader, train_loader
from convinit.train.data.sources import DATA_SETS, ImageData, load_data
from convinit.train.data.subsets import split_indices

__all__ = [
    "DATA_SETS",
    "AUGMENTATIONS",
    "Augmentation",
    "Augmented",
    "ImageData",
    "ImageSplit",
    "augmentation",
    "batches",
    "load_data",
    "load_digits_split",
    "shift_images",
    "split_indices",
    "test_loader",
    "train_loader",
]
