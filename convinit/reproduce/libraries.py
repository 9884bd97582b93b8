"""The table "libraries": `init_vit_` in the Vision Transformers of vit-pytorch and torchvision."""

from __future__ import annotations

from convinit.reproduce.fashion_mnist import RATES, SETTINGS
from convinit.reproduce.sweep import FEW_DIGITS
from convinit.reproduce.table import Choice, Settings, Table

_MODELS: dict[str, Settings] = {
    "vit-pytorch's SimpleViT": {
        "model.name": "vit-pytorch:SimpleViT",
        "model.options": {"dim": 96, "depth": 6, "heads": 3, "dim_head": 32, "mlp_dim": 384},
    },
    "torchvision's VisionTransformer": {
        "model.name": "torchvision:VisionTransformer",
        "model.options": {"hidden_dim": 96, "num_layers": 6, "num_heads": 3, "mlp_dim": 384},
    },
}
# vit-pytorch normalises the pixels of a patch: of one grey pixel nothing would be left.
_ENLARGED: Settings = {"data.image_size": 32, "model.patch_size": 4}
_METHODS = {
    "the library's own": "default", "mimetic": "mimetic", "impulse (the plain call)": "impulse",
    "control: position embedding and values alone": "position_only", "control: scrambled": "scrambled",
    "control: norm-matched": "norm_matched",
}  # fmt: skip


def libraries(data: str) -> Table:
    """On 300 digits, enlarged to 32 × 32, or 1,000 images of Fashion-MNIST."""
    digits = data == "digits"
    return Table(
        "libraries",
        "Vision Transformers of other libraries",
        "Does one call of init_vit_ help beyond timm?",
        "quick",
        {**FEW_DIGITS, **_ENLARGED, "init.kernel_size": None} if digits else
        {**SETTINGS, "model.patch_size": 4, "data.train_count": 1000, "recipe.epochs": 16},
        tuple(
            Choice(
                label,
                {"init.method": method, "init.values": "default" if method == "default" else "mimetic"},
                control=label.startswith("control"),
            )
            for label, method in _METHODS.items()
        ),
        tuple(Choice(label, settings) for label, settings in _MODELS.items()),
        "model",
        "dots",
        readings=("accuracy", "shifted-2", "shifted-4"),
        ours="impulse (the plain call)",
        rates=RATES,
        note="Width 96, 6 layers, 3 heads of 32. vit-pytorch's model has a fixed sin-cos position embedding "
        "and no class token; torchvision's learns both. Every cell is run with three learning rates and has "
        "the one that is best on training images that are held out; the test images are met once. Each seed "
        "has its own training images, initial weights and order. No augmentation. The position embedding and "
        "values of the controls are those of the impulses.",
    )  # fmt: skip
