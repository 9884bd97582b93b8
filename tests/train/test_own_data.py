"""One's own data: folders, .npz, Parquet, any set of torchvision, and data sets made in Python."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data import tree, write_fashion_mnist, write_image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from training import small

from convinit.serve import image_files, load_trained, predict, save_trained
from convinit.train import Augmented, Config, augmentation, load_data, run_training
from convinit.train.config_files import read_toml
from convinit.train.data.measure import SAMPLE

try:
    import torchvision
except ImportError:
    torchvision = None

needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of [n, C, H, W] uint8."""
    share = pixels / 255
    return list(share.mean(axis=(0, 2, 3))), list(share.std(axis=(0, 2, 3)))


def normalised(data, part: str = "test"):
    return Augmented(getattr(data, part), augmentation("none", data))


# ---- What is measured


def grey_folder(root: Path, mode: str = "L", suffix: str = "png", size: tuple[int, int] = (6, 5)) -> None:
    for name in ("ant", "bee"):
        for i in range(5):
            write_image(root / name / f"{i}.{suffix}", size, mode=mode, seed=i)


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("L", "jpg"), ("1", "png"), ("LA", "png")])
def test_grey_images_stay_one_channel(mode, suffix, tmp_path):
    grey_folder(tmp_path, mode, suffix)
    data = load_data("folder", tmp_path)
    assert (data.channels, data.image_size) == (1, (6, 5))
    image, _ = data.train[0]
    assert image.mode == "L"
    pixels = np.stack([np.asarray(data.train[i][0]) for i in range(8)])[:, None]
    mean, std = statistics(pixels)
    assert data.mean == pytest.approx(mean, abs=6e-5) and data.std == pytest.approx(std, abs=6e-5)
    images, _ = normalised(data, "train").batch(range(8))
    assert images.shape == (8, 1, 6, 5)
    assert images.mean().abs() < 1e-3 and abs(images.std(correction=0) - 1) < 1e-3


def test_one_colour_image_makes_three_channels(tmp_path):
    grey_folder(tmp_path)
    write_image(tmp_path / "ant" / "5.png", (6, 5), seed=9)
    write_image(tmp_path / "ant" / "6.png", (6, 5), seed=8)
    data = load_data("folder", tmp_path)
    assert data.channels == 3 and data.train[0][0].mode == data.test[0][0].mode == "RGB"
    pixels = np.stack([np.asarray(data.train[i][0]) for i in range(len(data.train))]).transpose(0, 3, 1, 2)
    mean, std = statistics(pixels)
    assert data.mean == pytest.approx(mean, abs=6e-5) and data.std == pytest.approx(std, abs=6e-5)


