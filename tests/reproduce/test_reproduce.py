from __future__ import annotations

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cifar_files import write_cifar10
from typer.testing import CliRunner

from convinit.cli.app import app
from convinit.fit import Adam
from convinit.fit.api import SOLVERS
from convinit.reproduce import DATA, TABLES, Grid, Report, declared, run_all, tables_of, unfinished
from convinit.reproduce import write_report as write
from convinit.reproduce.cells import OUTCOME, folder_of, identity, read_heads, read_outcome, run_cell
from convinit.reproduce.conclusions import conclusions
from convinit.reproduce.grid import check_data, count_steps, jobs_for, kind_of_step
from convinit.reproduce.readings import title, value
from convinit.train import checkpoint
from convinit.train import engine as engine_of
from convinit.train.build import build_model
from convinit.train.config_files import resolve
from convinit.train.engine import Engine, make_accelerator
from convinit.train.run import RunInterrupted
from convinit.viz import grid_dots, grid_lines

# A run of two seconds; "shift" has nine of them.
RESULTS = Path(__file__).parents[2] / "docs" / "results"
TINY = {
    "recipe.epochs": 1,
    "data.train_count": 70,
    "model.dim": 32,
    "model.depth": 1,
    "run.eval_batch_size": 800,
}


def tiny_grid(name: str = "shift", seeds: int = 1) -> Grid:
    return Grid.of(declared(name), range(seeds), TINY)


def fake(grid: Grid, accuracy=lambda cell, seed: 0.5, **changes) -> Report:
    """A report of outcomes that were never run."""
    outcomes = {}
    for cell, configs in grid.configs.items():
        outcomes[cell] = []
        for config in configs:
            share = accuracy(cell, config.run.seed)
            outcomes[cell].append(
                {
                    "identity": identity(config),
                    "config": config.as_dict(),
                    "accuracy": share,
                    "validation": share,
                    "epochs": config.recipe.epochs,
                    "curve": [
                        [i, share * i / config.recipe.epochs] for i in range(1, config.recipe.epochs + 1)
                    ],
                    "shifted": {p: {"up": share / 2, "down": share / 4} for p in ("1", "2", "4")},
                    "peak": {"start": 0.7, "trained": None},
                    "train_images": 1000,
                    "test_images": 797,
                    "seconds": 2.0,
                    "device": "cpu",
                    "finished": "2026-11-25T00:00:00+00:00",
                    "environment": {"torch": "2.14.1", "convinit": "0.1.0"},
                    **changes,
                }
            )
    return Report(grid, outcomes)


# --- what is declared -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "data"), [(name, data) for data in DATA for name in tables_of(data)])
def test_every_table_is_whole(name, data):
    table = declared(name, data)
    grid = Grid.of(table, (0, 1), {})
    rows, columns = [row.label for row in table.rows], [column.label for column in table.columns]
    assert table.name == name and len({*rows}) == len(rows) and len({*columns}) == len(columns)
    assert table.ours in rows and table.question.endswith("?")
    controls = [row for row in table.rows if row.control]
    assert len(controls) >= 2 and [row for row in table.rows if row.label.startswith("control")] == controls
    assert {row.against or table.ours for row in table.rows} <= {*rows}
    runs = grid.runs()
    everywhere = sum(row.everywhere for row in table.rows)
    assert len(runs) == 2 * max(1, len(table.rates)) * (len(grid.configs) - everywhere * (len(columns) - 1))
    for config in runs.values():
        assert config.data.name == data and config.run.tracker == "none"
        assert config.recipe.precision == ("no" if data == "digits" else "bf16")
    if table.figure == "lines":
        assert all(column.x is not None for column in table.columns)
    for reading in table.readings:
        assert title(reading, 8).endswith(" %")


