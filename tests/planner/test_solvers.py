"""What every solver promises, on costs whose minimum is known; and the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner.solvers import SOLVERS, Cost, Solver, make_solver

SHAPE = (3, 4, 2)

THOROUGH: dict[str, dict[str, Any]] = {
    "cem": {"samples": 128, "elites": 12, "iterations": 15, "sigma": 0.6},
    "icem": {"samples": 128, "elites": 12, "iterations": 20, "beta": 0.5},
    "mppi": {"samples": 128, "elites": 32, "iterations": 15},
    "gd": {"optimiser": "adam", "steps": 60, "restarts": 16, "sigma": 1.0},
}
QUICK: dict[str, dict[str, Any]] = {
    "cem": {"samples": 16, "elites": 4, "iterations": 3},
    "icem": {"samples": 16, "elites": 4, "iterations": 3},
    "mppi": {"samples": 16, "elites": 8, "iterations": 3},
    "gd": {"steps": 3, "restarts": 4, "lr": 0.1},
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def generators(episodes: int = SHAPE[0], seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(episodes)]


def squared_distance_to(target: Tensor) -> Cost:
    return lambda actions: (actions - target[:, None]).square().sum((2, 3))


class Watched:
    """A cost that remembers what it was asked."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.asked: list[Tensor] = []

    def __call__(self, actions: Tensor) -> Tensor:
        self.asked.append(actions.detach().clone().requires_grad_(actions.requires_grad))
        return self.cost(actions)


@pytest.fixture
def target() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


def solve(solver: Solver, cost: Cost, start: Tensor | None = None, seed: int = 0) -> Tensor:
    return solver(cost, torch.zeros(SHAPE) if start is None else start, generators(seed=seed))


@each_solver
def test_it_finds_the_minimum_of_a_quadratic(name: str, target: Tensor) -> None:
    found = solve(make_solver(name, **THOROUGH[name]), squared_distance_to(target))
    torch.testing.assert_close(found, target, atol=0.1, rtol=0)


@each_solver
def test_it_goes_to_the_bound_where_the_minimum_lies_beyond_it(name: str) -> None:
    far = torch.full(SHAPE, 3.0)
    far[..., 1] = -3.0
    found = solve(make_solver(name, **THOROUGH[name]), squared_distance_to(far))
    torch.testing.assert_close(found, far.sign(), atol=0.1, rtol=0)
    assert found.abs().max() <= 1


@each_solver
def test_it_leaves_the_lesser_of_two_basins(name: str) -> None:
    # The bottom of the valley around -0.5 lies above that of the one around 0.5; between them is a ridge.
    def cost(actions: Tensor) -> Tensor:
        middle = actions.mean((2, 3))
        valley = torch.minimum((middle + 0.5).square() + 0.1, (middle - 0.5).square())
        return valley + 0.01 * actions.var((2, 3))

    start = torch.full((3, 1, 2), -0.4)
    found = solve(make_solver(name, **THOROUGH[name]), cost, start)
    torch.testing.assert_close(found.mean((1, 2)), torch.full((3,), 0.5), atol=0.1, rtol=0)


