"""A LeRobot dataset of format v3 -> frame dataset (github.com/huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx).

meta/info.json                        features with dtype and shape, fps, counts
meta/episodes/*/*.parquet             lengths; of each camera the video, and where the episode starts in it
data/*/*.parquet                      one row per frame: numbers, and images that are not in a video
videos/CAMERA/chunk-*/file-*.mp4      several episodes, one after another
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.options import Positive, option
from wmcache.common.reading import reading
from wmcache.common.schema import Count, parse
from wmcache.common.video import require_ffmpeg
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import (
    ACTION,
    PROPRIO,
    ROLES,
    STATE,
    ColumnImporter,
    Pixels,
    build_steps,
    describe_columns,
    note,
    number_steps,
)
from wmcache.pipeline.importers.images import has_16_bits, identify
from wmcache.pipeline.importers.videos import VideoReader, frame_times
from wmcache.pipeline.steps import Steps

INDICES = ("episode_index", "frame_index", "index")
NAMES = {"next.reward": "reward", "next.done": "terminated", "next.truncated": "truncated"}
Images = Callable[[int, range], Iterator[Image.Image]]
"""(episode, steps) -> their images."""
OTHERS = "download the whole dataset again"


@dataclass(frozen=True)
class Mark:
    """What wmcache's export adds to a feature, so that an import gives the same column."""

    name: str
    column: Column


@dataclass(frozen=True)
class Feature:
    """A feature in `info.json`."""

    dtype: str
    shape: tuple[Annotated[int, Ge(0)], ...]
    info: dict[str, Any] | None = None
    wmcache: Mark | None = None

    @property
    def is_camera(self) -> bool:
        """Whether it is an image in colour or grey, not a map of depth."""
        depth = (self.info or {}).get("is_depth_map") or (self.info or {}).get("video.is_depth_map")
        return self.dtype in ("image", "video") and not depth


@dataclass(frozen=True)
class Info:
    """The content of `info.json` that is used."""

    codebase_version: str
    fps: Count
    total_episodes: Count
    total_frames: Count
    features: dict[str, Feature]


@IMPORTERS.register("lerobot")
@dataclass(frozen=True, kw_only=True)
class LeRobotImporter(ColumnImporter):
    """Import a LeRobot dataset of format v3.0 in FOLDER."""

    camera: str | None = option(None, "Image to import, as in observation.images.top.  [default: the only one]")
    fps: Positive = option(20, flag="")  # info.json has it

    def open(self) -> Source:
        """See `Importer.open`; actions are rounded to float32."""
        data = _Dataset(Path(self.source), self.camera)
        kept = self.kept(
            (name for name, feature in data.info.features.items() if feature.dtype != "video"), self.source
        )
        steps = data.steps([name for name in kept if data.info.features[name].dtype != "image"])
        images = data.video_images(self.to_image) if data.is_video else data.stored_images()
        first = next(iter(images(0, range(1))))
        size = self.side(*first.size, f"{data.camera} of {self.source}")

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            for step, image in zip(wanted, images(episode, wanted), strict=True):
                yield self.frame(image, size, f"{data.camera} of {self.source}, episode {episode}, step {step},")

        env = f"lerobot {Path(self.source).absolute().name}{self.changes}"
        return Source(self.source, steps, size, read, env, (), "imported from lerobot", data.info.fps)


