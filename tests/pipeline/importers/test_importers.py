from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import Source, write_dataset
from wmcache.pipeline.importers.conversions import as_columns
from wmcache.pipeline.tars import Frames


def source_of(dataset: FrameDataset, everything: Frames) -> Source:
    def read(episode: int, wanted: range) -> Frames:
        return everything[episode * 60 + wanted.start : episode * 60 + wanted.stop]

    return Source("here", dataset.steps, 32, read, env="somewhere", maze=(), policy="test", fps=7)


def test_shards_are_full_whatever_the_episode_boundaries_are(
    dataset: FrameDataset, everything: Frames, tmp_path: Path
) -> None:
    asked: list[tuple[int, range]] = []
    source = source_of(dataset, everything)

    def read(episode: int, wanted: range) -> Frames:
        asked.append((episode, wanted))
        return np.stack([*source.read(episode, wanted)])

    card = write_dataset(replace(source, read=read), tmp_path / "out", frames_per_shard=100)
    assert [record["frames"] for record in card.shards] == [100, 100, 100, 60]
    assert asked[1:5] == [(0, range(60)), (1, range(40)), (1, range(40, 60)), (2, range(60))]
    again = FrameDataset.open(tmp_path / "out")
    assert again.card == card
    assert (again.card.maze, again.card.fps, again.card.seed) == ([], 7, 0)
    np.testing.assert_array_equal(again.read_frames(range(360)), everything)


def test_other_values_or_steps_out_of_order_are_refused(
    dataset: FrameDataset, everything: Frames, tmp_path: Path
) -> None:
    source = source_of(dataset, everything)
    write_dataset(source, tmp_path / "out", frames_per_shard=100)
    other = replace(source, steps=replace(dataset.steps, action=dataset.steps.action / 2))
    with pytest.raises(UserError, match="--out"):
        write_dataset(other, tmp_path / "out", frames_per_shard=100)
    disordered = replace(source, steps=replace(dataset.steps, step=dataset.steps.step[::-1].copy()))
    with pytest.raises(UserError, match="here"):
        write_dataset(disordered, tmp_path / "new", frames_per_shard=100)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_number_that_float32_cannot_represent_is_named(bad: float) -> None:
    action = np.zeros((3, 2))
    action[2, 1] = bad
    with pytest.raises(UserError, match=r"^action_1 .*: it, row 2;"):
        as_columns(action, np.zeros((3, 4)), "it")
    with pytest.raises(UserError, match=r"it .*0 .*state"):
        as_columns(np.zeros((3, 2)), np.zeros((3, 0)), "it")


def test_an_unknown_format_lists_those_that_exist() -> None:
    result = CliRunner().invoke(main, ["import", "minary"])
    assert result.exit_code == 2
    assert "minari" in result.stderr
