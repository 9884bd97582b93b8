"""A day's work with the commands as one types them: train, look, change one thing, go on, predict, export."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import small
from typer.testing import CliRunner

import convinit
from convinit.cli.app import app
from convinit.offsets import impulse_targets
from convinit.serve import load_trained, pictures
from convinit.train.run import Watcher, run_training
from convinit.viz import head_maps
from convinit.viz.style import new_figure

# Not of the task: they make the walk short.
SHORT = ["--dim", "32", "--depth", "2", "--heads", "2", "--train-count", "60", "--set", "run.threads=none"]


def typed(line: str, *more: str) -> str:
    """What `convinit LINE` prints; it must end well."""
    done = CliRunner().invoke(app, [*line.split(), *more], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.output


def folder_of(output: str) -> Path:
    found = re.search(r"Weights: (\S+?)/step-", output)
    assert found is not None, output
    return Path(found[1])


def fashion_mnist(root: Path) -> Path:
    """The four files, gzipped as Debian has them, with few images: a bar at the height of its class."""
    root.mkdir()
    for kind, count in (("train", 200), ("t10k", 50)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.random.default_rng(count).integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 7] = 230
        for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (root / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return root


def own_images(root: Path) -> Path:
    """train/ and test/ with a folder for each class: red and blue, of sizes that differ."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (20 + i % 3, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "data", ["--data fashion-mnist --patch-size 7", "--data folder --image-size 16 --patch-size 4"]
)
def test_from_the_first_run_to_the_exported_model(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "folder" in data
    root = own_images(tmp_path / "images") if own else fashion_mnist(tmp_path / "images")
    train = f"train --preset quick {data} --root images --epochs 2"

    first = folder_of(typed(train, *SHORT))
    pictures = {"curves.png", "filters.png", "drift.png", "init_report.txt", "init_report.json"}
    assert {*pictures, "metrics.jsonl", "README.md"} <= {path.name for path in first.iterdir()}
    assert "by 'impulse'" in (first / "init_report.txt").read_text()

    second = folder_of(typed(f"{train} --init mimetic", *SHORT))  # one thing changed: a run of its own
    assert second != first and second.parent == first.parent
    assert "by 'mimetic'" in (second / "init_report.txt").read_text()

    going_on = train.replace("--epochs 2", f"--epochs 6 --out {first}")
    output = typed(going_on, *SHORT)
    assert "After 6 epochs" in output and folder_of(output) == first
    before = (first / "drift.png").read_bytes()
    assert "drift.png" in typed(f"plot --run {first}")
    assert (first / "drift.png").read_bytes()[:8] == before[:8] == b"\x89PNG\r\n\x1a\n"

    if own:
        assert "filters.png" in typed(f"plot --run {first} --images images/test")
        typed(f"predict {first} images/test --top-k 1 --out seen.csv")
        with open("seen.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 8
        right = [Path(row["file"]).parent.name == row["class"] for row in rows]
        assert np.mean(right) == json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    typed(f"export {first} --out exported")
    assert {"model.safetensors", "config.json"} <= {path.name for path in Path("exported").iterdir()}
    assert root.exists()


@pytest.mark.parametrize("model", ["simple_vit", "vit_tiny_patch16_224"])
def test_the_pictures_show_the_start_and_the_trained_weights(model, tmp_path, monkeypatch):
    if model != "simple_vit":
        pytest.importorskip("timm")
    options = {"model__name": model, "model__options": {}, "init__kernel_size": 3, "recipe__epochs": 1}
    if model != "simple_vit":
        options |= {"model__heads": None, "model__mlp_dim": None, "model__dim": None, "model__depth": None}
        options |= {"model__patch_size": 2, "model__options": {"depth": 2, "embed_dim": 48}}
    result = run_training(small(**options), tmp_path)
    drawn = []
    monkeypatch.setattr(pictures, "drift", lambda history, **_: drawn.append(history) or new_figure(1, 1))
    weights = result.checkpoint / "model.safetensors"
    before = weights.read_bytes()
    pictures.draw_run(tmp_path)
    assert weights.read_bytes() == before

    titles = []
    real = pictures.model_filters

    def draw(report, before, *, title, **seen):
        titles.append((title, before))
        return real(report, before, title=title, **seen)

    monkeypatch.setattr(pictures, "model_filters", draw)
    pictures.draw_run(tmp_path)
    images = torch.randn(3, 1, 8, 8)
    pictures.draw_run(tmp_path, images=images)
    (_, alone), (title, on_images) = titles
    assert title.endswith("mean over 3 images")
    assert max(float((a - b).abs().max()) for a, b in zip(alone, on_images, strict=True)) > 0.01
    history, *_ = drawn
    assert history.steps.tolist() == [0, result.steps]
    torch.testing.assert_close(history.peak[0], torch.full_like(history.peak[0], 0.7), atol=0.03, rtol=0)
    report = json.loads((tmp_path / "init_report.json").read_text())
    assert report["method"] == "impulse" and report["options"]["kernel_size"] == 3
    peaks = torch.tensor([head["peak"] for head in report["heads"]])
    torch.testing.assert_close(peaks, history.peak[0].flatten(), atol=1e-3, rtol=0)

    assert (history.distance[1] > 0).all() and not torch.equal(history.peak[0], history.peak[1])
    if model != "simple_vit":  # whose share of P in the tokens only the report of its start knows
        return
    trained = load_trained(result.checkpoint).network
    now = convinit.init_vit_(trained, method="default", values="default")
    heads = report["heads"]
    for i, maps in enumerate(head_maps(now)):
        offsets = torch.tensor([(head["dy"], head["dx"]) for head in heads if head["layer"] == i])
        wanted = impulse_targets(offsets, now.grid_size)
        found = maps.gather(2, wanted.clamp(min=0)[..., None])[..., 0] * (wanted >= 0)
        expected = found.sum(dim=1) / (wanted >= 0).sum(dim=1)
        torch.testing.assert_close(history.peak[1][i], expected, atol=1e-3, rtol=0)


def test_what_a_run_cannot_be_drawn_with_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = own_images(tmp_path / "images")
    run_training(small(recipe__epochs=1), "vit")
    mixer = {"model__name": "convmixer", "model__heads": None, "model__mlp_dim": None, "model__options": {}}
    run_training(small(recipe__epochs=1, **mixer), "mixer")
    for line, answer in (
        (
            "plot --run vit --radius 1 --seed 3 --out x",
            "--seed, --radius, --out must not be given with --run",
        ),
        (f"plot --run mixer --images {images}", "its ConvMixer has no attention"),
    ):
        done = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200", "TERM": "dumb"})
        assert done.exit_code == 2 and answer in str(done.exception or done.output) + done.output, done.output
    assert "curves.png" in typed("plot --run mixer")
    Path("vit/metrics.jsonl").unlink()
    written = typed("plot --run vit")  # the heads need only the checkpoint
    assert "filters.png" in written and "curves.png" not in written


@pytest.mark.parametrize("option", ["img_size=64", "in_chans=1"])
def test_images_are_read_as_the_built_model_takes_them(option, tmp_path):
    pytest.importorskip("timm")
    images = own_images(tmp_path / "images")
    line = f"plot --model vit_tiny_patch16_224 --option depth=1 --option {option} --images {images}"
    assert " on your images" in typed(f"{line} --out {tmp_path}")


def test_a_stopped_run_is_told_of_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Stop(Watcher):
        def recorded(self, record):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("convinit.cli.train_progress.watcher", lambda *_: contextlib.nullcontext(Stop()))
    words = ["train", "--preset", "quick", "--epochs", "3", *SHORT, "--out", "o"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 128 + signal.SIGTERM, done.output
    assert {"curves.png", "filters.png", "drift.png", "init_report.txt", "README.md"} <= set(os.listdir("o"))


def test_the_report_needs_no_matplotlib(tmp_path, monkeypatch):
    run_training(small(recipe__epochs=1), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="a figure needs matplotlib"):
        pictures.draw_run(tmp_path)
    assert "by 'impulse'" in (tmp_path / "init_report.txt").read_text()


def test_a_run_whose_pictures_fail_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(out):
        raise RuntimeError("no ink")

    monkeypatch.setattr("convinit.serve.draw_run", fail)
    output = typed("train --preset quick --epochs 1", *SHORT)
    assert "After 1 epochs" in output and "could not be drawn: no ink" in " ".join(output.split())
    assert not (folder_of(output) / "curves.png").exists()
    assert CliRunner().invoke(app, ["plot", "--run", str(tmp_path)]).exit_code == 2
