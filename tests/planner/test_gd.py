"""Gradient descent: steps that can be written down, and gradients through a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wmcache.planner.base import Cost
from wmcache.planner.gd import Gd

SHAPE = (3, 4, 2)


def generators(episodes: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(episodes)]


def squared_distance_to(target: Tensor) -> Cost:
    return lambda actions: (actions - target[:, None]).square().sum((2, 3))


@pytest.fixture
def target() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(2), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def test_a_step_is_that_of_the_reference(target: Tensor) -> None:
    # The reference's loop, for one step: mean over instances times their number, plain SGD, then noise.
    start = torch.full(SHAPE, 0.1)
    actions = start.clone().requires_grad_()
    loss = squared_distance_to(target)(actions[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(loss.mean() * len(loss), actions)
    random = generators()
    for generator in random:  # the offsets of the restarts
        torch.randn(1, *SHAPE[1:], generator=generator)
    noise = torch.stack([torch.randn(SHAPE[1:], generator=generator) for generator in random])
    expected = (actions - 0.05 * gradient + 0.003 * noise).detach()
    found = Gd(steps=1, lr=0.05, optimiser="sgd", restarts=1)(squared_distance_to(target), start, generators())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_steps_end_at_the_bounds() -> None:
    found = Gd(steps=1, lr=100.0, optimiser="sgd", noise=0.0)(lambda a: a.sum((2, 3)), torch.zeros(SHAPE), generators())
    assert torch.equal(found, torch.full(SHAPE, -1.0))


def test_it_leaves_the_bound_again(target: Tensor) -> None:
    found = Gd(steps=50, lr=0.1, optimiser="sgd", noise=0.0, restarts=1)(
        squared_distance_to(target), torch.ones(SHAPE), generators()
    )
    torch.testing.assert_close(found, target, atol=0.01, rtol=0)


def test_it_returns_the_best_that_it_saw_not_the_last(target: Tensor) -> None:
    # A step of 1 on a parabola jumps to the other side, and never arrives.
    cost, start = squared_distance_to(target), target + 0.05
    found = Gd(steps=5, lr=1.2, optimiser="sgd", noise=0.0, restarts=1)(cost, start, generators())
    assert torch.equal(found, start)


def test_the_best_restart_wins_in_each_episode_alone() -> None:
    # Only from above 0.5 is there anything to descend.
    def cost(actions: Tensor) -> Tensor:
        first = actions[:, :, 0, 0]
        return torch.where(first > 0.5, -first, 0.0 * first)

    start = torch.zeros(SHAPE)
    one = Gd(steps=20, lr=0.1, optimiser="sgd", restarts=1)(cost, start, generators())
    many = Gd(steps=20, lr=0.1, optimiser="sgd", restarts=32)(cost, start, generators())
    assert (one[:, 0, 0] < 0.5).all()
    assert (many[:, 0, 0] == 1).all()


def test_more_restarts_do_not_change_the_first(target: Tensor) -> None:
    asked: list[Tensor] = []

    def cost(actions: Tensor) -> Tensor:
        asked.append(actions.detach().clone())
        return squared_distance_to(target)(actions)

    for restarts in (1, 4):
        Gd(steps=4, lr=0.1, optimiser="sgd", noise=0.0, restarts=restarts)(cost, torch.zeros(SHAPE), generators())
    for alone, among in zip(asked[:5], asked[5:], strict=True):
        torch.testing.assert_close(alone[:, 0], among[:, 0])
    assert [actions.shape for actions in asked] == [(3, 1, 4, 2)] * 5 + [(3, 4, 4, 2)] * 5


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_it_descends_through_a_network_and_leaves_it_alone(network: nn.Module, optimiser: str) -> None:
    goal: Tensor = network(torch.full((3, 1, *SHAPE[1:]), 0.5)).detach()

    def cost(actions: Tensor) -> Tensor:
        imagined: Tensor = network(actions)
        return (imagined - goal).square().mean(2)

    before = {name: value.clone() for name, value in network.state_dict().items()}
    start = torch.zeros(SHAPE)
    found = Gd(steps=50, optimiser=optimiser)(cost, start, generators())
    assert (cost(found[:, None]) < 0.05 * cost(start[:, None])).all()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not found.requires_grad


def test_adam_does_not_depend_on_the_units_of_the_cost(target: Tensor) -> None:
    solver, start = Gd(steps=10, optimiser="adam", noise=0.0), torch.zeros(SHAPE)
    found = solver(squared_distance_to(target), start, generators())
    scaled = solver(lambda a: 100 * squared_distance_to(target)(a), start, generators())
    torch.testing.assert_close(found, scaled, atol=1e-4, rtol=0)
