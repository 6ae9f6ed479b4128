"""Types and options that several commands have."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wmcache.commands.options import Option, options_of
from wmcache.common.errors import UserError, command
from wmcache.common.paths import AnyPath, as_path
from wmcache.pipeline.options import EncoderOptions

F = TypeVar("F", bound=Callable[..., Any])


class PathType(click.ParamType[AnyPath]):
    """A folder by its path, or by its URL."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AnyPath:  # noqa: ARG002
        """See `common.paths.as_path`."""
        return as_path(value)


class LocalType(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert; a URL fails, which would become a folder of that name."""
        if "://" in str(value):
            self.fail(f"{value} is a URL; pass a path of this machine", param, ctx)
        return super().convert(value, param, ctx)


class NumberType(click.ParamType[int]):
    """A whole number from 1 to 1e15, also as 1e9."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert; anything else fails."""
        try:
            number = float(value)
            whole = 1 <= number <= 1e15 and number == int(number)
        except (ValueError, OverflowError):
            whole = False
        if not whole:
            self.fail(f"{value!r} is not a whole number from 1 to 1e15, as 1000000 or 1e6", param, ctx)
        return int(number)


PATH = LocalType(path_type=Path)
ANY_PATH = PathType()
NUMBER = NumberType()


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _check_cluster(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001 (click's signature)
    """The text itself; a bad word or profile is refused before any work."""
    from wmcache.cluster.tasks import parse_cluster

    return None if value is None else parse_cluster(value).text


def cluster_option(default: str | None = "local:1", also: str = "", **settings: Any) -> Callable[[F], F]:
    """`--cluster`, which means the same everywhere."""
    return click.option(
        "--cluster",
        cls=Option,
        callback=_check_cluster,
        default=default,
        metavar="local[:N]|tcp://HOST:PORT|slurm[:PROFILE]",
        help="Where tasks run: in N processes of this machine (local: one for each available CPU; local:1: this process), on a running "
        f"Dask scheduler, or in SLURM jobs with the resources of $WMCACHE_HOME/profiles/PROFILE.toml.{also}",
        **settings,
    )


dataset_option = click.option(
    "--dataset", type=ANY_PATH, help="Frame dataset.  [default: $WMCACHE_HOME/pointmaze-umaze]"
)
moved_dataset_option = click.option("--dataset", type=ANY_PATH, help="Location of the frames, if they have moved.")
moved_cache_option = click.option("--cache", type=ANY_PATH, help="Location of the store, if it has moved.")
moved_weights_option = click.option(
    "--weights", type=PATH, help="Location of the encoder's weights, if they have moved."
)
device_option = click.option("--device", default="auto", help="Device: auto, cpu, cuda, cuda:1, mps.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
store_argument = click.argument("store", type=ANY_PATH)
store_dtype_option = click.option(
    "--store-dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="Type of the stored tokens; int8 takes half the space, with one scale for each channel of each shard.",
)
base_weights_option = click.option(
    "--base-weights", type=PATH, help="Weights of an adapter's base encoder, if they have moved."
)
source_options = options(moved_dataset_option, moved_weights_option, device_option)
encoder_options = options(
    click.option(
        "--encoder", "names", default="tcn", help="Encoder, or several separated by commas; see: wmcache encoders."
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="[NAME=]PATH",
        help="A .safetensors file or a save_pretrained folder, for all encoders that are not fitted, or for one.  "
        "[default: each encoder's own source]",
    ),
    base_weights_option,
    options_of(EncoderOptions),
    device_option,
    click.option(
        "--batch-size", "batch", type=click.IntRange(1), default=32, help="Frames in each call of the encoder."
    ),
    cluster_option(),
)


def program_path(name: str) -> str:
    """The program beside the one that runs, because another machine may have another PATH."""
    found = shutil.which(name, path=Path(sys.argv[0]).absolute().parent) or shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not on the PATH; install wmcache there with: {command('pip', 'install', '.')}")
    return str(Path(found).absolute())


def name_of(store: AnyPath) -> str:
    """The default name of what is made of a store: the store's and its folder's, usually the dataset's."""
    return f"{store.absolute().parent.name}-{store.stem}".lstrip("-")
