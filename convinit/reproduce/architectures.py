"""The table "architectures": `init_vit_` in timm's ViT of several sizes, in Swin and in MLP-Mixer."""

from __future__ import annotations

from convinit.reproduce.table import Choice, Settings, Table

_SMALL: dict[str, Settings] = {
    "ViT, width 64, 4 layers": {
        "model.name": "vit_tiny_patch16_224",
        "model.options": {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
    },
    "ViT, width 96, 6 layers": {
        "model.name": "vit_small_patch16_224",
        "model.options": {"embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2},
    },
    "Swin, windows of 4 × 4": {
        "model.name": "swin_tiny_patch4_window7_224",
        "model.options": {
            "img_size": 8, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4),
        },
    },
    "MLP-Mixer, width 64, 4 layers": {
        "model.name": "mixer_s16_224",
        "model.options": {"embed_dim": 64, "num_blocks": 4, "mlp_ratio": (4, 2)},
    },
}  # fmt: skip
_LARGE: dict[str, Settings] = {
    label: {"model.name": name, "model.patch_size": None}  # whatever the data set: images are enlarged
    for label, name in (
        ("ViT-Ti", "vit_tiny_patch16_224"),
        ("ViT-S", "vit_small_patch16_224"),
        ("ViT-B", "vit_base_patch16_224"),
        ("Swin-T", "swin_tiny_patch4_window7_224"),
        ("MLP-Mixer-S", "mixer_s16_224"),
    )
}
_PLAIN_CALL: Settings = {  # in place of the preset's own
    "init.fit": "newton", "init.offsets": None, "init.pos_embed_gain": None, "init.kernel_size": None,
}  # fmt: skip
_METHODS = {
    "the library's own": "default", "mimetic": "mimetic", "impulse": "impulse",
    "control: scrambled": "scrambled", "control: norm-matched": "norm_matched",
}  # fmt: skip


def architectures(data: str) -> Table:
    """Narrowed on the digits."""
    small = data == "digits"
    columns = tuple(Choice(label, settings) for label, settings in (_SMALL if small else _LARGE).items())
    rows = tuple(
        Choice(
            label,
            {"init.method": method, "init.values": "default" if method == "default" else "mimetic"},
            control=label.startswith("control"),
        )
        for label, method in _METHODS.items()
    )
    return Table(
        "architectures",
        "timm's ViT, Swin and MLP-Mixer" + (", narrowed" if small else ""),
        "Where else do impulses help, and how large may the model be?",
        "quick" if small else "2505.19985",
        {"model.patch_size": 1} if small else _PLAIN_CALL,
        rows,
        columns,
        "model",
        "dots",
        without=frozenset(
            ("mimetic", column.label) for column in columns if column.label.startswith("MLP-Mixer")
        ),
        note="One call of init_vit_. In the ViT it sets queries and keys, and for impulses and controls the "
        "position embedding as well. A Swin's impulses are in its tables of relative position biases, which "
        "give all tokens of a window one shift: scrambled ones are shifts beyond f×f that wrap around. An "
        "MLP-Mixer's are in its token mixing; it has no queries and keys.",
    )
