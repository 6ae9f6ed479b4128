"""wmcache export: datasets and stores in the formats of other projects."""

from __future__ import annotations

from pathlib import Path

import click

from wmcache.commands.command import Command, Group
from wmcache.commands.output import say
from wmcache.commands.shared import dataset_option, file_option, path_option, store_argument
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath


@click.group("export", cls=Group)
def export() -> None:
    """Write a dataset or a store in another project's format. Run again, it continues where it stopped."""


@export.command("tokens", cls=Command)
@store_argument
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "parquet"]),
    default="safetensors",
    help="A file for each shard: arrays under the store's names, or rows with LeRobot's names, as observation.tokens.",
)
@path_option("--out", required=True, help="Folder of the files.")
def tokens(store: AnyPath, file_format: str, out: AnyPath) -> None:
    """Write the tokens and the step table of STORE, equal to the bit."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.export_tokens import export_tokens

    source = TokenStore.open(store, mirrored=True)
    already = "" if export_tokens(source, out, file_format) else " (already complete)"
    say(f"{out}: {len(source)} frames in {source.card.num_shards} files{already}")


@export.command("lerobot", cls=Command)
@dataset_option
@file_option("--out", required=True, help="Folder of the LeRobot dataset.")
def lerobot(dataset: AnyPath | None, out: Path) -> None:
    """Write a LeRobot dataset of format v3: tables in Parquet, exact; frames as MP4, which is lossy."""
    from wmcache.pipeline.export_lerobot import export_lerobot
    from wmcache.pipeline.frames import FrameDataset

    frames = FrameDataset.open(dataset or home() / "pointmaze-umaze")
    videos = export_lerobot(frames, out)
    say(f"{out}: {frames.card.episodes} episodes, {frames.card.frames} frames, {videos} videos")
