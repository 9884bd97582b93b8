"""How times are taken: in turns, on a CPU by the clock, on a GPU by events around the replay of a graph.

Machines drift while they are measured. Taking turns lets the drift fall on all competitors alike, which
one-after-the-other harnesses cannot do.
"""

from __future__ import annotations

import functools
import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample
MAX_ROUNDS = 200
MAX_FLUSHES = 50  # before a call whose launches take the host longer than one flush takes the GPU

Function = Callable[[], Any]
Sample = tuple[float, ...]  # seconds of a call: as competitors are ranked; on a GPU, the host's time after it


@dataclass(frozen=True)
class Absent:
    """Stands in for a competitor that cannot take part: not installed, or not made for this problem."""

    reason: str


class WrongResultError(AssertionError):
    """For `check` to raise: says what is wrong, and by how much, in `facts` for the competitor's row."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


@dataclass
class Outcome:
    """The outcome of one competitor: its samples, one a round, or the reason why there are none."""

    status: str = "ok"  # or absent, wrong, failed, out of memory
    reason: str = ""
    device: str = ""  # cpu or cuda, where it computed
    facts: dict[str, Any] = field(default_factory=dict)
    timer: str = "clock"  # or graph, events
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def stop(self, status: str, error: BaseException | str) -> None:
        self.status, self.reason = status, first_line(error)
        self.seconds, self.host_seconds = [], []


def settle_allocator() -> None:
    """Bring malloc into the state that it has in a program which has worked for a while.

    glibc returns freed memory to the system, and pays page faults to get it back, by a threshold that grows
    with the largest block freed so far, up to 32 MB. Without this a result of 2 MB takes 15 or 150 µs,
    depending on what ran before.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def first_line(error: BaseException | str) -> str:
    """The text of an error, without the directories of this machine: result files are committed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"(?<![\w.:/])/(?:[^\s/]+/)+", "", lines[0])[:200]


def compiled(fn: Any) -> Any:
    """`fn` by torch.compile, for the very shapes it is called with.

    A check calls it on fewer images, too. By default the second batch size makes the next compilation a
    dynamic one, which all later calls then take: the slower code would be timed.
    """
    return torch.compile(fn, dynamic=False)


def status_of(error: Exception) -> str:
    """The reason that an exception of a competitor gives."""
    if isinstance(error, (NotImplementedError, ImportError)):
        return "absent"
    full = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in full):
        return "out of memory"
    return "failed"


def try_out(
    name: str, competitor: Function | Absent, check: Callable[[str, Any], dict[str, Any] | None]
) -> Outcome:
    """One call, whose result is checked. The first call compiles and fills caches: it is no measurement."""
    outcome = Outcome()
    if isinstance(competitor, Absent):
        outcome.stop("absent", competitor.reason)
        return outcome
    before = gpu_allocations()
    try:
        result = competitor()
    except Exception as error:
        outcome.stop(status_of(error), error)
        return outcome
    outcome.device = "cuda" if getattr(result, "is_cuda", False) or gpu_allocations() > before else "cpu"
    try:
        outcome.facts = check(name, result) or {}
    except Exception as error:  # a check that breaks has not shown that the result is right
        outcome.facts = getattr(error, "facts", {})
        outcome.stop("wrong", error)
    return outcome


def gpu_allocations() -> int:
    """How often memory has been taken from PyTorch's pools on the GPU."""
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0) if torch.cuda.is_available() else 0


def turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: everyone comes first, second, … equally often, after different ones."""
    for i in range(rounds):
        shift = i % len(names)
        order = names[shift:] + names[:shift]
        yield order[::-1] if i // len(names) % 2 else order


def interleave(samplers: dict[str, Callable[[], Sample]], outcomes: dict[str, Outcome], rounds: int) -> None:
    """A sample of every competitor in each round. One that breaks off is out; the others go on."""
    for order in turns(list(samplers), rounds):
        for name in order:
            if outcomes[name].status != "ok":
                continue
            try:
                seconds, *host = samplers[name]()
            except Exception as error:
                outcomes[name].stop(status_of(error), error)
                continue
            outcomes[name].seconds.append(seconds)
            outcomes[name].host_seconds.extend(host)


def measure(
    competitors: dict[str, Function],
    outcomes: dict[str, Outcome],
    *,
    seconds: float,
    min_rounds: int,
    rounds: int | None = None,
    capture: bool = True,
) -> None:
    """Times the competitors whose outcome is "ok", and puts the samples into their outcomes.

    Where some compute on the GPU and some on the CPU, all are timed by the host's clock.

    Args:
        seconds: time to spend on all rounds together; `min_rounds` are done whatever they take.
        rounds: this many and no more, for competitors that are slow.
        capture: whether to try CUDA graphs.
    """
    running = [name for name in competitors if outcomes[name].status == "ok"]
    on_gpu = {name: outcomes[name].device == "cuda" for name in running}
    by_events = bool(running) and all(on_gpu.values())
    pool = torch.cuda.graph_pool_handle() if by_events and capture else None
    samplers, round_s = {}, 0.0
    for name in running:
        fn, outcome = competitors[name], outcomes[name]
        try:
            if on_gpu[name]:
                outcome.peak_bytes = peak_bytes(fn)
            once = clock(fn, 1, on_gpu[name])
            number = max(1, round(MIN_SAMPLE_S / once))
            if by_events:
                samplers[name], outcome.timer = gpu_sampler(fn, once, number, pool)
                if pool is not None and outcome.timer == "events":  # the pool may be left half open
                    pool = torch.cuda.graph_pool_handle()
            else:
                samplers[name] = functools.partial(clock_sampler, fn, number, on_gpu[name])
            if once < 0.1:  # a warm-up, and what a sample costs; slower ones are warm by now
                start = time.perf_counter()
                samplers[name]()
                round_s += time.perf_counter() - start
            else:
                round_s += once * (2 if by_events else 1)
        except Exception as error:
            outcome.stop(status_of(error), error)
    samplers = {name: sampler for name, sampler in samplers.items() if outcomes[name].status == "ok"}
    if samplers:
        enough = int(min(max(seconds / round_s, min_rounds), MAX_ROUNDS))
        interleave(samplers, outcomes, enough if rounds is None else rounds)


@contextmanager
def without_gc(active: bool) -> Iterator[None]:
    """Python's garbage collector off while times are taken, as --benchmark-disable-gc asks."""
    was = gc.isenabled()
    if active:
        gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def clock(fn: Function, number: int, on_gpu: bool) -> float:
    """Seconds a call by the host's clock, over `number` calls; on a GPU until the last has ended."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        fn()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


def clock_sampler(fn: Function, number: int, on_gpu: bool) -> Sample:
    return (clock(fn, number, on_gpu),)


# CUDA


def gpu_sampler(fn: Function, host_s: float, number: int, pool: Any) -> tuple[Callable[[], Sample], str]:
    """A sampler of (GPU's seconds, host's seconds) a call, and the name of the GPU's timer.

    The GPU's time is that between two events around one call, or around the replay of its CUDA graph if it
    can be captured. Before each call the L2 cache is overwritten, as it would be by the rest of a model. That
    keeps the GPU busy while the host launches the call: an uncaptured one shows gaps between its kernels only
    where the host is slower than the flushes, or waits for the GPU. The host's time is that of calls in a
    row, launches included.
    """
    replay = None if pool is None else captured(fn, pool)
    flushes = 1
    if replay is None:
        flush_s = min(between_events(lambda: None, 0, 1) for _ in range(3))
        flushes = min(MAX_FLUSHES, 1 + int(host_s / flush_s))
    calls = min(number, 20)

    def sample() -> Sample:
        on_gpu = sum(between_events(replay or fn, flushes) for _ in range(calls)) / calls
        return on_gpu, clock(fn, number, True)

    return sample, "events" if replay is None else "graph"


def captured(fn: Function, pool: Any) -> Function | None:
    """The replay of `fn` as a CUDA graph; None if it cannot be captured.

    What waits for the GPU cannot be, and is found before a capture is tried: a failed one can leave the
    allocator in a bad state. Graphs share a memory pool, so that competitors do not add up; nothing is read
    from it later.
    """
    home, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(home)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")  # of which it warns
            fn()
            torch.cuda.set_sync_debug_mode("error")
            fn()
    except Exception:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        home.wait_stream(side)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*CUDA Graph is empty.*")  # would take no time at all
            with torch.cuda.graph(graph, pool=pool):
                fn()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # whatever it is, the plain call has been seen to work
        torch.cuda.set_stream(home)  # an invalid capture ends without giving the stream back
        return None
    return graph.replay


def flush_buffer() -> torch.Tensor:
    return _flush_buffer(torch.cuda.current_device())


@functools.cache
def _flush_buffer(device: int) -> torch.Tensor:
    """Twice the L2 cache of a GPU and 128 MB at least."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(2 * size, 2**27), dtype=torch.uint8, device=torch.device("cuda", device))


def between_events(fn: Function, flushes_before: int, flushes_within: int = 0) -> float:
    """Seconds on the GPU from before `fn` to its end."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(flushes_before):
        flush_buffer().zero_()
    start.record()
    fn()
    for _ in range(flushes_within):
        flush_buffer().zero_()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(fn: Function) -> int:
    """The most memory that one call holds on the GPU, beyond what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
