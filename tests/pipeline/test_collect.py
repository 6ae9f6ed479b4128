from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import MazeError, PointMazeEnv
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import DatasetCard, FrameDataset

ENV = "wmcache/PointMaze-UMaze-v0"
Snapshot = Callable[[Path], dict[str, bytes]]


def collect_again(path: Path, **other: Any) -> DatasetCard:
    """Collect with the settings of the shared dataset, and some others."""
    settings = {"env": ENV, "episodes": 6, "length": 60, "image_size": 32, "frames_per_shard": 64}
    return collect(out=path, **{**settings, **other})


def unfinish(path: Path, lost: list[int]) -> None:
    """Leave what a killed process leaves: some tars, a torn temporary file, and no dataset.json."""
    card = json.loads((path / "dataset.json").read_bytes()) | {"shards": [], "steps_sha256": "", "fingerprint": ""}
    (path / "unfinished.json").write_text(json.dumps(card))
    (path / "dataset.json").unlink()
    for shard in lost:
        (path / f"frames-{shard:06d}.tar").unlink()
    (path / f".frames-{lost[0]:06d}.tar.99999.tmp").write_bytes(b"half a tar")


def test_the_number_of_processes_changes_no_byte(dataset_path: Path, tmp_path: Path, all_bytes: Snapshot) -> None:
    path = tmp_path / dataset_path.name
    collect_again(path, cluster="local:2")
    assert all_bytes(path) == all_bytes(dataset_path)


def test_the_size_of_shards_changes_no_frame(dataset: FrameDataset, tmp_path: Path) -> None:
    collect_again(tmp_path / "other", frames_per_shard=100)
    other = FrameDataset.open(tmp_path / "other")
    assert other.card.num_shards == 4
    assert other.steps.sha256() == dataset.steps.sha256()
    np.testing.assert_array_equal(other.read_frames(range(360)), dataset.read_frames(range(360)))


def test_an_episode_depends_only_on_seed_and_number(dataset: FrameDataset, tmp_path: Path) -> None:
    collect_again(tmp_path / "fewer", episodes=2)
    fewer = FrameDataset.open(tmp_path / "fewer")
    np.testing.assert_array_equal(fewer.read_frames(range(120)), dataset.read_frames(range(120)))
    collect_again(tmp_path / "other", episodes=2, seed=1)
    assert FrameDataset.open(tmp_path / "other").steps.sha256() != fewer.steps.sha256()
    assert (dataset.steps.action[:60] != dataset.steps.action[60:120]).any()


def test_the_frames_are_those_of_a_live_episode(dataset: FrameDataset) -> None:
    env = PointMazeEnv("UMaze", image_size=32)
    for episode in (0, 5):
        rows = range(episode * 60, episode * 60 + 20)
        frames = dataset.read_frames(rows)
        observation, _ = env.reset(options={"state": dataset.steps.state[rows[0]]})
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(observation["image"], frames[i])
            np.testing.assert_array_equal(observation["proprio"], dataset.steps.state[row].astype(np.float32))
            observation, *_ = env.step(dataset.steps.action[row])
    env.close()


@pytest.mark.parametrize("lost", [[1, 5], [0, 1, 2, 3, 4, 5]])
def test_a_killed_collection_resumes_and_a_lost_tar_is_drawn_again(
    copied: Path, dataset_path: Path, all_bytes: Snapshot, lost: list[int]
) -> None:
    unfinish(copied, lost)
    if len(lost) == 6:
        (copied / "steps.parquet").unlink()
    with pytest.raises(UserError, match=str(copied)):
        FrameDataset.open(copied)
    kept = {tar: tar.stat().st_mtime_ns for tar in copied.glob("*.tar")}
    collect_again(copied)
    assert {tar: tar.stat().st_mtime_ns for tar in kept} == kept
    whole = all_bytes(dataset_path)
    assert whole.items() <= all_bytes(copied).items()
    assert not (copied / "unfinished.json").exists()
    (copied / "frames-000002.tar").unlink()
    collect_again(copied)
    assert whole.items() <= all_bytes(copied).items()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("env", "Medium", "env"),
        ("seed", 1, "seed"),
        ("policy", "held", "policy"),
        ("image_size", 40, "image_size"),
        ("episodes", 5, "episodes"),
        ("length", 50, "frames"),
        ("frames_per_shard", 32, "frames_per_shard"),
    ],
)
def test_other_settings_are_refused_naming_the_field(
    copied: Path, all_bytes: Snapshot, finished: bool, setting: str, value: Any, field: str
) -> None:
    if not finished:
        unfinish(copied, lost=[3])
    before = all_bytes(copied)
    with pytest.raises(UserError, match=f" {field} "):
        collect_again(copied, **{setting: value})
    assert all_bytes(copied) == before


def test_a_finished_dataset_is_left_alone_also_with_a_damaged_tar(copied: Path) -> None:
    def times() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in copied.iterdir()}

    before = times()
    card = collect_again(copied, cluster="local:2")
    assert card == FrameDataset.open(copied).card
    assert times() == before
    tar = copied / "frames-000001.tar"
    tar.write_bytes(tar.read_bytes()[::-1])
    with pytest.raises(UserError, match=str(tar)):
        collect_again(copied)
    assert times()["dataset.json"] == before["dataset.json"]


def test_a_folder_that_is_used_again_gets_new_frames(tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("again", 1), ("fresh", 1)):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        collect(ENV, tmp_path / name, episodes=1, length=5, seed=seed, image_size=32, frames_per_shard=5)
    frames = [FrameDataset.open(tmp_path / name).read_shard(0) for name in ("again", "fresh")]
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("policy", "expert", UserError, "'expert'.* held, random"),
        ("env", "Labyrinth", MazeError, "Labyrinth"),
        ("episodes", 10**12, UserError, "new"),
    ],
)
def test_impossible_settings_and_a_folder_of_other_files_are_refused_before_anything_is_written(
    tmp_path: Path, setting: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        collect_again(tmp_path / "new", **{setting: value})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        collect_again(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_users_maze_is_collected_and_remembered_in_any_folder(tmp_path: Path) -> None:
    layout, out = tmp_path / "corridor.txt", tmp_path / "données, été 1"
    layout.write_text("####\n#OO#\n####\n")
    card = collect(str(layout), out, episodes=2, length=5, policy="held", image_size=32, frames_per_shard=4)
    layout.unlink()
    again = FrameDataset.open(out)
    assert again.card == card
    assert again.card.maze == ["####", "#OO#", "####"]
    assert (again.steps.state[:, 0] < 1.3).all()
    assert again.read_frames(range(10)).any()
