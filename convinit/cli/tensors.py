"""Reading a tensor from a file without running code that the file may hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load_tensor(path: Path, key: str | None = None) -> Tensor:
    """A tensor from .npy, .safetensors, .pt or .pth.

    Args:
        path: the file.
        key: its name in a file that holds several; needless if there is one, or one called pos_embed.

    Raises:
        ValueError: another kind of file, not the format its name says, no such tensor, or several and no key.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"pos_embed must be sincos, learned or a file, got {str(path)!r}, which is no file")
    try:
        content = _read(path)
    except OSError:
        raise
    except Exception as error:  # a broken file breaks its reader in many ways
        raise ValueError(f"{path} cannot be read as {path.suffix}: {reason(error)}") from error
    if isinstance(content, Tensor):
        if key is not None:
            raise ValueError(f"{path} holds a single tensor without a name, got key {key!r}; leave it out")
        return content.detach()
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if key is None:
        key = next(iter(tensors)) if len(tensors) == 1 else "pos_embed"
    if key not in tensors:
        names = ", ".join(sorted(map(str, tensors))[:10]) + (", …" if len(tensors) > 10 else "")
        raise ValueError(
            f"{path} has no tensor {key!r}; choose one with --pos-embed-key: {names or 'it has none'}"
        )
    return tensors[key].detach()


def reason(error: Exception) -> str:
    """An error of a reader as one line. pickle's are often a bare number, so its kind is said as well."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _read(path: Path) -> Tensor | dict[str, object]:
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays; save the one as .npy")
        return torch.from_numpy(array)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if path.suffix in (".pt", ".pth"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, Tensor | dict):
            return content
        raise ValueError(f"it holds a {type(content).__name__}, neither a tensor nor a dict of tensors")
    raise ValueError("not a .npy, .safetensors, .pt or .pth file")
