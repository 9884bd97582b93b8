"""The experiments of the papers, small for the digits and else at the papers' size.

Every table of a ViT has two controls: "scrambled", whose heads are fitted to random permutations of the
tokens, and "norm-matched", whose heads are random with the weight norm that the impulse would have had. A
ConvMixer's are random filters, which have the norm of an impulse, and for the impulses in matrix form
permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from convinit.reproduce.table import Choice, Settings, Table

ALL_DEFAULT = Choice("default, values too", {"init.method": "default", "init.values": "default"})
_RANDOM = Choice("random", {"init.method": "random"})
_MIMETIC = Choice("mimetic", {"init.method": "mimetic"})
_IMPULSE = Choice("impulse", {"init.method": "impulse"})
_SCRAMBLED = Choice("control: scrambled", {"init.method": "scrambled"}, control=True)
_NORM_MATCHED = Choice("control: norm-matched", {"init.method": "norm_matched"}, control=True)
_MIMETIC_PAPER = Choice(
    "mimetic, as in the paper",
    {"init.method": "mimetic", "init.distribution": "uniform", "init.values": "default"},
)
IMPULSE_PAPER = Choice(
    "impulse, as in the paper",
    {"init.method": "impulse", "init.fit": "adam", "model.options": {"scale": 0.1}, "init.values": "default"},
)
_INITS = (_RANDOM, _MIMETIC, _MIMETIC_PAPER, _IMPULSE, IMPULSE_PAPER, _SCRAMBLED, _NORM_MATCHED)
USUAL_ROWS = tuple(row.label for row in _INITS)
_MODEL_I = Choice("Model I", {"model.variant": "I"})


_TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tiny-imagenet": 100_000}


def _base(small: bool) -> str:
    return "quick" if small else "paper"


def _rows(small: bool) -> tuple[Choice, ...]:
    """The paper's recipe leaves all values as nn.Linear makes them, and "random" is then all default."""
    return (ALL_DEFAULT, *_INITS) if small else _INITS


def vit(small: bool) -> Settings:
    """Spelled out, so that cells of several tables that are the same run are known to be.

    As in the paper, each head draws its offset by itself.
    """
    return {"model.alpha": 0.2, "init.kernel_size": 3 if small else 5, "init.offsets": "random"}


def _convmixer(data: str) -> Table:
    small = data == "digits"
    matrix = "impulse, N×N matrices"

    def kind(label: str, init: str, in_matrices: bool = False, num_cells: int | None = None) -> Choice:
        settings = {"init.method": init, "init.num_cells": num_cells, "model.matrix_form": in_matrices}
        against = matrix if in_matrices and label != matrix else ""
        control = label.startswith("control")
        return Choice(label, settings, control=control, against=against)

    def as_in_paper(name: str, init: str, num_cells: int | None = None) -> Choice:
        row = kind(f"{name}, as in the paper", init, num_cells=num_cells)
        against = "" if init == "impulse" else "impulse, as in the paper"
        return replace(
            row, settings={**row.settings, "model.options": {"spatial_gelu": False}}, against=against
        )

    rows = (
        kind("impulse", "impulse"),
        kind("box", "box", num_cells=5),
        kind("gaussian", "gaussian"),
        kind("softmax of weights", "softmax"),
        kind("control: random", "random"),
        *(
            as_in_paper(*each)
            for each in (
                ("impulse", "impulse"),
                ("box of all cells", "box", 9 if small else 25),
                ("softmax of weights", "softmax"),
                ("random", "random"),
            )
        ),
        kind(matrix, "impulse", in_matrices=True),
        kind("control: random pixels, N×N matrices", "permutation", in_matrices=True),
        kind("control: permutations, N×N matrices", "full_permutation", in_matrices=True),
    )
    return Table(
        "convmixer",
        "ConvMixer: kinds of spatial filters, trained and frozen",
        "How far do random impulse filters get, and must they be learned?",
        _base(small),
        {"model.name": "convmixer", "init.kernel_size": 3 if small else 5},
        rows,
        (Choice("trained", {"model.train_mixing": True}), Choice("frozen", {"model.train_mixing": False})),
        "spatial filters",
        "dots",
        note="Random filters, trained, are the ordinary ConvMixer. U(±1/f) has an impulse's norm √(1/3), "
        "so it is the norm-matched control. The matrices have N² free numbers a channel when trained; their "
        "controls look at pixels anywhere instead of near by, and are judged against impulses in that form. "
        "As in the paper (arXiv 2401.12511): its published code has no GELU after the spatial convolution; "
        "ConvMixer, timm's and all other rows have one. Its script trains without augmentation: "
        "`--set data.augment=none`.",
    )


