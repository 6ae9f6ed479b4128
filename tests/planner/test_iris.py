"""Planning with codes that a transformer predicts: results do not depend on how episodes and candidates are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wmcache.commands.plan import wmplan
from wmcache.commands.train import wmtrain
from wmcache.common.jsonfiles import read_json
from wmcache.planner import mpc as mpc_module
from wmcache.planner.context import EvalContext
from wmcache.planner.mpc import make_mpc
from wmcache.planner.options import PlanOptions


@pytest.fixture(scope="module")
def iris_run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    out = tmp_path_factory.mktemp("runs") / "iris"
    words = f"--model iris --width 16 --depth 1 --vocabulary 16 --channels 16 --steps 30 --batch-size 8 --cache {store_path}"
    done = CliRunner().invoke(wmtrain, [*words.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("temperature", [0, 1])
def test_plans_do_not_depend_on_the_batch(iris_run: Path, tmp_path: Path, temperature: int) -> None:
    found = []
    for size in (50, 3):
        out = tmp_path / str(size)
        words = f"--episodes 4 --budget 20 --samples 8 --elites 3 --iterations 2 --batch-size {size} --run {iris_run}"
        words += f" --context 2 --observed 2 --model-temperature {temperature}"
        done = CliRunner().invoke(wmplan, [*words.split(), "--dtype", "float32", "--out", str(out)])
        assert done.exit_code == 0, done.output
        found.append(read_json(out / "results.json", "")["by_threshold"])
    assert found[0] == found[1]


def test_candidates_of_a_plan_see_the_same_noise_however_they_are_cut(
    iris_run: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tiny_plan, model_temperature=1.0)
    context = EvalContext(iris_run, options)
    card, model = context.card, context.world_model
    tokens = torch.randn(2, card.tokens_per_frame, card.token_dim, generator=torch.Generator().manual_seed(0))
    mpc = make_mpc(context, options, tokens.flip(0), np.zeros((2, 4), np.float32))
    belief = model.observe(model.start(2), tokens, torch.zeros(2, 4), None)
    actions = torch.zeros(2, 6, options.horizon, 10)

    def cost(seed: int) -> torch.Tensor:
        return mpc.cost_of(belief, [torch.Generator().manual_seed(seed + i) for i in range(2)])(actions)

    expected = cost(0)
    torch.testing.assert_close(expected, expected[:, :1].expand(-1, 6))
    others = torch.stack([cost(seed) for seed in (5, 10, 15)])  # one of them may draw the same codes
    assert not torch.isclose(others, expected).all(0).any()
    for room in (1, 40):
        monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
        torch.testing.assert_close(cost(0), expected)
