"""Path integral control: its weights, and that they know no units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wmcache.planner.base import Cost
from wmcache.planner.mppi import Mppi

SHAPE = (3, 4, 2)


def generators(episodes: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(episodes)]


def squared_distance_to(target: Tensor) -> Cost:
    return lambda actions: (actions - target[:, None]).square().sum((2, 3))


@pytest.fixture
def target() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


class Watched:
    """A cost that remembers candidates and costs of its first call."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.actions, self.costs = torch.empty(0), torch.empty(0)

    def __call__(self, actions: Tensor) -> Tensor:
        costs = self.cost(actions)
        if not len(self.actions):
            self.actions, self.costs = actions, costs
        return costs


def test_the_mean_is_the_elites_weighed_by_their_cost(target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    found = Mppi(samples=12, elites=5, iterations=1, temperature=2.0)(cost, torch.zeros(SHAPE), generators())
    for i in range(3):
        order = cost.costs[i].argsort()[:5]
        excess = cost.costs[i][order] - cost.costs[i].min()
        weights = torch.exp(-2.0 * excess / excess.mean())
        expected = torch.einsum("s,sta->ta", weights / weights.sum(), cost.actions[i][order])
        torch.testing.assert_close(found[i], expected)


def test_at_temperature_0_all_elites_weigh_alike(target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    found = Mppi(samples=12, elites=5, iterations=1, temperature=0.0)(cost, torch.zeros(SHAPE), generators())
    for i in range(3):
        torch.testing.assert_close(found[i], cost.actions[i][cost.costs[i].argsort()[:5]].mean(0))


def test_at_a_high_temperature_the_best_decides(target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    found = Mppi(samples=12, elites=5, iterations=1, temperature=1e4)(cost, torch.zeros(SHAPE), generators())
    for i in range(3):
        torch.testing.assert_close(found[i], cost.actions[i][cost.costs[i].argmin()])


@pytest.mark.parametrize(("factor", "offset"), [(1e-3, 0.0), (1e4, 0.0), (1.0, 5.0)])
def test_units_and_zero_of_the_cost_do_not_matter(target: Tensor, factor: float, offset: float) -> None:
    solver, cost = Mppi(samples=32, elites=8, iterations=4), squared_distance_to(target)
    found = solver(cost, torch.zeros(SHAPE), generators())
    other = solver(lambda actions: factor * cost(actions) + offset, torch.zeros(SHAPE), generators())
    torch.testing.assert_close(found, other, atol=1e-3, rtol=0)


def test_an_episode_whose_costs_are_all_the_same_is_no_division_by_zero() -> None:
    found = Mppi(samples=12, elites=5, iterations=3)(
        lambda actions: torch.zeros(actions.shape[:2]), torch.zeros(SHAPE), generators()
    )
    assert found.isfinite().all()


def test_the_deviation_stays_between_its_bounds(target: Tensor) -> None:
    spreads = []

    def cost(actions: Tensor) -> Tensor:
        spreads.append(actions[:, 1:].std(1).mean())
        return squared_distance_to(target)(actions)

    Mppi(samples=256, elites=32, iterations=12, sigma=0.2, min_sigma=0.1)(cost, torch.zeros(SHAPE), generators())
    assert spreads[0] == pytest.approx(0.2, rel=0.1)
    assert spreads[-1] == pytest.approx(0.1, rel=0.1)
    assert max(spreads) < 0.22
