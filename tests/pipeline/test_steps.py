"""Frame datasets with named columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import DatasetCard, FrameDataset, FrameDatasetWriter, write_shard
from wmcache.pipeline.steps import Steps, read_steps

LENGTHS = (3, 1, 4)
FRAMES = sum(LENGTHS)
DESCRIBED = {
    "velocity": Column(("proprio",), "float32", (2,)),
    "steer": Column(("action",), "float32", (3,), (-2.0,) * 3, (2.0,) * 3),
    "grid": Column(("state",), "int32", (2, 2)),
    "reward": Column(("reward",), "float64"),
    "terminated": Column(("terminated",), "bool"),
    "lives": Column(("extra",), "uint8"),
    "touched": Column(("extra",), "bool", (2,)),
}


def make_steps(described: dict[str, Column] = DESCRIBED) -> Steps:
    rng = np.random.default_rng(0)
    columns = {
        name: rng.integers(0, 2, (FRAMES, *column.shape)).astype(column.dtype) for name, column in described.items()
    }
    episode = np.repeat(np.arange(3, dtype=np.int32), LENGTHS)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
    return Steps(episode, step, columns, described)


def write_frames(path: Path, steps: Steps) -> DatasetCard:
    card = DatasetCard(path.name, "made-up", [], 8, "random", 0, 3, FRAMES, FRAMES, 10)
    writer = FrameDatasetWriter(path, card, steps)
    image = np.zeros((8, 8, 3), np.uint8)
    for shard in writer.pending():
        write_shard(path, shard, [(steps.key(frame), image) for frame in range(FRAMES)])
    return writer.finish()


def test_named_columns_of_any_type_and_shape_are_read_as_they_were_written(tmp_path: Path) -> None:
    steps, path = make_steps(), tmp_path / "made-up"
    card = write_frames(path, steps)
    found = FrameDataset.open(path)
    assert found.card == card
    assert found.card.columns == found.steps.described == DESCRIBED
    for name, values in steps.columns.items():
        np.testing.assert_array_equal(found.steps.columns[name], values)
        assert found.steps.columns[name].dtype == values.dtype
    np.testing.assert_array_equal(found.steps.action, steps.columns["steer"])
    np.testing.assert_array_equal(found.steps.proprio, steps.columns["velocity"])
    np.testing.assert_array_equal(found.steps.state, steps.columns["grid"].reshape(FRAMES, 4))
    assert read_steps(path, FRAMES, DESCRIBED).sha256() == steps.sha256()


def test_another_role_name_or_value_is_another_dataset() -> None:
    steps = make_steps()
    columns = {**steps.columns, "lives": steps.columns["lives"] + np.uint8(1)}
    renamed = {name.replace("lives", "deaths"): column for name, column in DESCRIBED.items()}
    others = [
        Steps(steps.episode, steps.step, columns, DESCRIBED),
        make_steps({**DESCRIBED, "lives": Column(("state",), "uint8")}),
        make_steps(renamed),
    ]
    assert len({it.sha256() for it in (steps, *others)}) == 4


@pytest.mark.parametrize("roles", [("action",), ("action", "extra")])
def test_a_dataset_needs_no_more_than_an_action(tmp_path: Path, roles: tuple[Any, ...]) -> None:
    write_frames(tmp_path / "made-up", make_steps({"steer": Column(roles, "float32")}))
    found = FrameDataset.open(tmp_path / "made-up").steps
    assert (found.action.shape, found.proprio, found.state) == ((FRAMES, 1), None, None)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "none": lambda columns: columns.clear(),
    "no action": lambda columns: columns.pop("steer"),
    "one more": lambda columns: columns.update(more=columns["lives"]),
    "a path": lambda columns: columns.update({"../lives": columns.pop("lives")}),
    "another role": lambda columns: columns["lives"].update(roles=["state"]),
    "an unknown role": lambda columns: columns["lives"].update(roles=["soul"]),
    "another shape": lambda columns: columns["steer"].update(shape=[4], low=None, high=None),
    "a huge shape": lambda columns: columns["steer"].update(shape=[60000, 60000], low=None, high=None),
    "another dtype": lambda columns: columns["lives"].update(dtype="object"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_description_is_refused(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "made-up"
    write_frames(path, make_steps())
    card = json.loads((path / "dataset.json").read_bytes())
    EDITS[edit](card["columns"])
    (path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=str(path)):
        FrameDataset.open(path)


def test_a_dataset_is_not_continued_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "made-up"
    write_frames(path, make_steps())
    with pytest.raises(UserError, match="columns"):
        write_frames(path, make_steps({**DESCRIBED, "lives": Column(("state",), "uint8")}))
