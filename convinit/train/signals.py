"""Graceful shutdown: SIGTERM and Ctrl-C set a flag, and the step is finished."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While inside, the first SIGTERM or SIGINT is only noted; a second SIGINT raises KeyboardInterrupt.

    A signal that came too late to change anything inside is handed on to the handler that was there before,
    if a program had set one, so that a script that runs several trainings can stop too.

    Attributes:
        signum: the signal, or 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for each in (signal.SIGTERM, signal.SIGINT):
                self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        before = self._before.get(self.signum)
        if kind is None and callable(before) and before is not signal.default_int_handler:
            before(self.signum, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
