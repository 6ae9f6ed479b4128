"""What import formats share: images to square frames, and numbers to columns."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from PIL import Image, ImageColor
from tqdm import tqdm

from wmcache.common.columns import MAX_COLUMN_WIDTH, Column, DType, Role, require_names
from wmcache.common.errors import UserError, suggest
from wmcache.common.options import Positive, option
from wmcache.common.paths import AnyPath
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import Importer
from wmcache.pipeline.steps import Steps

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""[H, W] or [H, W, C]: C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)."""


@dataclass(frozen=True)
class ImageImporter(Importer):
    """A format whose images may have to be changed to square RGB frames of one size; docs/import.md has the rules."""

    crop: Literal["none", "center"] = option("none", "center: take the central square of images that are not square.")
    pad: bool = option(
        False, "Pad images that are not square, to squares with --background on both sides.", flag="--pad"
    )
    background: str | None = option(
        None,
        "Colour behind transparent images and beside padded ones, as in white or #202020.  [default: transparent images are refused, "
        "padding is black]",
    )
    white_level: Annotated[int, Ge(1), Le(65535)] = option(
        65535, "Value of 16-bit images that becomes 255, as larger ones do."
    )
    image_size: Annotated[int, Ge(8), Le(8192)] | None = option(
        None, "Resize squares to this side (bicubic with antialiasing).  [default: as they are]"
    )
    fps: Positive = option(20, "Env steps per second, for videos that are made later.")
    _noted: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise UserError for options that do not fit together."""
        if self.pad and self.crop != "none":
            raise UserError("--pad and --crop center exclude each other; leave one out")
        try:
            is_opaque = len(ImageColor.getrgb(self.background or "black")) == 3
        except ValueError:
            is_opaque = False
        if not is_opaque:
            raise UserError(f"--background {self.background!r} is no opaque colour; write a name or #RRGGBB")

    @property
    def changes(self) -> str:
        """The changes to images, for the card; empty if there are none."""
        done = {
            "cropped to the central square": self.crop == "center",
            "padded to a square": self.pad,
            f"on {self.background}": self.background,
            f"{self.white_level} is white": self.white_level != 65535,
            f"resized to {self.image_size} px (bicubic)": self.image_size,
        }
        return "".join(f", {change}" for change, is_done in done.items() if is_done)

    def note_once(self, kind: str, text: str) -> None:
        """Print `text` on stderr, once for each kind."""
        if kind not in self._noted:
            self._noted.add(kind)
            note(text)

    def side(self, width: int, height: int, where: AnyPath | str) -> int:
        """Return the side of the frame of an image; raises UserError for one that is not square or too large."""
        if width != height and self.crop == "none" and not self.pad:
            raise UserError(f"{where} is {width} x {height} pixels, not square; pass --crop center or --pad")
        side = self.image_size or (max(width, height) if self.pad else min(width, height))
        if not 0 < side <= 8192:
            raise UserError(f"{where} gives a frame of {side} pixels, more than 8192; pass --image-size")
        return side

    def frame(self, image: Image.Image, size: int, where: AnyPath | str) -> Frames:
        """Turn an image of 8 bits into a frame, uint8 [size, size, 3].

        Raises UserError if it does not have that size, or is transparent without --background.
        """
        if (found := self.side(*image.size, where)) != size:
            raise UserError(f"{where} gives a frame of {found} pixels, the first has {size}; pass --image-size")
        image = self._squared(self._opaque(image, where))
        if image.width != size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    def side_of(self, shape: tuple[int, ...], where: AnyPath | str) -> int:
        """Return the side of the frame of an image that is an array, see `to_rgb`; raises as `side`."""
        height, width, _ = to_rgb(np.broadcast_to(np.uint8(0), shape)).shape
        return self.side(width, height, where)

    def frame_of(self, array: NDArray[np.uint8], size: int, where: AnyPath | str) -> Frames:
        """Turn an image that is an array into a frame, see `to_rgb` and `frame`."""
        return self.frame(Image.fromarray(to_rgb(array)), size, where)

    def to_image(self, pixels: Pixels, where: AnyPath | str) -> Image.Image:
        """Return pixels as an image of 8 bits; those of uint16 are scaled by --white-level, with a note."""
        if pixels.dtype == np.uint16:
            self.note_once(
                "16 bits",
                f"{where} has 16 bits per channel, and values up to {pixels.max()}: "
                f"0 to {self.white_level} becomes 0 to 255 in all such images (--white-level)",
            )
            levels = np.full(pixels.shape[2:], self.white_level, np.uint32)
            if pixels.shape[2:] in ((2,), (4,)):
                levels[-1] = 65535  # alpha
            pixels = ((np.minimum(pixels, levels) * np.uint32(255) + levels // 2) // levels).astype(np.uint8)
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)

    def _opaque(self, image: Image.Image, where: AnyPath | str) -> Image.Image:
        """Return an image as RGB, on the background where it is transparent."""
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        coloured = image.convert("RGBA")
        if coloured.getchannel("A").getextrema() == (255, 255):
            return coloured.convert("RGB")
        if self.background is None:
            raise UserError(f"{where} is transparent; pass --background, such as --background white")
        return Image.alpha_composite(Image.new("RGBA", image.size, self.background), coloured).convert("RGB")

    def _squared(self, image: Image.Image) -> Image.Image:
        """Crop or pad an RGB image to a square; with odd differences, the right or the lower edge is one pixel larger."""
        width, height = image.size
        if width == height:
            return image
        if not self.pad:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return image.crop((left, top, left + side, top + side))
        side = max(width, height)
        padded = Image.new("RGB", (side, side), self.background or "black")
        padded.paste(image, ((side - width) // 2, (side - height) // 2))
        return padded


@dataclass(frozen=True)
class ColumnImporter(ImageImporter):
    """A format with any number of named columns, of which some may not fit a frame dataset."""

    drop: str | None = option(None, "Columns to leave out, separated by commas.  [default: none]")

    def kept(self, names: Iterable[str], where: AnyPath | str) -> list[str]:
        """Return the names without those of `drop`; raises UserError for one that the source does not have."""
        dropped = [name for name in (self.drop or "").split(",") if name]
        if unknown := set(dropped) - {*(known := list(names))}:
            raise UserError(
                f"--drop {sorted(unknown)[0]} is no column of {where}; {suggest(sorted(unknown)[0], known)}"
            )
        return [name for name in known if name not in dropped]


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return the axis of an image's 1 or 3 channels, preferably the last; None if no axis fits."""
    if len(shape) != 3:
        return None
    return next((axis for axis in (2, 0) if shape[axis] in (1, 3)), None)


