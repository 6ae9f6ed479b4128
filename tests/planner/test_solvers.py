"""The contract of solvers, on costs whose minimum is known; and their registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner.base import Cost
from wmcache.planner.solvers import SOLVERS, make_solver

SHAPE = (3, 4, 2)
THOROUGH: dict[str, dict[str, Any]] = {
    "cem": {"samples": 128, "elites": 12, "iterations": 15, "sigma": 0.6},
    "icem": {"samples": 128, "elites": 12, "iterations": 20, "beta": 0.5},
    "mppi": {"samples": 128, "elites": 32, "iterations": 15},
    "gd": {"optimiser": "adam", "steps": 60, "restarts": 16, "sigma": 1.0},
}
QUICK: dict[str, dict[str, Any]] = {
    **{name: {"samples": 16, "elites": 4, "iterations": 3} for name in ("cem", "icem", "mppi")},
    "gd": {"steps": 3, "restarts": 4, "lr": 0.1},
}
each_solver = pytest.mark.parametrize("name", [*SOLVERS])


def solve(name: str, options: dict[str, Any], cost: Cost, start: Tensor | None = None, seed: int = 0) -> Tensor:
    start = torch.zeros(SHAPE) if start is None else start
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(start))]
    return make_solver(name, **options)(cost, start, generators)


@each_solver
def test_it_finds_the_minimum_of_a_quadratic(name: str, cost: Any, target: Tensor) -> None:
    start = torch.zeros(SHAPE)
    torch.testing.assert_close(solve(name, THOROUGH[name], cost, start), target, atol=0.1, rtol=0)
    assert not start.any()  # it is left as it was


@each_solver
def test_a_minimum_beyond_the_bounds_is_approached_up_to_them(name: str) -> None:
    far = torch.full(SHAPE, 3.0)
    far[..., 1] = -3.0
    found = solve(name, THOROUGH[name], lambda actions: (actions - far[:, None]).square().sum((2, 3)))
    torch.testing.assert_close(found, far.sign(), atol=0.1, rtol=0)
    assert found.abs().max() <= 1


@each_solver
def test_it_leaves_a_local_minimum(name: str) -> None:
    # The valley around -0.5 is higher than the one around 0.5; between them is a ridge.
    def cost(actions: Tensor) -> Tensor:
        middle = actions.mean((2, 3))
        valley = torch.minimum((middle + 0.5).square() + 0.1, (middle - 0.5).square())
        return valley + 0.01 * actions.var((2, 3))

    found = solve(name, THOROUGH[name], cost, torch.full((3, 1, 2), -0.4))
    torch.testing.assert_close(found.mean((1, 2)), torch.full((3,), 0.5), atol=0.1, rtol=0)


@each_solver
def test_candidates_are_within_the_bounds_and_counted(name: str, cost: Any) -> None:
    options = {**QUICK[name], "sigma": 5.0}
    found = solve(name, options, cost, torch.full(SHAPE, 0.9))
    assert all(actions.shape == (3, actions.shape[1], 4, 2) for actions in cost.actions)
    assert torch.cat(cost.actions, 1).abs().max() <= 1
    assert found.shape == SHAPE
    assert found.abs().max() <= 1
    assert make_solver(name, **options).evaluations == sum(actions.shape[1] for actions in cost.actions)


@each_solver
def test_the_start_is_the_first_candidate(name: str, cost: Any, target: Tensor) -> None:
    solve(name, QUICK[name], cost, target)
    assert torch.equal(cost.actions[0][:, 0].detach(), target)


@each_solver
def test_an_episode_does_not_depend_on_the_others(name: str, cost: Any, target: Tensor) -> None:
    together = solve(name, QUICK[name], cost)
    for i in range(3):
        one = target[i : i + 1, None]
        alone = solve(
            name, QUICK[name], lambda a, one=one: (a - one).square().sum((2, 3)), torch.zeros(1, *SHAPE[1:]), seed=i
        )
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-6, rtol=0)


@each_solver
def test_the_result_depends_on_the_generators_alone(name: str, cost: Any) -> None:
    first, state = solve(name, QUICK[name], cost), torch.get_rng_state()
    assert torch.equal(first, solve(name, QUICK[name], cost))
    assert not torch.equal(first, solve(name, QUICK[name], cost, seed=1))
    assert torch.equal(state, torch.get_rng_state())


@each_solver
def test_costs_that_are_nan_do_not_spread(name: str, cost: Any) -> None:
    found = solve(name, QUICK[name], lambda actions: cost(actions).where(actions[:, :, 0, 0] < 0.3, torch.nan))
    assert found.isfinite().all()


@each_solver
def test_only_a_solver_that_differentiates_needs_autograd(name: str, cost: Any) -> None:
    differentiates = make_solver(name).differentiates
    with torch.no_grad():
        found = solve(name, QUICK[name], cost)
    assert cost.actions[0].requires_grad == differentiates
    if not differentiates:
        with torch.inference_mode():
            inferred = solve(name, QUICK[name], cost)
        assert torch.equal(inferred, found)


@each_solver
def test_options_are_checked_by_name(name: str) -> None:
    assert make_solver(name) == SOLVERS.get(name)()
    # These are attributes, but not options.
    with pytest.raises(UserError, match="evaluations, speed"):
        make_solver(name, sigma=0.5, evaluations=3, speed=1)


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"newton.*cem, gd, icem, mppi"):
        make_solver("newton")


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("cem", {"elites": 1}, "elites is 1"),
        ("cem", {"samples": 8, "elites": 9}, "elites is 9.* 8"),
        ("cem", {"iterations": 0}, "iterations is 0"),
        ("cem", {"sigma": 0.0}, "sigma is 0.0"),
        ("cem", {"sigma": float("nan")}, "sigma is nan"),
        ("cem", {"momentum": 1.0}, "momentum is 1.0"),
        ("icem", {"samples": 8, "elites": 5}, "elites is 5.* 4"),
        ("icem", {"beta": -1.0}, "beta is -1.0"),
        ("icem", {"frameskip": 0}, "frameskip is 0"),
        ("icem", {"decay": 0.5}, "decay is 0.5"),
        ("icem", {"keep": 1.5}, "keep is 1.5"),
        ("icem", {"momentum": -0.1}, "momentum is -0.1"),
        ("mppi", {"temperature": -1.0}, "temperature is -1.0"),
        ("mppi", {"elites": 600}, "elites is 600.* 512"),
        ("mppi", {"min_sigma": 0.9}, "min_sigma is 0.9.* 0.6"),
        ("gd", {"optimiser": "lbfgs"}, "optimiser is 'lbfgs'.*'sgd'.*'adam'"),
        ("gd", {"steps": 0}, "steps is 0"),
        ("gd", {"restarts": 0}, "restarts is 0"),
        ("gd", {"lr": 0.0}, "lr is 0.0"),
        ("gd", {"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_invalid_values_are_refused(name: str, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=f"solver {name}: {wrong}"):
        make_solver(name, **options)
