"""Baselines: actions that depend on no observation, in the same episodes and judged alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from wmcache.cache import TokenStore
from wmcache.envs import Maze, PointMazeVectorEnv
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.judge import count_at_goal, judge
from wmcache.planner.evaluate import BASELINES, evaluate, run_baseline
from wmcache.planner.goals import start_and_goal
from wmcache.planner.options import PlanOptions

UMAZE = Maze.load("UMaze")


def planned(store: TokenStore, count: int, budget: int) -> Episodes:
    """Episodes whose states do not matter."""
    start, goal = start_and_goal("random-state", range(count), UMAZE, store, 0)
    return Episodes(start, goal, np.zeros((count, budget, 4)), 5, encoder_frames=0, replans=0, seconds=0.0)


def test_they_act_as_the_environment_does_and_by_episode(store: TokenStore) -> None:
    episodes = planned(store, 3, 12)
    last = Episodes(episodes.start[2:], episodes.goal[2:], episodes.states[2:], 5, 0, 0, 0.0)
    for name, actions_of in BASELINES.items():
        found = run_baseline(name, UMAZE, episodes, range(3)).states
        env = PointMazeVectorEnv(3, UMAZE, 32)
        env.reset(options={"state": episodes.start, "goal": episodes.goal})
        actions = np.stack([actions_of(number, 12) for number in range(3)])
        assert np.abs(actions).max() <= 1
        np.testing.assert_array_equal(found, env.advance(actions))
        env.close()
        np.testing.assert_array_equal(run_baseline(name, UMAZE, last, [2]).states, found[2:])


def test_pairs_at_any_distance_are_too_easy(store: TokenStore) -> None:
    """Of 200 random U-maze pairs 31, 10 and 3 begin at the goal, and zero actions reach 28 % of the goals."""
    zero = run_baseline("zero", UMAZE, planned(store, 200, 100), range(200))
    assert [count_at_goal(zero, threshold) for threshold in (0.5, 0.25, 0.1)] == [31, 10, 3]
    assert judge(zero, 0.5, UMAZE)["success_rate"] == 0.28


def test_an_evaluation_has_them_on_its_own_episodes(
    context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    episodes, results = evaluate(context, tiny_plan, tmp_path)
    assert results["began_at_goal"] == {"0.5": 0, "0.25": 0, "0.1": 0}
    assert list(results["baselines"]) == ["random", "zero"]
    for name, rows in results["baselines"].items():
        done = run_baseline(name, context.maze, episodes, range(3))
        assert rows == [judge(done, threshold, context.maze) for threshold in (0.5, 0.25, 0.1)]


def test_an_untrained_model_has_the_same_statistics_and_no_episodes_of_the_run(
    run_path: Path, context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    untrained = EvalContext(run_path, tiny_plan, untrained=True)
    own, other = context.model.state_dict(), untrained.model.state_dict()
    same = {name for name in own if torch.equal(own[name], other[name])}
    assert same >= {name for name, _ in context.model.named_buffers()}
    assert not any(name in same for name, value in context.model.named_parameters() if value.ndim > 1)
    assert untrained.fingerprint(tiny_plan) != context.fingerprint(tiny_plan)
    episodes = [evaluate(one, tiny_plan, tmp_path)[0] for one in (context, untrained, context)]
    np.testing.assert_array_equal(episodes[0].states, episodes[2].states)
    assert not np.array_equal(episodes[0].states, episodes[1].states)
