"""`convinit tune` and what backend="auto" does with its file. test_kernels_gpu.py has the same on a GPU."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import convinit
from convinit.cli.app import app
from convinit.kernels import tuned
from convinit.kernels.configs import Config
from convinit.kernels.tuned import Launch, Problem, Tuned
from convinit.ops import backends, tune, verify
from convinit.ops.positional_attention import packed_attention, positional_attention
from convinit.ops.shared_attention import shared_attention

MACHINE = {
    "gpu": "NVIDIA Test 3000", "processors": 132, "capability": "9.9", "torch": "2.11.0", "triton": "3.6.0",
    "cuda": "13.0", "kernels": "0" * 64,
}  # fmt: skip
CHOICE = {
    "op": "positional_attention", "dtype": "bfloat16", "N": 64, "r": 32, "positions": False, "training": True,
    "choice": "triton", "least": 16,
}  # fmt: skip
CONFIG = {"kernel": "forward", "dtype": "bfloat16", "N": 64, "r": 32, "config": [64, 64, 4, 3, 2]}


describe, TRITON_STARTS = tuned.machine, tuned._triton_starts  # before the fixture below takes their places


def content(**changes):
    whole = {
        "machine": MACHINE, "date": "2026-11-26", "disabled": {}, "choices": [CHOICE], "configs": [CONFIG],
    }  # fmt: skip
    return json.loads(json.dumps(whole | changes))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Its own folder, and a GPU number 0 by description."""
    monkeypatch.setenv("CONVINIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CONVINIT_TUNED", raising=False)
    monkeypatch.setattr(tuned, "_loaded", {})
    if not torch.cuda.is_available():
        monkeypatch.setattr(tuned, "machine", lambda device: dict(MACHINE))
        monkeypatch.setattr(tuned, "_triton_starts", lambda device: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path / "tuned"


# --- the file


def test_what_is_written_is_read(cache):
    path = tuned.write(content())
    assert path.parent == cache and path.name.startswith("nvidia-test-3000-")
    assert list(cache.iterdir()) == [path]  # and nothing half written
    found = tuned._load(0)
    problem = Problem("positional_attention", torch.bfloat16, 64, 32, False, True)
    assert found.choices == {problem: ("triton", 16)}
    assert found.configs == {Launch("forward", torch.bfloat16, 64, 32): Config(64, 64, 4, 3, 2)}
    assert str(found) == "2026-11-26 for NVIDIA Test 3000 (1 entry)"


def test_a_failed_write_leaves_the_old_file(cache, monkeypatch):
    path = tuned.write(content())
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuned.write(content(date="2027-01-01"))
    assert path.read_bytes() == before and list(cache.iterdir()) == [path]


@pytest.mark.parametrize("name", MACHINE, ids="other {}".format)
def test_another_machine_is_ignored_with_one_warning(monkeypatch, name):
    tuned.write(content())
    other = MACHINE | {name: "another"}
    monkeypatch.setattr(tuned, "machine", lambda device: other)
    if name == "gpu":  # was never tuned for, which is no fault
        assert not tuned.of(0).choices
        return
    with pytest.warns(UserWarning, match=r"was tuned for NVIDIA Test 3000.*convinit tune") as caught:
        assert not tuned.of(0).choices
        tuned.of(0)
    assert len(caught) == 1


BAD = {
    "choice": {"choices": [CHOICE | {"choice": "os.system"}]},
    "op": {"choices": [CHOICE | {"op": "x"}]},
    "dtype": {"choices": [CHOICE | {"dtype": "float64"}]},
    "flag": {"choices": [CHOICE | {"training": 1}]},
    "size": {"choices": [CHOICE | {"N": -1}]},
    "size that is no integer": {"choices": [CHOICE | {"N": 64.0}]},
    "least": {"choices": [CHOICE | {"least": True}]},
    "missing": {"choices": [{}]},
    "list": {"choices": 3},
    "kernel": {"configs": [CONFIG | {"kernel": "x"}]},
    "tile": {"configs": [CONFIG | {"config": [48, 64, 4, 3, 2]}]},
    "tile too large": {"configs": [CONFIG | {"config": [512, 64, 4, 3, 2]}]},
    "tile that is no integer": {"configs": [CONFIG | {"config": [64.0, 64, 4, 3, 2]}]},
    "warps": {"configs": [CONFIG | {"config": [64, 64, 2, 3, 2]}]},
    "stages": {"configs": [CONFIG | {"config": [64, 64, 4, 5, 2]}]},
    "programs": {"configs": [CONFIG | {"config": [64, 64, 4, 3, 0]}]},
    "length": {"configs": [CONFIG | {"config": [64, 64, 4, 3]}]},
    "none": {"configs": [CONFIG | {"config": None}]},
    "fewer keys than there are": {"configs": [CONFIG | {"kernel": "backward", "config": [16, 32, 4, 3, 2]}]},
    "disabled and chosen": {"disabled": {"positional_attention": "wrong"}},
    "another machine": {"machine": MACHINE | {"torch": "2.12.0"}},
    "no machine": {"machine": {}},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_file_that_tune_does_not_write_is_ignored_with_one_warning(cache, change):
    path = tuned.write(content())
    path.write_text(json.dumps(content(**change)))
    with pytest.warns(
        UserWarning, match=f"{path.name}.*is ignored; measure again with: convinit tune"
    ) as found:
        assert tuned.of(0) == Tuned()
        tuned.of(0)
    assert len(found) == 1


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"date', b"\xff\xfe"])
def test_damaged_files(cache, text):
    tuned.write(content()).write_bytes(text)
    with pytest.warns(UserWarning, match="convinit tune"):
        assert tuned.of(0) == Tuned()
    result = CliRunner().invoke(app, ["tune", "--show"])
    assert result.exit_code == 2 and "cannot be read" in result.output


def test_nothing_that_fails_stops_an_attention(cache, monkeypatch):
    """No home folder, one that is closed, an AMD GPU, a Triton that does not start."""
    tuned.write(content())

    def fails(error):
        def raising(*_):
            raise error

        return raising

    for error in (
        RuntimeError("Could not determine home directory."),
        PermissionError(13, "denied", "/root"),
    ):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="convinit tune"):
            patch.setattr(tuned, "path_of", fails(error))
            assert tuned.of(0) == Tuned()
        tuned._loaded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert tuned.of(0) == Tuned()
    tuned._loaded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "_triton_starts", TRITON_STARTS)  # which has no GPU to start on
        patch.setattr(torch.cuda, "device", fails(RuntimeError("Failed to find C compiler.")))
        with pytest.warns(
            UserWarning, match=r"Triton does not start \(RuntimeError: Failed to find C compiler"
        ):
            assert tuned.of(0) == Tuned()
        assert tuned.of(0) == Tuned()  # and not asked again
    tuned._loaded.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned.of(0) == Tuned() and not tuned._loaded  # but asked again after the capture


