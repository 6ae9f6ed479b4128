"""Candidates that a model's policy proposes, and plans that end in a value: in the solver, in a plan, and on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wmcache.commands.plan import wmplan
from wmcache.commands.train import wmtrain
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.mpc import make_mpc
from wmcache.planner.objective import negative_return
from wmcache.planner.options import PlanOptions
from wmcache.planner.solvers import make_solver
from wmcache.trainer.models import Imagined

from .conftest import SHAPE, Recorded

SEARCH = {"samples": 16, "elites": 4, "iterations": 3, "proposals": 5}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])]


def test_proposals_are_candidates_of_every_iteration(cost: Recorded, target: torch.Tensor) -> None:
    proposed = 3 * torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(1))
    proposed[:, 2] = target
    start = torch.zeros(SHAPE)
    found = make_solver("mppi", **SEARCH, temperature=60.0).search(cost, start, generators(), proposed)
    assert [actions.shape[1] for actions in cost.actions] == [16, 16, 16]
    for actions in cost.actions:
        assert torch.equal(actions[:, -5:], proposed.clamp(-1, 1))
    assert torch.equal(cost.actions[0][:, 0], start)
    torch.testing.assert_close(found, target, atol=0.05, rtol=0)
    without = make_solver("mppi", **{**SEARCH, "proposals": 0})
    none = without.search(cost, start, generators(), proposed[:, :0])
    assert torch.equal(none, without(cost, start, generators()))
    with pytest.raises(UserError, match=r"proposals is 16.* 15"):
        make_solver("mppi", **{**SEARCH, "proposals": 16})


@pytest.mark.parametrize("continues", [False, True])
def test_a_value_follows_the_last_reward(continues: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 3, 4, generator=noise), torch.randn(2, 3, 1, generator=noise)
    going = torch.rand(2, 3, 4, generator=noise) if continues else torch.ones(2, 3, 4)
    frames = torch.zeros(2, 3, 4, 1, 1)
    found = negative_return(
        Imagined(frames, frames[..., 0], reward, going if continues else None, value=value), slice(None)
    )
    expected = torch.zeros(2, 3)
    for t in range(4):
        expected -= going[:, :, :t].prod(2) * reward[:, :, t]
    expected -= going.prod(2) * value[:, :, 0]
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module", params=["goal", "none"])
def latent_run(request: pytest.FixtureRequest, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TD-MPC2; read only."""
    out = tmp_path_factory.mktemp("runs") / request.param
    sizes = f"--model td-mpc2 --reward {request.param} --latent 16 --hidden 16 --encoder-width 16"
    words = f"{sizes} --steps 60 --lr 5e-3 --batch-size 8 --device cpu --cache {store_path}"
    done = CliRunner().invoke(wmtrain, [*words.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def proposing(run: Path, options: PlanOptions) -> PlanOptions:
    """Settings of MPPI, with proposals where the run has a policy."""
    search = SEARCH if run.name == "goal" else {**SEARCH, "proposals": 0}
    return replace(options, solver="mppi", budget=20, horizon=3, search=search)


def test_plans_do_not_depend_on_the_batch(latent_run: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    search = proposing(latent_run, tiny_plan).search
    flags = " ".join(f"--{name} {value}" for name, value in search.items())
    found = []
    for size in (50, 3):
        out = tmp_path / str(size)
        words = f"--protocol td-mpc2 --episodes 6 --budget 20 --batch-size {size} --run {latent_run} {flags}"
        done = CliRunner().invoke(wmplan, [*words.split(), "--dtype", "float32", "--device", "cpu", "--out", str(out)])
        assert done.exit_code == 0, done.output
        rows = read_json(out / "results.json", "")["by_threshold"]
        found.append([{**row, "mean_distance": None} for row in rows])  # rounding may change a plan a little
    assert found[0] == found[1]


def test_an_episode_depends_on_its_number_alone(latent_run: Path, tiny_plan: PlanOptions) -> None:
    options = proposing(latent_run, tiny_plan)
    context = EvalContext(latent_run, options)
    together = run_episodes(context, options, range(3)).states
    np.testing.assert_array_equal(run_episodes(context, options, range(3)).states, together)
    # Costs of candidates differ so little that rounding may change a plan.
    goal, model = torch.from_numpy(context.store.gather(np.array([0, 70, 130]))).float(), context.model
    belief = model.observe(model.start(3), goal.flip(0), torch.zeros(3, 4), None)
    actions = torch.rand(3, 6, 3, model.shape.action_dim, generator=torch.Generator().manual_seed(0))
    costs = make_mpc(context, options, goal, np.zeros((3, 4), np.float32)).cost_of(belief, generators())(actions)
    for number in range(3):
        own = slice(number, number + 1)
        mpc = make_mpc(context, options, goal[own], np.zeros((1, 4), np.float32))
        alone = mpc.cost_of({"latent": belief["latent"][own]}, generators()[own])(actions[own])
        torch.testing.assert_close(alone, costs[own], rtol=1e-4, atol=1e-5)


def test_the_policys_actions_are_what_a_plan_tries(latent_run: Path, tiny_plan: PlanOptions) -> None:
    options = replace(proposing(latent_run, tiny_plan), search=SEARCH)
    context = EvalContext(latent_run, options)
    card, model = context.card, context.model
    goal = torch.randn(3, card.tokens_per_frame, card.token_dim, generator=torch.Generator().manual_seed(0))
    if latent_run.name == "none":
        with pytest.raises(UserError, match="--proposals 5"):
            make_mpc(context, options, goal, np.zeros((3, 4), np.float32))
        return
    mpc = make_mpc(context, options, goal, np.zeros((3, 4), np.float32))
    half = torch.full((model.shape.action_dim,), 0.5)
    belief = model.observe(model.start(3), goal.flip(0), torch.zeros(3, 4), None)
    expected = model.propose(belief, generators(), goal=goal, horizon=3, count=5)
    for bounds in (None, (-half, 3 * half)):
        recorded = Recorded(mpc.cost_of(belief, generators()))
        mpc.bounds, mpc.cost_of = bounds, lambda *_, recorded=recorded: recorded  # type: ignore[method-assign]
        mpc.plan(belief, None, generators())
        low, high = (-1.0, 1.0) if bounds is None else bounds
        for actions in recorded.actions:
            torch.testing.assert_close(
                actions[:, -5:], torch.maximum(torch.minimum(expected, torch.as_tensor(high)), torch.as_tensor(low))
            )


def test_a_model_without_a_policy_proposes_nothing(run_path: Path, tiny_plan: PlanOptions) -> None:
    options = replace(tiny_plan, solver="mppi", search=SEARCH)
    with pytest.raises(UserError, match="--proposals 5"):
        run_episodes(EvalContext(run_path, options), options, range(1))


def test_a_return_needs_a_reward_of_the_data(latent_run: Path, tiny_plan: PlanOptions) -> None:
    options = replace(proposing(latent_run, tiny_plan), objective="return")
    with pytest.raises(UserError, match="predicts no reward"):
        run_episodes(EvalContext(latent_run, options), options, range(1))
