"""The experiments of the papers as declared grids: what is varied, how it is set, and what is read off.

A cell is a row and a column of a table; with a seed it is one training run. Every table of a ViT has two
controls: "scrambled", whose heads are fitted to random permutations of the tokens, and "norm-matched", whose
heads are random with the weight norm that the impulse would have had. A ConvMixer's are the permutations and
the random filters, which have the norm of an impulse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
        times: of a column: its runs take so many times the epochs, for data sets cut to the inverse of it.
        x: of a column: where it stands on the axis of a figure.
    """

    label: str
    settings: Settings = field(default_factory=dict)
    everywhere: bool = False
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
    note: str = ""

    def cells(self) -> list[tuple[Choice, Choice]]:
        """(row, column) of all cells that exist, row by row."""
        pairs = [(row, column) for row in self.rows for column in self.columns]
        return [pair for pair in pairs if (pair[0].label, pair[1].label) not in self.without]

    def config(self, row: Choice, column: Choice, seed: int, given: Settings) -> Config:
        """The run of a cell.

        Args:
            row, column: from `cells`.
            seed: of initial weights, image order and augmentation.
            given: settings of all cells; a row that sets the same, such as the default one its values, does.

        Raises:
            ValueError: `given` sets what the table varies, or a value is wrong.
        """
        varied = set.intersection(*(set(each.settings) for each in self.rows)) | {"run.seed"}
        varied |= {key for each in self.columns for key in each.settings}
        if taken := varied & set(given):
            raise ValueError(
                f"table {self.name!r} varies {', '.join(sorted(taken))} itself; it cannot be set for all"
            )
        settings: dict[str, Any] = {"run.tracker": "none", "run.keep": 1, **self.settings, **given}
        if not row.everywhere:
            settings |= column.settings
        settings |= {**row.settings, "run.seed": seed}
        config = resolve(self.preset, None, settings)
        if column.times == 1 or row.everywhere:
            return config
        epochs = max(1, round(config.recipe.epochs * column.times))
        longer = {"recipe.epochs": epochs, "run.eval_every": max(1, round(column.times))}
        return resolve(self.preset, None, settings | longer)


_ALL_DEFAULT = Choice("default, values too", {"init.method": "default", "init.values": "default"})
_RANDOM = Choice("random", {"init.method": "random"})
_MIMETIC = Choice("mimetic", {"init.method": "mimetic"})
_IMPULSE = Choice("impulse", {"init.method": "impulse"})
_SCRAMBLED = Choice("control: scrambled", {"init.method": "scrambled"})
_NORM_MATCHED = Choice("control: norm-matched", {"init.method": "norm_matched"})
_INITS = (_RANDOM, _MIMETIC, _IMPULSE, _SCRAMBLED, _NORM_MATCHED)
_MODEL_I = Choice("Model I", {"model.variant": "I"})


def _base(small: bool) -> str:
    return "quick" if small else "paper"


def _vit(small: bool) -> Settings:
    """Spelled out, so that cells of several tables that are the same run are known to be."""
    return {"model.alpha": 0.2, "init.kernel_size": 3 if small else 5}


def _convmixer(small: bool) -> Table:
    kinds: dict[str, Settings] = {
        "random, as learned": {"init.method": "random"},
        "impulse": {"init.method": "impulse"},
        "box": {"init.method": "box", "init.num_cells": 5},
        "gaussian": {"init.method": "gaussian"},
        "softmax of weights": {"init.method": "softmax"},
        "impulse, as N×N matrix": {"init.method": "impulse", "model.matrix_form": True},
        "control: random pixels": {"init.method": "permutation", "model.matrix_form": True},
        "control: permutation": {"init.method": "full_permutation", "model.matrix_form": True},
    }
    return Table(
        "convmixer",
        "ConvMixer: kinds of spatial filters, trained and frozen",
        "How far do random impulse filters get, and must they be learned?",
        _base(small),
        {"model.name": "convmixer"},
        tuple(Choice(label, settings) for label, settings in kinds.items()),
        (Choice("trained", {"model.train_mixing": True}), Choice("frozen", {"model.train_mixing": False})),
        "spatial filters",
        "dots",
        note="Random filters U(±1/f) have the norm of an impulse √(1/3): its norm-matched control; "
        "the two permutations look at pixels anywhere instead of near by.",
    )


def _models(small: bool) -> Table:
    names = ("vanilla", "I", "II", "III")
    columns = tuple(Choice(n if n == "vanilla" else f"Model {n}", {"model.variant": n}) for n in names)
    return Table(
        "models",
        "Models I to III and the vanilla one, from different initial queries and keys",
        "Which initial weights of queries and keys does each of the papers' models learn best from?",
        _base(small),
        _vit(small),
        (_ALL_DEFAULT, *_INITS),
        columns,
        "model",
        "dots",
        without=frozenset({(_ALL_DEFAULT.label, "Model III")}),
        note="Model III has no linear layers for queries and keys, and so no default of its own.",
    )


def _alpha(small: bool) -> Table:
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
        note="At α = 0 the maps are those of Model II.",
    )