def to_rgb(image: NDArray[np.uint8]) -> Frames:
    """Return an image, grey or with its channels first or last, as uint8 [H, W, 3]."""
    if image.ndim == 2:
        image = image[:, :, None]
    elif channel_axis(image.shape) == 0:
        image = image.transpose(1, 2, 0)
    return np.broadcast_to(image, (*image.shape[:2], 3))


ACTION: tuple[Role, ...] = ("action",)
STATE: tuple[Role, ...] = ("state", "proprio")
"""Of a state where the source has no proprio of its own."""


PROPRIO: tuple[Role, ...] = ("proprio",)
EXTRA: tuple[Role, ...] = ("extra",)
ROLES: dict[str, tuple[Role, ...]] = {"reward": ("reward",), "terminated": ("terminated",), "truncated": ("truncated",)}
KEPT: tuple[DType, ...] = ("bool", "uint8", "int32", "int64", "float32", "float64")
"""The first one that has all values of a source's type is kept."""


def describe_columns(
    values: Mapping[str, NDArray[Any]],
    roles: Mapping[str, tuple[Role, ...]],
    where: AnyPath | str,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Column]:
    """Describe columns [frames, …]: actions as float32, states and proprio as float64, columns without a role as they are.

    Args:
        sources: names in the source, as `--drop` takes them, of columns that have another name now.

    Raises:
        UserError: a name, a type or a shape does not fit, with the column.
    """
    try:
        require_names(values)
    except ValueError as error:
        raise UserError(f"{where}: {error}; leave one out with --drop") from error
    described = {}
    for name, array in values.items():
        role, hint = roles.get(name, EXTRA), f"leave it out with --drop {(sources or {}).get(name, name)}"
        dtype = next((known for known in KEPT if np.can_cast(array.dtype, known)), None)
        if array.dtype.kind not in "biuf" or dtype is None or array.dtype == np.uint64:
            raise UserError(f"{where}: {name} has type {array.dtype}, not numbers that can be kept; {hint}")
        if not 0 < math.prod(array.shape[1:]) <= MAX_COLUMN_WIDTH:
            raise UserError(
                f"{where}: {name} has shape {array.shape[1:]}, over {MAX_COLUMN_WIDTH} numbers or none; {hint}"
            )
        if role == ACTION:
            if array.ndim != 2 or array.dtype.kind != "f":
                found = f"{array.dtype} {array.shape[1:]}"
                raise UserError(f"{where}: actions are {found}, not vectors of floats; convert them, or {hint}")
            described[name] = describe_action(array, where)
            continue
        if role[0] in ("terminated", "truncated"):
            if not np.isin(array, (0, 1)).all():
                raise UserError(f"{where}: {name} has other values than 0 and 1; {hint}")
            dtype = "bool"
        if {"state", "proprio"} & {*role}:
            dtype = "float64"
        described[name] = describe(name, array, role, dtype, where)
    return described


