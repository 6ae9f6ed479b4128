"""Signals that ask a training to stop are acted on between steps, once the step is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
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
def handled(numbers: Iterable[int], handler: Handler | signal.Handlers) -> Iterator[None]:
    """Let a handler act on signals in the block; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (numbers if main else ())}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def delay_signals() -> Iterator[PendingSignal]:
    """Delay the signals of STOPPING; the block acts on the pending one when its state is saved."""
    # Keep default or ignored handlers: a parent process set them on purpose.
    pending = PendingSignal({n: handler for n in STOPPING if callable(handler := signal.getsignal(n))})
    with handled(pending.handlers, pending.receive):
        yield pending
