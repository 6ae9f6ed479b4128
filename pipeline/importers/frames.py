"""Images or videos beside a table of actions and states -> frame dataset.

The table, CSV or Parquet, has one row a frame:

    episode, step               whole numbers that count up from 0; the rows may stand in any order
    file                        the frame's image, relative to the folder (png, jpg, webp, bmp); or
    video                       the episode's video (mp4, mkv, webm, avi, mov); frame number `step` of it is meant
    action_0, action_1, ...     numbers; or one column `action` of lists (Parquet)
    state_0, state_1, ...       numbers; or one column `state` of lists

An index column, as pandas writes it, is ignored. The last row of an episode may have no action; then its frame is not imported.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, cause_outside, unreadable
from wmcache.common.video import ffmpeg, require_ffmpeg
from wmcache.pipeline.frames import DatasetCard
from wmcache.pipeline.importers import (
    MOST_PIXELS,
    NO_LEROBOT,
    Shape,
    Source,
    as_columns,
    is_action_missing,
    note,
    refuse_lerobot,
    write_dataset,
)
from wmcache.pipeline.steps import Steps
from wmcache.pipeline.tars import Frames

IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""FFmpeg's names for what these videos are: no playlist that leads elsewhere is opened, whatever its file is called."""
COLUMNS = r"episode|step|file|video|(action|state)(_\d+)?"
PANDAS_INDEX = r"Unnamed: \d+(\.\d+)*|__index_level_\d+__|index|level_\d+"
"""Names that pandas gives to an index without a name."""
PLAIN = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
MOST_BYTES = 4 * MOST_PIXELS


def import_frames(
    folder: Path,
    table: Path,
    out: AnyPath,
    *,
    shape: Shape | None = None,
    fps: int = 20,
    frames_per_shard: int,
) -> DatasetCard:
    """Import images or videos; values keep their type's precision, actions are rounded to float32.

    Args:
        folder: where the images or videos are.
        table: CSV or Parquet; see above.
        out: the dataset's folder.
        shape: how images become square frames of one size; by default they must be that already.
        fps: env steps per second, for videos made from the dataset.
        frames_per_shard: frames in each tar.

    Raises:
        UserError: the table or a frame is not as described above; everything that `write_dataset` raises.
    """
    shape = shape or Shape()
    rows = _read_table(table)
    order, steps, dropped = _steps(rows, table)
    kind = _only_one(rows, table)
    names = rows[kind].to_numpy(zero_copy_only=False)[order]
    paths = _paths(folder, names, VIDEOS if kind == "video" else tuple(IMAGES), table)
    starts = np.flatnonzero(steps.step == 0)
    lengths = np.diff(starts, append=len(steps))
    if kind == "file":
        size = shape.side(*_open(paths[0]).size, paths[0])

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            for path in paths[starts[episode] + wanted.start : starts[episode] + wanted.stop]:
                yield shape.frame(_open(path), size, path)
    else:
        require_ffmpeg()
        for start, length in zip(starts, lengths, strict=True):
            if len(set(names[start : start + length])) > 1:
                raise UserError(
                    f"{table} names several videos for episode {steps.episode[start]}; an episode is one video"
                )
        videos = _Videos()
        if (first := next(videos.frames(paths[0], 0), None)) is None:
            raise UserError(f"{paths[0]} holds no frames")
        size = shape.side(*first.size, paths[0])

        longer: set[Path] = set()

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            path, length = paths[starts[episode]], int(lengths[episode])
            stream = videos.frames(path, wanted.start)
            for step in wanted:
                if (image := next(stream, None)) is None:
                    raise UserError(
                        f"{path} ends after {step} frames, {table} has {length} rows with an action for it; correct either"
                    )
                yield shape.frame(image, size, f"{path}, frame {step},")
            if wanted.stop == length and next(stream, None) is not None:
                if next(stream, None) is not None:
                    raise UserError(
                        f"{path} has more frames than the {length} rows of {table} with an action, and the one after them; "
                        "correct either"
                    )
                if not (dropped[episode] or longer):
                    note(
                        f"{path} has one frame more than {table} has rows for it; the last frame of such a video, "
                        "after which no action was taken, is not imported"
                    )
                    longer.add(path)

    env = f"frames of {folder.absolute().name}{shape}"
    source = Source(folder, steps, size, read, env, (), "imported from frames", fps)
    return write_dataset(source, out, frames_per_shard=frames_per_shard)


