"""What every command is: expected failures are one line and an exit status, and the help has its options by group."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from wmcache.commands.options import ByName, Option, Preset
from wmcache.commands.output import ended_by_reader, prepare_streams, say, shell_command
from wmcache.common.allocator import keep_freed_memory
from wmcache.common.cpus import limit_threads
from wmcache.common.distributions import missing_requirement
from wmcache.common.errors import INTERRUPTED, STOPPED, Stopped, UserError, one_line, reason
from wmcache.common.paths import CHECK, CHECK_REMOTE
from wmcache.engine.signals import delay_signals

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"]}
CHOSEN = f"{__name__}.chosen"
STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""SLURM announces the walltime with the signal that it was given."""


@contextmanager
def failures_as_lines() -> Iterator[None]:
    """Turn what a user can act on into an error of click's: one line, exit status 1."""
    try:
        with ended_by_reader():
            yield
    except UserError as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        package = missing_requirement(error.name or "")
        if package is None:  # a mistake in the code
            raise
        raise click.ClickException(
            f"{package} is not installed, which this command needs; install all that wmcache needs: pip install wmcache"
        ) from error
    except MemoryError as error:
        raise click.ClickException("not enough memory; lower --batch-size, or the N of --cluster local:N") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = CHECK_REMOTE if "://" in where else CHECK
        raise click.ClickException(one_line(f"{where}{reason(error)}; {hint}")) from error


@contextmanager
def stops_as_lines() -> Iterator[None]:
    """Turn Ctrl-C and the signals of batch systems into the command that goes on, and an exit status."""
    for number in STOPS:
        signal.signal(number, _stop)
    try:
        yield
    except KeyboardInterrupt as stop:
        # A stop inside zarr leaves a task behind, which asyncio would report as the process ends.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # Of the ranks that torchrun has started, and ends when one of them fails, rank 0 reports.
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            click.echo(err=True)
            say(f"stopped; go on with: {shell_command(sys.argv)}", err=True)
        sys.exit(STOPPED if isinstance(stop, Stopped) else INTERRUPTED)


class Command(click.Command):
    """A command; `by` is the option that names what further options belong to."""

    def __init__(self, *args: Any, by: ByName | None = None, **settings: Any) -> None:
        """Take click's arguments."""
        super().__init__(*args, **{"context_settings": CONTEXT, **settings})
        self.by = by

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the program."""
        prepare_streams()
        limit_threads()
        keep_freed_memory()
        with ended_by_reader():
            return super().main(*args, **settings)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """Parse the words; help and version are printed here."""
        with stops_as_lines():
            # Registries import PyTorch, where an exception in the middle of an import may be lost.
            with delay_signals() as pending, failures_as_lines():
                ctx = super().make_context(*args, **settings)
            pending.act_on(pending.number)
            return ctx

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the declared parameters, and those of what the `by` option names."""
        *own, helps = super().get_params(ctx)
        return [*own, *(ctx.meta.get(CHOSEN, []) if self.by else []), helps]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words, after looking for the preset and the name that decide about options and defaults."""
        preset = next((param for param in self.params if isinstance(param, Preset)), None)
        known = {} if preset is None else preset.values(args)
        name = ""
        # A subcommand has options of its own, and its help need not wait for PyTorch.
        if self.by is not None and not (isinstance(self, click.Group) and args and args[0] in self.commands):
            name = self.by.name(self, args, known)
            ctx.meta[CHOSEN] = self.by.params(name, {flag for param in self.params for flag in param.opts})
        params = [param for param in self.get_params(ctx) if isinstance(param, Option)]
        flags = {param.field.replace("_", "-"): str(param.name) for param in params}
        flags |= {flag.lstrip("-"): str(param.name) for param in params for flag in param.opts}
        # A preset may have options of another model than the one that is named.
        chosen = {flags[flag]: value for flag, value in known.items() if flag in flags}
        ctx.default_map = {**(ctx.default_map or {}), **chosen}
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if self.by is not None:
                self.by.refuse(error.option_name, name)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(param.group if isinstance(param, Option) else "Options", []).append(record)
        for group, records in sorted(groups.items(), key=lambda item: item[0] == "Options"):
            with formatter.section(group):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        threading.excepthook = _ignore_errors_of_disks
        with stops_as_lines(), failures_as_lines():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A group of commands."""

    command_class = Command
    group_class = type


def take_chosen(settings: dict[str, Any], *, given: bool = False) -> dict[str, Any]:
    """Pop the options of what `by` names from a command's settings, by field; with `given`, without those at their defaults."""
    ctx = click.get_current_context()
    values = {}
    for param in ctx.meta[CHOSEN]:
        value = settings.pop(str(param.name))
        if not given or ctx.get_parameter_source(str(param.name)) is not click.core.ParameterSource.DEFAULT:
            values[param.field] = value
    return values


def _ignore_errors_of_disks(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises an OSError again in the thread that waits for it: one line is enough."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    # SLURM signals every process of a job, and the job's script signals this one again.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped
