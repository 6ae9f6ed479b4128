"""How commands print, also where standard streams are closed, have lost their reader, or cannot encode what is printed."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from wmcache.common.errors import command, one_line
from wmcache.common.jsonfiles import dump_json, nulls

JSON = f"{__name__}.json"
READER_GONE = 141
"""The status that a shell gives a program which SIGPIPE ended: 128 + 13."""


def shell_command(words: list[str]) -> str:
    """Return what the user typed, quoted for a shell."""
    return command(Path(words[0]).name, *words[1:])


def say(line: str, *, err: bool = False) -> None:
    """Print one line; line breaks and control characters of names in it are escaped."""
    click.echo(one_line(line), err=err)


def print_as_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: ARG001 (click's signature)
    """Make `show` print JSON: the callback of `--json`."""
    ctx.meta[JSON] = value


def show(value: Any, lines: Iterable[str]) -> None:
    """Print lines, or with `--json` the value as strict JSON, where a figure that is not a finite number is null."""
    if click.get_current_context().meta.get(JSON):
        click.echo(dump_json(nulls(value), indent=2))
        return
    for line in lines:
        say(line)


def show_figures(figures: dict[str, float]) -> None:
    """Print a line for each figure, or JSON."""
    show(figures, (f"{name:36} {value:12.3f}" for name, value in figures.items()))


def show_rows(rows: list[dict[str, Any]], value: Any = None) -> None:
    """Print a table with a header, or JSON: that of `value`, by default the rows."""
    show(
        rows if value is None else value,
        _aligned([list(rows[0]), *([_cell(value, ".4f") for value in row.values()] for row in rows)]),
    )


def show_columns(rows: list[dict[str, Any]]) -> None:
    """Print a column for each row, named by its first value, and a line for each of the others; or JSON."""
    cells = _aligned([[_cell(row[name], ".4g") for row in rows] for name in rows[0]])
    show(rows, (f"{name:24}{line}" for name, line in zip(rows[0], cells, strict=True)))


def _cell(value: Any, digits: str) -> str:
    return "-" if value is None else format(value, digits) if isinstance(value, float) else str(value)


def _aligned(lines: list[list[str]]) -> list[str]:
    width = max(len(cell) for line in lines for cell in line) + 2
    return ["".join(f"{cell:>{width}}" for cell in line) for line in lines]


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
