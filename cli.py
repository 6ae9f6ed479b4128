"""The commands: parse, call one function, print, exit. No logic.

Imports stand inside the commands, so that `--help` is quick and `wmtrain` never loads an encoder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from wmcache import __version__
from wmcache.cache.errors import UserError, command
from wmcache.cache.files import home, human_bytes

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"]}
DEFAULT_ENV = "wmcache/PointMaze-UMaze-v0"
INTERRUPTED = 130
STOPPED = 75
"""EX_TEMPFAIL: the job was told to stop, and goes on when it is run again; a batch system can requeue on it."""


class Command(click.Command):
    """A command whose expected failures are one line and an exit status, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM warns of the walltime with the one that it is told
            signal.signal(number, _stop)
        threading.excepthook = _leave_to_those_who_wait
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as stop:
            click.echo(f"\nstopped; go on with: {shell_command(sys.argv)}", err=True)
            sys.exit(STOPPED if isinstance(stop, Stopped) else INTERRUPTED)
        except MemoryError as error:
            raise click.ClickException("there is not enough memory; lower --batch-size or --workers") from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(
                f"{where}{error.strerror or error}; free space or make it accessible, then run the same command again"
            ) from error
        except (ValueError, RuntimeError) as error:
            # The envs import nothing of ours, so their errors have types of their own; whatever else it is deserves its traceback.
            from wmcache.envs import MazeError, RendererError

            if isinstance(error, MazeError | RendererError):
                raise click.ClickException(str(error)) from error
            raise


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


class Stopped(KeyboardInterrupt):
    """A batch system wants the machine back."""


