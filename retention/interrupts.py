"""Ctrl-C and SIGTERM while work is done that should be saved first: they wait for the next safe point.

Whoever handled the signal before decides what it does, once it is let through. A second one is never held back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID = b"\nretention: stopping once this step is done and saved; again to stop at once\n"


class Held:
    """Signals between `hold` and `deliver`."""

    def __init__(self) -> None:
        self.holding = False  # set it where what is lost by an interruption is worth a moment's wait
        self.waiting: int | None = None  # the signal that came
        self._before: dict[int, Any] = {}

    def deliver(self) -> None:
        """Let a signal through that waits. Returns if none does, or if whoever handles it takes no notice."""
        number, self.waiting = self.waiting, None
        if number is not None:
            self._pass_on(number, None)

    def came(self, number: int, frame: Any) -> None:
        if self.holding and self.waiting is None:
            self.waiting = number
            os.write(2, SAID)  # a handler may not use a stream that it may have interrupted
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: Any) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def held_back() -> Iterator[Held]:
    """Within it signals can be held back; one that still waits at the end is let through. Main thread only."""
    held = Held()
    if threading.current_thread() is threading.main_thread():
        # None: a handler that was not installed from Python, and could not be put back.
        held._before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) is not None}
    for number in held._before:
        signal.signal(number, held.came)
    try:
        yield held
    finally:
        for number, before in held._before.items():
            signal.signal(number, before)
    held.deliver()
