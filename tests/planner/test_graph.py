"""The graph of cached frames, on known latents: positions in a plane that made-up episodes walk through."""

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
from wmcache.planner.context import EvalContext
from wmcache.planner.graph import LatentGraph

MakeStore = Callable[..., TokenStore]
Float = NDArray[np.float64]
CPU = torch.device("cpu")
ARM, GAP = 6.0, 1.0
LENGTH = 2 * ARM + GAP
FRAMESKIP = 5


def in_the_u(along: Float) -> Float:
    """Positions [n, 2] along a U: down one arm, along the bottom, up the other, GAP beside the first."""
    x = np.clip(along - ARM, 0, GAP)
    y = np.where(along < ARM, ARM - along, np.maximum(0, along - ARM - GAP))
    return np.column_stack([x, y])


def walk(rng: np.random.Generator, length: int = 80) -> Float:
    """How far along the U a walker is that sometimes turns around; [length]."""
    step = np.where(rng.random(length) < 0.05, -1.0, 1.0).cumprod() * rng.choice([-0.08, 0.08])
    far = np.abs((rng.uniform(0, LENGTH) + step.cumsum()) % (2 * LENGTH) - LENGTH)
    return np.asarray(far, np.float64)


def walks(episodes: int = 30, seed: int = 0) -> tuple[list[Float], Float]:
    """Frames of episodes in the U, and how far along it each is."""
    rng = np.random.default_rng(seed)
    paths = [walk(rng) for _ in range(episodes)]
    return [in_the_u(path) + 0.05 * rng.normal(size=(len(path), 2)) for path in paths], np.concatenate(paths)


@pytest.fixture(scope="module")
def u_shaped(make_store: MakeStore) -> TokenStore:
    return make_store(walks()[0])


@pytest.fixture(scope="module")
def graph(u_shaped: TokenStore) -> LatentGraph:
    return LatentGraph.from_store(u_shaped, FRAMESKIP, CPU)


def tokens(positions: Float) -> Tensor:
    """Positions [n, 2] as frames [n, 1, 2]."""
    return torch.from_numpy(np.asarray(positions)).float()[:, None]


def at(along: float) -> Tensor:
    """The frame [1, 2] at a position along the U."""
    return tokens(in_the_u(np.array([along])))[0]


def distances(graph: LatentGraph, frames: Tensor, goal: Tensor) -> Tensor:
    """From frames [n, N, D] to one goal [N, D]: [n]."""
    return graph.distance(frames[None, :, None], goal[None], graph.to_goal(goal[None]))[0, :, 0]


def same(one: LatentGraph, other: LatentGraph) -> bool:
    return torch.equal(one.nodes, other.nodes) and (one.edges != other.edges).nnz == 0 and one.reach == other.reach


class TestAcrossWalls:
    @pytest.mark.parametrize("goal", [0.3, 6.5])
    def test_it_orders_frames_by_their_path_length(self, graph: LatentGraph, goal: float) -> None:
        along = np.linspace(0, LENGTH, 200)
        found = distances(graph, tokens(in_the_u(along)), at(goal)).numpy()
        true = np.abs(along - goal)
        assert spearmanr(found, true).statistic > 0.97
        # It is a length in units of the latents: shorter where corners are cut, longer where walkers sway.
        far = true > 2
        assert ((found[far] / true[far] > 0.75) & (found[far] / true[far] < 1.3)).all()

    def test_nodes_that_no_episode_connects_are_farther_than_all_others(self, make_store: MakeStore) -> None:
        rng = np.random.default_rng(0)
        sides = [np.column_stack([np.full(80, i % 2 * GAP), walk(rng)]) for i in range(48)]
        store = make_store([side + 0.03 * rng.normal(size=side.shape) for side in sides])
        graph = LatentGraph.from_store(store, FRAMESKIP, CPU)
        side = (graph.nodes[:, 0] > GAP / 2).numpy()
        assert 0 < side.sum() < len(side)
        np.testing.assert_array_equal(side[graph.edges.row], side[graph.edges.col])
        lengths = np.linspace(0.5, 12.5, 30)
        here, there = (
            distances(graph, tokens(np.column_stack([np.full(30, x), lengths])), tokens(np.array([[0.0, 5.0]]))[0])
            for x in (0.0, GAP)
        )
        assert torch.cat([here, there]).isfinite().all()
        assert here.max() < there.min()


def test_within_reach_the_distance_is_the_latent_distance(graph: LatentGraph) -> None:
    assert graph.reach == pytest.approx(FRAMESKIP * 0.08, rel=0.1)  # a model step
    offset = torch.randn(50, 1, 2, generator=torch.Generator().manual_seed(0))
    offset *= torch.linspace(0, 0.95, 50)[:, None, None] * graph.reach / offset.norm(dim=2, keepdim=True)
    found = distances(graph, at(3.0) + offset, at(3.0))
    torch.testing.assert_close(found, offset.norm(dim=(1, 2)), atol=2e-3, rtol=0)


