from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cifar_files import md5, pixels, write_cifar10, write_pickle

from convinit.serve import image_files
from convinit.train import (
    Augmented,
    augmentation,
    load_data,
    load_digits_split,
    test_loader,
    train_loader,
)
from convinit.train.config import Config
from convinit.train.data import split_indices
from convinit.train.data.augment import _to_pil, resize_and_crop
from convinit.train.data.draws import derived_seed, permutation
from convinit.train.data.images import decode, read_image

try:
    import torchvision
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN
except ImportError:
    torchvision = None

needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")


# ---- Draws and subsets


def test_draws_are_the_same_on_every_machine():
    """Fixed values: a change would change every subset and every order."""
    assert derived_seed("augment", 0, 1, 2) == 17935655439119338817
    assert permutation(8, "order", 0, 0).tolist() == [2, 5, 7, 6, 4, 1, 0, 3]
    assert sorted(permutation(1000, "order", 1)) == list(range(1000))
    assert derived_seed("a", np.int64(3)) == derived_seed("a", 3)


@pytest.mark.parametrize("sizes", [[50] * 10, [100, 40, 7, 1], [3]])
def test_subsets_are_nested_and_stratified(sizes):
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)))
    n, sizes = len(labels), np.array(sizes)
    smaller: set[int] = set()
    for count in range(1, n + 1):
        indices, _ = split_indices(labels, count=count, seed=3)
        assert len(set(indices)) == count and (np.diff(indices) > 0).all()
        assert smaller < set(indices)
        smaller = set(indices)
        taken = np.bincount(labels[indices], minlength=len(sizes))
        assert count < len(sizes) or taken.min() >= 1
        assert (np.abs(taken - count * sizes / n) < len(sizes)).all()
        if len(set(sizes)) == 1:
            assert taken.max() - taken.min() <= 1
    assert split_indices(labels)[0].tolist() == list(range(n))


def test_subsets_follow_the_seed():
    labels = torch.arange(100) % 10
    chosen = [split_indices(labels, fraction=0.3, seed=seed)[0].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 30


@pytest.mark.parametrize("sizes", [[50] * 10, [100, 40, 7, 3]])
def test_validation_images_are_stratified_and_leave_the_training_images(sizes):
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)))
    n, sizes = len(labels), np.array(sizes)
    train, val = split_indices(labels, val_fraction=0.2, seed=3)
    assert len(val) == round(0.2 * n) and (np.diff(val) > 0).all()
    assert sorted([*train, *val]) == list(range(n))
    assert (np.abs(np.bincount(labels[val], minlength=len(sizes)) - 0.2 * sizes) < len(sizes)).all()
    # Few training images are the same with and without validation.
    for count in (1, len(train) // 2, len(train)):
        some, same_val = split_indices(labels, count=count, val_fraction=0.2, seed=3)
        assert some.tolist() == split_indices(labels, count=count, seed=3)[0].tolist()
        assert same_val.tolist() == val.tolist() and not set(some) & set(val)
    assert len(split_indices(labels, fraction=1.0, val_fraction=0.2)[0]) == len(train)


def test_subset_refuses():
    labels = torch.arange(10)
    with pytest.raises(ValueError, match="not both, got 3 and 0.5"):
        split_indices(labels, count=3, fraction=0.5)
    with pytest.raises(ValueError, match="train_count must be at most 10"):
        split_indices(labels, count=11)
    with pytest.raises(ValueError, match="train_count must be at least 1"):
        split_indices(labels, count=0)
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="train_fraction must be (above 0 and at most 1|finite)"):
            split_indices(labels, fraction=bad)
    with pytest.raises(TypeError, match="train_fraction must be a number"):
        split_indices(labels, fraction="0.5")
    with pytest.raises(
        ValueError, match="train_count must be at most 8, .* got 9; 2 of 10 are for validation"
    ):
        split_indices(labels, count=9, val_fraction=0.2)
    with pytest.raises(ValueError, match="val_fraction must leave images to train on, got 1.0 of 10"):
        split_indices(labels, val_fraction=1.0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        split_indices(labels, count=1, seed=-1)


# ---- Digits


def test_digits():
    data = load_data("digits", train_fraction=0.1, seed=2)
    assert (data.num_classes, data.image_size, data.channels, data.mean) == (10, (8, 8), 1, (0.0,))
    assert (len(data.train), len(data.test)) == (100, 797)
    image, label = data.train[0]
    assert image.dtype == torch.uint8 and image.shape == (1, 8, 8) and isinstance(label, int)
    split = load_digits_split()
    normal = Augmented(data.test, augmentation("none", data))
    images, labels = normal.batch(range(797))
    assert data.std == pytest.approx([split.train_images.double().std(correction=0).item()])
    torch.testing.assert_close(
        images, split.test_images / data.std[0], rtol=0, atol=0.5 / 255 / data.std[0] + 1e-6
    )
    assert torch.equal(labels, split.test_labels)
    assert torch.equal(images, torch.stack([normal[i][0] for i in range(797)]))
    assert (images[split.test_images == 0] == 0).all()


def test_load_data_refuses(tmp_path):
    with pytest.raises(ValueError, match="data.name must be one of cifar10, .*got 'mnist'"):
        load_data("mnist")
    with pytest.raises(ValueError, match="root must be where the data set 'folder' lies, got None"):
        load_data("folder")
    with pytest.raises(FileNotFoundError, match="root must be the folder .*nowhere is no folder"):
        load_data("svhn", tmp_path / "nowhere")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="photos.zip is a file, perhaps an archive to unpack"):
        load_data("folder", tmp_path / "photos.zip")
    with pytest.raises(ValueError, match="download=True is for the data sets of torchvision"):
        load_data("tiny-imagenet", tmp_path, download=True)
    with pytest.raises(ValueError, match=r"image_size must be a side or \(H, W\)"):
        load_data("digits", image_size=(1, 2, 3))


