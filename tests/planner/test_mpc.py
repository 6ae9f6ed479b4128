"""Receding horizon, with a world model that is exact, so that what goes wrong is the planner's doing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from wmcache.planner import mpc as mpc_module
from wmcache.planner.cem import Cem, Cost
from wmcache.planner.mpc import Mpc
from wmcache.trainer.models import DataShape, WorldModel


class DoubleIntegrator:
    """A ball that is pushed; its latent is one token, its place. The velocity is known from proprio alone."""

    shape = DataShape(tokens=1, token_dim=2, proprio_dim=4, action_dim=4, history=1)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def rollout(
        self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        self.asked.append(len(actions))
        place, velocity = tokens[:, -1, 0], proprio[:, -1, 2:]
        places, states = [], []
        for action in actions.unbind(1):
            for push in action.split(2, dim=1):
                velocity = 0.9 * velocity + 0.3 * push
                place = place + 0.3 * velocity
            places.append(place[:, None])
            states.append(torch.cat([place, velocity], 1))
        return torch.stack(places, 1), torch.stack(states, 1)


class NoSearch:
    """A solver that is content with the first guess."""

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return start


def make_mpc(objective: str = "all") -> Mpc:
    return Mpc(
        model=DoubleIntegrator(),
        solver=Cem(samples=64, elites=8, iterations=5, sigma=0.4),
        objective=objective,
        horizon=5,
        context=1,
        frameskip=2,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def generators(episodes: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(episodes)]


@pytest.fixture
def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = torch.cat([torch.rand(4, 2, generator=generator) * 4 - 2, torch.randn(4, 2, generator=generator)], 1)
    goal = torch.rand(4, 1, 2, generator=generator) * 4 - 2
    return {"tokens": state[:, None, :2], "proprio": state, "goal": goal}


def test_the_exact_model_is_a_world_model() -> None:
    assert isinstance(DoubleIntegrator(), WorldModel)


def test_with_an_exact_model_it_arrives_and_stays(problem: dict[str, Tensor]) -> None:
    mpc, world = make_mpc(), DoubleIntegrator()
    tokens, proprio, goal = problem["tokens"], problem["proprio"], problem["goal"]
    plan, random = None, generators(4)
    distances = []
    for _ in range(20):
        plan = mpc.plan(tokens, proprio, goal, plan, random)
        latents, states = world.rollout(tokens[:, None], proprio[:, None], plan[:, :1])
        tokens, proprio = latents[:, -1], states[:, -1]
        plan = mpc.shift(plan, 1)
        distances.append((tokens - goal).norm(dim=-1).max().item())
    assert distances[0] > 1
    assert max(distances[-5:]) < 0.3


@pytest.mark.parametrize("objective", ["last", "all"])
def test_a_plan_does_not_depend_on_how_many_candidates_are_imagined_at_once(
    problem: dict[str, Tensor], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_mpc(objective).plan(**problem, previous=None, generators=generators(4))
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", 35)
    mpc = make_mpc(objective)
    torch.testing.assert_close(mpc.plan(**problem, previous=None, generators=generators(4)), whole)
    # 35 tokens are 7 candidates of 5 frames of 1 token.
    assert max(mpc.model.asked) == 7
    assert sum(mpc.model.asked) == 4 * 64 * 5


def test_a_plan_does_not_depend_on_the_other_episodes(problem: dict[str, Tensor]) -> None:
    together = make_mpc().plan(**problem, previous=None, generators=generators(4))
    for i in range(4):
        alone = {name: value[i : i + 1] for name, value in problem.items()}
        plan = make_mpc().plan(**alone, previous=None, generators=generators(4)[i : i + 1])
        torch.testing.assert_close(plan, together[i : i + 1])


def test_it_plans_in_env_units_for_the_whole_horizon(problem: dict[str, Tensor]) -> None:
    half = {**problem, "tokens": problem["tokens"].half(), "goal": problem["goal"].half()}
    plan = make_mpc().plan(**half, previous=None, generators=generators(4))
    assert plan.shape == (4, 5, 4)
    assert plan.abs().max() <= 1


def test_the_first_guess_is_what_is_left_of_the_last_plan(problem: dict[str, Tensor]) -> None:
    mpc = replace(make_mpc(), solver=NoSearch())
    assert torch.equal(mpc.plan(**problem, previous=None, generators=generators(4)), torch.zeros(4, 5, 4))
    previous = torch.rand(4, 5, 4)
    assert torch.equal(mpc.plan(**problem, previous=previous, generators=generators(4)), previous)


@pytest.mark.parametrize(("executed", "expected"), [(1, [2, 3, 0]), (2, [3, 0, 0]), (3, [0, 0, 0])])
def test_a_shifted_plan_ends_without_a_push(executed: int, expected: list[int]) -> None:
    plan = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert make_mpc().shift(plan, executed).flatten().tolist() == expected
