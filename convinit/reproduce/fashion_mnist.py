"""The tables of Fashion-MNIST: few real images, rates chosen on held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from convinit.reproduce import papers
from convinit.reproduce.table import Choice, Settings, Table

# Of 60,000 training images another 1,000 or 5,000 for each seed, 2,000 to validate on.
SETTINGS: Settings = {
    "data.val_fraction": 1 / 30, "recipe.weight_decay": 0.05, "recipe.clip": 1.0, "init.kernel_size": None,
    "recipe.precision": "bf16", "run.cpu": False, "run.eval_batch_size": 1000,
}  # fmt: skip
_SMALL_VIT: Settings = {
    "model.name": "vit_tiny_patch16_224", "model.options": {"embed_dim": 96, "depth": 6, "num_heads": 3},
}  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3)


def small_vit(label: str, method: str, control: bool = False, **init: Any) -> Choice:
    """A row of timm's ViT, narrowed; `init` are settings of the section init."""
    settings = {f"init.{key}": value for key, value in {"method": method, **init}.items()}
    return Choice(label, {**_SMALL_VIT, **settings}, control=control)


_PLAIN_CALL = small_vit("impulse (the plain call)", "impulse")
_CONTROLS = (
    small_vit("control: position embedding and values alone", "position_only", control=True),
    small_vit("control: scrambled", "scrambled", control=True),
    small_vit("control: norm-matched", "norm_matched", control=True),
)
_LEARNED_CONVMIXER = Choice(
    "ConvMixer, learned filters",
    {
        "model.name": "convmixer", "model.dim": 96, "model.depth": 6, "init.method": "random",
        "init.values": "mimetic", "init.kernel_size": 5,
    },
)  # fmt: skip
_NOTE = (
    "Every cell is run with three learning rates and has the one that is best on 2,000 training images that "
    "are held out; the test images are met once. Each seed has its own training images, initial weights and "
    "order. No augmentation. The position embedding and values of the controls are those of the impulses."
)


def _drop_in(data: str) -> Table:
    return Table(
        "drop-in",
        "timm's ViT on few images of Fashion-MNIST, from different initial weights",
        "What does one call of init_vit_ give, and which part of it?",
        "quick",
        SETTINGS,
        (
            small_vit("timm's own", "default", values="default"),
            small_vit("mimetic", "mimetic"),
            small_vit(
                "impulse, fit of 2505.19985, P × 18", "impulse", fit="svd", offsets="fixed",
                pos_embed_gain=18.0, kernel_size=3,
            ),
            _PLAIN_CALL,
            *_CONTROLS,
            _LEARNED_CONVMIXER,
        ),
        tuple(
            Choice(
                f"{28 // patch} × {28 // patch} tokens, {count:,} images",
                {"model.patch_size": patch, "data.train_count": count, "recipe.epochs": epochs},
            )
            for patch, count, epochs in ((4, 1000, 16), (2, 1000, 16), (2, 5000, 8))
        ),
        "tokens and training images",
        "dots",
        readings=("accuracy", "shifted-1", "shifted-2", "shifted-4", "part-0.25", "epochs-to-60"),
        ours=_PLAIN_CALL.label,
        rates=RATES,
        note=f"A class token, width 96, 6 layers, 3 heads. {_NOTE}",
    )  # fmt: skip


def _window(data: str) -> Table:
    return Table(
        "window",
        "Where the convolution matters: windows on 14 × 14 tokens of Fashion-MNIST",
        "Must heads look near, far, or anywhere, once the position embedding is in order?",
        "quick",
        {**SETTINGS, "model.patch_size": 2, "data.train_count": 1000, "recipe.epochs": 16},
        (
            *(small_vit(f"impulse, f = {f}", "impulse", kernel_size=f) for f in (1, 3, 5)),
            _PLAIN_CALL,
            small_vit("impulse, f = 13", "impulse", kernel_size=13),
            *_CONTROLS,
            _LEARNED_CONVMIXER,
        ),
        (Choice("1,000 images"),),
        "test images",
        "shifts",
        readings=("accuracy", "shifted-1", "shifted-2", "shifted-4"),
        ours=_PLAIN_CALL.label,
        rates=RATES,
        note=f"The plain call draws from half the grid, f = 7. {_NOTE}",
    )


def _models(data: str) -> Table:
    own = papers.TABLES["models"]("fashion-mnist")
    size = {
        "model.patch_size": 2, "model.dim": 96, "model.depth": 6, "model.heads": 3, "model.mlp_dim": 192,
        "data.train_count": 1000, "recipe.epochs": 16,
    }  # fmt: skip
    return replace(
        own,
        title=f"{own.title}, on 14 × 14 tokens of Fashion-MNIST",
        preset="quick",
        settings={**SETTINGS, **papers.vit(small=False), **size},
        rates=RATES,
        note=f"Width 96, 6 layers, 3 heads. {_NOTE}",
    )


TABLES: dict[str, Callable[[str], Table]] = {
    "drop-in": _drop_in, "window": _window, "models": _models,
}  # fmt: skip
