"""SIGTERM and SIGINT as a request that a program looks at where it can stop."""

import signal
import threading
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is open, the first signal is kept in `number`; a second one raises KeyboardInterrupt at once.

    Signals reach Python's main thread alone; opened in another thread, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, _frame: object) -> None:
        self.check()
        self.number = number

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.number:
            raise KeyboardInterrupt