def test_given_statistics_decide_the_channels(tmp_path):
    grey_folder(tmp_path)
    data = load_data("folder", tmp_path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert (data.channels, data.mean, data.std) == (3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert data.train[0][0].mode == "RGB"
    half = load_data("folder", tmp_path, mean=[0.5])
    assert half.mean == (0.5,) and half.std == load_data("folder", tmp_path).std
    assert load_data("digits", mean=[0.25], std=[0.5]).mean == (0.25,)
    with pytest.raises(ValueError, match="data.mean and data.std must have 1 numbers for 'digits'"):
        load_data("digits", mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="data.std must have as many numbers as data.mean, 1"):
        load_data("digits", mean=[0.5], std=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="data.mean must be one number for grey or three for RGB"):
        load_data("digits", mean=[0.5, 0.5])


def test_images_that_differ_in_size(tmp_path):
    grey_folder(tmp_path)
    for i in (5, 6):
        write_image(tmp_path / "ant" / f"{i}.png", (6, 9), mode="L")
    with pytest.raises(ValueError, match="image_size must be given, .*'folder' differ in size"):
        augmentation("none", load_data("folder", tmp_path))
    if torchvision is not None:
        data = load_data("folder", tmp_path, image_size=4)
        assert normalised(data).batch([0])[0].shape == (1, 1, 4, 4)


def test_images_of_one_colour(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.full((4, 3, 3), 7, np.uint8), labels=[0, 0, 1, 1])
    data = load_data("npz", tmp_path / "x.npz", test_fraction=0.5)
    assert data.std == (1.0,) and normalised(data).batch([0])[0].abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"data.std must be above 0, got \[0.0\]"):
        load_data("npz", tmp_path / "x.npz", std=[0.0], test_fraction=0.5)
    assert load_data("npz", tmp_path / "x.npz", std=[1.0], test_fraction=0.5).std == (1.0,)


def test_the_sample_is_bounded_and_does_not_depend_on_the_subset(tmp_path):
    pixels, labels = noise(2 * SAMPLE, 2, 2), np.arange(2 * SAMPLE) % 4
    pixels[labels == 3] = 255
    path, few = tmp_path / "x.npz", {"test_images": pixels[:8], "test_labels": labels[:8]}
    np.savez(path, train_images=pixels, train_labels=labels, **few)
    whole, part = load_data("npz", path), load_data("npz", path, train_count=8, seed=3)
    assert (whole.mean, whole.std) == (part.mean, part.std) and len(part.train) == 8
    assert whole.mean[0] == pytest.approx(statistics(pixels[:, None])[0][0], abs=0.02)

    class Counted(Dataset):
        classes, targets = list("abcd"), labels

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            met.append(index)
            return pixels[index], int(labels[index])

    met: list[int] = []
    data = load_data("dataset", dataset=(Counted(), Counted()))
    assert data.mean == whole.mean and len(met) <= SAMPLE + 2 * 32


def test_validation_images_are_not_measured(tmp_path):
    np.savez(tmp_path / "x.npz", images=noise(40, 4, 4), labels=np.arange(40) % 2)
    data = load_data("npz", tmp_path / "x.npz", val_fraction=0.25)
    mean, _ = statistics(data.train.images.numpy())
    assert len(data.val) == 8 and data.mean == pytest.approx(mean, abs=6e-5)


# ---- Folders


@pytest.mark.parametrize(
    "names", [("train", "test"), ("Training", "Testing"), ("train", "valid"), ("TRAIN", "Validation")]
)
def test_folder_of_parts(names, tmp_path):
    for name in names:
        grey_folder(tmp_path / name)
    data = load_data("folder", tmp_path)
    assert data.class_names == ("ant", "bee") and (len(data.train), len(data.test)) == (10, 10)
    assert data.val is None and f"/{names[1]}/" in data.test.paths[0]


def test_folder_with_its_own_validation_images(tmp_path):
    for name in ("train", "val", "test"):
        grey_folder(tmp_path / name)
    data = load_data("folder", tmp_path)
    assert "/val/" in data.val.paths[0] and "/test/" in data.test.paths[0]
    with pytest.raises(ValueError, match="val_fraction must not be set: 'folder' has validation images"):
        load_data("folder", tmp_path, val_fraction=0.1)


def write(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "a folder for each class with its images, got an empty folder"),
        (lambda root: write(root / "labels.csv"), "got 1 file .csv"),
        (lambda root: [write_image(root / f"{i}.png", (2, 2)) for i in range(3)],
         r"got 3 images outside any folder, such as 0.png; move those of each class"),
        (lambda root: write_image(root / "cat" / "0.png", (2, 2)), "of at least 2 classes, got cat/ alone$"),
        (lambda root: grey_folder(root / "photos"),
         r"of at least 2 classes, got photos/ alone; are the classes those of .*/photos\?"),
        (lambda root: [grey_folder(root), (root / "eel").mkdir()],
         "but .*/eel has none that Pillow reads: it is empty"),
        (lambda root: [grey_folder(root), write(root / "eel" / "a.heic"), write(root / "eel" / "b.HEIC"),
                       write(root / "eel" / "notes")],
         "but .*/eel has none that Pillow reads, only 2 files .heic, 1 file without a suffix"),
        (lambda root: [grey_folder(root / "train"), (root / "Training").mkdir(), grey_folder(root / "test")],
         "each once, or else class folders alone, got Training/, train/"),
        (lambda root: [grey_folder(root / "train"), grey_folder(root / "more")],
         r"must hold train/ and test/ or val/, each once, .*got train/$"),
        (lambda root: [grey_folder(root / "test"), grey_folder(root / "val")], "got val/, test/$"),
        (lambda root: [grey_folder(root / "train"), grey_folder(root / "test"),
                       write_image(root / "test" / "Bee" / "0.png", (2, 2))],
         "has test images of the class 'Bee', which is none of the 2 .*; did you mean bee"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data("folder", tmp_path)


# ---- .npz


@pytest.mark.parametrize(
    "names, channels",
    [
        (("train_images", "train_labels", "test_images", "test_labels"), 3),
        (("x_train", "y_train", "x_test", "y_test"), 1),
    ],
)
def test_npz_as_medmnist_and_keras_have_it(names, channels, tmp_path):
    """MedMNIST: labels [n, 1], and validation images; Keras: no axis of channels, labels [n]."""
    colour = (3,) if channels == 3 else ()
    train, test = noise(9, 4, 5, *colour), noise(6, 4, 5, *colour, seed=1)
    labels = np.arange(9, dtype=np.uint8) % 3
    arrays = {names[0]: train, names[2]: test, names[1]: labels, names[3]: labels[:6]}
    if channels == 3:
        arrays |= {name: each[:, None] for name, each in arrays.items() if name.endswith("labels")}
        arrays |= {"val_images": train[:3], "val_labels": labels[:3, None]}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    data = load_data("npz", tmp_path / "x.npz")
    assert (data.channels, data.image_size, data.class_names) == (channels, (4, 5), ("0", "1", "2"))
    expected = train.transpose(0, 3, 1, 2) if channels == 3 else train[:, None]
    assert np.array_equal(data.train.images.numpy(), expected)
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2] and (data.val is None) == (channels == 1)
    mean, std = statistics(expected)
    assert data.mean == pytest.approx(mean, abs=6e-5) and data.std == pytest.approx(std, abs=6e-5)


@pytest.mark.parametrize("scale", [1, 1 / 255, np.int64(1)])
def test_npz_not_split_yet(scale, tmp_path):
    pixels = noise(20, 3, 4, 4) * scale
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array(["cat", "ant"] * 10))
    data = load_data("npz", tmp_path / "x.npz", test_fraction=0.3)
    assert data.class_names == ("ant", "cat") and Counter(data.test.labels.tolist()) == {0: 3, 1: 3}
    assert {tuple(each.flatten().tolist()) for each in data.test.images} < {
        tuple(each.flatten().tolist()) for each in noise(20, 3, 4, 4)
    }


