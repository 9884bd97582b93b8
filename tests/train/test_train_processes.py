"""`convinit train` as processes of its own: several that train together, and one that is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import context, final_tensors, records, small

from convinit.train import checkpoint
from convinit.train.config import Config
from convinit.train.config_files import resolve, to_toml
from convinit.train.engine import Engine
from convinit.train.run import Watcher, run_training


def command_line(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The command in this process, which writes what it says into a file."""
    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(f"said{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["convinit", *arguments]
    from convinit.cli import main

    main()


def start(arguments: list[str], folder: Path, **environment: str) -> Any:
    process = context.Process(target=command_line, args=(arguments, folder, environment))
    process.start()
    return process


def on_two_processes(
    config: Config, folder: Path, meanwhile: Callable[[list[Any]], None] = lambda processes: None
) -> tuple[list[int | None], str]:
    """Exit codes, and what they said; with the variables that torchrun and accelerate launch set."""
    (folder / "config.toml").write_text(to_toml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["train", "--config", "config.toml", "--out", "two"]
    processes = [start(arguments, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    meanwhile(processes)
    for process in processes:
        process.join(120)
        process.kill()
    said = "".join((folder / f"said{rank}").read_text() for rank in "01")
    return [process.exitcode for process in processes], said


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="PyTorch has no gloo here",
)


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    """109 images in batches of 32: the last one's parts are 6 and 7 images."""
    config = small(model__options={}, data__train_count=109, recipe__epochs=2, run__threads=1)
    codes, said = on_two_processes(config, tmp_path)
    assert codes == [0, 0], said
    assert said.count("After 2 epochs") == 1  # one of them speaks
    assert_close(tmp_path / "two", config, tmp_path / "one")


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
                 ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]],
)  # fmt: skip
def test_launchers(launcher, tmp_path):
    config = small(model__options={}, recipe__epochs=1, run__threads=1)
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", *launcher, "-m", "convinit.cli", "train"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [*command, "--config", "config.toml", "--out", "two"],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("After 1 epochs") == 1
    assert_close(tmp_path / "two", config, tmp_path / "one")


def assert_close(got: Path, config: Config, expected: Path) -> None:
    run_training(config, expected)
    ours, theirs = final_tensors(got), final_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        torch.testing.assert_close(
            ours[name], each, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    for one, other in zip(records(got), records(expected), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@needs_gloo
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    config = small(recipe__epochs=400, run__threads=1, run__checkpoint_steps="none")

    def stop_one(processes: list[Any]) -> None:  # as soon as there was an epoch
        said = tmp_path / "said0"
        while processes[0].is_alive() and not (said.exists() and "epoch 1/" in said.read_text()):
            time.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGTERM)

    codes, said = on_two_processes(config, tmp_path, stop_one)
    assert codes == [143, 143], said
    (saved,) = checkpoint.checkpoints(tmp_path / "two")

    class Look(Watcher):
        def begins(self, engine: Engine) -> None:
            plan, step = engine.plan(), engine.progress.step
            assert saved.name == f"step-{step:06d}" and 4 <= step < plan.steps and plan.processes == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path / "two", watcher=Look())


@needs_gloo
def test_batch_norm_is_refused_on_several_cpu_processes(tmp_path):
    config = resolve("quick", given={"model.name": "convmixer", "model.dim": 16, "run.tracker": "none"})
    codes, said = on_two_processes(config, tmp_path)
    assert codes == [2, 2] and "BatchNorm must be trained by one process on cpu, got 2" in said


@pytest.mark.parametrize(
    "signum, code, name", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_the_command_stops_when_told(signum, code, name, tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(small(recipe__epochs=500, run__checkpoint_steps="none")))
    process = start(["train", "--config", "config.toml", "--out", "o"], tmp_path)
    said = tmp_path / "said"
    while process.is_alive() and not (said.exists() and "epoch 1/" in said.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == code, said.read_text()
    (saved,) = checkpoint.checkpoints(tmp_path / "o")
    expected = (
        f"stopped by {name}; o/{saved.name} is saved. To go on: convinit train --config config.toml --out o"
    )
    assert expected in said.read_text()
    assert load_file(saved / "model.safetensors")
