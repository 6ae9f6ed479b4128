"""What commands share: how they fail, their options, and how they print."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from wmcache.commands.streams import ended_by_reader, prepare_streams
from wmcache.common.cpus import limit_threads
from wmcache.common.errors import UserError, command, one_line
from wmcache.common.folders import home
from wmcache.common.jsonfiles import dump_json, nulls
from wmcache.common.paths import AnyPath, as_path

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"]}
INTERRUPTED = 130
STOPPED = 75
"""EX_TEMPFAIL: the job was told to stop, and goes on when it is run again; a batch system can requeue on it."""


class OneLine(click.Command):
    """A command whose expected failures are one line and an exit status, never a traceback."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """As click's, with our ways of help, whether called through a group or alone."""
        super().__init__(*args, **{"context_settings": CONTEXT, **settings})

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the program."""
        prepare_streams()
        limit_threads()
        with ended_by_reader():
            return super().main(*args, **settings)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """As click's, which prints helps and versions here."""
        with ended_by_reader():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM warns of the walltime with the one that it is told
            signal.signal(number, _stop)
        threading.excepthook = _leave_to_those_who_wait
        try:
            with ended_by_reader():
                return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as stop:
            if _speaks():
                click.echo(err=True)
                say(f"stopped; go on with: {shell_command(sys.argv)}", err=True)
            sys.exit(STOPPED if isinstance(stop, Stopped) else INTERRUPTED)
        except MemoryError as error:
            raise click.ClickException(
                "there is not enough memory; lower --batch-size, or the N of --cluster local:N"
            ) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            far = "://" in str(error.filename)
            wrong = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            here = "check the path" if wrong else "free space or make it accessible"
            hint = "check address, credentials and network" if far else here
            raise click.ClickException(
                one_line(f"{where}{error.strerror or error}; {hint}, then run the same command again")
            ) from error
        except (ValueError, RuntimeError) as error:
            # Errors of envs are not UserErrors, because envs import nothing of ours. Not imported here: click's Exit is a RuntimeError, and
            # every help would load the simulator.
            envs = sys.modules.get("wmcache.envs")
            if envs is not None and isinstance(error, envs.MazeError | envs.RendererError):
                raise click.ClickException(str(error)) from error
            raise


class Command(OneLine):
    """A command."""


class Group(OneLine, click.Group):
    """A group of commands."""

    command_class = Command
    group_class = type


class Stopped(KeyboardInterrupt):
    """A batch system wants the machine back."""


