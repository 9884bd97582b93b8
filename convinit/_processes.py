"""A process pool that reports progress to the parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

Tick = Callable[..., None]


def cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_processes(
    work: Callable[..., Any],
    tasks: Sequence[tuple],
    *,
    on_tick: Tick,
    on_done: Callable[[Any], None],
    workers: Sequence[Mapping[str, str]],
) -> None:
    """Calls ``work(*task, tick)`` for every task, as many at once as there are workers.

    Ctrl-C and SIGTERM raise KeyboardInterrupt here. Then, after any other error and if this process is
    killed, the workers get a SIGTERM, which `work` may catch to save what it has, and begin nothing else.

    Args:
        work: a function of a module; its tasks and results are pickled. ``tick(...)`` may be called in it.
        tasks: its arguments.
        on_tick: told the arguments of each tick, in this process.
        on_done: told each result as soon as it is there.
        workers: environment variables for each process, beside this one's; they share the CPU's threads. One
            worker alone works here, and its variables are not set.

    Raises:
        RuntimeError: a process died, for example for want of memory. Whatever `work` raises.
    """
    with _terminable():
        workers = workers[: len(tasks)]
        if len(workers) == 1:
            for task in tasks:
                on_done(work(*task, on_tick))
        elif tasks:
            _in_processes(work, tasks, on_tick, on_done, workers)


def _in_processes(
    work: Callable[..., Any],
    tasks: Sequence[tuple],
    on_tick: Tick,
    on_done: Callable[[Any], None],
    workers: Sequence[Mapping[str, str]],
) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    ticks, environments = context.Queue(), context.Queue()
    for each in workers:
        environments.put(dict(each))
    # Closing the other end tells the workers to stop; the operating system closes it if this process dies.
    alive, keep_alive = context.Pipe(duplex=False)
    threads = max(1, cpus() // len(workers))
    executor = ProcessPoolExecutor(
        len(workers),
        mp_context=context,
        initializer=_start_worker,
        initargs=(ticks, environments, alive, threads),
    )
    try:
        pending = {executor.submit(_work, work, *task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(ticks, on_tick)
            for future in done:
                on_done(future.result())
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process died, perhaps for want of memory; finished runs are kept. Run the same command again, "
            "with fewer jobs"
        ) from error
    finally:
        if sys.exc_info()[0] is not None:
            keep_alive.close()
        executor.shutdown(cancel_futures=True)
        keep_alive.close()
        alive.close()
    _drain(ticks, on_tick)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt, so that no worker is left behind and no task begun."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _drain(ticks: Any, on_tick: Tick) -> None:
    while True:
        try:
            on_tick(*ticks.get_nowait())
        except queue.Empty:
            return


# --- in a worker --------------------------------------------------------------------------------------------

_ticks: Any = None
_busy = threading.Lock()
_ending = threading.Event()


def _start_worker(ticks: Any, environments: Any, alive: Any, threads: int) -> None:
    global _ticks
    _ticks = ticks
    os.environ.update(environments.get())
    # Ctrl-C reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _work(work: Callable[..., Any], *task: Any) -> Any:
    with _busy:
        if _ending.is_set():  # tasks wait in a queue of the workers, which nobody can take them from
            raise RuntimeError("the work was ended")
        return work(*task, _tick)


def _end_with(alive: Any) -> None:
    alive.poll(None)  # until the other end is closed
    _ending.set()
    os.kill(os.getpid(), signal.SIGTERM)
    with _busy:  # the work may have caught it to save what it has
        os._exit(1)


def _tick(*what: Any) -> None:
    _ticks.put(what)