def test_switched_off(monkeypatch):
    tuned.write(content())
    monkeypatch.setenv("CONVINIT_TUNED", "0")
    assert tuned.of(0) == Tuned()


def test_read_once(cache):
    tuned.write(content())
    assert tuned.of(0).choices
    next(cache.iterdir()).unlink()
    assert tuned.of(0).choices


def test_a_shipped_file_serves_its_capability(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    (tmp_path / "sm_99.json").write_text(json.dumps(content(machine=MACHINE | {"torch": "2.9.0"})))
    assert tuned._load(0).choices
    monkeypatch.setattr(tuned, "machine", lambda device: MACHINE | {"capability": "9.0"})
    assert not tuned._load(0).choices


def test_a_machine_is_described_without_a_gpu_at_hand(monkeypatch):
    """By what every torch has: a name that one release lacks would stop all attention on CUDA."""
    gpu = SimpleNamespace(name="NVIDIA Test 3000", multi_processor_count=132, major=9, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = describe.__wrapped__(0)
    assert found.keys() == MACHINE.keys() and found["capability"] == "9.9" and len(found["kernels"]) == 64


# --- what "auto" takes


@pytest.fixture
def fake_gpu():
    """CUDA tensors without a GPU, and what `tune` has found for N = 64: ours for r = 32, efficient for 16."""
    known = Tuned("2026-11-26", "NVIDIA Test 3000")
    for op in tuned.OPS:
        for training in (False, True):
            known.choices[Problem(op, torch.bfloat16, 64, 32, False, training)] = ("triton", 16)
    known.choices[Problem("positional_attention", torch.bfloat16, 64, 32, True, True)] = ("triton", 16)
    known.choices[Problem("positional_attention", torch.bfloat16, 64, 16, False, False)] = ("efficient", 1)
    tuned._loaded[0] = known
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield known


def qkv(batch=8, heads=2, tokens=64, rank=32, dtype=torch.bfloat16, grad=False):
    return torch.empty(batch, heads, tokens, rank, device="cuda", dtype=dtype, requires_grad=grad)


def taken(x, *positions, op="positional_attention", dropout_p=0.0):
    others = (x, x, *positions) if op == "positional_attention" else (x[0], x[0])
    if op == "positional_attention" and not positions:
        others += (None, None)
    return backends.tuned_choice(op, x, dropout_p, *others)


def test_auto_goes_by_the_problem(fake_gpu):
    assert taken(qkv()) == taken(qkv(grad=True)) == taken(qkv(), op="shared_attention") == "triton"
    assert taken(qkv(batch=100)) == "triton" and taken(qkv(batch=7)) == "torch"
    assert taken(qkv(tokens=65)) == taken(qkv(rank=64)) == taken(qkv(dtype=torch.float16)) == "torch"
    assert taken(qkv(rank=16)) == "efficient" and taken(qkv(rank=16, grad=True)) == "torch"
    assert taken(qkv(grad=True), qkv()[0], None) == "triton"
    assert taken(qkv(), qkv()[0], None) == "torch"  # inference with position terms was not measured
    with torch.no_grad():
        assert taken(qkv(rank=16, grad=True)) == "efficient"


def test_auto_leaves_to_torch_what_the_kernels_do_not_know(fake_gpu):
    x = qkv()
    assert taken(x, dropout_p=0.1) == "torch"
    with torch.autograd.forward_ad.dual_level():
        assert taken(x) == "torch"
    seen = []
    torch.func.vmap(lambda y: seen.append(taken(x)) or y)(x)
    assert seen == ["torch"]
    assert taken(x) == "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "_is_exporting_flag", True)
        assert taken(x) == "torch"


@pytest.fixture
def autocast():
    """torch.autocast("cuda") switches itself off where there is no GPU."""
    was = torch.get_autocast_dtype("cuda")

    def switch(dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)

    yield switch
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", was)


def test_auto_knows_autocast(fake_gpu, autocast):
    assert taken(qkv(dtype=torch.float32)) == "torch"
    autocast(torch.bfloat16)
    assert taken(qkv(dtype=torch.float32)) == taken(qkv(dtype=torch.float16)) == "triton"
    assert taken(qkv(dtype=torch.float64)) == "torch"
    autocast(torch.float16)
    assert taken(qkv()) == "torch"


def graph_of(f, *batches, dynamic=None, **shape):
    """Names of the attention in each graph that torch.compile makes, called with several batches."""
    found = []

    def backend(module, _):
        targets = [str(node.target) for node in module.graph.nodes]
        found.append([t for t in ("convinit", "scaled_dot_product") if any(t in name for name in targets)])
        return module

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in batches:
        compiled(qkv(batch, **shape))
    return found


def test_auto_compiles_without_breaks(fake_gpu):
    def attend(q):
        return positional_attention(q, q, q)

    assert graph_of(attend, 8) == [["convinit"]]
    # An open batch size keeps the kernels, and is compiled again where it is too small for them.
    assert graph_of(attend, 8, 16, 32, 2) == [["convinit"], ["convinit"], ["scaled_dot_product"]]
    assert graph_of(attend, 8, dynamic=True) == [["scaled_dot_product"]]
    assert graph_of(attend, 8, rank=16) == [["scaled_dot_product"]]
    assert graph_of(lambda q: packed_attention(q.transpose(1, 2).flatten(2).repeat(1, 1, 3), 2), 8) == [
        ["convinit"]
    ]
    assert graph_of(lambda q: shared_attention(q[0], q[0], q), 8) == [["convinit"]]


@pytest.mark.parametrize("choice", ["cudnn", "flash", "efficient"])
def test_a_back_end_by_name(monkeypatch, choice):
    """Asked whether it serves first; PyTorch's choice where it does not."""
    asked = []
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    monkeypatch.setitem(backends._SERVES, choice, lambda params: asked.append(params.query) or False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.equal(backends.attention_by(choice, q, k, v, 0.0, 0.3), expected)
    assert len(asked) == 1


@pytest.mark.parametrize("choice", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("grad", [False, True])
def test_back_ends_take_what_they_are_given(fake_gpu, monkeypatch, choice, grad):
    monkeypatch.setitem(backends._SERVES, choice, lambda params: True)
    called, call = [], backends._sdpa_op
    monkeypatch.setattr(backends, "_sdpa_op", lambda *given: called.append(given[0]) or call(*given))
    for training in (False, True):
        fake_gpu.choices[Problem("positional_attention", torch.bfloat16, 64, 16, False, training)] = (
            choice,
            1,
        )
    x = qkv(rank=16, grad=grad)
    out = positional_attention(x, x, x)
    assert out.shape == (8, 64, 32) and out.requires_grad == grad and called == [choice]
    positional_attention(x, x, x, backend="sdpa")
    assert called == [choice]


def test_no_dropout_in_the_kernels(fake_gpu):
    with pytest.raises(ValueError, match='backend="triton" has no dropout, got dropout_p = 0.1'):
        positional_attention(qkv(), qkv(), qkv(), dropout_p=0.1, backend="triton")


# --- how it decides


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"torch": (1, 1), "triton": (0.93, 1)}, "triton"),
        ({"torch": (1, 1), "triton": (0.94, 0.5)}, "torch"),
        ({"torch": (1, 1), "triton": (0.5, 1.01)}, "torch"),  # the host would take longer
        ({"torch": (1, 1), "cudnn": (0.6, 0.9), "triton": (0.58, 0.5)}, "cudnn"),
        ({"torch": (1, 1), "cudnn": (0.6, 0.9), "flash": (0.5, 0.9), "triton": (0.4, 0.9)}, "triton"),
        ({"torch": (1, 1), "cudnn": (0.6, 0.9), "triton": (0.4, 0.95)}, "cudnn"),
        ({"torch": (1, 1), "flash": (0.99, 0.9), "efficient": (0.97, 0.9)}, "torch"),
        ({"torch": (1, 1), "flash": (0.9, 1.2)}, "torch"),
        ({"torch": (1, 1)}, "torch"),
    ],
)
def test_decisions(times, expected):
    assert tune.decide(times) == expected


