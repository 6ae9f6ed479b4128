"""The cross-entropy method, on costs whose minimum is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wmcache.planner.cem import Cem, Cost

SHAPE = (3, 4, 2)


def generators(episodes: int = SHAPE[0], seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(episodes)]


def squared_distance_to(target: Tensor) -> Cost:
    return lambda actions: (actions - target[:, None]).square().sum((2, 3))


@pytest.fixture
def target() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


def test_it_finds_the_minimum_of_a_quadratic(target: Tensor) -> None:
    found = Cem(samples=128, elites=12, iterations=15, sigma=0.6)(
        squared_distance_to(target), torch.zeros(SHAPE), generators()
    )
    torch.testing.assert_close(found, target, atol=0.05, rtol=0)


def test_it_goes_to_the_bound_where_the_minimum_lies_beyond_it() -> None:
    far = torch.full(SHAPE, 3.0)
    far[..., 1] = -3.0
    found = Cem(samples=128, elites=12, iterations=15)(squared_distance_to(far), torch.zeros(SHAPE), generators())
    torch.testing.assert_close(found, far.sign(), atol=0.05, rtol=0)
    assert found.abs().max() <= 1


def test_it_only_asks_for_the_cost_of_what_the_env_can_do(target: Tensor) -> None:
    asked = []

    def cost(actions: Tensor) -> Tensor:
        asked.append(actions)
        return squared_distance_to(target)(actions)

    Cem(samples=16, elites=4, iterations=3, sigma=5.0)(cost, torch.full(SHAPE, 0.9), generators())
    assert [actions.shape for actions in asked] == [(3, 16, 4, 2)] * 3
    assert torch.cat(asked).abs().max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_it_improves_on_its_start(target: Tensor, seed: int) -> None:
    cost, start = squared_distance_to(target), torch.zeros(SHAPE)
    found = Cem(samples=32, elites=4, iterations=3)(cost, start, generators(seed=10 * seed))
    assert (cost(found[:, None]) < cost(start[:, None])).all()
    assert not start.any()


def test_a_good_start_is_not_lost(target: Tensor) -> None:
    # The only candidate that is any good is the start itself, so the search must have scored it.
    def cost(actions: Tensor) -> Tensor:
        return 1 - (actions == target[:, None]).all(3).all(2).float()

    best = []

    def watched(actions: Tensor) -> Tensor:
        best.append(cost(actions).amin(1))
        return cost(actions)

    Cem(samples=8, elites=2, iterations=1)(watched, target, generators())
    assert not best[0].any()


def test_an_episode_does_not_depend_on_its_neighbours(target: Tensor) -> None:
    solve = Cem(samples=16, elites=4, iterations=3)
    together = solve(squared_distance_to(target), torch.zeros(SHAPE), generators())
    for i in range(3):
        alone = solve(squared_distance_to(target[i : i + 1]), torch.zeros(1, *SHAPE[1:]), generators()[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])


def test_the_seed_decides(target: Tensor) -> None:
    solve, cost, start = Cem(samples=16, elites=4, iterations=3), squared_distance_to(target), torch.zeros(SHAPE)
    first = solve(cost, start, generators())
    assert torch.equal(first, solve(cost, start, generators()))
    assert not torch.equal(first, solve(cost, start, generators(seed=1)))


def test_momentum_keeps_a_share_of_the_last_mean(target: Tensor) -> None:
    cost, start = squared_distance_to(target), torch.full(SHAPE, 0.2)
    fitted = Cem(samples=16, elites=4, iterations=1)(cost, start, generators())
    found = Cem(samples=16, elites=4, iterations=1, momentum=0.15)(cost, start, generators())
    torch.testing.assert_close(found, 0.15 * start + 0.85 * fitted)


def test_momentum_keeps_a_share_of_the_last_deviation(target: Tensor) -> None:
    spreads: dict[float, list[Tensor]] = {0.0: [], 0.5: []}
    for momentum, spread in spreads.items():

        def cost(actions: Tensor, spread: list[Tensor] = spread) -> Tensor:
            spread.append(actions[:, 1:].std(1).mean())
            return squared_distance_to(target)(actions)

        Cem(samples=64, elites=8, iterations=4, sigma=0.3, momentum=momentum)(cost, torch.zeros(SHAPE), generators())
    assert spreads[0.5][0] == spreads[0.0][0]
    assert spreads[0.5][3] > 1.3 * spreads[0.0][3]
