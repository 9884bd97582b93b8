from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convinit import impulse_targets, sample_offsets
from convinit._checks import PADDING_MODES

SIZES = st.integers(1, 6)
INT64 = st.integers(-(2**63), 2**63 - 1)


def axis_target(position: int, offset: int, size: int, padding_mode: str) -> int:
    """One target along one axis in Python's unbounded ints, written differently from the code under test."""
    target = position + offset
    if padding_mode == "replicate":
        return min(max(target, 0), size - 1)
    if padding_mode == "circular":
        return target % size
    if padding_mode == "reflect":
        mirrored = [*range(size), *range(size - 2, 0, -1)]
        return mirrored[target % len(mirrored)]
    return target if 0 <= target < size else -1


@given(SIZES, SIZES, st.lists(st.tuples(INT64, INT64), max_size=3), st.sampled_from(PADDING_MODES))
@settings(max_examples=200, deadline=None)
def test_targets_match_unbounded_integers(height, width, pairs, padding_mode):
    offsets = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    expected = []
    for dy, dx in pairs:
        rows = [axis_target(i, dy, height, padding_mode) for i in range(height)]
        columns = [axis_target(j, dx, width, padding_mode) for j in range(width)]
        expected.append([-1 if y < 0 or x < 0 else y * width + x for y in rows for x in columns])
    expected = torch.tensor(expected, dtype=torch.int64).reshape(-1, height * width)
    actual = impulse_targets(offsets, (height, width), padding_mode=padding_mode)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
)
def test_targets_take_any_integer_dtype(dtype):
    offsets = torch.tensor([[0, 1], [2, 0]])
    assert torch.equal(impulse_targets(offsets.to(dtype), (3, 4)), impulse_targets(offsets, (3, 4)))


def test_sampled_offsets_cover_the_window_evenly(generator):
    offsets = sample_offsets(20_000, 5, generator=generator)
    assert offsets.shape == (20_000, 2)
    assert offsets.dtype == torch.int64
    cells, counts = offsets.unique(dim=0, return_counts=True)
    assert cells.tolist() == [[dy, dx] for dy in range(-2, 3) for dx in range(-2, 3)]
    chi_square = ((counts - 800) ** 2 / 800).sum()
    assert chi_square < 51.2  # 24 degrees of freedom: passed by 99.9 % of all seeds


def test_sampled_offsets_follow_their_generator():
    def draw(seed: int) -> torch.Tensor:
        return sample_offsets(16, 7, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):  # the default device must not change the draw
        assert torch.equal(draw(1), draw(1).cpu())
    assert sample_offsets(3, 1).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), ValueError, "num_heads must be at least 1, got 0"),
        ((2.0, 3), TypeError, "num_heads must be an int"),
        ((True, 3), TypeError, "num_heads must be an int"),
        ((2, 4), ValueError, "kernel_size must be odd"),
        ((2, -1), ValueError, "kernel_size must be at least 1"),
        ((2, "3"), TypeError, "kernel_size must be an int"),
    ],
)
def test_sample_offsets_names_the_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_offsets(*arguments)


def test_sample_offsets_refuses_what_is_no_generator():
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got 0 of type int"):
        sample_offsets(2, 3, generator=0)


@pytest.mark.gpu
def test_sample_offsets_refuses_a_generator_of_another_device():
    with pytest.raises(ValueError, match="generator must be a CPU generator"):
        sample_offsets(2, 3, generator=torch.Generator("cuda"))
