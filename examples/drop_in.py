"""Is it a drop-in? Models of two other libraries on few images, from different initial weights.

    python examples/drop_in.py timm --out docs/init_vit
    python examples/drop_in.py vit-pytorch --out docs/init_vit

Each model is built by its own library and changed by one call of `convinit.init_vit_`. Every run is kept in
OUT as soon as it is done; run again to go on. At the end OUT has the table in Markdown.

The images are scikit-learn's digits, 8×8, enlarged to 32×32. "Shifted" is the mean accuracy on the test
images moved by one pixel of the original (four of the enlarged) up, down, left and right, which no model was
trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import convinit
from convinit.train import accuracy, batches, load_digits_split, shift_images, train

# label: arguments of init_vit_, and whether P is enlarged with it; None: the library as it is.
ARMS: dict[str, tuple[dict[str, str], bool] | None] = {
    "default": None,
    "default, P enlarged": ({"method": "default", "values": "default"}, True),
    "mimetic": ({"method": "mimetic"}, False),
    "impulse": ({}, True),
    "control: scrambled": ({"method": "scrambled"}, True),
    "control: random, same norm": ({"method": "norm_matched"}, True),
    "impulse, P in a subspace of its own": ({}, False),
    "control: that P and values alone": ({"method": "position_only"}, False),
}
SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class Settings:
    """What the runs of one model share; `scale` are the arguments of init_vit_ that enlarge P."""

    model: str
    num_train: int
    num_test: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    scale: dict[str, float]
    mixed_precision: str


SETTINGS = {
    "timm": Settings("timm", 300, 200, 6, 20, 5e-4, 0.05, {"pos_embed_gain": 60.0}, "bf16"),
    "vit-pytorch": Settings("vit-pytorch", 300, 797, 30, 20, 1e-3, 0.01, {"pos_embed_gain": 6.0}, "no"),
}


def build(settings: Settings) -> nn.Module:
    """The library's own model with its own initial weights."""
    if settings.model == "timm":
        import timm

        timm.layers.set_fused_attn(False)  # faster than PyTorch's fused attention on a CPU in bf16
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=2, in_chans=1, num_classes=10
        )
    from vit_pytorch import SimpleViT

    return SimpleViT(
        image_size=32,
        patch_size=4,
        num_classes=10,
        dim=64,
        depth=4,
        heads=4,
        dim_head=16,
        mlp_dim=128,
        channels=1,
    )


def initialise(model: nn.Module, arm: str, settings: Settings, seed: int, images: Tensor) -> dict[str, float]:
    """Applies an arm of ARMS; the mean figures of its heads."""
    chosen = ARMS[arm]
    if chosen is None:
        return {}
    options, enlarged = chosen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a scrambled peak out of reach: the figures tell
        report = convinit.init_vit_(
            model, images=images, generator=torch.Generator().manual_seed(seed), **options,
            **(settings.scale if enlarged else {}),
        )  # fmt: skip
    rows = list(report.rows())
    names = ("peak", "peak_on_images", "weight_norm")
    means = {name: statistics.fmean(row[name] for row in rows if row[name] is not None) for name in names}
    return {name: value for name, value in means.items() if math.isfinite(value)}


def run(settings: Settings, arm: str, seed: int) -> dict:
    """Trains one model; accuracies in %."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    split = load_digits_split(settings.num_train, num_test=settings.num_test)
    mean, std = split.train_images.mean(), split.train_images.std()

    def prepared(images: Tensor) -> Tensor:
        return (F.interpolate(images, size=(32, 32), mode="bilinear") - mean) / std

    def tested(images: Tensor) -> float:
        return 100 * accuracy(model, batches(prepared(images), split.test_labels, 100))

    torch.manual_seed(seed)
    model = build(settings)
    figures = initialise(model, arm, settings, seed, prepared(split.train_images[:32]))
    shuffled = batches(
        prepared(split.train_images), split.train_labels, settings.batch_size, shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    # A part of the test images while training, for the time's sake; all of them at the end.
    some = batches(prepared(split.test_images[:100]), split.test_labels[:100], 100)
    records = train(
        model, shuffled, some, epochs=settings.epochs, lr=settings.lr, weight_decay=settings.weight_decay,
        accelerator=Accelerator(cpu=True, mixed_precision=settings.mixed_precision),
    )  # fmt: skip
    losses = [record.loss for record in records]
    return {
        "arm": arm,
        "seed": seed,
        "settings": asdict(settings),
        "clean": tested(split.test_images),
        "shifted": statistics.fmean(tested(shift_images(split.test_images, *shift)) for shift in SHIFTS),
        "losses": losses,
        "init": figures,
        "seconds": time.perf_counter() - start,
    }


def table(settings: Settings, runs: list[dict], command: str) -> str:
    """The runs of one model in Markdown."""

    def figure(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}"

    lines = [
        "| initial weights | clean | shifted | peak of P alone | peak on images | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        own = [each for each in runs if each["arm"] == arm]
        if not own:
            continue
        cells = [arm, *(figure([each[name] for each in own]) for name in ("clean", "shifted"))]
        for name in ("peak", "peak_on_images"):
            values = [each["init"][name] for each in own if name in each["init"]]
            cells.append(f"{statistics.fmean(values):.2f}" if values else "–")
        lines.append("| " + " | ".join([*cells, str(len(own))]) + " |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "vit-pytorch", "convinit"))
    shared = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    return "\n".join([*lines, "", f"Settings: {shared}.", f"Made by `{command}` with {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and table")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    options = parser.parse_args()
    settings = SETTINGS[options.model]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.model}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [each for each in runs if each["settings"] == asdict(settings)]
    done = {(each["arm"], each["seed"]) for each in runs}
    missing = [(arm, seed) for seed in range(options.seeds) for arm in ARMS if (arm, seed) not in done]

    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run, settings, arm, seed) for arm, seed in missing]
        for future in tqdm(as_completed(waiting), total=len(waiting), desc=f"runs of {options.model}"):
            runs.append(future.result())
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(runs, indent=1))
            fresh.replace(path)
    command = f"python examples/drop_in.py {options.model} --seeds {options.seeds}"
    text = table(settings, runs, command)
    (options.out / f"{options.model}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
