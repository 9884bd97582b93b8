"""Torch ops, and a shorter way to them in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convinit.ops.transforms import exporting

__all__ = ["Op"]

_PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """A torch op whose eager calls leave `torch.library` out.

    What records a graph (torch.compile, export, a dispatch mode, a tensor subclass) gets the op, which has a
    schema and a fake kernel. An eager call runs the same parts as an `autograd.Function`: a custom op costs
    0.3 ms both ways before anything is computed, the function a quarter of that.

    Args:
        name: "convinit::name".
        run: inputs → outputs, on every device.
        fake: the same without values, for graphs.
        save: (ctx, inputs, output) → None, what `backward` needs; None where the op has no gradient.
        backward: (ctx, *gradients) → gradients of the inputs.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.run, self.op, self.function = run, torch.library.custom_op(name, run, mutates_args=()), None
        self.op.register_fake(fake)
        if save is not None and backward is not None:
            self.op.register_autograd(backward, setup_context=save)
            self.function = _function(run, save, backward).apply

    def __call__(self, *inputs: Any) -> Any:
        if not _eager(inputs):
            return self.op(*inputs)
        if self.function is None or not torch.is_grad_enabled():
            return self.run(*inputs)
        return self.function(*inputs)


def _function(
    run: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # one with setup_context takes four times as long
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, *grads)

    return Function


def _eager(inputs: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd watches what is called with these inputs."""
    return (
        not torch.compiler.is_compiling()
        and not exporting()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(x) in _PLAIN or not isinstance(x, Tensor) for x in inputs)
    )
