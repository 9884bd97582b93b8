"""How near the maps of init_vit_ come to the peak that was asked, on photographs that it has not seen.

    python benchmarks/init_vit_peaks.py FOLDER

FOLDER holds 40 photographs or more. They are divided into two halves at random, four times. init_vit_ sees a
batch of one half, and the attention on the targets is measured on 64 images of the other; then the same the
other way round. The images are made as in training on ImageNet: random crops of 8 to 100 % of the area and
random flips. The table has the lowest and the highest mean attention on the target of all layers and
divisions, and the median over the divisions of the largest distance of a layer from the peak that was asked.
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
DIVISIONS, SEEN, MEASURED = 4, 32, 64


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
    print(f"{len(photographs)} photographs, peak {DEFAULT_PEAK} asked\n")
    print(f"| model | set on synthetic images | set on {SEEN} of half the photographs |")
    print("|---|---|---|")
    for label, (name, size, patch) in MODELS.items():
        cells = []
        for given in (False, True):
            found = []
            for division in range(DIVISIONS):
                shuffled = random.Random(division).sample(photographs, len(photographs))
                halves = shuffled[::2], shuffled[1::2]
                for half, other in (halves, halves[::-1]):
                    images = crops(half, SEEN, size, 0) if given else None
                    model, report = made(name, size, patch, images)
                    found.append(peaks(model, report, crops(other, MEASURED, size, 1)))
            lowest, highest = min(map(min, found)), max(map(max, found))
            distance = median(max(abs(peak - DEFAULT_PEAK) for peak in layers) for layers in found)
            cells.append(f" {lowest:.2f} to {highest:.2f}; {distance:.2f} |")
        print(f"| {label} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
