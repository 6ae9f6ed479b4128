"""Solvers: their contract, on costs whose minimum is known, their registry, and their parts against a calculation by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner.base import Cost
from wmcache.planner.solvers import SOLVERS, make_solver
from wmcache.planner.solvers.cem import Cem
from wmcache.planner.solvers.gd import Gd
from wmcache.planner.solvers.icem import Icem, coloured
from wmcache.planner.solvers.mppi import Mppi

from .conftest import Recorded

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
each_solver = pytest.mark.parametrize("name", [name for name in SOLVERS if name != "categorical-cem"])


def generators(seed: int = 0, count: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def solve(name: str, options: dict[str, Any], cost: Cost, start: Tensor | None = None, seed: int = 0) -> Tensor:
    start = torch.zeros(SHAPE) if start is None else start
    return make_solver(name, **options)(cost, start, generators(seed, len(start)))


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


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("icem", {"samples": 8, "elites": 5}, "elites is 5.* 4"),
        ("icem", {"decay": 0.5}, "decay is 0.5"),
        ("mppi", {"min_sigma": 0.9}, "min_sigma is 0.9.* 0.6"),
        ("gd", {"optimiser": "lbfgs"}, "optimiser is 'lbfgs'.*'sgd'.*'adam'"),
    ],
)
def test_invalid_values_are_refused(name: str, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=f"solver {name}: {wrong}"):
        make_solver(name, **options)


def zeros() -> Tensor:
    return torch.zeros(SHAPE)


def test_cems_momentum_keeps_a_share_of_the_last_mean(cost: Any) -> None:
    start = torch.full(SHAPE, 0.2)
    fitted = Cem(samples=16, elites=4, iterations=1)(cost, start, generators())
    found = Cem(samples=16, elites=4, iterations=1, momentum=0.15)(cost, start, generators())
    torch.testing.assert_close(found, 0.15 * start + 0.85 * fitted)


@pytest.mark.parametrize("maxnorm", [0.05, 1.0])
def test_cems_candidates_stay_in_the_ball_of_its_maxnorm(cost: Any, maxnorm: float) -> None:
    found = Cem(samples=16, elites=4, iterations=3, sigma=3.0, maxnorm=maxnorm)(cost, zeros(), generators())
    assert {float(actions.abs().max()) for actions in cost.actions} == {torch.tensor(maxnorm).item()}
    assert found.abs().max() <= maxnorm
    assert all((actions[:, 0].abs() <= maxnorm).all() for actions in cost.actions)


class TestMppi:
    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_the_mean_weights_the_elites_by_their_cost(self, cost: Any, temperature: float) -> None:
        found = Mppi(samples=12, elites=5, iterations=1, temperature=temperature)(cost, zeros(), generators())
        for i, (actions, costs) in enumerate(zip(cost.actions[0], cost.costs[0], strict=True)):
            order = costs.argsort()[:5]
            excess = costs[order] - costs.min()
            weights = torch.exp(-temperature * excess / excess.mean())
            torch.testing.assert_close(found[i], torch.einsum("s,sta->ta", weights / weights.sum(), actions[order]))

    def test_units_and_zero_of_the_cost_do_not_matter(self, cost: Any) -> None:
        solver = Mppi(samples=32, elites=8, iterations=4)
        found = solver(cost, zeros(), generators())
        for factor, offset in ((1e-3, 0.0), (1e4, 0.0), (1.0, 5.0)):
            other = solver(lambda a, f=factor, o=offset: f * cost(a) + o, zeros(), generators())
            torch.testing.assert_close(found, other, atol=1e-3, rtol=0)
        assert solver(lambda a: a.new_zeros(a.shape[:2]), zeros(), generators()).isfinite().all()  # no division by zero

    def test_the_deviation_is_between_its_bounds(self, cost: Any) -> None:
        Mppi(samples=256, elites=32, iterations=12, sigma=0.2, min_sigma=0.1)(cost, zeros(), generators())
        spreads = [actions[:, 1:].std(1).mean() for actions in cost.actions]
        assert spreads[0] == pytest.approx(0.2, rel=0.1)
        assert spreads[-1] == pytest.approx(0.1, rel=0.1)
        assert max(spreads) < 0.22


class TestGd:
    def test_a_step_is_that_of_the_reference(self, cost: Any) -> None:
        # The reference's loop: mean over instances times their number, plain SGD, then noise.
        start = torch.full(SHAPE, 0.1)
        actions = start.clone().requires_grad_()
        loss = cost(actions[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(loss.mean() * len(loss), actions)
        random = generators()
        for generator in random:  # the offsets of the restarts
            torch.randn(1, *SHAPE[1:], generator=generator)
        noise = torch.stack([torch.randn(SHAPE[1:], generator=generator) for generator in random])
        expected = (actions - 0.05 * gradient + 0.003 * noise).detach()
        found = Gd(steps=1, lr=0.05, optimiser="sgd", restarts=1)(cost, start, generators())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    def test_it_stops_at_a_bound_and_leaves_it_again(self, cost: Any, target: Tensor) -> None:
        solver = Gd(steps=1, lr=100.0, optimiser="sgd", noise=0.0)
        assert torch.equal(solver(lambda a: a.sum((2, 3)), zeros(), generators()), torch.full(SHAPE, -1.0))
        solver = Gd(steps=50, lr=0.1, optimiser="sgd", noise=0.0, restarts=1)
        torch.testing.assert_close(solver(cost, torch.ones(SHAPE), generators()), target, atol=0.01, rtol=0)

    def test_it_returns_the_best_candidate_and_not_the_last(self, cost: Any, target: Tensor) -> None:
        # This learning rate jumps over the minimum of a parabola at each step.
        start = target + 0.05
        found = Gd(steps=5, lr=1.2, optimiser="sgd", noise=0.0, restarts=1)(cost, start, generators())
        assert torch.equal(found, start)


class TestIcem:
    def test_each_iteration_has_fewer_candidates_but_twice_the_elites(self, cost: Any) -> None:
        solver = Icem(samples=40, elites=8, iterations=6, decay=1.5)
        solver(cost, zeros(), generators())
        assert [actions.shape[1] for actions in cost.actions] == solver.populations == [40, 26, 17, 16, 16, 16]
        assert solver.evaluations == 131

    def test_it_returns_the_best_candidate(self, cost: Any) -> None:
        found = Icem(samples=20, elites=4, iterations=3, keep=0.0)(cost, zeros(), generators())
        lowest = torch.cat(cost.costs, 1).amin(1)
        assert torch.equal(cost(found[:, None])[:, 0], lowest)

    def test_the_mean_is_a_candidate_of_the_first_and_last_iteration(self, cost: Any) -> None:
        # The first two candidates are always the elites, and the next mean is their mean.
        cost.cost = lambda actions: torch.arange(actions.shape[1]).float().expand(actions.shape[:2])
        start = torch.full(SHAPE, 0.1)
        Icem(samples=8, elites=2, iterations=3, momentum=0.0, keep=0.0, decay=1.0)(cost, start, generators())
        means = [start, *(actions[:, :2].mean(1) for actions in cost.actions)]
        present = [torch.allclose(actions[:, 0], mean) for actions, mean in zip(cost.actions, means, strict=False)]
        assert present == [True, False, True]

    @pytest.mark.parametrize("keep", [0.0, 0.5])
    def test_kept_elites_are_candidates_that_are_not_evaluated_again(self, cost: Any, keep: float) -> None:
        # Later candidates are never as good as the first ones, so kept ones are always elites.
        cost.cost = lambda a: (a - 0.5).square().sum((2, 3)) + 1000.0 * (len(cost.actions) > 1)
        Icem(samples=64, elites=8, iterations=3, keep=keep, momentum=0.0, decay=1.0, sigma=0.3)(
            cost, zeros(), generators()
        )
        calls = cost.actions
        assert [actions.shape[1] for actions in calls] == [64, 64, 64]
        best = [(actions - 0.5).square().sum((2, 3)).argsort(1) for actions in calls]
        elites = torch.take_along_dim(calls[1], best[1][:, : 4 if keep else 8, None, None], 1)
        if keep:
            elites = torch.cat([elites, torch.take_along_dim(calls[0], best[0][:, :4, None, None], 1)], 1)
        # The mean is the first candidate of the last iteration.
        torch.testing.assert_close(calls[2][:, 0], elites.mean(1))

    def test_noise_is_coloured_over_the_env_steps_of_model_steps(self, cost: Any) -> None:
        # Frame by frame: x and y of the first env action, x and y of the second, and so on.
        cost.cost = lambda actions: actions.sum((2, 3))
        Icem(samples=2000, elites=2, iterations=1, beta=2.0, frameskip=5, sigma=0.2)(
            cost, torch.zeros(3, 4, 10), generators()
        )
        drawn = cost.actions[0][:, 1:]

        def correlation(first: Tensor, second: Tensor) -> float:
            return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()

        x_to_next_frame = correlation(drawn[:, :, 1, 0], drawn[:, :, 1, 2])
        assert x_to_next_frame > 0.8
        assert correlation(drawn[:, :, 1, 8], drawn[:, :, 2, 0]) == pytest.approx(x_to_next_frame, abs=0.05)
        assert abs(correlation(drawn[:, :, 1, 0], drawn[:, :, 1, 1])) < 0.05

    def test_a_frameskip_must_divide_the_actions(self, cost: Any) -> None:
        with pytest.raises(UserError, match=r"frameskip is 3.* 2 "):
            Icem(frameskip=3)(cost, zeros(), generators())


class TestCategoricalCem:
    """3 episodes of 4 model steps, each of 2 env steps with one of 5 actions."""

    OPTIONS: ClassVar[dict[str, Any]] = {"samples": 64, "elites": 8, "iterations": 10, "frameskip": 2}

    @pytest.fixture
    def wanted(self) -> Tensor:
        """The sequence of lowest cost, [3, 4, 10]."""
        taken = torch.randint(5, (3, 4, 2), generator=torch.Generator().manual_seed(7))
        return (2 * torch.nn.functional.one_hot(taken, 5) - 1).flatten(-2).float()

    @pytest.fixture
    def cost(self, wanted: Tensor) -> Recorded:
        return Recorded(lambda actions: (actions - wanted[:, None]).square().sum((2, 3)))

    def test_it_finds_the_known_optimum_among_one_hot_actions(self, cost: Recorded, wanted: Tensor) -> None:
        found = solve("categorical-cem", self.OPTIONS, cost, torch.zeros(3, 4, 10))
        assert torch.equal(found, wanted)
        for actions in cost.actions:
            steps = actions.unflatten(-1, (2, 5))
            assert ((steps == 1).sum(-1) == 1).all()
            assert ((steps == -1).sum(-1) == 4).all()
        assert (
            sum(actions.shape[1] for actions in cost.actions)
            == make_solver("categorical-cem", **self.OPTIONS).evaluations
        )

    def test_the_first_guess_is_a_candidate_and_is_kept_where_it_is_best(self, cost: Recorded, wanted: Tensor) -> None:
        few = {**self.OPTIONS, "samples": 4, "elites": 2, "iterations": 1}
        assert torch.equal(solve("categorical-cem", few, cost, wanted), wanted)
        assert torch.equal(cost.actions[0][:, 0], wanted)

    def test_an_episode_does_not_depend_on_the_others(self, cost: Recorded, wanted: Tensor) -> None:
        few = {**self.OPTIONS, "samples": 8, "elites": 2, "iterations": 3}
        together = solve("categorical-cem", few, cost, torch.zeros(3, 4, 10))
        assert not torch.equal(together, wanted)
        for i in range(3):
            alone = make_solver("categorical-cem", **few)(
                lambda actions, i=i: (actions - wanted[i : i + 1, None]).square().sum((2, 3)),
                torch.zeros(1, 4, 10),
                generators(i, 1),
            )
            assert torch.equal(alone[0], together[i])

    def test_a_frameskip_must_divide_the_actions(self, cost: Recorded) -> None:
        with pytest.raises(UserError, match=r"frameskip is 3.* 10 "):
            solve("categorical-cem", {**self.OPTIONS, "frameskip": 3}, cost, torch.zeros(3, 4, 10))


class TestColouredNoise:
    @pytest.fixture
    def white(self) -> Tensor:
        return torch.randn(1, 4000, 25, 2, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
    @pytest.mark.parametrize("steps", [1, 2, 25])
    def test_it_has_unit_variance_at_every_step(self, white: Tensor, beta: float, steps: int) -> None:
        noise = coloured(white[:, :, :steps], beta)
        assert noise.shape == (1, 4000, steps, 2)
        torch.testing.assert_close(noise.var((0, 1, 3)), torch.ones(steps), atol=0.1, rtol=0)
        torch.testing.assert_close(noise.mean((0, 1, 3)), torch.zeros(steps), atol=0.05, rtol=0)
        if beta == 0:
            torch.testing.assert_close(noise, white[:, :, :steps], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("beta", [1.0, 2.0])
    def test_its_power_falls_with_the_frequency_to_the_beta(self, white: Tensor, beta: float) -> None:
        power = torch.fft.rfft(coloured(white, beta), dim=2).abs().square().mean((0, 1, 3))[1:]
        frequency = torch.fft.rfftfreq(25)[1:]
        slope = torch.linalg.lstsq(torch.stack([frequency.log(), torch.ones(12)], 1), power.log()[:, None]).solution[0]
        assert slope.item() == pytest.approx(-beta, abs=0.05)
