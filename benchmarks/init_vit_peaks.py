"""How near the maps of init_vit_ come to the peak that was asked, on photographs that it has not seen.

    python benchmarks/init_vit_peaks.py FOLDER

FOLDER holds photographs, 40 or more. They are divided into two halves: init_vit_ sees a batch of one half, and
the attention on the targets is measured on 64 images of the other; then the same the other way round. The
images are made as in training on ImageNet (random crops of 8 to 100 % of the area, random flips). The table
has the peak of the lowest and of the highest layer, over both ways.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform

import convinit
from convinit.fit.api import DEFAULT_PEAK

MODELS = {
    "ViT-Ti/16, 224 pixels": ("vit_tiny_patch16_224", 224, 16),
    "ViT-S/16, 224 pixels": ("vit_small_patch16_224", 224, 16),
    "ViT-B/16, 224 pixels": ("vit_base_patch16_224", 224, 16),
    "ViT-Ti/4, 32 pixels": ("vit_tiny_patch16_224", 32, 4),
    "ViT-S/4, 32 pixels": ("vit_small_patch16_224", 32, 4),
    "ViT-Ti/2, 32 pixels": ("vit_tiny_patch16_224", 32, 2),
}
BATCHES = (8, 32, 64)
MEASURED = 64


def crops(photographs: list[Path], count: int, size: int, seed: int) -> torch.Tensor:
    """[count, 3, size, size]: the photographs in turn, each time another crop."""
    random.seed(seed)
    torch.manual_seed(seed)
    transform = create_transform(size, is_training=True, color_jitter=None, interpolation="bicubic")
    return torch.stack(
        [transform(Image.open(photographs[i % len(photographs)]).convert("RGB")) for i in range(count)]
    )


def peaks(model: torch.nn.Module, report: convinit.InitReport, images: torch.Tensor) -> list[float]:
    """Mean attention on the targets of each layer."""
    found = []
    for maps, record in zip(convinit.adapters.head_maps(report, model, images), report.records, strict=True):
        inside = record.targets >= 0
        on_target = maps.gather(2, record.targets.clamp(min=0)[..., None])[..., 0]
        found.append(float((on_target * inside).sum() / inside.sum()))
    return found


def made(name: str, size: int, patch: int, images: torch.Tensor | None):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, patch_size=patch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convinit.init_vit_(model, images=images, generator=torch.Generator().manual_seed(0))
    return model, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    photographs = sorted(path for path in parser.parse_args().folder.iterdir() if path.is_file())
    random.Random(0).shuffle(photographs)
    halves = photographs[::2], photographs[1::2]
    print(f"{len(photographs)} photographs, peak {DEFAULT_PEAK} asked\n")
    print("| model | synthetic images |" + "".join(f" {n} photographs |" for n in BATCHES))
    print("|---|---|" + "---|" * len(BATCHES))
    for label, (name, size, patch) in MODELS.items():
        others = [crops(half, MEASURED, size, 1) for half in halves]
        cells = []
        for count in (None, *BATCHES):
            found = []
            for half, other in zip(halves, reversed(others), strict=True):
                images = None if count is None else crops(half, count, size, 0)
                found += peaks(*made(name, size, patch, images), other)
            cells.append(f" {min(found):.2f} to {max(found):.2f} |")
        print(f"| {label} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
