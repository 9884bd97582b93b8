from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convinit
from convinit._checks import PADDING_MODES
from convinit.ops.impulse_matrix import impulse_matrix, impulse_matrix_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 4), (7, 5)]
EXTREMES = [[0, 0], [1, -2], [9, -11], [2**62, -(2**62)], [2**63 - 1, -(2**63)], [-(2**63), 2**63 - 1]]


@devices
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype, padding_mode, device):
    offsets = torch.tensor(EXTREMES)
    for grid_size in GRIDS:
        expected = impulse_matrix_reference(offsets, grid_size, padding_mode=padding_mode, dtype=dtype)
        for source in (offsets, offsets.to(device)):
            actual = impulse_matrix(source, grid_size, padding_mode=padding_mode, dtype=dtype, device=device)
            assert (actual.dtype, actual.device.type) == (dtype, device)
            assert torch.equal(actual.cpu(), expected)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_large_result_equals_reference(dtype, device, generator):
    """Many blocks, all threads, huge pages, and rows that do not divide a block."""
    offsets = convinit.sample_offsets(13, 7, generator=generator)
    actual = impulse_matrix(offsets, (29, 31), dtype=dtype, device=device)
    assert actual.nbytes > 2**23
    assert torch.equal(actual.cpu(), impulse_matrix_reference(offsets, (29, 31), dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bool], ids=str)