# ---- CIFAR and SVHN


@needs_torchvision
def test_cifar10(tmp_path, monkeypatch):
    images = write_cifar10(tmp_path, monkeypatch)
    data = load_data("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.image_size, data.channels) == (50, 10, (32, 32), 3)
    assert data.class_names[0] == "airplane" and data.num_classes == 10
    got = torch.stack([data.train[i][0] for i in range(50)] + [data.test[i][0] for i in range(10)])
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), images)
    assert [data.train[i][1] for i in range(50)] == [j % 10 for _ in range(5) for j in range(10)]
    normal, _ = Augmented(data.test, augmentation("none", data)).batch([3])
    mean, std = (np.array(x).reshape(3, 1, 1) for x in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
    np.testing.assert_allclose(normal[0].numpy(), (images[53] / 255 - mean) / std, atol=1e-5)
    subset = load_data("cifar10", str(tmp_path), train_count=20)
    assert Counter(subset.train.labels.tolist()) == dict.fromkeys(range(10), 2)


@needs_torchvision
def test_cifar100(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = pixels(200)
    for name, part in (("train", images[:100]), ("test", images[100:])):
        entry = {b"filenames": [b"x"] * 100, b"batch_label": name.encode(), b"fine_labels": list(range(100))}
        entry |= {b"coarse_labels": [0] * 100, b"data": part.reshape(100, -1)}
        write_pickle(folder / name, entry)
        monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, md5(folder / name)]])
    meta = {b"fine_label_names": [f"class{i}".encode() for i in range(100)], b"coarse_label_names": []}
    write_pickle(folder / "meta", meta)
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    data = load_data("cifar100", tmp_path)
    assert data.num_classes == 100 and data.class_names[7] == "class7"
    assert np.array_equal(data.test[5][0].numpy(), images[105]) and data.test[5][1] == 5


