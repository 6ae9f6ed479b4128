"""wmcache online: collect with an actor, go on training model and actor, evaluate; until enough is collected."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wmcache.commands.command import Command, take_chosen
from wmcache.commands.options import options_of
from wmcache.commands.output import shell_command, show
from wmcache.commands.shared import PATH, cluster_option, count_option, device_option, file_option, json_option
from wmcache.commands.train import MODEL
from wmcache.common.folders import home
from wmcache.study.online_flags import ENCODER, EPISODES, OnlineCollect, OnlineFlags, OnlineTrain

TABLES = {
    **dict.fromkeys(("env", "length", "image_size"), "collect"),
    **dict.fromkeys(("model", "frameskip"), "train"),
    "episodes": "plan",
    "encoder": "encoder",
    "encoder_weights": "encoder",
}
"""Flags that set an option of one of FILE's tables."""
KEYS = {"encoder": "name", "encoder_weights": "weights"}
"""Options that have another name than their flag."""


def _models() -> list[str]:
    from wmcache.trainer.models import models_that_dream

    return models_that_dream()


@click.command(cls=Command, by=MODEL)
@click.argument("file", type=PATH, required=False)
@options_of(OnlineCollect, only=("env", "length", "image_size"))
@options_of(OnlineFlags)
@options_of(OnlineTrain, only=("model", "frameskip"), model={"names": _models})
@click.option("--encoder", default=ENCODER, help="Encoder of all frames, which stays as it is; see: wmcache encoders.")
@file_option(
    "--encoder-weights", help="Weights of the encoder.  [default: fitted on the prefill, or the encoder's own]"
)
@count_option("--episodes", default=EPISODES, help="Episodes of each evaluation.")
@device_option
@cluster_option()
@file_option(
    "--out", help="Folder of all results.  [default: $WMCACHE_HOME/online/<name of FILE, or of the environment>]"
)
@json_option
def online(file: Path | None, out: Path | None, **settings: Any) -> None:
    """Collect, encode the new frames, go on training a world model and an actor in its imagination, and repeat. Run again, it goes on.

    FILE (TOML) has settings that no flag has; flags win over it.
    """
    from wmcache.study.online import run_online
    from wmcache.study.online_options import read_online
    from wmcache.study.online_page import summary, write_online

    ctx = click.get_current_context()
    model_options = take_chosen(settings, given=True)
    given = {name: value for name, value in settings.items() if _is_given(ctx, name)}
    flags = {_key(name): str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if model_options:
        flags["train.model_options"] = model_options
    options = read_online(file, flags)
    name = file.stem if file else re.sub("[^A-Za-z0-9.-]+", "-", options.collect.env)
    out = out or home() / "online" / name
    rows = run_online(options, out)
    write_online(out, options, rows, shell_command(sys.argv))
    show(rows, [*summary(rows), f"report: {out / 'online.html'}"])


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _key(name: str) -> str:
    """Return where a flag's value belongs, see `read_online`."""
    return f"{TABLES[name]}.{KEYS.get(name, name)}" if name in TABLES else name