def _models(data: str) -> Table:
    small = data == "digits"
    names = ("vanilla", "I", "II", "III")
    columns = tuple(Choice(n if n == "vanilla" else f"Model {n}", {"model.variant": n}) for n in names)
    return Table(
        "models",
        "Models I to III and the vanilla one, from different initial queries and keys",
        "Which initial weights of queries and keys does each of the papers' models learn best from?",
        _base(small),
        vit(small),
        _rows(small),
        columns,
        "model",
        "dots",
        without=frozenset({(ALL_DEFAULT.label, "Model III")}),
        note="Model III has no linear layers for queries and keys, and so no default of its own."
        if small
        else "",
    )


def _position(data: str) -> Table:
    small = data == "digits"
    columns = tuple(Choice(f"Model {name}", {"model.variant": name}) for name in ("I", "II", "III"))
    at_entry = Choice(
        "impulse, P at the entry too", {**_IMPULSE.settings, "model.options": {"input_pos_embed": True}}
    )
    return Table(
        "position",
        "Models I to III: which P, and where",
        "Does it matter what P is, where it enters, and whether layers differ?",
        _base(small),
        vit(small),
        (
            _RANDOM,
            _IMPULSE,
            Choice("impulse, P = I", {**_IMPULSE.settings, "model.options": {"pos_embed": "identity"}}),
            at_entry,
            Choice("impulse, layers alike", {**_IMPULSE.settings, "model.options": {"layers_alike": True}}),
            _SCRAMBLED,
            _NORM_MATCHED,
        ),
        columns,
        "model",
        "dots",
        without=frozenset({(at_entry.label, "Model I")}),
        note="P is the sin-cos embedding, or the identity, a unit vector a token. At the entry: the tokens "
        "are mixed with P once, before the first layer, as in the vanilla model; Model I has it in each one. "
        "Layers alike: every layer starts from the fit of the first, as in arXiv 2404.01139.",
    )


def _alpha(data: str) -> Table:
    small = data == "digits"
    values = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    return Table(
        "alpha",
        "Model I: content share α of queries and keys",
        "How much content may queries and keys see beside the position?",
        _base(small),
        {**vit(small), **_MODEL_I.settings},
        _INITS,
        tuple(Choice(f"α = {x:g}", {"model.alpha": x}, x=x) for x in values),
        "content share α",
        "lines",
        note="At α = 0 the maps are those of Model II. Impulses and controls are fitted to (1−α)·P at one "
        "peak: their weight norm grows with α.",
    )


def _kernel_size(data: str) -> Table:
    small = data == "digits"
    rows = (
        Choice("random", _RANDOM.settings, everywhere=True),
        Choice("mimetic", _MIMETIC.settings, everywhere=True),
        replace(_MIMETIC_PAPER, everywhere=True),
        _IMPULSE, IMPULSE_PAPER, _SCRAMBLED, _NORM_MATCHED,
    )  # fmt: skip
    return Table(
        "kernel-size",
        "Model I: window f×f that offsets are drawn from",
        "How far may heads look?",
        _base(small),
        {**vit(small), **_MODEL_I.settings},
        rows,
        tuple(Choice(f"f = {f}", {"init.kernel_size": f}, x=f) for f in (1, 3, 5, 7)),
        "kernel size f",
        "lines",
        note="At f = 1 every token looks at itself. Random and mimetic weights have no window: one result in "
        "all columns. A scrambled head has random targets whatever f is; with f its weight norm changes.",
    )


