"""Planning episodes: an honest judge, a planner that is told nothing, and encoders and stores that must match."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from wmcache.cache import StoreWriter, TokenStore, UserError
from wmcache.envs import Maze, PointMazeVectorEnv
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.planner import evaluate as evaluate_module
from wmcache.planner.evaluate import (
    Episodes,
    PlanOptions,
    Setting,
    env_steps,
    evaluate,
    judge,
    live_drift,
    run_episodes,
    sample_episode,
)

NEAR, FAR = 0.2, 5.0


def make_episodes(*distances: list[float], chunk: int = 5) -> Episodes:
    """Episodes whose ball lies, after each env step, at these distances from the goal; it flies on while it is there."""
    distance = np.array(distances)
    goal = np.tile([1.0, 2.0, -3.0, 3.0], (len(distance), 1))
    states = np.zeros((*distance.shape, 4))
    states[..., :2] = goal[:, None, :2]
    states[..., 1] += distance
    return Episodes(goal + 1, goal, states, chunk, encoder_frames=0, replans=0, seconds=0.0)


def arriving(*near: int, budget: int = 12) -> list[float]:
    """Near after these env steps, far after all others."""
    return [NEAR if step + 1 in near else FAR for step in range(budget)]


def count_successes(successes: int, episodes: int) -> Episodes:
    return make_episodes(*([NEAR] * 5 if i < successes else [FAR] * 5 for i in range(episodes)))


class TestJudge:
    def test_only_the_end_of_a_chunk_counts(self) -> None:
        episodes = make_episodes(arriving(3, 4, 6, 9, 11), arriving(5), arriving(10), arriving(12))
        assert env_steps(episodes, 0.5).tolist() == [12, 5, 10, 12]
        verdict = judge(episodes, 0.5)
        assert (verdict["successes"], verdict["success_rate"]) == (3, 0.75)

    def test_the_first_arrival_counts(self) -> None:
        assert env_steps(make_episodes(arriving(5, 10, 12)), 0.5).tolist() == [5]

    def test_an_episode_that_never_arrives_counts_with_its_whole_budget(self) -> None:
        verdict = judge(make_episodes(arriving(5), arriving(), arriving(10)), 0.5)
        assert verdict["mean_env_steps"] == (5 + 12 + 10) / 3

    def test_who_was_there_and_left_has_not_held(self) -> None:
        assert judge(make_episodes(arriving(5), arriving(5, 12), arriving(12), arriving()), 0.5)["held"] == 2

    def test_on_the_threshold_is_not_within_it(self) -> None:
        assert judge(make_episodes([0.5] * 5), 0.5)["successes"] == 0

    @pytest.mark.parametrize(
        ("successes", "count", "low", "high"),
        [(0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (5, 10, 0.2366, 0.7634), (49, 50, 0.8950, 0.9965)],
    )
    def test_the_interval_is_wilsons(self, successes: int, count: int, low: float, high: float) -> None:
        # Values of Wilson (1927) as tables and R's prop.test(correct = FALSE) have them.
        assert judge(count_successes(successes, count), 0.5)["ci95"] == pytest.approx([low, high], abs=6e-5)

    def test_a_wider_threshold_is_never_harder(self) -> None:
        rng = np.random.default_rng(0)
        episodes = make_episodes(*rng.uniform(0, 1.5, (40, 30)).tolist())
        thresholds = [0.1, 0.25, 0.5, 1.0]
        verdicts = [judge(episodes, threshold) for threshold in thresholds]
        successes = [verdict["successes"] for verdict in verdicts]
        assert successes == sorted(successes)
        assert len(set(successes)) > 2
        for narrow, wide in pairwise(thresholds):
            assert (env_steps(episodes, wide) <= env_steps(episodes, narrow)).all()


class CountingEncoder:
    """The real encoder, and how many frames it was given."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.frames = encoder, 0

    def __call__(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        self.frames += len(frames)
        return self.encoder(frames)


@pytest.fixture
def counted(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> CountingEncoder:
    counting = CountingEncoder(setting.encoder)
    monkeypatch.setattr(setting, "encoder", counting)
    return counting


@pytest.mark.parametrize("search", [{}, {"samples": 20}, {"iterations": 4}, {"horizon": 3}, {"batch": 2}])
def test_a_frame_is_encoded_once_a_goal_and_once_a_replan(
    setting: Setting, tiny_plan: PlanOptions, counted: CountingEncoder, tmp_path: Path, search: dict[str, int]
) -> None:
    episodes, results = evaluate(setting, replace(tiny_plan, **search), tmp_path)
    # 12 env steps in chunks of 5.
    assert results["replans"] == 3 * 3
    assert results["encoder_frames"] == results["episodes"] + results["replans"] == counted.frames
    assert episodes.states.shape == (3, 12, 4)
    assert np.isfinite(episodes.states).all()


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in ("seconds_per_replan", "options")}


def test_the_same_seed_gives_the_same_episodes(setting: Setting, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    first = evaluate(setting, tiny_plan, tmp_path / "a")
    again = evaluate(setting, tiny_plan, tmp_path / "b")
    np.testing.assert_array_equal(first[0].states, again[0].states)
    assert without_times(first[1]) == without_times(again[1])


def test_an_episode_does_not_depend_on_the_batch_or_on_the_first_number(
    setting: Setting, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    together, _ = evaluate(setting, tiny_plan, tmp_path / "a")
    alone, _ = evaluate(setting, replace(tiny_plan, batch=1), tmp_path / "b")
    np.testing.assert_allclose(alone.states, together.states, atol=1e-3)
    later, _ = evaluate(setting, replace(tiny_plan, seed=1, episodes=2), tmp_path / "c")
    np.testing.assert_array_equal(later.goal, together.goal[1:])
    np.testing.assert_allclose(later.states, together.states[1:], atol=1e-3)


class StoppedBar(tqdm):
    def update(self, n: float | None = 1) -> bool | None:
        if self.n >= 2:
            raise KeyboardInterrupt
        return super().update(n)


def test_a_stopped_evaluation_goes_on_with_the_episodes_that_are_missing(
    setting: Setting, tiny_plan: PlanOptions, counted: CountingEncoder, tmp_path: Path
) -> None:
    options = replace(tiny_plan, batch=1, budget=10)
    straight = evaluate(setting, options, tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        # Every episode takes two replans, so this is within the second one.
        patch.setattr(evaluate_module, "tqdm", StoppedBar)
        with pytest.raises(KeyboardInterrupt):
            evaluate(setting, options, tmp_path / "stopped")
    counted.frames = 0
    stopped = evaluate(setting, options, tmp_path / "stopped")
    assert counted.frames == 2 * (1 + 2)
    np.testing.assert_array_equal(stopped[0].states, straight[0].states)
    assert without_times(stopped[1]) == without_times(straight[1])


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    setting: Setting, tiny_plan: PlanOptions, counted: CountingEncoder, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        evaluate(setting, tiny_plan, tmp_path / "file" / "plan")
    assert counted.frames == 0


class LyingEnv(PointMazeVectorEnv):
    """Whatever it tells about states, distances and success is wrong; what the camera and the proprioception see is true."""

    received: list[NDArray[np.floating]]

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        self.received.append(actions.copy())
        return super().advance(actions) + 100.0

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        return {"state": info["state"] + 100.0, "goal": info["goal"] - 7.0, "distance": 0.0, "success": True}


class TruthfulEnv(PointMazeVectorEnv):
    received: list[NDArray[np.floating]]

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        self.received.append(actions.copy())
        return super().advance(actions)


def test_the_planner_is_never_told_a_state_or_a_success(
    setting: Setting, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []
    for env in (TruthfulEnv, LyingEnv):
        env.received = []
        monkeypatch.setattr(evaluate_module, "PointMazeVectorEnv", env)
        run_episodes(setting, tiny_plan, range(3))
        received.append(np.concatenate(env.received, axis=1))
    assert received[0].shape == (3, 12, 2)
    assert received[0].any()
    np.testing.assert_array_equal(received[0], received[1])


def test_episodes_are_a_function_of_their_number() -> None:
    maze = Maze.load("UMaze")
    pairs = [sample_episode(maze, number) for number in range(20)]
    for number, (start, goal) in enumerate(pairs):
        np.testing.assert_array_equal(sample_episode(maze, number), (start, goal))
        assert maze.is_clear(np.stack([start[:2], goal[:2]])).all()
    assert len(np.unique(np.concatenate(pairs), axis=0)) == 40


@pytest.fixture(scope="module")
def other_weights(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoders") / "other.safetensors"
    save_file({name: value + 0.3 * torch.randn_like(value) for name, value in load_file(tcn_weights).items()}, path)
    return path


def test_live_encoding_reproduces_the_store(store: TokenStore, encoder: Encoder) -> None:
    drift = live_drift(store, encoder)
    assert 0.999 < drift["cosine"] <= 1 + 1e-6
    assert 0 <= drift["relative_error"] < 0.05


def test_an_encoder_with_other_weights_is_noticed_by_what_it_computes(store: TokenStore, other_weights: Path) -> None:
    other = encoders.create("tcn", weights=other_weights, device="cpu")
    with pytest.raises(UserError, match=r"smallest cosine [-\d.]+, allowed 0\.999"):
        live_drift(store, other)


def test_a_store_with_other_tokens_is_noticed_by_what_it_holds(
    store: TokenStore, store_path: Path, encoder: Encoder, tmp_path: Path
) -> None:
    copy = copytree(store_path, tmp_path / "store.zarr")
    tokens = store.gather(np.arange(64))
    # The right tokens at the wrong frames, as after a shift of the step table.
    StoreWriter.resume(copy, store.identity).write_shard(0, np.roll(tokens, 20, axis=0))
    with pytest.raises(UserError, match="encoding cached frames live"):
        live_drift(TokenStore.open(copy), encoder)


def test_other_weights_are_refused_by_name(run_path: Path, tiny_plan: PlanOptions, other_weights: Path) -> None:
    with pytest.raises(UserError, match=r"weights_sha256.*pass the right --weights"):
        Setting(run_path, tiny_plan, weights=other_weights)


def test_weights_and_store_may_have_moved(
    run_path: Path, store_path: Path, tcn_weights: Path, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    weights = tmp_path / "moved.safetensors"
    weights.write_bytes(tcn_weights.read_bytes())
    cache = copytree(store_path, tmp_path / "moved.zarr")
    setting = Setting(run_path, tiny_plan, weights=weights, cache=cache)
    assert setting.store.path == cache
    assert setting.drift["cosine"] > 0.999


def rewritten(run: Path, to: Path, **changed: Any) -> Path:
    copy = copytree(run, to, symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changed))
    return copy


def test_a_store_that_is_gone_is_named(run_path: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    run = rewritten(run_path, tmp_path / "run", cache=str(tmp_path / "gone.zarr"))
    with pytest.raises(UserError, match=r"gone\.zarr does not exist"):
        Setting(run, tiny_plan)


def test_the_store_of_another_run_is_refused_by_name(
    run_path: Path, store: TokenStore, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    columns = {"action": store.action, "state": store.state, "episode": store.episode, "step": store.step}
    identity = replace(store.identity, dataset_fingerprint="another")
    writer = StoreWriter.create(tmp_path / "other.zarr", store.card, identity, columns)
    for shard in range(store.card.num_shards):
        writer.write_shard(shard, store.gather(np.array(store.card.shard_frames(shard))))
    writer.finish()
    with pytest.raises(UserError, match=r"dataset_fingerprint.*pass the right --cache"):
        Setting(run_path, tiny_plan, cache=writer.path)


@pytest.mark.parametrize("file", ["config.json", "identity.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["none", "cut", "other"])
def test_a_folder_that_is_no_run_is_refused(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, file: str, content: str | None
) -> None:
    run = copytree(run_path, tmp_path / "run", symlinks=True)
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        Setting(run, tiny_plan)


def bad_options() -> Iterator[tuple[str, Any]]:
    for name, value in asdict(PlanOptions()).items():
        if isinstance(value, int | float) and name not in ("seed",):
            yield name, 0
            yield name, -1
    yield "sigma", float("nan")
    yield "threshold", float("nan")
    yield "elites", 1
    yield "elites", 65
    yield "execute", 6
    yield "objective", "first"
    yield "device", "abacus"
    yield "dtype", "float8"


@pytest.mark.parametrize(("name", "value"), list(bad_options()))
def test_options_that_make_no_sense_are_refused_by_name(run_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name) as refusal:
        Setting(run_path, replace(PlanOptions(device="cpu"), **{name: value}))
    assert "\n" not in str(refusal.value)
