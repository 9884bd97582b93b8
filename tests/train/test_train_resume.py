"""Runs that are really killed, in processes of their own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from training import assert_same_run, context, final_tensors, kill, records, small

from convinit.serve import draw_run
from convinit.train import checkpoint, engine
from convinit.train.run import PICTURES, RunInterrupted, Watcher, run_training


class KillAfter(Watcher):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def stepped(self, images: int) -> None:
        self.left -= 1
        if self.left == 0:
            kill()


class KillAtTest(Watcher):
    def testing(self) -> None:
        kill()


class KillAtEpoch(Watcher):
    def recorded(self, record: dict[str, Any]) -> None:
        if record["kind"] == "epoch" and record["epoch"] == 2:
            kill()


def half_a_file(tensors: dict, path: Path) -> None:
    """In place of safetensors' own: the third file is cut off in the middle."""
    if path.parent.name.endswith("000004") and path.stem == "ema":
        content = safetensors.torch.save(tensors)
        path.write_bytes(content[: len(content) // 2])
        kill()
    safetensors.torch.save_file(tensors, path)


def killed_before(function: Any, at_call: int) -> Any:
    calls = iter(range(1, 1000))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at_call:
            kill()
        return function(*args, **kwargs)

    return wrapper


def child(out: Path, moment: str) -> None:
    watcher = Watcher()
    if moment.startswith("step"):
        watcher = KillAfter(int(moment.split()[1]))
    elif moment == "in the test":
        watcher = KillAtTest()
    elif moment == "after the test":
        watcher = KillAtEpoch()
    elif moment == "in a write":
        checkpoint.save_file = half_a_file
    elif moment == "before the rename":
        checkpoint.os.rename = killed_before(os.rename, 2)
    elif moment == "before an old one goes":
        checkpoint.discard = killed_before(checkpoint.discard, 1)
    elif moment == "while an old one goes":
        checkpoint.shutil.rmtree = killed_before(shutil.rmtree, 1)
    run_training(small(run__threads=1), out, watcher=watcher)


def started(out: Path, moment: str) -> Any:
    process = context.Process(target=child, args=(out, moment))
    process.start()
    return process


def exit_code(out: Path, moment: str = "never") -> int | None:
    process = started(out, moment)
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert exit_code(out) == 0
    assert [r["epoch"] for r in records(out) if r["kind"] == "epoch"] == [1, 2, 3]
    return out


@pytest.mark.parametrize(
    "moment, left",
    [
        ("step 1", 0),  # before the first checkpoint
        ("step 7", 2),  # in the middle of an epoch, a step after a checkpoint
        ("step 8", 2),  # an epoch's last step
        ("in the test", 1),
        ("after the test", 2),
        ("in a write", 1),
        ("before the rename", 1),
        ("before an old one goes", 3),
        ("while an old one goes", 2),
    ],
)
def test_kill_9_and_resume_gives_the_same_weights(moment, left, uninterrupted, tmp_path):
    assert exit_code(tmp_path, moment) == -signal.SIGKILL
    assert len(checkpoint.checkpoints(tmp_path)) == left
    assert exit_code(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)
    assert len(checkpoint.checkpoints(tmp_path)) == 2
    assert not list(tmp_path.glob(".unfinished*"))


def test_kill_9_from_outside_again_and_again(uninterrupted, tmp_path):
    clock = random.Random(0)
    for _ in range(4):
        process = started(tmp_path, "never")
        deadline = time.monotonic() + 60
        before = checkpoint.checkpoints(tmp_path)
        while (
            process.is_alive() and checkpoint.checkpoints(tmp_path) == before and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        time.sleep(clock.uniform(0, 0.03))
        process.kill()
        process.join()
    assert exit_code(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


class SignalAt(Watcher):
    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.left = signum, step

    def stepped(self, images: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


class SignalAtTest(Watcher):
    def testing(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_signals_finish_the_step_and_save(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    run_training(small(), whole)
    stops = [(SignalAt(signal.SIGTERM, 3), 3), (SignalAtTest(), 4), (SignalAt(signal.SIGINT, 4), 8)]
    for watcher, step in stops:
        with pytest.raises(RunInterrupted) as stopped:
            run_training(small(), out, watcher=watcher)
        assert stopped.value.checkpoint == out / f"step-{step:06d}" == checkpoint.checkpoints(out)[-1]
    assert stopped.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_training(small(), out).steps == 4
    assert_same_run(out, whole)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = run_training(small(recipe__epochs=1), tmp_path)
    tensors, lines = final_tensors(tmp_path), records(tmp_path)
    again = run_training(small(recipe__epochs=1), tmp_path)
    assert (first.steps, again.steps) == (4, 0) and again.figures == first.figures
    assert records(tmp_path) == lines and tensors.keys() == final_tensors(tmp_path).keys()


def test_only_the_same_run_is_resumed(tmp_path):
    run_training(small(recipe__epochs=2), tmp_path)
    with pytest.raises(
        ValueError, match=r"other settings: recipe.epochs: 1, not 2; recipe.lr: 0.02, not 0.01\."
    ):
        run_training(small(recipe__epochs=1, recipe__lr=0.02), tmp_path)
    with pytest.raises(ValueError, match="holds a run"):
        run_training(small(recipe__epochs=1), tmp_path, resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    result = run_training(small(recipe__epochs=1, recipe__lr=0.02), tmp_path, overwrite=True)
    assert result.steps == 4 and len([r for r in records(tmp_path) if r["kind"] == "epoch"]) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(ValueError, match="another process is training into"):
        run_training(small(), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between the opening of its file and the locking another process may end."""
    real, opened = fcntl.flock, []

    def flock(file, how):
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / checkpoint.LOCK).unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with checkpoint.locked(tmp_path):
        assert len(opened) == 2
        with pytest.raises(ValueError, match="another process"), checkpoint.locked(tmp_path):
            pass
        assert (tmp_path / checkpoint.LOCK).exists()


def test_other_data_are_not_gone_on_with(tmp_path, monkeypatch):
    run_training(small(recipe__epochs=1), tmp_path)
    load = engine.load_data
    monkeypatch.setattr(engine, "load_data", lambda *a, **k: load(*a, **{**k, "train_count": 109}))
    with pytest.raises(ValueError, match="step-000004, 110 training images, got 109"):
        run_training(small(recipe__epochs=1), tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "progress.json", "optimizer.safetensors", "ema.safetensors", "config.toml"]
)
def test_a_damaged_checkpoint_is_named_with_the_one_before(name, tmp_path):
    run_training(small(recipe__epochs=1), tmp_path)
    path = tmp_path / "step-000004" / name
    content = path.read_bytes()
    for damaged in (content[:-9], content[:-9] + b"000000000", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match="step-000004 is damaged .*remove it to go on from step-000002"):
            run_training(small(recipe__epochs=1), tmp_path)
    shutil.rmtree(path.parent)
    assert run_training(small(recipe__epochs=1), tmp_path).steps == 2


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(tmp_path):
    run_training(small(recipe__epochs=1), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        bad = small(data__name="folder", data__root=str(tmp_path / "none"), data__train_count=None)
        run_training(bad, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    drawn = draw_run(tmp_path)
    assert {path.name for path in drawn} == {*PICTURES} and not {*PICTURES} & {*before}
    assert run_training(small(recipe__epochs=1, recipe__lr=0.02), tmp_path, overwrite=True).steps > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # the old run's pictures are gone, too


def test_a_finished_run_without_its_records_says_so(tmp_path):
    run_training(small(recipe__epochs=1), tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="its weights are in .*metrics.jsonl"):
        run_training(small(recipe__epochs=1), tmp_path)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        (tmp_path / f"step-{step}").mkdir()
    with pytest.raises(ValueError, match="go on from step-999999"):
        checkpoint.read_progress(tmp_path / "step-1000000")


def test_sums_are_those_of_sha256sum(tmp_path):
    checkpoint = run_training(small(recipe__epochs=1), tmp_path).checkpoint
    lines = dict(reversed(line.split("  ")) for line in (checkpoint / "SHA256SUMS").read_text().splitlines())
    assert {*lines} == {path.name for path in checkpoint.iterdir()} - {"SHA256SUMS"}
    for name, digest in lines.items():
        assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest


def test_a_damaged_record_is_named(tmp_path):
    run_training(small(recipe__epochs=1), tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for wrong in ("{", "[1]", "\0"):
        path.write_text("\n".join([lines[0], wrong, *lines[1:]]) + "\n")
        with pytest.raises(ValueError, match="metrics.jsonl, line 2, is damaged .*; remove that line"):
            run_training(small(recipe__epochs=1), tmp_path)
