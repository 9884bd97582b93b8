"""Whether the attention kernels are right on this GPU: what `tune` asks before it times them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from convinit._timing import WrongResultError
from convinit.ops.positional_attention import packed_attention
from convinit.ops.shared_attention import shared_attention

__all__ = ["CASES", "Case", "Shape", "compare", "draw", "results", "verify"]

DEVICE = "cuda"
ALPHA = 0.4
IMAGES = 4  # that are compared with float64

Shape = tuple[int, int, int, int]  # B, heads, N, r


class Case(NamedTuple):
    """An op, with or without position terms."""

    op: str
    positions: bool


CASES = (
    Case("positional_attention", True),
    Case("positional_attention", False),
    Case("shared_attention", False),
)


def draw(case: Case, shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs that need gradients, and the gradient of the output: packed products as layers make them."""
    batch, heads, tokens, rank = shape
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=DEVICE, dtype=dtype)

    columns = heads * rank * (3 if case.op == "positional_attention" else 1)
    leaves = [normal(batch, tokens, columns)]
    if case.positions or case.op == "shared_attention":
        leaves += [normal(heads, tokens, rank), normal(heads, tokens, rank)]
    return [x.requires_grad_() for x in leaves], normal(batch, tokens, heads * rank)


def results(
    case: Case, heads: int, leaves: Sequence[Tensor], dout: Tensor, backend: str, training: bool = True
) -> list[Tensor]:
    """The output, and in training the gradients."""
    x, *others = leaves
    with torch.set_grad_enabled(training):
        if case.op == "shared_attention":
            v = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            out = shared_attention(others[0], others[1], v, backend=backend)
        else:
            out = packed_attention(x, heads, *others, alpha=ALPHA if others else 1.0, backend=backend)
        return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if training else ())]


def verify(case: Case, shape: Shape, dtype: torch.dtype) -> list[float]:
    """Compares output and gradients of a few images with float64; WrongResultError where they are wrong.

    Also with one token less, where tiles are not full; with NaN in memory that nobody wrote; and twice, for
    two runs must give the same bits. Returned are the relative errors allowed: twice eager's and 4 eps.
    """
    batch, heads, tokens, rank = shape
    eps = torch.finfo(dtype).eps
    allowed: list[float] = []
    for n in (tokens - 1, tokens) if tokens > 1 else (tokens,):
        size = (min(batch, IMAGES), heads, n, rank)
        leaves, dout = draw(case, size, dtype)
        eager = results(case, heads, leaves, dout, "eager")
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        exact = results(case, heads, doubles, dout.double(), "eager")
        limits = [2 * _norm(a - c) + 4 * eps * max(_norm(c), 1.0) for a, c in zip(eager, exact, strict=True)]
        allowed = [limit / max(_norm(c), 1.0) for limit, c in zip(limits, exact, strict=True)]
        with nan_where_unwritten():
            first, second = (results(case, heads, leaves, dout, "triton") for _ in range(2))
        for i, (a, b, c, limit) in enumerate(zip(first, second, exact, limits, strict=True)):
            name = f"gradient {i}" if i else "output"
            error = _norm(a - c)
            if not error <= limit:
                raise WrongResultError(
                    f"{name} of {list(size)} {dtype}: error {error:.2g}, limit {limit:.2g}"
                )
            if not torch.equal(a, b):
                raise WrongResultError(f"{name} of {list(size)} {dtype}: two runs differ")
    return allowed


def compare(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], limits: Sequence[float]
) -> None:
    """WrongResultError where a relative error, in norm, is above its limit."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            continue
        error, norm = _norm(a.float() - b.float()), max(_norm(b), 1.0)
        if not error <= limits[i] * norm:
            raise WrongResultError(f"result {i}: error {error / norm:.2g} of its norm, limit {limits[i]:.2g}")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()


@contextmanager
def nan_where_unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that results nobody wrote are seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about others' ops
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])