FOUR = {"images": noise(4, 2, 2), "labels": [0, 1, 0, 1]}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": noise(4, 2, 2)}, "it lacks labels; needed are the arrays images and labels"),
        ({"photos": noise(4, 2, 2)}, "cannot be used: it holds photos; needed"),
        ({}, "it holds nothing"),
        (FOUR | {"labels": np.array([0, 1, None, 1], object)}, "Object arrays cannot be loaded"),
        (FOUR | {"labels": [0, 1, 0]}, r"labels in .* each of 4 images, got int64 of shape \[3\]"),
        (FOUR | {"labels": np.eye(4)}, r"got float64 of shape \[4, 4\]"),
        (FOUR | {"labels": [3, 3, 3, 3]}, "at least 2 classes, got '3' alone"),
        (FOUR | {"images": noise(4, 2, 2, 5)}, r"images in .* with C = 1 or 3, got \[4, 2, 2, 5\]"),
        (FOUR | {"images": noise(4, 2, 2) * 3.0}, "from 0 to 255 or floats from 0 to 1, got float64"),
        (FOUR | {"images": noise(4, 2, 2) * np.uint16(257)}, "got uint16 from"),
        (FOUR | {"test_images": noise(1, 2, 2), "test_labels": [7]},
         "has test images of the class 7, which is none of the 2"),
        (FOUR | {"test_images": noise(0, 2, 2), "test_labels": np.zeros(0, int)}, "has no test images"),
        (FOUR | {"test_images": noise(2, 3, 2, 2), "test_labels": [0, 1]}, "must have as many channels"),
    ],
)  # fmt: skip
def test_npz_refuses(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data("npz", tmp_path / "x.npz", test_fraction=0.5)


def test_npz_that_is_no_file_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be the .npz file, but .* is no file"):
        load_data("npz", tmp_path)
    np.savez(tmp_path / "x.npz", images=noise(4, 2, 2), labels=[0, 1, 0, 1])
    whole = (tmp_path / "x.npz").read_bytes()
    for damaged in (b"", whole[:100], b"PK" + bytes(50)):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="x.npz cannot be used: .*; needed are"):
            load_data("npz", tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", noise(4, 2, 2))
    with pytest.raises(ValueError, match="it holds a single array"):
        load_data("npz", tmp_path / "y.npy")


# ---- torchvision


@needs_torchvision
def test_torchvision_set_with_train(tmp_path):
    images = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    before = tree(tmp_path)
    data = load_data("torchvision:FashionMNIST", tmp_path, train_fraction=0.5)
    assert tree(tmp_path) == before
    assert (len(data.train), len(data.test), data.image_size, data.channels) == (15, 12, (28, 28), 1)
    assert data.class_names[9] == "Ankle boot" and data.test.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(np.asarray(data.test[3][0]), images[33]) and data.test[3][0].mode == "L"
    assert data.mean == pytest.approx(statistics(images[:30, None])[0], abs=6e-5)


@needs_torchvision
def test_torchvision_set_that_needs_an_option(tmp_path):
    """EMNIST, whose labels of letters are 1 to 26."""
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 52), ("test", 26)):
        labels = (np.arange(count) % 26 + 1).astype(np.uint8)
        for kind, array in (("images-idx3", noise(count, 28, 28)), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"emnist-letters-{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    with pytest.raises(ValueError, match="data.options must give split for torchvision:EMNIST"):
        load_data("torchvision:EMNIST", tmp_path)
    with pytest.raises(ValueError, match="Unknown value 'leters' for argument split"):
        load_data("torchvision:EMNIST", tmp_path, options={"split": "leters"})
    with pytest.raises(ValueError, match="data.options must be among train, split .*did you mean split"):
        load_data("torchvision:EMNIST", tmp_path, options={"splt": "letters"})
    data = load_data("torchvision:EMNIST", tmp_path, options={"split": "letters"})
    assert data.num_classes == 27 and data.class_names[1] == "a" and data.train[25][1] == 26
    assert "RandomHorizontalFlip" not in str(augmentation("flip-crop", data)._steps)


@needs_torchvision
def test_torchvision_set_in_files_is_read_as_folders_are(tmp_path):
    """DTD: split="train", "val" or "test"; its images are grey here and turned by EXIF."""
    from PIL import Image

    folder = tmp_path / "dtd" / "dtd"
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3, 4, 5))):
        lines = [f"{name}/{name}_{i}.jpg" for name in ("woven", "dotted") for i in numbers]
        write(folder / "labels" / f"{split}1.txt", "\n".join(lines).encode())
        for line in lines:
            path = folder / "images" / line
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(noise(8, 12))
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    data = load_data("torchvision:DTD", tmp_path)
    assert (len(data.train), len(data.test)) == (4, 6) and data.class_names == ("dotted", "woven")
    assert (data.image_size, data.channels) == ((12, 8), 1) and data.test.labels.tolist() == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    part = load_data("torchvision:DTD", tmp_path, options={"split": "test"}, test_fraction=0.3)
    assert (len(part.train), len(part.test)) == (4, 2)


