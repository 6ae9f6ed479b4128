"""Planning with a model that imagines proprio alone, trained and planned with the commands."""

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
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.planner.context import EvalContext
from wmcache.planner.mpc import make_mpc
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import make_policy


@pytest.fixture(scope="module")
def blind_run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RWM that sees no tokens; read only."""
    out = tmp_path_factory.mktemp("runs") / "rwm"
    words = f"--model rwm --tokens none --hidden 16 --forecast 3 --steps 30 --batch-size 8 --cache {store_path}"
    done = CliRunner().invoke(wmtrain, [*words.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_plans_reach_for_the_goals_proprio(blind_run: Path, tmp_path: Path) -> None:
    words = f"--episodes 3 --budget 20 --samples 16 --elites 4 --iterations 2 --alpha 1 --run {blind_run}"
    done = CliRunner().invoke(wmplan, [*words.split(), "--out", str(tmp_path / "plan")])
    assert done.exit_code == 0, done.output
    assert len(read_json(tmp_path / "plan" / "results.json", "")["by_threshold"]) == 3


def test_the_cost_is_the_distance_of_proprio(blind_run: Path, tiny_plan: PlanOptions) -> None:
    options = replace(tiny_plan, alpha=1.0)
    context = EvalContext(blind_run, options)
    card, model = context.card, context.world_model
    tokens, goal = torch.randn(2, 1, card.tokens_per_frame, card.token_dim), np.ones((1, 4), np.float32)
    actions = torch.rand(1, 6, options.horizon, 10) * 2 - 1
    costs = []
    for seen, shown in (tokens, tokens.flip(0)):  # tokens do not matter
        belief = model.observe(model.start(1), seen, torch.zeros(1, 4), None)
        mpc = make_mpc(context, options, shown, goal)
        costs.append(mpc.cost_of(belief, [torch.Generator().manual_seed(0)])(actions))
    assert torch.equal(*costs)
    wanted = model.encode_proprio(torch.from_numpy(goal)[:, None])[:, None]
    difference = model.imagine(belief, actions).proprio - wanted
    torch.testing.assert_close(costs[0], difference.square().mean((2, 3)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, "--alpha 0"), ({"alpha": 1.0, "mask": True}, "--mask"), ({"alpha": 1.0, "distance": "graph"}, "graph")],
)
def test_distances_of_latents_are_refused(
    blind_run: Path, tiny_plan: PlanOptions, changes: dict[str, Any], named: str
) -> None:
    options = replace(tiny_plan, **changes)
    with pytest.raises(UserError, match=f"{named}.*--alpha 1"):
        make_policy(EvalContext(blind_run, options), options)
