"""save_pretrained and from_pretrained: a model as a folder of safetensors and JSON.

    model.safetensors   weights and buffers, shared ones once, as ``safetensors.torch.save_model`` writes them
    config.json         {"class", "arguments" of the constructor, "dtype", "metadata", "convinit", and
                        "weights_sha256", the checksum of the file beside it}

Methods, arguments and file names are those of ``huggingface_hub.PyTorchModelHubMixin``. It is not the base
class: `import convinit` would then need huggingface_hub, and its `save_pretrained` removes config.json before
the weights are written. Nor would it help: only `push_to_hub` would be left to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from convinit._files import empty_removed, sha256
from convinit._optional import require
from convinit._version import __version__
from convinit.fit import SVD, Adam, Newton

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Pretrained",
    "fill",
    "no_more_weights_than",
    "read_config",
    "read_weights",
    "save_folder",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SOLVERS = {each.__name__: each for each in (Newton, Adam, SVD)}
_CHECKSUM = "weights_sha256"
_CONFIG_PART = f".{CONFIG}.part"
_NOT_KEPT = ("generator", "device", "dtype")  # draws are in the weights; dtype is that of the saved weights

Self = TypeVar("Self", bound="Pretrained")
Model = TypeVar("Model", bound=nn.Module)


class Pretrained:
    """Gives an ``nn.Module`` `save_pretrained`, `push_to_hub` and `from_pretrained`; a base class before it.

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
                model is on the meta device, its weights are of several floating dtypes, or they are not those
                that its constructor makes. A linear `head` for other classes may have taken the head's place.
        """
        assert isinstance(self, nn.Module)
        arguments, dtype = dict(self._arguments), _dtype(self)
        if "num_classes" in arguments and isinstance(head := self.head, nn.Linear):
            arguments["num_classes"] = head.out_features  # of a new one, too
        with torch.device("meta"):
            wrong = _differences(type(self)(**arguments).to(dtype), self.state_dict())
        if wrong:
            raise ValueError(
                f"the model must be as {type(self).__name__}'s constructor makes it, up to the head's "
                f"classes, since from_pretrained makes it so; expected {wrong}. Save its state_dict instead"
            )
        config = {
            "class": type(self).__name__,
            "arguments": {name: _encoded(name, value) for name, value in arguments.items()},
            "dtype": str(dtype).removeprefix("torch."),
            "metadata": dict(self.metadata if metadata is None else metadata),
        }
        save_folder(folder, self, config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using convinit",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Uploads the two files of `save_pretrained` to a repository of Hugging Face's Hub, in one commit.

        Args:
            repo_id: "user/model"; made if it is not there.
            private: of a repository that is made; None means public, unless its owner's default is private.
            token: None means the one that `hf auth login` has kept.
            branch: None means "main".
            create_pr: opens a pull request with the commit.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed. Others: as `save_pretrained`, before anything is
                made on the Hub, and what huggingface_hub raises.
        """
        hub = require("huggingface_hub", "a repository of the Hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = hub.HfApi(token=token)
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            commit: str = api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
            return commit

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """The model that `save_pretrained` wrote, in evaluation mode. Nothing is drawn, fitted or unpickled.

        Args:
            pretrained_model_name_or_path: a folder on this machine; where there is none of this name, a
                repository "user/model" of Hugging Face's Hub, of which the two files are fetched.
            device: of the model; None means torch's default.
            revision: of the repository: a branch, tag or commit; None means "main".
            token: for the repository; None means the one that `hf auth login` has kept.

        Raises:
            ImportError: safetensors is not installed, or huggingface_hub for a repository.
            FileNotFoundError: folder, repository or file is missing.
            ValueError: a file is damaged, of another class or of another model.
        """
        path = Path(pretrained_model_name_or_path)
        if isinstance(pretrained_model_name_or_path, str) and not path.is_dir():
            path = _fetched(pretrained_model_name_or_path, revision, token)
        config = read_config(path)
        saved, arguments = config.get("class"), config.get("arguments")
        if saved == cls.__name__ and not isinstance(arguments, dict):
            raise ValueError(f"{path / CONFIG} must have a table of arguments, got {arguments!r:.50}")
        if saved != cls.__name__ or not isinstance(arguments, dict):
            kind = config.get("architecture") or saved or "something else"
            raise ValueError(f"{path / CONFIG} must describe a {cls.__name__}, got {kind!r}; load it as that")
        metadata = config.get("metadata", {})
        with no_more_weights_than(path / WEIGHTS), torch.device("meta"):
            try:
                given = {name: _decoded(value) for name, value in arguments.items()}
                model = cls(**given).to(_dtype_called(config["dtype"]))  # type: ignore[attr-defined]
                model.metadata = dict(metadata)
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{path / CONFIG} does not describe a {cls.__name__}: {error}") from error
        return fill(model, path / WEIGHTS, torch.get_default_device() if device is None else device).eval()


def save_folder(folder: str | Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Writes model.safetensors and config.json, each whole or not at all.

    Args:
        folder: made if it is not there.
        model: its weights are written.
        config: JSON-able; convinit's version is added.
    """

    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{CONFIG} must hold what JSON can: {error}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"the model must have values to save, got {name} on the meta device")
    safetensors = _safetensors()
    path = Path(folder)
    weights_part, config_part = path / f".{WEIGHTS}.part", path / _CONFIG_PART
    with empty_removed(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            safetensors.torch.save_model(model, str(weights_part), metadata={"format": "pt"})
            content = {**config, "convinit": __version__, _CHECKSUM: sha256(weights_part)}
            config_part.write_text(
                json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            os.replace(weights_part, path / WEIGHTS)
            os.replace(config_part, path / CONFIG)  # killed before, `read_config` takes the part
        except safetensors.SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            weights_part.unlink(missing_ok=True)
            config_part.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, which must be of the weights beside it.

    Raises:
        FileNotFoundError: there is none. ValueError: it is no JSON object, or of other weights.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must be one on this machine with {CONFIG} and {WEIGHTS}, got {str(folder)!r}"
        )
    weights = folder / WEIGHTS
    checksum = sha256(weights) if weights.is_file() else None
    found = [path for name in (CONFIG, _CONFIG_PART) if (path := folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {CONFIG}; save_pretrained writes it")
    for path in found:  # the second one is left where a save was killed between its two files
        config = _read_object(path)
        if config.get(_CHECKSUM, checksum) == checksum or checksum is None:
            return config
    raise ValueError(
        f"{weights} is damaged, or not the file that {CONFIG} was written with (its SHA-256 is another): "
        f"copy both again, or remove {_CHECKSUM} from {CONFIG} if the weights were replaced on purpose"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {type(config).__name__}")
    return config


@contextlib.contextmanager
def no_more_weights_than(path: Path, *, elements: bool = False) -> Iterator[None]:
    """Inside, nobody builds a model of far more tensors than a file has; ValueError as soon as it is clear.

    A `depth` of a million beside the weights of two layers would take all time and memory before the shapes
    can be compared.

    Args:
        path: a safetensors file. Where there is none, `read_weights` will say so.
        elements: count numbers, too; for what is not built on the meta device.
    """
    shapes = _shapes(path)
    # Twice, and some: a constructor may replace what it has made.
    tensors_left, elements_left = 2 * len(shapes) + 16, 2 * sum(map(math.prod, shapes)) + 2**20

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors_left, elements_left
        tensors_left, elements_left = tensors_left - 1, elements_left - parameter.numel()
        if tensors_left < 0 or (elements and elements_left < 0):
            raise ValueError(f"it has far more weights than {path}")

    handle = register_module_parameter_registration_hook(count) if shapes else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _shapes(path: Path) -> list[list[int]]:
    """The shapes in a safetensors file, a name that shares its tensor with another counted by itself."""
    if not path.is_file():
        return []
    with _opened(path) as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  it is no dict
        return shapes + [[]] * len(file.metadata() or {})


def fill(model: Model, path: Path, device: torch.device | str) -> Model:
    """A model on the meta device, moved to another one with the weights of a file.

    Raises:
        As `read_weights`. ValueError: what is not in the file, such as P, would fill the machine's memory.
    """
    weights = read_weights(path, model)
    unsaved = sum(each.nbytes for name, each in model.named_buffers() if name not in weights)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if unsaved > memory / 4:
        raise ValueError(
            f"the image_size of {type(model).__name__} gives a token grid whose position embedding takes "
            f"{unsaved / 1e9:,.1f} GB, more than a quarter of this machine's memory; make image_size smaller"
        )
    model.to_empty(device=device)
    model.load_state_dict(weights)
    return model


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A state_dict from a safetensors file that has just the tensors of a model, in its shapes and dtypes.

    A name that shares its tensor with another may be missing, if the file's own metadata says with which.

    Args:
        path: of the file.
        model: on any device, also meta.

    Raises:
        FileNotFoundError: there is no file. ValueError: it is damaged, or of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} are missing")
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        shared = file.metadata() or {}
    names = model.state_dict().keys()
    tensors |= {name: tensors[of] for name, of in shared.items() if name in names and of in tensors}
    if wrong := _differences(model, tensors):
        raise ValueError(
            f"{path} is of another model than {type(model).__name__} as it is configured: expected {wrong}"
        )
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; ValueError where it is damaged."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _differences(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """In which of its weights a model differs from others, by name, shape and dtype; "" if in none."""
    own = model.state_dict()
    wrong = [
        f"{name} {_shown(tensor)}, got {_shown(tensors.get(name))}"
        for name, tensor in own.items()
        if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype)
    ] + [f"no {name}" for name in tensors if name not in own]
    return f"{'; '.join(wrong[:3])} ({len(wrong)} tensors in all)" if wrong else ""


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
    if type(value) in _SOLVERS.values():
        return {"fit": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, list | tuple):
        return [_encoded(name, each) for each in value]
    if hasattr(value, "__index__"):
        return int(value)
    raise TypeError(
        f"{name} must be numbers, texts, a tensor or options of a fit to be saved, got {type(value).__name__}"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=_dtype_called(value["dtype"]), device="cpu")
    options = dict(value)
    return _SOLVERS[options.pop("fit")](**options)


def _dtype_called(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be one of torch's, such as float32, got {name!r:.50}")
    return dtype


def _dtype(model: nn.Module) -> torch.dtype:
    tensors = (*model.parameters(), *model.buffers())
    found = {each.dtype for each in tensors if each.is_floating_point()}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found))) or "none"
        raise ValueError(f"the weights must be of one floating dtype to be saved, got {names}; see Module.to")
    return found.pop()


def _fetched(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The folder with the two files of a repository."""
    hub = require("huggingface_hub", f"{repo_id!r} is no folder on this machine; a repository of that name")
    wanted = {"allow_patterns": [CONFIG, WEIGHTS], "revision": revision, "token": token}
    try:
        return Path(hub.snapshot_download(repo_id, **wanted))
    except (OSError, ValueError) as error:  # of HTTP and the connection, and of a name that none can have
        raise FileNotFoundError(
            f"{repo_id!r} must be a folder on this machine with {CONFIG} and {WEIGHTS}, or a repository "
            f'"user/model" of Hugging Face\'s Hub: there is no such folder, and the Hub says: {error}'
        ) from error


def _safetensors() -> ModuleType:
    require("safetensors.torch", "a saved model")  # which `import safetensors` leaves alone
    return require("safetensors", "a saved model")
