"""The improved cross-entropy method: what it adds to the plain one, each part alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner.base import Cost
from wmcache.planner.icem import Icem, coloured

SHAPE = (3, 4, 2)


def generators(episodes: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(episodes)]


def squared_distance_to(target: Tensor) -> Cost:
    return lambda actions: (actions - target[:, None]).square().sum((2, 3))


@pytest.fixture
def target() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


@pytest.fixture
def white() -> Tensor:
    return torch.randn(1, 4000, 25, 2, generator=torch.Generator().manual_seed(0))


class Watched:
    """A cost that remembers what it was asked."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.asked: list[Tensor] = []

    def __call__(self, actions: Tensor) -> Tensor:
        self.asked.append(actions)
        return self.cost(actions)


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_each_iteration_has_fewer_candidates_but_twice_the_elites(target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    solver = Icem(samples=40, elites=8, iterations=6, decay=1.5)
    solver(cost, torch.zeros(SHAPE), generators())
    assert [actions.shape[1] for actions in cost.asked] == [40, 26, 17, 16, 16, 16]
    assert solver.populations == [40, 26, 17, 16, 16, 16]
    assert solver.evaluations == 131


def test_it_returns_the_best_that_it_saw(target: Tensor) -> None:
    cost = Watched(squared_distance_to(target))
    found = Icem(samples=20, elites=4, iterations=3, keep=0.0)(cost, torch.zeros(SHAPE), generators())
    lowest = torch.cat([cost.cost(actions) for actions in cost.asked], 1).amin(1)
    assert torch.equal(cost.cost(found[:, None])[:, 0], lowest)


def test_the_mean_is_a_candidate_first_and_last_only() -> None:
    # The first two are always the elites, so the next mean is known: theirs.
    cost = Watched(lambda actions: torch.arange(actions.shape[1]).float().expand(actions.shape[:2]))
    start = torch.full(SHAPE, 0.1)
    Icem(samples=8, elites=2, iterations=3, momentum=0.0, keep=0.0, decay=1.0)(cost, start, generators())
    means = [start, *(actions[:, :2].mean(1) for actions in cost.asked)]
    present = [torch.allclose(actions[:, 0], mean) for actions, mean in zip(cost.asked, means, strict=False)]
    assert present == [True, False, True]


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_kept_elites_go_on_without_being_asked_for_again(keep: float) -> None:
    # Later candidates are never as good as those of the first iteration, so the kept ones are always elites.
    calls = []

    def cost(actions: Tensor) -> Tensor:
        calls.append(actions)
        return (actions - 0.5).square().sum((2, 3)) + 1000.0 * (len(calls) > 1)

    Icem(samples=64, elites=8, iterations=3, keep=keep, momentum=0.0, decay=1.0, sigma=0.3)(
        cost, torch.zeros(SHAPE), generators()
    )
    assert [actions.shape[1] for actions in calls] == [64, 64, 64]
    first = (calls[0] - 0.5).square().sum((2, 3)).argsort(1)[:, :4]
    second = (calls[1] - 0.5).square().sum((2, 3)).argsort(1)[:, : 8 if keep == 0.0 else 4]
    elites = torch.take_along_dim(calls[1], second[:, :, None, None], 1)
    if keep:
        elites = torch.cat([elites, torch.take_along_dim(calls[0], first[:, :, None, None], 1)], 1)
    # The mean is the first candidate of the last iteration.
    torch.testing.assert_close(calls[2][:, 0], elites.mean(1))


def test_momentum_keeps_a_share_of_the_last_mean(target: Tensor) -> None:
    cost, start = Watched(squared_distance_to(target)), torch.full(SHAPE, 0.2)
    Icem(samples=16, elites=4, iterations=2, momentum=0.25, beta=0.0)(cost, start, generators())
    best = cost.cost(cost.asked[0]).argsort(1)[:, :4]
    fitted = torch.take_along_dim(cost.asked[0], best[:, :, None, None], 1).mean(1)
    torch.testing.assert_close(cost.asked[1][:, 0], 0.25 * start + 0.75 * fitted)


def test_noise_without_colour_is_left_as_it_is(white: Tensor) -> None:
    torch.testing.assert_close(coloured(white, 0.0), white, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 24, 25])
def test_noise_has_unit_variance_at_every_time_whatever_its_colour(white: Tensor, beta: float, steps: int) -> None:
    noise = coloured(white[:, :, :steps], beta)
    assert noise.shape == (1, 4000, steps, 2)
    torch.testing.assert_close(noise.var((0, 1, 3)), torch.ones(steps), atol=0.1, rtol=0)
    torch.testing.assert_close(noise.mean((0, 1, 3)), torch.zeros(steps), atol=0.05, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_its_power_falls_with_the_frequency_to_the_beta(white: Tensor, beta: float) -> None:
    power = torch.fft.rfft(coloured(white, beta), dim=2).abs().square().mean((0, 1, 3))[1:]
    frequency = torch.fft.rfftfreq(25)[1:]
    slope = torch.linalg.lstsq(torch.stack([frequency.log(), torch.ones(12)], 1), power.log()[:, None]).solution[0]
    assert slope.item() == pytest.approx(-beta, abs=0.05)


def test_the_colour_runs_over_the_frames_of_model_steps() -> None:
    # Frame by frame: x and y of the first env action, x and y of the second, and so on.
    cost = Watched(lambda actions: actions.sum((2, 3)))
    Icem(samples=2000, elites=2, iterations=1, beta=2.0, frameskip=5, sigma=0.2)(
        cost, torch.zeros(3, 4, 10), generators()
    )
    (actions,) = cost.asked
    x_to_next_frame = correlation(actions[:, 1:, 1, 0], actions[:, 1:, 1, 2])
    last_to_first_of_next = correlation(actions[:, 1:, 1, 8], actions[:, 1:, 2, 0])
    x_to_y = correlation(actions[:, 1:, 1, 0], actions[:, 1:, 1, 1])
    assert x_to_next_frame > 0.8
    assert last_to_first_of_next == pytest.approx(x_to_next_frame, abs=0.05)
    assert abs(x_to_y) < 0.05


def test_a_frameskip_that_does_not_fit_the_actions_is_refused() -> None:
    with pytest.raises(UserError, match="frameskip is 3; it must divide the 2 numbers of a model step"):
        Icem(frameskip=3)(lambda actions: actions.sum((2, 3)), torch.zeros(SHAPE), generators())
