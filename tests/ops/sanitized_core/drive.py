"""Random calls of the sanitized ops, each compared with NumPy in float64.

tests/ops/test_sanitized_core.py builds the module and runs this, in a process that has the sanitizers loaded.
No torch is loaded: the module brings what little of it the ops use.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "float64": np.float64}
PRECISION = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
sizes = st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 97])
small = st.integers(1, 4)


def load(path: str):
    spec = importlib.util.spec_from_file_location("sanitized_core", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def halves(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 in uint16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_halves(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


class Draw:
    """Tensors of drawn layouts, and the float64 values that they hold."""

    def __init__(self, data, core) -> None:
        self.data, self.core = data, core
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
        core.set_threads(data.draw(st.integers(1, 5), "threads"))

    def array(self, shape, dtype, *, size=1.0, ordered=False) -> np.ndarray:
        """In any order of dimensions, with gaps between rows and columns or one element for several."""
        order = range(len(shape)) if ordered else self.data.draw(st.permutations(range(len(shape))))
        gaps = [1 if ordered else self.data.draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
        storage = self.random.normal(size=[shape[d] * gaps[d] for d in order]) * size
        storage = halves(storage) if dtype == "bfloat16" else storage.astype(DTYPES[dtype])
        view = storage[tuple(slice(None, None, gaps[d]) for d in order)].transpose(np.argsort(order))
        if not ordered and self.data.draw(st.integers(0, 9)) == 0:
            view = np.broadcast_to(view[:1], view.shape)
        return view

    def tensor(self, shape, dtype, **options):
        array = self.array(shape, dtype, **options)
        values = from_halves(np.ascontiguousarray(array)) if dtype == "bfloat16" else array
        return self.core.Tensor(array, dtype), values.astype(np.float64)

    def maybe(self, *arguments, **options):
        return self.tensor(*arguments, **options) if self.data.draw(st.booleans()) else (None, 0.0)

    def result(self, shape, dtype):
        """To be written: dense in its last dimension alone."""
        return self.core.Tensor(np.full(shape, 7).astype(DTYPES[dtype]), dtype)


def read(tensor, dtype: str) -> np.ndarray:
    array = np.frombuffer(tensor.bytes(), {"bool": np.bool_, "int64": np.int64}.get(dtype) or DTYPES[dtype])
    return (from_halves(array) if dtype == "bfloat16" else array).astype(np.float64).reshape(tensor.shape)


def close(found: np.ndarray, expected: np.ndarray, dtype: str, what: str, slack: float = 1.0) -> None:
    error = np.abs(found - expected).max(initial=0)
    bound = slack * PRECISION[dtype] * (1 + np.abs(expected).max(initial=0))
    assert error <= bound, f"{what}: off by {error}, allowed {bound}"


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def heads_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def positional_attention(data, core) -> None:
    draw = Draw(data, core)
    shape = (data.draw(st.integers(0, 3)), data.draw(small), data.draw(sizes), data.draw(sizes))
    batch, heads, tokens, rank = shape
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    scale = rank**-0.5 * data.draw(st.sampled_from([0.3, 1.0, 30.0]))
    alpha = data.draw(st.sampled_from([1.0, 0.2, 0.0]))
    (q, q_), (k, k_), (v, v_) = (draw.tensor(shape, dtype) for _ in range(3))
    (q_pos, q_pos_), (k_pos, k_pos_) = (draw.maybe(shape[1:], dtype) for _ in range(2))
    out, lse = (
        draw.result((batch, tokens, heads * rank), dtype),
        draw.result((batch, heads, tokens), "float32"),
    )
    core.positional_attention(q, k, v, q_pos, k_pos, out, lse, scale, alpha)
    mixed_q, mixed_k = alpha * q_ + q_pos_, alpha * k_ + k_pos_
    weights = softmax(scale * mixed_q @ mixed_k.swapaxes(2, 3))
    sharp = scale * rank**0.5 > 3 and dtype != "float32"  # factors rounded to 16 bits move sharp maps
    if batch and not sharp:
        close(read(out, dtype), heads_last(weights @ v_), dtype, "out", 4 * max(1.0, scale * rank**0.5))
    dout, dout_ = draw.tensor((batch, tokens, heads * rank), dtype)
    needs = [data.draw(st.booleans()) for _ in range(3)] + [
        x is not None and data.draw(st.booleans()) for x in (q_pos, k_pos)
    ]
    like = [shape] * 3 + [shape[1:]] * 2
    made = [draw.result(s, dtype) if need else None for s, need in zip(like, needs, strict=True)]
    core.positional_attention_backward(dout, q, k, v, q_pos, k_pos, *made, scale, alpha)
    if sharp:
        return
    dout_ = dout_.reshape(batch, tokens, heads, rank).transpose(0, 2, 1, 3)
    dweights = dout_ @ v_.swapaxes(2, 3)
    dlogits = scale * weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dq, dk, dv = dlogits @ mixed_k, dlogits.swapaxes(2, 3) @ mixed_q, weights.swapaxes(2, 3) @ dout_
    full = (alpha * dq, alpha * dk, dv, dq.sum(0), dk.sum(0))
    for name, found, expected in zip(("dq", "dk", "dv", "dq_pos", "dk_pos"), made, full, strict=True):
        if found is not None:
            slack = (
                8
                * (1 + np.abs(dlogits).max(initial=0) * np.sqrt(tokens))
                * max(1.0, scale * rank**0.5)
                * (batch + 1)
            )
            close(read(found, dtype), expected, dtype, name, slack)


def shared_attention(data, core) -> None:
    draw = Draw(data, core)
    batch, heads, tokens, rank = (
        data.draw(st.integers(0, 5)),
        data.draw(small),
        data.draw(sizes),
        data.draw(sizes),
    )
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    (weights, weights_), (v, v_) = (
        draw.tensor((heads, tokens, tokens), dtype),
        draw.tensor((batch, heads, tokens, rank), dtype),
    )
    out = draw.result((batch, tokens, heads * rank), dtype)
    core.apply_map(weights, v, out)
    if batch:
        close(read(out, dtype), heads_last(weights_ @ v_), dtype, "out", 4 * np.sqrt(tokens))
    dout, dout_ = draw.tensor((batch, tokens, heads * rank), dtype)
    dmap = draw.result((heads, tokens, tokens), dtype)
    core.map_gradient(dout, v, dmap)
    dout_ = dout_.reshape(batch, tokens, heads, rank)
    close(
        read(dmap, dtype),
        np.einsum("bnhr,bhmr->hnm", dout_, v_),
        dtype,
        "dmap",
        4 * np.sqrt(batch * rank + 1),
    )


def offsets_of(data, count: int, reach: int) -> np.ndarray:
    number = st.one_of(
        st.integers(-reach - 2, reach + 2), st.sampled_from([-(2**63), 2**63 - 1, -(2**31), 2**31])
    )
    return np.array([[data.draw(number) for _ in range(2)] for _ in range(count)], np.int64).reshape(count, 2)


def target(position: int, offset: int, size: int, mode: int) -> int:
    """By hand, in Python's integers; −1 where there is none."""
    at = position + offset
    if mode == 0:
        return at if 0 <= at < size else -1
    if mode == 1:
        return min(max(at, 0), size - 1)
    if mode == 2:
        return at % size
    period = max(2 * (size - 1), 1)
    return min(at % period, period - at % period)


