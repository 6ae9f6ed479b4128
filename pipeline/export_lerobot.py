"""A frame dataset -> a LeRobot dataset of format v3 (github.com/huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx).

Episodes are written in groups. Each group is a video, a table of its frames, and a table of its episodes, which is written last. The
numbers stay the same to the bit; the video is lossy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.cluster.tasks import run_tasks
from wmcache.common.columns import Column, Columns, of_role
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.video import require_ffmpeg, write_mp4
from wmcache.pipeline.frames import FrameDataset, Frames

CAMERA = "observation.image"
FRAMES_PER_FILE = 10_000
"""A file ends with the episode that has this frame of it."""
FILES_PER_FOLDER = 1000
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
SCALARS = {"reward": "next.reward", "terminated": "next.done", "truncated": "next.truncated"}
DEFAULTS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Features that each LeRobot dataset has."""
Stats = dict[str, NDArray[Any]]


def export_lerobot(dataset: FrameDataset, out: Path) -> int:
    """Write a dataset to a new folder; a repeated call does what is missing. Returns the number of videos.

    Raises:
        UserError: the folder has something else, or is the export of another dataset.
    """
    require_ffmpeg()
    names = feature_names(dataset.card.columns or {})
    _start(out, dataset.card.fingerprint)
    lengths = np.bincount(dataset.steps.episode)
    groups = _groups(lengths)
    pending = [number for number in range(len(groups)) if not _path(out, "meta/episodes", number, "parquet").exists()]

    def write(number: int) -> int:
        return _write_group(dataset, names, groups[number], number, out)

    total = sum(int(lengths[[*groups[number]]].sum()) for number in pending)
    run_tasks(write, pending, total=total, label="export", what="videos")
    _write_stats(out, len(groups))
    _write_tasks(out / "meta" / "tasks.parquet", dataset.card.env)
    write_json(out / "meta" / "info.json", _info(dataset, names))
    return len(groups)


def feature_names(columns: Columns, images: str = CAMERA) -> dict[str, str]:
    """Return LeRobot's name of each column; raises UserError where two have the same, or that of the images or tokens."""
    proprio, actions = of_role(columns, "proprio"), of_role(columns, "action")
    names = {}
    for name, column in columns.items():
        if "action" in column.roles:
            names[name] = "action" if len(actions) == 1 else f"action.{name}"
        elif column.roles[0] in SCALARS:
            names[name] = SCALARS[column.roles[0]]
        elif proprio == [name]:
            names[name] = "observation.state"  # what policies see
        else:
            names[name] = "observation." + ("environment_state" if name == "state" and proprio else name)
    if len({*names.values(), images}) <= len(names):
        raise UserError(f"columns {', '.join(names)} do not have different names in LeRobot; rename one")
    return names


def _start(out: Path, fingerprint: str) -> None:
    """Start or resume an export; the dataset that it was started with is in a file of its own."""
    known = out / "meta" / "wmcache.json"
    if known.exists():
        if read_json(known, "choose another --out").get("fingerprint") != fingerprint:
            raise UserError(f"{out} is the export of another dataset; choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not an export of this dataset; choose another --out")
    else:
        write_json(known, {"fingerprint": fingerprint})


def _groups(lengths: NDArray[np.int64]) -> list[range]:
    """Return the episodes of each file."""
    groups, first, frames = [], 0, 0
    for episode, length in enumerate(lengths.tolist()):
        frames += length
        if frames >= FRAMES_PER_FILE or episode == len(lengths) - 1:
            groups.append(range(first, episode + 1))
            first, frames = episode + 1, 0
    return groups


def _path(out: Path, folder: str, number: int, suffix: str) -> Path:
    chunk, file = divmod(number, FILES_PER_FOLDER)
    return out / folder / f"chunk-{chunk:03d}" / f"file-{file:03d}.{suffix}"