@pytest.fixture
def session(monkeypatch):
    """A session with kernels that are the formula, on the CPU, and times from a table."""
    monkeypatch.setattr(verify, "DEVICE", "cpu")
    real, state = verify.results, {"spoil": lambda result: result, "seconds": {"triton": 1.0}, "broken": None}

    def results(case, heads, leaves, dout, backend, training=True):
        if backend == "auto":
            ((choice, _),) = [c for c in tuned._loaded[0].choices.values() if c[1] == 0]
        else:
            choice = backend
        out = real(case, heads, leaves, dout, "eager", training)
        if choice == "triton" and state["broken"] is not None:
            raise state["broken"]
        return [state["spoil"](x.clone()) for x in out] if choice == "triton" else out

    def measure(calls, outcomes, **_):
        for name in calls:
            if outcomes[name].status == "ok":
                seconds = state["seconds"].get(name, 2.0)
                outcomes[name].seconds, outcomes[name].host_seconds = [seconds], [seconds]

    monkeypatch.setattr(verify, "results", results)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "search", lambda *_: state.get("configs", {}))
    made = tune.Session(0, torch.bfloat16)
    return made, state


SHAPE = (6, 2, 9, 8)


def test_session_chooses_and_writes(session):
    made, state = session
    state["configs"] = {"forward": Config(32, 32, 8, 1)}
    rows = list(made.tune(SHAPE, 10.0))
    assert [row["choice"] for row in rows] == ["triton"] * 6
    assert [(row["op"], row["positions"], row["training"]) for row in rows] == [
        (*case, training) for case in verify.CASES for training in (False, True)
    ]
    assert {row["least"] for row in rows} == {6}
    assert rows[0]["ms"] == {
        "torch": [2000, 2000], "triton": [1000, 1000], "cudnn": [2000, 2000], "flash": [2000, 2000],
        "efficient": [2000, 2000],
    }  # fmt: skip
    assert set(rows[4]["ms"]) == {"torch", "triton"}  # PyTorch's product has one form
    fresh = tuned._load(0)
    assert fresh == made.tuned and len(fresh.choices) == 6
    assert fresh.configs[Launch("forward", torch.bfloat16, 9, 8)] == Config(32, 32, 8, 1)
    # Measured again, with another result and another shape: rows are replaced, others stay.
    state["seconds"], state["configs"] = {"triton": 3.0, "cudnn": 1.0}, {}
    again = tune.Session(0, torch.bfloat16)
    assert [row["choice"] for row in again.tune(SHAPE, 10.0)] == ["cudnn"] * 4 + ["torch"] * 2
    list(again.tune((6, 2, 4, 8), 10.0))
    fresh = tuned._load(0)
    assert len(fresh.choices) == 12 and not fresh.configs


