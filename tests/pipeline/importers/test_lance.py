"""Lance tables of stable-worldmodel, written by Lance's own library in the layout of `World.collect`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.importers import IMPORTERS, write_dataset

LENGTHS = [5, 9, 6]
ROWS = [length + 1 for length in LENGTHS]
ENDS = np.cumsum(ROWS) - 1
Columns = dict[str, pa.Array]


def import_table(path: Path, out: Path, **options: Any) -> FrameDataset:
    importer: Any = IMPORTERS.get("swm")
    write_dataset(importer(str(path), **options).open(), out, frames_per_shard=8)
    return FrameDataset.open(out)


def jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=95)
    return file.getvalue()


def vectors(values: np.ndarray) -> pa.Array:
    rows = np.float32(values).reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


@pytest.fixture
def action() -> np.ndarray:
    action = np.random.default_rng(0).uniform(-1, 1, (sum(ROWS), 2)).astype(np.float32)
    action[ENDS] = np.nan
    return action


@pytest.fixture
def columns(action: np.ndarray, everything: Frames) -> Columns:
    """What `World.collect` writes: a row for each observation, scalars as vectors of one number."""
    ended = np.isin(np.arange(sum(ROWS)), ENDS)
    index = [
        np.concatenate([np.full(rows, number) for number, rows in enumerate(ROWS)]),
        np.concatenate([*map(np.arange, ROWS)]),
    ]
    return {
        **{name: pa.array(values, pa.int32()) for name, values in zip(("episode_idx", "step_idx"), index, strict=True)},
        "pixels": pa.array([jpeg(frame) for frame in everything[: sum(ROWS)]], pa.binary()),
        "action": vectors(action),
        "state": vectors(np.arange(4 * sum(ROWS)).reshape(-1, 4) / 8),
        "reward": vectors(np.arange(sum(ROWS))),
        "terminated": vectors(ended),
    }


def write(columns: Columns, path: Path, rows: list[int] | None = None) -> Path:
    table = pa.table(columns)
    lance.write_dataset(
        table if rows is None else table.take(pa.array(rows, pa.int64())),
        str(path),
        mode="overwrite",
        max_rows_per_file=7,
    )
    return path


def test_a_table_is_imported(columns: Columns, action: np.ndarray, tmp_path: Path) -> None:
    found = import_table(write(columns, tmp_path / "pusht.lance"), tmp_path / "out")
    kept = np.setdiff1d(np.arange(sum(ROWS)), ENDS)
    files = [columns["pixels"][row].as_py() for row in kept]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    np.testing.assert_array_equal(found.read_frames(range(20)), expected)
    np.testing.assert_array_equal(found.steps.action, action[kept])
    np.testing.assert_array_equal(found.steps.columns["state"], kept[:, None] / 2 + np.arange(4) / 8)
    # They are in the row of the observation that the action led to.
    np.testing.assert_array_equal(found.steps.columns["reward"], kept + 1)
    np.testing.assert_array_equal(np.flatnonzero(found.steps.columns["terminated"]), np.cumsum(LENGTHS) - 1)
    assert found.card.columns["terminated"] == Column(("terminated",), "bool", ())
    assert found.card.columns["state"].roles == ("state", "proprio")
    assert np.bincount(found.steps.episode).tolist() == LENGTHS
    assert found.card.env == "swm pusht"
    # Episodes may have any numbers, and a column that cannot be kept is left out.
    numbers = pa.array(-columns["episode_idx"].to_numpy() - 1)
    changed = write(columns | {"episode_idx": numbers, "names": pa.array(["a"] * sum(ROWS))}, tmp_path / "again.lance")
    other = import_table(changed, tmp_path / "again", drop="names")
    np.testing.assert_array_equal(other.read_frames(range(20)), expected)
    np.testing.assert_array_equal(other.steps.episode, found.steps.episode)


def test_tables_that_do_not_fit_are_refused(columns: Columns, everything: Frames, tmp_path: Path) -> None:
    def refused(match: str, changes: dict[str, Any], rows: list[int] | None = None, **options: Any) -> None:
        changed = {name: values for name, values in (columns | changes).items() if values is not None}
        path = write(changed, tmp_path / "wrong.lance", rows)
        with pytest.raises(UserError, match=match) as refusal:
            import_table(path, tmp_path / "out", **options)
        assert str(path) in str(refusal.value)

    write(columns, tmp_path / "tables" / "one.lance")
    with pytest.raises(UserError, match=r"one\.lance"):
        import_table(tmp_path / "tables", tmp_path / "out")
    every = list(range(sum(ROWS)))
    refused("row 1 is episode 0, step 2", {}, [0, 2, 1, *every[3:]])
    refused("one after another", {}, [*every[:3], *every[6:], *every[3:6]])
    refused("step_idx", {"step_idx": None})
    refused("episode_idx is one float64", {"episode_idx": pa.array(np.zeros(sum(ROWS)))})
    refused("step_idx.*without a value", {"step_idx": pa.array([None] * sum(ROWS), pa.int32())})
    refused("no rows", {}, [])
    refused("no image", {"pixels": None}, image_key="action")
    for values in (["a"], [{"part": 1}], [[1.0, 2.0]], [b"no image"]):
        refused("names has type object.*--drop names", {"names": pa.array(values * sum(ROWS))})
    refused("state.*--drop state", {"state": pa.array([None] * sum(ROWS), pa.list_(pa.float32(), 4))})
    images = columns["pixels"].to_pylist()
    refused("row 9 ", {"pixels": pa.array([*images[:9], b"no image", *images[10:]], pa.binary())})
    refused(
        "row 9 .*16 x 16", {"pixels": pa.array([*images[:9], jpeg(everything[0][:16, :16]), *images[10:]], pa.binary())}
    )
    refused(
        "row 9 .*cannot be decoded", {"pixels": pa.array([*images[:9], images[9][:500], *images[10:]], pa.binary())}
    )


def test_the_command_imports_and_names_what_is_missing(
    columns: Columns, tmp_path: Path, run_import: Callable[..., Any], run_import_without: Callable[..., str]
) -> None:
    path = write(columns, tmp_path / "pusht.lance")
    result = run_import("swm", path, "--out", tmp_path / "out", "--image-size", 16)
    assert "3 episodes, 20 frames" in result.stdout
    for file in (path / "data").iterdir():
        file.write_bytes(b"")
    assert str(path) in run_import("swm", path, "--out", tmp_path / "damaged").stderr
    assert "nowhere.lance" in run_import("swm", tmp_path / "nowhere.lance", "--out", tmp_path / "no").stderr
    assert "pip install 'wmcache[lance]'" in run_import_without("lance", "swm", path, "--out", "nowhere")