@pytest.mark.parametrize(
    ("name", "data", "side"),
    [(name, data, side) for data, side in (("digits", 8), ("fashion-mnist", 28)) for name in tables_of(data)],
)
def test_every_small_cell_can_be_built(name, data, side, monkeypatch):
    monkeypatch.setitem(SOLVERS, "adam", Adam(steps=2))
    for configs in Grid.of(declared(name, data), (0,), {}).configs.values():
        size = configs[0].data.image_size or side
        model = build_model(configs[0], image_size=size, channels=1, num_classes=10)
        assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_each_cell_has_its_best_rate_on_validation_images():
    grid = Grid.of(declared("window", "fashion-mnist"), range(3), {})
    seeds = {config.data.seed for config in grid.runs().values()}
    assert seeds == {0, 1, 2} == {config.run.seed for config in grid.runs().values()}
    whole = fake(grid, lambda cell, seed: 0.5)
    ours, control = ("impulse (the plain call)", "1,000 images"), ("control: scrambled", "1,000 images")
    # Test images would choose 5e-4, and 2e-3 diverges for one seed: validation images choose 1e-3.
    test = {5e-4: 0.9, 1e-3: 0.6, 2e-3: 0.8}
    outcomes = {cell: [dict(each) for each in found] for cell, found in whole.outcomes.items()}
    for cell in (ours, control):
        for each in outcomes[cell]:
            rate, seed = each["config"]["recipe"]["lr"], each["config"]["run"]["seed"]
            each["validation"] = {5e-4: 0.1, 1e-3: 0.2, 2e-3: 0.3}[rate]
            each["accuracy"] = test[rate] + 0.01 * seed * (cell == ours)
            if rate == 2e-3 and seed == 1:
                each["failed"] = "the loss became nan"
    report = Report(grid, outcomes)
    assert report.values(ours, "accuracy") == pytest.approx([60, 61, 62])
    assert report.paired(ours, control, "accuracy") == pytest.approx([0, 1, 2])
    page = report.markdown("convinit reproduce window", conclusions(report))
    # mean 1, sd 1, three seeds: 4.303 / sqrt(3)
    assert "paired by seed, with its 95 % interval: +1.0 (-1.5 to +3.5)." in page
    assert "Rates chosen: 0.0005 for " in page and "0.001 for impulse (the plain call), " in page
    assert "Unfinished" not in page


def test_epochs_until_an_accuracy():
    curve = {"curve": [[1, 0.3], [2, 0.6], [3, 0.55], [4, 0.7]], "epochs": 4}
    assert [value(f"epochs-to-{x}", curve) for x in (30, 60, 70, 71)] == [1, 2, 4, None]


@pytest.mark.parametrize("data", ["digits", "cifar10"])
@pytest.mark.parametrize("name", ["models", "alpha", "kernel-size", "sigma", "data", "convergence", "shift"])
def test_rows_as_in_the_paper_have_its_weights(name, data):
    """The authors' scripts: Adam on P, σ = 0.1; uniform mimetic noise; values as nn.Linear makes them."""
    cells = Grid.of(declared(name, data), (0,), {"init.values": "mimetic"}).configs
    of_row = {
        row: [configs[0] for cell, configs in cells.items() if cell[0] == f"{row}, as in the paper"]
        for row in ("impulse", "mimetic")
    }
    assert of_row["impulse"] and of_row["mimetic"]
    for config in of_row["impulse"]:
        assert (config.init.method, config.init.fit, config.init.values) == ("impulse", "adam", "default")
        assert config.model.options == {"scale": 0.1}
    for config in of_row["mimetic"]:
        assert (config.init.method, config.init.distribution) == ("mimetic", "uniform")
        assert config.init.values == "default" and config.model.options == {}


def test_the_convmixer_as_in_the_paper():
    """The kinds of its script (random, softmax, box1, which is the impulse, and box25) without the GELU."""
    cells = Grid.of(declared("convmixer", "cifar10"), (0,), {}).configs
    found = {cell[0]: configs[0] for cell, configs in cells.items() if cell[0].endswith("as in the paper")}
    kinds = {(config.init.method, config.init.num_cells) for config in found.values()}
    assert kinds == {("impulse", None), ("box", 25), ("softmax", None), ("random", None)}
    for label, (config,) in {cell[0]: configs for cell, configs in cells.items()}.items():
        assert config.model.options == ({"spatial_gelu": False} if label in found else {})


def test_tables_share_their_runs():
    grids = {name: Grid.of(declared(name), (0,), {}) for name in TABLES}

    def runs_of(name: str, column: str) -> str:
        return identity(grids[name].configs["impulse", column][0])

    same = {
        runs_of("models", "Model I"), runs_of("alpha", "α = 0.2"), runs_of("kernel-size", "f = 3"),
        runs_of("data", "1,000 images"), runs_of("shift", "Model I"),
    }  # fmt: skip
    assert len(same) == 1
    assert runs_of("convergence", "Model I") not in same
    assert len(unfinished(list(grids.values()), Path("nowhere"))) < sum(len(g.runs()) for g in grids.values())


def test_runs_that_were_kept_keep_their_identity():
    """A setting that is added must be `later`: else none of the runs that people keep is found again."""
    assert identity(resolve("quick")) == "c4ac0e0de000"
    assert identity(resolve("2404.01139")) == "bd740ee4e0b1"
    for key in ("recipe.cooldown_epochs", "data.aug_repeats"):
        assert identity(resolve("2404.01139", given={key: 3})) != "bd740ee4e0b1"


