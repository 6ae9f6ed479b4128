"""Tables beside images or videos: order, index columns, lists, and actions that may be missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter

from .conftest import LENGTHS, ROWS, Given


def test_other_values_or_steps_out_of_order_are_refused(given: Given, tmp_path: Path) -> None:
    given.import_to(tmp_path / "out")
    source = FramesImporter(str(given.folder), actions=str(given.table())).open()
    disordered = replace(source, steps=replace(source.steps, step=source.steps.step[::-1].copy()))
    with pytest.raises(UserError, match=str(given.folder)):
        write_dataset(disordered, tmp_path / "new", frames_per_shard=8)
    assert not (tmp_path / "new").exists()
    given.rows[3]["action_1"] += 1
    with pytest.raises(UserError, match="--out"):
        given.import_to(tmp_path / "out")


def test_uneven_lists_are_refused(given: Given, tmp_path: Path) -> None:
    for i, row in enumerate(given.rows):
        row["action"] = [row.pop(f"action_{j}") for j in range(3)][: 3 - (i == 9)]
    with pytest.raises(UserError, match=r"action .*steps\.parquet, row 9 "):
        given.import_to(tmp_path / "out", "parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("name", "factor"), [("", 2), ("Unnamed: 0", 1), ("__index_level_0__", 3), ("index", 0), ("number", 1)]
)
def test_an_index_column_is_ignored_and_named(
    given: Given, tmp_path: Path, kind: str, name: str, factor: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = given.import_to(tmp_path / "plain")
    given.rows = [{name: factor * number, **row} for number, row in enumerate(given.rows)]
    capsys.readouterr()
    assert given.import_to(tmp_path / "out", kind).card.fingerprint == plain.card.fingerprint
    assert f": {name or 'without a name'}\n" in capsys.readouterr().err


def test_an_index_in_pandas_metadata_is_ignored_unless_it_is_a_known_column(given: Given, tmp_path: Path) -> None:
    plain = given.import_to(tmp_path / "plain")
    given.rows = [{"stamp": number / 7, **row} for number, row in enumerate(given.rows)]
    table = pq.read_table(given.table("parquet"))
    index = ["stamp", "episode", "step", {"kind": "range", "start": 0, "stop": ROWS, "step": 1}]
    table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": index})})
    pq.write_table(table, tmp_path / "noted.parquet")
    found = given.import_table(tmp_path / "noted.parquet", tmp_path / "out")
    assert found.card.fingerprint == plain.card.fingerprint
    assert given.import_to(tmp_path / "other", "parquet").card.columns["stamp"].roles == ("extra",)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rewards_ends_and_other_numbers_are_kept(given: Given, tmp_path: Path, kind: str) -> None:
    ends = [number in (4, 13, 19) for number in range(ROWS)]
    for number, row in enumerate(given.rows):
        row |= {"reward": number / 7, "terminated": ends[number], "truncated": int(ends[number]), "lives": number % 3}
        row |= {"proprio_0": number / 3} | ({"joints": [number / 2, 1.5]} if kind == "parquet" else {})
    missing_last(given, None if kind == "parquet" else "", (1,))  # a frame that is not imported needs no reward
    given.rows[13]["reward"] = None if kind == "parquet" else ""
    kept = np.delete(np.arange(ROWS), 13)
    found = given.import_to(tmp_path / "out", kind).steps
    expected = {"reward": ("reward",), "terminated": ("terminated",), "truncated": ("truncated",), "lives": ("extra",)}
    expected |= {"action": ("action",), "state": ("state",), "proprio": ("proprio",)}
    expected |= {"joints": ("extra",)} if kind == "parquet" else {}
    assert {name: column.roles for name, column in found.described.items()} == expected
    np.testing.assert_array_equal(found.columns["reward"], kept / 7)
    np.testing.assert_array_equal(found.columns["terminated"], np.array(ends)[kept])
    assert found.columns["terminated"].dtype == found.columns["truncated"].dtype == bool
    np.testing.assert_array_equal(found.columns["lives"], kept % 3)
    np.testing.assert_array_equal(found.proprio, np.float32(kept / 3)[:, None])
    if kind == "parquet":
        np.testing.assert_array_equal(found.columns["joints"], np.column_stack([kept / 2, np.full(19, 1.5)]))


def test_an_action_alone_is_enough_and_its_bounds_are_unknown_beyond_1(given: Given, tmp_path: Path) -> None:
    for row in given.rows:
        del row["state_0"], row["state_1"]
    found = given.import_to(tmp_path / "out")
    assert found.card.columns == {"action": Column(("action",), "float32", (3,))}
    for row in given.rows:
        row["action_0"] = row["action_1"] = row["action_2"] = 0.5
    column = given.import_to(tmp_path / "within").card.columns["action"]
    assert (column.low, column.high) == ((-1.0,) * 3, (1.0,) * 3)


def missing_last(given: Given, value: Any, episodes: tuple[int, ...] = (0, 1, 2)) -> None:
    for episode in episodes:
        row = sum(LENGTHS[: episode + 1]) - 1
        for name in ("action_0", "action_1", "action_2"):
            given.rows[row][name] = value


@pytest.mark.parametrize("written", ["empty", "NaN", "Parquet null", "Parquet NaN", "null list", "empty list", "list"])
def test_the_last_action_of_an_episode_may_be_missing(
    given: Given, tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [row for row in range(ROWS) if row not in (4, 19)]
    missing_last(given, {"empty": "", "NaN": "NaN", "Parquet null": None}.get(written, float("nan")), (0, 2))
    if "list" in written:
        for row in given.rows:
            row["action"] = [row.pop(f"action_{i}") for i in range(3)]
        for row in (4, 19):
            given.rows[row]["action"] = {"null list": None, "empty list": []}.get(written, [None, float("nan"), None])
    given.rows[4]["file"] = "gone.png"  # not needed either
    found = given.import_to(tmp_path / "out", "csv" if written in ("empty", "NaN") else "parquet")
    assert "2 of 3 episodes" in capsys.readouterr().err
    np.testing.assert_array_equal(found.read_frames(range(18)), given.frames[kept])
    np.testing.assert_array_equal(found.steps.action, given.action[kept])
    np.testing.assert_array_equal(found.steps.state, given.state[kept])


@pytest.mark.parametrize("longer", ["table", "video"])
def test_a_video_may_have_a_last_frame_without_an_action(
    given: Given, tmp_path: Path, longer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [row for row in range(ROWS) if row not in (4, 13, 19)]
    given.as_videos()
    missing_last(given, "")
    if longer == "video":
        given.rows = [given.rows[row] for row in kept]
    found = given.import_to(tmp_path / "out")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    np.testing.assert_array_equal(found.read_frames(range(17)), given.frames[kept])
    np.testing.assert_array_equal(found.steps.action, given.action[kept])


@pytest.mark.parametrize(("kind", "row"), [("csv", "line 13;"), ("parquet", r"row 7 \(counted from 0\);")])
@pytest.mark.parametrize("columns", ["all", "one of the last row", "a state of the last row"])
def test_a_number_missing_elsewhere_is_named_as_the_file_counts_it(
    given: Given, tmp_path: Path, kind: str, row: str, columns: str
) -> None:
    # The rows are in another order than the frames; empty lines and a line break inside a cell shift the lines of CSV.
    given.rows = [*given.rows[14:], *given.rows[:14]]
    step, names = {"all": (1, ("action_0", "action_1", "action_2")), "one of the last row": (4, ("action_1",))}.get(
        columns, (4, ("state_0",))
    )
    given.rows[6 + step], given.rows[7] = given.rows[7], given.rows[6 + step]
    for name in names:
        given.rows[7][name] = None if kind == "parquet" else ""
    table = given.table(kind)
    if kind == "csv":
        lines = table.read_text().splitlines(keepends=True)
        table.write_text(
            "".join([*lines[:3], "\n\n", *lines[3:5], "\n", lines[5].replace("run 2", '"run\n2"'), *lines[6:]])
        )
    with pytest.raises(UserError, match=rf"^{names[0]} .*steps\.{kind}, {row}"):
        given.import_table(table, tmp_path / "out")