@needs_torchvision
def test_torchvision_set_without_a_split(tmp_path):
    """EuroSAT is one folder of class folders."""
    grey_folder(tmp_path / "eurosat" / "2750", "RGB", "jpg")
    data = load_data("torchvision:EuroSAT", tmp_path)
    assert (len(data.train), len(data.test), data.channels) == (8, 2, 3)
    assert data.class_names == ("ant", "bee") and Counter(data.test.labels.tolist()) == {0: 1, 1: 1}


@needs_torchvision
def test_torchvision_set_whose_test_labels_are_secret(tmp_path):
    folder = tmp_path / "clevr" / "CLEVR_v1.0"
    for split in ("train", "val", "test"):
        for i in range(4):
            write_image(folder / "images" / split / f"{split}_{i}.png", (4, 4), seed=i)
        scenes = [{"image_filename": f"{split}_{i}.png", "objects": [0] * (3 + i % 2)} for i in range(4)]
        write(folder / "scenes" / f"CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}).encode())
    data = load_data("torchvision:CLEVRClassification", tmp_path)
    assert data.class_names == ("3", "4") and data.test.labels.tolist() == [0, 1, 0, 1]


@needs_torchvision
def test_torchvision_refuses(tmp_path, monkeypatch):
    for name, message in (
        (
            "FashionMnist",
            "no such data set in files, got 'torchvision:FashionMnist'; did you mean FashionMNIST",
        ),
        ("FakeData", "no such data set in files"),
        ("datasets", "no such data set in files"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(f"torchvision:{name}", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="torchvision:KMNIST cannot be read from .*download=True fetches"
    ):
        load_data("torchvision:KMNIST", tmp_path)
    monkeypatch.setenv("CONVINIT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="cannot be read from .*cache/data: "):
        load_data("torchvision:KMNIST")
    with pytest.raises(ValueError, match="download must not be set for torchvision:FER2013"):
        load_data("torchvision:FER2013", tmp_path, download=True)


@needs_torchvision
def test_torchvision_downloads_on_request_alone(tmp_path, monkeypatch):
    asked = []

    def fetch(self):
        asked.append(self.root)
        write_fashion_mnist(Path(self.raw_folder))

    monkeypatch.setattr(torchvision.datasets.KMNIST, "download", fetch)
    with pytest.raises(FileNotFoundError):
        load_data("torchvision:KMNIST", tmp_path / "new")
    assert not asked
    assert len(load_data("torchvision:KMNIST", tmp_path / "new", download=True).train) == 30
    assert asked == [str(tmp_path / "new")] * 2

    def fail(self):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.QMNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match="OSError: no network; download=True failed"):
        load_data("torchvision:QMNIST", tmp_path, download=True)


# ---- Hugging Face datasets


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def hf_table(count: int = 6, *, label: str = "label", colour: bool = False) -> tuple[Any, np.ndarray]:
    datasets = pytest.importorskip("datasets")
    images = noise(count, 5, 4, *((3,) if colour else ()))
    columns = {"image": [{"bytes": encoded(each), "path": None} for each in images]}
    columns[label] = [i % 2 for i in range(count)]
    features = {"image": datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), images


@pytest.mark.parametrize("colour", [False, True])
def test_hf_folder_of_parquet(colour, tmp_path):
    table, images = hf_table(colour=colour)
    other, _ = hf_table(4, colour=colour)
    root = tmp_path / "pets" / "data"
    root.mkdir(parents=True)
    table.to_parquet(root / "train-00000-of-00001.parquet")
    other.to_parquet(root / "test-00000-of-00001.parquet")
    data = load_data(f"hf:{tmp_path / 'pets'}", tmp_path / "cache")
    assert (len(data.train), len(data.test), data.class_names) == (6, 4, ("cat", "dog"))
    assert (data.image_size, data.channels) == ((5, 4), 3 if colour else 1)
    assert np.array_equal(np.asarray(data.train[2][0]), images[2]) and data.train[3][1] == 1
    pixels = images.transpose(0, 3, 1, 2) if colour else images[:, None]
    assert data.mean == pytest.approx(statistics(pixels)[0], abs=6e-5)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(normalised(data, "train"), 3, num_workers=workers)
        assert [list(each.shape) for each, _ in loader] == [[3, data.channels, 5, 4]] * 2


def test_hf_parquet_of_another_library(tmp_path):
    """pandas knows no images and no class names: bytes and texts."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    images = noise(10, 3, 3)
    rows = {"img": [{"bytes": encoded(each), "path": "x.png"} for each in images], "label": ["b", "a"] * 5}
    (tmp_path / "t").mkdir()
    pandas.DataFrame(rows).to_parquet(tmp_path / "t" / "all.parquet")
    data = load_data(f"hf:{tmp_path / 't'}", tmp_path / "cache")
    assert data.class_names == ("a", "b") and (len(data.train), len(data.test)) == (8, 2)


def test_hf_saved_to_disk_with_secret_test_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    table, _ = hf_table()
    secret = table.remove_columns("label").add_column("label", [-1] * 6).cast(table.features)
    datasets.DatasetDict(train=table, validation=table.select([0, 1]), test=secret).save_to_disk(
        tmp_path / "d"
    )
    data = load_data(f"hf:{tmp_path / 'd'}")
    assert len(data.test) == 2 and data.val is None
    datasets.DatasetDict(train=table, test=secret).save_to_disk(tmp_path / "e")
    with pytest.raises(ValueError, match="has test images without a label: theirs is -1"):
        load_data(f"hf:{tmp_path / 'e'}")
    datasets.DatasetDict(train=table, validation=table, test=table).save_to_disk(tmp_path / "f")
    assert len(load_data(f"hf:{tmp_path / 'f'}").val) == 6
    table.save_to_disk(tmp_path / "g")
    assert len(load_data(f"hf:{tmp_path / 'g'}", test_fraction=0.5).test) == 3


def test_hf_refuses(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        load_data(f"hf:{tmp_path / 'nowhere'}")
    table, _ = hf_table(label="species")
    table.remove_columns("image").save_to_disk(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"one column of images and a column label, got species \(ClassLabel\)"
    ):
        load_data(f"hf:{tmp_path / 'a'}")
    datasets.DatasetDict(a=table, b=table).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="must have a split train, got a, b"):
        load_data(f"hf:{tmp_path / 'b'}")
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "x.parquet", b"damaged")
    with pytest.raises(ValueError, match="hf:.*/c cannot be read: "):
        load_data(f"hf:{tmp_path / 'c'}", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": b"no image", "path": None}] * 4, "label": [0, 1, 0, 1]}
    damaged = datasets.Dataset.from_dict(rows, features=features)
    damaged.save_to_disk(tmp_path / "d")
    with pytest.raises(OSError, match="row [0-3] of column 'image' cannot be decoded as an image"):
        load_data(f"hf:{tmp_path / 'd'}", test_fraction=0.5)


def test_hf_stays_off_the_network_unless_asked(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load_dataset(path, cache_dir, **options):
        seen.append((datasets.config.HF_HUB_OFFLINE, cache_dir, options))
        return hf_table()[0]

    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(
        FileNotFoundError, match="hf:nobody/nothing is not in the cache .*download=True fetches"
    ):
        load_data("hf:nobody/nothing", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"revision": "v1"}
    for download in (False, True):
        load_data("hf:someone/pets", tmp_path, download=download, options=options, test_fraction=0.5)
    assert seen == [(True, str(tmp_path), options), (before, str(tmp_path), options)]
    assert datasets.config.HF_HUB_OFFLINE == before


def test_without_the_library_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="'hf:x' needs datasets, which is not .*: pip install datasets"):
        load_data("hf:x")


# ---- Data sets made in Python


class Pairs(Dataset):
    """(image, label) by index, and nothing else."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.pairs[index]


def kinds() -> dict[str, Any]:
    from PIL import Image

    grey, colour = noise(4, 6, 5), noise(4, 6, 5, 3)
    return {
        "PIL": [Image.fromarray(each) for each in grey],
        "array [H, W]": list(grey),
        "tensor [H, W]": list(torch.from_numpy(grey)),
        "tensor [1, H, W]": list(torch.from_numpy(grey).unsqueeze(1)),
        "ToTensor": list(torch.from_numpy(grey).unsqueeze(1) / 255),
        "PIL RGB": [Image.fromarray(each) for each in colour],
        "array [H, W, C]": list(colour),
        "tensor [C, H, W]": list(torch.from_numpy(colour).permute(0, 3, 1, 2)),
        "float64": list(torch.from_numpy(colour).permute(0, 3, 1, 2).double() / 255),
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [np.int64(0), torch.tensor(1), np.array([0]), True]])
def test_images_of_every_kind(kind, labels):
    pairs = Pairs(list(zip(kinds()[kind], labels, strict=True)))
    data = load_data("dataset", dataset=(pairs, pairs))
    channels = 3 if "C" in kind or "RGB" in kind or kind == "float64" else 1
    assert (data.channels, data.image_size, data.train.labels.tolist()) == (channels, (6, 5), [0, 1, 0, 1])
    expected = noise(4, 6, 5, 3).transpose(0, 3, 1, 2) if channels == 3 else noise(4, 6, 5)[:, None]
    mean, std = statistics(expected)
    assert data.mean == pytest.approx(mean, abs=6e-5)
    images, found = normalised(data).batch(range(4))
    shape = (1, -1, 1, 1)
    wanted = (expected / 255 - np.reshape(data.mean, shape)) / np.reshape(data.std, shape)
    np.testing.assert_allclose(images, wanted, atol=1e-5)
    assert found.tolist() == [0, 1, 0, 1]


def test_paths_are_read_as_files_in_folders_are(tmp_path):
    grey_folder(tmp_path)
    paths = sorted(tmp_path.rglob("*.png"))
    pairs = Pairs([(path, path.parent.name) for path in paths])
    data, folder = load_data("dataset", dataset=pairs), load_data("folder", tmp_path)
    assert (data.class_names, data.mean, data.std) == (folder.class_names, folder.mean, folder.std)
    assert data.test.labels.tolist() == folder.test.labels.tolist()


def test_labels_and_names_come_from_where_torchvision_has_them():
    pixels = noise(12, 3, 3)

    class Listed(Pairs):
        classes = ["zero", "one", "two"]

        def __init__(self, targets):
            super().__init__([(pixels[i], i % 3) for i in range(12)])
            self.targets = targets

    right = Listed([i % 3 for i in range(12)])
    for dataset in (right, Subset(right, range(11, -1, -1)), ConcatDataset([right, right])):
        data = load_data("dataset", dataset=(dataset, right))
        assert data.class_names == ("zero", "one", "two")
        assert [data.train[i][1] for i in range(len(dataset))] == [dataset[i][1] for i in range(len(dataset))]
    # A list that says something else than the items do is not believed.
    for wrong in ([0] * 12, ["a"] * 12, [0, 1], [[0, 1], [2]] * 6):
        assert load_data("dataset", dataset=(Listed(wrong), right)).train.labels.tolist() == [0, 1, 2] * 4
    images, labels = torch.from_numpy(pixels).unsqueeze(1), torch.arange(12) % 3 + 5
    data = load_data("dataset", dataset=TensorDataset(images, labels), test_fraction=0.25)
    assert data.class_names == ("5", "6", "7") and (len(data.train), len(data.test)) == (9, 3)


def test_transforms_of_their_own_draw_as_the_run_says():
    class Shaky(Pairs):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return torch.rand(1, 3, 3) * random.random() * np.random.rand(), label

    pairs = Shaky([(None, i % 2) for i in range(8)])
    first, again = (load_data("dataset", dataset=(pairs, pairs)) for _ in range(2))
    assert first.mean == again.mean
    sets = [Augmented(each.train, augmentation("none", each), seed=3) for each in (first, again)]
    state = torch.get_rng_state()
    images = [torch.stack([each[i][0] for i in range(8)]) for each in sets]
    assert torch.equal(*images) and torch.equal(torch.get_rng_state(), state)
    sets[0].set_epoch(1)
    assert not torch.equal(sets[0][0][0], sets[1][0][0])


def two(image: Any) -> Pairs:
    return Pairs([(image, 0), (image, 1)])


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        (3, TypeError, "the train part of dataset must be a map-style data set, .* got int"),
        ({"train": 1, "test": 2}, TypeError, "must be a map-style data set, .* got dict"),
        (iter([]), TypeError, "must be a map-style data set"),
        ((Pairs([]), Pairs([])), ValueError, "dataset has no training images"),
        ((Pairs([]),) * 3, TypeError, "dataset must be a pair of data sets, .*, got 3"),
        (Pairs([(noise(2, 2), 0, 1)]), TypeError, r"must be pairs \(image, label\), got 3 things"),
        (Pairs([{"image": 1, "label": 2}]), TypeError, r"must be pairs \(image, label\), got dict"),
        (Pairs([(noise(2, 2), 0.5)]), TypeError, "labels of .* must be whole numbers or texts, got 0.5"),
        (Pairs([(noise(2, 2), np.eye(3)[0])]), TypeError, "must be whole numbers or texts, got array"),
        (Pairs([(noise(2, 2), 0), (noise(2, 2), "a")]), ValueError, "all numbers or all texts, got both"),
        (Pairs([(noise(2, 2), 1)] * 3), ValueError, "at least 2 classes, got '1' alone"),
        ((two(noise(2, 2)), Pairs([(noise(2, 2), 4)])), ValueError,
         "has test images of the class 4, which is none of the 2"),
        ((two("x"),) * 2, OSError, "x is missing"),
        ((two(object()),) * 2, TypeError, "an image must be a PIL image, .* got object"),
        ((two(noise(2, 2, 2)),) * 2, ValueError, r"with C = 1 or 3, got \[2, 2, 2\]"),
        ((two(torch.randn(1, 9, 9)),) * 2, ValueError,
         "float pixels must lie in 0 to 1, .*leave normalisation to data.mean and data.std"),
        ((two(torch.ones(1, 2, 2).long()),) * 2, ValueError, "must be uint8, .*int64"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_data_set(dataset, error, message):
    with pytest.raises(error, match=message):
        load_data("dataset", dataset=dataset)


def test_dataset_is_for_python_alone():
    for name, dataset in (("dataset", None), ("digits", Pairs([]))):
        with pytest.raises(ValueError, match="data.name is 'dataset' where the data are given from Python"):
            load_data(name, dataset=dataset)


# ---- The name


@pytest.mark.parametrize(
    "name, message",
    [
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("FashionMNIST", "did you mean fashion-mnist"),
        ("CIFAR10", "did you mean cifar10"),
        ("torchvison:FashionMNIST", "did you mean torchvision:FashionMNIST"),
        ("torchvision:", "did you mean torchvision:NAME"),
        ("./photos", "for images of your own it is folder or npz, with their path as data.root"),
    ],
)
def test_near_misses_of_the_name(name, message):
    expected = rf"^data.name must be one of cifar10, .*hf:NAME, got '{name}'; {message}"
    for call in (lambda: load_data(name), lambda: Config.of({"data": {"name": name}})):
        with pytest.raises(ValueError, match=expected):
            call()


def test_the_config_takes_the_new_settings():
    data = {"name": "torchvision:EMNIST", "options": {"split": "letters"}, "mean": [0.5], "std": 0.25}
    config = Config.of({"data": data})
    assert (config.data.mean, config.data.std) == ((0.5,), (0.25,))
    with pytest.raises(ValueError, match="data.options must not be set for 'digits'"):
        Config.of({"data": {"name": "digits", "options": {"split": "letters"}}})


# ---- Runs


def tiny(**changes: Any) -> Config:
    settings = {"model__dim": 16, "recipe__epochs": 2, "recipe__batch_size": 8, "recipe__ema": "none"}
    return small(**{**settings, "data__train_count": "none", "run__checkpoint_steps": "none"} | changes)


def squares(count: int, seed: int = 0, side: int = 6) -> Pairs:
    """Grey images, dark or bright."""
    pixels = noise(count, side, side, seed=seed) // 2
    return Pairs([(pixels[i] + np.uint8(128 * (i % 2)), i % 2) for i in range(count)])


def test_run_on_a_data_set_from_python(tmp_path):
    train, test = squares(24), squares(9, seed=1)
    result = run_training(tiny(), tmp_path / "run", dataset=(train, test))
    assert result.figures["top1"] == 1.0
    saved = (result.checkpoint / "config.toml").read_text()
    assert 'name = "dataset"' in saved
    images = json.loads((result.checkpoint / "progress.json").read_text())["images"]
    data = load_data("dataset", dataset=(train, test))
    assert (images["image_size"], images["class_names"]) == ([6, 6], ["0", "1"])
    assert (tuple(images["mean"]), tuple(images["std"])) == (data.mean, data.std)
    with pytest.raises(ValueError, match="data.name is 'dataset' where the data are given from Python"):
        run_training(Config.of(read_toml(result.checkpoint / "config.toml")), tmp_path / "other")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda image, label: (image, 1 - label), "order of the labels differ"),
        (lambda image, label: (image[1:], label), "classes, image size or the order of the labels differ"),
        (lambda image, label: (image, "ab"[label]), "classes, image size"),
        (lambda image, label: (image // 2, label), r"whose mean is \[0\.4"),
    ],
)
def test_a_run_is_not_gone_on_with_on_other_data(change, message, tmp_path):
    dataset = squares(24), squares(9, seed=1)
    first = run_training(tiny(), tmp_path, dataset=dataset)
    again = run_training(tiny(), tmp_path, dataset=dataset)
    assert (again.steps, again.checkpoint) == (0, first.checkpoint)
    other = tuple(Pairs([change(*pair) for pair in part.pairs]) for part in dataset)
    with pytest.raises(ValueError, match=f"the data must be those of .*step-.*{message}"):
        run_training(tiny(), tmp_path, dataset=other)


def test_a_run_is_not_gone_on_with_on_named_data(tmp_path):
    run_training(tiny(), tmp_path, dataset=squares(24))
    with pytest.raises(ValueError, match="data.name: digits, not dataset"):
        run_training(tiny(), tmp_path)


def test_predictions_of_a_run_on_grey_files(tmp_path):
    """As `convinit predict` reads them, normalised by what was measured."""
    from PIL import Image

    for i, (pixels, label) in enumerate(squares(40).pairs):
        path = tmp_path / "photos" / ("dark", "bright")[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    config = tiny(data__name="folder", data__root=str(tmp_path / "photos"))
    result = run_training(config, tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    data = load_data("folder", tmp_path / "photos")
    assert (trained.images.channels, trained.images.mean, trained.images.std) == (1, data.mean, data.std)
    files, _ = image_files([tmp_path / "photos"])
    found = list(predict(trained, files, device="cpu"))
    assert result.figures["top1"] == 1.0
    assert all(each.classes[0] == Path(each.path).parent.name for each in found) and len(found) == 40
    images, _ = normalised(data).batch(range(8))
    with torch.no_grad():
        logits = trained.network(images)
    by_path = {each.path: each.probabilities[each.indices.index(0)] for each in found}
    expected = [by_path[path] for path in data.test.paths]
    torch.testing.assert_close(logits.softmax(1)[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    save_trained(trained, tmp_path / "exported")
    assert load_trained(tmp_path / "exported").images == trained.images