def _speaks() -> bool:
    """Whether a stop is this process's to tell of: of those that torchrun has started, and ends when one of them fails, rank 0's."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def _leave_to_those_who_wait(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what the disk refused once more in the thread that waits for it: one line is enough."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    # SLURM tells every process of a job, and the job's script tells this one once more.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def shell_command(words: list[str]) -> str:
    """What the user typed, quoted for a shell."""
    return command(Path(words[0]).name, *words[1:])


def program_path(name: str) -> str:
    """The program beside the one that runs, as the queue's machines may have another PATH."""
    found = shutil.which(name, path=Path(sys.argv[0]).absolute().parent) or shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not on the PATH; install wmcache there with: {command('pip', 'install', '.')}")
    return str(Path(found).absolute())


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, for those that commands share."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def preset_option(flag: str, presets: Mapping[str, Mapping[str, Any]], text: str) -> Callable[[F], F]:
    """An option that gives others their defaults, those that the command has: presets are name -> {flag without its dashes: value}."""

    def apply(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001 (click's signature)
        if value is not None:
            flags = {
                name.lstrip("-"): known.name
                for known in ctx.command.params
                for name in (*known.opts, *known.secondary_opts)
            }
            here = ((name.replace("_", "-"), default) for name, default in presets[value].items())
            chosen = {flags[name]: default for name, default in here if name in flags}
            ctx.default_map = {**(ctx.default_map or {}), **chosen}
        return value

    return click.option(flag, type=click.Choice(list(presets)), callback=apply, is_eager=True, help=text)


def _read_cluster(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001 (click's signature)
    """The text itself; a bad word, or a bad profile, is said before any work."""
    from wmcache.cluster.tasks import parse_cluster

    try:
        return None if value is None else parse_cluster(value).text
    except UserError as error:
        raise click.ClickException(str(error)) from error


def cluster_option(default: str | None = "local:1", also: str = "") -> Callable[[F], F]:
    """`--cluster`, which means the same everywhere."""
    return click.option(
        "--cluster",
        callback=_read_cluster,
        default=default,
        metavar="local[:N]|tcp://HOST:PORT|slurm[:PROFILE]",
        help="Where tasks run: in N processes of this machine (local: one for each available CPU; local:1: this process), at a Dask "
        f"scheduler that is running, or in SLURM jobs as $WMCACHE_HOME/profiles/PROFILE.toml says.{also}",
    )


class PathType(click.ParamType[AnyPath]):
    """A folder by its path, or by its URL."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AnyPath:  # noqa: ARG002
        """See `common.paths.place`."""
        try:
            return as_path(value)
        except UserError as error:
            raise click.ClickException(str(error)) from error


MOST = 10**15


class NumberType(click.ParamType[int]):
    """A whole number of at least 1, also as 1e9."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Fails as click's own do."""
        try:
            number = float(value)
            whole = 1 <= number <= MOST and number == int(number)
        except (ValueError, OverflowError):
            whole = False
        if not whole:
            self.fail(f"{value!r} is not a whole number from 1 to 1e15, as 1000000 or 1e6", param, ctx)
        return int(number)


class LocalType(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Fails where it is a URL, which would be a folder of that name."""
        if "://" in str(value):
            self.fail(f"{value} is a URL; this takes a path of this machine", param, ctx)
        return super().convert(value, param, ctx)


PATH = LocalType(path_type=Path)
ANY_PATH = PathType()
NUMBER = NumberType()
dataset_option = click.option(
    "--dataset", type=ANY_PATH, help="Frame dataset.  [default: $WMCACHE_HOME/pointmaze-umaze]"
)
device_option = click.option("--device", default="auto", help="Device: auto, cpu, cuda, cuda:1, mps.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
encoder_options = options(
    click.option(
        "--encoder", "names", default="tcn", help="Encoder, or several separated by commas; see: wmcache encoders."
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="[NAME=]PATH",
        help="A .safetensors file or a save_pretrained folder, of all encoders that are not fitted or of one.  [default: its own source]",
    ),
    click.option("--base-weights", type=PATH, help="Weights of an adapter's base encoder, if they have moved."),
    click.option("--image-size", type=int, help="Side of the image that the network sees.  [default: the encoder's]"),
    click.option(
        "--normalisation",
        type=click.Choice(["half", "imagenet"]),
        help="Normalisation of pixels; half is DINO-WM's.  [default: the encoder's]",
    ),
    click.option(
        "--filter",
        type=click.Choice(["bilinear", "bicubic"]),
        help="Filter for resizing frames.  [default: the encoder's]",
    ),
    click.option(
        "--lag", type=click.IntRange(1), help="Env steps between the frames of a pair, for encoders of pairs."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Compute precision.  [default: the encoder's]",
    ),
    device_option,
    click.option(
        "--batch-size", "batch", type=click.IntRange(1), default=32, help="Frames in each call of the encoder."
    ),
    cluster_option(),
)


def name_of(store: AnyPath) -> str:
    """What is made of a store is named by the store and the folder that it is in, usually its dataset's name."""
    return f"{store.absolute().parent.name}-{store.stem}".lstrip("-")


store_argument = click.argument("store", type=ANY_PATH)
residence_option = click.option(
    "--residence",
    type=click.Choice(["auto", "device", "ram", "disk"]),
    default="auto",
    help="Where tokens are kept while training; auto measures free memory.",
)
model_options = options(
    click.option(
        "--combine",
        type=click.Choice(["features", "tokens"]),
        default="features",
        help="Add proprio and action as features of each token, or as tokens of their own.",
    ),
    click.option(
        "--condition",
        type=click.Choice(["concat", "adaln"]),
        default="concat",
        help="Combine the action with the tokens, or let it scale the blocks.",
    ),
    click.option(
        "--proprio",
        type=click.Choice(["raw", "embedding", "none"]),
        default="raw",
        help="Predict raw proprio, predict a learned embedding of it (DINO-WM), or use pixels alone.",
    ),
    click.option(
        "--predict",
        type=click.Choice(["change", "frame"]),
        default="change",
        help="Predict the change, or the next frame (DINO-WM).",
    ),
    click.option(
        "--position",
        type=click.Choice(["learned", "rope"]),
        default="learned",
        help="Position embedding of a frame in the window: learned, or rotary in time.",
    ),
    click.option(
        "--standardise/--as-stored",
        default=True,
        help="Standardise each channel of the tokens, or take them as they are (DINO-WM).",
    ),
    click.option(
        "--width",
        type=click.IntRange(0),
        default=384,
        help="Width of the transformer; 0: that of the tokens, without projections (DINO-WM).",
    ),
    click.option("--depth", type=click.IntRange(1), default=6, help="Transformer blocks."),
    click.option("--heads", type=click.IntRange(1), default=6, help="Attention heads."),
    click.option(
        "--head-dim", type=click.IntRange(0), default=0, help="Dimensions of each attention head; 0: width / heads."
    ),
    click.option("--mlp", type=click.IntRange(0), default=0, help="Hidden units of each MLP; 0: 4 x width."),
    click.option(
        "--dropout",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.1,
        help="Dropout in attention, projections and MLP.",
    ),
    click.option(
        "--embedding", type=click.IntRange(1), default=10, help="Dimensions of the action and proprio embeddings."
    ),
    click.option(
        "--foreground",
        type=click.IntRange(0),
        default=0,
        help="Tokens of a frame that are predicted (ddp-wm); 0: enough for 99 % of the steps.",
    ),
    click.option(
        "--labels",
        type=click.Choice(["pixels", "features"]),
        default="pixels",
        help="What shows that a token has changed (ddp-wm): pixels (change maps), or its features.",
    ),
    click.option(
        "--threshold",
        type=click.FloatRange(0),
        default=0.0,
        help="Smallest change that counts (ddp-wm); 0: 0.1 for pixels, 0.5 for features.",
    ),
    click.option(
        "--locator-width", type=click.IntRange(1), default=96, help="Width of the localization network (ddp-wm)."
    ),
    click.option(
        "--locator-depth",
        type=click.IntRange(1),
        default=3,
        help="Transformer blocks of the localization network (ddp-wm).",
    ),
    click.option(
        "--locator-heads",
        type=click.IntRange(1),
        default=3,
        help="Attention heads of the localization network (ddp-wm).",
    ),
    click.option(
        "--locator-mlp",
        type=click.IntRange(1),
        default=384,
        help="Hidden units of each MLP of the localization network (ddp-wm).",
    ),
    click.option(
        "--fusion-heads",
        type=click.IntRange(1),
        default=4,
        help="Attention heads of the temporal fusion block (ddp-wm).",
    ),
    click.option(
        "--correction-heads",
        type=click.IntRange(1),
        default=4,
        help="Attention heads of the correction of unchanged tokens (ddp-wm).",
    ),
    click.option(
        "--rollout-loss",
        type=click.FloatRange(0),
        default=0.0,
        help="Weight of the loss of a second step, predicted from the first one's output.",
    ),
    click.option(
        "--noise",
        type=click.FloatRange(0),
        default=0.0,
        help="Standard deviation of the noise that is added to the latents.",
    ),
)
source_options = options(
    click.option("--dataset", type=ANY_PATH, help="Where the frames are, if they have moved."),
    click.option("--weights", type=PATH, help="Where the encoder's weights are, if they have moved."),
    device_option,
)


def print_json(value: Any) -> None:
    """Print strict JSON; a figure that is not a finite number is null."""
    click.echo(dump_json(nulls(value), indent=2))


def say(line: str, *, err: bool = False) -> None:
    """Print one line; line breaks and control characters of names in it are escaped."""
    click.echo(one_line(line), err=err)


def print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """A table, or JSON."""
    if as_json:
        print_json(rows)
        return
    width = max(len(name) for row in rows for name in row) + 2
    click.echo("".join(f"{name:>{width}}" for name in rows[0]))
    for row in rows:
        cells = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values())
        click.echo("".join(f"{cell:>{width}}" for cell in cells))


def print_figures(figures: dict[str, float], *, as_json: bool) -> None:
    """A line each, or JSON."""
    if as_json:
        print_json(figures)
        return
    for name, value in figures.items():
        click.echo(f"{name:36} {value:12.3f}")


def print_figures_of(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """A column for each row, named by its first value, and a line for each of the others; or JSON."""
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


def take_model_options(settings: dict[str, Any], model: str = "dino-wm") -> dict[str, Any]:
    """The values of `model_options`, taken out of a command's settings: those that the model has.

    Raises:
        UserError: an unknown model; or an option was typed that it does not have.
    """
    from dataclasses import fields

    from wmcache.trainer.models import MODELS

    known = {field.name for field in fields(MODELS.get(model).Options)}
    given = click.get_current_context().get_parameter_source
    every = {field.name for name in MODELS for field in fields(MODELS.get(name).Options)}
    # An option without a flag is not among the settings, and keeps its default.
    values = {name: settings.pop(name) for name in sorted(every & settings.keys())}
    if typed := sorted(name for name in every - known if given(name) is ParameterSource.COMMANDLINE):
        flags = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise UserError(f"world model {model} has no option {flags}; leave that out")
    return {name: value for name, value in values.items() if name in known}


def open_dataset(path: AnyPath | None) -> Any:
    """The `FrameDataset` at `path`, or at its default place."""
    from wmcache.pipeline.frames import FrameDataset

    return FrameDataset.open(path or home() / "pointmaze-umaze")


def create_encoders(
    dataset: str,
    *,
    names: str,
    weights: tuple[str, ...],
    device: str,
    base_weights: Path | None = None,
    **settings: Any,
) -> list[Any]:
    """The `Encoder`s that the options name, with the weights fitted on the dataset of that name where there are such."""
    from wmcache.pipeline import encoders
    from wmcache.pipeline.fit import default_weights

    wanted = [name.strip() for name in names.split(",")]
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--encoder {names} names one twice; name each once")
    files = _weights_by_name(weights, wanted)
    paths: dict[str, Path | None] = {}
    for name in wanted:
        own = encoders.get_entry(encoders.family_of(name))  # a fitted family's layers have its weights
        fitted = default_weights(dataset, own.spec.name)
        of_all = files.get("") if len(wanted) == 1 or own.fit is None else None
        paths[name] = files.get(name) or of_all or (fitted if fitted.exists() else None)
    if "" in files and files[""] not in paths.values():
        raise UserError(f"--weights {files['']}: of which of {', '.join(wanted)}? write --weights NAME={files['']}")
    adapters = [name for name in wanted if encoders.get_entry(name).load is None]
    if base_weights is not None and not adapters:
        raise UserError(f"--base-weights {base_weights}: {', '.join(wanted)} is on no other encoder; leave it out")
    return [
        encoders.create(
            name, weights=path, base_weights=base_weights if name in adapters else None, device=device, **settings
        )
        for name, path in paths.items()
    ]


def _weights_by_name(given: tuple[str, ...], wanted: list[str]) -> dict[str, Path]:
    """`NAME=PATH` by name, and what has no name under the empty one."""
    files: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or name not in wanted:
            name, path = "", word
        if name in files:
            raise UserError(f"--weights {word}: a second one for {name or 'all encoders'}; write --weights NAME=PATH")
        files[name] = Path(path)
    return files
