"""The model that a config describes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convinit._words import near
from convinit.adapters import InitReport, init_vit_
from convinit.models import ConvMixer, SimpleViT
from convinit.train.config import LIBRARY_MODELS, OWN_MODELS, Config, InitConfig, ModelConfig
from convinit.train.libraries import create_library_model


def build_model(
    config: Config, *, image_size: int | tuple[int, int], channels: int, num_classes: int
) -> nn.Module:
    """The model with its initial weights, on the CPU. One ``run.seed`` gives one model, whatever trains it.

    Args:
        config: its sections model and init, and ``run.seed``.
        image_size: pixels, one number or (height, width).
        channels: of the images.
        num_classes: outputs.

    Raises:
        ValueError: no such model, or it does not fit the images. ImportError: its library is not there.
    """
    return build_with_report(config, image_size=image_size, channels=channels, num_classes=num_classes)[0]


def build_with_report(
    config: Config, *, image_size: int | tuple[int, int], channels: int, num_classes: int
) -> tuple[nn.Module, InitReport | None]:
    """As `build_model`, with the report of `init_vit_`, by which libraries' models are initialised."""
    model, init = config.model, config.init
    generator = torch.Generator().manual_seed(config.run.seed)
    if model.name == "simple_vit":
        return _simple_vit(model, init, image_size, channels, num_classes, generator), None
    if model.name == "convmixer":
        return _convmixer(model, init, image_size, channels, num_classes, generator), None
    return _of_a_library(model, init, image_size, channels, num_classes, config.run.seed, generator)


def _simple_vit(
    model: ModelConfig, init: InitConfig, image_size: Any, channels: int, num_classes: int, generator: Any
) -> nn.Module:
    dim = model.dim or 512
    given = {
        "num_heads": model.heads, "depth": model.depth, "variant": model.variant, "alpha": model.alpha,
    }  # fmt: skip
    options = {
        "channels": channels, "dim": dim, "head_dim": model.head_dim, "mlp_dim": model.mlp_dim or dim,
        "trainable_mixing": model.train_mixing, **init.of_queries_keys(), **_without_none(given),
    }  # fmt: skip
    with _Options(model):
        return SimpleViT(
            image_size, model.patch_size or 2, num_classes, generator=generator, **options, **model.options
        )


def _convmixer(
    model: ModelConfig, init: InitConfig, image_size: Any, channels: int, num_classes: int, generator: Any
) -> nn.Module:
    given = {
        "dim": model.dim, "depth": model.depth, "kernel_size": init.kernel_size,
        "num_filters": model.num_filters, "num_cells": init.num_cells, "variance": init.variance,
    }  # fmt: skip
    options = {
        "channels": channels, "method": init.method, "matrix_form": model.matrix_form,
        "share_layers": model.share_layers, "trainable_mixing": model.train_mixing, **_without_none(given),
    }  # fmt: skip
    with _Options(model):
        return ConvMixer(
            image_size, model.patch_size or 2, num_classes, generator=generator, **options, **model.options
        )


def _of_a_library(
    model: ModelConfig,
    init: InitConfig,
    image_size: Any,
    channels: int,
    num_classes: int,
    seed: int,
    generator: Any,
) -> tuple[nn.Module, InitReport | None]:
    check_model(model)
    initialised = (init.method, init.values, init.pos_embed_gain) != ("default", "default", None)
    with torch.random.fork_rng(devices=[]), _Options(model):
        torch.manual_seed(seed)  # libraries draw from torch's own
        if model.name in LIBRARY_MODELS:
            patch = _without_none({"patch_size": model.patch_size})
            network = create_library_model(
                model.name, image_size, channels, num_classes, {**patch, **model.options}
            )
        else:
            network = _timm(model, image_size, channels, num_classes, initialised)
        if not initialised:
            return network, None
        return network, init_vit_(
            network,
            pos_embed_gain=init.pos_embed_gain,
            generator=generator,
            **init.of_queries_keys(),
        )