def set_last_to(value):
    def spoil(x):
        x[(-1,) * x.dim()] = value
        return x

    return spoil


def drift():
    """Every call is another rounding error off."""
    count = itertools.count()
    return lambda x: x * (1 + (next(count) % 5) * 2**-8)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(set_last_to(torch.nan), "error nan"), (lambda x: 1.3 * x, "error"), (drift(), "two runs differ")],
    ids=["not written", "wrong", "not deterministic"],
)
def test_kernels_that_are_wrong_are_switched_off(session, spoil, reason):
    made, state = session
    state["spoil"] = spoil
    with pytest.warns(UserWarning, match=r"are wrong on this GPU.*Please report.*convinit info") as caught:
        rows = list(made.tune(SHAPE, 10.0))
    assert len([w for w in caught if "Please report" in str(w.message)]) == 2  # once an op
    assert all(row["choice"] == "torch" and "triton" not in row["ms"] for row in rows)
    fresh = tuned._load(0)
    assert set(fresh.disabled) == set(tuned.OPS)
    assert all(re.search(reason, why) for why in fresh.disabled.values())
    state["spoil"] = lambda x: x
    rows = list(tune.Session(0, torch.bfloat16).tune(SHAPE, 10.0))  # and stay so
    assert all(row["choice"] == "torch" for row in rows)


