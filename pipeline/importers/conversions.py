"""What import formats share: images to square frames, and numbers to columns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from wmcache.common.columns import MAX_COLUMN_WIDTH
from wmcache.common.errors import UserError
from wmcache.common.options import Positive, option
from wmcache.common.paths import AnyPath
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import Importer
from wmcache.pipeline.steps import Steps


@dataclass(frozen=True)
class ImageImporter(Importer):
    """A format whose images may have to be cropped and resized (bicubic with antialiasing) to square frames of one size."""

    crop: Literal["none", "center"] = option("none", "center: take the central square of images that are not square.")
    image_size: Annotated[int, Ge(8), Le(8192)] | None = option(
        None, "Resize squares to this side.  [default: as they are]"
    )
    fps: Positive = option(20, "Env steps per second, for videos that are made later.")

    @property
    def changes(self) -> str:
        """The changes to images, for the card; empty if there are none."""
        resized = f", resized to {self.image_size} px (bicubic)" if self.image_size else ""
        return (", cropped to the central square" if self.crop == "center" else "") + resized

    def side(self, width: int, height: int, where: AnyPath | str) -> int:
        """Return the side of the frame of an image; raises UserError for one that is not square or too large."""
        if width != height and self.crop == "none":
            raise UserError(f"{where} is {width} x {height} pixels, not square; pass --crop center")
        side = self.image_size or min(width, height)
        if not 0 < side <= 8192:
            raise UserError(f"{where} gives a frame of {side} pixels, more than 8192; pass --image-size")
        return side

    def frame(self, image: Image.Image, size: int, where: AnyPath | str) -> Frames:
        """Turn an RGB image into a frame, uint8 [size, size, 3]; raises UserError if it does not have that size."""
        width, height = image.size
        if (found := self.side(width, height, where)) != size:
            raise UserError(f"{where} gives a frame of {found} pixels, the first has {size}; pass --image-size")
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
    """Convert actions [frames, A] and states [frames, P] to the types of `Steps`; actions are rounded to float32.

    Raises UserError, naming the file (`where`) and the row as `row` calls it, if a number is not finite, or a row has too many.
    """
    for name, values in (("action", action), ("state", state)):
        if not 0 < values.shape[1] <= MAX_COLUMN_WIDTH:
            raise UserError(f"{where} has {values.shape[1]} numbers in each {name}; use 1 to {MAX_COLUMN_WIDTH}")
    with np.errstate(over="ignore"):
        actions, states = np.ascontiguousarray(action, np.float32), np.ascontiguousarray(state, np.float64)
    for name, values, kept in (("action", action, actions), ("state", state, states)):
        if len(wrong := np.argwhere(~np.isfinite(kept))):
            at, column = wrong[0].tolist()
            raise UserError(
                f"{name}_{column} is {values[at, column]:g}, not a finite number (actions are float32): {where}, {row(at)}; "
                "correct it, or end the episode before it (only its last row may lack the action)"
            )
    return actions, states


def make_steps(episodes: Sequence[tuple[NDArray[Any], NDArray[Any]]], where: AnyPath | str) -> Steps:
    """Make the step table of episodes of actions [T, A] and states [T, P]; raises as `as_columns`."""
    if not episodes:
        raise UserError(f"{where} has no episodes")
    lengths = [len(action) for action, _ in episodes]
    number = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    action, state = (np.concatenate(values) for values in zip(*episodes, strict=True))
    return Steps.plain(
        number, step, *as_columns(action, state, where, lambda row: f"episode {number[row]}, step {step[row]}")
    )


def is_action_missing(action: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row has no action, bool [rows]: recorders write NaN for the last frame of an episode."""
    return np.asarray(np.isnan(np.asarray(action, np.float64)).all(axis=1))


def note(text: str) -> None:
    """Print, on stderr, what an import leaves out."""
    tqdm.write(f"note: {UserError(text)}", file=sys.stderr)