def _read_table(path: Path) -> pa.Table:
    refuse_lerobot(path)
    try:
        if path.suffix.lower() == ".parquet":
            rows = pq.read_table(path)
            named = (rows.schema.pandas_metadata or {}).get("index_columns", [])
        elif path.suffix.lower() == ".csv":
            as_text = pyarrow.csv.ConvertOptions(column_types={"file": pa.string(), "video": pa.string()})
            rows, named = pyarrow.csv.read_csv(path, convert_options=as_text), []
        else:
            raise UserError(f"{path} is neither .csv nor .parquet")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:160]})") from error
    if not len(rows):
        raise UserError(f"{path} has no rows")
    if {"episode_index", "frame_index"} <= set(rows.column_names):
        raise UserError(f"{path} is a table of a LeRobot dataset, {NO_LEROBOT}")
    rows = _without_index(rows, path, named)
    names = rows.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has several columns {sorted(twice)[0]!r}")
    if unknown := [name for name in names if not re.fullmatch(COLUMNS, name)]:
        listed = ", ".join(name or f"column {names.index(name) + 1}, which has no name" for name in unknown)
        raise UserError(
            f"{path} has columns that a frame dataset does not keep: {listed}; remove them from a copy of it"
        )
    for name in names:
        if rows[name].null_count and not name.startswith(("action", "state")):
            row = int(pc.index(pc.is_null(rows[name]), True).as_py())
            raise UserError(f"{name} is empty: {path}, {_row(path, row)}; fill it in, or remove the row")
    return rows


def _without_index(rows: pa.Table, path: Path, named: list[Any]) -> pa.Table:
    """The table without columns that are its index: those that pandas calls so, and those that number the rows."""
    ignored, first = [], 0
    for number, name in enumerate(rows.column_names):
        if re.fullmatch(COLUMNS, name):
            continue
        unnamed = not name and number == first
        first += unnamed  # a MultiIndex is several columns
        if unnamed or name in named or re.fullmatch(PANDAS_INDEX, name) or _numbers_rows(rows[number]):
            ignored.append(number)
    if ignored:
        listed = ", ".join(rows.column_names[number] or "without a name" for number in ignored)
        note(f"ignored the index column of {path}: {listed}")
    return rows.select([number for number in range(rows.num_columns) if number not in ignored])


def _numbers_rows(column: pa.ChunkedArray) -> bool:
    """Whether a column is 0, 1, 2, ..."""
    if not pa.types.is_integer(column.type) or column.null_count or len(column) < 2:
        return False
    return bool((column.to_numpy() == np.arange(len(column))).all())


def _row(table: Path, row: int) -> str:
    """A row as its file counts it: the line of a CSV file, header included; the row of a Parquet file, from 0."""
    if table.suffix.lower() != ".csv":
        return f"row {row} (counted from 0)"
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        filled = (reader.line_num for words in reader if words)  # empty lines are no rows
        line = next(itertools.islice(filled, row + 1, None), None)
    return f"row {row}" if line is None else f"line {line}"


def _only_one(rows: pa.Table, table: Path) -> str:
    found = [name for name in ("file", "video") if name in rows.column_names]
    if len(found) != 1:
        raise UserError(f"{table} has {len(found)} of the columns file (images) and video; it needs one of them")
    if not pa.types.is_string(rows[found[0]].type) and not pa.types.is_large_string(rows[found[0]].type):
        raise UserError(f"{table}: the column {found[0]} holds {rows[found[0]].type}, not text")
    return found[0]


