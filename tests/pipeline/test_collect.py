"""Frame datasets: collected, and read back. Damaged and hostile ones are tested in tests/faults."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from wmcache.common.errors import UserError
from wmcache.envs import PointMazeEnv
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import DatasetCard, FrameDataset
from wmcache.pipeline.play import Player

from ..conftest import contents

ENV = "wmcache/PointMaze-UMaze-v0"


def collect_again(path: Path, **other: Any) -> DatasetCard:
    """Collect with the settings of the shared dataset, and some others."""
    settings = {"env": ENV, "episodes": 6, "length": 60, "image_size": 32, "frames_per_shard": 64}
    return collect(out=path, **{**settings, **other})


def test_processes_size_of_shards_and_number_of_episodes_change_no_frame(
    dataset_path: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    path = tmp_path / dataset_path.name
    collect_again(path, cluster="local:2")
    assert contents(path) == contents(dataset_path)
    collect_again(tmp_path / "other", episodes=5, frames_per_shard=100)
    other = FrameDataset.open(tmp_path / "other")
    assert len(other.card.shards) == 3
    np.testing.assert_array_equal(other.steps.action, dataset.steps.action[:300])
    np.testing.assert_array_equal(other.read_frames(range(300)), dataset.read_frames(range(300)))


def test_a_collection_that_is_killed_while_it_plays_keeps_what_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = tmp_path / "killed" / "frames", {"env": ENV, "episodes": 40, "length": 10, "image_size": 16}
    program = (
        f"from wmcache.pipeline import collect, play; from pathlib import Path; play.SAVE_EVERY = 0; {settings = }; "
    )
    program += f"collect.collect(out=Path({str(path)!r}), **settings)"
    process = subprocess.Popen([sys.executable, "-P", "-c", program], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(path.glob(".played-*[0-9].tmp"))) < 3 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = {int(file.stem.rpartition("-")[2]) for file in path.glob(".played-*[0-9].tmp")}
    assert kept
    play, played = Player.play, set()

    def play_and_note(player: Player, episodes: Sequence[int]) -> Any:
        played.update(episodes)
        return play(player, episodes)

    with monkeypatch.context() as patch:
        patch.setattr(Player, "play", play_and_note)
        for _ in range(2):
            collect(out=path, **settings)
    assert played == set(range(40)) - kept
    collect(out=tmp_path / "frames", **settings)
    assert contents(path) == contents(tmp_path / "frames")


def test_a_collection_that_died_before_its_last_change_ends(copied: Path, dataset_path: Path) -> None:
    card = json.loads((copied / "dataset.json").read_bytes())
    unfinished = card | {"shards": [], "steps_sha256": "", "fingerprint": ""}
    (copied / "unfinished.json").write_text(json.dumps(unfinished))
    collect_again(copied)
    assert contents(copied) == contents(dataset_path)


def test_a_name_that_a_dataset_cannot_have_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name"):
        collect_again(tmp_path / ("n" * 201), episodes=1)
    assert not list(tmp_path.iterdir())


def test_episodes_and_seeds_differ(dataset: FrameDataset, tmp_path: Path) -> None:
    collect_again(tmp_path / "other", episodes=1, seed=1)
    episodes = [
        dataset.steps.action[:60],
        dataset.steps.action[60:120],
        FrameDataset.open(tmp_path / "other").steps.action,
    ]
    assert len({episode.tobytes() for episode in episodes}) == 3


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


def test_a_lost_tar_is_drawn_again_and_a_damaged_one_named(copied: Path, dataset_path: Path) -> None:
    tar = copied / "frames-000002.tar"
    tar.unlink()
    kept = {tar: tar.stat().st_mtime_ns for tar in copied.glob("*.tar")}
    collect_again(copied)
    assert {tar: tar.stat().st_mtime_ns for tar in kept} == kept
    assert contents(dataset_path).items() <= contents(copied).items()
    tar.write_bytes(tar.read_bytes()[::-1])
    with pytest.raises(UserError, match=str(tar)):
        collect_again(copied)


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
    copied: Path, finished: bool, setting: str, value: Any, field: str
) -> None:
    if not finished:
        card = json.loads((copied / "dataset.json").read_bytes()) | {
            "shards": [],
            "steps_sha256": "",
            "fingerprint": "",
        }
        (copied / "dataset.json").rename(copied / "unfinished.json").write_text(json.dumps(card))
    before = contents(copied)
    with pytest.raises(UserError, match=f" {field} "):
        collect_again(copied, **{setting: value})
    assert contents(copied) == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
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


def test_frames_are_read_in_any_order(dataset: FrameDataset) -> None:
    everything = np.concatenate([dataset.read_shard(shard) for shard in range(len(dataset.card.shards))])
    wanted = [359, 0, 64, 63, 0]
    np.testing.assert_array_equal(dataset.read_frames(wanted), everything[wanted])
    assert everything.shape == (360, 32, 32, 3)
    assert [record["frames"] for record in dataset.card.shards] == [64] * 5 + [40]


# webdataset leaves open tars to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(dataset_path: Path, dataset: FrameDataset) -> None:
    tars = [str(tar) for tar in sorted(dataset_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    keys = [f"{episode:06d}-{step:05d}" for episode in range(6) for step in range(60)]
    assert [sample["__key__"] for sample in samples] == keys
    np.testing.assert_array_equal([sample["png"] for sample in samples], dataset.read_frames(range(360)))


def test_pyarrow_reads_the_steps(dataset_path: Path, dataset: FrameDataset) -> None:
    table = pq.read_table(dataset_path / "steps.parquet")
    assert table.schema.names == ["episode", "step", "action", "state"]
    assert table["episode"].to_pylist() == np.repeat(np.arange(6), 60).tolist()
    assert table["step"].to_pylist() == [*range(60)] * 6
    np.testing.assert_array_equal(table["action"].to_pylist(), dataset.steps.action)
    np.testing.assert_array_equal(table["state"].to_pylist(), dataset.steps.state)
