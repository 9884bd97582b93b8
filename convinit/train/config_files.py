"""Config files (TOML), presets, and what overrules what."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convinit.train.config import NONE, OWN_MODELS, SECTIONS, Config, field_of, kind_of, near

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tree = dict[str, dict[str, Any]]

PRESETS = {
    "paper": "arXiv 2401.12511: Adam 1e-4 (ConvMixer 1e-3), cosine, batch 512, 200 epochs, RandAugment.",
    "2404.01139": "arXiv: ViT-Tiny, no class token, fixed sin-cos P, AdamW 1e-3, 200 epochs, 32 px.",
    "2505.19985": "arXiv, small data sets: ViT-Tiny, AdamW 2e-3, 300 epochs, mixup, CutMix, EMA, 224 px.",
    "2505.19985-imagenet": "arXiv: ViT-Base, AdamW 1e-3, 310 epochs, as above with repeated augmentation.",
    "quick": "8×8 digits, half a minute on an idle CPU core: the settings of convinit demo.",
}


# What timm's train.py is given in the READMEs of the two papers' repositories.
_AUGMENT = {"auto_augment": "rand-m9-mstd0.5-inc1"}
_COMMON = {
    "optimizer": "adamw", "schedule": "cosine", "batch_size": 512, "warmup_lr": 1e-6, "min_lr": 1e-6,
    "decay": "matrices", "precision": "bf16",
}  # fmt: skip
_INIT_2505 = {
    "fit": "svd", "offsets": "fixed", "pos_embed_gain": 18.0, "values": "mimetic", "kernel_size": 3,
}  # fmt: skip
_MIXED = {"weight_decay": 0.05, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
_TIMM: dict[str, Tree] = {
    "2404.01139": {
        "model": {
            "name": "vit_tiny_patch16_224", "patch_size": 2, "pos_embed": "sincos",
            "options": {"class_token": False, "global_pool": "avg"},
        },
        "init": {"fit": "adam", "kernel_size": 3, "values": "default"},
        "data": {
            "name": "cifar10", "augment": "timm",
            "augment_options": {**_AUGMENT, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]},
        },
        "recipe": {
            **_COMMON, "lr": 1e-3, "epochs": 200, "warmup_epochs": 10, "weight_decay": 0.01, "eps": 1e-3,
            "clip": 3.0,
        },
    },
    "2505.19985": {
        "model": {
            "name": "vit_tiny_patch16_224", "options": {"weight_init": "skip", "drop_path_rate": 0.1},
        },
        "init": _INIT_2505,
        "data": {
            "name": "cifar10", "image_size": 224, "crop_pct": 0.875, "augment": "timm",
            "augment_options": {**_AUGMENT, "color_jitter": 0.4, "re_prob": 0.25},
        },
        # Images are normalised by the data set's own mean and std; the authors' README has ImageNet's.
        # It gives the decay of an average, though not the flag without which timm keeps none.
        "recipe": {**_COMMON, **_MIXED, "lr": 2e-3, "epochs": 300, "warmup_epochs": 50, "ema": 0.9999},
    },
    "2505.19985-imagenet": {
        "model": {
            "name": "vit_base_patch16_224", "options": {"weight_init": "skip", "drop_path_rate": 0.1},
        },
        "init": _INIT_2505,
        "data": {
            "name": "folder", "image_size": 224, "crop_pct": 0.875, "augment": "timm", "aug_repeats": 3,
            "augment_options": {**_AUGMENT, "color_jitter": 0.3, "re_prob": 0.25},
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        },
        # timm's 300 epochs do not count the cooldown; 5e-4 is for 512 images.
        "recipe": {
            **_COMMON, **_MIXED, "batch_size": 1024, "lr": 1e-3, "min_lr": 1e-5, "epochs": 310,
            "warmup_epochs": 5, "cooldown_epochs": 10,
        },
    },
}  # fmt: skip


def preset(name: str, model: str | None = None) -> Tree:
    """The settings of a preset.

    Args:
        name: of `PRESETS`.
        model: the model that will be trained, where it is not the preset's own.

    Raises:
        ValueError: there is no such preset.
    """
    if name == "paper":
        recipe = {"optimizer": "adam", "lr": 1e-3 if model == "convmixer" else 1e-4, "precision": "bf16"}
        tree: Tree = {
            "data": {"name": "cifar10", "augment": "paper"},
            "recipe": {**recipe, "schedule": "cosine", "batch_size": 512, "epochs": 200},
        }
        if model != "convmixer":
            tree["init"] = {"values": "default"}  # the paper's, as are these two
        if model in (None, "simple_vit"):
            tree["init"] |= {"kernel_size": 5, "offsets": "random"}
        return tree
    if name in _TIMM:
        tree = {section: {**part} for section, part in _TIMM[name].items()}
        if model not in (None, tree["model"]["name"]):
            del tree["model"], tree["init"]
        return tree
    if name == "quick":
        tree = {
            "init": {"kernel_size": 3},
            "data": {"name": "digits"},
            "recipe": {
                "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "schedule": "one-cycle",
                "batch_size": 64, "epochs": 8,
            },
            "run": {"cpu": True, "threads": 1, "eval_batch_size": 128, "log_every": 4},
        }  # fmt: skip
        if model in (None, *OWN_MODELS):
            tree["model"] = {"patch_size": 1, "dim": 64, "depth": 4}
        if model in (None, "simple_vit"):
            tree["model"] |= {"heads": 4, "mlp_dim": 128}
        return tree
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{near(name, PRESETS)}")


def resolve(
    preset_name: str | None = None,
    file: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """The config of preset, file and command line, of which the later ones overrule.

    Args:
        preset_name: of `PRESETS`; None means the file's own key ``preset``, if it has one.
        file: what `read_toml` returned.
        given: "section.key" → value.

    Raises:
        TypeError, ValueError: a name is unknown or a value is wrong.
    """
    tree: dict[str, Any] = {
        key: dict(part) if isinstance(part, Mapping) else part for key, part in (file or {}).items()
    }
    own_preset = tree.pop("preset", None)
    for path, value in (given or {}).items():
        section, _, key = path.partition(".")
        tree.setdefault(section, {})[key] = value
    model = tree.get("model", {})
    chosen = preset_name or own_preset
    kind = model.get("name") if isinstance(model, dict) else None
    base = {} if chosen is None else preset(chosen, kind)
    if "data" in tree and {"train_count", "train_fraction"} & {*tree["data"]}:
        for key in ("train_count", "train_fraction"):  # either replaces both of the preset
            base.get("data", {}).pop(key, None)
    if "init" in tree and {"peak", "weight_norm"} & {*tree["init"]}:
        for key in ("peak", "weight_norm"):
            base.get("init", {}).pop(key, None)
    for section, part in base.items():
        if isinstance(tree.get(section, {}), Mapping):
            tree[section] = {**part, **tree.get(section, {})}
    return Config.of(tree)


def parse(path: str, text: str | Iterable[str]) -> Any:
    """The value of "section.key" from the command line: a text, or several NAME=VALUE for a table.

    Raises:
        ValueError: it is not of the field's type.
    """
    section, _, key = path.partition(".")
    field_of(path)
    kind, optional = kind_of(SECTIONS[section], key)
    if kind is dict:
        return dict(name_and_value(path, each) for each in ([text] if isinstance(text, str) else text))
    text = str(text)
    if optional and text == NONE:
        return None
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind in (int, float, tuple):
        try:
            return tuple(map(float, text.split(","))) if kind is tuple else kind(text)
        except ValueError:
            words = {int: "a whole number", float: "a number", tuple: "numbers such as 0.5,0.4,0.4"}[kind]
            raise ValueError(f"{path} must be {words}{' or none' * optional}, got {text!r}") from None
    return text


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """ "section.key" → value, of several "SECTION.KEY=VALUE"; a table may be given entry by entry.

    Raises:
        ValueError: one is not of that form, or there is no such setting, or the value is not of its type.
    """
    given: dict[str, Any] = {}
    for each in texts:
        key, _, text = each.partition("=")
        if "." not in key or not text:
            raise ValueError(f"--set must be SECTION.KEY=VALUE, such as recipe.epochs=50, got {each!r}")
        value = parse(key, text)
        given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    return given


def name_and_value(path: str, text: str) -> tuple[str, Any]:
    """An entry of the table `path` from the command line; ValueError where the text is none."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise ValueError(f"{path} must be NAME=VALUE, such as drop_path_rate=0.1, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def read_toml(path: Path) -> dict[str, Any]:
    """A config file as section → key → value, and perhaps ``preset``.

    Raises:
        ValueError: it is no TOML. OSError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def to_toml(config: Config, *, explained: bool = False) -> str:
    """All of a config as TOML text, `read_toml` and `Config.of` read it back.

    explained: above each setting a comment with its help and its choices.
    """
    lines = []
    for section, part in config.as_dict().items():
        lines.append(f"[{section}]")
        for key, value in part.items():
            if explained:
                lines.append(f"# {explanation(field_of(f'{section}.{key}'))}")
            lines.append(f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def explanation(field: dataclasses.Field) -> str:
    """The help of a setting, with its choices where the help leaves one out."""
    text, choices = field.metadata["help"], field.metadata["choices"]
    named = all(word in text for word in choices)
    return text if named else f"{text} Of: {', '.join(choices)}."


def _toml(value: Any) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(each)}" for key, each in value.items()) + "}"
    raise TypeError(f"a config must hold numbers, texts, lists and tables, got {value!r}")
