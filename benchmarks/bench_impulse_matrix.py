"""impulse_matrix against the plain fill of the same memory, plain PyTorch, and the papers' Python loops.

    python -m pytest benchmarks/bench_impulse_matrix.py -s --benchmark-json impulse_matrix.json

`torch.zeros` writes every byte (torch's CPU allocator does not hand out memory known to be zero): its time is
that of touching the result once, page faults included. convinit is faster where the system grants huge pages.

On a machine with a GPU, `bench_impulse_matrix_on_cuda` compares the CUDA kernel with `torch.zeros`, with
the reference and with one indexed write of the ones, all on the GPU with offsets that are there already.
"""

from __future__ import annotations

import ctypes
import sys

import papers
import pytest
import torch
from torch import Tensor

from convinit import impulse_matrix, impulse_targets, sample_offsets
from convinit.ops.impulse_matrix import impulse_matrix_reference


def fresh_fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fresh memory in huge pages, filled with zeros: what writing a result of this size takes at least."""
    result = torch.empty(shape, dtype=dtype)
    page = 2**21
    begin = -(-result.data_ptr() // page) * page
    size = (result.data_ptr() + result.nbytes) // page * page - begin
    if size > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 14)  # MADV_HUGEPAGE
    return result.zero_()


ZEROS = ("torch.zeros", "fresh huge pages, filled")
PROBLEMS = [
    # heads, grid, dtype
    (8, (16, 16), torch.float32),  # the papers' own: 2 MB
    (8, (14, 14), torch.float32),
    (64, (24, 24), torch.float32),  # 85 MB
    (32, (32, 32), torch.float32),  # 134 MB
    (32, (32, 32), torch.bfloat16),  # 67 MB
    (8, (64, 64), torch.float32),  # 537 MB
]


@pytest.mark.parametrize(
    ("heads", "grid_size", "dtype"),
    [
        pytest.param(*problem, marks=pytest.mark.quick if problem[1] == (16, 16) else ())
        for problem in PROBLEMS
    ],
)
def bench_impulse_matrix(compare, heads, grid_size, dtype):
    offsets = sample_offsets(heads, 5, generator=torch.Generator().manual_seed(0))
    cells = (offsets[:, 0] + 2) * 5 + offsets[:, 1] + 2
    tokens = grid_size[0] * grid_size[1]
    shape = (heads, tokens, tokens)
    expected = impulse_matrix_reference(offsets, grid_size, dtype=dtype)

    def check(name: str, result: Tensor) -> None:
        assert result.shape == shape and result.dtype == dtype, name
        assert torch.equal(result, torch.zeros_like(result) if name in ZEROS else expected), name

    competitors = {
        "torch.zeros": lambda: torch.zeros(shape, dtype=dtype),
        "convinit": lambda: impulse_matrix(offsets, grid_size, dtype=dtype),
        "reference": lambda: impulse_matrix_reference(offsets, grid_size, dtype=dtype),
    }
    if sys.platform == "linux":
        competitors["fresh huge pages, filled"] = lambda: fresh_fill(shape, dtype)
    if expected.nbytes < 2**22:
        competitors["papers' loops"] = lambda: papers.impulse_matrix_loops(cells, 5, grid_size)
    compare(
        "impulse_matrix",
        f"{heads} heads, {grid_size[0]}x{grid_size[1]}",
        competitors,
        baseline="torch.zeros",
        check=check,
        dtype=dtype,
        bytes_moved=expected.nbytes,
    )


def indexed(offsets: Tensor, grid_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """One write at the indices of the ones; finding the rows that have one makes the host wait."""
    targets = impulse_targets(offsets, grid_size)
    matrix = torch.zeros(*targets.shape, targets.shape[1], dtype=dtype, device=offsets.device)
    head, row = torch.nonzero(targets >= 0, as_tuple=True)
    matrix[head, row, targets[head, row]] = 1
    return matrix


CUDA_PROBLEMS = [
    *PROBLEMS,
    (9, (13, 13), torch.bool),  # rows of 169 bytes
    (64, (31, 31), torch.float16),  # rows of 1,922 bytes
    (8, (64, 64), torch.bfloat16),
    (8, (64, 64), torch.bool),
    (8, (64, 64), torch.float64),
    (32, (64, 64), torch.float32),  # 2.1 GB
    (3, (215, 219), torch.float16),  # 13 GB, 6.6e9 elements in odd rows
]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "grid_size", "dtype"), CUDA_PROBLEMS)
def bench_impulse_matrix_on_cuda(compare, heads, grid_size, dtype):
    offsets = sample_offsets(heads, 5, generator=torch.Generator().manual_seed(0)).cuda()
    tokens = grid_size[0] * grid_size[1]
    shape = (heads, tokens, tokens)
    nbytes = heads * tokens**2 * dtype.itemsize
    ones = (impulse_targets(offsets, grid_size) >= 0).sum().item()

    def check(name: str, result: Tensor) -> None:
        assert result.shape == shape and result.dtype == dtype and result.is_cuda, name
        assert sum(matrix.count_nonzero().item() for matrix in result) == (name != "torch.zeros") * ones, name
        if name != "torch.zeros":
            targets = impulse_targets(offsets, grid_size)
            found = result.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0] == 1
            assert found[targets >= 0].all(), name

    compare(
        "impulse_matrix",
        f"{heads} heads, {grid_size[0]}x{grid_size[1]}",
        {
            "torch.zeros": lambda: torch.zeros(shape, dtype=dtype, device="cuda"),
            "convinit": lambda: impulse_matrix(offsets, grid_size, dtype=dtype),
            "reference": lambda: impulse_matrix_reference(offsets, grid_size, dtype=dtype),
            "indexed": lambda: indexed(offsets, grid_size, dtype),
        },
        baseline="torch.zeros",
        check=check,
        dtype=dtype,
        bytes_moved=nbytes,
    )