def _write_group(dataset: FrameDataset, names: dict[str, str], episodes: range, number: int, out: Path) -> int:
    """Write the files of a group; return its number of frames."""
    steps, size = dataset.steps, dataset.card.image_size
    first, stop = (int(np.searchsorted(steps.episode, episode)) for episode in (episodes.start, episodes.stop))
    counts = np.zeros((len(episodes), 3, 256), np.int64)
    video = _path(out, f"videos/{CAMERA}", number, "mp4")
    make_folder(video.parent)
    # Key frames are close, because training reads frames at random; one thread, so that the bytes do not depend on the machine.
    parameters = ["-crf", "18", "-g", "2", "-bf", "0", "-threads", "1"]
    settings = {"codec": "libx264", "pixelformat": "yuv444p" if size % 2 else "yuv420p", "macro_block_size": 1}
    frames = _counted(dataset, range(first, stop), episodes.start, counts)
    write_mp4(video, frames, dataset.card.fps, quality=None, output_params=parameters, **settings)
    table = _table(dataset, names, slice(first, stop))
    with atomic_write(_path(out, "data", number, "parquet")) as file:
        pq.write_table(table, file)
    rows = []
    for row, episode in enumerate(episodes):
        start, end = (int(np.searchsorted(steps.episode, at)) for at in (episode, episode + 1))
        known = {"episode_index": episode, "tasks": [dataset.card.env], "length": end - start}
        known |= {"dataset_from_index": start, "dataset_to_index": end}
        times = {"from": (start - first) / dataset.card.fps, "to": (end - first) / dataset.card.fps}
        known |= {f"videos/{CAMERA}/{name}_timestamp": time for name, time in times.items()}
        for place in ("data", f"videos/{CAMERA}", "meta/episodes"):
            known[f"{place}/chunk_index"], known[f"{place}/file_index"] = divmod(number, FILES_PER_FOLDER)
        stats = {CAMERA: image_stats(counts[row], end - start, size)}
        stats |= {feature: _stats(values[start:end]) for feature, values in _features(dataset, names).items()}
        rows.append(known | _flat(stats))
    with atomic_write(_path(out, "meta/episodes", number, "parquet")) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return stop - first


