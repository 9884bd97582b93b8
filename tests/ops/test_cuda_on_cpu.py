"""The CUDA kernels' own source, compiled as C++ by tests/ops/cuda_on_cpu and run where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_impulse_conv import DTYPES as CONV_DTYPES
from test_impulse_conv import SHAPES as CONV_SHAPES
from test_impulse_conv import problem as conv_problem
from test_impulse_conv import tolerances
from test_impulse_matrix import DTYPES, EXTREMES
from test_qk_solver import metrics_in_float64, norms, problem
from torch import Tensor

from convinit._checks import PADDING_MODES
from convinit.ops.impulse_conv import impulse_conv_reference
from convinit.ops.impulse_matrix import impulse_matrix_reference
from convinit.ops.qk_solver import DIAGNOSTICS, qk_solver

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs Linux and a C++ compiler, c++, on PATH"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    here = Path(__file__).with_name("cuda_on_cpu")
    subprocess.run(
        [
            str(COMPILER), "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror",
            "-Wno-unknown-pragmas", "-fno-strict-aliasing",
            "-U_FORTIFY_SOURCE",  # its longjmp stays on one stack, fibers do not
            "-I", str(here), "-I", str(ROOT / "csrc"), str(here / "kernels.cpp"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


# Multiprocessors, shared memory and order of threads: one block a problem; several, that sum over each other;
# tiles of the map in global memory; more problems than the device holds at once.
DEVICES = {
    "one block a problem": (3, 96 * 1024, False),
    "three blocks a problem": (9, 96 * 1024, True),
    "tiles in global memory": (6, 1024, False),
    "one block in all": (1, 96 * 1024, True),
}
devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def solve(
    kernels, device, xq, xk, targets, wq_starts, wk_starts, *, scale, weight_norm=None, peak=0.0,
    max_iterations=200, tolerance=1e-2,
):  # fmt: skip
    """`qk_solver` by the CUDA kernel, and the number of blocks that shared a problem."""
    tensors = [x.contiguous() for x in (xq, xk, targets, wq_starts, wk_starts)]
    (starts, problems, dq, rank), dk = wq_starts.shape, wk_starts.shape[2]
    wq, wk, diagnostics = (
        torch.full(shape, 7.0, dtype=torch.float64)
        for shape in ((problems, dq, rank), (problems, dk, rank), (problems, len(DIAGNOSTICS)))
    )
    kernels.set_device(*device)
    blocks = kernels.qk_solver(
        len(xq), dq, dk, rank, ctypes.c_double(scale), starts, problems, *map(pointer, tensors),
        pointer(weight_norm), ctypes.c_double(peak), ctypes.c_int64(max_iterations),
        ctypes.c_double(tolerance), pointer(wq), pointer(wk), pointer(diagnostics),
    )  # fmt: skip
    return (wq, wk, diagnostics), blocks


@devices
@pytest.mark.parametrize("goal", ["weight_norm", "peak"])
def test_solver_matches_the_cpu(kernels, device, goal):
    inputs = problem(grid_size=(5, 7), offsets=((0, 1), (-1, 2), (0, 0)))
    inputs[2][1, ::4] = -1
    arguments = {"scale": 0.3} | (
        {"peak": 0.9} if goal == "peak" else {"weight_norm": norms(inputs, 3.0), "tolerance": 1e-4}
    )
    expected = qk_solver(*inputs, **arguments)
    (wq, wk, diagnostics), blocks = solve(kernels, device, *inputs, **arguments)
    assert blocks == (3 if device[0] >= 9 else 2 if device[0] == 6 else 1)
    mse, peak, _, weight_norm, _, evaluations = diagnostics.T
    assert (mse / expected[2][:, 0] - 1).abs().max() < (0.2 if goal == "peak" else 0.02)
    assert (peak - expected[2][:, 1]).abs().max() < 0.01
    assert ((evaluations - expected[2][:, 5]).abs() < 0.2 * expected[2][:, 5]).all()
    truth = metrics_in_float64(*inputs[:3], wq, wk, 0.3)
    torch.testing.assert_close(diagnostics[:, :3], truth, rtol=1e-4, atol=1e-9)
    for w in (wq, wk):
        torch.testing.assert_close(w.norm(dim=(1, 2)), weight_norm, rtol=1e-10, atol=0)


def test_solver_gives_the_same_bits_again(kernels):
    inputs = problem(grid_size=(6, 6))
    results = [
        solve(kernels, (9, 96 * 1024, backwards), *inputs, scale=0.3, weight_norm=norms(inputs, 4.0))[0]
        for backwards in (False, False, True)
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("tokens", [(1, 2), (4, 4), (1, 17), (5, 13)])
def test_value_at_the_start_for_every_size_of_tail(kernels, tokens):
    xq, xk, targets, wq, wk = problem(tokens, dim=9, rank=5, offsets=((0, 1), (0, -1)))
    (out_q, out_k, diagnostics), _ = solve(
        kernels, (4, 96 * 1024, False), xq, xk, targets, wq[:1], wk[:1], scale=0.5,
        weight_norm=norms((0, 0, targets), 2.0), max_iterations=0,
    )  # fmt: skip
    torch.testing.assert_close(out_q, 2 * wq[0] / wq[0].norm(dim=(1, 2), keepdim=True))
    expected = metrics_in_float64(xq, xk, targets, out_q, out_k, 0.5)
    torch.testing.assert_close(diagnostics[:, :3], expected, rtol=1e-5, atol=1e-9)


def test_targets_that_do_not_fit_give_nan(kernels):
    inputs = problem()
    inputs[2][1, 5] = inputs[2].shape[1]
    results, _ = solve(kernels, (2, 96 * 1024, False), *inputs, scale=0.3, weight_norm=norms(inputs, 3.0))
    for result in results:
        assert result[[0, 2]].isfinite().all()
    assert all(result[1].isnan().all() for result in results[:2])
    assert results[2][1, :4].isnan().all()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impulse_matrix_writes_its_result_and_nothing_beside(kernels, dtype, backwards):
    """Odd rows, results of no bytes of 16, one tile and many, memory full of garbage, offsets of any size."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    one = torch.ones((), dtype=dtype).view(integer).item()
    redzone = 64
    for grid_size in ((1, 1), (1, 5), (3, 3), (7, 5), (13, 11), (1, 151)):
        offsets = torch.tensor([*EXTREMES, [-2, 3], [3, 5], [-14, 12]])
        kernels.set_device(1 if grid_size[0] == 7 else 3, 96 * 1024, backwards)
        for mode, padding_mode in enumerate(PADDING_MODES):
            expected = impulse_matrix_reference(offsets, grid_size, padding_mode=padding_mode, dtype=dtype)
            memory = torch.full((expected.nbytes + 2 * redzone,), 0xA5, dtype=torch.uint8)
            assert kernels.impulse_matrix(
                ctypes.c_void_p(memory.data_ptr() + redzone), pointer(offsets), ctypes.c_int64(len(offsets)),
                *grid_size, ctypes.c_int64(mode), ctypes.c_uint64(one), dtype.itemsize,
            )  # fmt: skip
            result = memory[redzone:-redzone].view(dtype).view(expected.shape)
            assert torch.equal(result, expected), (grid_size, padding_mode)
            assert (memory[:redzone] == 0xA5).all() and (memory[-redzone:] == 0xA5).all()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", CONV_DTYPES, ids=str)
