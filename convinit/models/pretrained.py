"""save_pretrained and from_pretrained: a model as a folder of safetensors and JSON.

    model.safetensors   weights and buffers, shared ones once, as ``safetensors.torch.save_model`` writes them
    config.json         {"class", "arguments" of the constructor, "dtype", "metadata", "convinit"}

Methods and file names are those of ``huggingface_hub.PyTorchModelHubMixin``, which is not the base class: it
would make huggingface_hub a dependency of the models, call the constructor (and so the fit) before loading,
drop tensors and fit options among its arguments, let missing weights pass, and unpickle other weights files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convinit.fit import SVD, Adam, Newton

__all__ = ["CONFIG", "WEIGHTS", "Pretrained", "read_config", "read_weights", "save_folder"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_METHODS = {each.__name__: each for each in (Newton, Adam, SVD)}
_NOT_KEPT = ("generator", "device", "dtype")  # draws are in the weights; dtype is that of the saved weights

Self = TypeVar("Self", bound="Pretrained")


class Pretrained:
    """Gives an ``nn.Module`` its `save_pretrained` and `from_pretrained`; a base class before it.

    A subclass is built on the meta device and then filled, so what is not in its state_dict it must fill in
    ``_load_from_state_dict``.

    Attributes:
        metadata: JSON-able facts of any kind that are saved with the model, such as class names.
    """

    metadata: dict[str, Any]
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls)
        model.__dict__["metadata"] = {}
        # None of them when unpickled: they follow with the rest of the state.
        model.__dict__["_arguments"] = _bound(cls, args, kwargs)
        return model

    def save_pretrained(self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes config.json and model.safetensors, from which `from_pretrained` makes the same model.

        Args:
            folder: made if it is not there; the two files are replaced.
            metadata: JSON-able; None keeps that of the model.

        Raises:
            ImportError: safetensors is not installed. OSError: the folder cannot be written.
            TypeError, ValueError: metadata or an argument of the constructor cannot be written as JSON, the
                model is on the meta device or its weights are of several floating dtypes.
        """
        assert isinstance(self, nn.Module)
        config = {
            "class": type(self).__name__,
            "arguments": {name: _encoded(name, value) for name, value in self._arguments.items()},
            "dtype": str(_dtype(self)).removeprefix("torch."),
            "metadata": dict(self.metadata if metadata is None else metadata),
        }
        save_folder(folder, self, config)

    @classmethod
    def from_pretrained(
        cls: type[Self], folder: str | Path, *, device: torch.device | str | None = None
    ) -> Self:
        """The model that `save_pretrained` wrote, in evaluation mode. Nothing is drawn, fitted or unpickled.

        Args:
            folder: on this machine. Of a repository of Hugging Face's Hub, what
                ``huggingface_hub.snapshot_download`` returns.
            device: of the model; None means torch's default.

        Raises:
            ImportError: safetensors is not installed. FileNotFoundError: folder or file is missing.
            ValueError: a file is damaged, of another class or of another model.
        """
        path = Path(folder)
        config = read_config(path)
        saved, arguments = config.get("class"), config.get("arguments")
        if saved != cls.__name__ or not isinstance(arguments, dict):
            kind = config.get("architecture") or saved or "something else"
            raise ValueError(f"{path / CONFIG} must describe a {cls.__name__}, got {kind!r}; load it as that")
        metadata = config.get("metadata", {})
        try:
            given = {name: _decoded(value) for name, value in arguments.items()}
            dtype = getattr(torch, str(config["dtype"]))
            with torch.device("meta"):
                model = cls(**given).to(dtype)  # type: ignore[attr-defined]
            model.metadata = dict(metadata)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path / CONFIG} does not describe a {cls.__name__}: {error}") from error
        weights = read_weights(path / WEIGHTS, model)
        model.to_empty(device=torch.get_default_device() if device is None else device)
        model.load_state_dict(weights)
        return model.eval()


def save_folder(folder: str | Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Writes model.safetensors and config.json, each whole or not at all.

    Args:
        folder: made if it is not there.
        model: its weights are written.
        config: JSON-able; convinit's version is added.
    """
    from convinit import __version__

    try:
        text = json.dumps({**config, "convinit": __version__}, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{CONFIG} must hold what JSON can: {error}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"the model must have values to save, got {name} on the meta device")
    safetensors = _safetensors()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    part = {name: path / f".{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        safetensors.save_model(model, str(part[WEIGHTS]), metadata={"format": "pt"})
        part[CONFIG].write_text(text + "\n", encoding="utf-8")
        for name, written in part.items():
            os.replace(written, path / name)
    except _safetensor_error() as error:  # what it makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        for written in part.values():
            written.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is no JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must be one on this machine with {CONFIG} and {WEIGHTS}, got {str(folder)!r}, which is "
            "none; huggingface_hub.snapshot_download fetches a repository into one"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no {CONFIG}; save_pretrained writes it") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must hold an object, got {type(config).__name__}")
    return config


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A state_dict from a safetensors file that has just the tensors of a model, in its shapes and dtypes.

    A name that shares its tensor with another may be missing, if the file's own metadata says with which.

    Args:
        path: of the file.
        model: on any device, also meta.

    Raises:
        FileNotFoundError: there is no file. ValueError: it is damaged, or of another model.
    """
    _safetensors()
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} are missing")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            shared = file.metadata() or {}
    except _safetensor_error() as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    own = model.state_dict()
    tensors |= {name: tensors[of] for name, of in shared.items() if name in own and of in tensors}
    wrong = [
        f"{name} {_shown(tensor)}, got {_shown(tensors.get(name))}"
        for name, tensor in own.items()
        if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype)
    ] + [f"no {name}" for name in tensors if name not in own]
    if wrong:
        raise ValueError(
            f"{path} is of another model than {type(model).__name__} as it is configured: expected "
            f"{'; '.join(wrong[:3])} ({len(wrong)} tensors in all)"
        )
    return tensors


def _shown(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name; none if they do not fit, which the constructor will say."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        return {}
    named: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return {
        # A copy, since a tensor may change; generators are neither copied nor pickled.
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in named.items()
        if name not in _NOT_KEPT
    }


def _encoded(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) in _METHODS.values():
        return {"method": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, list | tuple):
        return [_encoded(name, each) for each in value]
    if hasattr(value, "__index__"):
        return int(value)
    raise TypeError(
        f"{name} must be numbers, texts, a tensor or a fit method to be saved, got {type(value).__name__}"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device="cpu")
    options = dict(value)
    return _METHODS[options.pop("method")](**options)


def _dtype(model: nn.Module) -> torch.dtype:
    tensors = (*model.parameters(), *model.buffers())
    found = {each.dtype for each in tensors if each.is_floating_point()}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found))) or "none"
        raise ValueError(f"the weights must be of one floating dtype to be saved, got {names}; see Module.to")
    return found.pop()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "models are saved by safetensors, which is not installed; get it with: "
            "pip install 'convinit[train]'"
        ) from error
    return safetensors.torch


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
