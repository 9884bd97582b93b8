"""The experiments of the papers as declared grids: what is varied, how it is set, and what is read off.

A cell is a row and a column of a table; with a seed it is one training run. Every table of a ViT has two
controls: "scrambled", whose heads are fitted to random permutations of the tokens, and "norm-matched", whose
heads are random with the weight norm that the impulse would have had. A ConvMixer's are random filters, which
have the norm of an impulse, and for the impulses in matrix form permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convinit._words import near
from convinit.train.config import Config
from convinit.train.config_files import resolve

Settings = Mapping[str, Any]  # "section.key" → value


@dataclass(frozen=True)
class Choice:
    """A row or a column of a table.

    Attributes:
        label: its name.
        settings: what it sets.
        everywhere: of a row: the columns' settings do not concern it, so all its cells are one.
        control: of a row: it breaks the structure of the row that it is judged against.
        against: of a row: label of the row it is judged against, where that is not the table's own.
        times: of a column: its runs take so many times the epochs, for data sets cut to the inverse of it.
        x: of a column: where it stands on the axis of a figure.
    """

    label: str
    settings: Settings = field(default_factory=dict)
    everywhere: bool = False
    control: bool = False
    against: str = ""
    times: float = 1.0
    x: float | None = None


@dataclass(frozen=True)
class Table:
    """An experiment.

    Attributes:
        name: as in ``convinit reproduce NAME``.
        title, question: what it is, and what it asks.
        preset: of `convinit.train.config_files`, from which all cells start.
        settings: what all cells set.
        rows, columns: what is varied. A table with one column shows `readings` side by side instead.
        column_title: what the columns vary.
        figure: "lines" over the columns' x, "dots", "curves" over the epochs or "shifts" over pixels.
        readings: names for `convinit.reproduce.readings`; the first is the one that counts.
        ours: label of the row that the others are compared with.
        log_x: whether the figure's axis is logarithmic.
        without: (row, column) labels of cells that do not exist.
        rates: learning rates that each cell is run with; its figures are those of the rate that is best on
            validation images. None of its own: the preset's.
        note: what a reader must know of it.
    """

    name: str
    title: str
    question: str
    preset: str
    settings: Settings
    rows: tuple[Choice, ...]
    columns: tuple[Choice, ...]
    column_title: str
    figure: str
    readings: tuple[str, ...] = ("accuracy", "shifted-1")
    ours: str = "impulse"
    log_x: bool = False
    without: frozenset[tuple[str, str]] = frozenset()
    rates: tuple[float, ...] = ()
    note: str = ""

    def cells(self) -> list[tuple[Choice, Choice]]:
        """(row, column) of all cells that exist, row by row."""
        pairs = [(row, column) for row in self.rows for column in self.columns]
        return [pair for pair in pairs if (pair[0].label, pair[1].label) not in self.without]

    def config(
        self, row: Choice, column: Choice, seed: int, given: Settings, rate: float | None = None
    ) -> Config:
        """The run of a cell.

        Args:
            row, column: from `cells`.
            rate: one of `rates`.
            seed: of initial weights, image order and augmentation.
            given: settings of all cells. Tables are added to the table's own; a row that is about its values
                keeps them.

        Raises:
            ValueError: `given` sets what the table varies or what its labels and readings rest on, or a value
                is wrong.
        """
        varied = [each.settings for each in (*self.rows, *self.columns)]
        whole = {key for layer in varied for key, each in layer.items() if not isinstance(each, dict)}
        taken = (whole - _MAY_BE_SET | _NOT_TO_SET) & set(given)
        if self.rates:
            taken |= {"recipe.lr", "data.val_fraction", "data.seed"} & set(given)
        if any(each.times != 1 for each in self.columns):  # their epochs rest on it
            taken |= {"recipe.batch_size"} & set(given)
        for layer in (self.settings, *varied):
            for key, own in layer.items():
                if isinstance(own, dict) and isinstance(given.get(key), dict):
                    taken |= {f"{key}.{name}" for name in set(own) & set(given[key])}
        if taken:
            raise ValueError(
                f"table {self.name!r} sets {', '.join(sorted(taken))} itself; it cannot be set for all runs"
            )
        settings: dict[str, Any] = {"run.tracker": "none", "run.keep": 1}
        for layer in (self.settings, given, {} if row.everywhere else column.settings, row.settings):
            for key, each in layer.items():
                merged = isinstance(each, dict) and isinstance(settings.get(key), dict)
                settings[key] = {**settings[key], **each} if merged else each
        settings["run.seed"] = seed
        if settings.get("data.val_fraction") is not None:  # images are drawn anew, too
            settings["data.seed"] = seed
        if rate is not None:
            settings["recipe.lr"] = rate
        try:
            config = resolve(self.preset, None, settings)
            if column.times == 1 or row.everywhere:
                return config
            settings["recipe.epochs"] = max(1, round(config.recipe.epochs * column.times))
            settings["run.eval_every"] = max(1, round(column.times))
            if column.times > 8:  # loader processes would start anew for each of many short epochs
                settings["data.workers"] = 0
            return resolve(self.preset, None, settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"table {self.name!r}, row {row.label!r}: {error}") from error


_MAY_BE_SET = {"init.values"}  # though rows about them keep theirs
_NOT_TO_SET = {
    "model.name", "model.variant", "data.name", "run.seed", "run.eval_every", "run.keep", "run.tracker",
}  # fmt: skip

_ALL_DEFAULT = Choice("default, values too", {"init.method": "default", "init.values": "default"})
_RANDOM = Choice("random", {"init.method": "random"})
_MIMETIC = Choice("mimetic", {"init.method": "mimetic"})
_IMPULSE = Choice("impulse", {"init.method": "impulse"})
_SCRAMBLED = Choice("control: scrambled", {"init.method": "scrambled"}, control=True)
_NORM_MATCHED = Choice("control: norm-matched", {"init.method": "norm_matched"}, control=True)
_MIMETIC_PAPER = Choice(
    "mimetic, as in the paper",
    {"init.method": "mimetic", "init.distribution": "uniform", "init.values": "default"},
)
_IMPULSE_PAPER = Choice(
    "impulse, as in the paper",
    {"init.method": "impulse", "init.fit": "adam", "model.options": {"scale": 0.1}, "init.values": "default"},
)
_INITS = (_RANDOM, _MIMETIC, _MIMETIC_PAPER, _IMPULSE, _IMPULSE_PAPER, _SCRAMBLED, _NORM_MATCHED)
USUAL_ROWS = tuple(row.label for row in _INITS)
_MODEL_I = Choice("Model I", {"model.variant": "I"})


_TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tiny-imagenet": 100_000}


def _base(small: bool) -> str:
    return "quick" if small else "paper"


def _rows(small: bool) -> tuple[Choice, ...]:
    """The paper's recipe leaves all values as nn.Linear makes them, and "random" is then all default."""
    return (_ALL_DEFAULT, *_INITS) if small else _INITS


