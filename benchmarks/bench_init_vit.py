"""init_vit_ of timm's Vision Transformers at 224 pixels, against drawing the model itself.

    python -m pytest benchmarks/bench_init_vit.py -s --benchmark-json init_vit.json

The plain call: the fit, and one forward pass over images that it makes or is given. Every call copies the
model first, because a second call on one model keeps what the first one made.
"""

from __future__ import annotations

import copy

import pytest
import torch

import convinit
from convinit._timing import WrongResultError

timm = pytest.importorskip("timm")
MODELS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]


@pytest.mark.parametrize("name", MODELS)
def bench_init_vit(compare, name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    images = torch.rand(8, 3, 224, 224)

    def plain(**options) -> convinit.InitReport:
        generator = torch.Generator().manual_seed(0)
        return convinit.init_vit_(copy.deepcopy(model), generator=generator, **options)

    def check(competitor: str, result) -> dict[str, float]:
        if not competitor.startswith("convinit"):
            return {}
        peaks = [row["peak_on_images"] for row in result.rows()]
        lowest, highest = min(peaks), max(peaks)
        if not 0.4 < lowest <= highest < 0.9:  # of the 0.7 asked, on images that are noise
            raise WrongResultError(f"peaks from {lowest:.2f} to {highest:.2f}")
        return {"peak_lowest": round(lowest, 3), "peak_highest": round(highest, 3)}

    compare(
        "init_vit",
        name,
        {
            "timm.create_model": lambda: timm.create_model(name),
            "convinit": plain,
            "convinit, 8 images": lambda: plain(images=images),
        },
        baseline="timm.create_model",
        check=check,
        device="cpu",
    )
