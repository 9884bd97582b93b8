"""Checkpoints: folders of safetensors, JSON and TOML, written atomically.

    step-000120/model.safetensors      weights and buffers
                ema.safetensors        their moving average, if there is one
                optimizer.safetensors  the optimiser's tensors, "parameter number.name"
                progress.json          where the run is, and all numbers of optimiser and schedule
                config.toml            the whole config
                SHA256SUMS             of those files, as ``sha256sum --check`` reads it
    best/                              the weights that validation chose, without optimizer and average

A checkpoint is written into a hidden folder, synced to the disk and then renamed; only then an older one is
removed. So a kill at any moment leaves the last complete one behind. Nothing is pickled:
reading a checkpoint cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from convinit._files import sha256

FORMAT = 2
SUMS = "SHA256SUMS"
BEST = "best"
LOCK = ".lock"
_NAME = re.compile(r"step-(\d{6,})")
_HIDDEN = ".unfinished-"

Tensors = dict[str, Tensor]


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    if not out.is_dir():
        return []
    found = [(int(match[1]), path) for path in out.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(
    out: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    progress: Mapping[str, Any],
    config: str,
    *,
    keep: int,
) -> Path:
    """Writes a checkpoint, then removes all but the latest `keep`.

    Args:
        out: folder of the run.
        step: names the checkpoint. One that is already there is left as it is.
        tensors: file name without ".safetensors" → its tensors, on any device; tensors may share memory.
        progress: JSON-able.
        config: text of config.toml.
        keep: checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, for example for want of space. What was written of it is removed;
            earlier checkpoints are as they were.
    """
    final = out / f"step-{step:06d}"
    if final.exists():
        return final
    try:
        os.rename(_written(out, final.name, tensors, progress, config), final)
        _sync(out)
    except (OSError, SafetensorError) as error:
        raise _unwritten(out, final.name, error) from error
    for old in checkpoints(out)[:-keep]:
        discard(old)
    return final


def save_best(out: Path, tensors: Mapping[str, Tensors], progress: Mapping[str, Any], config: str) -> Path:
    """Writes `out`/best in the place of the one that is there; arguments and errors as in `save`."""
    final, old = out / BEST, out / f"{_HIDDEN}old-{BEST}"
    try:
        part = _written(out, BEST, tensors, progress, config)
        if final.exists():
            os.rename(final, old)  # killed now, `clean` puts it back
        os.rename(part, final)
        _sync(out)
    except (OSError, SafetensorError) as error:
        raise _unwritten(out, BEST, error) from error
    shutil.rmtree(old, ignore_errors=True)
    return final


def _written(
    out: Path, name: str, tensors: Mapping[str, Tensors], progress: Mapping[str, Any], config: str
) -> Path:
    """A checkpoint in a hidden folder, on the disk; to be renamed."""
    part = out / f"{_HIDDEN}{name}"
    try:
        part.mkdir()
        for file_name, named in tensors.items():
            # Copies: safetensors refuses tensors that share memory, as tied weights do.
            on_cpu = {key: each.detach().to("cpu", copy=True).contiguous() for key, each in named.items()}
            save_file(on_cpu, part / f"{file_name}.safetensors")
        (part / "config.toml").write_text(config, encoding="utf-8")
        content = {"format": FORMAT, **progress}
        (part / "progress.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(part.iterdir()))
        (part / SUMS).write_text(sums, encoding="utf-8")
        for path in part.iterdir():
            _sync(path)
        _sync(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return part


def _unwritten(out: Path, name: str, error: Exception) -> OSError:
    shutil.rmtree(out / f"{_HIDDEN}{name}", ignore_errors=True)
    rest = checkpoints(out)
    kept = f"{rest[-1]} is intact" if rest else "there is no earlier one"
    return OSError(
        f"the checkpoint {name} could not be written: {error}; {kept}. Make room in {out}, then run the "
        "same command again"
    )


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; killed half-way, it leaves none that looks complete."""
    hidden = checkpoint.with_name(f"{_HIDDEN}old-{checkpoint.name}")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean(out: Path) -> None:
    """Removes what a killed `save`, `save_best` or `discard` left."""
    replaced = out / f"{_HIDDEN}old-{BEST}"
    if replaced.exists() and not (out / BEST).exists():
        os.rename(replaced, out / BEST)
    for path in out.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """progress.json, after a look at which files there are.

    Raises:
        ValueError: the checkpoint is damaged, was edited, or is of another version.
    """
    try:
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        if not isinstance(progress, dict):
            raise ValueError(f"progress.json holds no object but {progress!r:.50}")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(checkpoint, error) from error
    if progress.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint} has format {progress.get('format')!r:.50}, this convinit reads {FORMAT}: go on "
            "with the convinit that wrote it"
        )
    verify(checkpoint, "progress.json", "config.toml")
    return progress


def read_tensors(checkpoint: Path, name: str, device: torch.device | str = "cpu") -> Tensors:
    """The tensors of one file; ValueError where it is damaged."""
    verify(checkpoint, f"{name}.safetensors")
    try:
        return load_file(checkpoint / f"{name}.safetensors", device=str(device))
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error


def verify(checkpoint: Path, *names: str) -> None:
    """ValueError where one of these files is not as it was written, or any file is missing."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in sums:
            if not (checkpoint / name).is_file():
                raise ValueError(f"{name} is missing")
        for name in names:
            if sums.get(name) != sha256(checkpoint / name):
                raise ValueError(f"{name} is not as it was written, its SHA-256 is another")
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Path, error: Exception) -> ValueError:
    every = checkpoints(checkpoint.parent)  # by number: step-1000000 is after step-999999
    older = every[: every.index(checkpoint)] if checkpoint in every else []
    rest = f"to go on from {older[-1].name}" if older else "to start anew; there is no older one"
    return ValueError(f"{checkpoint} is damaged ({error}); remove it {rest}")


def optimizer_state(optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """An optimiser's state as tensors, "parameter number.name", and JSON-able numbers."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            elif value is not None:
                numbers[f"{number}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def load_optimizer_(optimizer: Optimizer, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
    """Sets an optimiser to what `optimizer_state` gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers["numbers"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in numbers["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_room(out: Path, size: int, keep: int) -> None:
    """Makes the folder and sees to it that checkpoints of `size` bytes can be written there.

    Raises:
        OSError: the folder cannot be written, or the disk has too little room.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"convinit")
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error}; choose another folder with --out") from error
    copies = max(keep + 1 - len(checkpoints(out)), 1)  # a new one is complete before an old one goes
    if free < copies * size:
        raise OSError(
            f"{out} has {megabytes(free)} free, but {copies} more checkpoints of {megabytes(size)} need "
            f"{megabytes(copies * size)}; make room, choose another folder or keep fewer with run.keep"
        )


@contextlib.contextmanager
def locked(out: Path, name: str = LOCK) -> Iterator[None]:
    """While inside, no other process may train into the folder; a killed process holds it no longer.

    Args:
        out: the folder.
        name: of the file that stands for what is locked; it is there only while inside.

    Raises:
        ValueError: another process is at it.
    """
    import fcntl

    path = out / name
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is training into {out}; choose another folder") from error
            except OSError:  # a file system without locks
                pass
            try:
                if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    continue
            except FileNotFoundError:  # another process has just ended and removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
