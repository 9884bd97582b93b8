"""What a training run is: one tree of frozen dataclasses, checked when it is made.

The fields below are the one table of options: the keys of a config file, the options of ``convinit train``
with their help, and what is compared when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convinit._words import near

__all__ = ["Config", "DataConfig", "InitConfig", "ModelConfig", "RecipeConfig", "RunConfig"]

NONE = "none"  # how files and the command line write None


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] = (),
    families: Sequence[str] = (),
    hint: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    fixed: bool = True,
    later: bool = False,
    unset: str = NONE,
) -> Any:
    """A field with its help, its range and how it is called on the command line.

    Args:
        default: its value, or a type for a mutable one.
        help: one line; what it is, with its unit.
        flag: of `convinit train`, if it has one that is not the field's name.
        choices: the values that it may have; beside them
        families: those that begin so, with a name of their own behind it.
        hint: the end of a message where a value is near to none of them.
        low, above, high, below: the range, with and without its ends.
        fixed: a resumed run must have the value that it started with.
        later: it came after runs were kept. At its default it is no part of their identity.
        unset: what None stands for, in words.
    """
    metadata = {
        "help": help, "flag": flag, "choices": tuple(choices), "families": tuple(families), "hint": hint,
        "fixed": fixed, "later": later, "unset": unset,
        "low": low, "above": above, "high": high, "below": below,
    }  # fmt: skip
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class _Section:
    """Types and ranges of all fields are checked; a subclass adds what several fields must agree on."""

    def __post_init__(self) -> None:
        section = next(name for name, kind in SECTIONS.items() if isinstance(self, kind))
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            path, kind = f"{section}.{each.name}", kind_of(type(self), each.name)
            value = _checked(path, getattr(self, each.name), kind, each)
            object.__setattr__(self, each.name, value)
        self.check()

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The network. A field that its kind of model does not have must be None."""

    name: str = option(
        "simple_vit",
        "simple_vit, convmixer, any model of timm by its name, torchvision:VisionTransformer or "
        "vit-pytorch:SimpleViT.",
        flag="model",
    )
    variant: str | None = option(
        None, "Of simple_vit: the paper's Models.", choices=("vanilla", "I", "II", "III"), unset="I"
    )
    patch_size: int | None = option(
        None, "Pixels on a side of a patch.", low=1, unset="2; a timm model's own; other libraries need it"
    )
    dim: int | None = option(None, "Width of the tokens, or channels of convmixer.", low=1, unset="512")
    depth: int | None = option(None, "Blocks.", low=1, unset="6")
    pos_embed: str | None = option(
        None, "Position embedding of a timm model; sincos is fixed.", choices=("sincos",), unset="its own"
    )
    heads: int | None = option(None, "Heads of a layer of simple_vit.", low=1, unset="8")
    head_dim: int | None = option(None, "Width of a head.", low=1, unset="dim / heads")
    mlp_dim: int | None = option(None, "Hidden width of the MLP of simple_vit.", low=1, unset="dim")
    alpha: float | None = option(
        None, "Content share of queries and keys of simple_vit, 0 to 1.", low=0, high=1, unset="0.2"
    )
    train_mixing: bool = option(
        True, "Train queries and keys, or the filters of convmixer; off freezes them."
    )
    matrix_form: bool = option(False, "convmixer mixes by N×N matrices instead of filters.")
    num_filters: int | None = option(
        None, "Filters of a convmixer layer, shared by its channels.", low=1, unset="one a channel"
    )
    share_layers: bool = option(False, "All convmixer layers share one set of filters.")
    options: dict[str, Any] = option(
        dict, "NAME=VALUE for the model's constructor, or timm.create_model; may be repeated.", flag="option"
    )

    def check(self) -> None:
        _name("model.name", self.name)
        wrong = {
            "simple_vit": ("matrix_form", "num_filters", "share_layers", "pos_embed"),
            "convmixer": ("variant", "heads", "head_dim", "mlp_dim", "alpha", "pos_embed"),
        }.get(
            self.name,
            ("variant", "dim", "depth", "heads", "head_dim", "mlp_dim", "alpha", "train_mixing",
             "matrix_form", "num_filters", "share_layers"),
        )  # fmt: skip
        if self.name in LIBRARY_MODELS:
            wrong = (*wrong, "pos_embed")
        for key in wrong:
            if getattr(self, key) != default_of(ModelConfig, key):
                hint = "" if self.name in OWN_MODELS else "; its library's arguments go into model.options"
                raise ValueError(f"model.{key} must not be set for model {self.name!r}, which has none{hint}")


