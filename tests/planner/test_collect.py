"""Datasets that a trained model plays: the same bytes however they are made, starts of the dataset's seed, goals by time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.envs import open_environment
from wmcache.pipeline.frames import DatasetCard, FrameDataset
from wmcache.planner import collect as collecting
from wmcache.planner.collect import collect
from wmcache.planner.options import PlanOptions

from ..conftest import contents

ENV = "wmcache/PointMaze-UMaze-v0"
SIZES: dict[str, Any] = {"episodes": 5, "length": 23, "image_size": 32, "frames_per_shard": 40, "seed": 7}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "EPISODES_AT_ONCE", 2)


@pytest.fixture(scope="session")
def quick(tiny_plan: PlanOptions) -> PlanOptions:
    """Plans with a new goal every 10 env steps."""
    return replace(tiny_plan, goal_steps=10)


@pytest.fixture(scope="session")
def frames(run_path: Path, quick: PlanOptions, tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    """What the run collects; read only."""
    path = tmp_path_factory.mktemp("collected") / "frames"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "EPISODES_AT_ONCE", 2)
        collect_again(run_path, quick, path)
    return FrameDataset.open(path)


def collect_again(run: Path, plan: PlanOptions, out: Path, **other: Any) -> DatasetCard:
    return collect(out=out, plan=plan, **{"env": ENV, "policy": str(run), **SIZES, **other})


def test_a_run_acts_from_the_starts_of_the_seed_and_every_column_is_recorded(
    frames: FrameDataset, run_path: Path
) -> None:
    env = open_environment(ENV, 1, 32)
    for episode in range(5):
        rows = range(23 * episode, 23 * (episode + 1))
        start = env.sample_task(np.random.default_rng((7, episode)), goal=False)
        seen = env.reset([start])
        moved = env.step(frames.steps.action[rows.start : rows.stop - 1][None])
        recorded = frames.steps.columns["state"][rows.start : rows.stop]
        np.testing.assert_array_equal(recorded, np.concatenate([seen.columns["state"], moved["state"][0]]))
        np.testing.assert_array_equal(frames.read_frames(rows), env.render(recorded))
        assert np.abs(frames.steps.action[rows.start : rows.stop]).max() <= 1
        assert len(np.unique(frames.steps.action[rows.start : rows.stop], axis=0)) > 20
    assert str(run_path) not in frames.card.policy


def test_batches_of_a_plan_and_workers_change_no_byte(
    frames: FrameDataset, run_path: Path, quick: PlanOptions, tmp_path: Path
) -> None:
    for batch, cluster in ((1, "local:1"), (50, "local:1")):
        path = tmp_path / f"{batch}" / "frames"
        collect_again(run_path, replace(quick, batch=batch), path, cluster=cluster)
        assert contents(path) == contents(frames.path)