def _kernel_size(small: bool) -> Table:
    rows = (
        Choice("random", _RANDOM.settings, everywhere=True),
        Choice("mimetic", _MIMETIC.settings, everywhere=True),
        _IMPULSE, _SCRAMBLED, _NORM_MATCHED,
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


def _sigma(small: bool) -> Table:
    norm = {"init.method": "impulse", "init.weight_norm": 10.4 if small else 8.77}
    rows = (_RANDOM, _MIMETIC, _IMPULSE, Choice("impulse at one norm", norm), _SCRAMBLED, _NORM_MATCHED)
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
        f"norm of {norm['init.weight_norm']}, so its peak grows with σ. It is not known what Figure 5 of the "
        "paper holds fixed; this table has both.",
    )


def _data(small: bool) -> Table:
    if small:
        steps = {100: 2, 200: 4, 500: 8}  # an epoch, in batches of 64; all of 1,000 images are 16
        columns = tuple(
            Choice(f"{n} images", {"data.train_count": n}, times=16 / each, x=n) for n, each in steps.items()
        )
        columns += (Choice("1,000 images", x=1000),)
    else:
        shares = (0.01, 0.05, 0.1, 0.25)
        columns = tuple(
            Choice(f"{100 * s:g} %", {"data.train_fraction": s}, times=1 / s, x=100 * s) for s in shares
        )
        columns += (Choice("100 %", x=100),)
    return Table(
        "data",
        "Model I: training images",
        "What do initial weights give where data are scarce?",
        _base(small),
        {**_vit(small), **_MODEL_I.settings},
        (_ALL_DEFAULT, *_INITS),
        columns,
        "training images" if small else "training images, %",
        "lines",
        log_x=True,
        note="Stratified subsets, each within the larger ones; every column has about as many optimiser "
        "steps, and so more passes over fewer images.",
    )


def _convergence(small: bool) -> Table:
    long = {"recipe.epochs": 24} if small else {"recipe.epochs": 100, "recipe.batch_size": 256}
    parts = (0.125, 0.25, 0.5, 1.0) if small else (0.1, 0.2, 0.5, 0.7, 1.0)
    return Table(
        "convergence",
        "Model I: learning curves",
        "How fast do networks learn from different initial weights, and do they end at the same place?",
        _base(small),
        {**{**_vit(small), **_MODEL_I.settings}, **long},
        (_ALL_DEFAULT, *_INITS),
        (_MODEL_I,),
        "accuracy",
        "curves",
        readings=(*(f"part-{each}" for each in parts), "shifted-1"),
    )


def _shift(small: bool) -> Table:
    mixer = {
        "model.name": "convmixer", "model.alpha": None, "model.train_mixing": False, "init.method": "impulse",
    }  # fmt: skip
    return Table(
        "shift",
        "Robustness: test images shifted by a pixel or two",
        "Does a convolutional start leave a network that minds shifts less?",
        _base(small),
        _vit(small),
        (_ALL_DEFAULT, *_INITS, Choice("ConvMixer, frozen impulses", mixer, everywhere=True)),
        (_MODEL_I,),
        "test images",
        "shifts",
        readings=("accuracy", "shifted-1", "shifted-2"),
        note="No network was trained on shifted images. The ConvMixer is another network: a landmark.",
    )


def _timm(small: bool) -> Table:
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
        model |= {"model.patch_size": 2}
        columns = (Choice("10 %", {"data.train_fraction": 0.1}), Choice("all images"))
    rows = (
        Choice("default", {"init.method": "default", "init.values": "default"}),
        Choice("default, P × 60", {"init.method": "default", "init.values": "default", **gain}),
        Choice("mimetic", {"init.method": "mimetic"}),
        Choice("impulse f = 3, the papers' fit, P × 18", papers),
        Choice("impulse f = 3, P × 60", {"init.method": "impulse", **gain}),
        Choice("impulse f = 5, P × 60", {"init.method": "impulse", "init.kernel_size": 5, **gain}),
        Choice("control: scrambled, P × 60", {"init.method": "scrambled", **gain}),
        Choice("control: norm-matched, P × 60", {"init.method": "norm_matched", **gain}),
    )
    return Table(
        "timm",
        "timm's ViT-Tiny with class token" + (", narrowed to 64 channels and 4 blocks" if small else ""),
        "What does it give in the ViT that people have?",
        "quick" if small else "structured",
        model,
        rows,
        columns,
        "training images",
        "dots",
        ours="impulse f = 3, P × 60",
        note="P × g: the position embedding is enlarged g times at first. Both columns have as many epochs.",
    )


TABLES: dict[str, Callable[[bool], Table]] = {
    "convmixer": _convmixer,
    "models": _models,
    "alpha": _alpha,
    "kernel-size": _kernel_size,
    "sigma": _sigma,
    "data": _data,
    "convergence": _convergence,
    "shift": _shift,
    "timm": _timm,
}
DATA = ("digits", "cifar10", "cifar100", "svhn", "tiny-imagenet")


def declared(name: str, data: str = "digits") -> Table:
    """A table for a data set: the small one for the digits, the papers' size for the others.

    Raises:
        ValueError: there is no such table or data set.
    """
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    return TABLES[name](data == "digits")


def data_settings(data: str, workers: int) -> dict[str, Any]:
    """What a data set sets in all cells."""
    if data == "digits":
        return {}
    settings: dict[str, Any] = {"data.name": data, "data.workers": workers}
    if data == "tiny-imagenet":
        settings["model.patch_size"] = 4
    return settings