OWN_MODELS = ("simple_vit", "convmixer")
LIBRARY_MODELS = ("torchvision:VisionTransformer", "vit-pytorch:SimpleViT")
VIT_INITS = ("impulse", "mimetic", "random", "default", "scrambled", "norm_matched", "position_only")
_FILTER_INITS = (
    "impulse", "random", "box", "gaussian", "softmax", "permutation", "full_permutation",
)  # fmt: skip


@dataclass(frozen=True)
class InitConfig(_Section):
    """The initial weights."""

    method: str = option(
        "impulse",
        "Of queries and keys: impulse (ours), mimetic, random, default (as the model draws them), and the "
        "controls scrambled, norm_matched and, in libraries' models, position_only. Of convmixer's filters: "
        "impulse, random, box, gaussian, softmax, permutation, full_permutation.",
        flag="init",  # a model's own choices are checked in Config
    )
    values: str = option(
        "mimetic",
        "Of values and output layer; default: as the model draws them.",
        choices=("mimetic", "default"),
        flag="init-values",
    )
    kernel_size: int | None = option(
        None, "f: offsets are drawn from an f×f window of tokens; odd.", low=1,
        unset="half the grid, 3 to 7; 5 in convmixer",
    )  # fmt: skip
    peak: float | None = option(
        None, "Mean attention on the target at the start.", above=0, below=1, unset="0.7"
    )
    weight_norm: float | None = option(
        None, "Norm of each head's W_q and W_k, instead of the peak.", above=0, unset="as the peak needs"
    )
    fit: str = option(
        "newton", "Solver of the fit: ours, or the papers', which fit P whatever alpha is.",
        choices=("newton", "adam", "svd"),
    )  # fmt: skip
    distribution: str = option(
        "normal", "Of the noise in mimetic queries and keys: normal, or the paper's uniform, a third of its "
        "variance.", choices=("normal", "uniform"),
    )  # fmt: skip
    padding_mode: str = option(
        "zeros", "Where tokens look whose target is off the grid.",
        choices=("zeros", "replicate", "circular", "reflect"),
    )  # fmt: skip
    offsets: str | None = option(
        None, "How heads are dealt their offsets.", choices=("random", "fixed"),
        unset="each window cell equally often",
    )  # fmt: skip
    pos_embed_gain: float | None = option(
        None, "Multiplies a timm model's position embedding at the start.", above=0, unset="1"
    )
    num_cells: int | None = option(None, "Cells of convmixer's box filters.", low=1, unset="9")
    variance: float | None = option(None, "Of convmixer's gaussian filters, in cells².", above=0, unset="1")

    def check_options(self) -> None:
        """What `InitOptions` refuses. It loads PyTorch, so all else is checked first."""
        if self.method in VIT_INITS:
            from convinit.init.options import InitOptions

            try:
                InitOptions(**self.of_queries_keys())
            except ValueError as error:
                own = re.sub(r"\b(peak|weight_norm|kernel_size|offsets)\b", r"init.\1", str(error))
                raise ValueError(own) from None

    def of_queries_keys(self) -> dict[str, Any]:
        """What `SimpleViT`, `init_vit_` and `InitOptions` take alike."""
        names = ("method", "fit", "values", "kernel_size", "peak", "weight_norm", "padding_mode", "offsets",
                 "distribution")  # fmt: skip
        return {name: getattr(self, name) for name in names}


