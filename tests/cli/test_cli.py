from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import convinit
from convinit import viz
from convinit.cli.app import app
from convinit.fit.api import DEFAULT_PEAK, SOLVERS
from convinit.fit.result import attention_maps
from convinit.init.options import METHODS
from convinit.nn import sincos_2d
from convinit.serve import FORMATS

SMALL_FIT = ["--grid", "4x5", "--dim", "16", "--heads", "2", "--layers", "3", "-f", "3"]
# A run of a second.
TINY_RUN = (
    "recipe.epochs=1",
    "data.train_count=70",
    "model.dim=32",
    "model.depth=1",
    "run.eval_batch_size=800",
)
TINY_DEMO = ["reproduce", "demo", *(word for each in TINY_RUN for word in ("--set", each))]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def executable() -> str:
    path = Path(sys.executable).with_name("convinit")
    assert path.exists(), "the entry point is not installed"
    return str(path)


def test_entry_point_runs():
    done = subprocess.run([executable(), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"convinit {convinit.__version__}")


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "trian", "train --help", "train --inti impulse", "train --init implse"]
    + [f"{command} --help" for command in "demo fit plot reproduce predict export tune info".split()],
)
def test_the_door_opens_without_torch(words):
    """Help and typos are answered at once: torch takes seconds and hundreds of megabytes."""
    code = (
        "import sys\nfrom convinit.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert done.stderr.endswith("False False\n"), done.stderr
    assert done.returncode == (0 if words.startswith("--") or words.endswith("--help") else 2)
    assert "Traceback" not in done.stderr


def test_help_names_what_the_library_takes():
    """Words of help that stand in modules of the library which import torch."""
    plot, fit, export = (
        re.sub(r"[│\s]+", " ", invoke(name, "--help").output) for name in ("plot", "fit", "export")
    )
    assert ", ".join(METHODS) in plot and all(name in plot for name in SOLVERS)
    assert f"[default: ({DEFAULT_PEAK})]" in fit and f"[default: ({DEFAULT_PEAK})]" in plot
    assert all(name in export for name in FORMATS)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--help"], "Usage"),
        (["--version"], "convinit"),
        (["trian"], "train"),
        (["train", "--init", "implse"], "did you mean impulse?"),
        (["train", "--data", "fashion_mnist"], "did you mean fashion-mnist?"),
        (["plot", "--model", "vit_tiny_patch16_224", "--init", "implse"], "did you mean impulse?"),
        (["reproduce"], "drop-in"),
        (["reproduce", "alhpa"], "did you mean alpha?"),
    ],
)
def test_the_door_is_quick(words, answer):
    """Help, lists and typos are answered without PyTorch, which takes seconds to load."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('with torch' if 'torch' in sys.modules else 'alone'))\n"
        "from convinit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert answer in done.stdout + done.stderr and done.stdout.endswith("alone\n"), done


def test_importing_convinit_leaves_the_extras_alone():
    code = (
        "import sys, convinit\n"
        "print([m for m in ('typer', 'rich', 'accelerate', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("library", "begin"), [("typer", "convinit: "), ("safetensors", "error: ")])
def test_without_the_extra_one_sentence_says_what_to_do(library, begin, tmp_path):
    code = f"import sys; sys.modules['{library}'] = None; from convinit.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", *SMALL_FIT, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"{begin}the command line needs {library}, which is not installed; "
        "get all that it needs with: pip install 'convinit[train]'"
    )


def test_a_terminal_without_utf_8(tmp_path):
    """What was computed is written, and what the terminal cannot show is spelt."""
    done = subprocess.run(
        [executable(), "fit", *SMALL_FIT, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and r"3 \xd7 2 heads" in done.stdout, done.stderr
    assert (tmp_path / "weights.safetensors").exists() and (tmp_path / "filters.png").exists()


def test_a_reader_that_goes_away_costs_nothing(tmp_path):
    """`convinit fit … | head -1`."""
    command = [executable(), "fit", *SMALL_FIT, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.read()
    process.wait()
    assert (tmp_path / "fit.json").exists() and (tmp_path / "filters.png").exists()


@pytest.mark.parametrize("command", [[], ["demo"], ["fit"], ["plot"], ["train"], ["tune"], ["info"]])
def test_help_teaches(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "convinit demo" in result.output or command != [] and f"convinit {command[0]}" in result.output


def test_info():
    result = invoke("info")
    assert result.exit_code == 0
    assert ["torch", torch.__version__] in [line.split() for line in result.output.splitlines()]
    assert json.loads(invoke("info", "--json").output) == convinit.build_info()


def test_fit_prints_a_table():
    result = invoke("fit", *SMALL_FIT)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["layer", "head", "offset", "mse", "peak", "hit", "rate", "weight", "norm"]
    assert len(lines) == 1 + 6 + 1 and lines[-1].startswith("3 × 2 heads in ")


def test_fit_writes_weights_that_make_the_maps(tmp_path):
    result = invoke("fit", *SMALL_FIT, "--peak", "0.6", "--seed", "3", "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    out = tmp_path / "new" / "folder"
    tensors = load_file(out / "weights.safetensors")
    assert tensors["wq"].shape == tensors["wk"].shape == (3, 2, 16, 8)
    P = sincos_2d((4, 5), 16)
    torch.testing.assert_close(tensors["pos_embed"], P)
    maps = attention_maps(tensors["wq"].flatten(0, 1), tensors["wk"].flatten(0, 1), P, 8**-0.5)
    targets = convinit.impulse_targets(tensors["offsets"].flatten(0, 1), (4, 5))
    for b in range(6):
        rows = targets[b] >= 0
        assert maps[b][rows, targets[b][rows]].mean().item() == pytest.approx(0.6, abs=0.03)
    with safe_open(out / "weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    record = json.loads((out / "fit.json").read_text())
    assert record["settings"] == settings and settings["peak"] == 0.6 and settings["seed"] == 3
    assert record["offsets"] == tensors["offsets"].tolist()
    assert record["peak"] == tensors["peak"].tolist()
    assert (out / "filters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("solver", [["adam", "--steps", "5"], ["svd", "--weight-norm", "3"]])
def test_fit_by_the_papers_solvers(solver, tmp_path):
    result = invoke("fit", *SMALL_FIT, "--fit", *solver, "--pos-embed", "learned", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    norms = load_file(tmp_path / "weights.safetensors")["weight_norm"]
    if solver[0] == "svd":
        torch.testing.assert_close(norms, torch.full((3, 2), 3.0, dtype=torch.float64))
    assert json.loads((tmp_path / "fit.json").read_text())["settings"]["fit"] == solver[0]


def test_fit_reads_position_embeddings_from_files(tmp_path):
    P = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"pos_embed": P[None], "other": torch.ones(2)}, tmp_path / "p.pt")
    save_file({"a.pos": P}, tmp_path / "p.safetensors")
    np.save(tmp_path / "p.npy", P.numpy())
    for name in ("p.pt", "p.safetensors", "p.npy"):
        result = invoke("fit", *SMALL_FIT, "--pos-embed", tmp_path / name, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        torch.testing.assert_close(load_file(tmp_path / "out" / "weights.safetensors")["pos_embed"], P)


def test_files_that_hold_code_are_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"pos_embed": Trap()}, tmp_path / "trap.pt")
    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for name in ("trap.pt", "trap.npy"):
        result = invoke("fit", *SMALL_FIT, "--pos-embed", tmp_path / name)
        assert result.exit_code == 2 and "cannot be read" in result.output
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fit", "--grid", "3x"], "--grid must be HxW or one number, such as 16x16 or 16, got '3x'"),
        (["fit", "--heads", "3"], "--dim must be divisible by heads, got 512 and 3"),
        (["fit", "--heads", "0"], "--heads must be at least 1, got 0"),
        (["fit", "-f", "4"], "--kernel-size must be odd"),
        (["fit", "--peak", "0.5", "--weight-norm", "3"], "--weight-norm or --peak, not both"),
        (["fit", "--steps", "5"], "steps belongs to fit adam, got fit newton"),
        (["fit", "--pos-embed", "nothing.pt"], "'nothing.pt', which is no file"),
        (["fit", "--pos-embed", __file__], "not a .npy, .safetensors, .pt or .pth file"),
        (["plot"], "give --model with a name of timm, --fitted with a folder of convinit fit, or --run"),
        (
            ["plot", "--fitted", "nothing"],
            "folder of convinit fit --out, got 'nothing' without weights.safetensors",
        ),
        (["demo", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["demo", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (
            ["plot", "--fitted", "nothing", "--option", "depth=2", "--init", "mimetic", "--seed", "1"],
            "--option, --init, --seed must not be given with --fitted, which draws weights as they are",
        ),
        (["plot", "--fitted", "nothing", "--images", "a.png"], "--images must not be given with --fitted"),
    ],
)
def test_errors_are_one_line_and_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_traceback_on_request():
    result = invoke("--traceback", "fit", "--heads", "3")
    assert isinstance(result.exception, ValueError)
    assert invoke("fit", "--heads", "3").exit_code == 2  # and not afterwards


def test_truncated_files_are_named(tmp_path):
    for name in ("bad.npy", "bad.safetensors", "bad.pt"):
        (tmp_path / name).write_bytes(b"\x00\x01")
        result = invoke("fit", "--pos-embed", tmp_path / name)
        assert result.exit_code == 2 and f"{name} cannot be read as" in result.stderr.replace("\n", "")


def test_warnings_are_one_line():
    result = invoke("fit", "--grid", "8", "--dim", "16", "--heads", "8", "--layers", "1", "--peak", "0.9")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: ") and len(result.stderr.strip().splitlines()) == 1


def test_unwritable_folder_is_code_1(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (["fit", *SMALL_FIT], ["demo"]):
        result = invoke(*arguments, "--out", tmp_path / "file" / "folder")
        assert result.exit_code == 1 and result.stderr.startswith("error: ")


def test_the_demo_is_a_table_with_pictures_of_its_heads(tmp_path):
    result = invoke(*TINY_DEMO, "--seeds", "1", "--jobs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (page,) = tmp_path.glob("digits-demo-*.md")
    names = {f"{page.stem}{end}" for end in (".md", ".csv", ".png", "-heads.png", "-maps.png")}
    assert {path.name for path in tmp_path.iterdir()} == {"cells", *names}
    assert page.read_text().count("![") == 3 and page.read_text().count(".png)") == 3
    (kept,) = tmp_path.glob("cells/*/step-*")
    assert "-I-impulse-" in str(kept)  # the run whose heads are drawn
    again = invoke(*TINY_DEMO, "--seeds", "1", "--out", tmp_path)
    assert "7 of 7 runs are in" in again.stderr and "Written: " in again.stdout


@pytest.mark.parametrize(
    ("words", "rows", "seeds", "settings"),
    [
        ([], 7, 3, {}),
        (["--quick"], 4, 1, {"recipe.epochs": 5}),
        (["--quick", "--seeds", "2"], 4, 2, {"recipe.epochs": 5}),
    ],
)
def test_the_demo_runs_its_table(words, rows, seeds, settings, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        "convinit.cli.reproduce.run_tables", lambda *given, **options: calls.append((given, options))
    )
    assert invoke("demo", *words, "--out", tmp_path).exit_code == 0
    (((tables, given, out), options),) = calls
    ((command, table),) = tables.items()
    assert command == " ".join(["convinit demo", *words]) and table.name == "demo" and len(table.rows) == rows
    assert (given, out, options["seeds"]) == (settings, tmp_path, seeds)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another matter on Windows")
def test_ctrl_c_keeps_finished_runs_and_leaves_no_process(tmp_path):
    command = [executable(), *TINY_DEMO, "--seeds", "40", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if next(tmp_path.glob("cells/*/cell.json"), None) is not None:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all processes of the group
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "To go on: convinit reproduce demo" in stderr
    assert 0 < len(list(tmp_path.glob("cells/*/cell.json"))) < 280
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_fit_finds_an_unwritable_folder_before_the_work(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setattr("convinit.fit_qk", lambda *_, **__: pytest.fail("fitted before looking at --out"))
    result = invoke("fit", "--grid", "4", "--dim", "16", "--heads", "2", "--out", str(blocker / "deep"))
    assert result.exit_code == 1
    assert str(blocker) in result.stderr


TINY = ["--model", "vit_tiny_patch16_224"]
for _option in ("img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3", "num_classes=4"):
    TINY += ["--option", _option]


@pytest.fixture
def tiny_vit():
    timm = pytest.importorskip("timm", exc_type=ImportError)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4
    )


def test_plot_shows_a_model_before_and_after(tiny_vit, tmp_path, monkeypatch):
    report = convinit.init_vit_(tiny_vit, method="default", values="default")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in tiny_vit.state_dict().items()}}, tmp_path / "a.pt"
    )
    drawn = []

    def model_filters(report, before, **options):
        drawn.append((report, before, viz.head_maps(report)))
        return draw(report, before, **options)

    draw = viz.model_filters
    monkeypatch.setattr(viz, "model_filters", model_filters)
    result = invoke("plot", *TINY, "--seed", "3", "--after", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    [(shown, before, now)] = drawn
    offsets = convinit.sample_offsets(6, 3, stratified=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([record.offsets for record in shown.records]), offsets)
    assert viz.attention_filter(before[0], (4, 4)).amax() > 0.5 > viz.attention_filter(now[0], (4, 4)).amax()
    for (layout, i), (other, j) in zip(report.places, shown.places, strict=True):
        layout.attentions[i].share = other.attentions[j].share  # maps are drawn at the shares of the start
    for ours, theirs in zip(now, viz.head_maps(report), strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in ("filters.png", "maps.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_of_wrong_weights(tiny_vit, tmp_path):
    weights = tiny_vit.state_dict()
    weights["head.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "other.safetensors")
    result = invoke("plot", *TINY, "--after", tmp_path / "other.safetensors", "--out", tmp_path)
    assert result.exit_code == 2 and "is of another model: head.bias [4], got [7]" in result.stderr
    (tmp_path / "bad.pt").write_bytes(b"hello world")
    result = invoke("plot", *TINY, "--before", tmp_path / "bad.pt", "--out", tmp_path)
    assert result.exit_code == 2 and "bad.pt cannot be read as weights" in result.stderr
    result = invoke("plot", *TINY, "--before", tmp_path / "none.pt", "--out", tmp_path)
    assert result.exit_code == 2 and "none.pt', which is none" in result.stderr
    result = invoke("plot", "--model", "vit_nix", "--out", tmp_path)
    assert result.exit_code == 2 and "a name that timm knows, got 'vit_nix'; timm." in result.stderr


def test_plot_of_a_fit(tmp_path):
    assert invoke("fit", *SMALL_FIT, "--out", tmp_path / "fit").exit_code == 0
    result = invoke("plot", "--fitted", tmp_path / "fit", "--radius", "1", "--out", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"filters.png", "maps.png"}
    (tmp_path / "fit" / "weights.safetensors").write_bytes(b"\x00\x01")
    result = invoke("plot", "--fitted", tmp_path / "fit", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "was not written by convinit fit" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["plot", "--model", "vit_nix", "--out", "new/out"],
        ["fit", *SMALL_FIT, "--peak", "2", "--out", "new/out"],
        ["predict", "nothing", "nothing", "--out", "new/out/a.csv"],
        [*TINY_DEMO, "--set", "model.options=nothing=1", "--out", "new/out"],
    ],
)
def test_a_command_that_fails_leaves_no_empty_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(*words).exit_code in (1, 2)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("name", "content"), [("a.npy", b"PK\x03\x04rest"), ("a.pt", b"hello world")])
def test_broken_embedding_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    result = invoke("fit", "--grid", "4", "--heads", "2", "--pos-embed", str(path))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and name in result.stderr
