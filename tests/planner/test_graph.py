"""The graph of cached frames, on latents that are known: places in the plane, walked through by made-up episodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.planner import graph as graph_module
from wmcache.planner.graph import LatentGraph, connect, farthest_points

MakeStore = Callable[..., TokenStore]
Float = NDArray[np.float64]
CPU = torch.device("cpu")
ARM, GAP = 6.0, 1.0
WAY = 2 * ARM + GAP
FRAMESKIP = 5


def in_the_u(way: Float) -> Float:
    """Places [n, 2] along a U: down one arm, along the bottom, up the other, GAP beside the first."""
    x = np.clip(way - ARM, 0, GAP)
    y = np.where(way < ARM, ARM - way, np.maximum(0, way - ARM - GAP))
    return np.column_stack([x, y])


def walk(rng: np.random.Generator, length: int = 80) -> Float:
    """How far along the way a walker is who turns around now and then; [length]."""
    step = np.where(rng.random(length) < 0.05, -1.0, 1.0).cumprod() * rng.choice([-0.08, 0.08])
    far = np.abs((rng.uniform(0, WAY) + step.cumsum()) % (2 * WAY) - WAY)
    return np.asarray(far, np.float64)


def walks(episodes: int = 30, seed: int = 0) -> tuple[list[Float], Float]:
    """Frames of episodes in the U, and how far along the way each is."""
    rng = np.random.default_rng(seed)
    ways = [walk(rng) for _ in range(episodes)]
    return [in_the_u(way) + 0.05 * rng.normal(size=(len(way), 2)) for way in ways], np.concatenate(ways)


@pytest.fixture(scope="module")
def u_shaped(make_store: MakeStore) -> tuple[TokenStore, Float]:
    frames, way = walks()
    return make_store(frames), way


@pytest.fixture(scope="module")
def graph(u_shaped: tuple[TokenStore, Float]) -> LatentGraph:
    return LatentGraph.from_store(u_shaped[0], FRAMESKIP, CPU)


def tokens(places: Float) -> Tensor:
    """Places [n, 2] as frames [n, 1, 2]."""
    return torch.from_numpy(np.asarray(places)).float()[:, None]


def distances(graph: LatentGraph, frames: Tensor, goal: Tensor) -> Tensor:
    """From frames [n, N, D] to one goal [N, D]: [n]."""
    return graph.distance(frames[None, :, None], goal[None], graph.to_goal(goal[None]))[0, :, 0]


class TestAcrossWalls:
    @pytest.mark.parametrize("goal_way", [0.3, 3.0, 6.5, 12.0])
    def test_it_orders_frames_by_the_way_that_there_is(self, graph: LatentGraph, goal_way: float) -> None:
        way = np.linspace(0, WAY, 200)
        goal = tokens(in_the_u(np.array([goal_way])))[0]
        found = distances(graph, tokens(in_the_u(way)), goal).numpy()
        true = np.abs(way - goal_way)
        assert spearmanr(found, true).statistic > 0.95
        # It is a length, too, in units of the latents: shorter for the corners that are cut, longer for the swaying.
        far = true > 2
        assert ((found[far] / true[far] > 0.75) & (found[far] / true[far] < 1.3)).all()

    def test_the_latent_distance_does_not(self) -> None:
        way = np.linspace(0, WAY, 200)
        straight = np.linalg.norm(in_the_u(way) - in_the_u(np.array([0.3])), axis=1)
        assert spearmanr(straight, np.abs(way - 0.3)).statistic < 0.5

    def test_its_descent_leads_around_the_wall(self, graph: LatentGraph) -> None:
        # Opposite the goal, on the other side of the wall: the way is down, not across.
        start, goal = tokens(np.array([[0.0, 5.0]])).requires_grad_(), tokens(np.array([[GAP, 5.0]]))[0]
        (slope,) = torch.autograd.grad(distances(graph, start, goal).sum(), start)
        assert slope[0, 0, 1] > 0
        assert slope[0, 0, 1] > slope[0, 0, 0].abs()

    def test_places_that_no_episode_connected_stay_apart(self, make_store: MakeStore) -> None:
        rng = np.random.default_rng(0)
        sides = [np.column_stack([np.full(80, i % 2 * GAP), walk(rng)]) for i in range(48)]
        store = make_store([side + 0.03 * rng.normal(size=side.shape) for side in sides])
        graph = LatentGraph.from_store(store, FRAMESKIP, CPU)
        side = (graph.places[:, 0] > GAP / 2).numpy()
        assert 0 < side.sum() < len(side)
        np.testing.assert_array_equal(side[graph.edges.row], side[graph.edges.col])
        goal = tokens(np.array([[0.0, 5.0]]))[0]
        lengths = np.linspace(0.5, 12.5, 30)
        here = distances(graph, tokens(np.column_stack([np.zeros(30), lengths])), goal)
        there = distances(graph, tokens(np.column_stack([np.full(30, GAP), lengths])), goal)
        assert here.isfinite().all()
        assert there.isfinite().all()
        # Nothing on this side is as far as the nearest on the other.
        assert here.max() < there.min()

    def test_what_cannot_be_reached_is_far_even_from_a_goal_that_nothing_leads_to(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moving = np.column_stack([np.arange(20.0), np.zeros(20)])
        monkeypatch.setattr(graph_module, "CROWD", 1)
        graph = LatentGraph.from_store(make_store([moving, np.full((4, 2), 50.0)]), 1, CPU)
        to_goal = graph.to_goal(torch.full((1, 1, 2), 50.0))[0]
        still = (graph.places == 50).all(1)
        assert to_goal[still].min() == 0
        assert to_goal[~still].min() > graph.reach


class TestNear:
    def test_within_reach_it_is_the_latent_distance(self, graph: LatentGraph) -> None:
        goal = tokens(in_the_u(np.array([3.0])))[0]
        offset = torch.randn(50, 1, 2, generator=torch.Generator().manual_seed(0))
        offset *= torch.linspace(0.05, 0.95, 50)[:, None, None] * graph.reach / offset.norm(dim=2, keepdim=True)
        found = distances(graph, goal + offset, goal)
        torch.testing.assert_close(found, offset.norm(dim=(1, 2)), atol=2e-3, rtol=0)

    def test_the_goal_itself_is_no_way_away(self, graph: LatentGraph) -> None:
        goal = tokens(in_the_u(np.array([3.0])))
        assert distances(graph, goal, goal[0]).item() == pytest.approx(0, abs=2e-3)

    def test_reach_is_how_far_a_model_step_goes(self, graph: LatentGraph) -> None:
        assert graph.reach == pytest.approx(FRAMESKIP * 0.08, rel=0.1)

    def test_beyond_what_was_ever_seen_it_grows_with_the_distance_to_that(self, graph: LatentGraph) -> None:
        goal = tokens(in_the_u(np.array([3.0])))[0]
        away = tokens(np.column_stack([np.full(20, -1.0) - np.arange(20), np.full(20, 3.0)]))
        found = distances(graph, away, goal)
        assert (found.diff() > 0).all()
        assert (found[-1] - found[0]).item() == pytest.approx(19, abs=1)


class TestGradients:
    def test_they_are_finite_everywhere(self, graph: LatentGraph) -> None:
        goal = tokens(in_the_u(np.array([3.0])))[0]
        # On places of the graph and on the goal itself, where a norm has no derivative.
        frames = torch.cat(
            [graph.places[:20, None], goal[None], tokens(np.random.default_rng(0).uniform(-3, 9, (30, 2)))]
        )
        frames.requires_grad_()
        (slope,) = torch.autograd.grad(distances(graph, frames, goal).sum(), frames)
        assert slope.isfinite().all()
        assert (slope[-30:].norm(dim=2) > 0.5).all()

    def test_they_are_those_of_small_differences(self, graph: LatentGraph) -> None:
        goal = tokens(in_the_u(np.array([3.0])))[0]
        frames = tokens(in_the_u(np.linspace(5, 12, 12)) + 0.03).requires_grad_()
        (slope,) = torch.autograd.grad(distances(graph, frames, goal).sum(), frames)
        with torch.no_grad():
            for axis in range(2):
                step = torch.zeros(2)
                step[axis] = 1e-2
                rise = (distances(graph, frames + step, goal) - distances(graph, frames - step, goal)) / 2e-2
                # Where another place becomes the nearest way there is a step.
                assert ((rise - slope[:, 0, axis]).abs() < 0.05).float().mean() > 0.7


class TestBatches:
    def test_the_rest_of_the_batch_changes_nothing(self, graph: LatentGraph) -> None:
        rng = np.random.default_rng(1)
        latents = torch.from_numpy(in_the_u(rng.uniform(0, WAY, 4 * 40 * 3))).float().view(4, 40, 3, 1, 2)
        goal = tokens(in_the_u(rng.uniform(0, WAY, 4)))
        to_goal = graph.to_goal(goal)
        together = graph.distance(latents, goal, to_goal)
        assert together.shape == (4, 40, 3)
        for i in range(4):
            torch.testing.assert_close(graph.to_goal(goal[i : i + 1])[0], to_goal[i])
            alone = graph.distance(latents[i : i + 1, 7:8], goal[i : i + 1], to_goal[i : i + 1])
            torch.testing.assert_close(alone[0, 0], together[i, 7], atol=5e-3, rtol=0)


class TestMaking:
    def test_the_same_seed_gives_the_same_graph(self, u_shaped: tuple[TokenStore, Float], graph: LatentGraph) -> None:
        again = LatentGraph.from_store(u_shaped[0], FRAMESKIP, CPU)
        assert torch.equal(again.places, graph.places)
        assert (again.edges != graph.edges).nnz == 0
        assert again.reach == graph.reach

    def test_another_seed_draws_other_frames_of_a_large_store(
        self, u_shaped: tuple[TokenStore, Float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graph_module, "FRAMES", 300)
        one, other = (LatentGraph.from_store(u_shaped[0], FRAMESKIP, CPU, seed) for seed in (0, 1))
        assert not torch.equal(one.places, other.places)

    def test_it_is_made_from_tokens_and_their_order_alone(self, make_store: MakeStore, graph: LatentGraph) -> None:
        frames, way = walks()
        state = np.column_stack([way, way, way, way])
        for states in (state, np.random.default_rng(0).permutation(state)):
            told = LatentGraph.from_store(make_store(frames, states), FRAMESKIP, CPU)
            assert torch.equal(told.places, graph.places)
            assert (told.edges != graph.edges).nnz == 0

    def test_no_way_leads_from_the_end_of_an_episode_to_the_start_of_the_next(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line = np.column_stack([np.arange(10.0), np.zeros(10)])
        monkeypatch.setattr(graph_module, "CROWD", 1)
        graph = LatentGraph.from_store(make_store([line, line + 100]), 1, CPU)
        pairs = graph.places[torch.from_numpy(np.stack([graph.edges.row, graph.edges.col]))]
        assert len(graph.edges.row) == 18
        assert (pairs[0] - pairs[1]).norm(dim=1).tolist() == pytest.approx([1.0] * 18)

    def test_episodes_that_cross_are_connected_in_a_small_store_too(self, make_store: MakeStore) -> None:
        # Frames lie beside each other, never on each other: as many places as frames would tell all episodes apart.
        frames, way = walks(episodes=10, seed=4)
        graph = LatentGraph.from_store(make_store(frames), FRAMESKIP, CPU)
        found = distances(graph, tokens(np.concatenate(frames)), tokens(in_the_u(np.array([6.5])))[0])
        assert spearmanr(found, np.abs(way - 6.5)).statistic > 0.95

    def test_few_places_stand_for_many_frames(
        self, u_shaped: tuple[TokenStore, Float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graph_module, "PLACES", 40)
        graph = LatentGraph.from_store(u_shaped[0], FRAMESKIP, CPU)
        assert graph.places.shape == (40, 2)
        way = np.linspace(0, WAY, 200)
        found = distances(graph, tokens(in_the_u(way)), tokens(in_the_u(np.array([0.3])))[0])
        assert spearmanr(found, np.abs(way - 0.3)).statistic > 0.95

    def test_large_frames_are_sketched_and_keep_their_order(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frames, _ = walks()
        lift = np.linalg.qr(np.random.default_rng(5).normal(size=(700, 2)))[0].T
        graph = LatentGraph.from_store(make_store([part @ lift for part in frames]), FRAMESKIP, CPU)
        assert graph.project is not None
        assert graph.project.shape == (700, 256)
        assert graph.places.shape[1] == 256
        way = np.linspace(0, WAY, 200)
        found = distances(graph, tokens(in_the_u(way) @ lift), tokens(in_the_u(np.array([0.3])) @ lift)[0])
        assert spearmanr(found, np.abs(way - 0.3)).statistic > 0.95
        again = LatentGraph.from_store(make_store([part @ lift for part in frames]), FRAMESKIP, CPU)
        assert again.project is not None
        assert torch.equal(again.project, graph.project)

    @pytest.mark.parametrize("lengths", [[5, 5, 5], [1]])
    def test_episodes_too_short_for_a_model_step_are_refused(self, make_store: MakeStore, lengths: list[int]) -> None:
        store = make_store([np.zeros((length, 2)) for length in lengths])
        with pytest.raises(UserError, match=r"no two frames 5 env steps apart.*--distance latent") as refusal:
            LatentGraph.from_store(store, FRAMESKIP, CPU)
        assert "\n" not in str(refusal.value)


def test_each_place_is_the_farthest_from_those_before() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0], [9.0]])
    assert farthest_points(points, 5).tolist() == [0, 2, 3, 1, 4]


def test_neighbours_are_connected_once_and_nothing_with_itself() -> None:
    places = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    edges = connect(places, np.array([0, 1, 0, 2, 1]), np.array([1, 0, 0, 1, 1])).toarray()
    assert edges.tolist() == [[0, 5, 0], [0, 0, 0.5], [0, 0, 0]]
