from __future__ import annotations

import dataclasses
import inspect
import io
import re
from pathlib import Path

import pytest
from training import records, small
from typer.testing import CliRunner

from convinit.cli import train
from convinit.cli.app import app
from convinit.cli.train import _FLAGS
from convinit.cli.train_progress import Bar
from convinit.train.config import SECTIONS, Config, kind_of
from convinit.train.config_files import read_toml
from convinit.train.run import run_training


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


SMALL_RUN = [
    "--preset", "quick", "--dim", 32, "--depth", 1, "--train-count", 70, "--epochs", 2, "--tracker", "none",
    "--set", "run.threads=none",
]  # fmt: skip


def test_help_has_every_option_in_its_panel():
    text = invoke("--help").output
    for panel in ("Model", "Initial weights", "Data", "Recipe", "Run"):
        assert f"─ {panel} ─" in text
    for name, section in SECTIONS.items():
        fields = {each.name: each for each in dataclasses.fields(section)}
        for key in _FLAGS[name]:
            assert f"--{fields[key].metadata['flag'] or key.replace('_', '-')} " in text
            assert fields[key].metadata["help"].split()[0] in text
    assert len(inspect.signature(train.train).parameters) < 40
    assert "convinit train --preset quick" in text and "[default: (0.001)]" in text


def test_a_run_from_the_command_line(tmp_path):
    done = invoke(*SMALL_RUN, "--out", tmp_path / "o", "--set", "recipe.ema=0.5")
    assert done.exit_code == 0, done.output
    assert "epoch 2/2: loss" in done.output and "average's top-1" in done.output
    assert f"Weights: {tmp_path}/o/step-000004/model.safetensors" in done.output
    assert [r["epoch"] for r in records(tmp_path / "o") if r["kind"] == "epoch"] == [1, 2]
    assert (
        "the run was finished already"
        in invoke(*SMALL_RUN, "--out", tmp_path / "o", "--set", "recipe.ema=0.5").output
    )
    other = invoke(*SMALL_RUN, "--out", tmp_path / "o", "--set", "recipe.ema=0.6")
    assert other.exit_code == 2 and "other settings: recipe.ema: 0.6, not 0.5." in other.output


def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda form: "20261126-120000")
    for options, ending in ((["--lr", 1e-3], ""), (["--lr", 2e-3], "-2")):
        folder = f"convinit-train/digits-simple_vit-impulse-20261126-120000{ending}"
        done = invoke(*SMALL_RUN, *options, "--val-fraction", 0.2)
        assert done.exit_code == 0, done.output
        assert f"cpu, into {folder}" in done.output
        assert f"and are in {folder}/best; 4 steps" in done.output
        assert f"Weights: {folder}/step-000004/model.safetensors" in done.output
        assert f"convinit predict {folder} IMAGES" in Path(folder, "README.md").read_text()
    assert train._again(["train", "--overwrite"], Path(folder)) == ["train", "--out", folder]
    assert train._again(["train", "--out", "o"], Path("o")) == ["train", "--out", "o"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out must be given to several processes" in invoke(*SMALL_RUN).output


@pytest.mark.parametrize("out", [[], ["--out", "new/run"]])
@pytest.mark.parametrize(
    "wrong", [["--data", "folder", "--root", "nothing"], ["--model", "simplevit"], ["--train-count", "5000"]]
)
def test_a_run_that_cannot_begin_leaves_nothing(wrong, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(*SMALL_RUN, *wrong, *out).exit_code in (1, 2)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "new").mkdir()
    assert invoke(*SMALL_RUN, *wrong, *out).exit_code in (1, 2)
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]  # which is the user's


def test_the_bar_shows_loss_accuracy_and_speed(tmp_path):
    text = io.StringIO()
    watching = Bar(1, tmp_path, file=text, disable=False, ncols=160)
    run_training(small(recipe__epochs=1, run__log_every=2), tmp_path, watcher=watching)
    assert (watching.bar.n, watching.bar.total) == (4, 4)
    assert re.fullmatch(r"loss \d\.\d{3}, [\d,]+ images/s, top-1 \d+\.\d%", watching.bar.postfix)
    watching.bar.total = watching.bar.n = 12_345
    watching.testing()
    watching.close()
    assert re.search(r"testing: .*12,345/12,345 steps, \d\d:\d\d, left: 00:00, loss ", text.getvalue())
    assert f"into {tmp_path}\n" in text.getvalue() and "epoch 1/1: loss" in text.getvalue()


def test_command_line_over_file_over_preset(tmp_path):
    path = tmp_path / "run.toml"
    done = invoke(
        "--preset", "paper", "--model", "convmixer", "--init", "box", "--option", "a=(1, 'b')",
        "--set", "model.share_layers=true", "--no-download", "--set", "recipe.clip=none", "--lr", "2e-3",
        "--save-config", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config = Config.of(read_toml(path))
    assert (config.model.name, config.init.method, config.recipe.lr) == ("convmixer", "box", 2e-3)
    assert config.model.share_layers and config.model.options == {"a": [1, "b"]}
    again = tmp_path / "again.toml"
    assert invoke("--config", path, "--epochs", 7, "--save-config", again).exit_code == 0
    changed = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, epochs=7))
    assert Config.of(read_toml(again)) == changed