@each_solver
def test_it_only_asks_for_the_cost_of_what_the_env_can_do(name: str, target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    found = solve(make_solver(name, **QUICK[name], sigma=5.0), cost, torch.full(SHAPE, 0.9))
    assert all(actions.shape == (3, actions.shape[1], 4, 2) for actions in cost.asked)
    assert torch.cat(cost.asked, 1).abs().max() <= 1
    assert found.shape == SHAPE
    assert found.abs().max() <= 1


@each_solver
def test_it_counts_its_evaluations(name: str, target: Tensor) -> None:
    cost, solver = Watched(squared_distance_to(target)), make_solver(name, **QUICK[name])
    solve(solver, cost)
    assert solver.evaluations == sum(actions.shape[1] for actions in cost.asked)


@each_solver
@pytest.mark.parametrize("seed", range(3))
def test_it_improves_on_its_start(name: str, target: Tensor, seed: int) -> None:
    cost, start = squared_distance_to(target), torch.zeros(SHAPE)
    found = solve(make_solver(name, **QUICK[name]), cost, start, 10 * seed)
    assert (cost(found[:, None]) < cost(start[:, None])).all()
    assert not start.any()


@each_solver
def test_the_start_itself_is_a_candidate(name: str, target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    solve(make_solver(name, **QUICK[name]), cost, target)
    assert torch.equal(cost.asked[0][:, 0].detach(), target)


@each_solver
def test_an_episode_does_not_depend_on_its_neighbours(name: str, target: Tensor) -> None:
    solver = make_solver(name, **QUICK[name])
    together = solve(solver, squared_distance_to(target))
    for i in range(3):
        alone = solver(squared_distance_to(target[i : i + 1]), torch.zeros(1, *SHAPE[1:]), generators()[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-6, rtol=0)


@each_solver
def test_the_generators_decide_and_nothing_else(name: str, target: Tensor) -> None:
    solver, cost = make_solver(name, **QUICK[name]), squared_distance_to(target)
    first, state = solve(solver, cost), torch.get_rng_state()
    assert torch.equal(first, solve(solver, cost))
    assert not torch.equal(first, solve(solver, cost, seed=1))
    assert torch.equal(state, torch.get_rng_state())


@each_solver
def test_costs_that_are_not_numbers_do_not_spread(name: str, target: Tensor) -> None:
    def cost(actions: Tensor) -> Tensor:
        return squared_distance_to(target)(actions).where(actions[:, :, 0, 0] < 0.3, torch.nan)

    found = solve(make_solver(name, **QUICK[name]), cost)
    assert found.isfinite().all()


@each_solver
def test_it_says_whether_costs_must_carry_gradients(name: str, target: Tensor) -> None:
    cost, solver = Watched(squared_distance_to(target)), make_solver(name, **QUICK[name])
    with torch.no_grad():
        solve(solver, cost)
    assert cost.asked[0].requires_grad == solver.differentiates


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.differentiates])
def test_the_others_work_in_inference_mode(name: str, target: Tensor) -> None:
    solver, cost = make_solver(name, **QUICK[name]), squared_distance_to(target)
    with torch.inference_mode():
        inferred = solve(solver, cost)
    assert torch.equal(inferred, solve(solver, cost))


@each_solver
def test_a_solver_needs_no_options(name: str) -> None:
    assert make_solver(name) == SOLVERS[name]()


def test_an_unknown_solver_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no solver 'newton'; known are cem, icem, mppi, gd"):
        make_solver("newton")


@each_solver
def test_an_unknown_option_is_refused_with_those_there_are(name: str) -> None:
    # evaluations and differentiates are attributes, but nothing to choose.
    with pytest.raises(UserError, match=rf"solver {name} has no option evaluations, speed; it has .*sigma"):
        make_solver(name, sigma=0.5, evaluations=3, speed=1)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("cem", {"elites": 1}, "elites is 1"),
        ("cem", {"samples": 8, "elites": 9}, "elites is 9; it must lie between 2 and samples, 8"),
        ("cem", {"iterations": 0}, "iterations is 0"),
        ("cem", {"sigma": 0.0}, "sigma is 0.0"),
        ("cem", {"sigma": float("nan")}, "sigma is nan"),
        ("cem", {"momentum": 1.0}, "momentum is 1.0"),
        ("icem", {"samples": 8, "elites": 5}, "elites is 5; it must be at most half of samples, 4"),
        ("icem", {"beta": -1.0}, "beta is -1.0"),
        ("icem", {"frameskip": 0}, "frameskip is 0"),
        ("icem", {"decay": 0.5}, "decay is 0.5"),
        ("icem", {"keep": 1.5}, "keep is 1.5"),
        ("icem", {"momentum": -0.1}, "momentum is -0.1"),
        ("mppi", {"temperature": -1.0}, "temperature is -1.0"),
        ("mppi", {"min_sigma": 0.9}, "min_sigma is 0.9; it must lie between 0 and sigma, 0.6"),
        ("gd", {"optimiser": "lbfgs"}, "no optimiser 'lbfgs'; known are sgd, adam"),
        ("gd", {"steps": 0}, "steps is 0"),
        ("gd", {"restarts": 0}, "restarts is 0"),
        ("gd", {"lr": 0.0}, "lr is 0.0"),
        ("gd", {"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_values_that_do_not_fit_are_refused(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"solver {name}: {complaint}"):
        make_solver(name, **options)
