"""A trained classifier with what its images must be like: from a checkpoint of `convinit train`, or a folder.

A folder holds model.safetensors and config.json. For SimpleViT and ConvMixer it is what `save_pretrained`
writes, with the fields of `ImageSpec` in its metadata. For timm's models it is timm's own layout, so
``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it too, unless it is an MLP-Mixer of a size
that timm has no name for. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convinit._checks import check_int
from convinit.models import ConvMixer, SimpleViT
from convinit.models.pretrained import (
    CONFIG,
    WEIGHTS,
    Pretrained,
    fill,
    no_more_weights_than,
    read_config,
    read_weights,
    save_folder,
)  # fmt: skip
from convinit.train.build import build_model, create_timm, timm_options
from convinit.train.checkpoint import checkpoints, read_progress, verify
from convinit.train.config import LIBRARY_MODELS, OWN_MODELS, Config, InitConfig
from convinit.train.config_files import read_toml
from convinit.train.data.subsets import check_fraction, check_real

__all__ = ["ImageSpec", "TrainedModel", "load_trained", "save_trained"]

_CLASSES: dict[str, type[Pretrained]] = {"SimpleViT": SimpleViT, "ConvMixer": ConvMixer}
# Arguments by which timm would look for weights elsewhere, in files that may be pickled.
_NOT_FOR_TIMM = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


MAX_PIXELS = 4096**2  # of an image; a damaged size would take the machine's memory


@dataclass(frozen=True)
class ImageSpec:
    """The images that a classifier takes, and what its outputs are called.

    Attributes:
        image_size: (H, W) in pixels.
        mean, std: of each channel, 1 (grey) or 3 (RGB), with pixels in [0, 1]; for normalisation.
        class_names: a name for each output.
        crop_pct: side of the window that is cut out of the middle of an image, as a share of the image's.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std", "class_names"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON has lists
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (H, W), got {self.image_size}")
        sides = tuple(check_int("image_size", side) for side in self.image_size)
        if math.prod(sides) > MAX_PIXELS:
            raise ValueError(f"image_size must have at most {MAX_PIXELS:,} pixels, got {sides}")
        object.__setattr__(self, "image_size", sides)
        if self.channels not in (1, 3) or len(self.std) != self.channels:
            raise ValueError(f"mean and std must be for 1 or 3 channels, got {self.mean} and {self.std}")
        for name in ("mean", "std"):
            numbers = tuple(check_real(name, each) for each in getattr(self, name))
            object.__setattr__(self, name, numbers)
        if not all(each > 0 for each in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        object.__setattr__(self, "crop_pct", check_fraction("crop_pct", self.crop_pct))
        if not self.class_names or not all(isinstance(each, str) for each in self.class_names):
            raise ValueError(f"class_names must be texts, at least one, got {self.class_names!r:.100}")

    @property
    def channels(self) -> int:
        """1 or 3."""
        return len(self.mean)

    @staticmethod
    def of(content: Any, source: Path) -> ImageSpec:
        """From a mapping that has the fields, among others; ValueError names the file that it came from."""
        names = [each.name for each in dataclasses.fields(ImageSpec) if each.default is dataclasses.MISSING]
        missing = [name for name in names if name not in content] if isinstance(content, Mapping) else names
        if missing:
            raise ValueError(
                f"{source} does not say what images the model takes: {', '.join(missing)} not given; save it "
                "with save_pretrained(folder, metadata=dataclasses.asdict(convinit.serve.ImageSpec(...)))"
            )
        try:
            crop_pct = content.get("crop_pct", 1.0)  # older ones have none
            return ImageSpec(**{name: content[name] for name in names}, crop_pct=crop_pct)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A classifier to be used.

    Attributes:
        network: normalised images [B, C, H, W] → logits [B, classes]; in evaluation mode.
        images: what it takes and gives.
        training: JSON-able facts on how it was trained.
        timm: name and arguments for ``timm.create_model``; None for SimpleViT and ConvMixer.
    """

    network: nn.Module
    images: ImageSpec
    training: dict[str, Any] = field(default_factory=dict)
    timm: tuple[str, dict[str, Any]] | None = None


def load_trained(
    path: str | Path, *, weights: str = "model", device: torch.device | str | None = None
) -> TrainedModel:
    """A model from a folder of `save_trained` or `save_pretrained`, a checkpoint, or a run's latest one.

    Nothing is fitted, and torch's random state is as it was.

    Args:
        path: the folder.
        weights: "model", or "ema" for the moving average in a checkpoint.
        device: of the network; None means torch's default.

    Raises:
        FileNotFoundError: folder or file is missing. ValueError: it is damaged or of something else.
        ImportError: timm is needed and not installed.
    """
    folder = Path(path)
    if weights not in ("model", "ema"):
        raise ValueError(f"weights must be model or ema, got {weights!r}")
    if not (folder / CONFIG).exists() and (found := checkpoints(folder)):
        folder = found[-1]
    with _same_random_state():
        if (folder / "progress.json").exists():
            trained = _from_checkpoint(folder, weights)
        elif weights == "ema":
            raise ValueError(f"weights must be model for {folder}, which is no checkpoint, got 'ema'")
        else:
            trained = _from_folder(folder)
    trained.network.to(torch.get_default_device() if device is None else device).eval()
    return trained


def save_trained(trained: TrainedModel, folder: str | Path) -> None:
    """Writes model.safetensors and config.json, which `load_trained` reads.

    Args:
        trained: the model.
        folder: made if it is not there.

    Raises:
        OSError: the folder cannot be written.
    """
    network, images = trained.network, trained.images
    if isinstance(network, Pretrained):
        network.save_pretrained(folder, metadata={**dataclasses.asdict(images), "training": trained.training})
        return
    if trained.timm is None:
        raise ValueError(f"network must be SimpleViT, ConvMixer or timm's, got {type(network).__name__}")
    architecture, arguments = trained.timm
    size = (images.channels, *images.image_size)
    config = {
        "architecture": architecture,
        "num_classes": len(images.class_names),
        "model_args": arguments,
        "label_names": list(images.class_names),
        "pretrained_cfg": {
            "input_size": size, "fixed_input_size": "img_size" in arguments, "interpolation": "bilinear",
            "crop_pct": images.crop_pct, "crop_mode": "center", "mean": images.mean, "std": images.std,
            "num_classes": len(images.class_names),
        },
        "metadata": {**dataclasses.asdict(images), "training": trained.training},
    }  # fmt: skip
    save_folder(folder, network, config)


def _from_folder(folder: Path) -> TrainedModel:
    config = read_config(folder)
    architecture, kind = config.get("architecture"), _CLASSES.get(str(config.get("class")))
    if architecture is None and kind is None:
        raise ValueError(
            f"{folder / CONFIG} must describe a {' or '.join(_CLASSES)}, or a timm model as convinit export "
            f"writes it, got class {config.get('class')!r}"
        )
    metadata = config.get("metadata")
    images = ImageSpec.of(metadata, folder / CONFIG)
    assert isinstance(metadata, dict)
    training = metadata.get("training", {})
    if kind is not None:
        network: Any = kind.from_pretrained(folder, device="cpu")
        taken, named = (network.image_size, network.head.out_features), len(images.class_names)
        if taken != (images.image_size, named):
            raise ValueError(
                f"{folder / CONFIG}: the metadata must be of the model, which takes images of {taken[0]} and "
                f"has {taken[1]} outputs, got image_size {images.image_size} and {named} class_names"
            )
        return TrainedModel(network, images, training)
    arguments = config.get("model_args", {})
    network = _with_weights(
        partial(_timm_network, folder / CONFIG, architecture, arguments), folder / WEIGHTS
    )
    return TrainedModel(network, images, training, (str(architecture), arguments))


def _from_checkpoint(folder: Path, weights: str) -> TrainedModel:
    saved = read_progress(folder)
    images = ImageSpec.of(saved.get("images"), folder / "progress.json")
    config = Config.of(read_toml(folder / "config.toml"))
    shape: dict[str, Any] = {
        "image_size": images.image_size,
        "channels": images.channels,
        "num_classes": len(images.class_names),
    }
    path = folder / f"{weights}.safetensors"
    if weights == "ema" and not path.exists():
        raise ValueError(f"{folder} has no moving average: recipe.ema was none")
    verify(folder, path.name)
    timm = None
    if config.model.name in OWN_MODELS:
        with no_more_weights_than(path), torch.device("meta"):  # so that nothing is fitted
            network = build_model(config, **shape)
        fill(network, path, "cpu")
    else:
        if config.model.name not in LIBRARY_MODELS:
            _import_timm(config.model.name)
            timm = (config.model.name, timm_options(config.model, **shape))
            _check_timm_arguments(folder / "config.toml", timm[1])
        plain = dataclasses.replace(config, init=InitConfig(method="default", values="default"))
        network = _with_weights(partial(build_model, plain, **shape), path)
    settings = config.as_dict()
    del settings["data"]["root"]  # of the machine that trained
    training = {
        "weights": weights, "config": settings,
        **{key: saved.get("progress", {}).get(key) for key in ("step", "epoch", "best")},
    }  # fmt: skip
    return TrainedModel(network, images, training, timm)


def _with_weights(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """A network of timm with the weights of a file; ValueError where they are of another, before it is built.

    First on the meta device, for the shapes. Some of timm's networks cannot be built there.
    """
    try:
        with no_more_weights_than(path), torch.device("meta"):
            shapes: nn.Module | None = build()
    except (NotImplementedError, RuntimeError):
        shapes = None
    if shapes is not None:
        read_weights(path, shapes)
    with no_more_weights_than(path, elements=True):
        network = build()
    network.load_state_dict(read_weights(path, network))
    return network


def _timm_network(source: Path, architecture: Any, arguments: Any) -> nn.Module:
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        raise ValueError(f"{source} must name a timm model and its arguments, got {architecture!r:.100}")
    timm = _import_timm(architecture)
    _check_timm_arguments(source, arguments)
    if ":" in architecture or not timm.is_model(architecture):
        raise ValueError(
            f"{source} must name a model that this timm ({timm.__version__}) has, got {architecture!r}"
        )
    try:
        return create_timm(architecture, arguments)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{source} does not describe timm's {architecture}: {error}") from error


def _check_timm_arguments(source: Path, arguments: Mapping[str, Any]) -> None:
    for name in _NOT_FOR_TIMM:
        if name in arguments:
            raise ValueError(f"{source} must not give timm {name}: the weights are those beside it")


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"the model {name} is timm's, which cannot be imported ({error}); pip install timm"
        ) from error
    return timm


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """timm draws weights before others are loaded."""
    with torch.random.fork_rng(devices=[]):
        yield
