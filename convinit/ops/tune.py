"""Measures which attention is fastest on this GPU, and with which launch configurations: `convinit tune`."""

from __future__ import annotations

import datetime
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from convinit._timing import Outcome, WrongResultError, first_line, measure, try_out, without_gc
from convinit.kernels import configs, tuned
from convinit.kernels.configs import Config
from convinit.kernels.tensor_views import split_packed
from convinit.kernels.tuned import Launch, Problem
from convinit.ops import verify
from convinit.ops.backends import HAS_TRITON
from convinit.ops.verify import ALPHA, CASES, Case, Shape

__all__ = ["SHAPES", "check_shapes", "tune"]

SHAPES = (  # [B, heads, N, r]: the papers', ViT-Ti and ViT-B at 224 pixels, for CIFAR, ViT-S at 384
    (512, 8, 256, 64),
    (256, 3, 196, 64),
    (256, 12, 197, 64),
    (1024, 4, 64, 32),
    (128, 6, 576, 64),
)
CLEARLY = 0.93  # of the best other's time on the GPU
SHARES = {CASES[0]: 0.35, CASES[2]: 0.6}  # of a shape's time, after which no configuration is tried
NOISE = 0.97  # a configuration that does not take less than this of the table's time is not kept

Chosen = Mapping[str, Config]
Times = Mapping[str, tuple[float, float]]  # {choice: seconds on the GPU, seconds of an eager loop}


def check_shapes(shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"a shape must be four positive integers B,heads,N,r, got {shape}")
        if shape[2] > configs.MAX_TOKENS or shape[3] > configs.MAX_RANK:
            raise ValueError(
                f"a shape B,heads,N,r must have N up to {configs.MAX_TOKENS} and r up to {configs.MAX_RANK}, "
                f"got {shape}"
            )


def tune(
    shapes: Sequence[Shape] = SHAPES, *, dtype: torch.dtype = torch.bfloat16, minutes: float = 3.0
) -> Iterator[dict[str, Any]]:
    """Verifies and times on the current GPU; writes the file of `convinit.kernels.tuned` after each shape.

    For each shape, op, with and without position terms, and for inference and training: the kernels are
    compared with float64; neighbours of their launch configurations are checked and timed; then the kernels
    are timed in turns with PyTorch's choice and with its back ends by name. "triton" is chosen where it takes
    at most 0.93 of the best other's time on the GPU and no more of an eager loop's; an op that is wrong once
    is never chosen again on this machine.

    Args:
        shapes: of [B, heads, N, r].
        dtype: bfloat16, float16 or float32.
        minutes: for all shapes; the compiler decides how many configurations are tried in it.

    Yields:
        `len(CASES) * 2` dicts a shape: the rows of the file's "choices", or {"op", "shape", "reason"} where
        nothing was chosen.

    Raises:
        ValueError: shapes, dtype or minutes out of range; a GPU that is too old. RuntimeError: no GPU, or no
            Triton.
    """
    check_shapes(shapes)
    if dtype not in tuned.DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(tuned.DTYPES)}, got {dtype}")
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    if not torch.cuda.is_available():
        raise RuntimeError("convinit tune needs an NVIDIA GPU, and torch finds none")
    if not HAS_TRITON:
        raise RuntimeError("convinit tune needs Triton, which is not installed")
    device = torch.cuda.current_device()
    if torch.version.hip is not None:
        raise RuntimeError("convinit tune needs an NVIDIA GPU: the kernels are not made for AMD's")
    configs.generation(torch.device("cuda", device))  # raises on a GPU that is too old
    tuned.folder().mkdir(parents=True, exist_ok=True)  # raises now, not after a minute of measurements
    session = Session(device, dtype)
    end = time.monotonic() + 60 * minutes
    for i, shape in enumerate(shapes):
        seconds = max(1.0, (end - time.monotonic()) / (len(shapes) - i))
        yield from session.tune(shape, seconds)