def _steps(rows: pa.Table, table: Path) -> tuple[NDArray[np.int64], Steps, NDArray[np.bool_]]:
    """Which rows are frames, in order; their step table; and of which episodes [episodes] the last row, without an action, is not."""
    numbers = {}
    for name in ("episode", "step"):
        if name not in rows.column_names or not pa.types.is_integer(rows[name].type):
            raise UserError(f"{table} has no column {name} of whole numbers")
        numbers[name] = rows[name].to_numpy().astype(np.int64)
    order = np.lexsort((numbers["step"], numbers["episode"]))
    episode, step = numbers["episode"][order], numbers["step"][order]
    new = np.diff(episode, prepend=episode[0]) != 0
    new[0] = True
    should_be = np.where(new, 0, np.roll(step, 1) + 1)
    if len(wrong := np.flatnonzero((step != should_be) | (episode != np.cumsum(new) - 1))):
        row = wrong[0]
        raise UserError(
            f"{table}: episodes and their steps must count up from 0 without gaps; {_row(table, int(order[row]))} is "
            f"episode {episode[row]}, step {step[row]} where episode {np.cumsum(new)[row] - 1}, step {should_be[row]} is due"
        )
    action, state = _matrix(rows, "action", table)[order], _matrix(rows, "state", table)[order]
    last = np.append(new[1:], True)
    missing = last & is_action_missing(action)
    if len(alone := np.flatnonzero(missing & new)):
        raise UserError(
            f"episode {episode[alone[0]]} has one frame and no action: {table}, {_row(table, int(order[alone[0]]))}; "
            "remove it, and number the episodes after it from there"
        )
    if missing.any():
        note(
            f"{missing.sum()} of {last.sum()} episodes of {table} have no action in their last row; "
            "the frame of that row, after which nothing was done, is not imported"
        )
    kept = ~missing
    order = order[kept]
    actions, states = as_columns(action[kept], state[kept], table, lambda frame: _row(table, int(order[frame])))
    return order, Steps(episode[kept].astype(np.int32), step[kept].astype(np.int32), actions, states), missing[last]


def _matrix(rows: pa.Table, name: str, table: Path) -> NDArray[np.float64]:
    """The numbers of `name_0`, `name_1`, ..., or of the lists in `name`, [rows, n]; NaN where there is none."""
    parts = [column for column in rows.column_names if column.startswith(f"{name}_")]
    if name in rows.column_names and not parts:
        lists = rows[name].combine_chunks()
        if not (
            pa.types.is_list(lists.type)
            or pa.types.is_large_list(lists.type)
            or pa.types.is_fixed_size_list(lists.type)
        ):
            raise UserError(f"{table}: the column {name} holds {lists.type}, not lists; call numbers {name}_0, ...")
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        filled = np.flatnonzero(lengths)
        width = int(lengths[filled[0]]) if len(filled) else 0
        if len(wrong := filled[lengths[filled] != width]):
            raise UserError(
                f"the list in {name} has {lengths[wrong[0]]} numbers, the first one has {width}: "
                f"{table}, {_row(table, int(wrong[0]))}; make them equally long"
            )
        matrix = np.full((len(rows), width), np.nan)
        matrix[filled] = _numbers(lists.flatten(), name, table).reshape(-1, width)
        return matrix
    expected = [f"{name}_{number}" for number in range(len(parts))]
    if name in rows.column_names or set(parts) != set(expected) or not parts:
        raise UserError(
            f"{table} needs either a column {name} of lists or {name}_0, {name}_1, ... without gaps; "
            f"it has {', '.join(column for column in rows.column_names if column.startswith(name)) or 'neither'}"
        )
    return np.stack([_numbers(rows[column].combine_chunks(), name, table) for column in expected], 1)


