from __future__ import annotations

import json
import os

import pytest
import torch

from convinit._over_seeds import Figure
from convinit.demo import runs as demo_runs
from convinit.demo.arms import ARMS, build_model
from convinit.demo.runs import Settings, load_maps, load_runs, run_demo
from convinit.demo.summary import (
    Row,
    cells,
    columns,
    conclusions,
    early_epoch,
    markdown,
    setting,
    summarize,
)

SMALL = Settings(epochs=1, num_train=40, num_test=30, batch_size=20)


def fake_run(arm: str, seed: int, accuracies: list[float], shifted: float = 0.5) -> dict:
    return {
        "identity": {"arm": arm, "seed": seed, "settings": {}},
        "curve": [{"accuracy": value} for value in accuracies],
        "accuracy": accuracies[-1],
        "shifted": {"up": shifted - 0.1, "down": shifted + 0.1},
        "peak": {"start": 0.7, "trained": 0.3} if "impulse" in arm else {"start": None, "trained": None},
        "parameters": 100,
    }


@pytest.fixture(scope="module")
def default_model():
    return build_model(ARMS["default"], 10, seed=0)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("default", "convmixer")])
def test_arms_differ_in_the_values_of_their_initial_weights_alone(arm, default_model):
    model = build_model(ARMS[arm], 10, seed=0)
    state, default = model.state_dict(), default_model.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {k: v.shape for k, v in default.items()}
    for block, other in zip(model.blocks, default_model.blocks, strict=True):
        assert torch.equal(block.attn.offsets, other.attn.offsets)
        assert not torch.equal(block.attn.qkv.weight, other.attn.qkv.weight)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_is_kept_found_again_and_repeatable(tmp_path):
    epochs, finished, plans = [], [], []
    arguments = (["impulse-vo", "convmixer"], [0], SMALL)
    runs = run_demo(
        tmp_path,
        *arguments,
        on_plan=plans.append,
        on_epoch=lambda *e: epochs.append(e),
        on_run=finished.append,
    )
    assert [run["identity"]["arm"] for run in runs] == ["impulse-vo", "convmixer"]
    assert epochs == [("impulse-vo", 0, 1), ("convmixer", 0, 1)] and plans == [0] and finished == runs
    ours = runs[0]
    assert 0 <= ours["accuracy"] <= 1 and set(ours["shifted"]) == {"down", "up", "right", "left"}
    assert 0.3 < ours["peak"]["start"] < 1 and ours["cpu_seconds"] > 0 and ours["test_images"] == 30
    maps = load_maps(tmp_path, ours)
    assert maps["start"].shape == maps["trained"].shape == (4, 4, 64, 64)
    torch.testing.assert_close(maps["start"].sum(dim=-1), torch.ones(4, 4, 64))
    assert not torch.equal(maps["start"], maps["trained"])

    # The same again: from disk. Other seeds and settings: beside it, nothing lost.
    assert run_demo(tmp_path, *arguments, on_plan=plans.append) == runs
    assert plans[-1] == 2
    more = run_demo(tmp_path, ["convmixer"], [0, 1], SMALL, on_plan=plans.append)
    assert plans[-1] == 1 and more[0] == runs[1]
    run_demo(
        tmp_path, ["convmixer"], [0], Settings(epochs=2, num_train=40, num_test=30), on_plan=plans.append
    )
    assert plans[-1] == 0 and len(load_runs(tmp_path)) == 4

    # Anew: the same figures, and no second record.
    anew = run_demo(tmp_path, ["convmixer"], [0], SMALL, resume=False)
    assert anew[0]["curve"][0]["loss"] == runs[1]["curve"][0]["loss"]
    assert anew[0]["shifted"] == runs[1]["shifted"] and len(load_runs(tmp_path)) == 4


def test_interrupted_demo_goes_on(tmp_path):
    class Stop(KeyboardInterrupt):
        pass

    def stop(run):
        raise Stop

    arguments = (["convmixer", "default"], [0], SMALL)
    with pytest.raises(Stop):
        run_demo(tmp_path, *arguments, on_run=stop)
    kept = load_runs(tmp_path)
    assert [run["identity"]["arm"] for run in kept] == ["convmixer"]
    fresh = []
    runs = run_demo(tmp_path, *arguments, on_run=fresh.append)
    assert runs[0] == kept[0] and fresh == [runs[1]]
    assert not list(tmp_path.glob("*.part"))