DATA_SETS = (
    "cifar10", "cifar100", "svhn", "fashion-mnist", "stl10", "food101", "flowers102", "pets", "tiny-imagenet",
    "digits", "folder", "npz", "dataset",
)  # fmt: skip
DATA_FAMILIES = ("torchvision:", "hf:")  # of data sets that others name
DATA_HINT = (
    "for images of your own it is folder or npz, with their path as data.root (--root); for others' such as "
    "torchvision:MNIST"
)


@dataclass(frozen=True)
class DataConfig(_Section):
    """The images."""

    name: str = option(
        "cifar10",
        "Data set: cifar10, cifar100, svhn, fashion-mnist, stl10, food101, flowers102, pets, tiny-imagenet, "
        "digits; torchvision:NAME, any other of torchvision; hf:NAME, of the Hugging Face Hub, or hf:FOLDER, "
        "of Parquet; folder or npz, your own images (see --root); dataset, given from Python.",
        choices=DATA_SETS, families=DATA_FAMILIES, hint=DATA_HINT, flag="data",
    )  # fmt: skip
    root: str | None = option(
        None, "Folder of the data set; with --data folder, of your own images, one folder a class; with "
        "--data npz, the file.",
        fixed=False, unset="the data set's usual place",
    )  # fmt: skip
    download: bool = option(False, "Fetch the data set if it is not there.", fixed=False)
    options: dict[str, Any] = option(
        dict, "NAME=VALUE for torchvision's class, such as split=letters, or for datasets.load_dataset, such "
        "as name=SUBSET; may be repeated.",
    )  # fmt: skip
    mean: tuple[float, ...] | None = option(
        None, "Mean of each channel, of pixels in 0 to 1: one number for grey, three for RGB.", low=0, high=1,
        unset="published, or measured on training images",
    )  # fmt: skip
    std: tuple[float, ...] | None = option(
        None, "Standard deviation of each channel, likewise.", above=0, high=1,
        unset="published, or measured on training images",
    )  # fmt: skip
    train_count: int | None = option(
        None, "Train on this many images, as many of each class.", low=1, unset="all"
    )
    train_fraction: float | None = option(
        None, "Train on this share of the images.", above=0, high=1, unset="all"
    )
    val_fraction: float | None = option(
        None,
        "Validate on this share of the training images; the test images are then met once, at the end.",
        above=0,
        below=1,
        unset="no validation",
    )
    seed: int = option(0, "Of the choice of those images; the same for all runs.", low=0, high=2**63 - 1)
    augment: str = option(
        "none", "Augmentation of the training images; paper: RandAugment(2, 14), flip, random resized crop; "
        "timm: timm.data.create_transform.", choices=("none", "flip-crop", "paper", "timm"),
    )  # fmt: skip
    augment_options: dict[str, Any] = option(
        dict, "NAME=VALUE for create_transform, such as auto_augment=rand-m9-mstd0.5-inc1; may be repeated.",
    )  # fmt: skip
    aug_repeats: int = option(
        1, "Repeated augmentation: an epoch has an image so often in a row, augmented anew each time, and "
        "as many images as ever, so only a part of the different ones.", low=1, later=True,
    )  # fmt: skip
    image_size: int | None = option(
        None, "Pixels on a side that images are resized to.", low=1, unset="as stored"
    )
    crop_pct: float = option(
        1.0, "Side of the window that is cut out of a test image, as a share of the image's.", above=0, high=1
    )
    workers: int = option(0, "Processes that load images, for each training process.", low=0, fixed=False)

    def check(self) -> None:
        if self.train_count is not None and self.train_fraction is not None:
            raise ValueError(
                f"give data.train_count or data.train_fraction, not both; got {self.train_count} and "
                f"{self.train_fraction}"
            )
        if self.aug_repeats > 1 and self.augment == "none":
            raise ValueError(
                f"data.aug_repeats must be 1 without augmentation, got {self.aug_repeats}: set data.augment"
            )
        check_statistics(self.mean, self.std)
        if self.options and not self.name.startswith(DATA_FAMILIES):
            raise ValueError(
                f"data.options must not be set for {self.name!r}, but for torchvision:NAME or hf:NAME, got "
                f"{self.options}"
            )