class TestGradients:
    def test_they_are_finite_everywhere(self, graph: LatentGraph) -> None:
        # On nodes and on the goal a norm has no derivative.
        random = tokens(np.random.default_rng(0).uniform(-3, 9, (30, 2)))
        frames = torch.cat([graph.nodes[:20, None], at(3.0)[None], random]).requires_grad_()
        (slope,) = torch.autograd.grad(distances(graph, frames, at(3.0)).sum(), frames)
        assert slope.isfinite().all()
        assert (slope[-30:].norm(dim=2) > 0.5).all()

    def test_they_are_those_of_small_differences(self, graph: LatentGraph) -> None:
        frames = tokens(in_the_u(np.linspace(5, 12, 12)) + 0.03).requires_grad_()
        (slope,) = torch.autograd.grad(distances(graph, frames, at(3.0)).sum(), frames)
        with torch.no_grad():
            for axis in range(2):
                step = torch.zeros(2)
                step[axis] = 1e-2
                rise = (distances(graph, frames + step, at(3.0)) - distances(graph, frames - step, at(3.0))) / 2e-2
                # Where another node becomes the nearest one there is a step.
                assert ((rise - slope[:, 0, axis]).abs() < 0.05).float().mean() > 0.7


def test_the_rest_of_the_batch_does_not_matter(graph: LatentGraph) -> None:
    rng = np.random.default_rng(1)
    latents = torch.from_numpy(in_the_u(rng.uniform(0, LENGTH, 4 * 40 * 3))).float().view(4, 40, 3, 1, 2)
    goal = tokens(in_the_u(rng.uniform(0, LENGTH, 4)))
    to_goal = graph.to_goal(goal)
    together = graph.distance(latents, goal, to_goal)
    assert together.shape == (4, 40, 3)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(graph.to_goal(goal[one])[0], to_goal[i])
        alone = graph.distance(latents[one, 7:8], goal[one], to_goal[one])
        torch.testing.assert_close(alone[0, 0], together[i, 7], atol=5e-3, rtol=0)


class TestBuilding:
    def test_the_graph_of_some_episodes_is_that_of_a_store_of_them(
        self, u_shaped: TokenStore, make_store: MakeStore
    ) -> None:
        some = LatentGraph.from_store(u_shaped, FRAMESKIP, CPU, np.arange(20))
        assert same(some, LatentGraph.from_store(make_store(walks()[0][:20]), FRAMESKIP, CPU))

    def test_policies_have_the_graph_of_the_frames_that_they_were_trained_on(self, context: EvalContext) -> None:
        nodes = {node.tobytes() for node in context.cached_graph.frames.half().cpu().numpy()}
        seen = context.store.gather(context.store.frames_of("train"))
        assert nodes <= {frame.tobytes() for frame in seen}

    def test_it_depends_on_tokens_and_their_order_alone(
        self, u_shaped: TokenStore, make_store: MakeStore, graph: LatentGraph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert same(LatentGraph.from_store(u_shaped, FRAMESKIP, CPU), graph)
        frames, along = walks()
        other_states = make_store(frames, np.column_stack([along] * 4))
        assert same(LatentGraph.from_store(other_states, FRAMESKIP, CPU), graph)
        monkeypatch.setattr(graph_module, "FRAMES", 300)  # drawn from a larger store
        small = [LatentGraph.from_store(u_shaped, FRAMESKIP, CPU) for _ in range(2)]
        assert same(*small)
        assert not same(small[0], graph)

    def test_the_end_of_an_episode_is_not_connected_to_the_next(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line = np.column_stack([np.arange(10.0), np.zeros(10)])
        monkeypatch.setattr(graph_module, "FRAMES_PER_NODE", 1)
        edges = LatentGraph.from_store(make_store([line, line + 100]), 1, CPU).edges
        # Each pair of neighbours is connected once, by its distance, and no node with itself.
        assert edges.data.tolist() == pytest.approx([1.0] * 18)
        assert (edges.row != edges.col).all()

    @pytest.mark.parametrize("nodes", [None, 40])
    def test_episodes_that_cross_are_connected(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, nodes: int | None
    ) -> None:
        # Frames are beside each other, never equal: with a node per frame episodes would not meet.
        if nodes:
            monkeypatch.setattr(graph_module, "NODES", nodes)
        frames, along = walks(episodes=10, seed=4)
        graph = LatentGraph.from_store(make_store(frames), FRAMESKIP, CPU)
        assert nodes is None or graph.nodes.shape == (nodes, 2)
        found = distances(graph, tokens(np.concatenate(frames)), at(6.5))
        assert spearmanr(found, np.abs(along - 6.5)).statistic > 0.95

    def test_large_frames_are_projected_and_keep_their_order(self, make_store: MakeStore) -> None:
        lift = np.linalg.qr(np.random.default_rng(5).normal(size=(700, 2)))[0].T
        store = make_store([part @ lift for part in walks()[0]])
        graph = LatentGraph.from_store(store, FRAMESKIP, CPU)
        assert graph.project is not None
        assert (graph.project.shape, graph.nodes.shape[1]) == ((700, 256), 256)
        along = np.linspace(0, LENGTH, 200)
        found = distances(graph, tokens(in_the_u(along) @ lift), tokens(in_the_u(np.array([0.3])) @ lift)[0])
        assert spearmanr(found, np.abs(along - 0.3)).statistic > 0.95
        assert same(LatentGraph.from_store(store, FRAMESKIP, CPU), graph)

    @pytest.mark.parametrize("lengths", [[5, 5, 5], [1]])
    def test_episodes_too_short_for_a_model_step_are_refused(self, make_store: MakeStore, lengths: list[int]) -> None:
        store = make_store([np.zeros((length, 2)) for length in lengths])
        with pytest.raises(UserError, match=r" 5 env steps.*--distance latent"):
            LatentGraph.from_store(store, FRAMESKIP, CPU)