def test_processes_give_what_one_gives(tmp_path):
    ticks = []
    arguments = (["convmixer"], [0, 1], SMALL)
    here = run_demo(tmp_path / "here", *arguments)
    there = run_demo(tmp_path / "there", *arguments, jobs=2, on_epoch=lambda *tick: ticks.append(tick))
    assert [run["identity"]["seed"] for run in there] == [0, 1]
    for a, b in zip(here, there, strict=True):
        assert a["curve"][0]["loss"] == b["curve"][0]["loss"] and a["shifted"] == b["shifted"]
    assert sorted(ticks) == [("convmixer", 0, 1), ("convmixer", 1, 1)]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="arms must be among default, .* got 'nix'"):
        run_demo(tmp_path, ["nix"], [0], SMALL)
    (tmp_path / "results.json").write_text('{"runs": [1')
    with pytest.raises(ValueError, match="results.json does not hold the results of a demo"):
        run_demo(tmp_path, ["convmixer"], [0], SMALL)
    assert (tmp_path / "results.json").read_text() == '{"runs": [1'
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run_demo(tmp_path / "file", ["convmixer"], [0], SMALL)


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    demo_runs.save_runs(tmp_path, [{"identity": {"arm": "a"}}])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        demo_runs.save_runs(tmp_path, [])
    assert load_runs(tmp_path) == [{"identity": {"arm": "a"}}]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_summary_is_the_mean_over_seeds():
    runs = [
        fake_run("default", 0, [0.1, 0.5, 0.89]),
        fake_run("default", 1, [0.3, 0.7, 0.91]),
        fake_run("impulse-vo", 0, [0.5, 0.92, 0.95], shifted=0.7),
        fake_run("impulse-vo", 1, [0.9, 0.96, 0.97], shifted=0.8),
    ]
    default, ours = summarize(runs)
    assert default.early.mean == pytest.approx(20) and default.early.sd == pytest.approx(200**0.5)
    assert default.end.mean == pytest.approx(90) and default.shifted.mean == pytest.approx(50)
    assert default.epochs_to_goal == Figure(3, None, 1) and default.reached == 1
    assert ours.epochs_to_goal == Figure(1.5, pytest.approx(0.5**0.5), 2)
    assert ours.peak_start.mean == pytest.approx(70) and default.peak_start is None
    assert cells(default)[-1] == "3.0 (1 of 2)" and cells(ours)[0] == ARMS["impulse-vo"].label
    table = markdown([default, ours], 3, ["One.", "Two."]).splitlines()
    assert table[0].count("|") == len(columns(3)) + 1 and table[-1] == "- Two."
    assert [early_epoch(n) for n in (1, 3, 8, 40)] == [1, 1, 4, 20]


def row(arm: str, early: float, shifted: float, sd: float | None = 1.0, n: int = 3) -> Row:
    figure = Figure(90.0, sd, n)
    return Row(arm, Figure(early, sd, n), figure, Figure(shifted, sd, n), None, 0, 100, None, None)


@pytest.mark.parametrize(
    "early, shifted, verdict",
    [
        ((90, 80), (70, 50), "seen to help, with speed and with shifts"),
        ((90, 89.5), (70, 50), "seen to help with shifts; the speed of learning they share"),
        ((90, 80), (50, 50), "seen to help with speed, and not shown to help with shifts"),
        ((80, 90), (50, 60), "not shown to come from the convolution itself"),
    ],
)
def test_text_claims_no_more_than_the_controls_allow(early, shifted, verdict):
    rows = [row("impulse-vo", early[0], shifted[0]), row("scrambled-vo", early[1], shifted[1])]
    text = " ".join(conclusions(rows, 8))
    assert verdict in text and "Not shown" in text
    # one control that does as well is enough to take the claim back
    weakened = " ".join(conclusions([*rows, row("random-vo", early[0], shifted[0])], 8))
    assert "not shown to come from the convolution itself" in weakened


def test_text_of_a_single_seed_calls_nothing_clear():
    rows = [row(arm, early, 50, sd=None, n=1) for arm, early in (("impulse-vo", 90), ("scrambled-vo", 10))]
    text = " ".join(conclusions(rows, 8))
    assert "80.0 points above" in text and "one seed cannot say" in text and "clearly" not in text


def test_setting_says_what_was_done():
    run = {**fake_run("default", 0, [0.5]), "test_images": 797}
    run["identity"]["settings"] = {"num_train": 1000, "epochs": 1, "lr": 0.001, "batch_size": 32}
    text = setting([run])
    assert "1,000 training images, 797 others to test on" in text and "1 seed, 1 epoch of AdamW" in text
    assert json.dumps(text)
