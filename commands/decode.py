"""wmtrain decoder, wmcache imagine: latents as pictures, for people."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click

from wmcache.commands.command import Command, take_chosen
from wmcache.commands.options import ByName, options_of
from wmcache.commands.output import show
from wmcache.commands.shared import file_option, json_option, moved_cache_option, path_option
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home, name_of
from wmcache.common.paths import AnyPath
from wmcache.planner.options import ImagineOptions
from wmcache.trainer.options import DecoderOptions

METRICS = {"mse": "mse", "moving_mse": "mse, moving pixels", "ssim": "ssim", "lpips": "lpips"}
frames_option = path_option(
    "--frames", "--dataset", "dataset", help="Location of the store's frames, if they have moved."
)
_decoders = partial(resolve_name, "wmcache.trainer.decoders:DECODERS")
DECODER = ByName("decoder", "decoder", _decoders, lambda name: _decoders().get(name).Options, every="auto")


@click.command(cls=Command, by=DECODER)
@path_option("--cache", required=True, help="The token store.")
@frames_option
@file_option("--out", help="Folder of the decoder.  [default: $WMCACHE_HOME/decoders/<dataset>-<store>]")
@click.option("--overwrite", is_flag=True, help="Delete the decoder in --out and start from scratch.")
@json_option
@options_of(DecoderOptions, decoder={"names": _decoders})
def decoder(cache: AnyPath, dataset: AnyPath | None, out: Path | None, overwrite: bool, **settings: Any) -> None:
    """Train a decoder from cached tokens to frames, to look at latents with. Run again, it goes on where it stopped."""
    from wmcache.trainer.decoder import train_decoder

    out = out or home() / "decoders" / name_of(cache)
    options = DecoderOptions(decoder_options=take_chosen(settings, given=True), **settings)
    result = train_decoder(cache, _frames_of(cache, dataset), out, options, overwrite=overwrite)
    lines = [f"{out}: {result['frames']} held-out frames, {_figures(result)}"]
    if "mean_frame" in result:  # a decoder of an earlier version has no such figures
        lines += [
            f"the mean frame, for comparison: {_figures(result['mean_frame'])}",
            _explain_moving(result["moving"]),
        ]
    draw = command("wmcache", "imagine", "--run", "RUN", "--decoder", out)
    show(result, [*lines, *_absence(result), f"draw what a world model imagines with: {draw}"])


@click.command(cls=Command)
@file_option("--run", required=True, help="Folder of the world model's run.")
@file_option("--decoder", help="Folder of a decoder of the same store.  [default: the encoder's own, of a vae]")
@frames_option
@moved_cache_option
@options_of(ImagineOptions)
@file_option("--out", help="Folder of the pictures.  [default: RUN/imagine]")
@json_option
def imagine(
    run: Path, decoder: Path | None, dataset: AnyPath | None, cache: AnyPath | None, out: Path | None, **settings: Any
) -> None:
    """Draw imagined frames beside the real ones: videos, a picture, and figures for each step."""
    from wmcache.planner.imagine import imagine as draw
    from wmcache.trainer.runs import caches_of, read_config

    out = out or run / "imagine"
    if cache is None:
        caches = caches_of(read_config(run))
        if len(caches) > 1:
            raise UserError(f"{run} was trained on {len(caches)} stores; imagine draws the frames of a run with one")
        cache = caches[0]
    result = draw(run, decoder, _frames_of(cache, dataset), out, ImagineOptions(**settings), cache=cache)
    lines = [*_step_lines(result["steps"]), *_absence(result), f"pictures: {out}"]
    show(result, lines)


def _frames_of(cache: AnyPath, dataset: AnyPath | None) -> Any:
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.stores import frames_of

    return frames_of(TokenStore.open(cache), dataset)


def _figures(result: dict[str, Any]) -> str:
    return ", ".join(f"{title} {_figure(name, result[name])}" for name, title in METRICS.items() if name in result)


def _figure(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}" if name.endswith("mse") else f"{value:.4f}"


def _step_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    # A block for each metric: pictures as lines, up to 10 model steps as columns.
    from wmcache.planner.imagine import PICTURES

    count = min(len(rows), 10)
    shown = [rows[k * (len(rows) - 1) // max(count - 1, 1)] for k in range(count)]
    for name, title in METRICS.items():
        if name in shown[0]["imagined"]:
            yield f"{title:21}" + "".join(f" {'step ' + str(row['step']):>8}" for row in shown)
            for picture, label in PICTURES.items():
                yield f"  {label:19}" + "".join(f" {_figure(name, row[picture][name]):>8}" for row in shown)
    yield _explain_moving(sum(row["imagined"]["moving"] for row in rows) / len(rows))


def _explain_moving(share: float) -> str:
    from wmcache.trainer.metrics import MOVING

    return f"moving: {share:.2%} of the pixels, where the real frame differs from the mean train frame by more than {MOVING}"


def _absence(result: dict[str, Any]) -> list[str]:
    return [f"no LPIPS: {result['lpips_absent']}"] if "lpips_absent" in result else []
