"""Other people's data -> frame dataset: one file a format, each of which gives a `Source`; here it is written.

A source has all its steps in memory and its frames on disk. Frames are asked for shard by shard, so memory holds what a reader
holds of one episode, and an import that was stopped goes on with the shards that are not there yet.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from wmcache.cache.arrays import MAX_COLUMN_WIDTH
from wmcache.cluster.tasks import run_tasks
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, exists
from wmcache.common.space import require_space
from wmcache.pipeline.frames import DatasetCard, FrameDatasetWriter, write_shard
from wmcache.pipeline.steps import Steps, read_steps
from wmcache.pipeline.tars import Frames, encode_png

MOST_PIXELS = 8192 * 8192
"""Of an image before it is cropped and resized; beyond, it is taken for a decompression bomb."""

NO_LEROBOT = (
    "which wmcache cannot import yet: it reads neither videos of several episodes, nor images inside a table, nor LeRobot's columns "
    "(episode_index, frame_index, observation.state); save each episode as images or as one video, with a table as in docs/import.md"
)
"""Why a LeRobot dataset is refused."""

Read = Callable[[int, range], Iterable[Frames]]
"""(episode, steps) -> the frames of those steps, uint8 [image_size, image_size, 3] each."""


@dataclass(frozen=True)
class Source:
    """What an importer makes of somebody's files.

    Attributes:
        origin: the files, for errors.
        steps: the step table of all frames.
        image_size: side of the frames in pixels.
        read: gives the frames; raises UserError, naming the file, where one cannot be had.
        env, maze, policy, fps: as in `DatasetCard`.
    """

    origin: AnyPath | str
    steps: Steps
    image_size: int
    read: Read
    env: str
    maze: tuple[str, ...]
    policy: str
    fps: int


def write_dataset(source: Source, out: AnyPath, *, frames_per_shard: int) -> DatasetCard:
    """Write a source's frames and steps as a frame dataset; run again, it goes on where it was stopped.

    Args:
        source: what to write.
        out: the dataset's folder.
        frames_per_shard: frames in each tar, and in each Zarr shard of the stores made from it.

    Raises:
        UserError: unusable folder, other settings or other data than were begun there, too little space, or frames that cannot be read.
    """
    steps = source.steps
    if not steps.in_order():
        raise UserError(f"{source.origin} holds no frames, or its steps are out of order")
    # Before anything is written: a first frame shows most of what can be wrong with all of them, and about what one costs.
    first = encode_png(next(iter(source.read(0, range(1)))))
    card = DatasetCard(
        name=out.absolute().name,
        env=source.env,
        maze=list(source.maze),
        image_size=source.image_size,
        policy=source.policy,
        seed=0,
        episodes=int(steps.episode[-1]) + 1,
        frames=len(steps),
        frames_per_shard=frames_per_shard,
        fps=source.fps,
    )
    if not exists(out):
        require_space(out, len(first) * len(steps) // 2, f"a dataset of {len(steps)} frames")
    writer = FrameDatasetWriter(out, card, steps)
    if read_steps(out, len(steps)).sha256() != steps.sha256():
        raise UserError(
            f"{out} was begun with other actions or states than {source.origin} holds; choose another --out"
        )
    pending = writer.pending()
    total = sum(len(writer.shard_frames(shard)) for shard in pending)
    run_tasks(functools.partial(_write, writer, source), pending, total=total, label="import")
    return writer.finish()


def _write(writer: FrameDatasetWriter, source: Source, shard: int) -> int:
    frames = writer.shard_frames(shard)
    write_shard(writer.path, shard, _samples(source, frames))
    return len(frames)


def _samples(source: Source, frames: range) -> Iterator[tuple[str, Frames]]:
    steps, start = source.steps, frames.start
    while start < frames.stop:
        episode = steps.episode[start]
        stop = min(frames.stop, int(np.searchsorted(steps.episode, episode, side="right")))
        wanted = range(int(steps.step[start]), int(steps.step[stop - 1]) + 1)
        for frame, image in zip(range(start, stop), source.read(int(episode), wanted), strict=True):
            yield steps.key(frame), image
        start = stop


@dataclass(frozen=True)
class Shape:
    """How images become square frames of one size.

    Attributes:
        crop: `none`: images that are not square are refused; `center`: their central square is taken.
        image_size: side to which squares are then resized, bicubic with antialiasing; None: they must all be of one size.
    """

    crop: str = "none"
    image_size: int | None = None

    def __str__(self) -> str:
        """For the card."""
        resized = f", resized to {self.image_size} px (bicubic)" if self.image_size else ""
        return (", cropped to the central square" if self.crop == "center" else "") + resized

    def side(self, width: int, height: int, where: AnyPath | str) -> int:
        """Side of the frame that an image of this size becomes.

        Raises:
            UserError: the image is not square and is not to be cropped, or is larger than any frame.
        """
        if width != height and self.crop == "none":
            raise UserError(f"{where} is {width} x {height} pixels, not square; pass --crop center")
        side = self.image_size or min(width, height)
        if not 0 < side <= 8192:
            raise UserError(f"{where} would become a frame of {side} pixels, beyond 8192; pass --image-size")
        return side

    def frame(self, image: Image.Image, size: int, where: AnyPath | str) -> Frames:
        """An RGB image as a frame, uint8 [size, size, 3]; raises UserError where it does not become one of that size."""
        width, height = image.size
        if (found := self.side(width, height, where)) != size:
            raise UserError(
                f"{where} gives a frame of {found} pixels, the first one has {size}; pass --image-size to resize all"
            )
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        if width != height:
            image = image.crop((left, top, left + square, top + square))
        if square != size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)


def as_columns(
    action: NDArray[Any], state: NDArray[Any], where: AnyPath | str, row: Callable[[int], str] = "row {}".format
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Actions [frames, A] and states [frames, P] as `Steps` holds them; actions are rounded to float32.

    Args:
        action, state: the numbers.
        where: the file, for errors.
        row: names a row of the arrays as the file counts it.

    Raises:
        UserError: a number is missing, not finite or too large for its type, or a row has too many.
    """
    for name, values in (("action", action), ("state", state)):
        if not 0 < values.shape[1] <= MAX_COLUMN_WIDTH:
            raise UserError(
                f"{where} has {values.shape[1]} numbers in each {name}; 1 to {MAX_COLUMN_WIDTH} can be kept"
            )
    with np.errstate(over="ignore"):
        actions, states = np.ascontiguousarray(action, np.float32), np.ascontiguousarray(state, np.float64)
    for name, values, kept in (("action", action, actions), ("state", state, states)):
        if len(wrong := np.argwhere(~np.isfinite(kept))):
            at, column = wrong[0].tolist()
            value = values[at, column]
            reason = "empty or NaN" if np.isnan(value) else f"{value:g}, beyond float32"
            raise UserError(
                f"{name}_{column} is not a finite number ({reason}): {where}, {row(at)}; correct it, or end the episode before it "
                "(only in the last row of an episode may the action be missing)"
            )
    return actions, states


def is_action_missing(action: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether nothing was recorded as the action of a row, bool [rows]: recorders write NaN for the last frame of an episode."""
    return np.asarray(np.isnan(np.asarray(action, np.float64)).all(axis=1))


def note(text: str) -> None:
    """Print, on stderr, what an import leaves out."""
    tqdm.write(f"note: {UserError(text)}", file=sys.stderr)


def refuse_lerobot(folder: Path) -> None:
    """Raise UserError where a folder is a LeRobot dataset."""
    try:
        info = json.loads((folder / "meta/info.json").read_bytes())
        version = info["codebase_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise UserError(f"{folder} is a LeRobot dataset (codebase_version {str(version)[:20]}), {NO_LEROBOT}")


def require_finite(values: NDArray[Any], what: str) -> None:
    """Refuse, as a UserError that names the first one, values that are NaN or infinite."""
    if len(wrong := np.argwhere(~np.isfinite(values))):
        place = ", ".join(map(str, wrong[0].tolist()))
        raise UserError(f"the {what} is not a finite number at [{place}]; correct the file")