def test_wrong_in_a_later_problem_takes_the_choice_back(session):
    made, state = session
    assert {row["choice"] for row in made.tune(SHAPE, 10.0)} == {"triton"}
    state["spoil"] = set_last_to(torch.nan)
    with pytest.warns(UserWarning, match="switched off"):
        list(made.tune((6, 2, 4, 8), 10.0))
    assert "triton" not in {choice for choice, _ in tuned._load(0).choices.values()}


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), ValueError("no configuration")])
def test_compiler_errors_leave_the_others(session, error):
    made, state = session
    state["broken"], state["seconds"] = error, {"flash": 0.5}
    with pytest.warns(UserWarning, match=str(error)):
        rows = list(made.tune(SHAPE, 10.0))
    assert [row["choice"] for row in rows] == ["flash"] * 4 + ["torch"] * 2
    assert not tuned._load(0).disabled


def test_out_of_memory_chooses_nothing(session):
    made, state = session
    state["broken"] = torch.OutOfMemoryError("CUDA out of memory")
    rows = list(made.tune(SHAPE, 10.0))
    assert {row["reason"] for row in rows} == {"out of memory"} and len(rows) == 6
    assert not tuned._load(0).choices


def test_a_run_cut_short_keeps_what_it_found(session):
    made, state = session
    list(made.tune(SHAPE, 10.0))
    rows = made.tune((6, 2, 4, 8), 10.0)
    next(rows)
    rows.close()
    assert {problem.tokens for problem in tuned._load(0).choices} == {9}


# --- configurations