def test_impulse_conv_writes_its_result_and_nothing_beside(kernels, dtype, channels_last, backwards):
    """Parts of 16 bytes and single elements, one turn of a block and many, offsets of any size."""
    redzone = 64
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for shape in (*CONV_SHAPES, (2, 16, 4, 8)):
        kernels.set_device(1 if shape[0] == 2 else 3, 96 * 1024, backwards)
        for reach in (2, None):
            x, offsets, gain, bias = conv_problem(shape, dtype, reach=reach)
            x = x.contiguous(memory_format=memory_format)
            real = torch.promote_types(dtype, torch.float32)
            for factors in ((None, None), (gain, None), (gain, bias)):
                expected = impulse_conv_reference(x, offsets, *factors)
                factors = [factor if factor is None else factor.to(real) for factor in factors]
                memory = torch.full((expected.nbytes + 2 * redzone,), 0xA5, dtype=torch.uint8)
                assert kernels.impulse_conv(
                    ctypes.c_void_p(memory.data_ptr() + redzone), ctypes.c_void_p(x.data_ptr()),
                    pointer(offsets), *map(pointer, factors), ctypes.c_int64(shape[0]),
                    ctypes.c_int64(shape[1]), *shape[2:], channels_last, CONV_DTYPES.index(dtype),
                )  # fmt: skip
                result = memory[redzone:-redzone].view(dtype).as_strided(x.shape, x.stride())
                torch.testing.assert_close(result, expected, **tolerances(dtype))
                assert (memory[:redzone] == 0xA5).all() and (memory[-redzone:] == 0xA5).all()


def test_impulse_conv_rounds_to_nearest_even(kernels):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
        for factor in (1.0, 0.37, 3e-3, 70.0):
            gain, offsets, out = (
                torch.tensor([factor]),
                torch.zeros(1, 2, dtype=torch.int64),
                torch.empty_like(x),
            )
            kernels.impulse_conv(
                *map(pointer, (out, x, offsets, gain, None)), ctypes.c_int64(1), ctypes.c_int64(1), 256, 256,
                False, CONV_DTYPES.index(dtype),
            )  # fmt: skip
            expected = (x.float() * gain).to(dtype)
            assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))
            assert torch.equal(out.isnan(), expected.isnan())
