from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convinit.cli.train import _fields
from convinit.train.build import build_model
from convinit.train.config import SECTIONS, Config, DataConfig, ModelConfig, RecipeConfig, default_of, kind_of
from convinit.train.config_files import PRESETS, parse, read_toml, resolve, to_toml


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_toml_holds_the_whole_config(name, tmp_path):
    given = {"model.options": {"backend": "eager", "rates": [0.5, 1e-7], "deep": {"a b": True}}}
    config = resolve(name, given=given | {"data.root": 'a "b"\\\n\x7fü😀', "recipe.ema": 0.999})
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert Config.of(read_toml(path)) == config
    assert resolve("quick", read_toml(path)) == config  # a whole file leaves nothing of a preset


def test_command_line_over_file_over_preset():
    file = {"preset": "quick", "recipe": {"lr": 0.5, "epochs": 3}}
    config = resolve(None, file, {"recipe.lr": 0.25})
    assert (config.recipe.lr, config.recipe.epochs, config.recipe.batch_size) == (0.25, 3, 64)
    assert resolve("paper", file).recipe.batch_size == 512  # the command line's preset, not the file's
    assert resolve(None, {"init": {"peak": "none"}}).init.peak is None


def test_presets_hold_for_every_kind_of_model():
    for name in PRESETS:
        for model in ("simple_vit", "convmixer", "vit_tiny_patch16_224"):
            assert resolve(name, given={"model.name": model}).model.name == model
    paper = resolve("paper").recipe
    assert (paper.optimizer, paper.lr, paper.schedule, paper.batch_size) == ("adam", 1e-4, "cosine", 512)
    assert resolve("paper", given={"model.name": "convmixer"}).recipe.lr == 1e-3


def test_presets_are_the_recipes_of_the_authors():
    """What timm's train.py is given in the READMEs of the repositories of 2404.01139 and 2505.19985."""
    config = resolve("2404.01139")
    assert (config.model.pos_embed, config.model.patch_size) == ("sincos", 2)
    assert config.model.options == {"class_token": False, "global_pool": "avg"}
    assert (config.init.method, config.init.fit, config.init.values) == ("impulse", "adam", "default")
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    assert (config.data.augment, config.data.augment_options) == ("timm", options)
    recipe = config.recipe
    assert (recipe.optimizer, recipe.lr, recipe.epochs, recipe.batch_size) == ("adamw", 1e-3, 200, 512)
    assert (recipe.warmup_epochs, recipe.warmup_lr, recipe.min_lr) == (10, 1e-6, 1e-6)
    assert (recipe.weight_decay, recipe.eps, recipe.clip) == (0.01, 1e-3, 3.0)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.ema) == (0, 0, 0, None)

    config = resolve("2505.19985")
    assert config.model.options == {"weight_init": "skip", "drop_path_rate": 0.1}
    assert (config.init.fit, config.init.offsets, config.init.pos_embed_gain) == ("svd", "fixed", 18.0)
    assert (config.data.image_size, config.data.crop_pct) == (224, 0.875)
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "re_prob": 0.25}
    assert (config.data.augment, config.data.augment_options) == ("timm", options)
    recipe = config.recipe
    assert (recipe.optimizer, recipe.lr, recipe.epochs, recipe.batch_size) == ("adamw", 2e-3, 300, 512)
    assert (recipe.warmup_epochs, recipe.warmup_lr, recipe.min_lr) == (50, 1e-6, 1e-6)
    assert (recipe.weight_decay, recipe.eps, recipe.clip) == (0.05, 1e-8, None)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.ema) == (0.8, 1.0, 0.1, 0.9999)
    imagenet = resolve("2505.19985-imagenet")
    assert (imagenet.model.name, imagenet.model.options) == ("vit_base_patch16_224", config.model.options)
    assert imagenet.init == config.init
    assert (imagenet.data.name, imagenet.data.aug_repeats, imagenet.data.crop_pct) == ("folder", 3, 0.875)
    assert imagenet.data.augment_options == {**options, "color_jitter": 0.3}
    recipe = imagenet.recipe
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.ema) == (5e-4 * 1024 / 512, 1024, 310, None)
    assert (recipe.warmup_epochs, recipe.cooldown_epochs, recipe.min_lr) == (5, 10, 1e-5)
    assert (recipe.weight_decay, recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.05, 0.8, 1.0, 0.1)
    # Of another model the recipe and the images remain.
    assert resolve("2404.01139", given={"model.name": "simple_vit"}).init.fit == "newton"