def _sigma(data: str) -> Table:
    small = data == "digits"
    norm = {"init.method": "impulse", "init.weight_norm": 10.4 if small else 8.77}
    rows = (
        _RANDOM, _MIMETIC, replace(_MIMETIC_PAPER, everywhere=True), _IMPULSE,
        Choice("impulse at one norm", norm), replace(IMPULSE_PAPER, everywhere=True), _SCRAMBLED,
        _NORM_MATCHED,
    )  # fmt: skip
    return Table(
        "sigma",
        "Model I: softmax temperature σ",
        "Does it matter how the sharpness of a map is shared between σ and the weights?",
        _base(small),
        {**vit(small), **_MODEL_I.settings},
        rows,
        tuple(Choice(f"σ = {x:g}", {"model.options": {"scale": x}}, x=x) for x in (0.03, 0.1, 0.3, 1.0)),
        "softmax temperature σ",
        "lines",
        readings=("accuracy", "shifted-1", "start-peak", "trained-peak"),
        log_x=True,
        note="“impulse” asks for one peak, so its weight norm falls as σ grows; “at one norm” keeps the "
        f"norm of {norm['init.weight_norm']}, so its peak grows with σ. Rows as in the paper keep its σ: "
        "0.1 of impulses and r^-½ of mimetic weights. Figure 5 of the paper is another thing: maps of "
        "random queries and keys at σ = 1, 100 and 10,000.",
    )


def _data(data: str) -> Table:
    small = data == "digits"
    if small:
        steps = {128: 2, 256: 4, 512: 8}  # an epoch, in batches of 64; all of 1,000 images are 16
        columns = tuple(
            Choice(f"{n} images", {"data.train_count": n}, times=16 / each, x=n) for n, each in steps.items()
        )
        columns += (Choice("1,000 images", x=1000),)
    else:
        images, batch = _TRAIN_IMAGES[data], 512

        def times(share: float) -> float:
            return math.ceil(images / batch) / math.ceil(round(share * images) / batch)

        columns = tuple(
            Choice(f"{100 * s:g} %", {"data.train_fraction": s}, times=times(s), x=100 * s)
            for s in (0.01, 0.05, 0.1, 0.25)
        )
        columns += (Choice("100 %", x=100),)
    return Table(
        "data",
        "Model I: training images",
        "What do initial weights give where data are scarce?",
        _base(small),
        {**vit(small), **_MODEL_I.settings},
        _rows(small),
        columns,
        "training images" if small else "training images, %",
        "lines",
        log_x=True,
        note="Stratified subsets, each within the larger ones; every column has about as many optimiser "
        "steps, and so more passes over fewer images. All seeds share a subset: ± does not cover its choice.",
    )


def _convergence(data: str) -> Table:
    small = data == "digits"
    long = {"recipe.epochs": 24} if small else {"recipe.epochs": 100, "recipe.batch_size": 256}
    parts = (0.125, 0.25, 0.5, 1.0) if small else (0.1, 0.2, 0.5, 0.7, 1.0)
    return Table(
        "convergence",
        "Model I: learning curves",
        "How fast do networks learn from different initial weights, and do they end at the same place?",
        _base(small),
        {**vit(small), **_MODEL_I.settings, **long},
        _rows(small),
        (_MODEL_I,),
        "accuracy",
        "curves",
        readings=(*(f"part-{each}" for each in parts), "shifted-1"),
    )


