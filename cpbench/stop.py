"""Ending early and in good order: SIGINT and SIGTERM as a flag that a long run looks at between two steps. What is kept is the run's affair."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Stop:
    """SIGINT and SIGTERM as a flag: the sweep ends at the next poll, never in the middle of a write."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if the sweep is to end."""
        if self._asked:
            raise KeyboardInterrupt