def test_layers_are_linear_defaults_where_timm_skips_its_own():
    """weight_init = skip leaves P and the class token undrawn in timm; they are drawn as timm would."""
    pytest.importorskip("timm")
    small = {"embed_dim": 64, "depth": 1, "num_heads": 2, "weight_init": "skip"}
    given = {"model.options": small, "model.patch_size": 4, "init.pos_embed_gain": 1.0}
    models = [
        build_model(resolve("2505.19985", given=given), image_size=32, channels=3, num_classes=10)
        for _ in range(2)
    ]
    for first, second in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(first, second)
    assert models[0].pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert models[0].cls_token.abs().max() < 1e-5
    assert models[0].blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    with pytest.raises(ValueError, match="model.options must not name trained weights"):
        given["model.options"] = small | {"pretrained": True}
        build_model(resolve("2505.19985", given=given), image_size=32, channels=3, num_classes=10)


def test_fixed_sincos_position_of_a_timm_model(monkeypatch):
    """timm's build_sincos2d_pos_embed, frozen; the fit sees its LayerNorm, as arXiv 2404.01139."""
    timm = pytest.importorskip("timm")
    from convinit import fit_qk, sample_offsets

    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    given = {"model.options": small, "init.fit": "svd", "model.patch_size": 4}
    config = resolve("2404.01139", given=given)
    model = build_model(config, image_size=16, channels=3, num_classes=10)
    P = timm.layers.build_sincos2d_pos_embed((4, 4), 32)
    assert torch.equal(model.pos_embed[0], P) and not model.pos_embed.requires_grad
    seeded = torch.Generator().manual_seed(0)
    offsets = sample_offsets(2, 3, stratified=True, generator=seeded)
    seen = torch.nn.functional.layer_norm(P, (32,), eps=1e-6)
    fit = fit_qk(seen, offsets, (4, 4), 16, scale=0.25, fit="svd", generator=seeded)
    wq = model.blocks[0].attn.qkv.weight[:32].unflatten(0, (2, 16)).mT
    assert (wq - fit.wq).norm() <= 0.05 * fit.wq.norm()  # whose noise is drawn after other things
    raw = fit_qk(P, offsets, (4, 4), 16, scale=0.25, fit="svd", generator=seeded)
    assert (wq - raw.wq).norm() > 0.2 * fit.wq.norm()
    with pytest.raises(ValueError, match="sincos is for embeddings of patches alone"):
        given = {"model.options": small | {"class_token": True, "global_pool": "token"}}
        build_model(resolve("2404.01139", given=given), image_size=16, channels=3, num_classes=10)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("recipe.lr", 0, "lr must be above 0, got 0"),
        ("recipe.lr", float("inf"), "lr must be finite"),
        ("recipe.lr", True, "lr must be a number, got True"),
        ("recipe.epochs", 1.5, "epochs must be a whole number, got 1.5"),
        ("recipe.epochs", 0, "epochs must be at least 1"),
        ("recipe.clip", "x", "clip must be a number or none, got 'x'"),
        ("recipe.label_smoothing", 1, "at least 0 and below 1, got 1"),
        ("recipe.optimizer", "lion", "optimizer must be one of adam, adamw, sgd, got 'lion'"),
        ("recipe.warmup_epochs", 201, "at most epochs = 200"),
        ("recipe.min_lr", 1, "min_lr must be at most lr"),
        ("recipe.compile", 1, "compile must be true or false"),
        ("model.num_filters", 8, "model.num_filters must not be set for model 'simple_vit'"),
        ("model.options", [1], "options must be a table"),
        ("model.options", {"a": [None]}, "options.a must be a number, a text, .*got None"),
        ("model.name", " ", "must not be empty"),
        ("init.method", "box", "init.method must be one of impulse, mimetic"),
        ("init.kernel_size", 4, "init.kernel_size must be odd"),
        ("init.peak", 1, "below 1, got 1"),
        ("recipe.lrr", 1, r"\[recipe\] has no key 'lrr'; it has epochs"),
        ("recipes.lr", 1, "a config has the tables model, init, data, recipe, run, got 'recipes'"),
    ],
)
def test_errors_say_what_is_wrong(path, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        resolve(given={path: value})


WRONG: dict[type, list[Any]] = {
    int: ["3", 2.5, True, [1], -1, np.float32(2), np.arange(2), torch.ones(2)],
    float: ["0.5", True, [1.0], float("nan"), -1.0, np.ones(1), 1j],
    bool: ["yes", 1, 0.0, [True], np.int64(1)],
    str: [3, ["a"], True, b"cifar10"],
    dict: [3, "a=1", [1], {"a": object()}, {"a": 1j}],
    tuple: ["0.5", True, [0.5, "0.4", 0.3], float("nan"), (-1.0,), [0.5, 0.4], (), {"a": 1.0}],
}


def test_every_setting_of_a_wrong_kind_is_named():
    tried = 0
    for name, section in SECTIONS.items():
        for each in dataclasses.fields(section):
            for value in WRONG[kind_of(section, each.name)[0]]:
                with pytest.raises((TypeError, ValueError), match=rf"^{name}\.{each.name}\b.* must .*, got "):
                    section(**{each.name: value})
                tried += 1
    assert tried > 250


def test_numbers_of_numpy_and_torch_and_paths_are_taken():
    assert ModelConfig(dim=np.int64(32)).dim == 32 and type(ModelConfig(dim=np.int64(32)).dim) is int
    recipe = RecipeConfig(lr=np.float32(0.5), epochs=torch.tensor(3), compile=np.bool_(False), clip=2)
    assert (recipe.lr, recipe.epochs, recipe.compile, recipe.clip) == (0.5, 3, False, 2.0)
    assert DataConfig(root=Path("a") / "b").root == str(Path("a") / "b")
    assert ModelConfig(options={"depth": np.int64(2), "x": (np.float64(1.5),)}).options == {
        "depth": 2,
        "x": [1.5],
    }
    assert to_toml(Config(recipe=recipe)) == to_toml(Config(recipe=RecipeConfig(lr=0.5, epochs=3, clip=2.0)))


def test_what_excludes_each_other():
    with pytest.raises(ValueError, match="give init.weight_norm or init.peak, not both"):
        resolve(given={"init.peak": 0.5, "init.weight_norm": 3})
    with pytest.raises(ValueError, match="train_count or data.train_fraction, not both"):
        resolve(given={"data.train_count": 5, "data.train_fraction": 0.5})
    with pytest.raises(ValueError, match="must be 0 with schedule one-cycle"):
        resolve(given={"recipe.schedule": "one-cycle", "recipe.warmup_epochs": 1})
    with pytest.raises(ValueError, match="preset must be one of paper"):
        resolve("papers")
    with pytest.raises(TypeError, match="recipe must be a table"):
        resolve("quick", {"recipe": 3})


def test_a_file_that_is_no_toml(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("lr = ")
    with pytest.raises(ValueError, match="c.toml is not a TOML file"):
        read_toml(path)


def test_command_line_values():
    assert parse("recipe.lr", "3e-4") == 3e-4 and parse("recipe.clip", "none") is None
    assert parse("model.options", ["a=1", "b=[2, 3]", "c=x"]) == {"a": 1, "b": [2, 3], "c": "x"}
    with pytest.raises(ValueError, match="epochs must be a whole number, got '1.5'"):
        parse("recipe.epochs", "1.5")
    with pytest.raises(ValueError, match="must be NAME=VALUE"):
        parse("model.options", ["a"])


def test_only_what_changes_the_weights_hinders_a_resumption():
    config = resolve("quick")
    other = resolve("quick", given={"run.keep": 5, "data.workers": 2, "recipe.lr": 0.1, "run.seed": 1})
    assert other.differing(config) == ["recipe.lr: 0.1, not 0.001", "run.seed: 1, not 0"]


def test_every_field_has_help_and_every_option_a_flag_of_its_own():
    fields = [(section, each) for section in SECTIONS.values() for each in dataclasses.fields(section)]
    options = [each for _, _, each in _fields()]
    flags = [each.metadata["flag"] or each.name.replace("_", "-") for each in options]
    assert len(set(flags)) == len(flags)
    assert not [each.name for _, each in fields if each.metadata["flag"] and each not in options]
    for section, each in fields:
        assert each.metadata["help"].endswith(".")
        kind, optional = kind_of(section, each.name)
        default = default_of(section, each.name)
        assert isinstance(default, kind) or (optional and default is None)


@pytest.mark.parametrize(("optimizer", "name"), [("adamw", "beta1"), ("sgd", "momentum")])
def test_one_cycle_refuses_what_it_would_overrule(optimizer, name):
    with pytest.raises(ValueError, match=f"recipe.{name} must not be set with schedule one-cycle"):
        resolve(given={"recipe.schedule": "one-cycle", "recipe.optimizer": optimizer, f"recipe.{name}": 0.8})