@needs_torchvision
def test_cifar_errors_name_the_file(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=r"data_batch_3 is damaged.*MD5.*cifar-10-python.tar.gz.*download=True"
    ):
        load_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is missing; .*cifar-10-python.tar.gz"):
        load_data("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "url", "http://localhost:9/cifar-10-python.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is missing; .*download=True failed with"):
        load_data("cifar10", tmp_path, download=True)
    path.write_bytes(whole)
    (path.parent / "batches.meta").write_bytes(b"")
    with pytest.raises(ValueError, match="batches.meta is damaged"):
        load_data("cifar10", tmp_path)


@needs_torchvision
def test_cifar_labels_of_the_wrong_number(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch, labels_short=1)
    with pytest.raises(ValueError, match="got 50 images and 45 labels"):
        load_data("cifar10", tmp_path)


def write_svhn(root: Path, monkeypatch, labels: int = 12) -> np.ndarray:
    from scipy.io import savemat

    images = pixels(12)
    splits = {}
    for split in ("train", "test"):
        path = root / f"{split}_32x32.mat"
        y = np.arange(1, labels + 1)[:, None].clip(max=10).astype(np.uint8)  # 10 stands for the digit 0
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": y})
        splits[split] = [f"http://localhost:9/{path.name}", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", splits)
    return images


@needs_torchvision
def test_svhn(tmp_path, monkeypatch):
    images = write_svhn(tmp_path, monkeypatch)
    data = load_data("svhn", tmp_path)
    assert np.array_equal(data.train.images.numpy(), images)
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert data.mean == (0.4377, 0.4438, 0.4728) and data.image_size == (32, 32)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_32x32.mat is missing; .*download=True"):
        load_data("svhn", tmp_path)


@needs_torchvision
def test_svhn_labels_of_the_wrong_number(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch, labels=11)
    with pytest.raises(ValueError, match=r"train_32x32.mat must hold a label for each image, got 12 .* 11"):
        load_data("svhn", tmp_path)


# ---- STL-10, and data sets in files


@needs_torchvision
def test_stl10(tmp_path, monkeypatch):
    """stl10_binary/: uint8 images [n, 3, 96, 96], column by column, labels from 1, names in a text file."""
    STL10 = torchvision.datasets.STL10
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    for name, part in (("train", images[:4]), ("test", images[4:]), ("unlabeled", images[:0])):
        part.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        (np.arange(len(part), dtype=np.uint8) + 1).tofile(folder / f"{name}_y.bin")
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    for listed in ("train_list", "test_list"):
        files = [[file, md5(folder / file)] for file, _ in getattr(STL10, listed)]
        monkeypatch.setattr(STL10, listed, files)
    data = load_data("stl10", tmp_path)
    assert np.array_equal(data.train.images.numpy(), images[:4]) and data.test.labels.tolist() == [0, 1]
    assert (data.image_size, data.channels, data.num_classes) == ((96, 96), 3, 10)
    assert data.class_names == tuple(names) and data.mean == (0.485, 0.456, 0.406)
    (folder / "test_y.bin").write_bytes(b"\x01")
    with pytest.raises(ValueError, match="test_y.bin is damaged or incomplete"):
        load_data("stl10", tmp_path)


def write_food101(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        listed = {name: [f"{name}/{split}{i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for path in sum(listed.values(), []):
            write_image(folder / "images" / f"{path}.jpg", (50, 40))


def write_flowers102(root: Path, monkeypatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / "flowers-102"
    for i in range(1, 11):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", (40, 50))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 102, 4, 5, 1, 2, 102, 4, 5]])})
    sets = {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[8, 7, 9, 10]]}
    savemat(folder / "setid.mat", {name: np.array(ids) for name, ids in sets.items()})
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    listed = {key: (name, md5(folder / name)) for key, name in names.items()}
    cls = torchvision.datasets.Flowers102
    monkeypatch.setattr(cls, "_file_dict", {**cls._file_dict, **listed})


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    pets = (("Abyssinian", 1, 1), ("american_bulldog", 2, 2), ("Bengal", 3, 1))
    for split, numbers in (("trainval", (100, 101)), ("test", (1,))):
        lines = [f"{name}_{i} {label} {kind} 1\n" for name, label, kind in pets for i in numbers]
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
        for line in lines:
            write_image(folder / "images" / f"{line.split()[0]}.jpg", (60, 45))


@needs_torchvision
@pytest.mark.parametrize(
    "name, classes, train, test, last",
    [
        ("food101", 2, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1], "waffles/test1.jpg"),
        ("flowers102", 102, [0, 1, 101, 3], [101, 1, 3, 4], "image_00010.jpg"),
        ("pets", 3, [0, 0, 1, 1, 2, 2], [0, 1, 2], "Bengal_1.jpg"),
    ],
)
def test_data_sets_in_files(name, classes, train, test, last, tmp_path, monkeypatch):
    if name == "flowers102":
        write_flowers102(tmp_path, monkeypatch)
    else:
        {"food101": write_food101, "pets": write_pets}[name](tmp_path)
    data = load_data(name, tmp_path)
    assert (data.num_classes, len(data.class_names), data.channels) == (classes, classes, 3)
    assert data.train.labels.tolist() == train and data.test.labels.tolist() == test
    assert data.test.paths[-1].endswith(last) and data.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="image_size must be given, .* differ in size"):
        augmentation("none", data)
    data = load_data(name, tmp_path, image_size=32)
    assert Augmented(data.train, augmentation("none", data)).batch([0, 1])[0].shape == (2, 3, 32, 32)
    Path(data.test.paths[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{last} is missing; needed is "):
        load_data(name, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="needed is .*download=True"):
        load_data(name, tmp_path / "food-101" if name == "food101" else Path(data.test.paths[0]).parent)


# ---- Fashion-MNIST


def write_fashion_mnist(root: Path, suffix: str = "", counts: tuple[int, int] = (30, 12)) -> np.ndarray:
    """Its four idx files, small."""
    root.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (sum(counts), 28, 28), dtype=np.uint8)
    parts = {"train": images[: counts[0]], "t10k": images[counts[0] :]}
    for part, own in parts.items():
        labels = np.arange(len(own), dtype=np.uint8) % 10
        for kind, array in (("images-idx3", own), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            content = header + array.tobytes()
            path = root / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist(place, suffix, tmp_path):
    images = write_fashion_mnist(tmp_path / place, suffix)
    before = tree(tmp_path)
    data = load_data("fashion-mnist", tmp_path, train_fraction=0.5)
    assert tree(tmp_path) == before
    assert (len(data.train), len(data.test), data.image_size, data.channels) == (15, 12, (28, 28), 1)
    assert data.class_names[9] == "Ankle boot" and data.num_classes == 10
    assert np.array_equal(data.test.images[:, 0].numpy(), images[30:])
    assert data.test.labels.tolist() == [*range(10), 0, 1]
    image, label = load_data("fashion-mnist", tmp_path).train[13]
    assert image.shape == (1, 28, 28) and np.array_equal(image[0].numpy(), images[13]) and label == 3


@needs_torchvision
def test_fashion_mnist_is_read_as_torchvision_reads_it(tmp_path):
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    theirs, ours = (
        torchvision.datasets.FashionMNIST(tmp_path, train=False),
        load_data("fashion-mnist", tmp_path),
    )
    assert torch.equal(theirs.data, ours.test.images[:, 0]) and torch.equal(theirs.targets, ours.test.labels)
    assert tuple(theirs.classes) == ours.class_names


def test_fashion_mnist_damaged(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no Fashion-MNIST; needed are .*dataset-fashion-mnist"):
        load_data("fashion-mnist", tmp_path)
    monkeypatch.setattr("convinit.train.data.sources.USUAL", tmp_path / "nowhere")
    monkeypatch.setenv("CONVINIT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="cache/data has no Fashion-MNIST"):
        load_data("fashion-mnist")
    for suffix in ("", ".gz"):
        root = tmp_path / f"x{suffix}"
        write_fashion_mnist(root, suffix)
        for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            path = root / f"{name}{suffix}"
            content = path.read_bytes()
            for damaged in (content[:-9], b"", content[:7], b"\0" * 50, content[:30] + b"x" + content[31:-1]):
                path.write_bytes(damaged)
                with pytest.raises(
                    ValueError, match=f"{name}.*(is damaged|cannot be read|is no idx file).*needed"
                ):
                    load_data("fashion-mnist", root)
            path.unlink()
            with pytest.raises(FileNotFoundError, match="needed are the files"):
                load_data("fashion-mnist", root)
            path.write_bytes(content)
        load_data("fashion-mnist", root)


# ---- Folders


def write_image(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def tiny(tmp_path) -> Path:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n02124075", "n01443537", "n04067472"]
    for k, wnid in enumerate(wnids):
        names = [f"{wnid}_{i}.JPEG" for i in range(4)]
        for i, name in enumerate(names):
            write_image(root / "train" / wnid / "images" / name, mode="L" if i == 1 else "RGB", seed=k)
        rows = "".join(f"{name}\t0\t10\t63\t58\n" for name in names)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(rows)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    words = ["n00001740\tentity", "n01443537\tgoldfish, Carassius auratus", "n02124075\tEgyptian cat"]
    (root / "words.txt").write_text("\n".join([*words, "n04067472\treel"]))
    for i in range(5):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", seed=i)
    rows = "".join(f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t32\t44\t62\n" for i in range(5))
    (root / "val" / "val_annotations.txt").write_text(rows)
    return root


def tree(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


def test_tiny_imagenet(tiny):
    (tiny / "train" / ".DS_Store").write_bytes(b"")
    before = tree(tiny)
    data = load_data("tiny-imagenet", tiny)
    assert data.class_names == ("goldfish, Carassius auratus", "Egyptian cat", "reel")
    assert (len(data.train), len(data.test), data.image_size) == (12, 5, (64, 64))
    assert data.test.labels.tolist() == [1, 0, 2, 1, 0]
    assert [path.split(os.sep)[-1] for path in data.test.paths] == [f"val_{i}.JPEG" for i in range(5)]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image, label = data.train[1]  # stored as grey
    assert image.mode == "RGB" and image.size == (64, 64) and label == 0
    assert augmentation("none", data)(image).shape == (3, 64, 64)
    assert len(load_data("tiny-imagenet", tiny.parent, train_fraction=0.5).train) == 6
    assert tree(tiny) == before


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda root: (root / "wnids.txt").unlink(), FileNotFoundError, "wnids.txt cannot be read"),
        (
            lambda root: (root / "words.txt").write_text("n1\tx"),
            ValueError,
            "words.txt has no line for n01443537",
        ),
        (
            lambda root: (root / "train" / "n04067472" / "images" / "n04067472_2.JPEG").unlink(),
            FileNotFoundError,
            r"n04067472_2.JPEG is missing, one of 1 named in .*n04067472_boxes.txt.*tiny-imagenet-200.zip",
        ),
        (
            lambda root: (root / "train" / "n04067472" / "n04067472_boxes.txt").write_text(""),
            ValueError,
            "n04067472_boxes.txt names no images",
        ),
        (lambda root: (root / "train" / "n9").mkdir(), ValueError, "n9 is not a class of wnids.txt"),
        (
            lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(),
            FileNotFoundError,
            "val_3.JPEG is missing, one of 1 named in .*val_annotations.txt",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn7\t0\t0\t1\t1\n"),
            ValueError,
            "val_annotations.txt gives val_0.JPEG the class n7",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\n"),
            ValueError,
            "val_annotations.txt must have 6 columns, got 1 in line 1",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text(
                "val_0.JPEG\tn02124075\t0\t0\t1\t1\n"
            ),
            ValueError,
            "val_1.JPEG is not named in .*val_annotations.txt, one of 4",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").unlink(),
            FileNotFoundError,
            "val_annotations.txt",
        ),
    ],
)
def test_tiny_imagenet_errors(tiny, damage, error, message):
    damage(tiny)
    with pytest.raises(error, match=message):
        load_data("tiny-imagenet", tiny)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_undecodable_image_is_named(tiny, content, num_workers):
    data = load_data("tiny-imagenet", tiny)
    path = Path(data.train.paths[6])
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    loader = train_loader(
        Augmented(data.train, augmentation("none", data)), 4, seed=0, epoch=0, num_workers=num_workers
    )
    with pytest.raises(OSError, match=f"{path.name} cannot be decoded as an image"):
        list(loader)


@needs_torchvision
def test_folder_with_train_and_val(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}.png", (40 + 9 * i, 30), seed=i)
    data = load_data("folder", tmp_path)
    expected = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == expected.samples
    assert data.class_names == ("ant", "bee", "cat") and data.image_size is None and len(data.test) == 6
    with pytest.raises(ValueError, match="image_size must be given, .* differ in size"):
        augmentation("none", data)
    data = load_data("folder", tmp_path, image_size=(16, 24))
    for name in ("none", "flip-crop", "paper", "timm"):
        assert Augmented(data.train, augmentation(name, data)).batch([0, 1, 2])[0].shape == (3, 3, 16, 24)

    write_image(tmp_path / "val" / "dog" / "0.png")
    with pytest.raises(ValueError, match="has validation images of the class 'dog', which is none of the 3"):
        load_data("folder", tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train must hold a folder for each class .*eel"):
        load_data("folder", tmp_path)


@needs_torchvision
def test_folder_split_by_seed(tmp_path):
    for name in ("ant", "bee"):
        for i in range(10):
            write_image(tmp_path / name / f"{i}.png", (4, 4), seed=i)
    data = load_data("folder", tmp_path, test_fraction=0.3)
    assert Counter(data.test.labels.tolist()) == {0: 3, 1: 3} and len(data.train) == 14
    assert not set(data.train.paths) & set(data.test.paths)
    other = load_data("folder", tmp_path, test_fraction=0.3, seed=5, train_count=6)
    assert other.test.paths == data.test.paths and set(other.train.paths) < set(data.train.paths)
    assert load_data("folder", tmp_path, test_fraction=0.3, split_seed=1).test.paths != data.test.paths
    write_image(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match="'cat' has 1 images, .* leaves 0 to train on and 1 to test on"):
        load_data("folder", tmp_path)


@needs_torchvision
def test_folder_refuses(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="must hold a folder for each class"):
        load_data("folder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and test/ or val/, .*got train/"):
        load_data("folder", tmp_path)
    # A folder that may not be read; real permissions do not bind root.
    monkeypatch.setattr(
        os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path))
    )
    (tmp_path / "val").mkdir()
    with pytest.raises(OSError, match="cannot be listed: denied"):
        load_data("folder", tmp_path)


def test_hidden_folders_and_files_are_no_data(tmp_path):
    """What Jupyter, macOS, zip and NAS leave behind; training and prediction see the same files."""
    for name in ("ant", "bee"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png")
        write_image(tmp_path / name / "deep" / "er" / "0.gif")
    expected = load_data("folder", tmp_path)
    for stray in (
        ".ipynb_checkpoints/0.png", "ant/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/ant/._0.png",
        "bee/._0.png", "ant/.DS_Store", "ant/@eaDir/0.png", "bee/.0.png.part",
    ):  # fmt: skip
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_bytes(b"\0\5\26\7" + bytes(100))
    (tmp_path / ".git").mkdir()
    data = load_data("folder", tmp_path)
    assert data.class_names == ("ant", "bee")
    assert (data.train.paths, data.test.paths) == (expected.train.paths, expected.test.paths)
    files, failed = image_files([tmp_path])
    assert (sorted(files), failed) == (sorted(data.train.paths + data.test.paths), [])


# ---- Reading images

GREY = np.linspace(0, 255, 60).round().astype(np.uint8).reshape(6, 10)  # [H, W]


def grey(dtype: str, scale: float) -> Any:
    from PIL import Image

    return Image.fromarray((GREY * float(scale)).astype(dtype))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name, dtype, scale",
    [("8.png", "u1", 1), ("16.png", "u2", 257), ("16.tif", "u2", 257), ("big-endian.tif", ">u2", 257),
     ("16.pgm", "u2", 257), ("float.tif", "f4", 1 / 255), ("float.pfm", "f4", 1 / 255)],
)  # fmt: skip
def test_greyscale_of_every_depth_keeps_its_intensity(name, dtype, scale, channels, tmp_path):
    grey(dtype, scale).save(tmp_path / name)
    image = decode(str(tmp_path / name), channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    assert np.array_equal(np.asarray(image.convert("L")), GREY)


def test_twelve_bits_and_white_as_zero(tmp_path):
    numbers = (GREY / 255 * 4095).round().astype(">u2")
    (tmp_path / "12.pgm").write_bytes(b"P5 10 6 4095\n" + numbers.tobytes())
    assert np.abs(np.asarray(decode(str(tmp_path / "12.pgm"), 1)) - GREY.astype(float)).max() <= 1
    grey("u2", 257).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(decode(str(tmp_path / "inverted.tif"), 1)), 255 - GREY)


@pytest.mark.parametrize(
    "name, dtype, scale, message",
    [("int.tif", "i4", 1, "mode I in TIFF has no known white"),
     ("x.im", "u2", 257, "in IM has no known white"),
     ("255.tif", "f4", 1, r"float greyscale must lie in 0 \(black\) to 1 \(white\), got 0 to 255"),
     ("nan.tif", "f4", float("nan"), "float greyscale must lie in 0")],
)  # fmt: skip
def test_greyscale_without_a_known_white_is_refused(name, dtype, scale, message, tmp_path):
    grey(dtype, scale).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        decode(str(tmp_path / name), 1)
    with pytest.raises(OSError, match=f"{name} cannot be decoded as an image .*{message}"):
        read_image(str(tmp_path / name), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["8.png", "16.png", "8.tif", "16.tif", "8.jpg"])
def test_images_stand_upright(name, orientation, tmp_path):
    """As EXIF defines orientation: where row 0 and column 0 of the stored pixels belong."""
    turned = [
        GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1], GREY.T, GREY.T[:, ::-1], GREY.T[::-1, ::-1],
        GREY.T[::-1],
    ]  # fmt: skip
    image = grey("u2", 257) if name.startswith("16") else grey("u1", 1)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, **({"quality": 100} if name.endswith("jpg") else {}))
    got = np.asarray(decode(str(tmp_path / name), 1)).astype(float)
    assert got.shape == turned[orientation - 1].shape
    assert np.abs(got - turned[orientation - 1]).max() <= (8 if name.endswith("jpg") else 0)


# ---- Augmentation


def test_augmentation_refuses():
    data = load_data("digits")
    for bad, options, message in (
        ("strong", {}, "augmentation must be one of none, flip-crop, paper, timm, got 'strong'"),
        ("paper", {"scale": 1}, "options must be empty for augmentation 'paper'"),
        ("timm", {"erasing": 0.1}, "data.augment_options must be among .*re_prob.*, got 'erasing'"),
        ("timm", {"auto_augment": "strong"}, "timm takes no such data.augment_options"),
    ):
        with pytest.raises(ValueError, match=message):
            augmentation(bad, data, options)


AUTO = {"auto_augment": "rand-m9-mstd0.5-inc1"}
OPTIONS = [
    ("flip-crop", {}),
    ("paper", {}),
    ("timm", AUTO | {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}),
    ("timm", AUTO | {"color_jitter": 0.4, "re_prob": 0.25}),
]


@needs_torchvision
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_depend_on_seed_epoch_and_index_alone(options):
    data = load_data("digits", train_count=24)
    dataset = Augmented(data.train, augmentation(options[0], data, options[1]), seed=3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = [dataset[i][0] for i in range(24)]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    torch.manual_seed(5)
    assert all(torch.equal(dataset[i][0], first[i]) for i in reversed(range(24)))
    assert torch.equal(dataset[-1][0], first[-1])
    plain = Augmented(data.train, augmentation("none", data)).batch(range(24))[0]
    assert all(x.shape == (1, 8, 8) and x.dtype == torch.float32 for x in first)
    assert not torch.equal(torch.stack(first), plain)
    dataset.set_epoch(1)
    assert not torch.equal(dataset.batch(range(24))[0], torch.stack(first))
    dataset.set_epoch(0)
    assert torch.equal(dataset.batch(range(24))[0], torch.stack(first))
    again = Augmented(data.train, augmentation(options[0], data, options[1]), seed=4)
    assert not torch.equal(again.batch(range(24))[0], torch.stack(first))


@needs_torchvision
def test_timm_posterizes_to_no_bits_at_all():
    """At magnitude 10 timm keeps 0 bits, which Pillow 12 refuses; rand-m9-mstd0.5 draws 10 now and then."""
    data = load_data("digits", train_count=24)
    changed = augmentation("timm", data, {"auto_augment": "rand-m10-inc1-n4"})
    posterize = [op for op in changed._steps[1].transforms[2].ops if op.name.startswith("Posterize")]
    for operation in posterize:
        operation.prob = 1.0
        assert operation(_to_pil(data.train[0][0])).getextrema() == (0, 0)
    assert posterize


@needs_torchvision
def test_flip_and_crop_move_pixels_only():
    """Every result is a window of the zero-padded image or of its mirror image."""
    data = load_data("digits", train_count=10)
    data = dataclasses.replace(data, name="images")  # digits are not mirrored
    dataset = Augmented(data.train, augmentation("flip-crop", data))
    plain = Augmented(data.train, augmentation("none", data))
    flipped = 0
    for i in range(10):
        padded = torch.nn.functional.pad(plain[i][0], (4, 4, 4, 4))
        windows = [padded[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
        got = dataset[i][0]
        straight = any(torch.equal(got, window) for window in windows)
        mirrored = any(torch.equal(got, window.flip(-1)) for window in windows)
        assert straight or mirrored
        flipped += mirrored and not straight
    assert 0 < flipped < 10


@needs_torchvision
def test_resizing_covers_and_cuts_in_the_middle():
    image = torch.arange(12, dtype=torch.uint8).view(1, 2, 6)
    assert torch.equal(resize_and_crop(image, (2, 2)), image[..., 2:4])
    assert resize_and_crop(image, (7, 5)).shape == (1, 7, 5)
    assert resize_and_crop(image, (2, 6)) is image
    # A share of 1/2 is kept: the image is made twice as large first, and cut in the middle.
    half = resize_and_crop(image, (2, 6), 0.5)
    assert half.shape == (1, 2, 6) and not torch.equal(half, image)
    data = load_data("digits", crop_pct=0.5)
    middle = Augmented(data.test, augmentation("none", data))[0][0]
    assert not torch.equal(middle, augmentation("none", load_data("digits"))(data.test[0][0]))


@needs_torchvision
def test_the_papers_augmentation_is_its_scripts():
    """RandAugment(2, 14), flip, random resized crop, in this order; SVHN is flipped as well."""
    data = dataclasses.replace(load_data("digits"), name="svhn")
    steps = [type(step).__name__ for step in augmentation("paper", data)._steps[:3]]
    assert steps == ["RandAugment", "RandomHorizontalFlip", "RandomResizedCrop"]
    assert len(augmentation("flip-crop", data)._steps) == 3  # fitted, cropped, normalised: no flip


# ---- Loaders


class Numbered(torch.utils.data.Dataset):
    """Images that say which they are, and which were asked for."""

    def __init__(self, n: int) -> None:
        self.n, self.asked = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return torch.full((1, 2, 2), index), index


def orders(loader) -> list[list[int]]:
    assert all(torch.equal(images[:, 0, 0, 0], labels) for images, labels in loader)
    return [labels.tolist() for _, labels in loader]


def test_order_is_of_seed_and_epoch():
    whole = orders(train_loader(Numbered(50), 8, seed=0, epoch=0))
    assert [len(batch) for batch in whole] == [8] * 6 + [2]
    assert sorted(sum(whole, [])) == list(range(50))
    assert orders(train_loader(Numbered(50), 8, seed=0, epoch=0)) == whole
    assert orders(train_loader(Numbered(50), 8, seed=0, epoch=1)) != whole
    assert orders(train_loader(Numbered(50), 8, seed=1, epoch=0)) != whole
    dropped = train_loader(Numbered(50), 8, seed=0, epoch=0, drop_last=True)
    assert orders(dropped) == whole[:6] and len(dropped) == 6


@needs_torchvision
def test_repeated_augmentation_is_timms():
    """Images as often and as close to each other as timm's sampler gives them, augmented anew each time."""
    samplers = pytest.importorskip("timm.data.distributed_sampler")
    data = load_data("digits", train_count=40)
    dataset = Augmented(data.train, augmentation("paper", data), seed=3, aug_repeats=3)
    assert len(dataset) == 40
    with pytest.raises(IndexError):
        dataset[120]
    found = [image for image, _ in train_loader(dataset, 8, seed=0, epoch=1)]
    found = torch.cat(found)
    once = Augmented(data.train, augmentation("paper", data), seed=3)
    once.set_epoch(1)
    order = permutation(40, "order", 0, 1)
    places = [i for start in range(0, 40, 8) for k in range(3) for i in range(start, start + 8)[k::3]]
    for place, image in zip(places, found, strict=True):
        same = torch.equal(image, once[int(order[place // 3])][0])
        assert same == (place % 3 == 0)  # the others are drawn anew
    sampler = samplers.RepeatAugSampler(
        data.train, num_replicas=1, rank=0, num_repeats=3, selected_round=0, selected_ratio=1
    )
    theirs = [*sampler]
    assert len(theirs) == len(found) and all(theirs[i] == theirs[i - i % 3] for i in range(40))
    assert len({*theirs}) == len({*order[: -(-40 // 3)]})
    with pytest.raises(ValueError, match="data.aug_repeats must be 1 without augmentation, got 3"):
        Config.of({"data": {"aug_repeats": 3}})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_repeats_are_not_mixed_with_each_other(world_size):
    """torchvision's MixUp and CutMix pair an image with the one before it, in a process's part of a batch."""
    dataset = Numbered(400)
    dataset.aug_repeats = 3
    met = []
    for rank in range(world_size):
        for _, indices in train_loader(dataset, 64, seed=0, epoch=0, rank=rank, world_size=world_size):
            assert not (indices % 400 == indices.roll(1) % 400).any()
            met += indices.tolist()
    assert len(met) == 400 == len({*met}) and len({index % 400 for index in met}) == 134


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_processes(world_size):
    whole = orders(train_loader(Numbered(46), 8, seed=0, epoch=2))
    ranks = [
        orders(train_loader(Numbered(46), 8, seed=0, epoch=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


def test_start_batch_loads_nothing_before():
    whole = orders(train_loader(Numbered(50), 8, seed=0, epoch=0))
    dataset = Numbered(50)
    loader = train_loader(dataset, 8, seed=0, epoch=0, start_batch=5)
    assert len(loader) == 2 and [labels.tolist() for _, labels in loader] == whole[5:]
    assert dataset.asked == sum(whole[5:], [])
    assert list(train_loader(Numbered(50), 8, seed=0, epoch=0, start_batch=7)) == []


def test_loaders_leave_torch_alone():
    state = torch.get_rng_state()
    list(train_loader(Numbered(9), 4, seed=0, epoch=0))
    list(test_loader(Numbered(9), 4))
    assert torch.equal(state, torch.get_rng_state())


def test_workers_change_nothing():
    data = load_data("digits", train_count=60)
    options = "none" if torchvision is None else "paper"
    dataset = Augmented(data.train, augmentation(options, data), seed=1)
    runs = [
        list(train_loader(dataset, 16, seed=0, epoch=4, num_workers=workers, start_batch=1))
        for workers in (0, 2)
    ]
    for (images, labels), (others, other_labels) in zip(*runs, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    assert dataset.epoch == 0  # the loader's epoch is its own


@pytest.mark.parametrize("n, world_size", [(10, 1), (10, 3), (9, 4), (2, 4)])
def test_every_test_image_is_met_once(n, world_size):
    ranks = [
        orders(test_loader(Numbered(n), 4, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert sorted(sum(sum(ranks, []), [])) == list(range(n))
    assert all(batch for batches in ranks for batch in batches)


def test_loaders_refuse():
    with pytest.raises(ValueError, match="batch_size must be divisible by the number of processes, 3, got 8"):
        train_loader(Numbered(50), 8, seed=0, epoch=0, world_size=3)
    with pytest.raises(ValueError, match="the last batch has 2 images for 4 processes; use drop_last=True"):
        train_loader(Numbered(50), 8, seed=0, epoch=0, world_size=4)
    with pytest.raises(ValueError, match="must fill a batch of 8, got 5 images"):
        train_loader(Numbered(5), 8, seed=0, epoch=0, drop_last=True)
    with pytest.raises(ValueError, match="start_batch must be at most 7, got 8"):
        train_loader(Numbered(50), 8, seed=0, epoch=0, start_batch=8)
    with pytest.raises(ValueError, match="rank must be below the number of processes, 2, got 2"):
        test_loader(Numbered(5), 2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least one image"):
        test_loader(Numbered(0), 2)
