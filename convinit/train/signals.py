"""Being asked to stop: SIGTERM and Ctrl-C set a flag instead of tearing a step apart."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While inside, the first SIGTERM or SIGINT is only noted; a second SIGINT raises KeyboardInterrupt.

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

    def __exit__(self, *_: Any) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
