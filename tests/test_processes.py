"""Work in several processes: results, interrupts, and processes that die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from convinit._processes import in_processes
from convinit.train.run import RunInterrupted
from convinit.train.signals import StopRequest


def test_a_dying_process_is_reported(tmp_path, monkeypatch):
    done: list[int] = []
    arguments = {"on_tick": lambda *what: None, "on_done": done.append, "workers": [{}, {}]}
    with pytest.raises(RuntimeError, match="a process died, perhaps for want of memory"):
        in_processes(_die, [(1,), (2,)], **arguments)
    assert not done
    in_processes(_environment, [(1,), (2,), (3,)], **{**arguments, "workers": [{"SLOT": "a"}, {"SLOT": "b"}]})
    assert {slot for slot, _ in done} <= {"a", "b"} and sorted(n for _, n in done) == [1, 2, 3]


def test_an_interrupted_worker_begins_nothing_else(tmp_path):
    """Of tasks that wait in the workers' own queue, too."""
    tasks = [(str(tmp_path), i) for i in range(20)]
    with pytest.raises(KeyboardInterrupt):
        in_processes(_save_on_sigterm, tasks, on_tick=_interrupt, on_done=_interrupt, workers=[{}, {}])
    begun = {path.name for path in tmp_path.glob("begun-*")}
    saved = {path.name.replace("saved", "begun") for path in tmp_path.glob("saved-*")}
    assert 0 < len(begun) <= 2 and saved == begun


def test_the_others_save_and_end_when_a_process_dies(tmp_path):
    tasks = [(str(tmp_path), i) for i in range(20)]
    with pytest.raises(RuntimeError, match="a process died"):
        in_processes(_save_or_die, tasks, on_tick=_ignore, on_done=_ignore, workers=[{}, {}])
    begun = {path.name for path in tmp_path.glob("begun-*")}
    assert begun and begun == {path.name.replace("saved", "begun") for path in tmp_path.glob("saved-*")}
    assert len(begun) <= 2


def _ignore(*what) -> None:
    pass


def _save_or_die(folder: str, number: int, tick) -> None:
    if number == 0:
        deadline = time.monotonic() + 30
        while not list(Path(folder).glob("begun-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    _save_on_sigterm(folder, number, tick)


def _interrupt(*what) -> None:
    raise KeyboardInterrupt


def _save_on_sigterm(folder: str, number: int, tick) -> None:
    """Like a run: notes the signal, saves, and raises."""
    with StopRequest() as stop:
        Path(folder, f"begun-{number}").touch()
        tick(number)
        deadline = time.monotonic() + 30
        while not stop.signum and time.monotonic() < deadline:
            time.sleep(0.01)
    Path(folder, f"saved-{number}").touch()
    raise RunInterrupted(stop.signum, Path(folder))


def _die(number: int, tick) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _environment(number: int, tick) -> tuple[str, int]:
    return os.environ["SLOT"], number
