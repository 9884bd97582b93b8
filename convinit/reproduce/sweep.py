"""The table "sweep": what the defaults of `init_vit_` were chosen by, on held-out training images alone."""

from __future__ import annotations

from convinit.reproduce.fashion_mnist import RATES, SETTINGS, small_vit
from convinit.reproduce.table import Choice, Settings, Table

# Of the 1,000 training digits another 300 for each seed, the others to validate on.
FEW_DIGITS: Settings = {
    "data.val_fraction": 0.7, "data.train_count": 300, "model.patch_size": 1, "recipe.batch_size": 20,
    "recipe.epochs": 20, "recipe.weight_decay": 0.05, "recipe.clip": 1.0, "run.eval_every": 5,
}  # fmt: skip
_PLAIN_CALL = small_vit("impulse (the plain call)", "impulse")


def sweep(data: str) -> Table:
    """Windows, peaks, values and controls, one changed at a time, in timm's ViT."""
    digits = data == "digits"
    columns = [Choice("8 × 8 tokens, 300 images")] if digits else [
        Choice(f"{28 // patch} × {28 // patch} tokens, 1,000 images", {"model.patch_size": patch})
        for patch in (4, 2)
    ]  # fmt: skip
    windows = (1, 5, 7) if digits else (1, 3, 5, 13)  # the plain call has 3 on the digits
    return Table(
        "sweep",
        "The defaults of init_vit_: one changed at a time",
        "Which window, which peak, which values?",
        "quick",
        FEW_DIGITS if digits else {**SETTINGS, "data.train_count": 1000, "recipe.epochs": 16},
        (
            _PLAIN_CALL,
            *(small_vit(f"window f = {f}", "impulse", kernel_size=f) for f in windows),
            *(small_vit(f"peak = {peak:g}", "impulse", peak=peak) for peak in (0.3, 0.5, 0.9)),
            small_vit("values as timm's", "impulse", values="default"),
            small_vit("control: position embedding and values alone", "position_only", control=True),
            small_vit("control: scrambled", "scrambled", control=True),
            small_vit("control: norm-matched", "norm_matched", control=True),
        ),
        tuple(columns),
        "tokens and training images",
        "dots",
        readings=("validation", "part-0.25"),
        ours=_PLAIN_CALL.label,
        rates=RATES,
        note="All numbers are of training images that are held out; no test image is among them. They "
        "flatter a little, for each cell has its best rate on the same images. The plain call has half the "
        "grid as its window (f = 3 on 7 × 7 and 8 × 8 tokens, 7 on 14 × 14), the peak 0.7, mimetic values.",
    )