def describe(
    name: str, values: NDArray[Any], roles: tuple[Role, ...], dtype: DType, where: AnyPath | str, **more: Any
) -> Column:
    """Describe a column [frames, …] of the source; `more` as of `Column`. Raises UserError if a row has too many numbers."""
    width = math.prod(values.shape[1:])
    if not 0 < width <= MAX_COLUMN_WIDTH:
        raise UserError(f"{where} has {width} numbers in each {name}; use 1 to {MAX_COLUMN_WIDTH}")
    try:
        return Column(roles, dtype, values.shape[1:], **more)
    except ValueError as error:
        raise UserError(f"{where}: {name} does not fit ({error}); convert it, or leave it out") from error


def describe_action(values: NDArray[Any], where: AnyPath | str) -> Column:
    """Describe actions [frames, A] whose bounds the source does not name: [-1, 1] where all are in it, else unknown."""
    width = values.shape[1]
    within = bool(np.nanmax(np.abs(values), initial=0.0) <= 1.0)
    bounds = {"low": (-1.0,) * width, "high": (1.0,) * width} if within else {}
    return describe("action", values, ACTION, "float32", where, **bounds)


def make_steps(episodes: Sequence[tuple[NDArray[Any], NDArray[Any]]], where: AnyPath | str) -> Steps:
    """Make the step table of episodes of actions [T, A] and states [T, S]; raises as `build_steps`."""
    episode, step = number_steps([len(action) for action, _ in episodes], where)
    action, state = (np.concatenate(values) for values in zip(*episodes, strict=True))
    described = {
        "action": describe_action(action, where),
        "state": describe("state", state, STATE, "float64", where),
    }
    return build_steps(episode, step, {"action": action, "state": state}, described, where)


def number_steps(lengths: Sequence[int], where: AnyPath | str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return episode and step of each frame of episodes of these lengths; raises UserError where there is none."""
    if not lengths:
        raise UserError(f"{where} has no episodes")
    episode = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return episode, np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])


def build_steps(
    episode: NDArray[np.int32],
    step: NDArray[np.int32],
    values: Mapping[str, NDArray[Any]],
    described: Mapping[str, Column],
    where: AnyPath | str,
    row: Callable[[int], str] | None = None,
) -> Steps:
    """Make the step table of columns [frames, …], converted to their dtypes; actions are rounded to float32.

    Raises UserError, naming the file (`where`) and the row as `row` calls it, if a number is not finite.
    """
    columns = {}
    for name, column in described.items():
        with np.errstate(over="ignore"):
            columns[name] = kept = np.ascontiguousarray(values[name], column.dtype)
        if len(wrong := np.argwhere(~np.isfinite(kept))):
            at, *number = wrong[0].tolist()
            named = row(at) if row else f"episode {episode[at]}, step {step[at]}"
            raise UserError(
                f"{'_'.join(map(str, (name, *number)))} is {values[name][tuple(wrong[0])]:g}, not a finite number (actions are float32): "
                f"{where}, {named}; correct it, or end the episode before it (only its last row may lack the action)"
            )
    return Steps(episode, step, columns, dict(described))


def is_action_missing(action: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row has no action, bool [rows]: recorders write NaN for the last frame of an episode."""
    return np.asarray(np.isnan(np.asarray(action, np.float64)).all(axis=1))


def note(text: str) -> None:
    """Print, on stderr, what an import leaves out."""
    tqdm.write(f"note: {UserError(text)}", file=sys.stderr)
