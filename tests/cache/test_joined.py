"""Several stores that are read as one: frames, splits, statistics, training and its resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from wmcache.cache import TokenStore
from wmcache.cache.joined import open_stores
from wmcache.common.errors import UserError
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_episodes
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

MODEL = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
TINY: dict[str, Any] = {"batch": 8, "log_every": 1, "validate_every": 4, "checkpoint_every": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def second(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of other episodes, with the same encoder."""
    folder = tmp_path_factory.mktemp("second")
    collect("UMaze", folder / "round-1", episodes=4, length=50, image_size=32, frames_per_shard=48, seed=7)
    extract(FrameDataset.open(folder / "round-1"), encoder, folder / "round-1.zarr")
    return folder / "round-1.zarr"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_frames_are_those_of_the_stores_one_after_another(
    store_path: Path, second: Path, dataset: FrameDataset, encoder: Encoder, tmp_path: Path, dtype: str
) -> None:
    paths = [store_path, second]
    if dtype == "int8":
        paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
        for path, frames in zip(paths, (dataset, FrameDataset.open(second.with_suffix(""))), strict=True):
            extract(frames, encoder, path, dtype=dtype)
    parts = [TokenStore.open(path) for path in paths]
    joined = open_stores(paths)
    assert (len(joined), joined.episodes) == (360 + 200, 10)
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, len(joined), 100)
    every = np.concatenate([part.gather(np.arange(len(part))) for part in parts])
    np.testing.assert_array_equal(joined.gather(wanted), every[wanted])
    np.testing.assert_array_equal(joined.load(quiet=True), np.concatenate([part.load(quiet=True) for part in parts]))
    np.testing.assert_array_equal(joined.gather(wanted), every[wanted])
    for name in ("action", "state", "proprio", "step"):
        np.testing.assert_array_equal(getattr(joined, name), np.concatenate([getattr(part, name) for part in parts]))
    np.testing.assert_array_equal(joined.episode[[0, 359, 360, 559]], [0, 5, 6, 9])
    flat = every.astype(np.float64).reshape(-1, every.shape[-1])
    np.testing.assert_allclose(joined.mean, flat.mean(0), atol=1e-3)
    np.testing.assert_allclose(joined.std, flat.std(0), rtol=1e-2)


def test_no_episode_changes_its_split_when_a_store_is_added(store_path: Path, second: Path) -> None:
    alone, joined = TokenStore.open(store_path), open_stores([store_path, second])
    for split in ("train", "val"):
        np.testing.assert_array_equal(joined.split(split)[: len(alone.split(split))], alone.split(split))
        windows = joined.windows(split=split)
        assert set(joined.episode[windows.starts]) <= set(joined.split(split))
        # No window has frames of two stores.
        np.testing.assert_array_equal(joined.episode[windows.starts], joined.episode[windows.starts + 19])


def test_stores_that_do_not_belong_together_are_refused(
    store_path: Path, second: Path, dataset: FrameDataset, tcn_weights: Path, tmp_path: Path
) -> None:
    from wmcache.pipeline import encoders

    with pytest.raises(UserError, match=store_path.name):
        open_stores([store_path, second, store_path])
    other = encoders.create("pixels", device="cpu")
    extract(dataset, other, tmp_path / "pixels.zarr")
    with pytest.raises(UserError, match=r"pixels\.zarr .*encoder"):
        open_stores([second, tmp_path / "pixels.zarr"])


def test_a_run_trains_on_several_stores_resumes_with_more_and_plans(
    store_path: Path, second: Path, tmp_path: Path
) -> None:
    def options(steps: int) -> TrainOptions:
        return TrainOptions(steps=steps, model_options=MODEL, **TINY)

    def losses(run: Path) -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    whole, cut, grown = (tmp_path / name for name in ("whole", "cut", "grown"))
    train(store_path, whole, options(8), more=[second])
    train(store_path, cut, options(4), more=[second])
    train(store_path, cut, options(8), more=[second], resume=True)
    assert len(losses(whole)) == len(losses(cut)) == 8
    assert losses(cut)[:3] == losses(whole)[:3]
    train(store_path, grown, options(4))
    with pytest.raises(UserError, match=str(grown)):
        train(store_path, grown, options(8), more=[second])
    train(store_path, grown, options(8), more=[second], resume=True)
    with pytest.raises(UserError, match="dataset_fingerprint"):
        train(store_path, grown, options(12), resume=True)
    plan = PlanOptions(
        episodes=2, budget=10, horizon=2, search={"samples": 6, "elites": 2, "iterations": 1}, device="cpu"
    )
    context = EvalContext(grown, plan)
    episodes = run_episodes(context, plan, range(2))
    assert episodes.states.shape == (2, 10, 4)
    # Stores that have moved are named in their order, and the workers of a cluster open them by themselves.
    moved = [copytree(path, tmp_path / f"moved-{path.name}") for path in (store_path, second)]
    found, _ = evaluate(EvalContext(grown, plan, cache=moved), replace(plan, batch=1), tmp_path / "again", "local:2")
    np.testing.assert_array_equal(found.states, episodes.states)
    for wrong in (moved[:1], moved[::-1]):
        with pytest.raises(UserError, match="--cache"):
            EvalContext(grown, plan, cache=wrong)
