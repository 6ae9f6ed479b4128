"""wmcache rounds: collect with a model, go on training, evaluate; N times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import shell_command, show
from wmcache.commands.shared import PATH, cluster_option, count_option, file_option, json_option
from wmcache.common.folders import home


@click.command(cls=Command)
@click.argument("file", type=PATH)
@count_option("--rounds", help="Number of rounds; a higher number goes on after the last one.  [default: FILE's]")
@click.option("--device", help="Device: auto, cpu, cuda, cuda:1, mps.  [default: FILE's, else auto]")
@cluster_option(default=None, also="  [default: FILE's, else local:1]")
@file_option("--out", help="Folder of all results.  [default: $WMCACHE_HOME/rounds/<name of FILE>]")
@json_option
def rounds(file: Path, out: Path | None, **flags: Any) -> None:
    """Repeat with the settings of FILE (TOML): collect, extract the new frames, go on training, evaluate. Run again, it goes on."""
    from wmcache.study.rounds import run_rounds
    from wmcache.study.rounds_options import read_rounds
    from wmcache.study.rounds_page import lines_of, write_rounds

    options = read_rounds(file, flags)
    out = out or home() / "rounds" / file.stem
    rows = run_rounds(options, out)
    write_rounds(out, options, rows, shell_command(sys.argv))
    show(rows, [*lines_of(rows), f"report: {out / 'rounds.html'}"])