def check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuses means and standard deviations that are not for 1 or 3 channels, do not agree or are 0."""
    for name, each in (("mean", mean), ("std", std)):
        if each is not None and len(each) not in (1, 3):
            raise ValueError(f"data.{name} must be one number for grey or three for RGB, got {list(each)}")
    if std is not None and not all(each > 0 for each in std):
        raise ValueError(f"data.std must be above 0, got {list(std)}")
    if mean is not None and std is not None and len(mean) != len(std):
        raise ValueError(f"data.std must have as many numbers as data.mean, {len(mean)}, got {list(std)}")


@dataclass(frozen=True)
class RecipeConfig(_Section):
    """How the weights are learnt."""

    epochs: int = option(200, "Passes over the training images.", low=1)
    batch_size: int = option(512, "Images in a step, of all processes together.", low=1)
    drop_last: bool = option(False, "Leave out an epoch's last batch if it is smaller than the others.")
    optimizer: str = option("adamw", "Optimiser.", choices=("adam", "adamw", "sgd"))
    lr: float = option(1e-3, "Largest learning rate.", above=0)
    weight_decay: float = option(0.0, "Weight decay.", low=0)
    decay: str = option(
        "all", "What decays: all, or matrices alone (no biases, norms, position embeddings; as timm does).",
        choices=("all", "matrices"),
    )  # fmt: skip
    momentum: float = option(0.9, "Of sgd.", low=0, below=1)
    beta1: float = option(0.9, "Of adam and adamw.", low=0, below=1)
    beta2: float = option(0.999, "Of adam and adamw.", low=0, below=1)
    eps: float = option(1e-8, "Of adam and adamw.", above=0)
    schedule: str = option(
        "cosine", "Learning rate over the steps.", choices=("cosine", "one-cycle", "constant")
    )
    warmup_epochs: float = option(0.0, "Epochs in which the learning rate rises linearly.", low=0)
    warmup_lr: float = option(1e-6, "Learning rate at the start of the warm-up.", above=0)
    min_lr: float = option(0.0, "Learning rate at the end of the cosine.", low=0)
    cooldown_epochs: float = option(
        0.0, "The last of the epochs, behind the end of the cosine, at min_lr.", low=0, later=True
    )
    clip: float | None = option(None, "Largest norm of the whole gradient.", above=0, unset="no limit")
    label_smoothing: float = option(0.0, "Label smoothing.", low=0, below=1)
    mixup: float = option(0.0, "Mixup: α of its Beta distribution; 0 is none. Needs torchvision.", low=0)
    cutmix: float = option(
        0.0, "CutMix: α of its Beta distribution; 0 is none. With both, one is drawn each step.", low=0
    )
    ema: float | None = option(
        None, "Decay of an exponential moving average of the weights, evaluated beside them.",
        above=0, below=1, unset="no average",
    )  # fmt: skip
    precision: str = option("no", "Mixed precision.", choices=("no", "bf16", "fp16"))
    compile: bool = option(False, "Compile the model with torch.compile.")

    def check(self) -> None:
        if self.schedule == "one-cycle" and (self.warmup_epochs or self.min_lr):
            raise ValueError(
                "recipe.warmup_epochs and recipe.min_lr must be 0 with schedule one-cycle, which has its own "
                f"warm-up and end, got {self.warmup_epochs} and {self.min_lr}"
            )
        cycled = {"sgd": "momentum"}.get(self.optimizer, "beta1")
        if self.schedule == "one-cycle" and getattr(self, cycled) != default_of(RecipeConfig, cycled):
            raise ValueError(
                f"recipe.{cycled} must not be set with schedule one-cycle, which moves it between 0.85 and "
                f"0.95, got {getattr(self, cycled)}"
            )
        if self.cooldown_epochs and self.schedule != "cosine":
            raise ValueError(
                f"recipe.cooldown_epochs must be 0 with schedule {self.schedule}, got {self.cooldown_epochs}"
            )
        if self.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"recipe.cooldown_epochs must be below epochs = {self.epochs}, got {self.cooldown_epochs}"
            )
        if self.warmup_epochs > self.epochs - self.cooldown_epochs:
            less = f" less cooldown_epochs = {self.cooldown_epochs}" if self.cooldown_epochs else ""
            raise ValueError(
                f"recipe.warmup_epochs must be at most epochs = {self.epochs}{less}, got {self.warmup_epochs}"
            )
        for name in ("warmup_lr", "min_lr"):
            used = name == "min_lr" or self.warmup_epochs
            if used and getattr(self, name) > self.lr:
                raise ValueError(f"recipe.{name} must be at most lr = {self.lr}, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig(_Section):
    """What surrounds the training. But for the seed, nothing here changes more than rounding."""

    seed: int = option(0, "Of initial weights, image order, augmentation and dropout.", low=0, high=2**63 - 1)
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.", fixed=False)
    threads: int | None = option(
        None, "CPU threads of each process; with another number sums round otherwise.", low=1, fixed=False,
        unset="torch's own choice",
    )  # fmt: skip
    eval_every: int = option(
        1, "Epochs between two tests; the last epoch is always tested.", low=1, fixed=False
    )
    eval_batch_size: int = option(512, "Test images at once, of all processes together.", low=1, fixed=False)
    log_every: int = option(
        20,
        "Steps between two records of the loss; NaN, and with several processes signals, are seen as often.",
        low=1,
        fixed=False,
    )
    checkpoint_minutes: float | None = option(
        10.0, "Minutes between two checkpoints.", above=0, fixed=False, unset="not by the clock"
    )
    checkpoint_epochs: int | None = option(
        None, "Epochs between two checkpoints.", low=1, fixed=False, unset="not by epochs"
    )
    checkpoint_steps: int | None = option(
        None, "Steps between two checkpoints.", low=1, fixed=False, unset="not by steps"
    )
    keep: int = option(2, "Checkpoints that are kept, the latest ones.", low=1, fixed=False)
    tracker: str = option(
        "auto", "Where curves go beside metrics.jsonl; auto is tensorboard where it is installed.",
        choices=("auto", "tensorboard", "wandb", "none"), fixed=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A whole training run.

    Attributes:
        model, init, data, recipe, run: the sections; a config file has a table for each.

    Raises:
        TypeError, ValueError: a value is out of range, or several do not agree.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        kinds = {"convmixer": _FILTER_INITS, "simple_vit": VIT_INITS[:-1]}.get(self.model.name, VIT_INITS)
        if self.init.method not in kinds:
            raise ValueError(
                f"init.method must be one of {', '.join(kinds)} for model {self.model.name!r}, got "
                f"{self.init.method!r}{near(self.init.method, kinds)}"
            )
        fields = {
            "convmixer": (
                "values",
                "peak",
                "weight_norm",
                "fit",
                "distribution",
                "padding_mode",
                "offsets",
                "pos_embed_gain",
            ),
            "simple_vit": ("pos_embed_gain", "num_cells", "variance"),
        }
        for key in fields.get(self.model.name, ("num_cells", "variance")):
            if getattr(self.init, key) != default_of(InitConfig, key):
                raise ValueError(f"init.{key} must not be set for model {self.model.name!r}, which has none")
        self.init.check_options()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Section → key → value."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """ "section.key" → value."""
        return {f"{s}.{key}": value for s, part in self.as_dict().items() for key, value in part.items()}

    def differing(self, other: Config) -> list[str]:
        """The keys that a resumed run may not change and that differ, as "key: ours, not theirs"."""
        ours, theirs = self.flat(), other.flat()
        return [
            f"{key}: {ours[key]}, not {theirs[key]}"
            for key in ours
            if field_of(key).metadata["fixed"] and ours[key] != theirs[key]
        ]

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Config:
        """From section → key → value; what is not there has its default.

        Raises:
            TypeError, ValueError: a section or key is unknown, or a value is wrong.
        """
        if not isinstance(tree, Mapping):
            raise TypeError(f"a config must be made of a mapping of tables, got {tree!r:.80}")
        for name, part in tree.items():
            if name not in SECTIONS:
                raise ValueError(
                    f"a config has the tables {', '.join(SECTIONS)}, got {name!r}{near(str(name), SECTIONS)}"
                )
            if not isinstance(part, Mapping):
                raise TypeError(f"{name} must be a table of keys, got {part!r}")
            for key in part:
                field_of(f"{name}.{key}")
        return Config(**{name: section(**tree.get(name, {})) for name, section in SECTIONS.items()})


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig, "init": InitConfig, "data": DataConfig, "recipe": RecipeConfig, "run": RunConfig,
}  # fmt: skip


# Once for each: a table of experiments asks for the same fields thousands of times.
@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section)


def field_of(path: str) -> dataclasses.Field:
    """The field of "section.key"; ValueError with those that there are."""
    section, _, key = path.partition(".")
    if section not in SECTIONS:
        raise ValueError(f"a setting is of one of {', '.join(SECTIONS)}, got {path!r}")
    fields = {each.name: each for each in dataclasses.fields(SECTIONS[section])}
    if key not in fields:
        raise ValueError(f"[{section}] has no key {key!r}; it has {', '.join(fields)}{near(key, fields)}")
    return fields[key]


def default_of(section: type, key: str) -> Any:
    """A field's default."""
    each = {each.name: each for each in dataclasses.fields(section)}[key]
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