def _counted(dataset: FrameDataset, wanted: range, episode: int, counts: NDArray[np.int64]) -> Iterator[Frames]:
    """Yield frames; count how often each episode from `episode` on has each value in each channel, [episodes, 3, 256]."""
    per_shard = dataset.card.frames_per_shard
    for shard in range(wanted.start // per_shard, -(-wanted.stop // per_shard)):
        inside = range(max(wanted.start, shard * per_shard), min(wanted.stop, (shard + 1) * per_shard))
        images = dataset.read_shard(shard)
        for frame in inside:
            image = images[frame - shard * per_shard]
            for channel in range(3):
                row = counts[dataset.steps.episode[frame] - episode, channel]
                row += np.bincount(image[..., channel].ravel(), minlength=256)
            yield image


def _features(dataset: FrameDataset, names: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Return the values of each feature that is not an image, [frames, …]."""
    steps = dataset.steps
    timestamp = (steps.step / dataset.card.fps).astype(np.float32)
    frame, episode = steps.step.astype(np.int64), steps.episode.astype(np.int64)
    index, task = np.arange(len(steps)), np.zeros(len(steps), np.int64)
    defaults: list[NDArray[Any]] = [timestamp, frame, episode, index, task]
    values = {feature: steps.columns[name] for name, feature in names.items()}
    return values | dict(zip(DEFAULTS, defaults, strict=True))


def _table(dataset: FrameDataset, names: dict[str, str], rows: slice) -> pa.Table:
    """Make the table of frames: a number, a list of fixed length, or lists of lists for each feature."""
    columns = {}
    for feature, whole in _features(dataset, names).items():
        values = whole[rows]
        kind = pa.from_numpy_dtype(values.dtype)
        if values[0].size == 1:
            columns[feature] = pa.array(values.reshape(-1))
        elif values.ndim == 2:
            columns[feature] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        else:
            for _ in values.shape[1:]:
                kind = pa.list_(kind)
            columns[feature] = pa.array(values.tolist(), kind)
    return pa.table(columns)


def _stats(values: NDArray[Any]) -> Stats:
    """Return the statistics of a feature in an episode, [n, …]."""
    numbers = np.asarray(values, np.float64).reshape(len(values), *(values.shape[1:] or (1,)))
    quantiles = np.quantile(numbers, list(QUANTILES.values()), axis=0)
    known = {"min": numbers.min(0), "max": numbers.max(0), "mean": numbers.mean(0), "std": numbers.std(0)}
    return {**known, "count": np.array([len(values)]), **dict(zip(QUANTILES, quantiles, strict=True))}


def image_stats(counts: NDArray[np.int64], frames: int, size: int) -> Stats:
    """Return the statistics of pixels in [0, 1] of each channel, [3, 1, 1], from how often each value occurs, [3, 256]."""
    level, share = np.arange(256) / 255, counts / (frames * size * size)
    below = np.cumsum(counts, 1) / (frames * size * size)
    mean = share @ level
    found = {"min": level[(counts > 0).argmax(1)], "max": level[255 - (counts[:, ::-1] > 0).argmax(1)], "mean": mean}
    found["std"] = np.sqrt((share * (level - mean[:, None]) ** 2).sum(1))
    found |= {name: level[(below >= share).argmax(1)] for name, share in QUANTILES.items()}
    return {**{name: values[:, None, None] for name, values in found.items()}, "count": np.array([frames])}


def _flat(stats: dict[str, Stats]) -> dict[str, Any]:
    return {
        f"stats/{feature}/{name}": value.tolist() for feature, known in stats.items() for name, value in known.items()
    }


def _write_stats(out: Path, files: int) -> None:
    """Join the statistics of episodes as lerobot does: quantiles are means of the episodes', weighted by length."""
    tables = [pq.ParquetFile(_path(out, "meta/episodes", number, "parquet")).read() for number in range(files)]
    rows = pa.concat_tables(tables).to_pylist()
    features = {name.split("/")[1] for name in rows[0] if name.startswith("stats/")}
    joined = {}
    for feature in sorted(features):
        known = {
            name: np.array([row[f"stats/{feature}/{name}"] for row in rows])
            for name in ("count", "min", "max", "mean", "std")
        }
        shape = (-1, *(1,) * (known["mean"].ndim - 1))
        weight = (known["count"] / known["count"].sum()).reshape(shape)
        mean = (weight * known["mean"]).sum(0)
        spread = np.sqrt((weight * (known["std"] ** 2 + (known["mean"] - mean) ** 2)).sum(0))
        stats = {
            "min": known["min"].min(0),
            "max": known["max"].max(0),
            "mean": mean,
            "std": spread,
            "count": known["count"].sum(0),
        }
        for name in QUANTILES:
            stats[name] = (weight * np.array([row[f"stats/{feature}/{name}"] for row in rows])).sum(0)
        joined[feature] = {name: value.tolist() for name, value in stats.items()}
    write_json(out / "meta" / "stats.json", joined)


def _write_tasks(path: Path, task: str) -> None:
    """Write the only task, whose text is the index of a table as pandas writes it."""
    index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {
        "name": "task_index",
        "field_name": "task_index",
        "pandas_type": "int64",
        "numpy_type": "int64",
        "metadata": None,
    }
    about = {"index_columns": ["task"], "column_indexes": [], "columns": [number, index]}
    table = pa.table({"task_index": np.array([0]), "task": [task]})
    with atomic_write(path) as file:
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), file)


def _info(dataset: FrameDataset, names: dict[str, str]) -> dict[str, Any]:
    """Return `info.json`; the features of columns say what they are in wmcache, which an import reads."""
    card, side = dataset.card, dataset.card.image_size
    pixels = "yuv444p" if side % 2 else "yuv420p"
    video = {
        "video.height": side,
        "video.width": side,
        "video.codec": "h264",
        "video.pix_fmt": pixels,
        "video.fps": card.fps,
    }
    video |= {"video.is_depth_map": False, "video.channels": 3, "has_audio": False}
    image = {"dtype": "video", "shape": [side, side, 3], "names": ["height", "width", "channels"], "info": video}
    features = {feature: _feature(name, (card.columns or {})[name]) for name, feature in names.items()}
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in DEFAULTS.items()}
    sizes = {"chunks_size": FILES_PER_FOLDER, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    counts = {"total_episodes": card.episodes, "total_frames": card.frames, "total_tasks": 1}
    template = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    paths = {"data_path": f"data/{template}.parquet", "video_path": f"videos/{{video_key}}/{template}.mp4"}
    about = {"codebase_version": "v3.0", "robot_type": None, "fps": card.fps, "splits": {"train": f"0:{card.episodes}"}}
    return {**about, **counts, **sizes, **paths, "features": {CAMERA: image, **features}}


def _feature(name: str, column: Column) -> dict[str, Any]:
    shape = list(column.shape) if column.width > 1 else [1]
    return {"dtype": column.dtype, "shape": shape, "names": None, "wmcache": {"name": name, "column": asdict(column)}}