def _leave_to_those_who_wait(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what the disk refused once more in the thread that waits for it: one line is enough."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Stopped


def shell_command(words: list[str]) -> str:
    """What the user typed, quoted for a shell."""
    return command(Path(words[0]).name, *words[1:])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, for those that commands share."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


PATH = click.Path(path_type=Path)
dataset_option = click.option("--dataset", type=PATH, help="Frame dataset.  [default: $WMCACHE_HOME/pointmaze-umaze]")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
encoder_options = options(
    click.option("--encoder", "name", default="tcn", help="Name of the encoder; see: wmcache encoders."),
    click.option("--weights", type=PATH, help="Weights as a .safetensors file.  [default: the encoder's own source]"),
    click.option("--image-size", type=int, help="Side of the image that the network sees.  [default: the encoder's]"),
    click.option(
        "--normalisation", type=click.Choice(["half", "imagenet"]), help="half is DINO-WM's.  [default: the encoder's]"
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
    click.option("--workers", type=click.IntRange(1), default=1, help="Processes; each loads the encoder."),
)


store_argument = click.argument("store", type=PATH)
residence_option = click.option(
    "--residence",
    type=click.Choice(["auto", "device", "ram", "disk"]),
    default="auto",
    help="Where tokens are kept while training; auto measures free memory.",
)
model_options = options(
    click.option("--width", type=click.IntRange(1), default=384, help="Of the residual stream."),
    click.option("--depth", type=click.IntRange(1), default=6, help="Transformer blocks."),
    click.option("--heads", type=click.IntRange(1), default=6, help="Attention heads."),
    click.option(
        "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, help="In attention, projections and MLP."
    ),
)
source_options = options(
    click.option("--dataset", type=PATH, help="Where the frames are, if they have moved."),
    click.option("--weights", type=PATH, help="Where the encoder's weights are, if they have moved."),
    device_option,
)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wmcache")
def main() -> None:
    """Encode every frame once, train world models on cached latents, re-encode only live observations.

    The road: collect, fit (for an encoder without a download), extract, then wmtrain and wmplan.
    """


@main.command()
@click.option("--env", default=DEFAULT_ENV, help="Environment id, layout name (UMaze), or a .txt grid.")
@click.option("--episodes", type=click.IntRange(1), default=2000, help="Episodes; DINO-WM has 2000.")
@click.option("--length", type=click.IntRange(1), default=100, help="Frames in each episode.")
@click.option("--policy", default="random", help="Behaviour policy: random (DINO-WM) or held.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the dataset; the same seed gives the same bytes.")
@click.option("--image-size", type=click.IntRange(8, 2048), default=224, help="Side of the frames in pixels.")
@click.option(
    "--frames-per-shard",
    type=click.IntRange(1),
    default=512,
    help="Frames in each tar, and in each Zarr shard made from it.",
)
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, help="Processes.")
@click.option("--out", type=PATH, help="Folder of the dataset.  [default: $WMCACHE_HOME/pointmaze-<maze>]")
def collect(env: str, out: Path | None, **settings: Any) -> None:
    """Collect a dataset of frames. Run again, it goes on where it stopped."""
    from wmcache.envs import find_maze
    from wmcache.pipeline.collect import collect as run

    out = out or home() / f"pointmaze-{find_maze(env).name.lower()}"
    card = run(env, out, **settings)
    size = sum(shard["bytes"] for shard in card.shards)
    click.echo(f"{out}: {card.episodes} episodes, {card.frames} frames, {len(card.shards)} shards, {human_bytes(size)}")
    click.echo(f"fingerprint {card.fingerprint}")


@main.command()
@dataset_option
@click.option("--encoder", "name", default="tcn", help="An encoder that can be fitted.")
@click.option("--steps", type=click.IntRange(1), default=400, help="Optimiser steps.")
@click.option("--batch-size", "batch", type=click.IntRange(2), default=256, help="Pairs of frames in each step.")
@click.option("--max-lag", type=click.IntRange(1), default=4, help="Positives are 1 to this many env steps apart.")
@click.option(
    "--spread", type=click.FloatRange(0), default=0.2, help="Weight of the term that drives all frames apart."
)
@click.option("--lr", "learning_rate", type=float, default=1e-3, help="Peak learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and batches.")
@click.option("--max-frames", type=click.IntRange(1), default=50_000, help="Frames held in memory.")
@click.option("--overwrite", is_flag=True, help="Replace the weights of another fit.")
@device_option
@click.option(
    "--out", type=PATH, help="File to write.  [default: $WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors]"
)
def fit(
    dataset: Path | None, name: str, max_frames: int, overwrite: bool, device: str, out: Path | None, **settings: Any
) -> None:
    """Fit an encoder on the dataset's own frames, and measure its latent landscape."""
    from wmcache.pipeline.encoders import FitOptions
    from wmcache.pipeline.fit import default_weights
    from wmcache.pipeline.fit import fit as run

    frames = _open_dataset(dataset)
    out = out or default_weights(frames, name)
    result = run(frames, name, out, FitOptions(**settings), max_frames=max_frames, device=device, overwrite=overwrite)
    click.echo(f"{result.weights}: fitted on {result.frames} frames")
    landscape = result.landscape
    click.echo(
        f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {landscape.spearman:.3f}"
    )
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


@main.command()
@dataset_option
@encoder_options
@click.option(
    "--out", type=PATH, help="The store.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]"
)
@click.option(
    "--store-dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="What tokens are stored in; int8 takes half the room, with a step for each channel of each shard.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and stop.")
def extract(
    dataset: Path | None,
    batch: int,
    workers: int,
    out: Path | None,
    store_dtype: str,
    dry_run: bool,
    **encoder: Any,
) -> None:
    """Encode every frame of a dataset once. Run again, or beside itself, it does only the shards that are not there yet."""
    from wmcache.pipeline.extract import default_store, forecast
    from wmcache.pipeline.extract import extract as run

    frames = _open_dataset(dataset)
    network = _create_encoder(frames, **encoder)
    out = out or default_store(frames, network, store_dtype)
    if dry_run:
        plan = forecast(frames, network, out, dtype=store_dtype, batch=batch, workers=workers)
        click.echo(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
        click.echo(
            f"{human_bytes(plan.bytes_needed)} needed, {human_bytes(plan.bytes_free)} free, about {plan.seconds:.0f} s"
        )
        return
    run(frames, network, out, dtype=store_dtype, batch=batch, workers=workers)
    rows, columns = network.token_grid
    click.echo(f"{out}: {frames.card.frames} frames, {rows} x {columns} tokens of {network.token_dim}")


@main.command()
@json_option
def encoders(as_json: bool) -> None:
    """List the known encoders."""
    from wmcache.pipeline.encoders import specs

    rows = [{**asdict(spec), "token_grid": spec.token_grid(spec.image_size)} for spec in specs()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'name':10} {'grid':>7} {'dim':>5} {'input':>7}  {'licence':12} source")
    for row in rows:
        grid = "{} x {}".format(*row["token_grid"])
        click.echo(
            f"{row['name']:10} {grid:>7} {row['token_dim']:>5} {row['image_size']:>4} px  {row['licence']:12} {row['source']}"
        )
        click.echo(f"{'':10} {row['summary']}")


@main.command("ls")
@click.argument("folder", type=PATH, required=False)
@json_option
def list_(folder: Path | None, as_json: bool) -> None:
    """List the token stores under FOLDER ($WMCACHE_HOME/stores)."""
    from wmcache.cache.catalogue import list_stores

    entries = list_stores(folder or home() / "stores")
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    click.echo(f"{'state':>16} {'size':>9} {'frames':>8} {'tokens':>10} {'dtype':>8}  store")
    for entry in entries:
        shape = f"{entry.tokens} x {entry.token_dim}"
        click.echo(
            f"{entry.state:>16} {human_bytes(entry.bytes):>9} {entry.frames:>8} {shape:>10} {entry.dtype:>8}  {entry.path}"
        )


@main.command()
@store_argument
@json_option
def info(store: Path, as_json: bool) -> None:
    """Show what a token store says of itself."""
    from wmcache.cache.catalogue import describe

    values = describe(store)
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for group in ("identity", "card", "versions"):
        for name, value in values.pop(group).items():
            values[f"{group}.{name}"] = value
    for name, value in values.items():
        click.echo(f"{name:28} {value}")


@main.command()
@store_argument
@click.option("--deep", is_flag=True, help="Also encode a sample of the frames anew, and compare.")
@source_options
@json_option
def verify(store: Path, deep: bool, as_json: bool, **source: Any) -> None:
    """Compare every byte of a token store with its records; exit status 1 where something is wrong."""
    if deep:
        from wmcache.pipeline.repair import verify_deep

        found = verify_deep(store, **source)
    else:
        from wmcache.cache.verify import verify as run

        found = run(store)
    if as_json:
        click.echo(json.dumps({**asdict(found), "sound": found.sound}, indent=2))
    else:
        click.echo(f"{store}: {found.shards_done} of {found.shards} shards as they were written, {found.frames} frames")
        for fault in found.faults:
            click.echo(f"fault: {fault.file}: {fault.reason}")
        for file in found.leftovers:
            click.echo(f"left over, harmless: {file}")
        if found.drift:
            click.echo(", ".join(f"{name} {value:.6f}" for name, value in found.drift.items()))
    if not found.sound:
        raise UserError(
            f"{store} is {'damaged' if found.faults else 'incomplete'}; mend it with: {command('wmcache', 'repair', store)}"
        )


@main.command()
@store_argument
@source_options
def repair(store: Path, **source: Any) -> None:
    """Make exactly those shards of a token store again that are not as they were written."""
    from wmcache.pipeline.repair import repair as run

    found = run(store, **source)
    click.echo(f"{store}: complete; {len(found.faults)} faults mended" if found.faults else f"{store}: complete")


@main.command()
@store_argument
@click.option("--dataset", type=PATH, help="Where the frames are, if they have moved.")
@click.option("--count", type=click.IntRange(1, 64), default=8, help="Frames.")
@click.option("--out", type=PATH, help="The PNG to write.  [default: STORE, with .png for .zarr]")
def preview(store: Path, out: Path | None, **settings: Any) -> None:
    """Draw frames of a store beside their tokens, the first three principal components as colours."""
    from wmcache.pipeline.preview import preview as run

    out = out or store.resolve().with_suffix(".png")
    frames = run(store, out, **settings)
    click.echo(f"{out}: frames {', '.join(map(str, frames))}")


@main.command()
@store_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(store: Path, yes: bool) -> None:
    """Delete a token store."""
    from wmcache.cache.catalogue import remove

    if not yes:
        click.confirm(f"delete {store}?", abort=True)
    click.echo(f"{store}: deleted, {human_bytes(remove(store))} free again")


@main.group(cls=Group)
def bench() -> None:
    """Measure speed as a ratio to a named limit."""


@bench.command("extract")
@dataset_option
@encoder_options
@json_option
def bench_extract(dataset: Path | None, batch: int, workers: int, as_json: bool, **encoder: Any) -> None:
    """Extraction against the bare encoder, on every frame of a dataset."""
    from wmcache.pipeline.bench import bench_extract as run

    frames = _open_dataset(dataset)
    result = run(frames, _create_encoder(frames, **encoder), batch=batch, workers=workers)
    _print_figures(result, as_json=as_json)


@bench.command("read")
@click.option("--frames", type=click.IntRange(100), default=8192, help="Of the store that is made for it.")
@click.option("--tokens", type=click.IntRange(1), default=196, help="N.")
@click.option("--dim", type=click.IntRange(1), default=384, help="D.")
@click.option("--batch-size", "batch", type=click.IntRange(1), default=64, help="Windows of 4 frames, 5 apart.")
@click.option("--store-dtype", "dtype", type=click.Choice(["float16", "int8"]), default="float16")
@click.option("--keep", type=PATH, help="Folder to leave the store and the plain file in.")
@json_option
def bench_read(as_json: bool, **settings: Any) -> None:
    """Windows from a store against a plain .npy file of the same bytes and against the zarr API, all in the page cache."""
    from wmcache.cache.bench import bench_read as run

    _print_figures(run(**settings), as_json=as_json)


@bench.command("codecs")
@store_argument
@click.option("--frames", type=click.IntRange(100), default=2000, help="How many, from the first.")
@json_option
def bench_codecs(store: Path, frames: int, as_json: bool) -> None:
    """Size, speed and error of STORE's own tokens as int8 and compressed."""
    from wmcache.cache.bench import bench_codecs as run

    _print_rows(run(store, frames=frames), as_json=as_json)


@bench.command("train")
@click.option("--cache", type=PATH, required=True, help="The token store; its frames and encoder are used as well.")
@click.option("--steps", type=click.IntRange(2), default=20, help="Training steps of each contender in each turn.")
@click.option("--batch-size", "batch", type=click.IntRange(1), default=64, help="Windows.")
@model_options
@residence_option
@source_options
@json_option
def bench_train(
    cache: Path,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    dataset: Path | None,
    weights: Path | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Training steps fed by the store against the same steps on one batch in memory, and against encoding in the loop."""
    from wmcache.pipeline.repair import live_encoder
    from wmcache.trainer.bench import bench_train as run

    encode = live_encoder(cache, dataset=dataset, weights=weights, device=device)
    model = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
    _print_figures(run(cache, model, encode, device=device, **settings), as_json=as_json)


@bench.command("memory")
@click.option("--episodes", type=click.IntRange(1), default=10, help="Of 100 frames, in the smallest dataset.")
@json_option
def bench_memory(episodes: int, as_json: bool) -> None:
    """Peak memory of wmcache extract and wmtrain over datasets 1, 4 and 16 times as large."""
    from wmcache.pipeline.bench import bench_memory as run

    _print_rows(run(episodes), as_json=as_json)


def _print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(name) for row in rows for name in row) + 2
    click.echo("".join(f"{name:>{width}}" for name in rows[0]))
    for row in rows:
        cells = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values())
        click.echo("".join(f"{cell:>{width}}" for cell in cells))


def _print_figures(figures: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        click.echo(f"{name:36} {value:12.3f}")


@click.command(cls=Command, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wmtrain")
@click.option("--cache", type=PATH, required=True, help="The token store; nothing else is read.")
@click.option("--out", type=PATH, help="Folder of the run.  [default: $WMCACHE_HOME/runs/<dataset>-<store>]")
@click.option("--model", default="dino-wm", help="World model.")
@model_options
@click.option("--history", type=click.IntRange(1), default=3, help="Context frames.")
@click.option("--frameskip", type=click.IntRange(1), default=5, help="Env steps between frames of a window.")
@click.option("--steps", type=click.IntRange(1), default=10_000, help="Optimiser steps.")
@click.option("--batch-size", "batch", type=click.IntRange(1), default=64, help="Windows in each micro-batch.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Micro-batches in each step.")
@click.option("--lr", "learning_rate", type=float, default=5e-4, help="Learning rate of the constant phase.")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.05, help="Share of the steps.")
@click.option("--decay", type=click.FloatRange(0, 1), default=0.3, help="Share of the steps.")
@click.option("--weight-decay", type=float, default=1e-2, help="Of matrices.")
@click.option("--clip", type=float, default=1.0, help="Of the gradient's norm.")
@click.option("--dtype", default="auto", help="auto, float32 or bfloat16.")
@device_option
@residence_option
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, dropout and order.")
@click.option("--split-seed", type=click.IntRange(0), default=42, help="Of the split into train and val episodes.")
@click.option("--compile", is_flag=True, help="Use torch.compile.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps.")
@click.option("--validate-every", type=click.IntRange(1), default=500, help="Steps.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=500, help="Steps.")
@click.option("--resume", is_flag=True, help="Insist on going on; --steps may then differ.")
@click.option("--overwrite", is_flag=True, help="Begin anew where a run exists.")
def wmtrain(
    cache: Path,
    out: Path | None,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    resume: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train a world model purely on cached latents. Run again, it goes on where it stopped."""
    from wmcache.trainer.loop import TrainOptions, train

    out = out or home() / "runs" / f"{cache.absolute().parent.name}-{cache.stem}"
    model_options = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
    train(cache, out, TrainOptions(model_options=model_options, **settings), resume=resume, overwrite=overwrite)
    click.echo(f"{out}: trained; plan with: {command('wmplan', '--run', out)}")


@click.command(cls=Command, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wmplan")
@click.option("--run", type=PATH, required=True, help="Folder of the run.")
@click.option("--episodes", type=int, default=50, help="How many; start and goal of each are random.")
@click.option("--budget", type=int, default=100, help="Env steps of each episode.")
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    help="Distance below which a goal is reached; 0.5, 0.25 and 0.1 are always reported.",
)
@click.option("--horizon", type=int, default=5, help="Model steps of a plan.")
@click.option("--execute", type=int, default=1, help="Model steps before the next plan.")
@click.option(
    "--objective",
    type=click.Choice(["last", "all"]),
    default="all",
    help="Score the last imagined frame (DINO-WM) or all.",
)
@click.option("--context", type=int, default=1, help="Frames that an imagined step sees.")
@click.option("--samples", type=int, default=64, help="Candidates an iteration; DINO-WM has 300.")
@click.option("--elites", type=int, default=6, help="Of them; DINO-WM has 30.")
@click.option("--iterations", type=int, default=5, help="Of the cross-entropy method; DINO-WM has 10.")
@click.option("--sigma", type=float, default=0.4, help="First standard deviation of the candidates, in env units.")
@click.option("--batch-size", "batch", type=int, default=50, help="Episodes planned at once.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Number of the first episode.")
@click.option("--env", help="Another maze than the data's.")
@click.option("--weights", type=PATH, help="The encoder's weights, if they have moved.")
@click.option("--cache", type=PATH, help="The store, if it has moved.")
@click.option("--dtype", default="auto", help="Of the model: auto, float32 or bfloat16.")
@device_option
@click.option(
    "--out", type=PATH, help="Folder of the results.  [default: RUN/plan-<objective>-x<execute>-<episodes>x<budget>]"
)
@json_option
def wmplan(
    run: Path, weights: Path | None, cache: Path | None, out: Path | None, as_json: bool, **settings: Any
) -> None:
    """Plan with a trained world model, judge it, and write a report."""
    from wmcache.planner.evaluate import PlanOptions, Setting, evaluate, refuse_other_results
    from wmcache.planner.report import write_report

    chosen = PlanOptions(**settings)
    maze = f"-{Path(chosen.env).stem}" if chosen.env else ""
    out = out or run / f"plan-{chosen.objective}-x{chosen.execute}-{chosen.episodes}x{chosen.budget}{maze}"
    refuse_other_results(out, chosen)
    setting = Setting(run, chosen, weights=weights, cache=cache)
    episodes, results = evaluate(setting, chosen, out)
    write_report(out, run, setting, episodes, results, shell_command(sys.argv))
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    click.echo(f"{'threshold':>9} {'reached':>12} {'rate':>6} {'95 % interval':>16} {'env steps':>10} {'held':>5}")
    for row in results["by_threshold"]:
        reached = f"{row['successes']} of {results['episodes']}"
        interval = "{:.3f} to {:.3f}".format(*row["ci95"])
        rate, steps = f"{row['success_rate']:>6.3f}", f"{row['mean_env_steps']:>10.1f}"
        click.echo(f"{row['threshold']:>9} {reached:>12} {rate} {interval:>16} {steps} {row['held']:>5}")
    click.echo(
        f"{results['budget_env_steps']} env steps an episode, {results['replans']} replans at {results['seconds_per_replan']:.3f} s, "
        f"{results['encoder_frames']} frames encoded"
    )
    click.echo(f"report: {out / 'report.html'}")


def _open_dataset(path: Path | None) -> Any:
    from wmcache.pipeline.frames import FrameDataset

    return FrameDataset.open(path or home() / "pointmaze-umaze")


def _create_encoder(dataset: Any, *, name: str, weights: Path | None, **settings: Any) -> Any:
    from wmcache.pipeline import encoders
    from wmcache.pipeline.fit import default_weights

    fitted = default_weights(dataset, name)
    if weights is None and fitted.exists():
        weights = fitted
    return encoders.create(name, weights=weights, **settings)