def test_columns_of_the_data_table_have_as_many_steps():
    grid = Grid.of(declared("data"), (0,), {})
    (data,) = check_data([grid]).values()
    steps = {count_steps(configs[0], data) for configs in grid.configs.values()}
    assert steps == {128}
    full = Grid.of(declared("data", "cifar10"), (0,), {})
    epochs = {cell[1]: configs[0].recipe.epochs for cell, configs in full.configs.items()}
    assert epochs == {"1 %": 19600, "5 %": 3920, "10 %": 1960, "25 %": 784, "100 %": 200}
    assert full.configs["impulse", "1 %"][0].run.eval_every == 98
    svhn = Grid.of(declared("data", "svhn"), (0,), {}).configs
    assert (
        svhn["impulse", "1 %"][0].recipe.epochs == 200 * 144 // 2
    )  # 73,257 images are 144 batches, 733 are 2


def test_settings_of_all_cells():
    table = declared("alpha")
    config = Grid.of(table, (3,), {"recipe.epochs": 2}).configs["impulse", "α = 0.3"][0]
    assert (config.recipe.epochs, config.model.alpha, config.run.seed) == (2, 0.3, 3)
    for key in ("model.alpha", "init.method", "run.seed", "run.eval_every", "data.name", "model.variant"):
        with pytest.raises(ValueError, match=f"sets {key} itself"):
            Grid.of(table, (0,), {key: 0})
    with pytest.raises(
        ValueError, match="table 'shift', row 'ConvMixer, frozen impulses': model.heads must not"
    ):
        Grid.of(declared("shift"), (0,), {"model.heads": 2})
    # Labels stay true.
    for key in ("init.kernel_size", "init.pos_embed_gain"):
        with pytest.raises(ValueError, match=f"table 'timm' sets {key} itself"):
            Grid.of(declared("timm"), (0,), {key: 5})
    with pytest.raises(ValueError, match=r"table 'timm' sets model.options.embed_dim itself"):
        Grid.of(declared("timm"), (0,), {"model.options": {"embed_dim": 128}})
    with pytest.raises(ValueError, match="table 'data' sets recipe.batch_size itself"):
        Grid.of(declared("data"), (0,), {"recipe.batch_size": 128})
    timm = Grid.of(declared("timm"), (0,), {"model.options": {"drop_path_rate": 0.1}})
    options = timm.configs["default", "300 images"][0].model.options
    assert options["drop_path_rate"] == 0.1 and options["embed_dim"] == 64
    # A row that is about the values keeps them.
    cells = Grid.of(declared("models"), (0,), {"init.values": "mimetic"}).configs
    assert cells["default, values too", "Model I"][0].init.values == "default"
    assert cells["random", "Model I"][0].init.values == "mimetic"
    # A row's table of options takes no more than it names.
    with pytest.raises(ValueError, match=r"table 'alpha' sets model.options.scale itself"):
        Grid.of(table, (0,), {"model.options": {"scale": 0.2}})
    cells = Grid.of(table, (0,), {"model.options": {"value": False}}).configs
    assert cells["impulse, as in the paper", "α = 0"][0].model.options == {"value": False, "scale": 0.1}
    # What surrounds a run is not part of it.
    other = Grid.of(table, (3,), {"recipe.epochs": 2, "data.workers": 1, "run.threads": 2})
    assert identity(other.configs["impulse", "α = 0.3"][0]) == identity(config)


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*-*.md")), ids=lambda page: page.stem)
def test_a_committed_page_says_what_its_table_says(page):
    data = next(each for each in DATA if page.stem.startswith(f"{each}-"))
    table = declared(page.stem.removeprefix(f"{data}-"), data)
    title, question, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert (title, question) == (f"# {table.title}", f"{table.question} {table.note}".strip())


