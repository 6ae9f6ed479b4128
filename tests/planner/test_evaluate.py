"""Evaluations: frames are encoded once, policies receive no state and no success, and stopped evaluations resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from wmcache.envs import PointMazeVectorEnv
from wmcache.pipeline.encoders import Encoder
from wmcache.planner import evaluate as evaluate_module
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_episodes
from wmcache.planner.mpc import Mpc
from wmcache.planner.options import PlanOptions

QUICK: dict[str, dict[str, Any]] = {
    **{name: {"samples": 8, "elites": 3, "iterations": 2} for name in ("cem", "icem", "mppi")},
    "gd": {"steps": 2, "optimiser": "adam"},
}


class RecordingEncoder:
    """The real encoder, which records the frames of each call and stops at one of them."""

    def __init__(self, encoder: Encoder, stop_at: int | None = None) -> None:
        self.encoder, self.lag, self.stop_at = encoder, encoder.lag, stop_at
        self.calls: list[NDArray[np.uint8]] = []

    def __call__(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        self.calls.append(frames.copy())
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return self.encoder(frames if frames.ndim == 4 else frames[:, 1])

    @property
    def frames(self) -> int:
        return sum(map(len, self.calls))


def load(run: Path, options: PlanOptions) -> tuple[EvalContext, RecordingEncoder]:
    context: Any = EvalContext(run, options)
    context.encoder = RecordingEncoder(context.encoder)
    return context, context.encoder


@pytest.mark.parametrize(
    "changed",
    [{"horizon": 3}, {"batch": 2, "context": 3}, {"solver": "gd", "search": QUICK["gd"]}, {"distance": "graph"}],
    ids=str,
)
def test_a_frame_is_encoded_once_per_goal_and_per_replan(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = replace(tiny_plan, **changed)
    context, recorded = load(run_path, options)
    episodes, results = evaluate(context, options, tmp_path)
    # 12 env steps in chunks of 5.
    assert results["replans"] == 3 * 3
    # Its goal and a frame more are encoded to count the operations of a decision.
    assert results["encoder_frames"] == results["episodes"] + results["replans"] == recorded.frames - 2
    assert results["operations_per_decision"] > 0
    assert episodes.states.shape == (3, 12, 4)
    assert np.isfinite(episodes.states).all()


class TestObservedFrames:
    """A chunk of several model steps has frames in its middle; a plan from several frames needs the last of them."""

    @pytest.mark.parametrize(
        ("execute", "observed", "budget", "seen_after"),
        [
            (1, 3, 20, [5, 10, 15]),
            (2, 1, 20, [10]),
            (3, 2, 45, [10, 15, 25, 30]),
            # The budget ends within a chunk, and within a model step.
            (2, 2, 27, [5, 10, 15, 20]),
            (3, 2, 7, []),
        ],
    )
    def test_only_frames_that_a_plan_starts_from_are_encoded(
        self, run_path: Path, tiny_plan: PlanOptions, execute: int, observed: int, budget: int, seen_after: list[int]
    ) -> None:
        few = replace(tiny_plan, episodes=2, horizon=3, context=3)
        options = replace(few, execute=execute, observed=observed, budget=budget)
        context, recorded = load(run_path, options)
        episodes = run_episodes(context, options, range(2))
        assert episodes.states.shape == (2, budget, 4)
        assert episodes.replans == 2 * -(-budget // (5 * execute))
        assert episodes.encoder_frames == recorded.frames == 2 * (2 + len(seen_after))
        # The goal, the start, and what the camera sees after these env steps.
        env = PointMazeVectorEnv(2, context.maze, context.image_size)
        states = [episodes.goal, episodes.start, *(episodes.states[:, step - 1] for step in seen_after)]
        for state, frames in zip(states, recorded.calls, strict=True):
            np.testing.assert_array_equal(frames, env.reset(options={"state": state})[0]["image"])
        env.close()

    @pytest.mark.parametrize("lag", [1, 5])
    def test_an_encoder_of_pairs_receives_the_frame_before(
        self, run_path: Path, tiny_plan: PlanOptions, lag: int
    ) -> None:
        options = replace(tiny_plan, episodes=2, horizon=2, execute=2, context=2, observed=2, budget=23)
        context, recorded = load(run_path, options)
        recorded.lag = lag
        episodes = run_episodes(context, options, range(2))
        assert episodes.states.shape == (2, 23, 4)
        env = PointMazeVectorEnv(2, context.maze, context.image_size)

        def seen(after: int) -> NDArray[np.uint8]:
            state = episodes.states[:, after - 1] if after else episodes.start
            return env.reset(options={"state": state})[0]["image"]

        assert [frames.ndim for frames in recorded.calls[:2]] == [4, 4]  # goal and start have no frame before
        for after, frames in zip([5, 10, 15, 20], recorded.calls[2:], strict=True):
            np.testing.assert_array_equal(frames, np.stack([seen(after - lag), seen(after)], 1))
        env.close()

    @pytest.mark.parametrize(("execute", "frames", "actions"), [(1, [1, 2, 3, 3], [0, 1, 2, 2]), (2, [1, 3], [0, 2])])
    def test_a_plan_receives_the_actions_between_its_frames(
        self, run_path: Path, tiny_plan: PlanOptions, execute: int, frames: list[int], actions: list[int]
    ) -> None:
        options = replace(tiny_plan, episodes=2, horizon=2, execute=execute, context=3, observed=3, budget=20)
        plan, seen, plans = Mpc.plan, [], []

        def watched(mpc: Mpc, belief: Any, previous: Any, generators: Any) -> Any:
            seen.append(tuple(belief[name].clone() for name in ("tokens", "proprio", "actions")))
            plans.append(plan(mpc, belief, previous, generators))
            return plans[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mpc, "plan", watched)
            episodes = run_episodes(EvalContext(run_path, options), options, range(2))
        assert [tokens.shape[1] for tokens, _, _ in seen] == frames
        assert [past.shape[1] for _, _, past in seen] == actions
        executed = torch.cat([found[:, :execute] for found in plans], 1)
        states = np.concatenate([episodes.start[:, None], episodes.states], 1)[:, ::5].astype(np.float32)
        for number, (_, proprio, past) in enumerate(seen):
            now = number * execute
            first = now + 1 - proprio.shape[1]
            np.testing.assert_allclose(proprio.numpy(), states[:, first : now + 1], atol=1e-6)
            assert torch.equal(past, executed[:, first:now])


class OtherProprio(PointMazeVectorEnv):
    """Adds a value to the proprio that it reports."""

    added = 0.0

    def observe(self) -> Any:
        seen = super().observe()
        return {"image": seen["image"], "proprio": seen["proprio"] + np.float32(self.added)}


def test_a_model_without_proprio_plans_from_pixels_alone(
    blind_run_path: Path, run_path: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tiny_plan, budget=20)
    for run, added, same in ((blind_run_path, np.nan, True), (run_path, 1.0, False)):
        context = EvalContext(run, replace(options, proprio="none" if same else "auto"))
        assert (context.context_frames, context.observed) == ((3, 3) if same else (1, 1))  # one frame has no velocity
        with monkeypatch.context() as patch:
            straight = run_episodes(context, options, range(3))
            assert np.ptp(straight.states[..., :2], axis=1).any()
            patch.setattr(OtherProprio, "added", added)
            patch.setattr(evaluate_module, "PointMazeVectorEnv", OtherProprio)
            assert np.array_equal(run_episodes(context, options, range(3)).states, straight.states) == same


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in ("seconds_per_replan", "options")}


def test_an_episode_depends_on_its_number_alone(context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    together, results = evaluate(context, tiny_plan, tmp_path / "a")
    again, same = evaluate(context, tiny_plan, tmp_path / "b")
    np.testing.assert_array_equal(again.states, together.states)
    assert without_times(same) == without_times(results)
    alone, _ = evaluate(context, replace(tiny_plan, batch=1), tmp_path / "c")
    np.testing.assert_allclose(alone.states, together.states, atol=1e-3)
    later, _ = evaluate(context, replace(tiny_plan, seed=1, episodes=2), tmp_path / "d")
    np.testing.assert_array_equal(later.goal, together.goal[1:])
    np.testing.assert_allclose(later.states, together.states[1:], atol=1e-3)


def test_a_stopped_evaluation_resumes_with_the_missing_episodes(
    context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tiny_plan, batch=1, budget=10)
    straight = evaluate(context, options, tmp_path / "straight")
    # An episode encodes its goal, its start and one frame more, so this is within the second one.
    stopping, recorded = RecordingEncoder(context.encoder, stop_at=5), RecordingEncoder(context.encoder)
    monkeypatch.setattr(context, "encoder", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(context, options, tmp_path / "stopped")
    monkeypatch.setattr(context, "encoder", recorded)
    resumed = evaluate(context, options, tmp_path / "stopped")
    assert recorded.frames == 2 * 3 + 2
    np.testing.assert_array_equal(resumed[0].states, straight[0].states)
    assert without_times(resumed[1]) == without_times(straight[1])


def write_goals(path: Path, x: float, count: int) -> str:
    states = [[x, 1.0, 0.0, 0.0]] * count
    pq.write_table(pa.table({"start": states, "goal": states}), path)
    return str(path)


def test_unfinished_episodes_to_other_goals_are_not_resumed(
    context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    options = replace(tiny_plan, goals=str(tmp_path / "goals.parquet"))
    goals = []
    for x in (1.0, 1.2):
        write_goals(tmp_path / "goals.parquet", x, 3)
        goals.append(evaluate(context, options, tmp_path / "plan")[0].goal[0, 0])
    assert goals == [1.0, 1.2]


class RecordingEnv(PointMazeVectorEnv):
    """Records the actions that it receives."""

    received: list[NDArray[np.floating]]
    shift = 0.0

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        self.received.append(actions.copy())
        return super().advance(actions) + self.shift


class LyingEnv(RecordingEnv):
    """Reports wrong states, distances and success; its camera and its proprio are right."""

    shift = 100.0

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        return {"state": info["state"] + 100.0, "goal": info["goal"] - 7.0, "distance": 0.0, "success": True}


HONEST: dict[str, dict[str, Any]] = {
    **{solver: {"solver": solver, "search": QUICK[solver]} for solver in QUICK},
    "graph": {"distance": "graph"},
    "gd on the graph": {"distance": "graph", "solver": "gd", "search": QUICK["gd"]},
    "observed": {"context": 3, "observed": 3},
    "alpha": {"alpha": 0.5},
    "last": {"objective": "last", "horizon": 3, "execute": 2},
    "dataset": {"goals": "dataset", "strict": False},
    "random-action": {"goals": "random-action", "strict": False},
}


@pytest.mark.parametrize("changed", HONEST.values(), ids=HONEST)
def test_the_planner_never_receives_a_state_or_a_success(
    run_path: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    options = replace(tiny_plan, **changed)
    context = EvalContext(run_path, options)
    received = []
    for env in (RecordingEnv, LyingEnv):
        env.received = []
        monkeypatch.setattr(evaluate_module, "PointMazeVectorEnv", env)
        run_episodes(context, options, range(3))
        received.append(np.concatenate(env.received, axis=1))
    assert received[0].shape == (3, 12, 2)
    assert received[0].any()
    np.testing.assert_array_equal(received[0], received[1])