def _numbers(values: pa.Array, name: str, table: Path) -> NDArray[np.float64]:
    """Numbers of a column, NaN where there is none."""
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise UserError(f"{table}: {name} holds {values.type}, not numbers")
    return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _paths(folder: Path, names: NDArray[Any], suffixes: tuple[str, ...], table: Path) -> list[Path]:
    """The files of the table, every one looked at: inside the folder, of a known kind, and there."""
    known: dict[str, Path] = {}
    try:
        inside = folder.resolve(strict=True)
        for name in names:
            if name in known:
                continue
            path = folder / name
            if Path(name).is_absolute() or not path.resolve().is_relative_to(inside):
                raise UserError(f"{table} names {name[:200]!r}, which lies outside {folder}; give paths relative to it")
            if path.suffix.lower() not in suffixes:
                raise UserError(f"{table} names {name[:200]!r}; known are {', '.join(suffixes)}")
            if not path.is_file():
                raise UserError(f"{path} of {table} does not exist")
            known[name] = path
    except (OSError, ValueError) as error:
        raise UserError(f"{table} names files of {folder} that cannot be opened ({error})") from error
    return [known[name] for name in names]


def _open(path: Path) -> Image.Image:
    """An image file as RGB, turned as its camera was held; decoded only after its size and kind are known.

    Raises:
        UserError: it is no image of the kinds above, is transparent, animated or too large, or has more than 8 bits.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than any image of {MOST_PIXELS} pixels")
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data), formats=[IMAGES[path.suffix.lower()]])
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} has {image.width} x {image.height} pixels, too many for a frame")
        if image.mode not in PLAIN or (image.format == "PNG" and data[24] > 8):
            raise UserError(f"{path} is {image.mode} of more than 8 bits or of other colours; save it as 8-bit RGB")
        # An MPO file of a phone or a 3D camera is a JPEG with further views behind it; Pillow opens the first one.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UserError(f"{path} holds several images; a frame is one")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "RGB" and "transparency" not in upright.info:
            return upright
        coloured = upright.convert("RGBA")
        if coloured.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{path} is transparent; save it as RGB")
        return coloured.convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} is no readable image ({' '.join(str(error).split())[:160]})") from error


class _Videos:
    """The video that is being read: reading on costs a frame, going back starts it again."""

    def __init__(self) -> None:
        self._path, self._next = Path(), 0
        self._stream: Iterator[Image.Image] = iter(())

    def frames(self, path: Path, start: int) -> Iterator[Image.Image]:
        """The video's frames, from number `start` on."""
        if path != self._path or start < self._next:
            self._path, self._next, self._stream = path, 0, _decode(path)
        for image in self._stream:
            self._next += 1
            if self._next > start:
                yield image


def _decode(path: Path) -> Iterator[Image.Image]:
    """All frames of a video as they are stored, none left out or repeated for the sake of its frame rate.

    Raises:
        UserError: FFmpeg reports any error.
    """
    words = [
        *(ffmpeg(), "-v", "error", "-xerror", "-nostdin"),
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-max_pixels", str(MOST_PIXELS)),
        *("-i", f"file:{path.absolute()}", "-map", "0:v:0"),
        # Frames by their number, far apart: their own times may fall together when they are rounded, and then one is lost.
        *("-vf", "setpts=1000*N/TB", "-fps_mode", "passthrough"),
        # The same bytes on every processor.
        *("-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact", "-pix_fmt", "rgb24"),
        *("-c:v", "ppm", "-f", "image2pipe", "-"),
    ]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        try:
            while process.stdout.readline():  # P6
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()  # 255
                pixels = process.stdout.read(width * height * 3)
                if len(pixels) < width * height * 3:
                    break
                yield Image.frombytes("RGB", (width, height), pixels)
            process.wait()
        finally:
            process.kill()
        log.seek(0)
        if process.returncode or log.read(1):
            log.seek(0)
            reason = " ".join(log.read(2000).decode(errors="replace").split())
            raise UserError(f"{path} is no readable video ({reason[-200:]})")
