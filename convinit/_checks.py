"""Checks of arguments: the error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convinit._words import near

PADDING_MODES = ("zeros", "replicate", "circular", "reflect")  # the order of PaddingMode in csrc
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_OFFSET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def came(value: object) -> str:
    """A value in words, for the end of a message: tensors and arrays by their kind, the rest as it prints."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape) if not value.is_nested else '(nested)'}"
    name = type(value).__name__
    if hasattr(value, "__array__") and hasattr(value, "dtype"):  # NumPy's, whose numbers print as such
        shape = list(getattr(value, "shape", ()))
        return f"{value!r} of type numpy.{name}" if not shape else f"a numpy.{name} of {value.dtype} {shape}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {name}"


def check_int(name: str, value: object, *, minimum: int = 1, maximum: int = 2**63 - 1) -> int:
    """`value`, NumPy's integers among them, as an int."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {came(value)}")
    try:
        number = operator.index(value)
    except TypeError:  # NumPy's arrays
        raise TypeError(f"{name} must be an int, got {came(value)}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {number}")
    return number


def _real(name: str, value: object) -> float:
    """`value`, an int, a float or one of NumPy's, as a float."""
    if type(value) is not float:  # the common case has no more to ask
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            learnt = "; a number to be learnt is multiplied into queries or keys" * isinstance(value, Tensor)
            raise TypeError(f"{name} must be a number, got {came(value)}{learnt}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite, got an int beyond a float's range") from None
    return value


def check_real(name: str, value: object) -> float:
    """A finite float."""
    number = _real(name, value)
    if not abs(number) < math.inf:
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_number(name: str, value: object) -> float:
    """A finite float above 0."""
    number = _real(name, value)
    if not (0 < number < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def check_share(name: str, value: object) -> float:
    """A float from 0 to 1."""
    number = _real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be 0 to 1, got {number}")
    return number


def check_probability(name: str, value: object) -> float:
    """A float from 0 up to, but not, 1: the share of entries that a dropout drops."""
    number = _real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {number}")
    return number


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {came(value)}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        got = f"{value!r}{near(value, choices)}" if isinstance(value, str) else came(value)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {got}")
    return value


def check_padding_mode(padding_mode: object) -> int:
    """The index of `padding_mode` in PADDING_MODES."""
    return PADDING_MODES.index(check_choice("padding_mode", padding_mode, PADDING_MODES))


def check_pair(name: str, value: Any, expected: str = "a pair (height, width)") -> tuple[int, int]:
    """`value` as a pair of positive ints."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be {expected} of ints, got {came(value)}")
    if len(value) != 2:
        raise ValueError(f"{name} must be {expected}, got {len(value)} numbers: {value!r}")
    height, width = (check_int(f"{name}[{i}]", value[i]) for i in (0, 1))
    return height, width


def check_grid_size(grid_size: Any, name: str = "grid_size") -> tuple[int, int]:
    """`grid_size` as a pair (H, W) of positive ints."""
    height, width = check_pair(name, grid_size, "a pair (H, W)")
    if height * width >= 2**31:
        raise ValueError(f"{name} must have fewer than 2**31 tokens, got {height} x {width}")
    return height, width


def check_kernel_size(kernel_size: object, grid_size: tuple[int, int] | None = None) -> int:
    """The side of the window that offsets are drawn from: odd, and within the grid for whatever is drawn."""
    size = check_int("kernel_size", kernel_size, maximum=2**15)  # its square is an int32
    if size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the window has a centre, got {size}")
    if grid_size is not None and size // 2 >= min(grid_size):
        height, width = grid_size
        raise ValueError(
            f"kernel_size must be at most {2 * min(grid_size) - 1} on the {height} x {width} grid, or some "
            f"offsets of its window would leave no token a target, got {size}; give a smaller one"
        )
    return size


def check_tensor(
    name: str,
    tensor: object,
    shape: str,
    *,
    dims: int | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
    values: bool = False,
) -> Tensor:
    """`tensor` if it is dense, of one of the dtypes and of `dims` dimensions; the message says `shape`.

    values: it must also have values that can be looked at, which those on the meta device have not.
    """
    kind = "a floating-point tensor" if dtypes is FLOATING else "an integer tensor"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {kind} {shape}, got {came(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").strip("_")
        raise TypeError(f"{name} must be a dense tensor {shape}, got one of layout {layout}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {kind} {shape} ({names}), got {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if values and tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")
    return tensor


def check_offsets(offsets: object, heads: int | None = None, *, values: bool = False) -> Tensor:
    """`offsets` [B, 2] as int64; with `heads`, B must be that."""
    shape = "[B, 2], one (dy, dx) per head" if heads is None else f"[{heads}, 2], one (dy, dx) per head"
    tensor = check_tensor("offsets", offsets, shape, dims=2, dtypes=_OFFSET_DTYPES, values=values)
    if tensor.shape[1] != 2 or (heads is not None and tensor.shape[0] != heads):
        raise ValueError(f"offsets must be {shape}, got {list(tensor.shape)}")
    return tensor if tensor.dtype == torch.int64 else tensor.to(torch.int64)


def check_finite(name: str, tensor: Tensor) -> Tensor:
    finite = tensor.isfinite()
    if not finite.all():
        count = tensor.numel() - int(finite.sum())
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite entries of {tensor.numel()}")
    return tensor


def check_same_device(of: str, tensor: Tensor, **others: Tensor | None) -> None:
    """All `others` must be where `tensor`, called `of`, is: PyTorch reads meta tensors beside real ones."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{name} must be on the device of {of}, {tensor.device}, got {other.device}")


def check_device(name: str, device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a device such as 'cpu' or 'cuda:0', got {came(device)}") from None


def check_generator(generator: object) -> None:
    """Refuses generators of other devices: one seed must give the same draw wherever the result goes."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {came(generator)}")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must be a CPU generator (draws are made on the CPU, then moved), "
            f"got one on {generator.device}; make it with torch.Generator()"
        )