class _Dataset:
    """An open dataset: its tables in memory, its images on disk."""

    def __init__(self, folder: Path, camera: str | None) -> None:
        self.folder = folder
        self.info = _read_info(folder / "meta" / "info.json")
        self.camera = _choose_camera(self.info.features, camera, folder)
        self.is_video = self.info.features[self.camera].dtype == "video"
        columns = ["episode_index", "length"]
        if self.is_video:
            columns += [f"videos/{self.camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        episodes = _read_tables(_parquet_files(folder / "meta" / "episodes"), columns).sort_by("episode_index")
        self.episodes = {name.rpartition("/")[2]: episodes[name].to_numpy() for name in columns}
        if self.episodes["episode_index"].tolist() != list(range(self.info.total_episodes)):
            raise UserError(f"{folder}/meta/episodes has others than {self.info.total_episodes} episodes; {OTHERS}")
        self.episode, self.step = number_steps(self.episodes["length"].tolist(), folder)
        self.first = np.flatnonzero(self.step == 0)
        self.files = _parquet_files(folder / "data")
        numbers = [feature for feature in (*INDICES[:2], "timestamp") if feature in self.info.features]
        if len(numbers) < 3:
            raise UserError(f"{folder}/meta/info.json lacks episode_index, frame_index or timestamp; {OTHERS}")
        self.rows = _read_tables(self.files, numbers)
        episode, frame = (self.rows[name].to_numpy() for name in numbers[:2])
        self.order = np.lexsort((frame, episode))
        same = len(self.rows) == len(self.episode) == self.info.total_frames
        if not same or (episode[self.order] != self.episode).any() or (frame[self.order] != self.step).any():
            raise UserError(f"{folder}/data has other frames than meta/episodes and meta/info.json describe; {OTHERS}")
        self.timestamp = np.asarray(self.rows["timestamp"].to_numpy(), np.float64)[self.order]

    def steps(self, names: list[str]) -> Steps:
        """Make the step table of these features."""
        features, where = self.info.features, str(self.folder)
        regular = np.allclose(self.timestamp, self.step / self.info.fps, rtol=1e-6, atol=1e-4)
        # They number the frames, as the table of steps does.
        names = [name for name in names if name not in INDICES and not (name == "timestamp" and regular)]
        table = _read_tables(self.files, names)
        values: dict[str, NDArray[Any]] = {}
        marked: dict[str, Column] = {}
        sources: dict[str, str] = {}
        has_both = {"observation.state", "observation.environment_state"} <= {*names}
        for name in names:
            shape, mark = features[name].shape, features[name].wmcache
            array = _numbers(table[name], shape, f"{where}: {name}")[self.order]
            if name == "task_index":
                if not array.any():
                    continue  # one task
                note(f"task_index of {where} is kept; the texts of its tasks, in meta/tasks.parquet, are not")
            plain = mark.name if mark else _column_name(name, has_both=has_both)
            if plain in values:
                raise UserError(f"{where}: {name} gives the column {plain}, as another does; leave one out with --drop")
            if mark:
                if (array.dtype.name, math.prod(shape)) != (mark.column.dtype, mark.column.width):
                    raise UserError(f"{where}: {name} is {array.dtype} {shape}, not as wmcache exported it; {OTHERS}")
                array, marked[plain] = array.reshape(-1, *mark.column.shape), mark.column
            sources[plain] = name
            is_vector = mark or shape != (1,) or plain in ("action", "state", "proprio")
            values[plain] = array if is_vector else array[:, 0]
        roles = {**ROLES, "action": ACTION, "proprio": PROPRIO, "state": STATE[:1] if has_both else STATE}
        others = {name: array for name, array in values.items() if name not in marked}
        described = describe_columns(others, roles, where, sources) | marked
        return build_steps(self.episode, self.step, values, described, where)

    def video_images(self, to_image: Callable[[Pixels, str], Image.Image]) -> Images:
        """Return what reads the images of steps of an episode from the camera's videos."""
        require_ffmpeg()
        videos, known, times_of = VideoReader(), self.episodes, functools.lru_cache(maxsize=2)(frame_times)

        def images(episode: int, wanted: range) -> Iterator[Image.Image]:
            chunk, file = (int(known[name][episode]) for name in ("chunk_index", "file_index"))
            path = self.folder / "videos" / self.camera / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"
            if not path.is_file():
                raise UserError(f"{path} does not exist; {OTHERS}")
            rows = slice(self.first[episode] + wanted.start, self.first[episode] + wanted.stop)
            times = known["from_timestamp"][episode] + self.timestamp[rows]
            for number in _nearest(times_of(path), times, 1 / self.info.fps, path):
                if (pixels := videos.frame(path, int(number))) is None:
                    raise UserError(f"{path} ends before frame {number}; {OTHERS}")
                yield to_image(pixels, f"{path}, frame {number},")

        return images

    def stored_images(self) -> Images:
        """Return what reads the images of steps of an episode from the tables."""
        sizes = [pq.read_metadata(path).num_rows for path in self.files]
        starts = np.cumsum([0, *sizes])

        @functools.lru_cache(maxsize=1)
        def column(file: int) -> pa.ChunkedArray:
            return _read_tables([self.files[file]], [self.camera])[self.camera]

        def images(episode: int, wanted: range) -> Iterator[Image.Image]:
            for row in self.order[self.first[episode] + np.asarray(wanted)]:
                file = int(np.searchsorted(starts, row, side="right")) - 1
                where = f"{self.camera} in {self.files[file]}, row {row - starts[file]} (counted from 0)"
                with reading(self.files[file], f"{where} is no readable image", OTHERS):
                    data = column(file)[int(row - starts[file])].as_py()["bytes"]
                    if data is None:
                        raise UserError(f"{where} is a path, not an image; {OTHERS}")
                    if has_16_bits(image := identify(data, ["PNG", "JPEG"], where), data):
                        raise UserError(f"{where} has 16 bits per channel; save it with 8")
                    yield ImageOps.exif_transpose(image)

        return images


def _read_info(path: Path) -> Info:
    hint = "pass the folder of a LeRobot dataset, with meta, data and videos"
    values = read_json(path, hint)
    if not re.match(r"v3\.", version := str(values.get("codebase_version"))):
        convert = "convert it with: python -m lerobot.scripts.convert_dataset_v21_to_v30"
        raise UserError(f"{path} has format {version[:20]}, not v3; {convert if version == 'v2.1' else hint}")
    return parse(Info, values, path, hint, exact=False)


def _choose_camera(features: dict[str, Feature], camera: str | None, folder: Path) -> str:
    """Return the camera to import: the given one, or the only one."""
    cameras = [name for name, feature in features.items() if feature.is_camera and re.fullmatch(r"[\w.-]+", name)]
    if camera is None and len(cameras) == 1:
        return cameras[0]
    if camera not in cameras:
        wrong = f"{camera} is no camera" if camera else f"{len(cameras)} cameras"
        raise UserError(f"{folder}: {wrong}; pass --camera, one of {', '.join(cameras) or 'none'}")
    if others := [name for name, feature in features.items() if feature.dtype in ("image", "video") and name != camera]:
        note(f"not imported from {folder}: {', '.join(others)}")
    return camera


def _column_name(feature: str, *, has_both: bool) -> str:
    """Return the column of a feature: `observation.state` is `state`, or `proprio` beside the state of the environment."""
    if has_both and feature == "observation.state":
        return "proprio"
    if has_both and feature == "observation.environment_state":
        return "state"
    return NAMES.get(feature) or re.sub(r"\W", "_", feature.removeprefix("observation."))


def _parquet_files(folder: Path) -> list[Path]:
    if not (found := sorted(folder.glob("*/*.parquet"))):
        raise UserError(f"{folder} has no Parquet files; {OTHERS}")
    return found


def _read_tables(paths: list[Path], columns: list[str]) -> pa.Table:
    """Read columns of files, one after another."""
    tables = []
    for path in paths:
        with reading(path, f"{path} cannot be read", OTHERS):
            # A file by itself: pyarrow takes folders called a=b for columns.
            tables.append(pq.ParquetFile(path).read(columns=columns).select(columns))
    with reading(paths[0], f"{paths[0].parents[1]} has files with other columns than {paths[0].name}", OTHERS):
        return pa.concat_tables(tables)


def _numbers(column: pa.ChunkedArray, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """Read a feature, [rows, *shape]; raise UserError where a row has more numbers, fewer, or an empty one."""
    rows, flat = len(column), column.combine_chunks()
    while isinstance(flat, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        flat = flat.flatten()
    simple = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)
    if not simple:
        raise UserError(f"{name} has type {column.type}, not numbers; leave it out with --drop")
    if flat.null_count or len(flat) != rows * math.prod(shape):
        raise UserError(f"{name} has empty or missing numbers, or another shape than {shape}; leave it out with --drop")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(rows, *shape)


def _nearest(known: NDArray[np.float64], times: NDArray[np.float64], step: float, video: Path) -> NDArray[np.int64]:
    """Return which frame of a video is shown at each time; raise UserError where none is within a quarter of a step."""
    if not len(known):
        raise UserError(f"{video} contains no frames; {OTHERS}")
    near = np.searchsorted((known[:-1] + known[1:]) / 2, times)
    if len(wrong := np.flatnonzero(np.abs(known[near] - times) > step / 4)):
        raise UserError(f"{video} has no frame at {times[wrong[0]]:.4f} s, where an episode has one; {OTHERS}")
    return near
