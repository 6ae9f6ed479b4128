"""Receding horizon, with a world model that is exact, so that what goes wrong is the planner's doing; and with a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from wmcache.planner import mpc as mpc_module
from wmcache.planner.cem import Cem, Cost
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.solvers import SOLVERS, make_solver
from wmcache.trainer.models import DataShape, WorldModel, build


class DoubleIntegrator(WorldModel):
    """A ball that is pushed; its latent is one token, its place. The velocity is known from proprio alone."""

    def __init__(self) -> None:
        super().__init__(DataShape(tokens=1, token_dim=2, proprio_dim=4, action_dim=4, history=1), None, {})
        self.asked: list[int] = []

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        raise NotImplementedError

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        return proprio

    def rollout(
        self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        samples = actions.shape[1]
        self.asked.append(len(actions) * samples)
        place, velocity = tokens[:, -1].expand(-1, samples, -1), proprio[:, -1:, 2:].expand(-1, samples, -1)
        places, states = [], []
        for action in actions[:, :, tokens.shape[1] - 1 :].unbind(2):
            for push in action.split(2, dim=2):
                velocity = 0.9 * velocity + 0.3 * push
                place = place + 0.3 * velocity
            places.append(place[:, :, None])
            states.append(torch.cat([place, velocity], 2))
        return torch.stack(places, 2), torch.stack(states, 2)


class NoSearch:
    """A solver that is content with the first guess."""

    differentiates: ClassVar[bool] = False
    evaluations = 0

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return start


def make_mpc(goal: Tensor, objective: str = "all") -> Mpc:
    return Mpc(
        model=DoubleIntegrator(),
        solver=Cem(samples=64, elites=8, iterations=5, sigma=0.4),
        objective=GoalDistance(goal, objective),
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
    return {"tokens": state[:, None, None, :2], "proprio": state[:, None]}


@pytest.fixture
def goal() -> Tensor:
    return torch.rand(4, 1, 2, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_with_an_exact_model_it_arrives_and_stays(problem: dict[str, Tensor], goal: Tensor) -> None:
    mpc, plan, distances = make_mpc(goal), None, []
    tokens, proprio = problem["tokens"], problem["proprio"]
    random = generators(4)
    for _ in range(20):
        plan = mpc.plan(tokens, proprio, plan, random)
        places, states = mpc.model.rollout(tokens, proprio, plan[:, None, :1])
        tokens, proprio = places[:, 0], states[:, 0]
        plan = mpc.shift(plan, 1)
        distances.append((tokens[:, 0] - goal).norm(dim=-1).max().item())
    assert distances[0] > 1
    assert max(distances[-5:]) < 0.3


@pytest.mark.parametrize("objective", ["last", "all"])
def test_a_plan_does_not_depend_on_how_many_candidates_are_imagined_at_once(
    problem: dict[str, Tensor], goal: Tensor, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_mpc(goal, objective).plan(**problem, previous=None, generators=generators(4))
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", 35)
    mpc = make_mpc(goal, objective)
    torch.testing.assert_close(mpc.plan(**problem, previous=None, generators=generators(4)), whole)
    # 35 tokens are 7 candidates of 5 frames of 1 token.
    assert isinstance(mpc.model, DoubleIntegrator)
    assert max(mpc.model.asked) == 7
    assert sum(mpc.model.asked) == 4 * 64 * 5


def test_as_many_episodes_are_imagined_at_once_as_there_is_room_for(
    problem: dict[str, Tensor], goal: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_mpc(goal).plan(**problem, previous=None, generators=generators(4))
    # Room for all candidates of 3 of the 4 episodes.
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", 3 * 64 * 5 + 7)
    mpc = make_mpc(goal)
    torch.testing.assert_close(mpc.plan(**problem, previous=None, generators=generators(4)), whole)
    assert isinstance(mpc.model, DoubleIntegrator)
    assert mpc.model.asked == [3 * 64, 64] * 5


def test_a_plan_does_not_depend_on_the_other_episodes(problem: dict[str, Tensor], goal: Tensor) -> None:
    together = make_mpc(goal).plan(**problem, previous=None, generators=generators(4))
    for i in range(4):
        alone = {name: value[i : i + 1] for name, value in problem.items()}
        plan = make_mpc(goal[i : i + 1]).plan(**alone, previous=None, generators=generators(4)[i : i + 1])
        torch.testing.assert_close(plan, together[i : i + 1])


def test_it_plans_in_env_units_for_the_whole_horizon(problem: dict[str, Tensor], goal: Tensor) -> None:
    half = {**problem, "tokens": problem["tokens"].half()}
    plan = make_mpc(goal).plan(**half, previous=None, generators=generators(4))
    assert plan.shape == (4, 5, 4)
    assert plan.abs().max() <= 1


def test_the_first_guess_is_what_is_left_of_the_last_plan(problem: dict[str, Tensor], goal: Tensor) -> None:
    mpc = replace(make_mpc(goal), solver=NoSearch())
    assert torch.equal(mpc.plan(**problem, previous=None, generators=generators(4)), torch.zeros(4, 5, 4))
    previous = torch.rand(4, 5, 4)
    assert torch.equal(mpc.plan(**problem, previous=previous, generators=generators(4)), previous)


@pytest.mark.parametrize(("executed", "expected"), [(1, [2, 3, 0]), (2, [3, 0, 0]), (3, [0, 0, 0])])
def test_a_shifted_plan_ends_without_a_push(goal: Tensor, executed: int, expected: list[int]) -> None:
    plan = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert make_mpc(goal).shift(plan, executed).flatten().tolist() == expected


QUICK: dict[str, dict[str, Any]] = {
    "cem": {"samples": 16, "elites": 4, "iterations": 3},
    "icem": {"samples": 16, "elites": 4, "iterations": 3, "frameskip": 5},
    "mppi": {"samples": 16, "elites": 4, "iterations": 3},
    "gd": {"steps": 4, "restarts": 5, "optimiser": "adam"},
}
SHAPE = DataShape(tokens=3, token_dim=5, proprio_dim=4, action_dim=10, history=3)


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, so that it shows what it sees."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"tokens": SHAPE.token_dim, "proprio": SHAPE.proprio_dim, "action": SHAPE.action_dim}
    statistics = {f"{name}_mean": torch.randn(size, generator=generator) for name, size in sizes.items()}
    statistics |= {f"{name}_std": torch.rand(size, generator=generator) + 0.5 for name, size in sizes.items()}
    model = build("dino-wm", SHAPE, {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}, statistics).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double()


def imagined(model: Any, solver: str, episodes: slice = slice(None), observed: int = 3) -> tuple[Mpc, dict[str, Any]]:
    """A planner with a real model, and what it is asked.

    All in float64: some solvers amplify the rounding of costs a thousandfold, by how much depends on the CPU.
    """
    generator = torch.Generator().manual_seed(1)
    goal, code = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 4, generator=generator)
    asked = {
        "tokens": torch.randn(4, observed, 3, 5, generator=generator)[episodes],
        "proprio": torch.randn(4, observed, 4, generator=generator)[episodes],
        "past": (torch.rand(4, observed - 1, 10, generator=generator) * 2 - 1)[episodes] if observed > 1 else None,
        "previous": None,
        "generators": generators(4)[episodes],
    }
    asked["previous"] = torch.zeros(len(asked["tokens"]), 2, 10)
    asked = {name: value.double() if isinstance(value, Tensor) else value for name, value in asked.items()}
    objective = GoalDistance(goal[episodes].double(), "all", 0.5, code[episodes].double())
    device = torch.device("cpu")
    return Mpc(model, make_solver(solver, **QUICK[solver]), objective, 2, 3, 5, device, torch.float32), asked


@pytest.mark.parametrize("room", [1, 60, 500])
@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_bounds_change_no_plan(model: Any, solver: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mpc, asked = imagined(model, solver)
    whole = mpc.plan(**asked)
    rollout, sizes = model.rollout, []

    def watched(tokens: Tensor, proprio: Tensor, actions: Tensor, context: int) -> Any:
        sizes.append(actions.shape[0] * actions.shape[1])
        return rollout(tokens, proprio, actions, context)

    monkeypatch.setattr(model, "rollout", watched)
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
    mpc, asked = imagined(model, solver)
    torch.testing.assert_close(mpc.plan(**asked), whole, atol=1e-9, rtol=0)
    # A future is 3 tokens of 2 imagined frames, and of 2 more that lead there.
    assert max(sizes) <= max(1, room // 12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_mixes_episodes(model: Any, solver: str) -> None:
    mpc, asked = imagined(model, solver)
    together = mpc.plan(**asked)
    for i in range(4):
        mpc, asked = imagined(model, solver, slice(i, i + 1))
        torch.testing.assert_close(mpc.plan(**asked), together[i : i + 1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("room", [60, 2**17])
def test_gradients_are_of_the_actions_alone(model: Any, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
    mpc, asked = imagined(model, "gd")
    assert any(parameter.requires_grad for parameter in model.parameters())
    plan = mpc.plan(**asked)
    assert not plan.requires_grad
    assert plan.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointed_gradients_are_the_whole_ones(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mpc, asked = imagined(model, "gd")
    cost = mpc.cost_of(asked["tokens"], asked["proprio"], asked["past"])
    actions = (
        torch.rand(4, 6, 2, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    ).requires_grad_()
    gradients: list[Tensor] = []
    for room in (2**17, 60):
        monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
        gradients += torch.autograd.grad(cost(actions).sum(), actions)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-9, rtol=1e-9)


class TestObservedFrames:
    def test_candidates_follow_what_was_done_between_them(self, model: Any) -> None:
        mpc, asked = imagined(model, "cem")
        actions = torch.rand(4, 6, 2, 10, generator=torch.Generator().manual_seed(2)) * 2 - 1
        costs = mpc.cost_of(asked["tokens"], asked["proprio"], asked["past"])(actions)
        for episode in range(4):
            one = slice(episode, episode + 1)
            for sample in range(6):
                futures = torch.cat([asked["past"][one], actions[one, sample]], 1)
                latents, code = model.rollout(asked["tokens"][one], asked["proprio"][one], futures, 3)
                expected = mpc.objective(latents[:, None], code[:, None], one)[0, 0]
                torch.testing.assert_close(costs[episode, sample], expected, atol=1e-9, rtol=1e-9)

    @pytest.mark.parametrize("name", ["tokens", "proprio", "past"])
    def test_every_one_of_them_counts(self, model: Any, name: str) -> None:
        mpc, asked = imagined(model, "cem")
        actions = torch.rand(4, 6, 2, 10, generator=torch.Generator().manual_seed(2)) * 2 - 1
        given = {key: asked[key] for key in ("tokens", "proprio", "past")}
        costs = mpc.cost_of(**given)(actions)
        for frame in range(given[name].shape[1]):
            changed = given[name].clone()
            changed[:, frame] += 0.5
            assert not torch.allclose(mpc.cost_of(**given | {name: changed})(actions), costs, atol=1e-4)
