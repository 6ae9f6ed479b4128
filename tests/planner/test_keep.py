"""Sparse imagination: which tokens of a frame are imagined, what they are compared with, and that the batch does not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner import mpc as mpc_module
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies.mpc import MpcPolicy
from wmcache.planner.solvers.cem import Cem
from wmcache.trainer.models import Belief, DataShape, take_patches
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

SHAPE = DataShape(tokens=6, token_dim=5, proprio_dim=4, action_dim=10, history=3, columns=3)
EPISODES = 4


@pytest.fixture(scope="module")
def model(random_model: Callable[[DataShape], Any]) -> Any:
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"tokens": (6, 5), "goal": (6, 5), "proprio": (4,)}
    made = {name: torch.randn(EPISODES, *size, generator=generator).double() for name, size in sizes.items()}
    return {**made, "mask": torch.rand(EPISODES, 6, generator=generator) < 0.5}


def plan(model: Any, problem: dict[str, Tensor], keep: float, episodes: slice = slice(None)) -> tuple[Mpc, Any, Any]:
    """A planner, and its arguments."""
    own = {name: value[episodes] for name, value in problem.items()}
    objective = GoalDistance(own["goal"], "all")
    mpc = Mpc(model, Cem(16, 4, 3), objective, 2, torch.device("cpu"), torch.float32, keep=keep)
    belief = model.observe(model.start(len(own["goal"])), own["tokens"], own["proprio"], None)
    return mpc, belief, [torch.Generator().manual_seed(i) for i in range(EPISODES)[episodes]]


def watch(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Belief, Any]]:
    """What the model is called with, and what it returns."""
    imagine, seen = model.imagine, []

    def watched(belief: Belief, actions: Tensor, generators: Any) -> Any:
        found = imagine(belief, actions, generators)
        seen.append((belief, found))
        return found

    monkeypatch.setattr(model, "imagine", watched)
    return seen


@pytest.mark.parametrize(("keep", "count"), [(0.01, 1), (0.5, 3), (0.8, 5)])
def test_each_plan_of_each_episode_has_its_own_tokens(
    model: Any, problem: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, keep: float, count: int
) -> None:
    mpc, belief, random = plan(model, problem, keep)
    seen, drawn = watch(model, monkeypatch), []
    for _ in range(40):
        mpc.plan(belief, None, random)
        (patches, *others) = [found.patches for _, found in seen]
        assert all(torch.equal(patches, other) for other in others)
        assert patches.shape == (EPISODES, count)
        assert (patches.diff(dim=1) > 0).all()
        drawn.append(patches)
        seen.clear()
    times = torch.bincount(torch.cat(drawn).flatten(), minlength=6) / (40 * EPISODES)
    assert (times - count / 6).abs().max() < 0.2
    assert len(torch.cat(drawn).unique(dim=0)) > 3


def test_a_plan_does_not_depend_on_memory_or_on_other_episodes(
    model: Any, problem: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(episodes: slice = slice(None)) -> Tensor:
        mpc, belief, random = plan(model, problem, 0.5, episodes)
        return mpc.plan(belief, None, random)

    whole = made()
    for i in range(EPISODES):
        torch.testing.assert_close(made(slice(i, i + 1)), whole[i : i + 1], atol=1e-9, rtol=0)
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", 60)
    torch.testing.assert_close(made(), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_costs_are_of_the_same_tokens_of_the_goal(
    model: Any, problem: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    mpc, belief, random = plan(model, problem, 0.5)
    if masked:
        mpc.objective = replace(mpc.objective, mask=problem["mask"])  # type: ignore[type-var]
    seen = watch(model, monkeypatch)
    actions = torch.rand(EPISODES, 3, 2, 10, generator=torch.Generator().manual_seed(2)).double()
    with torch.inference_mode():
        costs = mpc.cost_of(belief, random)(actions)
    ((_, found),) = seen
    for episode, patches in enumerate(found.patches.tolist()):
        goal, counts = problem["goal"][episode], problem["mask"][episode]
        scored = [k for k, patch in enumerate(patches) if counts[patch]] if masked else []
        scored = scored or list(range(len(patches)))
        for sample in range(3):
            imagined = found.latents[episode, sample]
            errors = [(imagined[t, k] - goal[patches[k]]).square().mean() for t in range(2) for k in scored]
            torch.testing.assert_close(costs[episode, sample], torch.stack(errors).mean())


def test_all_tokens_are_as_without() -> None:
    frames = torch.randn(2, 3, 6, 5)
    assert torch.equal(take_patches(frames, torch.arange(6).expand(2, -1)), frames)
    assert torch.equal(take_patches(frames[:, 0], torch.tensor([[5], [0]]))[0, 0], frames[0, 0, 5])


def test_episodes_are_planned_and_known_by_it(run_path: Path, ddp_run: Path, tiny_plan: PlanOptions) -> None:
    options = replace(tiny_plan, keep_tokens=0.5)
    for run in (run_path, ddp_run):
        context = EvalContext(run, options)
        together = run_episodes(context, options, range(2)).states
        torch.testing.assert_close(run_episodes(context, options, [1]).states[0], together[1], atol=1e-3, rtol=0)
        assert context.resolved(options)["keep_tokens"] == 0.5
        assert "keep_tokens" not in context.resolved(tiny_plan)
        assert context.fingerprint(options) != context.fingerprint(tiny_plan)


def test_models_of_whole_frames_are_refused(
    store_path: Path, tiny: TrainOptions, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    sizes = {"hidden": 16, "sequence": 5}
    train(store_path, tmp_path / "run", replace(tiny, model="mdn-rnn", model_options=sizes, steps=2))
    options = replace(tiny_plan, keep_tokens=0.5)
    with pytest.raises(UserError, match=r"--keep 0\.5.*dino-wm"):
        MpcPolicy(EvalContext(tmp_path / "run", options), options)


@pytest.mark.parametrize("changes", [{"keep_tokens": 0.0}, {"keep_tokens": 1.5}, {"distance": "graph"}])
def test_what_does_not_fit_is_refused(run_path: Path, tiny_plan: PlanOptions, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--keep"):
        EvalContext(run_path, replace(tiny_plan, **{"keep_tokens": 0.5, **changes}))
