"""Progress bars for work of more than two seconds, where tqdm is installed and the output is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def progress(items: Sequence[T], description: str, *, unit: str = "it") -> Iterator[T]:
    """Iterates over `items` behind a bar on standard error that appears after two seconds.

    No bar where standard error is not a terminal, or tqdm (in the extra `train`) is not installed.
    """
    return iter(items if (tqdm := _tqdm()) is None else tqdm(items, desc=description, unit=unit))


def interruptible(call: Callable[[], T], monitor: Tensor, description: str) -> T:
    """Makes a long call of compiled code, hears Ctrl-C meanwhile, and shows what the call has counted.

    The call runs in a thread of its own: Python handles signals in the main thread, while that is in Python.

    Args:
        monitor: int64 [3], which the call reads and writes: it returns soon after the first number is set;
            the second counts problems solved, the third evaluations.
    """
    tqdm = _tqdm()
    bar = None if tqdm is None else tqdm(desc=description, unit=" evaluations")
    with ThreadPoolExecutor(1, "convinit") as pool:
        result = pool.submit(call)
        try:
            while not wait([result], timeout=0.1).done:
                if bar is not None:
                    _, problems, evaluations = monitor.tolist()
                    bar.set_postfix(solved=problems, refresh=False)
                    bar.update(evaluations - bar.n)
        except BaseException:  # KeyboardInterrupt above all; leaving the pool waits for the call
            monitor[0] = 1
            raise
        finally:
            if bar is not None:
                bar.close()
        return result.result()


def _tqdm() -> Any:
    """A tqdm for what may take long, or None where it is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return partial(tqdm, delay=2, disable=None, leave=False)