def impulse_conv(data, core) -> None:
    draw = Draw(data, core)
    batch, channels = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 2, 5, 64, 130]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    x = draw.array((batch, channels, height, width), dtype)
    if data.draw(st.booleans()):  # channels_last
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    values = (from_halves(np.ascontiguousarray(x)) if dtype == "bfloat16" else x).astype(np.float64)
    offsets = offsets_of(data, channels, max(height, width))
    (gain, gain_), (bias, bias_) = (draw.maybe((channels,), "float32") for _ in range(2))
    found = core.impulse_conv(core.Tensor(x, dtype), core.Tensor(offsets, "int64"), gain, bias)
    expected = np.zeros_like(values)
    for c, (dy, dx) in enumerate(offsets.tolist()):
        for i, j in itertools.product(range(height), range(width)):
            y, z = target(i, dy, height, 0), target(j, dx, width, 0)
            if y >= 0 and z >= 0:
                expected[:, c, i, j] = values[:, c, y, z]
    gain_, bias_ = (
        np.broadcast_to(np.asarray(a), channels)[:, None, None]
        for a in (1.0 if gain is None else gain_, bias_)
    )
    close(read(found, dtype), gain_ * expected + bias_, "float32" if dtype == "float64" else dtype, "out", 4)


def impulse_matrix(data, core) -> None:
    Draw(data, core)
    height, width, count = (
        data.draw(st.integers(1, 7)),
        data.draw(st.integers(1, 7)),
        data.draw(st.integers(0, 3)),
    )
    mode, dtype = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([*DTYPES, "bool"]))
    offsets = offsets_of(data, count, max(height, width))
    found = read(core.impulse_matrix(core.Tensor(offsets, "int64"), height, width, mode, dtype), dtype)
    expected = np.zeros((count, height * width, height * width))
    for b, (dy, dx) in enumerate(offsets.tolist()):
        for i, j in itertools.product(range(height), range(width)):
            y, x = target(i, dy, height, mode), target(j, dx, width, mode)
            if y >= 0 and x >= 0:
                expected[b, i * width + j, y * width + x] = 1
    assert np.array_equal(found, expected)