def _shift(data: str) -> Table:
    small = data == "digits"
    mixer = {
        "model.name": "convmixer", "model.alpha": None, "model.train_mixing": False, "init.method": "impulse",
        "init.values": "mimetic", "init.offsets": None,  # as where nothing is set: it has neither
    }  # fmt: skip
    return Table(
        "shift",
        "Robustness: test images shifted by a pixel or two",
        "Does a convolutional start leave a network that minds shifts less?",
        _base(small),
        vit(small),
        (*_rows(small), Choice("ConvMixer, frozen impulses", mixer, everywhere=True)),
        (_MODEL_I,),
        "test images",
        "shifts",
        readings=("accuracy", "shifted-1", "shifted-2"),
        note=(
            "No network was trained on shifted images. "
            if small
            else "The augmentation crops and moves images, too, so shifted ones are not new to any network. "
        )
        + "The ConvMixer is another network, with its own learning rate at the papers' size: a landmark.",
    )


def _timm(data: str) -> Table:
    small = data == "digits"
    model: dict[str, Any] = {"model.name": "vit_tiny_patch16_224"}
    gain: dict[str, Any] = {"init.pos_embed_gain": 60.0}
    papers = {
        "init.method": "impulse", "init.fit": "svd", "init.offsets": "fixed",
        "init.pos_embed_gain": 18.0,
    }  # fmt: skip
    if small:
        model |= {
            "model.patch_size": 1,
            "model.options": {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
        }
        columns = (Choice("300 images", {"data.train_count": 300}), Choice("1,000 images"))
    else:
        model |= {
            "model.patch_size": 2, "model.pos_embed": None, "init.values": "mimetic", "init.fit": "newton",
            "model.options": {"class_token": True, "global_pool": "token"},
        }  # fmt: skip
        columns = (Choice("10 %", {"data.train_fraction": 0.1}), Choice("all images"))
    rows: tuple[Choice, ...] = (
        Choice("default", {"init.method": "default", "init.values": "default"}),
        Choice("default, P × 60", {"init.method": "default", "init.values": "default", **gain}),
        Choice("mimetic", {"init.method": "mimetic"}),
        Choice("mimetic, P × 60", {"init.method": "mimetic", **gain}),
        Choice("impulse f = 3, fit of 2505.19985, P × 18", papers),
        Choice("impulse f = 3, P × 60", {"init.method": "impulse", **gain}),
        Choice("impulse f = 5, P × 60", {"init.method": "impulse", "init.kernel_size": 5, **gain}),
        Choice("control: scrambled, P × 60", {"init.method": "scrambled", **gain}, control=True),
        Choice("control: norm-matched, P × 60", {"init.method": "norm_matched", **gain}, control=True),
    )
    of_2404 = {
        "model.pos_embed": "sincos", "init.fit": "adam", "init.values": "default",
        "model.options": {"class_token": False, "global_pool": "avg"},
    }  # fmt: skip
    rows += tuple(
        Choice(f"{name}, model of 2404.01139", {**of_2404, **settings})
        for name, settings in (
            ("default", {"init.method": "default", "init.fit": "newton"}),
            ("impulse f = 3", {"init.method": "impulse"}),
            ("impulse f = 5", {"init.method": "impulse", "init.kernel_size": 5}),
        )
    )
    return Table(
        "timm",
        "timm's ViT-Tiny with class token" + (", narrowed to 64 channels and 4 blocks" if small else ""),
        "What does it give in the ViT that people have?",
        "quick" if small else "2404.01139",
        model,
        rows,
        columns,
        "training images",
        "dots",
        ours="impulse f = 3, P × 60",
        note="P × g: the position embedding is enlarged g times at first. Both columns have as many epochs. "
        "The fit of arXiv 2505.19985 is its closed form, but orthogonal to the class token, to which theirs "
        "looks more, and with biases of 0. The model of arXiv 2404.01139 has no class token and a fixed "
        "sin-cos P; its impulses are made by 10,000 steps of Adam on LayerNorm(P), values are timm's.",
    )


TABLES: dict[str, Callable[[str], Table]] = {
    "convmixer": _convmixer,
    "models": _models,
    "position": _position,
    "alpha": _alpha,
    "kernel-size": _kernel_size,
    "sigma": _sigma,
    "data": _data,
    "convergence": _convergence,
    "shift": _shift,
    "timm": _timm,
}