def _vit(small: bool) -> Settings:
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
        _vit(small),
        _rows(small),
        columns,
        "model",
        "dots",
        without=frozenset({(_ALL_DEFAULT.label, "Model III")}),
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
        _vit(small),
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
        {**_vit(small), **_MODEL_I.settings},
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
        _IMPULSE, _IMPULSE_PAPER, _SCRAMBLED, _NORM_MATCHED,
    )  # fmt: skip
    return Table(
        "kernel-size",
        "Model I: window f×f that offsets are drawn from",
        "How far may heads look?",
        _base(small),
        {**_vit(small), **_MODEL_I.settings},
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
        Choice("impulse at one norm", norm), replace(_IMPULSE_PAPER, everywhere=True), _SCRAMBLED,
        _NORM_MATCHED,
    )  # fmt: skip
    return Table(
        "sigma",
        "Model I: softmax temperature σ",
        "Does it matter how the sharpness of a map is shared between σ and the weights?",
        _base(small),
        {**_vit(small), **_MODEL_I.settings},
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
        {**_vit(small), **_MODEL_I.settings},
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
        {**_vit(small), **_MODEL_I.settings, **long},
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
        _vit(small),
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


# Of 60,000 training images another 1,000 or 5,000 for each seed, 2,000 to validate on.
_FASHION: Settings = {
    "data.val_fraction": 1 / 30, "recipe.weight_decay": 0.05, "recipe.clip": 1.0, "init.kernel_size": None,
    "recipe.precision": "bf16", "run.cpu": False, "run.eval_batch_size": 1000,
}  # fmt: skip
_SMALL_VIT: Settings = {
    "model.name": "vit_tiny_patch16_224", "model.options": {"embed_dim": 96, "depth": 6, "num_heads": 3},
}  # fmt: skip
_RATES = (5e-4, 1e-3, 2e-3)


def _small_vit(label: str, method: str, control: bool = False, **init: Any) -> Choice:
    settings = {f"init.{key}": value for key, value in {"method": method, **init}.items()}
    return Choice(label, {**_SMALL_VIT, **settings}, control=control)


_PLAIN_CALL = _small_vit("impulse (the plain call)", "impulse")
_FASHION_CONTROLS = (
    _small_vit("control: position embedding and values alone", "position_only", control=True),
    _small_vit("control: scrambled", "scrambled", control=True),
    _small_vit("control: norm-matched", "norm_matched", control=True),
)
_LEARNED_CONVMIXER = Choice(
    "ConvMixer, learned filters",
    {
        "model.name": "convmixer", "model.dim": 96, "model.depth": 6, "init.method": "random",
        "init.values": "mimetic", "init.kernel_size": 5,
    },
)  # fmt: skip
_FASHION_NOTE = (
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
        _FASHION,
        (
            _small_vit("timm's own", "default", values="default"),
            _small_vit("mimetic", "mimetic"),
            _small_vit(
                "impulse, fit of 2505.19985, P × 18", "impulse", fit="svd", offsets="fixed",
                pos_embed_gain=18.0, kernel_size=3,
            ),
            _PLAIN_CALL,
            *_FASHION_CONTROLS,
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
        rates=_RATES,
        note=f"A class token, width 96, 6 layers, 3 heads. {_FASHION_NOTE}",
    )  # fmt: skip


def _window(data: str) -> Table:
    return Table(
        "window",
        "Where the convolution matters: windows on 14 × 14 tokens of Fashion-MNIST",
        "Must heads look near, far, or anywhere, once the position embedding is in order?",
        "quick",
        {**_FASHION, "model.patch_size": 2, "data.train_count": 1000, "recipe.epochs": 16},
        (
            *(_small_vit(f"impulse, f = {f}", "impulse", kernel_size=f) for f in (1, 3, 5)),
            _PLAIN_CALL,
            _small_vit("impulse, f = 13", "impulse", kernel_size=13),
            *_FASHION_CONTROLS,
            _LEARNED_CONVMIXER,
        ),
        (Choice("1,000 images"),),
        "test images",
        "shifts",
        readings=("accuracy", "shifted-1", "shifted-2", "shifted-4"),
        ours=_PLAIN_CALL.label,
        rates=_RATES,
        note=f"The plain call draws from half the grid, f = 7. {_FASHION_NOTE}",
    )


def _fashion_models(data: str) -> Table:
    own = _models("fashion-mnist")
    size = {
        "model.patch_size": 2, "model.dim": 96, "model.depth": 6, "model.heads": 3, "model.mlp_dim": 192,
        "data.train_count": 1000, "recipe.epochs": 16,
    }  # fmt: skip
    return replace(
        own,
        title=f"{own.title}, on 14 × 14 tokens of Fashion-MNIST",
        preset="quick",
        settings={**_FASHION, **_vit(small=False), **size},
        rates=_RATES,
        note=f"Width 96, 6 layers, 3 heads. {_FASHION_NOTE}",
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
FASHION_TABLES: dict[str, Callable[[str], Table]] = {
    "drop-in": _drop_in, "window": _window, "models": _fashion_models,
}  # fmt: skip
DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet")


def tables_of(data: str) -> Mapping[str, Callable[[str], Table]]:
    """The tables that there are for a data set, by name."""
    return FASHION_TABLES if data == "fashion-mnist" else TABLES


def declared(name: str, data: str = "digits") -> Table:
    """A table for a data set: small ones for the digits and Fashion-MNIST, else the papers' size.

    Raises:
        ValueError: there is no such table or data set.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}{near(data, DATA)}")
    tables = tables_of(data)
    if name not in tables:
        other = " (with --data fashion-mnist)" if name in FASHION_TABLES else ""
        raise ValueError(
            f"table must be one of {', '.join(tables)} for {data}, got {name!r}{other or near(name, tables)}"
        )
    table = tables[name](data)
    own: dict[str, Any] = {} if data == "digits" else {"data.name": data}
    if data == "tiny-imagenet":
        own["model.patch_size"] = 4  # of 64 pixels
    papers = any(row.settings == _IMPULSE_PAPER.settings for row in table.rows)
    parts = (table.note, _AS_IN_THE_PAPER if papers else "", _SMALL if papers and data == "digits" else "")
    note = " ".join(part for part in parts if part)
    return replace(table, settings={**table.settings, **own}, note=note)


_AS_IN_THE_PAPER = (
    "As in the paper (arXiv 2401.12511): impulses by 10,000 steps of Adam at σ = 0.1, fitted to P whatever α "
    "is; mimetic noise uniform, of a third of the variance; values and output layer as nn.Linear makes them. "
    "Its random weights are those of nn.Linear."
)
_SMALL = (
    "At the size of these networks that fit hardly makes maps (peak 0.03, uniform attention having 0.016); "
    "at the paper's size it does (0.32)."
)
