"""Types and options that several commands have."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import click
from click.types import FuncParamType

from wmcache.commands.options import Option, options_of
from wmcache.commands.output import print_as_json
from wmcache.common.errors import UserError, command
from wmcache.common.paths import AnyPath, as_path
from wmcache.pipeline.options import EncodeOptions, ExtractOptions

F = TypeVar("F", bound=Callable[..., Any])


class LocalType(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a URL, which would become a folder of that name."""
        if "://" in str(value):
            self.fail(f"{value} is a URL; pass a path of this machine", param, ctx)
        return super().convert(value, param, ctx)


def number(value: Any) -> int:
    """Read a whole number from 1 to 1e15, also as 1e9."""
    with suppress(ValueError):
        if 1 <= float(value) <= 1e15 and float(value).is_integer():
            return int(float(value))
    raise click.BadParameter(f"{value!r} is not a whole number from 1 to 1e15, as 1000000 or 1e6")


def path(value: str) -> AnyPath:
    """Read a path or URL, see `common.paths.as_path`."""
    return as_path(value)


PATH = LocalType(path_type=Path)
ANY_PATH, NUMBER = FuncParamType(path), FuncParamType(number)
file_option = partial(click.option, type=PATH)
path_option = partial(click.option, type=ANY_PATH)
run_option = partial(click.option, cls=Option, group="Run")


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Combine several options into one decorator."""
    return lambda function: reduce(lambda made, decorate: decorate(made), reversed(decorators), function)


def count_option(*flags: str, default: int | None = None, help: str, least: int = 1) -> Callable[[F], F]:
    """Make an option for a whole number."""
    return click.option(*flags, type=click.IntRange(least), default=default, help=help)


def _check_cluster(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001 (click's signature)
    """Refuse a bad word or profile before any work."""
    from wmcache.cluster.tasks import parse_cluster

    return None if value is None else parse_cluster(value).text


def cluster_option(default: str | None = "local:1", also: str = "") -> Callable[[F], F]:
    """`--cluster`, which means the same everywhere."""
    return click.option(
        "--cluster",
        callback=_check_cluster,
        default=default,
        metavar="local[:N]|tcp://HOST:PORT|slurm[:PROFILE]",
        help="Where tasks run: in N processes of this machine (local: one for each available CPU; local:1: this process), on a running "
        f"Dask scheduler, or in SLURM jobs with the resources of $WMCACHE_HOME/profiles/PROFILE.toml.{also}",
    )


dataset_option = path_option("--dataset", help="Frame dataset.  [default: $WMCACHE_HOME/pointmaze-umaze]")
moved_dataset_option = path_option("--dataset", help="Location of the frames, if they have moved.")
moved_cache_option = path_option("--cache", help="Location of the store, if it has moved.")
moved_caches_option = path_option(
    "--cache",
    multiple=True,
    help="Location of the store, if it has moved. Repeat it for each store of a run that has several, in order.",
)
moved_weights_option = file_option("--weights", help="Location of the encoder's weights, if they have moved.")
device_option = click.option("--device", default="auto", help="Device: auto, cpu, cuda, cuda:1, mps.")
json_option = click.option("--json", is_flag=True, expose_value=False, callback=print_as_json, help="Print JSON.")
store_argument = click.argument("store", type=ANY_PATH)
store_dtype_option = options_of(ExtractOptions, only=("store_dtype",))
base_weights_option = file_option("--base-weights", help="Weights of an adapter's base encoder, if they have moved.")
source_options = options(moved_dataset_option, moved_weights_option, device_option)
encoder_options = options(
    options_of(EncodeOptions),
    click.option(
        "--weights",
        multiple=True,
        metavar="[NAME=]PATH",
        help="A .safetensors file or a save_pretrained folder, for all encoders that are not fitted, or for one.  "
        "[default: each encoder's own source]",
    ),
    base_weights_option,
    cluster_option(),
)


def program_path(name: str) -> str:
    """Find the program beside the one that runs, because another machine may have another PATH."""
    found = shutil.which(name, path=Path(sys.argv[0]).absolute().parent) or shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not on the PATH; install wmcache there with: {command('pip', 'install', '.')}")
    return str(Path(found).absolute())