def test_refused():
    with pytest.raises(ValueError, match="table must be one of demo, convmixer"):
        declared("tables")
    with pytest.raises(ValueError, match=r"'drop-inn'; did you mean drop-in\?"):
        declared("drop-inn")
    with pytest.raises(
        ValueError,
        match="^data must be fashion-mnist for table 'drop-in', got 'digits': "
        "convinit reproduce drop-in --data fashion-mnist$",
    ):
        declared("drop-in")
    with pytest.raises(ValueError, match="data must be digits or fashion-mnist for table 'sweep'"):
        declared("sweep", "svhn")
    with pytest.raises(ValueError, match="data must be one of digits, fashion-mnist, cifar10"):
        declared("alpha", "imagenet")
    with pytest.raises(ValueError, match=r"\[recipe\] has no key"):
        Grid.of(declared("alpha"), (0,), {"recipe.epoch": 2})


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_cell_is_trained_measured_and_kept(tmp_path, monkeypatch):
    config = tiny_grid().configs["impulse", "Model I"][0]
    shares: list[float] = []
    built = []
    real = engine_of.build_model
    monkeypatch.setattr(engine_of, "build_model", lambda *a, **b: built.append(a) or real(*a, **b))
    name, outcome = run_cell(config, tmp_path, True, shares.append)
    assert len(built) == 1  # and with the model its fit
    assert name == identity(config) == outcome["identity"] and shares == [1.0]
    assert outcome["curve"] == [[1, outcome["accuracy"]]] and outcome["train_images"] == 70
    assert 0.3 < outcome["peak"]["start"] < 0.8
    assert outcome == read_outcome(config, tmp_path)
    # The shifted accuracy is that of the trained weights on shifted images.
    (checkpoint,) = folder_of(config, tmp_path).glob("step-*")
    engine = Engine(config, make_accelerator(config), checkpoint)
    images, labels = engine.test_set.batch(range(len(engine.test_set)))
    down = torch.nn.functional.pad(images, (0, 0, 2, 0))[:, :, :-2]
    with torch.no_grad():
        hits = (engine.inner.eval()(down).argmax(1) == labels).double().mean().item()
    assert outcome["shifted"]["2"]["down"] == pytest.approx(hits, abs=1.5 / 797)
    assert outcome["accuracy"] == pytest.approx(
        (engine.inner(images).argmax(1) == labels).double().mean().item(), abs=1.5 / 797
    )
    assert set(outcome["shifted"]["1"]) == {"down", "up", "right", "left"}


def test_a_run_that_diverges_is_said_to(tmp_path):
    grid = Grid.of(declared("shift"), (0,), {**TINY, "recipe.lr": 1e30, "recipe.epochs": 2})
    config = grid.configs["impulse", "Model I"][0]
    _, outcome = run_cell(config, tmp_path, False, lambda share: None)
    assert "the loss became" in outcome["failed"] and value("accuracy", outcome) is None
    assert not unfinished([grid], tmp_path).count(config)
    report = Report(grid, {**fake(grid).outcomes, ("impulse", "Model I"): [outcome]})
    ((_, lines),) = report.tables()
    assert next(line for line in lines if line[0] == "impulse")[1] == "diverged"
    assert report.figure() is not None
    text = "\n".join(conclusions(report))
    assert "impulse against mimetic" not in text or "want of runs" in text


def test_damaged_outcomes_are_named(tmp_path):
    config = tiny_grid().configs["impulse", "Model I"][0]
    assert read_outcome(config, tmp_path) is None
    path = folder_of(config, tmp_path) / OUTCOME
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", json.dumps({"identity": "other"})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"cell.json is no outcome of this run .* remove its folder"):
            read_outcome(config, tmp_path)


def test_a_stopped_run_goes_on(tmp_path):
    config = Grid.of(declared("shift"), (0,), {**TINY, "recipe.epochs": 3}).configs["impulse", "Model I"][0]
    _, whole = run_cell(config, tmp_path / "whole", False, lambda share: None)

    def stop(share: float) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        run_cell(config, tmp_path / "stopped", False, stop)
    assert read_outcome(config, tmp_path / "stopped") is None
    shares: list[float] = []
    _, resumed = run_cell(config, tmp_path / "stopped", False, shares.append)
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(1 / 3)
    for key in ("accuracy", "curve", "shifted", "peak", "loss"):
        assert resumed[key] == whole[key]
    assert not list(folder_of(config, tmp_path / "stopped").glob("step-*"))  # checkpoints are not kept


def test_ctrl_c_ends_the_measuring_at_the_end(tmp_path, monkeypatch):
    from convinit.reproduce import cells

    monkeypatch.setattr(cells, "_measure", lambda engine: signal.raise_signal(signal.SIGINT))
    config = tiny_grid().configs["impulse", "Model I"][0]
    with pytest.raises(KeyboardInterrupt):
        run_cell(config, tmp_path, False, lambda share: None)
    assert read_outcome(config, tmp_path) is None


def test_a_run_that_cannot_be_made_does_not_stop_the_others(tmp_path, monkeypatch):
    from convinit.reproduce import cells

    real = cells.run_training

    def failing(config, *arguments, **options):
        if config.init.method == "mimetic" and config.init.distribution == "normal":
            raise torch.OutOfMemoryError("out of memory")
        return real(config, *arguments, **options)

    monkeypatch.setattr(cells, "run_training", failing)
    done = invoke("shift", "--seeds", 1, "--jobs", 1, *SETTINGS, "--out", tmp_path)
    assert done.exit_code == 1 and "| Traceback" not in done.output
    assert "1 of 9 runs could not be made: shift, mimetic, Model I, seed 0: OutOfMemoryError" in done.output
    assert len(unfinished([tiny_grid()], tmp_path)) == 1 and "Unfinished: 8 of 9 runs" in done.output


def test_a_run_of_another_process_is_not_done_twice(tmp_path):
    config = tiny_grid().configs["impulse", "Model I"][0]
    folder = folder_of(config, tmp_path)
    folder.mkdir(parents=True)
    with checkpoint.locked(folder, ".cell-lock"):
        _, outcome = run_cell(config, tmp_path, False, lambda share: None)
    assert "another process is training into" in outcome["error"] and not (folder / OUTCOME).exists()
    _, first = run_cell(config, tmp_path, False, lambda share: None)
    _, second = run_cell(config, tmp_path, False, lambda share: pytest.fail("trained again"))
    assert first == second


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_save_ends_the_grid(tmp_path, monkeypatch, signum):
    """Too late to stop its own run, it must stop those that would follow."""
    real = checkpoint.save

    def save(*arguments, **options):
        signal.raise_signal(signum)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    todo = unfinished([tiny_grid()], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(todo, tmp_path, jobs=1)
    assert len(unfinished([tiny_grid()], tmp_path)) == len(todo)
    assert len(list(tmp_path.glob("cells/*/step-*"))) == 1


def test_jobs(monkeypatch):
    quick = list(tiny_grid().runs().values())
    monkeypatch.setattr("convinit.reproduce.grid.cpus", lambda: 5)
    assert jobs_for(quick) == 5 and jobs_for(quick, 3) == 3
    full = list(Grid.of(declared("shift", "cifar10"), (0,), {}).runs().values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert jobs_for(full) == 1  # each run has all threads
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert jobs_for(full) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,-1,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # CUDA stops at the invalid one
    from convinit.reproduce.grid import _workers

    assert [each["CUDA_VISIBLE_DEVICES"] for each in _workers(full, 3)] == ["2", "5", "2"]
    assert jobs_for(full[:1], 3) == 1


COMMAND = [sys.executable, "-m", "convinit.cli", "reproduce", "shift", "--seeds", "2", "--jobs", "2"]
SETTINGS = [word for key, each in TINY.items() for word in ("--set", f"{key}={each}")]


def start(out: Path, *more: str) -> subprocess.Popen:
    command = [*COMMAND, *SETTINGS, *more, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcomes(out: Path) -> dict[str, dict]:
    clock = ("finished", "seconds", "environment")
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob(f"cells/*/{OUTCOME}")}
    return {name: {k: v for k, v in each.items() if k not in clock} for name, each in found.items()}


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_the_same_command_goes_on(tmp_path, signum):
    process = start(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not outcomes(tmp_path / "killed"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 130)
    if signum != signal.SIGKILL:
        text = " ".join(text.split())
        assert "interrupted: finished runs are kept" in text and "Unfinished: " in text
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # no worker is left behind
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = outcomes(tmp_path / "killed")
    assert 0 < len(before) < 14
    process = start(tmp_path / "killed")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "runs are in" in text
    process = start(tmp_path / "whole")
    process.communicate(timeout=120)
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert len(outcomes(tmp_path / "whole")) == 14


# --- what is written ----------------------------------------------------------------------------------------


def spread(cell, seed) -> float:
    return {"impulse": 0.9, "control: scrambled": 0.9, "control: norm-matched": 0.7}.get(
        cell[0], 0.5
    ) + 0.01 * seed


def test_a_table_says_what_its_runs_say(tmp_path):
    grid = Grid.of(declared("alpha"), range(3), {})
    report = fake(grid, spread)
    command = "convinit reproduce alpha"
    page = report.markdown(command, conclusions(report))
    assert "| **impulse** | **91.0 ± 1.0** |" in page and "| mimetic | 51.0 ± 1.0 |" in page
    assert (
        "| control: scrambled | 91.0 ± 1.0 ≈ |" in page
        and "Rows are judged against impulse: ▲ clearly" in page
    )
    assert "impulse is nowhere clearly above every control: no gain is shown" in page
    assert f"`{command}`" in page and "Unfinished" not in page
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == 2 * len(grid.configs)
    ours = next(each for each in rows if (each["row"], each["column"]) == ("impulse", "α = 0.5"))
    assert (ours["mean"], ours["sd"], ours["seeds"]) == ("91.000", "1.000", "3")
    assert ours["values"] == "90.000 91.000 92.000"
    paths = write(report, tmp_path, command)
    assert [path.name for path in paths] == ["digits-alpha.md", "digits-alpha.csv", "digits-alpha.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_clearly_above_every_control():
    report = fake(
        Grid.of(declared("convergence"), range(3), {}),
        lambda c, s: spread(c, s) - 0.1 * (c[0] == "control: scrambled"),
    )
    text = "\n".join(conclusions(report))
    assert "After 12 epochs: impulse is clearly above every control." in text


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for data in ("digits", "fashion-mnist") for name in tables_of(data)]
)
def test_every_table_is_drawn_and_written(name, data, tmp_path):
    report = fake(Grid.of(declared(name, data), range(2), {}), spread)
    write(report, tmp_path, "convinit")
    page = (tmp_path / f"{data}-{name}.md").read_text()
    for row in report.grid.table.rows:
        assert f"| {row.label} |" in page.replace("**", "")
    assert "nan" not in page and "None" not in page


def test_the_page_of_architectures_names_them():
    report = fake(Grid.of(declared("architectures"), range(2), {}), spread)
    page = report.markdown("convinit", conclusions(report))
    names = "vit_tiny_patch16_224 or vit_small_patch16_224 or swin_tiny_patch4_window7_224 or mixer_s16_224"
    assert f"Model: {names}." in page
    line = next(each for each in page.splitlines() if each.startswith("| mimetic"))
    assert line.count("|") == 6 and line.endswith("|  |")  # no queries and keys in the last


def test_unfinished_tables_say_so(tmp_path):
    grid = Grid.of(declared("models"), range(3), {})
    whole = fake(grid, spread)
    part = Report(
        grid, {cell: found[:1] if cell[0] != "random" else [] for cell, found in whole.outcomes.items()}
    )
    page = part.markdown("convinit", conclusions(part))
    assert "**Unfinished: 27 of 93 runs.**" in page and "| random | – | – | – | – |" in page
    assert part.figure() is not None
    assert Report(grid, grid.outcomes(tmp_path)).figure() is None
    one = fake(Grid.of(declared("models"), (0,), {}), spread)
    assert conclusions(one) == ["With a single seed no difference can be called clear: run more (--seeds)."]


def test_means_stand_apart_by_two_standard_errors():
    """Two means of 3 runs, sd 1.0 each: their difference has the standard error √(2/3) = 0.816."""
    points = {"impulse": 0.8, "random": 0.8164, "mimetic": 0.8163, "control: scrambled": 0.7837}
    grid = Grid.of(declared("alpha"), range(3), {})
    report = fake(grid, lambda cell, seed: points.get(cell[0], 0.7836) + 0.01 * (seed - 1))
    standings = {row.label: report.standing((row.label, "α = 0"), "accuracy") for row in grid.table.rows}
    assert standings["impulse"] is None and standings["random"] == "above"
    assert standings["mimetic"] == standings["control: scrambled"] == "alike"
    assert standings["control: norm-matched"] == "below"
    assert report.standing(("random", "α = 0"), "epochs-to-90") is None  # more is not better


def test_rows_are_judged_against_their_own_row():
    shares = {"impulse": 0.9, "impulse, as in the paper": 0.6}
    grid = Grid.of(declared("convmixer"), range(3), {})
    report = fake(grid, lambda cell, seed: shares.get(cell[0], 0.7) + 0.001 * seed)
    assert report.standing(("box", "trained"), "accuracy") == "below"
    assert report.standing(("random, as in the paper", "trained"), "accuracy") == "above"
    assert "random, as in the paper against impulse, as in the paper" in conclusions(report)[0]


def test_epochs_to_a_goal_are_of_the_runs_that_reached_it():
    grid = Grid.of(declared("demo"), range(2), {})
    shares = {("impulse", 0): 0.9, ("control: scrambled", 0): 0.9, ("control: scrambled", 1): 1.0}
    report = fake(grid, lambda cell, seed: shares.get((cell[0], seed), 0.5))
    (_, lines), *more = report.tables()
    assert not more and lines[0] == [
        "",
        "after 4 epochs, %",
        "test accuracy, %",
        "shifted by one pixel, %",
        "epochs to 90 %",
    ]
    last = {line[0]: line[-1] for line in lines[1:]}
    assert last["impulse"] == "8.0 (1 of 2)" and last["mimetic"] == "not reached"
    assert last["control: scrambled"] == "8.0 ± 0.0"  # at 0.9 of 1.0 in the eighth of 8


def test_columns_without_marks_are_named():
    text = conclusions(fake(Grid.of(declared("demo"), range(2), {})))[0]
    assert text.endswith("Not judged and without marks: epochs to 90 %.")
    assert "Not judged" not in conclusions(fake(Grid.of(declared("alpha"), range(2), {})))[0]


def test_a_column_is_judged_by_the_controls_that_it_has():
    """Swin has no scrambled row."""
    shares = {("impulse", "Swin, windows of 4 × 4"): 0.9}
    grid = Grid.of(declared("architectures"), range(3), {})
    text = "\n".join(conclusions(fake(grid, lambda cell, seed: shares.get(cell, 0.5) + 0.001 * seed)))
    assert "Test accuracy: impulse is clearly above every control for Swin, windows of 4 × 4." in text


def test_a_sweep_says_nothing_of_test_images():
    text = fake(Grid.of(declared("sweep"), range(2), {})).setting()
    assert "1,000 training images, augmentation" in text and "est images" not in text
    assert "797 test images" in fake(Grid.of(declared("alpha"), range(2), {})).setting()


def test_heads_are_of_finished_runs_alone(tmp_path):
    """The run whose heads are drawn is done again where its checkpoint was not kept."""
    grids = {name: Grid.of(declared(name), (0,), TINY) for name in ("shift", "demo")}
    config = grids["demo"].of_heads()
    run_cell(config, tmp_path, False, lambda share: None)  # as another table does it
    assert config not in unfinished([grids["shift"]], tmp_path)
    assert config in unfinished([grids["demo"]], tmp_path) and read_heads(config, tmp_path) is None
    accuracy = read_outcome(config, tmp_path)["accuracy"]
    run_cell(config, tmp_path, True, lambda share: None)
    assert config not in unfinished([grids["demo"]], tmp_path)
    before, after = read_heads(config, tmp_path)
    assert torch.equal(before.offsets, after.offsets) and not torch.equal(before.maps, after.maps)
    assert read_outcome(config, tmp_path)["accuracy"] == accuracy

    (weights,) = folder_of(config, tmp_path).glob("step-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    report = Report(grids["demo"], grids["demo"].outcomes(tmp_path))
    with pytest.warns(UserWarning, match="the heads are not drawn: .*damaged"):
        paths = write(report, tmp_path, "convinit demo")
    assert [path.suffix for path in paths] == [".md", ".csv", ".png"]
    (folder_of(config, tmp_path) / OUTCOME).unlink()
    assert read_heads(config, tmp_path) is None  # of a run that was stopped


def test_what_cannot_be_judged_is_not():
    grid = Grid.of(declared("alpha"), range(3), {})
    whole = fake(grid, spread)
    part = Report(grid, {cell: found[:1] for cell, found in whole.outcomes.items()})
    assert part.standing(("random", "α = 0"), "accuracy") == "unjudged"
    assert "| random | 50.0 ? |" in part.markdown("convinit", ())
    assert "every control" not in "\n".join(conclusions(part))


def test_controls_of_the_convmixer():
    """Filters are judged against random filters, matrices against permutations."""
    shares = {"impulse": 0.9, "control: random": 0.97, "impulse, N×N matrices": 0.8}
    grid = Grid.of(declared("convmixer"), range(3), {})
    text = "\n".join(conclusions(fake(grid, lambda cell, seed: shares.get(cell[0], 0.7) + 0.001 * seed)))
    assert "Test accuracy: impulse is nowhere clearly above every control" in text
    assert "Test accuracy: impulse, N×N matrices is clearly above every control for trained, frozen." in text


def test_a_table_of_diverged_runs_is_still_written(tmp_path):
    for name in ("convergence", "alpha", "models"):
        grid = Grid.of(declared(name), range(2), {})
        failed = {
            cell: [{"identity": identity(each), "failed": "the loss became nan"} for each in configs]
            for cell, configs in grid.configs.items()
        }
        report = Report(grid, failed)
        page = report.markdown("convinit", ())
        assert report.figure() is None and "| diverged |" in page.replace("**", "")


def test_grid_pictures_refuse():
    values = {"a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="must be \\[3, seeds\\]"):
        grid_lines({"accuracy": values}, [1, 2, 3], xlabel="x")
    with pytest.raises(ValueError, match="at least one row"):
        grid_dots({}, ["a"])
    with pytest.raises(ValueError, match="the same rows"):
        grid_dots({"one": values, "two": {"b": torch.zeros(2, 3)}}, ["x", "y"])
    gaps = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    figure = grid_lines({"accuracy": {"a": gaps}}, [1, 2], xlabel="x", log_x=True, title="t")
    (line,) = figure.axes[0].lines
    assert line.get_ydata()[0] == 1 and math.isnan(line.get_ydata()[1])


# --- the command --------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    words = ["reproduce", *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})


def test_tables_are_listed_with_their_data_sets():
    done = invoke()
    listed: dict[str, set[str]] = {data: set() for data in DATA}
    for block in done.output.split("For --data ")[1:]:
        head, *rows = block.split("\n\n")[0].splitlines()
        for data in head.removesuffix(":").replace(" (the default)", "").split(", "):
            listed[data] |= {row.split()[0] for row in rows if not row.startswith(" ")}
    assert done.exit_code == 0 and listed == {data: set(tables_of(data)) for data in DATA}


def test_the_command_runs_a_table_and_takes_it_from_disk(tmp_path):
    words = ("shift", "--seeds", 1, "--jobs", 1, *SETTINGS, "--out", tmp_path)
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    name = "digits-shift-epochs=1-train_count=70-dim=32-depth=1"
    assert "9/9 shift, ConvMixer, frozen impulses, Model I, seed 0: " in done.output
    assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.md").exists()
    assert "With a single seed" in done.output
    again = invoke(*words)
    assert again.exit_code == 0 and "runs, 1 at once" not in again.output and "Written" in again.output
    assert not list(tmp_path.glob("cells/*/step-*"))
    plan = invoke(*words, "--dry-run")
    assert plan.exit_code == 0 and "0 runs to do" in plan.output


def test_dry_run_measures_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("convinit.reproduce.grid.measure", lambda config, seconds: (None, 0.5))
    done = invoke("models", "alpha", "--dry-run", "--jobs", 2, "--out", tmp_path / "o")
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line.split() for line in done.output.splitlines() if line.strip()}
    assert lines["models"][1:6] == ["31", "93", "93", "128", "500.0"]
    assert lines["alpha"][1:6] == ["42", "126", "105", "128", "500.0"]  # 21 of them are Model I's
    assert "198 runs to do, 2 at once" in done.output and "about 1 h 45 min" in done.output
    assert not (tmp_path / "o").exists()


def test_kinds_of_steps():
    configs = Grid.of(declared("models"), (0, 1), {}).runs().values()
    assert len({kind_of_step(config) for config in configs}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tables"], "table must be one of"),
        (["alpha", "--data", "mnist"], "data must be one of"),
        (["window"], "error: --data must be fashion-mnist for table 'window', got 'digits': convinit"),
        (["window", "--data", "fashion-mnist", "--set", "recipe.lr=1"], "sets recipe.lr itself"),
        (["alpha", "--set", "epochs=3"], "--set must be SECTION.KEY=VALUE"),
        (["alpha", "--set", "recipe.epochs=x"], "epochs must be a whole number"),
        (["alpha", "--set", "model.alpha=0.3"], "sets model.alpha itself"),
        (["alpha", "--set", "recipes.epochs=3"], "a setting is of one of model, init, data, recipe, run"),
        (["alpha", "--set", "recipe.compile=yes"], "compile must be true or false"),
        (["alpha", "--seeds", 0], "seeds must be at least 1"),
        (["alpha", "--data", "tiny-imagenet"], "root must be where the data set 'tiny-imagenet' lies"),
        (["alpha", "--data", "cifar10", "--root", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_errors_in_one_line(arguments, message, tmp_path):
    done = invoke(*arguments, "--out", tmp_path / "o")
    assert done.exit_code in (1, 2)
    assert message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "o").exists()


def test_the_papers_size_on_files_in_the_genuine_format(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_cifar10(tmp_path / "data", monkeypatch)
    small = [
        "model.dim=32", "model.depth=1", "model.heads=2", "model.mlp_dim=32", "model.patch_size=8",
        "recipe.epochs=10", "recipe.precision=no", "data.workers=0",
    ]  # fmt: skip
    words = [word for each in small for word in ("--set", each)]
    words = ["convergence", "--data", "cifar10", "--root", tmp_path / "data", "--seeds", 1, *words]
    plan = invoke(*words, "--dry-run", "--out", tmp_path / "o")
    assert plan.exit_code == 0, plan.output
    assert "7 runs to do" in plan.output and not (tmp_path / "o").exists()
    done = invoke(*words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("cifar10-convergence-*.md")
    page = path.read_text()
    assert "50 training and" in page and "augmentation paper" in page and "after 7 epochs, %" in page