def test_a_written_config_explains_itself(tmp_path):
    assert invoke("--preset", "quick", "--save-config", tmp_path / "run.toml").exit_code == 0
    lines = (tmp_path / "run.toml").read_text().splitlines()
    at = lines.index("warmup_epochs = 0.0")
    assert lines[at - 1] == "# Epochs in which the learning rate rises linearly."
    assert "# Learning rate over the steps. Of: cosine, one-cycle, constant." in lines


def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*SMALL_RUN, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "4: 2 epochs of 2, batch 64" in done.output and "70 training and 797 test images" in done.output
    assert "checkpoint" in done.output and list(tmp_path.iterdir()) == []


def test_a_dry_run_fetches_nothing(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: pytest.fail("fetched"))
    for command in (["train"], ["reproduce", "alpha"]):
        words = [*command, "--data", "cifar10", "--root", str(tmp_path), "--download", "--dry-run"]
        done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})
        assert done.exit_code == 1 and "holds it; --download without --dry-run fetches it\n" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "fast"], "error: --lr must be a number, got 'fast'"),
        (
            ["--preset", "quik"],
            "2505.19985, 2505.19985-imagenet, quick, got 'quik'; did you mean quick?",
        ),
        (["--preset", "quick", "--heads", 3], "error: --dim must be divisible by --heads, got 64 and 3"),
        (["--preset", "quick", "--variant", "IV"], "error: --variant must be one of vanilla, I, II, III"),
        (["--data", "folder"], "error: --root must be where the data set 'folder' lies, got None"),
        (
            ["--data", "cifar10", "--root", "nowhere"],
            "'cifar10', but nowhere is no folder; --download makes it and fetches the data set\n",
        ),
        (["--preset", "quick", "--train-count", 5000], "error: --train-count must be at most 1000"),
        (["--preset", "quick", "--precision", "fp16"], "error: --precision must be no or bf16"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (
            ["--init", "implse"],
            "error: --init must be one of impulse, mimetic, random, default, scrambled, norm_matched for "
            "model 'simple_vit', got 'implse'; did you mean impulse?",
        ),
        (["--preset", "quick", "--model", "simplevit"], "got 'simplevit'; did you mean simple_vit?\n"),
        (
            ["--model", "convmixer", "--set", "init.offsets=random"],
            "error: init.offsets must not be set for model",
        ),
        (["--peak", 0.5, "--set", "init.weight_norm=3"], "error: give init.weight_norm or --peak, not both"),
        (
            ["--set", "recipe.warmup_epochs=300"],
            "error: recipe.warmup_epochs must be at most epochs = 200, got 300",
        ),
        (
            ["--set", "recipe.warmup_epochs=5", "--set", "recipe.cooldown_epochs=196"],
            "error: recipe.warmup_epochs must be at most epochs = 200 less cooldown_epochs = 196.0, got 5.0",
        ),
        (
            ["--set", "recipe.cooldown_epochs=1", "--set", "recipe.schedule=constant"],
            "error: recipe.cooldown_epochs must be 0 with schedule constant, got 1.0",
        ),
        (["--set", "recipe.warmup=5"], "it has epochs, batch_size"),
        (["--set", "warmup_epochs=5"], "error: --set must be SECTION.KEY=VALUE, such as recipe.epochs=50"),
        (["--lr", 1, "--set", "recipe.lr=2"], "error: --lr must be given once, by its option or by --set"),
    ],
)
def test_errors_in_one_line(arguments, message, tmp_path):
    done = invoke(*arguments, "--out", tmp_path / "o")
    assert done.exit_code in (1, 2)
    assert message in done.output and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "error" in line]) == 1


def test_every_option_is_named_as_it_was_typed():
    wrong = {int: ["x", "1.5", "9" * 30], float: ["x", "nan", "-inf"], dict: ["x", "=1"]}
    tried = 0
    for name, section in SECTIONS.items():
        for each in dataclasses.fields(section):
            typed = f"{name}.{each.name}"
            if each.name in _FLAGS[name]:
                typed = "--" + (each.metadata["flag"] or each.name).replace("_", "-")
            words = wrong.get(kind_of(section, each.name)[0], [])
            for word in [*words, *(["nonsense"] if each.metadata["choices"] else [])]:
                if word == "9" * 30 and each.name != "seed":  # the only whole numbers with a highest
                    continue
                given = [typed, word] if typed.startswith("--") else ["--set", f"{typed}={word}"]
                done = invoke(*given, "--save-config", "/dev/null")
                assert done.exit_code == 2 and done.output.startswith(f"error: {typed} must be "), done.output
                tried += 1
    assert tried > 80


def test_settings_of_a_file_keep_their_names_there(tmp_path):
    (tmp_path / "run.toml").write_text("[init]\nmethod = 'implse'\n[recipe]\nlr = 0.1\n")
    done = invoke("--config", tmp_path / "run.toml", "--lr", "0.2")
    assert "error: init.method must be one of" in done.output and "--init" not in done.output
