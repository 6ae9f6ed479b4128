"""How commands print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wmcache.common.errors import command, one_line
from wmcache.common.jsonfiles import dump_json, nulls


def shell_command(words: list[str]) -> str:
    """What the user typed, quoted for a shell."""
    return command(Path(words[0]).name, *words[1:])


def say(line: str, *, err: bool = False) -> None:
    """Print one line; line breaks and control characters of names in it are escaped."""
    click.echo(one_line(line), err=err)


def print_json(value: Any) -> None:
    """Print strict JSON; a figure that is not a finite number is null."""
    click.echo(dump_json(nulls(value), indent=2))


def print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print a table, or JSON."""
    if as_json:
        print_json(rows)
        return
    width = max(len(name) for row in rows for name in row) + 2
    click.echo("".join(f"{name:>{width}}" for name in rows[0]))
    for row in rows:
        cells = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values())
        click.echo("".join(f"{cell:>{width}}" for cell in cells))


def print_figures(figures: dict[str, float], *, as_json: bool) -> None:
    """Print a line for each figure, or JSON."""
    if as_json:
        print_json(figures)
        return
    for name, value in figures.items():
        click.echo(f"{name:36} {value:12.3f}")


def print_columns(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print a column for each row, named by its first value, and a line for each of the others; or JSON."""
    if as_json:
        print_json(rows)
        return
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in (row[name] for row in rows)]
        for name in rows[0]
    ]
    width = max(len(cell) for line in cells for cell in line) + 2
    for name, line in zip(rows[0], cells, strict=True):
        click.echo(f"{name:24}" + "".join(f"{cell:>{width}}" for cell in line))
