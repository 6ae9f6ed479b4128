"""Standard streams that are closed, that have lost their reader, or that cannot encode what is printed."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READER_GONE = 141
"""The status that a shell gives a program which SIGPIPE ended: 128 + 13."""


def prepare_streams() -> None:
    """Open closed streams on /dev/null, and escape characters that the encoding of stdout or stderr does not have."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened gets this number, and what a library or a child prints goes into it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))  # noqa: SIM115 (kept open)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def ended_by_reader() -> Iterator[None]:
    """Exit silently when stdout or stderr is a pipe whose reader has gone, as `head` has after its last line."""
    try:
        yield
    except BrokenPipeError:
        poll = select.poll()
        for number in (1, 2):
            poll.register(number, 0)
        gone = [number for number, events in poll.poll(0) if events & (select.POLLERR | select.POLLHUP)]
        if not gone:
            raise
        # What is still buffered, or printed while the process ends, goes nowhere instead of failing again.
        null = os.open(os.devnull, os.O_WRONLY)
        for number in gone:
            os.dup2(null, number)
        os.close(null)
        sys.exit(READER_GONE)
