"""Policies that are not planners: they act by episode, whatever the batch, and only on what they may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmcache.common.errors import UserError
from wmcache.planner.base import Observation
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, operations_per_decision, run_episodes
from wmcache.planner.options import PlanOptions, default_out, recorded
from wmcache.planner.policies import PLAN_POLICIES, make_policy
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

MakeActor = Callable[..., Path]


@pytest.fixture(scope="module")
def make_actor(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeActor:
    """(kind, options) -> a run; read only."""

    def make(kind: str, **options: Any) -> Path:
        sizes = {"width": 32, "depth": 1, **options}
        path = tmp_path_factory.mktemp("actors") / kind
        settings = TrainOptions(model=kind, model_options=sizes, steps=60, batch=16, dtype="float32", device="cpu")
        train(store_path, path, replace(settings, learning_rate=3e-3))
        return path

    return make


@pytest.fixture(scope="module")
def actor_run(make_actor: MakeActor) -> Path:
    return make_actor("gc-idm")


def run_of(name: str, run_path: Path, actor_run: Path) -> Path:
    return actor_run if name == "actor" else run_path


@pytest.mark.parametrize("name", ["mpc", "actor", "expert", "random", "zero"])
def test_an_episode_depends_on_its_number_alone(
    run_path: Path, actor_run: Path, tiny_plan: PlanOptions, name: str
) -> None:
    options = replace(tiny_plan, policy=name)
    context = EvalContext(run_of(name, run_path, actor_run), options)
    together = run_episodes(context, options, range(3))
    np.testing.assert_array_equal(run_episodes(context, options, range(3)).states, together.states)
    assert together.replans == 9
    assert together.encoder_frames == (12 if name in ("mpc", "actor") else 0)
    for number in range(3):
        alone = run_episodes(context, options, [number])
        np.testing.assert_allclose(alone.states[0], together.states[number], atol=1e-3)


def test_every_policy_is_known() -> None:
    assert {"mpc", "actor", "expert", "random", "zero"} <= set(PLAN_POLICIES)


@pytest.mark.parametrize("kind", ["gcbc", "gc-idm"])
def test_a_trained_policy_is_evaluated(
    make_actor: MakeActor, tiny_plan: PlanOptions, tmp_path: Path, kind: str
) -> None:
    context = EvalContext(make_actor(kind, proprio="none"), tiny_plan)
    assert context.blind
    _, results = evaluate(context, tiny_plan, tmp_path)
    assert (results["policy"], results["reads_state"], results["candidates_per_replan"]) == ("actor", False, 0)
    assert list(results["baselines"]) == ["random", "zero"]
    assert "context" not in results["resolved"]


def test_a_decision_costs_a_forward_pass(run_path: Path, actor_run: Path, tiny_plan: PlanOptions) -> None:
    actor, planner, expert = (
        operations_per_decision(EvalContext(run, options), options)
        for run, options in (
            (actor_run, tiny_plan),
            (run_path, tiny_plan),
            (run_path, replace(tiny_plan, policy="expert")),
        )
    )
    assert 0 == expert < actor < planner


def test_a_run_that_does_not_suit_the_policy_is_refused(
    run_path: Path, actor_run: Path, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    for run, name, execute in ((run_path, "actor", 1), (actor_run, "mpc", 1), (actor_run, "actor", 2)):
        options = replace(tiny_plan, policy=name, execute=execute)
        with pytest.raises(UserError, match=str(run) if execute == 1 else "--execute 2"):
            evaluate(EvalContext(run, options), options, tmp_path / "plan")
    with pytest.raises(UserError, match="--solver categorical-cem"):
        EvalContext(run_path, replace(tiny_plan, solver="categorical-cem"))
    with pytest.raises(UserError, match=r"'pmc'.*mpc"):
        evaluate(EvalContext(run_path, tiny_plan), replace(tiny_plan, policy="pmc"), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_an_actor_steers_to_cached_frames_unless_the_goal_is_near(actor_run: Path, tiny_plan: PlanOptions) -> None:
    context = EvalContext(actor_run, tiny_plan)
    graph, store = context.cached_graph, context.store
    tokens = torch.from_numpy(store.gather(np.arange(len(store)))).float()
    goal = tokens[:1].expand(len(tokens), -1, -1)
    chosen = graph.next_frames(tokens, goal, graph.to_goal(tokens[:1]).expand(len(tokens), -1))
    near = (graph.sketch(tokens) - graph.sketch(goal)).norm(dim=1) <= graph.reach
    assert 0 < near.sum() < len(near)
    assert torch.equal(chosen[near], goal[near])
    known = {tuple(frame.flatten().tolist()) for frame in graph.frames.float()}
    assert all(tuple(frame.flatten().tolist()) in known for frame in chosen[~near])
    nearest = torch.cdist(graph.sketch(tokens), graph.nodes).amin(1)
    reached = (graph.sketch(chosen) - graph.sketch(tokens)).norm(dim=1)
    assert (reached[~near] <= torch.clamp(nearest[~near], min=graph.reach) + 1e-4).all()


def test_subgoals_and_bounds_change_what_an_actor_does(actor_run: Path, tiny_plan: PlanOptions) -> None:
    context = EvalContext(actor_run, tiny_plan)
    image = np.zeros((2, 32, 32, 3), np.uint8)
    seen, goal = (
        Observation(image, np.full((2, 4), 9.0, np.float32)),
        Observation(image + 200, np.zeros((2, 4), np.float32)),
    )
    found = []
    for options in (tiny_plan, replace(tiny_plan, subgoals="none")):
        policy = make_policy(context, options)
        policy.reset(goal, [torch.Generator()] * 2)
        policy.observe(seen)
        found.append(policy.act())
        assert found[-1].shape == (2, 1, 10)
        assert found[-1].abs().max() <= 1
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["random", "actor"])
def test_actions_are_those_of_the_environment(actor_run: Path, tiny_plan: PlanOptions, name: str) -> None:
    seen = Observation(np.zeros((2, 32, 32, 3), np.uint8), np.full((2, 4), 9.0, np.float32))
    for low, high, discrete in (([-2.0, 0.0], [3.0, 0.1], False), ([0.0, 0.0], [1.0, 1.0], True)):
        context = EvalContext(actor_run, tiny_plan)
        context.action_bounds, context.discrete = (np.float32(low), np.float32(high)), discrete
        policy = make_policy(context, replace(tiny_plan, policy=name))
        policy.reset(seen, [torch.Generator().manual_seed(number) for number in range(2)])
        policy.observe(seen)
        actions = torch.cat([policy.act() for _ in range(4)], 1).reshape(-1, 2).numpy()
        assert (actions >= np.float32(low)).all()
        assert (actions <= np.float32(high)).all()
        assert not discrete or (np.sort(actions, 1) == [0, 1]).all()


def test_results_of_earlier_versions_are_known_by_the_same_options(tmp_path: Path) -> None:
    assert not {"policy", "subgoals", "baselines"} & set(recorded(PlanOptions()))
    assert recorded(PlanOptions(policy="zero"))["policy"] == "zero"
    names = [default_out(tmp_path, None, PlanOptions(policy=name, baselines="zero")).name for name in (None, "expert")]
    assert names == ["plan-all-x1-50x100", "plan-all-x1-expert-50x100"]
