"""wmcache study: compare representations and models by what is planned with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import shell_command, show
from wmcache.commands.shared import PATH, cluster_option, count_option, file_option, json_option
from wmcache.common.errors import UserError
from wmcache.common.folders import home

DEFAULT = Path(__file__).parent.parent / "study" / "default.toml"


@click.command(cls=Command)
@click.argument("file", type=PATH, required=False)
@click.option(
    "--encoder",
    multiple=True,
    help="Encoder to study: one of FILE by label or name, or another with its defaults; repeatable.",
)
@click.option(
    "--models",
    multiple=True,
    help="Model to study: one of FILE by label or name, or another with its defaults; repeatable.",
)
@click.option("--env", help="Environment to collect frames of, instead of FILE's, such as UMaze+ball@0.")
@file_option(
    "--dataset",
    help="Existing frame dataset that replaces FILE's.  [default: FILE's, else $WMCACHE_HOME/<environment>]",
)
@click.option("--seeds", help="Seeds of fits and trainings, as in 0,1,2.  [default: FILE's]")
@click.option("--fractions", help="Shares of the train episodes, as in 0.1,0.25,1.  [default: FILE's]")
@count_option("--steps", help="Training steps of models and actors.  [default: FILE's]")
@count_option("--episodes", help="Episodes of each evaluation.  [default: FILE's]")
@click.option("--device", help="Device: auto, cpu, cuda, cuda:1, mps.  [default: FILE's, else auto]")
@cluster_option(default=None, also="  [default: FILE's, else local:1]")
@file_option(
    "--out",
    help="Folder; studies may share one, and with it their common cells.  "
    "[default: $WMCACHE_HOME/studies/<name of FILE>, with --env followed by the environment]",
)
@json_option
def study(file: Path | None, out: Path | None, **flags: Any) -> None:
    """Compare encoders and models by what is planned with them, with the settings of FILE (TOML). Run again, it goes on.

    Without FILE, compare the encoders of study/default.toml with the same world model; EfficientNet-Lite0 needs wmcache[pretrained].
    """
    from wmcache.study.options import read_study
    from wmcache.study.report import headline, summary, write_report
    from wmcache.study.run import run_study
    from wmcache.study.statistics import tabulate

    file = file or DEFAULT
    options = read_study(file, {name: _as_toml(name, value) for name, value in flags.items()})
    out = out or home() / "studies" / _name(file, flags["env"])
    options, branches, work, failures = run_study(options, out)
    rows = tabulate(options, branches, work, failures)
    results = write_report(out, options, rows, work, branches, shell_command(sys.argv))
    lines = f"{headline(options, rows)}\n{summary(options, results)}".splitlines()
    show({"rows": rows, **results}, [*lines, f"report: {out / 'study.html'}"])
    if failures:
        failed = sorted({str(row["failed"]) for row in rows if row["failed"]})
        raise click.ClickException(f"{len(failures)} cells failed, the others are done; the first: {failed[0]}")


def _name(file: Path, env: str | None) -> str:
    from wmcache.envs import open_environment

    if env is None:
        return file.stem
    opened = open_environment(env)
    opened.close()
    return f"{file.stem}-{opened.spec.dataset}"


def _as_toml(name: str, value: Any) -> Any:
    kind = {"seeds": int, "fractions": float}.get(name)
    if kind is None or value is None:
        return str(value) if isinstance(value, Path) else value
    try:
        return [kind(word) for word in value.split(",")]
    except ValueError:
        raise UserError(f"--{name} {value} is not a list of numbers separated by commas") from None
