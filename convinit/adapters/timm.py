"""Entry points for users of timm: its `create_model`, its model registry, the `attn_layer` of its blocks.

timm is imported at the first call. How convinit sees timm's models is in `timm_vit`.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convinit._checks import check_grid_size
from convinit.adapters import timm_registry
from convinit.adapters.init_vit import init_vit_
from convinit.nn import ConvInitAttention

__all__ = ["attn_layer", "create_model", "register"]

_logger = logging.getLogger(__name__)

# What timm's blocks give to every attention; as options of attn_layer they would be given twice.
_FROM_TIMM = (
    "dim", "num_heads", "qkv_bias", "qk_norm", "scale_norm", "proj_bias", "attn_drop", "proj_drop",
    "norm_layer", "device", "dtype",
)  # fmt: skip


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    init: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> nn.Module:
    """``timm.create_model`` and :func:`convinit.init_vit_` in one call.

    model = timm.create_model(model_name, **kwargs); model.init_report = init_vit_(model, **init)

    Args:
        model_name: of a timm model that `init_vit_` knows.
        pretrained: must be False, and there must be no ``checkpoint_path`` among `kwargs`.
        init: arguments of `init_vit_`, such as ``{"kernel_size": 5, "peak": 0.6}``.
        generator: CPU generator of what `init_vit_` draws; None means torch's own, as ``torch.manual_seed``
            sets it. timm's part of the initial weights always comes from torch's own.
        **kwargs: of ``timm.create_model``.

    Returns:
        The model, with the :class:`~convinit.InitReport` as its attribute ``init_report``. Its one-line
        summary is also logged at level INFO.

    Raises:
        ValueError: trained weights were asked for, or timm or `init_vit_` raises it. TypeError: `init` has
            what `init_vit_` does not take.
    """
    options = {**(init or {})}
    _check_options("init", options, generator=generator)
    _refuse_trained(model_name, pretrained=pretrained, checkpoint_path=kwargs.get("checkpoint_path"))
    import timm

    return _initialised(timm.create_model(model_name, **kwargs), {**options, "generator": generator})


def register(model_name: str, *, registered_name: str | None = None, **init: Any) -> str:
    """Registers an impulse-initialised variant of a model in timm's registry, for scripts that take a name.

    timm's unmodified train.py, with two lines before it::

        import convinit.adapters.timm, runpy
        convinit.adapters.timm.register("vit_tiny_patch16_224")
        runpy.run_path("train.py", run_name="__main__")  # --model vit_tiny_patch16_224_impulse

    The draws come from torch's own generator, which the script seeds (timm's ``--seed``). timm seeds every
    process differently; DistributedDataParallel then gives all of them the weights of rank 0, whose report
    is the one that holds.

    Args:
        model_name: of a timm model that `init_vit_` knows; with a tag it takes the data settings of that tag.
        registered_name: of the new model; None means the architecture's name followed by ``_impulse``.
        **init: arguments of :func:`convinit.init_vit_`.

    Returns:
        The registered name. ``timm.create_model`` with it gives what :func:`create_model` gives, also the
        attribute ``init_report``, and the same in every process that has registered it. A checkpoint that
        timm loads into it afterwards replaces the initial weights, as it should.

    Raises:
        ValueError: the model is unknown, or the registered name belongs to another model. TypeError: `init`
        has what `init_vit_` does not take. When the model is made: ValueError for ``pretrained=True``.
    """
    import timm
    from timm.models import generate_default_cfgs, register_model, split_model_name_tag

    _check_options("init", init)
    if not timm.is_model(model_name):
        raise ValueError(
            f"model_name must be a model that this timm ({timm.__version__}) knows, see timm.list_models(), "
            f"got {model_name!r}"
        )
    architecture, tag = split_model_name_tag(model_name)
    name = f"{architecture}_impulse" if registered_name is None else registered_name
    if not name.isidentifier():
        raise ValueError(f"registered_name must be letters, digits and underscores, got {name!r}")
    if timm.is_model(name) and name not in timm_registry.default_cfgs:
        raise ValueError(f"registered_name must be new, but timm has a model {name!r} of its own")
    original = timm.model_entrypoint(model_name)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        _refuse_trained(name, pretrained=pretrained)
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or tag or None
        return _initialised(original(**kwargs), init)

    # timm looks a model's name up in its function and its data settings in the module of that function.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = timm_registry.__name__
    settings = timm.get_pretrained_cfg(model_name)
    if settings is not None:
        without_weights = settings.to_dict(remove_source=True)
        timm_registry.default_cfgs.update(generate_default_cfgs({name: without_weights}))
    setattr(timm_registry, name, register_model(entrypoint))
    return name


def attn_layer(grid_size: Sequence[int], **options: Any) -> type:
    """What timm's VisionTransformer takes as `attn_layer`, to have ConvInitAttention in every block.

        layer = attn_layer((14, 14), kernel_size=3)
        VisionTransformer(class_token=False, global_pool="avg", attn_layer=layer)

    timm calls it as a class with the arguments of its own Attention; what it makes are plain
    :class:`~convinit.ConvInitAttention`. The model must have neither class nor register tokens. Its own
    position embedding is added as before; ``pos_embed="none"`` leaves that to the layers, which hold P.

    Args:
        grid_size: (H, W) of the tokens: image size / patch size.
        **options: of ConvInitAttention, but for those that timm gives it, such as qkv_bias (they are
            arguments of the timm model). No generator: timm initialises everything once more from torch's
            own, as ``torch.manual_seed`` sets it.

    Returns:
        A class, made for these options; it and the models made with it can be copied and pickled.

    Raises:
        TypeError, ValueError: an option is unknown, or timm gives it itself; the rest when a layer is made.
    """
    height, width = check_grid_size(grid_size)
    for name in options:
        if name in _FROM_TIMM:
            raise ValueError(f"{name} must not be given here: timm gives it; it is an argument of the model")
        if name == "generator":
            raise ValueError(
                "generator must not be given here: timm draws all weights anew from torch's own; "
                "call torch.manual_seed before the model is made"
            )
    try:
        inspect.signature(ConvInitAttention).bind_partial(grid_size=grid_size, **options)
    except TypeError as error:
        raise TypeError(f"options must be arguments of ConvInitAttention: {error}") from None
    return _AttnLayer("ConvInitAttnLayer", (ConvInitAttention,), {"_made_by": ((height, width), options)})


class _AttnLayer(type):
    """The type of these classes: called, they make plain ConvInitAttention, which pickle without them."""

    _made_by: tuple[tuple[int, int], dict[str, Any]]

    def __call__(cls, dim: int, num_heads: int = 8, **from_timm: Any) -> ConvInitAttention:
        grid_size, options = cls._made_by
        return ConvInitAttention(dim, num_heads, grid_size, **options, **from_timm)


def _reduce(layer: _AttnLayer) -> tuple:
    grid_size, options = layer._made_by
    return functools.partial(attn_layer, grid_size, **options), ()


# timm keeps the class in the model (`_model_args`), so a model could not be pickled without this.
copyreg.pickle(_AttnLayer, _reduce)


def _initialised(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    report = init_vit_(model, **options)
    model.init_report = report  # type: ignore[assignment]
    _logger.info("convinit: %s", report.summary())
    return model


def _check_options(argument: str, options: Mapping[str, Any], **others: Any) -> None:
    """Raise for what init_vit_ does not take, before a model is made."""
    try:
        inspect.signature(init_vit_).bind(None, **options, **others)
    except TypeError as error:
        raise TypeError(f"{argument} must have arguments of convinit.init_vit_: {error}") from None


def _refuse_trained(model_name: str, **given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name} must not be given for {model_name}, got {value!r}: the initialisation would "
                "overwrite trained queries and keys. If that is wanted, call convinit.init_vit_ on what "
                "timm.create_model makes"
            )