def _timm(
    model: ModelConfig, image_size: Any, channels: int, num_classes: int, initialised: bool
) -> nn.Module:
    options = timm_options(model, image_size, channels, num_classes)
    if initialised and (options.get("pretrained") or options.get("checkpoint_path")):
        raise ValueError(
            f"model.options must not name trained weights for {model.name}: the initialisation would "
            "overwrite them; to keep them set init.method and init.values to default"
        )
    network = create_timm(model.name, options)
    if options.get("weight_init") == "skip":
        _draw_tokens_(network)
    if model.pos_embed == "sincos":
        _fix_sincos_(network, model.name)
    return network


def check_model(model: ModelConfig) -> None:
    """ValueError where no library has a model of that name; ImportError where timm is needed and missing."""
    if model.name not in (*OWN_MODELS, *LIBRARY_MODELS):
        check_timm("model.name", model.name, (*OWN_MODELS, *LIBRARY_MODELS))


def check_timm(what: str, name: str, others: Sequence[str] = ()) -> None:
    """ValueError unless timm has a model of that name; the message calls it `what` and lists `others` too."""
    ours = near(name, others)
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{what} {name!r} can only be timm's, which cannot be imported ({error}); pip install timm{ours}"
        ) from error
    if not timm.is_model(name):
        models = timm.list_models()
        hint = ours if ours == near(name, [*others, *models]) else near(name, models, 3)
        known = " or ".join([*([", ".join(others)] if others else []), "a name that timm knows"])
        raise ValueError(f"{what} must be {known}, got {name!r}{hint or '; timm.list_models() has them all'}")


def _draw_tokens_(network: nn.Module) -> None:
    """What timm's weight_init="skip" leaves as the memory was: P and the tokens, drawn as timm would."""
    for name, std in (("pos_embed", 0.02), ("cls_token", 1e-6), ("reg_token", 1e-6)):
        each = getattr(network, name, None)
        if isinstance(each, nn.Parameter):
            nn.init.normal_(each, std=std)


def _fix_sincos_(network: nn.Module, name: str) -> None:
    """timm's sin-cos position embedding in the place of a ViT's learned one, and not to be learned."""
    from timm.layers import build_sincos2d_pos_embed

    P: Any = getattr(network, "pos_embed", None)
    prefix: Any = getattr(network, "num_prefix_tokens", None)
    if not isinstance(P, nn.Parameter) or prefix != 0:
        raise ValueError(
            f"model.pos_embed must not be set for {name}: sincos is for embeddings of patches alone; "
            'leave the class token out with model.options = {class_token = false, global_pool = "avg"}'
        )
    with torch.no_grad():
        patches: Any = network.get_submodule("patch_embed")
        P.copy_(build_sincos2d_pos_embed(patches.grid_size, P.shape[-1]))
    P.requires_grad_(False)


def timm_options(model: ModelConfig, image_size: Any, channels: int, num_classes: int) -> dict[str, Any]:
    """What ``timm.create_model`` is given for a model, beside its name."""
    import timm

    options: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes}
    settings = timm.get_pretrained_cfg(model.name)
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = image_size
    if model.patch_size is not None:
        options["patch_size"] = model.patch_size
    return {**options, **model.options}


def create_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model(name, **options)``, and MLP-Mixers of other sizes too.

    timm's functions of these fix their patch size, depth and width, which its class takes.
    """
    import timm

    mixer = re.match(r"mixer_([sbl])(\d+)_", name)
    if not (mixer and {"patch_size", "num_blocks", "embed_dim"} & set(options)):
        return timm.create_model(name, **options)
    from timm.models.mlp_mixer import MlpMixer

    num_blocks, embed_dim = {"s": (8, 512), "b": (12, 768), "l": (24, 1024)}[mixer[1]]
    sizes = {"patch_size": int(mixer[2]), "num_blocks": num_blocks, "embed_dim": embed_dim}
    return MlpMixer(**{**sizes, **options})


class _Options:
    """An argument that the model does not take shows as an error of the config."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, (TypeError, AssertionError)):  # the latter is how some libraries check sizes
            raise ValueError(
                f"model {self.model.name!r} does not take these settings: {error or kind.__name__}; "
                "model.options (--option NAME=VALUE) are its further arguments"
            ) from error


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
