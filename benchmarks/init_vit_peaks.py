"""How near the maps of init_vit_ come to the peak that was asked, on photographs that it has not seen.

    python benchmarks/init_vit_peaks.py FOLDER [--models NAME ...] [--numbers N ...]

FOLDER holds 128 photographs or more. They are divided into two halves at random, four times. init_vit_ sees
one image of each of N photographs of one half, and the attention on the targets is measured on one image of
each photograph of the other; then the same the other way round. The images are made as in training on
ImageNet: random crops of 8 to 100 % of the area and random flips. A cell has the lowest and the highest mean
attention on the target of all layers and divisions, and the median over the divisions of the largest distance
of a layer from the peak that was asked.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path
from statistics import median

import timm
import torch
from PIL import Image
from timm.data import create_transform
from vit_pytorch import SimpleViT

import convinit
from convinit.fit.api import DEFAULT_PEAK


def timm_vit(size: str, image_size: int, patch_size: int) -> torch.nn.Module:
    return timm.create_model(f"vit_{size}_patch16_224", img_size=image_size, patch_size=patch_size)


def simple_vit(size: str, image_size: int, patch_size: int) -> torch.nn.Module:
    """vit-pytorch's, as wide and as deep as timm's."""
    width = {"tiny": 192, "small": 384}[size]
    return SimpleViT(
        image_size=image_size, patch_size=patch_size, num_classes=1000, dim=width, depth=12,
        heads=width // 64, mlp_dim=4 * width,
    )  # fmt: skip


MODELS = {
    "ViT-Ti/16, 224 pixels": (timm_vit, "tiny", 224, 16),
    "ViT-S/16, 224 pixels": (timm_vit, "small", 224, 16),
    "ViT-B/16, 224 pixels": (timm_vit, "base", 224, 16),
    "ViT-Ti/4, 32 pixels": (timm_vit, "tiny", 32, 4),
    "ViT-S/4, 32 pixels": (timm_vit, "small", 32, 4),
    "ViT-B/4, 32 pixels": (timm_vit, "base", 32, 4),
    "ViT-Ti/2, 32 pixels": (timm_vit, "tiny", 32, 2),
    "SimpleViT-S/16, 224 pixels": (simple_vit, "small", 224, 16),
    "SimpleViT-Ti/4, 32 pixels": (simple_vit, "tiny", 32, 4),
}
DIVISIONS = 4
NUMBERS = [0, 22, 64]  # of photographs; 0: none, so synthetic images


def crops(photographs: list[Path], size: int, seed: int) -> torch.Tensor:
    """[photographs, 3, size, size]: a crop of each."""
    random.seed(seed)
    torch.manual_seed(seed)
    transform = create_transform(size, is_training=True, color_jitter=None, interpolation="bicubic")
    return torch.stack([transform(Image.open(photograph).convert("RGB")) for photograph in photographs])


def peaks(model: torch.nn.Module, report: convinit.InitReport, images: torch.Tensor) -> list[float]:
    """Mean attention on the targets of each layer."""
    found = []
    for maps, record in zip(convinit.adapters.head_maps(report, model, images), report.records, strict=True):
        inside = record.targets >= 0
        on_target = maps.gather(2, record.targets.clamp(min=0)[..., None])[..., 0]
        found.append(float((on_target * inside).sum() / inside.sum()))
    return found


def made(label: str, images: torch.Tensor | None):
    torch.manual_seed(0)
    make, *sizes = MODELS[label]
    model = make(*sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convinit.init_vit_(model, images=images, generator=torch.Generator().manual_seed(0))
    return model, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--numbers", nargs="+", type=int, default=NUMBERS, metavar="N")
    args = parser.parse_args()
    photographs = sorted(path for path in args.folder.iterdir() if path.is_file())
    print(f"{len(photographs)} photographs, peak {DEFAULT_PEAK} asked; set on so many of one half\n")
    print("| model |" + "".join(f" {number} |" for number in args.numbers))
    print("|---" * (len(args.numbers) + 1) + "|")
    for label in args.models:
        _, _, size, _ = MODELS[label]
        found: dict[int, list[list[float]]] = {number: [] for number in args.numbers}
        for division in range(DIVISIONS):
            shuffled = random.Random(division).sample(photographs, len(photographs))
            halves = shuffled[::2], shuffled[1::2]
            for half, other in (halves, halves[::-1]):
                unseen = crops(other, size, 1)
                for number in args.numbers:
                    images = crops(half[:number], size, 0) if number else None
                    model, report = made(label, images)
                    found[number].append(peaks(model, report, unseen))
        cells = []
        for layers in found.values():
            lowest, highest = min(map(min, layers)), max(map(max, layers))
            distance = median(max(abs(peak - DEFAULT_PEAK) for peak in each) for each in layers)
            cells.append(f" {lowest:.2f} to {highest:.2f}; {distance:.2f} |")
        print(f"| {label} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