def qk_solver(data, core) -> None:
    draw = Draw(data, core)
    tokens, problems = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3))
    dq, dk, rank, starts = data.draw(small), data.draw(small), data.draw(small), data.draw(st.integers(1, 2))
    size = data.draw(st.sampled_from([1e-30, 1.0, 1e30, 0.0]), "size of X")
    scale = data.draw(st.sampled_from([1e-300, 1e-30, 0.3, 1.0, 1e39, 0.0]), "scale")
    (xq, xq_), (xk, xk_) = (draw.tensor((tokens, d), "float64", size=size) for d in (dq, dk))
    targets = draw.random.integers(-1, tokens, size=(problems, tokens))
    begin = [draw.tensor((starts, problems, d, rank), "float64")[0] for d in (dq, dk)]
    by_norm = data.draw(st.booleans())
    norm = np.exp(draw.random.normal(size=problems) * data.draw(st.sampled_from([1, 200]), "spread of norms"))
    monitor = core.Tensor(np.array([data.draw(st.integers(0, 9)) == 0, 0, 0], np.int64), "int64")
    wq, wk, diagnostics = core.qk_solver(
        xq, xk, core.Tensor(targets, "int64"), *begin, scale,
        core.Tensor(norm, "float64") if by_norm else None,
        0.0 if by_norm else data.draw(st.floats(0.01, 0.99)), data.draw(st.integers(0, 15)), 1e-2, monitor,
    )  # fmt: skip
    stop, solved, evaluations = read(monitor, "int64").astype(int)
    assert solved == (0 if stop and problems else problems)
    if stop:
        return
    figures = read(diagnostics, "float64")
    assert figures[:, 5].sum() == evaluations
    if (size, scale) != (1.0, 1.0) and (size, scale) != (1.0, 0.3):
        return
    for b in range(problems):
        wq_, wk_ = read(wq, "float64")[b], read(wk, "float64")[b]
        norms = [np.sqrt((w**2).sum()) for w in (wq_, wk_)]
        if by_norm and 1e-3 < norm[b] < 1e3:
            assert np.allclose(norms, norm[b], rtol=1e-6)
        if max(norms) < 30:
            maps = softmax(scale * (xq_ @ wq_) @ (xk_ @ wk_).T)
            wanted = (targets[b][:, None] == np.arange(tokens)).astype(float)
            close(figures[b, 0], ((maps - wanted) ** 2).mean(), "float32", "mse", 50)


def wrong_arguments(data, core) -> None:
    """Refused before any memory is touched."""
    draw = Draw(data, core)
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(4))
    tensors = [draw.tensor(shape, "float32")[0] for _ in range(5)]
    out = draw.result((shape[0], shape[2], shape[1] * shape[3]), "float32")
    lse = draw.result(shape[:3], "float32")
    arguments = [*tensors[:3], None, None, out, lse]
    wrong = data.draw(st.integers(0, 6), "which")
    other = tuple(data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(0, 5))))
    right = [shape, shape, shape, shape[1:], shape[1:], (shape[0], shape[2], shape[1] * shape[3]), shape[:3]][
        wrong
    ]
    assume(other != right and not (wrong == 6 and np.prod(other) == np.prod(right)) and wrong != 0)
    arguments[wrong] = draw.result(other, "float32")
    try:
        core.positional_attention(*arguments, 1.0, 1.0)
    except RuntimeError as error:
        assert "convinit" in str(error)
    else:
        raise AssertionError("not refused")
    targets = np.full((1, shape[0]), data.draw(st.sampled_from([-2, shape[0], 2**62])), np.int64)
    x, w = core.Tensor(np.ones((shape[0], 2)), "float64"), core.Tensor(np.ones((1, 1, 2, 1)), "float64")
    try:
        core.qk_solver(x, x, core.Tensor(targets, "int64"), w, w, 1.0, None, 0.5, 5, 1e-2, None)
    except RuntimeError as error:
        assert "targets" in str(error)
    else:
        raise AssertionError("not refused")


PROPERTIES = (
    positional_attention,
    shared_attention,
    impulse_conv,
    impulse_matrix,
    qk_solver,
    wrong_arguments,
)


def repeated(check, core, made: list, cases: int) -> None:
    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data):
        check(data, core)
        made.append(check)

    run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--cases", type=int, required=True, help="of all properties together")
    options = parser.parse_args()
    core, made = load(options.module), []
    for check in PROPERTIES:
        repeated(check, core, made, -(-options.cases // len(PROPERTIES)))
    print(f"{len(made)} cases")


if __name__ == "__main__":
    sys.exit(main())
