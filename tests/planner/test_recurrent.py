"""Planning with a model that remembers every frame and draws what it imagines, trained and planned with the commands."""

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
from wmcache.planner import mpc as mpc_module
from wmcache.planner.context import EvalContext
from wmcache.planner.dream import Dream
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.mpc import make_mpc
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train


@pytest.fixture(scope="module", params=["mdn-rnn --hidden 16", "rssm --hidden 16 --deter 16 --stoch 8"])
def warm_run(request: pytest.FixtureRequest, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws with temperature 1; read only."""
    out = tmp_path_factory.mktemp("runs") / request.param.split()[0]
    words = f"--model {request.param} --temperature 1 --sequence 5 --steps 30 --batch-size 8 --cache {store_path}"
    done = CliRunner().invoke(wmtrain, [*words.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def options(tiny_plan: PlanOptions) -> PlanOptions:
    return replace(tiny_plan, budget=20, search={"samples": 16, "elites": 4, "iterations": 3})


def test_plans_do_not_depend_on_the_batch(warm_run: Path, tmp_path: Path) -> None:
    found = []
    for size in (50, 7):
        out = tmp_path / str(size)
        words = f"--episodes 8 --budget 20 --samples 16 --elites 4 --iterations 2 --batch-size {size} --run {warm_run}"
        done = CliRunner().invoke(wmplan, [*words.split(), "--dtype", "float32", "--out", str(out)])
        assert done.exit_code == 0, done.output
        found.append(read_json(out / "results.json", "")["by_threshold"])
    assert found[0] == found[1]


def test_an_episode_depends_on_its_number_alone(warm_run: Path, options: PlanOptions) -> None:
    context = EvalContext(warm_run, options)
    together = run_episodes(context, options, range(3)).states
    np.testing.assert_array_equal(run_episodes(context, options, range(3)).states, together)
    for number in range(3):
        alone = run_episodes(context, options, [number]).states[0]
        np.testing.assert_allclose(alone, together[number], atol=1e-3)


def test_candidates_of_a_plan_see_the_same_noise_however_they_are_cut(
    warm_run: Path, options: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = EvalContext(warm_run, options)
    card, model = context.card, context.model
    tokens = torch.randn(2, card.tokens_per_frame, card.token_dim, generator=torch.Generator().manual_seed(0))
    mpc = make_mpc(context, options, tokens.flip(0), np.zeros((2, 4), np.float32))
    belief = model.observe(model.start(2), tokens, torch.zeros(2, 4), None)
    actions = torch.zeros(2, 6, options.horizon, 10)

    def cost(seed: int) -> torch.Tensor:
        return mpc.cost_of(belief, [torch.Generator().manual_seed(seed + i) for i in range(2)])(actions)

    expected = cost(0)
    torch.testing.assert_close(expected, expected[:, :1].expand(-1, 6))
    assert not torch.isclose(expected, cost(5)).any()
    for room in (1, 40):
        monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
        torch.testing.assert_close(cost(0), expected)


@pytest.mark.parametrize(("execute", "steps"), [(1, 3), (2, 2), (3, 3)])
def test_every_model_step_before_the_last_plan_is_observed(
    warm_run: Path, options: PlanOptions, execute: int, steps: int
) -> None:
    options = replace(options, horizon=3, execute=execute)
    context = EvalContext(warm_run, options)
    episodes = run_episodes(context, options, range(2))
    assert episodes.encoder_frames == 2 * (2 + steps)  # goal, start, and a frame after each model step


def test_a_model_of_videos_without_actions_cannot_act(
    store_path: Path, tiny: TrainOptions, options: PlanOptions, tmp_path: Path
) -> None:
    run, videos = tmp_path / "run", {"actions": "none", "sequence": 3, "deter": 8}
    train(store_path, run, replace(tiny, model="rssm", model_options=videos, steps=2))
    with pytest.raises(UserError, match="--actions none"):
        EvalContext(run, options)
    with pytest.raises(UserError, match="--actions none"):
        Dream(run)


@pytest.mark.parametrize("name", ["context", "observed"])
def test_frames_that_a_model_sees_cannot_be_chosen(warm_run: Path, options: PlanOptions, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name}"):
        EvalContext(warm_run, replace(options, **{name: 1}))
    assert not {"context", "observed"} & EvalContext(warm_run, options).resolved(options).keys()


def test_a_planner_may_change_the_temperature(warm_run: Path, run_path: Path, options: PlanOptions) -> None:
    def states(temperature: float | None) -> np.ndarray:
        chosen = replace(options, model_temperature=temperature)
        context = EvalContext(warm_run, chosen)
        assert context.resolved(chosen)["model_temperature"] == (1 if temperature is None else temperature)
        return run_episodes(context, chosen, range(3)).states

    usual = states(None)
    np.testing.assert_array_equal(states(1.0), usual)
    assert not np.array_equal(states(0.0), usual)
    with pytest.raises(UserError, match="--model-temperature"):
        EvalContext(run_path, replace(options, model_temperature=1.0))