class Session:
    """The choices so far, in memory and as the content of the file."""

    def __init__(self, device: int, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.machine = tuned.machine(device)
        self.content: dict[str, Any] = {
            "machine": self.machine, "date": "", "disabled": {}, "choices": [], "configs": [],
        }  # fmt: skip
        with suppress(ValueError):  # no file yet, or a damaged one
            content = tuned.read(tuned.path_of(self.machine))
            self.content = content if content["machine"] == self.machine else self.content
        self.tuned = tuned._loaded[device] = tuned.parse(self.content)

    def tune(self, shape: Shape, seconds: float) -> Iterator[dict[str, Any]]:
        """The rows of a shape as they are made; then all are in the file."""
        start = time.monotonic()
        self.forget_configs(shape)  # the table's are verified, and what others start from
        for case in CASES:
            try:
                limits = self.verified(case, shape)
                if limits is not None and case in SHARES:
                    until = start + SHARES[case] * seconds
                    found = search(case, shape, self.dtype, max(limits), until, seconds / 50)
                    self.keep_configs(shape, found)
            except torch.OutOfMemoryError:
                yield from [self.nothing(case, shape, "out of memory")] * 2
                continue
            except Exception as error:  # of a compiler, or no configuration: theirs may still be chosen
                verify.synchronize()  # raises where the GPU is lost
                warnings.warn(
                    f"{case.op} {list(shape)}: {first_line(error)}; please report this", stacklevel=2
                )
                limits = None
            for training in (False, True):
                yield self.choose(case, shape, training, limits, seconds / 25)
        verify.synchronize()  # raises where a kernel has damaged something: nothing is written then
        self.tuned.date = self.content["date"] = datetime.date.today().isoformat()
        tuned.write(self.content)

    def nothing(self, case: Case, shape: Shape, reason: str) -> dict[str, Any]:
        return {"op": case.op, "shape": list(shape), "reason": reason}

    def verified(self, case: Case, shape: Shape) -> list[float] | None:
        """The relative errors that the results may have; None where the kernels are not to be used."""
        if case.op in self.content["disabled"]:
            return None
        try:
            return verify.verify(case, shape, self.dtype)
        except WrongResultError as error:
            self.disable(case.op, str(error))
            return None

    def disable(self, op: str, reason: str) -> None:
        """Kernels that were wrong once are never chosen again on this machine."""
        warnings.warn(
            f"the kernels of {op} are wrong on this GPU and switched off: {reason}. "
            "Please report this line with the output of: convinit info",
            stacklevel=2,
        )
        self.content["disabled"][op] = reason
        taken = (op, "triton")
        self.content["choices"] = [c for c in self.content["choices"] if (c["op"], c["choice"]) != taken]
        self.tuned.choices = {p: c for p, c in self.tuned.choices.items() if (p.op, c[0]) != taken}

    def forget_configs(self, shape: Shape) -> None:
        size = [_name(self.dtype), *shape[2:]]
        self.content["configs"] = [c for c in self.content["configs"] if [c["dtype"], c["N"], c["r"]] != size]
        for kernel in configs.KERNELS:
            self.tuned.configs.pop(Launch(kernel, self.dtype, *shape[2:]), None)

    def keep_configs(self, shape: Shape, found: Mapping[str, Config | None]) -> None:
        """Those that differ from the table's."""
        size = {"dtype": _name(self.dtype), "N": shape[2], "r": shape[3]}
        for kernel, config in found.items():
            self.tuned.configs[Launch(kernel, self.dtype, *shape[2:])] = config
            self.content["configs"].append({"kernel": kernel, **size, "config": config and list(config)})

    def choose(
        self, case: Case, shape: Shape, training: bool, limits: Sequence[float] | None, seconds: float
    ) -> dict[str, Any]:
        """Times all choices as backend="auto" would take them, and keeps the best."""
        batch, heads, tokens, rank = shape
        problem = Problem(case.op, self.dtype, tokens, rank, case.positions, training)
        names = ["torch"] + ["triton"] * (limits is not None and case.op not in self.content["disabled"])
        names += ["cudnn", "flash", "efficient"] * (case.op == "positional_attention")
        try:
            leaves, dout = verify.draw(case, shape, self.dtype)
            calls = {name: self._taking(name, problem, case, heads, leaves, dout) for name in names}
            expected = calls["torch"]()
        except Exception as error:
            verify.synchronize()  # raises where the GPU is lost
            self.tuned.choices.pop(problem, None)
            return self.nothing(case, shape, first_line(error))

        def check(name: str, results: list[Tensor]) -> None:
            if limits is not None:  # sums over the images round more often here than in four images
                verify.compare(results, expected, [4 * limit for limit in limits])

        outcomes = {name: try_out(name, call, check) for name, call in calls.items()}
        if "triton" in outcomes and outcomes["triton"].status == "wrong":
            self.disable(case.op, f"{list(shape)}, training={training}: {outcomes['triton'].reason}")
        try:
            times = self._times(calls, outcomes, seconds)
        finally:  # an interrupt leaves nothing chosen
            self.tuned.choices.pop(problem, None)
        if "torch" not in times:
            return self.nothing(case, shape, outcomes["torch"].reason)
        row: dict[str, Any] = {
            "op": case.op, "dtype": _name(self.dtype), "N": tokens, "r": rank,
            "positions": case.positions, "training": training,
            "choice": decide(times), "least": max(1, batch * heads // 2), "shape": list(shape),
            "ms": {name: [round(1e3 * t, 4) for t in pair] for name, pair in times.items()},
            "absent": {name: outcomes[name].reason for name in outcomes if name not in times},
        }  # fmt: skip
        same = ("op", "dtype", "N", "r", "positions", "training")
        others = [c for c in self.content["choices"] if any(c[k] != row[k] for k in same)]
        self.content["choices"] = [*others, row]
        self.tuned.choices[problem] = (row["choice"], row["least"])
        return row

    def _taking(
        self, name: str, problem: Problem, case: Case, heads: int, leaves: Sequence[Tensor], dout: Tensor
    ) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            self.tuned.choices[problem] = (name, 0)
            return verify.results(case, heads, leaves, dout, "auto", problem.training)

        return call

    def _times(
        self, calls: Mapping[str, Callable[[], Any]], outcomes: dict[str, Outcome], seconds: float
    ) -> dict[str, tuple[float, float]]:
        with without_gc(True):
            measure(dict(calls), outcomes, seconds=seconds, min_rounds=7)
        return {
            name: (statistics.median(outcome.seconds), statistics.median(outcome.host_seconds))
            for name, outcome in outcomes.items()
            if outcome.status == "ok"
        }


def decide(times: Times) -> str:
    """The choice, of those timed: "torch" unless another is clearly faster and costs the host no more.

    The kernels must be so next to the best of the others, a back end by name next to PyTorch's choice.
    """

    def best(names: Sequence[str], than: Sequence[str]) -> str | None:
        name = min(names, key=lambda name: times[name][0], default=None)
        if name is None:
            return None
        on_gpu, host = (min(times[other][i] for other in than) for i in (0, 1))
        return name if times[name][0] <= CLEARLY * on_gpu and times[name][1] <= host else None

    others = [name for name in times if name != "triton"]
    ours = ["triton"] if "triton" in times else []
    return best(ours, others) or best([name for name in others if name != "torch"], ["torch"]) or "torch"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- launch configurations ----------------------------------------------------------------------------------


def neighbours(kernel: str, config: Config) -> list[Config]:
    """Configurations to try beside the table's, the most promising first."""
    BM, BN, warps, stages, programs = config
    fewer = max(1, programs // 2)
    tries = [
        config._replace(num_stages=stages + 1),
        config._replace(num_warps=12 - warps, programs=fewer if warps == 4 else programs),
        config._replace(num_stages=stages - 1),
        config._replace(BM=BM // 2),
        config._replace(BM=2 * BM, programs=fewer),
    ]
    # Triton 3.6 wrote outside of shared memory in this kernel without a pipeline.
    least = 2 if kernel == "backward" else 1
    return [
        c for c in tries if c.BM in tuned.TILES and c.num_warps in tuned.WARPS and least <= c.num_stages <= 4
    ]


def launches(case: Case, shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[Chosen], Sequence[Any]]]:
    """{kernel: its launch, given all configurations}."""
    from convinit.kernels import launch

    heads, tokens, rank = shape[1:]
    leaves, dout = verify.draw(case, shape, dtype)
    x, *others = (leaf.detach() for leaf in leaves)
    if case.op == "shared_attention":
        v = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        attention = (rank**-0.5 * others[0] @ others[1].mT).softmax(-1)
        return {
            "apply": lambda chosen: [launch.apply_map(attention, v, chosen)],
            "map_gradient": lambda chosen: [launch.map_gradient(dout, v, chosen)],
        }
    q_pos, k_pos = others
    inputs = (*split_packed(x, heads), q_pos, k_pos)
    numbers = (rank**-0.5, ALPHA)
    out, lse = launch.positional_forward(*inputs, *numbers)
    backward = functools.partial(
        launch.positional_backward, dout, *inputs, out, lse, *numbers, (True,) * 5
    )  # fmt: skip
    at_once = configs.lookup("backward", *_key(dtype, tokens, rank)) is not None
    names = ("backward",) if at_once else ("backward_queries", "backward_keys")
    return {
        "forward": lambda chosen: launch.positional_forward(*inputs, *numbers, chosen),
        **dict.fromkeys(names, lambda chosen: backward(chosen=chosen)),
    }


def search(
    case: Case, shape: Shape, dtype: torch.dtype, limit: float, until: float, seconds: float
) -> dict[str, Config | None]:
    """Configurations that are faster than the table's: {kernel: configuration, or None without it}."""
    tokens, rank = shape[2:]
    calls = launches(case, shape, dtype)
    table = {kernel: configs.lookup(kernel, *_key(dtype, tokens, rank)) for kernel in calls}
    found = {}
    for kernel, call in calls.items():
        config = table[kernel]
        tries: list[Config | None] = [config]
        tries += [None] if kernel == "apply" and config else []  # cuBLAS, head by head
        tries += neighbours(kernel, config) if config else []

        def chosen(other: Config | None, kernel: str = kernel) -> Chosen:
            return {k: c for k, c in {**table, kernel: other}.items() if c is not None}

        if len(tries) == 1:
            continue
        best = fastest({c: functools.partial(call, chosen(c)) for c in tries}, limit, until, seconds)
        if best != config:
            found[kernel] = best
    return found


def fastest(
    calls: Mapping[Config | None, Callable[[], Sequence[Any]]], limit: float, until: float, seconds: float
) -> Config | None:
    """The fastest, by its name, or the first where none is clearly faster.

    One that does not compile, or whose results differ from the first's by more than `limit` in norm, or
    anywhere by more than a row's rounding, is left out. After the time `until` no further one is tried.
    """
    first, *_ = calls
    expected = calls[first]()

    def check(name: str, results: Sequence[Any]) -> None:
        verify.compare(results, expected, [limit] * len(expected))
        for a, b in zip(results, expected, strict=True):
            if a is not None:
                rows = b.float().norm(dim=-1)
                off = (a.float() - b.float()).norm(dim=-1) / (rows + rows.mean())
                if not off.max() <= 32 * torch.finfo(expected[0].dtype).eps:
                    raise WrongResultError(f"a row is off by {off.max():.2g} of its norm")

    names = {str(config): config for config in calls}
    outcomes: dict[str, Outcome] = {}
    for name, config in names.items():
        if len(outcomes) > 1 and time.monotonic() > until:
            break
        with verify.nan_where_unwritten():
            outcomes[name] = try_out(name, calls[config], check)
        verify.synchronize()  # raises where a launch has damaged the GPU's context
    measure({name: calls[names[name]] for name in outcomes}, outcomes, seconds=seconds, min_rounds=5)
    times = {name: statistics.median(o.seconds) for name, o in outcomes.items() if o.status == "ok"}
    best = min(times, key=lambda name: times[name], default=str(first))
    return names[best] if times.get(best, 0) <= NOISE * times.get(str(first), float("inf")) else first


def _key(dtype: torch.dtype, tokens: int, rank: int) -> tuple[int, int, int, int]:
    device = torch.empty(0, device=verify.DEVICE).device  # with its number
    return configs.generation(device), dtype.itemsize, tokens, rank
