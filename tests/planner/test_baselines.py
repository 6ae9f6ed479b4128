"""Baselines: what actions that look at nothing reach, in the same episodes and before the same judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from wmcache.cache import TokenStore
from wmcache.envs import Maze, PointMazeVectorEnv
from wmcache.planner.baselines import BASELINES, run_baseline
from wmcache.planner.episodes import began_at_goal, judge
from wmcache.planner.evaluate import EvalContext, evaluate
from wmcache.planner.goals import start_and_goal
from wmcache.planner.options import PlanOptions
from wmcache.trainer.runs import load_model

UMAZE = Maze.load("UMaze")


def test_they_act_as_the_environment_does(store: TokenStore) -> None:
    start, goal = start_and_goal("random-state", range(3), UMAZE, store, 0)
    for name, actions_of in BASELINES.items():
        episodes = run_baseline(name, UMAZE, start, goal, range(3), 12, 5)
        env = PointMazeVectorEnv(3, UMAZE, 32)
        env.reset(options={"state": start, "goal": goal})
        actions = np.stack([actions_of(number, 12) for number in range(3)])
        assert np.abs(actions).max() <= 1
        np.testing.assert_array_equal(episodes.states, env.advance(actions))
        env.close()


def test_an_episode_depends_on_its_number_alone(store: TokenStore) -> None:
    start, goal = start_and_goal("random-state", range(4), UMAZE, store, 0)
    for name in BASELINES:
        together = run_baseline(name, UMAZE, start, goal, range(4), 10, 5)
        alone = run_baseline(name, UMAZE, start[2:3], goal[2:3], [2], 10, 5)
        np.testing.assert_array_equal(alone.states, together.states[2:3])


def test_pairs_of_any_distance_flatter_actions_that_look_at_nothing(store: TokenStore) -> None:
    """The figures of the issue: of 200 random U-maze pairs 31, 10 and 3 begin at the goal, and zero actions "reach" 28 %."""
    start, goal = start_and_goal("random-state", range(200), UMAZE, store, 0)
    zero = run_baseline("zero", UMAZE, start, goal, range(200), 100, 5)
    assert [began_at_goal(zero, threshold) for threshold in (0.5, 0.25, 0.1)] == [31, 10, 3]
    assert judge(zero, 0.5, UMAZE)["success_rate"] == 0.28
    random = judge(run_baseline("random", UMAZE, start, goal, range(200), 100, 5), 0.5, UMAZE)
    assert random["ci95"][0] < 0.62 < random["ci95"][1]
    assert random["held"] < random["successes"] / 4


def test_an_evaluation_has_them_on_its_own_episodes(
    setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    episodes, results = evaluate(setting, tiny_plan, tmp_path)
    assert results["began_at_goal"] == {"0.5": 0, "0.25": 0, "0.1": 0}
    assert list(results["baselines"]) == ["random", "zero"]
    for name, rows in results["baselines"].items():
        done = run_baseline(name, setting.maze, episodes.start, episodes.goal, range(3), 12, episodes.chunk)
        assert rows == [judge(done, threshold, setting.maze) for threshold in (0.5, 0.25, 0.1)]
        assert [row["threshold"] for row in rows] == [row["threshold"] for row in results["by_threshold"]]


def test_an_untrained_model_has_other_weights_and_the_same_sizes_and_statistics(run_path: Path) -> None:
    trained, other, again = (load_model(run_path, torch.device("cpu"), untrained=flag) for flag in (False, True, True))
    buffers = {name for name, _ in trained.named_buffers()}
    states = [model.state_dict() for model in (trained, other, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in buffers)
    parameters = [name for name, value in trained.named_parameters() if value.ndim > 1]
    assert not any(torch.equal(states[0][name], states[1][name]) for name in parameters)
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert not any(value.requires_grad for value in other.parameters())


def test_what_an_untrained_model_has_planned_is_not_taken_for_the_runs(
    run_path: Path, setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    untrained = EvalContext(run_path, tiny_plan, untrained=True)
    assert untrained.fingerprint(tiny_plan) != setting.fingerprint(tiny_plan)
    episodes = [evaluate(one, tiny_plan, tmp_path)[0] for one in (setting, untrained, setting)]
    np.testing.assert_array_equal(episodes[0].states, episodes[2].states)
    assert not np.array_equal(episodes[0].states, episodes[1].states)
