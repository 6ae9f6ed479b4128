"""Baselines: policies that see no frame, in the same episodes and judged alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmcache.common.errors import UserError
from wmcache.envs import PointMazeVectorEnv
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_baseline
from wmcache.planner.judge import count_at_goal, judge
from wmcache.planner.options import PlanOptions

ANY_PAIR: dict[str, Any] = {"episodes": 200, "budget": 100, "strict": False}


@pytest.mark.parametrize("name", ["random", "zero"])
def test_they_act_as_the_environment_does_and_by_episode(
    context: EvalContext, tiny_plan: PlanOptions, name: str
) -> None:
    found = run_baseline(context, tiny_plan, name)
    env = PointMazeVectorEnv(3, context.maze, 32)
    env.reset(options={"state": found.start, "goal": found.goal})
    rngs = [np.random.default_rng((99 * number + 1, 1)) for number in range(3)]
    random = np.stack([rng.normal(size=(12, 2)).clip(-1.0, 1.0) for rng in rngs])
    np.testing.assert_array_equal(found.states, env.advance(random if name == "random" else np.zeros((3, 12, 2))))
    env.close()
    assert found.encoder_frames == 0
    last = run_baseline(context, replace(tiny_plan, seed=2, episodes=1), name)
    np.testing.assert_array_equal(last.states, found.states[2:])
    several = run_baseline(context, replace(tiny_plan, batch=2, execute=2), name)
    np.testing.assert_array_equal(several.states, found.states)


def test_pairs_at_any_distance_are_too_easy(context: EvalContext, tiny_plan: PlanOptions) -> None:
    """Of 200 random U-maze pairs 31, 10 and 3 begin at the goal, and zero actions reach 28 % of the goals."""
    options = replace(tiny_plan, **ANY_PAIR)
    zero, random = (run_baseline(context, options, name) for name in ("zero", "random"))
    assert [count_at_goal(zero, threshold) for threshold in (0.5, 0.25, 0.1)] == [31, 10, 3]
    assert judge(zero, 0.5, context.maze)["success_rate"] == 0.28
    assert judge(random, 0.5, context.maze)["successes"] == 119


def test_the_expert_reaches_every_goal(context: EvalContext, tiny_plan: PlanOptions) -> None:
    judged = judge(run_baseline(context, replace(tiny_plan, episodes=50, budget=100), "expert"), 0.1, context.maze)
    assert (judged["successes"], judged["held"]) == (50, 50)
    assert judged["path_ratio"] < 1.3


def test_an_evaluation_has_them_on_its_own_episodes(
    context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    _, results = evaluate(context, replace(tiny_plan, baselines="zero,expert"), tmp_path)
    assert results["began_at_goal"] == {"0.5": 0, "0.25": 0, "0.1": 0}
    assert list(results["baselines"]) == ["zero", "expert"]
    for name, rows in results["baselines"].items():
        done = run_baseline(context, tiny_plan, name)
        assert rows == [judge(done, threshold, context.maze) for threshold in (0.5, 0.25, 0.1)]


@pytest.mark.parametrize("name", ["mpc", "nothing"])
def test_what_is_no_baseline_is_refused(
    context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=f"--baselines zero,{name}"):
        evaluate(context, replace(tiny_plan, baselines=f"zero,{name}"), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


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
