"""AVDC acts: by MPC in its imagination, and by generated plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wmcache.commands.plan import wmplan
from wmcache.commands.train import wmtrain
from wmcache.common.jsonfiles import read_json
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, operations_per_decision, run_episodes
from wmcache.planner.mpc import make_mpc
from wmcache.planner.options import PlanOptions

pytest.importorskip("diffusers")

SIZES = {
    "avdc": "--width 16 --depth 1 --heads 2 --sampling-steps 2 --history 2",
    "avdc-plan": "--width 16 --depth 1 --video-width 16 --video-depth 1 --video-heads 2 --reach 3",
}


@pytest.fixture(scope="module")
def runs(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model -> a run; read only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sizes in SIZES.items():
        words = f"--model {name} {sizes} --steps 30 --lr 3e-3 --batch-size 8 --device cpu --cache {store_path}"
        done = CliRunner().invoke(wmtrain, [*words.split(), "--dtype", "float32", "--out", str(folder / name)])
        assert done.exit_code == 0, done.output
    return {name: folder / name for name in SIZES}


@pytest.mark.parametrize("name", SIZES)
def test_an_episode_depends_on_its_number_alone(runs: dict[str, Path], tiny_plan: PlanOptions, name: str) -> None:
    context = EvalContext(runs[name], tiny_plan)
    together = run_episodes(context, tiny_plan, range(3)).states
    np.testing.assert_array_equal(run_episodes(context, tiny_plan, range(3)).states, together)
    if name == "avdc-plan":
        for number in range(3):
            alone = run_episodes(context, tiny_plan, [number]).states[0]
            np.testing.assert_allclose(alone, together[number], atol=1e-3)


def test_all_candidates_and_episodes_start_from_the_same_noise(runs: dict[str, Path], tiny_plan: PlanOptions) -> None:
    context = EvalContext(runs["avdc"], tiny_plan)
    model: Any = context.model
    goal = torch.from_numpy(context.store.gather(np.array([0, 70, 130]))).float()
    belief = model.observe(model.start(3), goal.flip(0), torch.zeros(3, 4), None)
    actions = torch.rand(3, 6, 3, model.shape.action_dim, generator=torch.Generator().manual_seed(0))

    def costs(own: slice, *seeds: int) -> torch.Tensor:
        mpc = make_mpc(context, tiny_plan, goal[own], np.zeros((len(seeds), 4), np.float32))
        seen = {part: value[own] for part, value in belief.items()}
        return mpc.cost_of(seen, [torch.Generator().manual_seed(seed) for seed in seeds])(actions[own])

    together = costs(slice(0, 3), 0, 1, 2)
    assert torch.equal(costs(slice(0, 3), 7, 8, 9), together)
    for number in range(3):
        alone = costs(slice(number, number + 1), 5)
        torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "policy"), [("avdc", "mpc"), ("avdc-plan", "actor")])
def test_the_command_plans_with_it(runs: dict[str, Path], tmp_path: Path, name: str, policy: str) -> None:
    words = f"--run {runs[name]} --episodes 2 --budget 10 --horizon 2 --device cpu --dtype float32 --out {tmp_path}"
    search = ["--samples", "4", "--elites", "2", "--iterations", "1"] if policy == "mpc" else []
    done = CliRunner().invoke(wmplan, [*words.split(), *search])
    assert done.exit_code == 0, done.output
    assert read_json(tmp_path / "results.json", "")["policy"] == policy


def test_gradients_of_costs_can_plan(runs: dict[str, Path], tiny_plan: PlanOptions, tmp_path: Path) -> None:
    options = replace(tiny_plan, solver="gd", search={"steps": 2}, budget=10)
    _, results = evaluate(EvalContext(runs["avdc"], options), options, tmp_path)
    assert results["episodes"] == options.episodes
    counts = [operations_per_decision(EvalContext(run, tiny_plan), tiny_plan) for run in runs.values()]
    assert 0 < counts[1] < counts[0]
