"""Signals that ask a training to stop are acted on between steps, once the step is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, and what batch systems send before they kill a job."""

Handler = Callable[[int, FrameType | None], object]


@dataclass
class PendingSignal:
    """The last signal that was received and not acted on yet, 0 before one is received, and the handlers that act on it."""

    handlers: dict[int, Handler]
    number: int = 0

    def receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Remember a signal; this is the handler while signals are delayed."""
        self.number = number

    def act_on(self, number: int) -> None:
        """Run the handler of a signal, which usually raises KeyboardInterrupt; nothing for 0."""
        if number:
            self.handlers.get(number, signal.default_int_handler)(number, None)


@contextmanager
def delay_signals() -> Iterator[PendingSignal]:
    """Delay the signals of STOPPING; the block acts on the pending one when its state is saved."""
    handlers: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        # Keep default or ignored handlers: a parent process set them on purpose.
        handlers = {number: handler for number in STOPPING if callable(handler := signal.getsignal(number))}
    pending = PendingSignal(handlers)
    for number in handlers:
        signal.signal(number, pending.receive)
    try:
        yield pending
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
