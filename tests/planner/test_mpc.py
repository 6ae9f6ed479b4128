"""Receding-horizon planning with an exact world model, so that errors are the planner's; with a real one; and its objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from wmcache.planner import mpc as mpc_module
from wmcache.planner.base import Cost
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.solvers import SOLVERS, make_solver
from wmcache.planner.solvers.cem import Cem
from wmcache.trainer.models import Belief, DataShape, Imagined, WorldModel, rollout


class DoubleIntegrator(WorldModel):
    """A ball that is pushed. Its latent is one token, its position; its velocity is in proprio alone."""

    def __init__(self) -> None:
        super().__init__(DataShape(tokens=1, token_dim=2, proprio_dim=4, action_dim=4, history=1), None, {})

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        raise NotImplementedError

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        return proprio

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        return {"position": tokens.float(), "velocity": proprio[:, None, 2:]}

    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        position, velocity = (belief[name].expand(-1, actions.shape[1], -1) for name in ("position", "velocity"))
        positions, states = [], []
        for action in actions.unbind(2):
            for push in action.split(2, dim=2):
                velocity = 0.9 * velocity + 0.3 * push
                position = position + 0.3 * velocity
            positions.append(position[:, :, None])
            states.append(torch.cat([position, velocity], 2))
        return Imagined(torch.stack(positions, 2), torch.stack(states, 2))


@dataclass(frozen=True)
class NoSearch:
    """A solver that returns the first guess."""

    differentiates: ClassVar[bool] = False
    evaluations: ClassVar[int] = 0

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return start


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(4)]


def make_mpc() -> Mpc:
    """A planner for 4 episodes."""
    goal = torch.rand(4, 1, 2, generator=torch.Generator().manual_seed(4)) * 2 - 1
    solver = Cem(samples=64, elites=8, iterations=5, sigma=0.4)
    return Mpc(DoubleIntegrator(), solver, GoalDistance(goal, "all"), 5, torch.device("cpu"), torch.float32)


@pytest.fixture
def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = torch.cat([torch.rand(4, 2, generator=generator) * 4 - 2, torch.randn(4, 2, generator=generator)], 1)
    return {"tokens": state[:, None, :2], "proprio": state}


def test_with_an_exact_model_it_arrives_and_stays(problem: dict[str, Tensor]) -> None:
    mpc, plan, distances = make_mpc(), None, []
    assert isinstance(mpc.objective, GoalDistance)
    tokens, proprio = problem["tokens"], problem["proprio"]
    random = generators()
    for _ in range(20):
        belief = mpc.model.observe(mpc.model.start(4), tokens.half(), proprio, None)
        plan = mpc.plan(belief, plan, random)
        assert plan.shape == (4, 5, 4)
        assert plan.abs().max() <= 1
        moved = mpc.model.imagine(mpc.model.observe(belief, tokens, proprio, None), plan[:, None, :1])
        tokens, proprio = moved.latents[:, 0, 0], moved.proprio[:, 0, 0]
        plan = mpc.shift(plan, 1)
        distances.append((tokens - mpc.objective.goal).norm(dim=-1).max().item())
    assert distances[0] > 1
    assert max(distances[-5:]) < 0.3


def test_actions_are_within_the_bounds_of_the_environment(problem: dict[str, Tensor]) -> None:
    bounds = (torch.tensor([-2.0, 0.0, -2.0, 0.0]), torch.tensor([2.0, 0.5, 2.0, 0.5]))
    mpc, seen = replace(make_mpc(), bounds=bounds), []
    belief = mpc.model.observe(mpc.model.start(4), problem["tokens"], problem["proprio"], None)
    imagine = mpc.model.imagine
    mpc.model.imagine = lambda belief, actions, generators: seen.append(actions) or imagine(belief, actions)  # type: ignore
    plan = mpc.plan(belief, None, generators())
    for actions in (plan, *seen):
        assert (actions >= bounds[0]).all()
        assert (actions <= bounds[1]).all()
    assert plan.abs().max() > 1
    first = replace(mpc, solver=NoSearch()).plan(belief, plan, generators())
    torch.testing.assert_close(first, plan)


def test_the_first_guess_is_the_previous_plan_or_zeros(problem: dict[str, Tensor]) -> None:
    mpc = replace(make_mpc(), solver=NoSearch())
    belief = mpc.model.observe(mpc.model.start(4), **problem, previous_action=None)
    assert torch.equal(mpc.plan(belief, None, generators()), torch.zeros(4, 5, 4))
    previous = torch.rand(4, 5, 4)
    assert torch.equal(mpc.plan(belief, previous, generators()), previous)


@pytest.mark.parametrize(("executed", "expected"), [(1, [2, 3, 0]), (2, [3, 0, 0]), (3, [0, 0, 0])])
def test_a_shifted_plan_ends_with_zeros(executed: int, expected: list[int]) -> None:
    plan = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert make_mpc().shift(plan, executed).flatten().tolist() == expected


QUICK: dict[str, dict[str, Any]] = {
    **{name: {"samples": 16, "elites": 4, "iterations": 3} for name in ("cem", "mppi")},
    **{name: {"samples": 16, "elites": 4, "iterations": 3, "frameskip": 5} for name in ("icem", "categorical-cem")},
    "gd": {"steps": 4, "restarts": 5, "optimiser": "adam"},
}
SHAPE = DataShape(tokens=3, token_dim=5, proprio_dim=4, action_dim=10, history=3)


@pytest.fixture(scope="module")
def model(random_model: Callable[[DataShape], Any]) -> Any:
    return random_model(SHAPE)


def imagined(model: Any, solver: str, episodes: slice = slice(None)) -> tuple[Mpc, dict[str, Any]]:
    """A planner with a real model, and the arguments of `plan`: 3 observed frames.

    All in float64: some solvers amplify the rounding of costs a thousandfold, by how much depends on the CPU.
    """
    generator = torch.Generator().manual_seed(1)
    goal, proprio = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 4, generator=generator)
    tokens, seen = torch.randn(4, 3, 3, 5, generator=generator), torch.randn(4, 3, 4, generator=generator)
    past = torch.rand(4, 2, 10, generator=generator) * 2 - 1
    belief = model.start(len(goal[episodes]))
    for t in range(3):
        led = past[episodes, t - 1].double() if t else None
        belief = model.observe(belief, tokens[episodes, t], seen[episodes, t].double(), led)
    arguments: dict[str, Any] = {"belief": belief, "generators": generators()[episodes]}
    arguments["previous"] = torch.zeros(len(goal[episodes]), 2, 10).double()
    objective = GoalDistance(goal[episodes].double(), "all", 0.5, proprio[episodes].double())
    device = torch.device("cpu")
    return Mpc(model, make_solver(solver, **QUICK[solver]), objective, 2, device, torch.float32), arguments


@pytest.mark.parametrize("solver", [*SOLVERS])
def test_a_plan_does_not_depend_on_memory_or_on_other_episodes(
    model: Any, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpc, arguments = imagined(model, solver)
    whole = mpc.plan(**arguments)
    for i in range(4):
        mpc, arguments = imagined(model, solver, slice(i, i + 1))
        torch.testing.assert_close(mpc.plan(**arguments), whole[i : i + 1], atol=1e-9, rtol=0)
    imagine, sizes = model.imagine, []

    def watched(belief: Belief, actions: Tensor, generators: Any) -> Any:
        sizes.append(actions.shape[0] * actions.shape[1])
        return imagine(belief, actions, generators)

    monkeypatch.setattr(model, "imagine", watched)
    for room in (1, 60, 500):
        sizes.clear()
        monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
        mpc, arguments = imagined(model, solver)
        torch.testing.assert_close(mpc.plan(**arguments), whole, atol=1e-9, rtol=0)
        # A future has 3 tokens of 2 imagined frames, and of 2 more that lead there.
        assert max(sizes) <= max(1, room // 12)
        if solver != "gd":  # its backward pass imagines again
            assert max(sizes) > room // 24
            assert sum(sizes) == 4 * mpc.solver.evaluations


def test_gradients_are_those_of_the_actions_alone_and_do_not_depend_on_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpc, arguments = imagined(model, "gd")
    cost = mpc.cost_of(arguments["belief"], generators())
    generator = torch.Generator().manual_seed(2)
    actions = (torch.rand(4, 6, 2, 10, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    assert any(parameter.requires_grad for parameter in model.parameters())
    gradients: list[Tensor] = []
    for room in (2**17, 60):
        monkeypatch.setattr(mpc_module, "TOKENS_IN_FLIGHT", room)
        gradients += torch.autograd.grad(cost(actions).sum(), actions)
        plan = mpc.plan(**arguments)
        assert not plan.requires_grad
        assert plan.any()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-9, rtol=1e-9)


def test_candidates_follow_the_actions_between_observed_frames(model: Any) -> None:
    mpc, arguments = imagined(model, "cem")
    belief = arguments["belief"]
    actions = torch.rand(4, 6, 2, 10, generator=torch.Generator().manual_seed(2)) * 2 - 1
    costs = mpc.cost_of(belief, generators())(actions)
    for episode, sample in itertools.product(range(4), range(6)):
        one = slice(episode, episode + 1)
        tokens, proprio, past = (belief[name][one] for name in ("tokens", "proprio", "actions"))
        future = rollout(model, tokens, proprio, torch.cat([past, actions[one, sample]], 1))
        expected = mpc.objective(future, one)[0, 0]
        torch.testing.assert_close(costs[episode, sample], expected, atol=1e-9, rtol=1e-9)


ALL = slice(None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["last", "all"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_each_candidate_is_compared_with_its_own_episodes_goal(mode: str, alpha: float, masked: bool) -> None:
    latents, proprio = random(2, 3, 4, 5, 6), random(2, 3, 4, 7, seed=1)
    goal, goal_proprio = random(2, 5, 6, seed=2), random(2, 7, seed=3)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    objective = GoalDistance(goal, mode, alpha, goal_proprio, mask=mask if masked else None)
    distance = objective(Imagined(latents, proprio), ALL)
    assert distance.shape == (2, 3)
    scored = {"last": [3], "all": [0, 1, 2, 3]}[mode]
    for episode in range(2):
        tokens = mask[episode] if masked else torch.ones(5).bool()
        for sample in range(3):
            seen = (latents[episode, sample, scored] - goal[episode])[:, tokens].square().mean()
            felt = (proprio[episode, sample, scored] - goal_proprio[episode]).square().mean()
            torch.testing.assert_close(distance[episode, sample], seen + alpha * felt)
    for part in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(objective(Imagined(latents[part], proprio[part]), part), distance[part])


class Ruler:
    """A graph whose distance is how far the first number of a frame is from 10."""

    def __init__(self) -> None:
        self.received: list[tuple[Tensor, Tensor]] = []

    def distance(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        self.received.append((goal, to_goal))
        return 10 - latents[..., 0, 0]


@pytest.mark.parametrize(("mode", "expected"), [("last", [[7.0], [4.0]]), ("all", [[8.0], [5.0]])])
def test_with_a_graph_it_is_the_graphs_distance(mode: str, expected: list[list[float]]) -> None:
    latents = torch.arange(1.0, 7.0).view(2, 1, 3, 1, 1)
    goal, to_goal = random(2, 1, 1), random(2, 8)
    ruler: Any = Ruler()
    objective = GoalDistance(goal, mode, graph=ruler, to_goal=to_goal)
    assert objective(Imagined(latents, torch.zeros(2, 1, 3, 0)), ALL).tolist() == expected
    assert objective(Imagined(latents[1:], torch.zeros(1, 1, 3, 0)), slice(1, 2)).tolist() == expected[1:]
    # Each episode's own goal, and path lengths to it.
    assert torch.equal(ruler.received[1][0], goal[1:])
    assert torch.equal(ruler.received[1][1], to_goal[1:])
