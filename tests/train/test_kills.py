"""kill -9 at the rename of every file that is there whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import context, kill

from convinit._files import write_whole
from convinit.models import SimpleViT
from convinit.serve import export
from convinit.train import checkpoint

pytestmark = pytest.mark.slow  # a process for each


def model(seed: int) -> SimpleViT:
    options: dict[str, Any] = {"dim": 8, "depth": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    generator = torch.Generator().manual_seed(seed)
    return SimpleViT(4, 2, 2 + seed, method="random", generator=generator, **options).eval()


def same(one: SimpleViT, other: SimpleViT) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(ours[key].shape == each.shape and torch.equal(ours[key], each) for key, each in theirs.items())


def write_text(folder: Path, which: int) -> None:
    write_whole(folder / "file", f"text {which}" * 1000, sync=True)


def read_text(folder: Path) -> int:
    text = (folder / "file").read_text()
    return next(which for which in (1, 2) if text == f"text {which}" * 1000)


def write_pretrained(folder: Path, which: int) -> None:
    model(which).save_pretrained(folder / "model", metadata={"which": which})


def read_pretrained(folder: Path) -> int:
    loaded = SimpleViT.from_pretrained(folder / "model")
    which = loaded.metadata["which"]
    assert same(loaded, model(which))
    return which


def write_program(folder: Path, which: int) -> None:
    export(model(which), folder / "model.pt2", (3, 4, 4), format="torch-export")


def read_program(folder: Path) -> int:
    logits = torch.export.load(folder / "model.pt2").module()(torch.zeros(1, 3, 4, 4))
    return logits.shape[1] - 2


def write_checkpoint(folder: Path, which: int) -> None:
    tensors = {"model": {"weight": torch.full((100,), float(which))}}
    checkpoint.save(folder, which, tensors, {"progress": {"step": which}}, "", keep=1)


def read_checkpoint(folder: Path) -> int:
    checkpoint.clean(folder)
    last = checkpoint.checkpoints(folder)[-1]
    which = checkpoint.read_progress(last)["progress"]["step"]
    assert torch.equal(checkpoint.read_tensors(last, "model")["weight"], torch.full((100,), float(which)))
    return which


KINDS = {
    "text": (write_text, read_text, 1),
    "save_pretrained": (write_pretrained, read_pretrained, 2),
    "export": (write_program, read_program, 1),
    "checkpoint": (write_checkpoint, read_checkpoint, 2),  # its own, and that of the old one which goes
}


def write_and_die(write: Callable[[Path, int], None], folder: Path, rename: int, after: bool) -> None:
    """Dies at a rename, counted from 1, before it or after it."""
    done = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def at_rename(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == rename and not after:
                kill()
            result = function(*args, **options)
            if done == rename:
                kill()
            return result

        return at_rename

    os.replace, os.rename = dying(os.replace), dying(os.rename)
    write(folder, 2)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "kind, rename", [(kind, rename + 1) for kind, (_, _, count) in KINDS.items() for rename in range(count)]
)
def test_what_is_there_is_whole(kind, rename, after, first, tmp_path):
    write, read, count = KINDS[kind]
    if not first:
        write(tmp_path, 1)
    elif kind == "checkpoint" and rename == 2:
        pytest.skip("there is no old one to go")
    process = context.Process(target=write_and_die, args=(write, tmp_path, rename, after))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    if first and rename == 1 and not after:  # there was nothing
        with pytest.raises((FileNotFoundError, IndexError)):
            read(tmp_path)
    else:
        assert read(tmp_path) == (2 if (rename, after) > (1, False) else 1)
    write(tmp_path, 2 if kind != "checkpoint" else 3)  # whatever was left is in nobody's way
    assert read(tmp_path) == (2 if kind != "checkpoint" else 3)