def test_fastest_configuration(monkeypatch):
    def measure(calls, outcomes, **_):
        for name in calls:
            if outcomes[name].status == "ok":
                outcomes[name].seconds = [seconds[name]]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(verify, "DEVICE", "cpu")
    right = torch.ones(4, 3)
    row_off = right.clone()
    row_off[1, 2] = 1.01
    table, better, noise, broken, wrong, late = (Config(16, 16, 4, 1, n) for n in range(1, 7))

    def fail():
        raise RuntimeError("PassManager::run failed")

    calls = {
        table: lambda: [right, None],
        noise: lambda: [right, None],
        broken: fail,
        wrong: lambda: [row_off, None],
        better: lambda: [right.clone(), None],
    }
    seconds = {str(table): 1.0, str(noise): 0.98, str(broken): 0.1, str(wrong): 0.1, str(better): 0.9}
    forever = float("inf")
    assert tune.fastest(calls, 0.1, forever, 1.0) == better
    del calls[better]
    assert tune.fastest(calls, 0.1, forever, 1.0) == table
    # After the time is up the table's and one more are all.
    calls = {table: calls[table], noise: calls[noise], late: calls[noise]}
    seconds[str(late)] = 0.1
    assert tune.fastest(calls, 0.1, 0.0, 1.0) == table
    assert tune.fastest(calls, 0.1, forever, 1.0) == late


@pytest.mark.parametrize("kernel", ["forward", "backward", "apply", "map_gradient"])
@pytest.mark.parametrize("config", [Config(64, 256, 8, 3), Config(32, 64, 4, 2, 4), Config(256, 256, 8, 4)])
def test_neighbours_can_be_read_back(kernel, config):
    found = tune.neighbours(kernel, config)
    assert 3 <= len(found) == len(set(found)) <= 5 and config not in found
    for other in found:
        assert tuned._config(kernel, list(other), config.BN) == other
        assert other.BN == config.BN and (kernel != "backward" or other.num_stages > 1)


# --- the command


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu():
    result = invoke("--minutes", "0.1")
    assert result.exit_code == 1
    assert result.output.strip() == "error: convinit tune needs an NVIDIA GPU, and torch finds none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "512,8,256"], "--shape must be four integers B,heads,N,r"),
        (["--shape", "512,8,256,0"], "must be four positive integers"),
        (["--shape", "1,1,1,256"], "r up to 128"),
        (["--minutes", "0"], "minutes must be above 0"),
    ],
)
def test_bad_input(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.output


def test_show_and_clear(cache):
    assert "nothing measured yet" in invoke("--show").output
    row = CHOICE | {
        "shape": [8, 2, 64, 32],
        "ms": {"torch": [2, 3], "triton": [1, 1.5]},
        "absent": {"x": "why"},
    }
    path = tuned.write(content(choices=[row], disabled={"shared_attention": "two runs differ"}))
    shown = invoke("--show").output
    assert "NVIDIA Test 3000" in shown and "shared_attention: our kernels are switched off, two runs" in shown
    assert "[8, 2, 64, 32] bfloat16 training: triton" in shown and "triton 1.000 (1.500)" in shown
    assert path.exists() and f"removed {path}" in invoke("--clear").output
    assert not path.exists()


def test_help():
    assert "convinit tune --shape 512,8,256,64" in invoke("--help").output.replace("\n", " ")


def test_build_info(monkeypatch):
    assert torch.cuda.is_available() or convinit.build_info()["tuned"] is None
    tuned.write(content())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 3000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 9))
    monkeypatch.setattr(tuned, "machine", lambda device: dict(MACHINE))
    assert convinit.build_info()["tuned"] == "2026-11-26 for NVIDIA Test 3000 (1 entry)"
    monkeypatch.setattr(tuned, "_loaded", {0: Tuned()})
    assert convinit.build_info()["tuned"] is None


def test_what_is_shipped_serves_any_torch_and_triton():
    shipped = sorted(Path(tuned.__file__).parent.glob("sm_*.json"))
    assert [path.name for path in shipped] == ["sm_90.json"]
    for path in shipped:
        content = tuned.read(path)
        assert content["machine"]["capability"] == "9.0" and not content["configs"]
        assert {row["choice"] for row in content["choices"]} == {"triton", "torch"}
        for row in content[
            "choices"
        ]:  # as `convinit tune` decided, or PyTorch's choice in place of a back end
            times = {name: tuple(each) for name, each in row["ms"].items()}
            decided = tune.decide(times)
            assert row["choice"] == (decided if decided == "triton" else "torch")