def test_more_than_two_to_the_31_elements(dtype):
    """6.6e9 of them, in odd rows; the sums of rows and the ones' places need no second result."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free device memory")
    offsets = torch.tensor([[0, 0], [-3, 50], [2, -1]]).cuda()
    grid_size = (215, 219)
    matrix = impulse_matrix(offsets, grid_size, padding_mode="circular", dtype=dtype)
    assert matrix.numel() > 2**32
    targets = convinit.impulse_targets(offsets, grid_size, padding_mode="circular")
    assert (matrix.gather(2, targets[:, :, None]) == 1).all()
    for rows in matrix.flatten(0, 1).split(2**14):
        assert torch.equal(rows.count_nonzero(dim=1), torch.ones(len(rows), dtype=torch.int64, device="cuda"))


@pytest.mark.gpu
def test_cuda_streams(generator):
    """Each result is made on the stream that is current, after what was there before."""
    offsets = convinit.sample_offsets(8, 5, generator=generator)
    expected = [impulse_matrix(offsets + i, (24, 24)) for i in range(4)]
    results = []
    for i in range(4):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            moved = offsets.cuda(non_blocking=True) + i
            results.append((stream, impulse_matrix(moved, (24, 24))))
    for (stream, actual), matrix in zip(results, expected, strict=True):
        stream.synchronize()
        assert torch.equal(actual.cpu(), matrix)


@pytest.mark.gpu
def test_cuda_graph_reads_new_offsets():
    offsets = torch.tensor([[0, 1], [-2, 0]]).cuda()
    impulse_matrix(offsets, (7, 9))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = impulse_matrix(offsets, (7, 9), dtype=torch.bfloat16)
    for new in ([[0, 1], [-2, 0]], [[3, -4], [2**62, 1]]):
        offsets.copy_(torch.tensor(new))
        graph.replay()
        expected = impulse_matrix(torch.tensor(new), (7, 9), dtype=torch.bfloat16)
        assert torch.equal(captured.cpu(), expected)


@pytest.mark.gpu
def test_every_cuda_device():
    """The result is on the device of the offsets, whichever is current."""
    for index in range(torch.cuda.device_count()):
        offsets = torch.tensor(EXTREMES, device=f"cuda:{index}")
        actual = impulse_matrix(offsets, (3, 4))
        assert actual.device == offsets.device
        assert torch.equal(actual.cpu(), impulse_matrix(offsets.cpu(), (3, 4)))


OFFSETS = st.lists(st.tuples(st.integers(-12, 12), st.integers(-12, 12)), min_size=1, max_size=4)
SIZES = st.integers(1, 6)


@given(SIZES, SIZES, OFFSETS)
@settings(max_examples=50, deadline=None)
def test_rows_sum_to_one_where_the_target_exists(height, width, pairs):
    offsets = torch.tensor(pairs)
    for padding_mode in PADDING_MODES:
        matrix = impulse_matrix(offsets, (height, width), padding_mode=padding_mode)
        assert matrix.shape == (len(pairs), height * width, height * width)
        assert set(matrix.unique().tolist()) <= {0.0, 1.0}
        expected = torch.ones(matrix.shape[:2])
        if padding_mode == "zeros":
            i, j = torch.arange(height), torch.arange(width)
            y, x = i + offsets[:, :1], j + offsets[:, 1:]
            inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
            expected = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1).float()
        assert torch.equal(matrix.sum(2), expected)


@given(SIZES, SIZES, st.integers(-20, 20), st.integers(-20, 20), st.integers(-20, 20), st.integers(-20, 20))
@settings(max_examples=50, deadline=None)
def test_circular_matrices_compose_as_their_offsets_add(height, width, ay, ax, by, bx):
    a, b, both = impulse_matrix(
        torch.tensor([[ay, ax], [by, bx], [ay + by, ax + bx]]), (height, width), padding_mode="circular"
    )
    assert torch.equal(a @ b, both)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_shifts_an_image_as_torch_pads_it(padding_mode, generator):
    height, width, reach = 5, 4, 3
    image = torch.randn(height, width, dtype=torch.float64, generator=generator)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(image[None, None], (reach,) * 4, mode=mode)[0, 0]
    steps = range(-reach, reach + 1)
    offsets = torch.tensor([[dy, dx] for dy in steps for dx in steps])
    matrix = impulse_matrix(offsets, (height, width), padding_mode=padding_mode, dtype=torch.float64)
    shifted = (matrix @ image.flatten()).unflatten(1, (height, width))
    for (dy, dx), actual in zip(offsets.tolist(), shifted, strict=True):
        window = padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
        assert torch.equal(actual, window)


def test_is_the_convolution_of_an_impulse_kernel(generator):
    offsets = torch.tensor([[1, -2], [0, 0], [-2, 2]])
    image = torch.randn(6, 7, generator=generator)
    kernels = torch.zeros(3, 1, 5, 5)
    kernels[range(3), 0, 2 + offsets[:, 0], 2 + offsets[:, 1]] = 1
    expected = F.conv2d(image[None, None], kernels, padding=2)[0].flatten(1)
    assert torch.equal(impulse_matrix(offsets, (6, 7)) @ image.flatten(), expected)


@devices
def test_empty_batch(device):
    assert impulse_matrix(torch.empty(0, 2, dtype=torch.int64, device=device), (3, 4)).shape == (0, 12, 12)


@devices
def test_offsets_may_be_strided_and_of_any_integer_dtype(device):
    offsets = torch.tensor([[1, 0], [-2, 3], [0, -1]], device=device)
    expected = impulse_matrix(offsets, (4, 5))
    other = torch.full_like(offsets[:, 0], 99)
    strided = torch.stack([offsets[:, 1], other, offsets[:, 0]])[[2, 1, 0]].T[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(impulse_matrix(strided, (4, 5)), expected)
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(impulse_matrix(offsets.to(dtype), (4, 5)), expected)


def test_default_dtype_and_device():
    offsets = torch.tensor([[0, 1]])
    torch.set_default_dtype(torch.float64)
    try:
        assert impulse_matrix(offsets, (2, 2)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert impulse_matrix(offsets, (2, 2)).device.type == "cpu"
    assert impulse_matrix(offsets, (2, 2), device="meta").device.type == "meta"


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_opcheck(dtype, device):
    op = torch.ops.convinit.impulse_matrix.default
    for offsets in (torch.tensor(EXTREMES), torch.empty(0, 2, dtype=torch.int64)):
        torch.library.opcheck(op, (offsets.to(device), 3, 4, PADDING_MODES.index("reflect"), dtype))


@devices
def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(impulse_matrix, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([[1, 2], [-1, 0]], device=device)
    actual = compiled(offsets, (3, 4), padding_mode="circular", dtype=torch.float16)
    assert torch.equal(actual, impulse_matrix(offsets, (3, 4), padding_mode="circular", dtype=torch.float16))


ONE = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0, 1]], (2, 2)), {}, TypeError, "offsets must be an integer tensor"),
        ((ONE.float(), (2, 2)), {}, TypeError, "offsets must be an integer tensor"),
        ((ONE.bool(), (2, 2)), {}, TypeError, "offsets must be an integer tensor"),
        ((ONE.to(torch.uint64), (2, 2)), {}, TypeError, "offsets must be an integer tensor"),
        ((ONE[0], (2, 2)), {}, ValueError, r"offsets must be \[B, 2\].*got \[2\]"),
        ((ONE.T, (2, 2)), {}, ValueError, r"offsets must be \[B, 2\].*got \[2, 1\]"),
        ((ONE, 4), {}, TypeError, r"grid_size must be a pair \(H, W\)"),
        ((ONE, (2, 2, 2)), {}, ValueError, r"grid_size must be a pair \(H, W\), got 3"),
        ((ONE, (2, 0)), {}, ValueError, r"grid_size\[1\] must be at least 1, got 0"),
        ((ONE, (2.0, 2)), {}, TypeError, r"grid_size\[0\] must be an int"),
        ((ONE, (2**40, 2**40)), {}, ValueError, "grid_size must have fewer than"),
        ((ONE, (2**15, 2**15)), {"dtype": torch.float64}, ValueError, "more than 2\\*\\*63"),
        (
            (ONE, (2, 2)),
            {"padding_mode": "border"},
            ValueError,
            "padding_mode must be one of zeros",
        ),
        ((ONE, (2, 2)), {"padding_mode": 1}, ValueError, "padding_mode must be one of"),
        ((ONE, (2, 2)), {"dtype": torch.int32}, TypeError, "dtype must be float64.*got torch.int32"),
        ((ONE, (2, 2)), {"dtype": "float32"}, TypeError, "dtype must be float64"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        impulse_matrix(*arguments, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        (ONE.int(), 2, 2, 0, torch.float32),
        (ONE[:, :1], 2, 2, 0, torch.float32),
        (ONE, 0, 2, 0, torch.float32),
        (ONE, 2**40, 2**40, 0, torch.float32),
        (ONE, 2, 2, 4, torch.float32),
        (ONE, 2, 2, 0, torch.complex64),
    ],
)
@devices
def test_the_bare_op_refuses_what_would_corrupt_memory(arguments, device):
    offsets, *rest = arguments
    with pytest.raises(RuntimeError, match="convinit: "):
        torch.ops.convinit.impulse_matrix(offsets.to(device), *rest)