def kind_of(section: Any, key: str) -> tuple[type, bool]:
    """A field's type, and whether it may be None."""
    hint = _hints(section)[key]
    optional = isinstance(hint, types.UnionType)
    if isinstance(hint, types.UnionType):
        hint = next(each for each in hint.__args__ if each is not types.NoneType)
    return typing.get_origin(hint) or hint, optional


def _checked(name: str, value: Any, kind: tuple[type, bool], each: dataclasses.Field) -> Any:
    wanted, optional = kind
    value = _plain_scalar(value)
    if optional and (value is None or (isinstance(value, str) and value == NONE)):
        return None
    if wanted is tuple:
        given = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(name, number, (float, False), each) for number in given)
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if wanted is float and number:
        value = float(value)
    elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text",
            dict: "a table",
        }
        raise TypeError(f"{name} must be {words[wanted]}{' or none' * optional}, got {value!r}")
    if wanted is dict:
        return {str(key): _plain(f"{name}.{key}", each) for key, each in value.items()}
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    limits = each.metadata
    if limits["choices"]:
        check_choice_or_family(name, value, limits["choices"], limits["families"], limits["hint"])
    bounds = (
        ("low", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("high", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    )
    given = [(words, limits[key], inside) for key, words, inside in bounds if limits[key] is not None]
    if not all(inside(limit) for _, limit, inside in given):
        ranges = " and ".join(f"{words} {limit}" for words, limit, _ in given)
        raise ValueError(f"{name} must be {ranges}, got {value}")
    return value


def check_choice_or_family(
    name: str, value: str, choices: Sequence[str], families: Sequence[str] = (), hint: str = ""
) -> None:
    """ValueError, with the nearest one or else a hint, where a value is no choice and of no family."""
    if value in choices or any(value.startswith(each) and value != each for each in families):
        return
    own = value.partition(":")[2] or "NAME"
    nearest = near(value, [*choices, *(each + own for each in families)])
    listed = ", ".join([*choices, *(f"{each}NAME" for each in families)])
    raise ValueError(f"{name} must be one of {listed}, got {value!r}{nearest or hint and f'; {hint}'}")


def _plain_scalar(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's, paths as texts."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _plain(path: str, value: Any) -> Any:
    """What a config file can hold; tuples come back from it as lists."""
    value = _plain_scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{path}.{key}", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(path, each) for each in value]
    if not isinstance(value, str | bool | int | float):
        raise TypeError(f"{path} must be a number, a text, true, false, a list or a table, got {value!r}")
    return value


def _name(key: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{key} must not be empty")
