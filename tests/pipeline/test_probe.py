"""Stores whose figures are known: tokens that are the position, noise, or of a known rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import wmcache.pipeline.probe
from wmcache import envs
from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.envs import Maze
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.pictures import draw_probe, spread
from wmcache.pipeline.probe import (
    PROBED_FRAMES,
    choose_frames,
    find_geometry,
    measure_landscape,
    principal_coordinates,
    probe,
    probe_landscape,
    squared_distances,
)

from ..conftest import episodes_of, write_tokens

EPISODES, LENGTH = 150, 8
FRAMES = EPISODES * LENGTH
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _short_training(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the network briefly where its figures do not matter."""
    if request.function not in THOROUGH:
        monkeypatch.setattr(wmcache.pipeline.probe, "MLP_EPOCHS", 3)


@pytest.fixture(scope="module")
def steps() -> dict[str, NDArray[Any]]:
    """Each episode moves straight, and little, in the U-maze, so that every position is in the maze."""
    maze, rng = Maze.load("UMaze"), np.random.default_rng(0)
    starts = [maze.sample_xy(rng) for _ in range(EPISODES)]
    xy = np.concatenate([np.linspace(start, start + rng.uniform(-0.1, 0.1, 2), LENGTH) for start in starts])
    state = np.concatenate([xy, rng.normal(size=xy.shape)], 1)
    return {
        "action": np.zeros((len(xy), 2), np.float32),
        "state": state,
        **episodes_of([LENGTH] * EPISODES),
    }


@pytest.fixture
def make(store: TokenStore, steps: dict[str, NDArray[Any]], tmp_path: Path) -> Make:
    """(tokens [n, N, D], name=…, maze=…, **columns) -> a finished store of them."""

    def write(tokens: NDArray[Any], name: str = "made-up.zarr", *, maze: bool = True, **columns: NDArray[Any]) -> Path:
        dataset = store.card.dataset if maze else {**store.card.dataset, "maze": None}
        grid = (1, tokens.shape[1])
        card = dataclasses.replace(store.card, dataset=dataset, token_grid=grid, frames_per_shard=300)
        columns = {key: values[: len(tokens)] for key, values in {**steps, **columns}.items()}
        return write_tokens(tmp_path / name, tokens, card, store.identity, columns)

    return write


def position_tokens(steps: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Two tokens of two channels that are the position, in float16's range of best precision."""
    return np.stack([steps["state"][:, :2], steps["state"][:, :2]], 1)


def noise(tokens: int, dim: int, frames: int = FRAMES) -> NDArray[np.float64]:
    return np.random.default_rng(1).normal(3, 2, (frames, tokens, dim))


def test_tokens_that_are_the_position_predict_it(make: Make, steps: dict[str, NDArray[Any]]) -> None:
    found = probe(make(position_tokens(steps)))
    assert (found.frames, found.held_out) == (1080, 120)
    assert list(found.linear) == ["x", "y", "vx", "vy"] == list(found.mlp)
    assert min(found.linear["x"], found.linear["y"]) > 0.999
    assert min(found.mlp["x"], found.mlp["y"]) > 0.98
    # Noise that is in no token.
    assert max(found.linear["vx"], found.linear["vy"], found.mlp["vx"], found.mlp["vy"]) < 0.1
    # The maze bends, so that neighbouring positions can be far apart.
    assert 0.7 < found.spearman < 0.99
    assert found.nearest < 0.1
    assert found.nearest <= found.nearest_90 < 0.3
    assert 1.5 < found.effective_rank <= 2.0
    assert 1.0 <= found.channels <= 2.0
    assert 0.0 < found.moves < 0.01


def test_noise_predicts_nothing(make: Make) -> None:
    found = probe(make(noise(2, 20)))
    assert max(value for values in (found.linear, found.mlp) for value in values.values()) < 0.1
    assert abs(found.spearman) < 0.05
    assert found.stuck > 0.5
    assert found.nearest > 0.5
    assert found.effective_rank > 35
    assert found.channels > 18
    assert found.moves == pytest.approx(2.0, abs=0.15)


def test_only_the_network_finds_a_nonlinear_function(make: Make, steps: dict[str, NDArray[Any]]) -> None:
    hidden = np.random.default_rng(3).uniform(-2, 2, FRAMES)
    state = np.stack([hidden**2, hidden], 1)
    found = probe(make(hidden[:, None, None] * np.ones((1, 2, 2)), maze=False, state=state))
    assert found.linear["state_0"] < 0.1
    assert found.mlp["state_0"] > 0.9
    assert found.linear["state_1"] > 0.999


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("tokens", [5, 400])  # fewer and more features than frames
def test_the_effective_rank_of_rank_k_is_about_k(make: Make, rank: int, tokens: int) -> None:
    rng = np.random.default_rng(2)
    mixing = np.linalg.qr(rng.normal(size=(tokens * 4, rank)))[0].T * np.sqrt(tokens)
    values = (rng.normal(size=(400, rank)) @ mixing).reshape(400, tokens, 4)
    assert probe(make(values), frames=300).effective_rank == pytest.approx(rank, rel=0.05)


def test_equal_distances_have_no_rank_correlation() -> None:
    xy = np.random.default_rng(0).uniform(-1.4, -0.6, (20, 2))
    found = measure_landscape(np.zeros((20, 20)), xy, envs.find_maze("UMaze"))
    assert found.spearman is None
    assert 0 <= found.stuck <= 1


def test_descent_on_distances_through_walls_gets_stuck() -> None:
    maze, rng = Maze.load("UMaze"), np.random.default_rng(0)
    xy = np.stack([maze.sample_xy(rng) for _ in range(200)])
    along = measure_landscape(np.stack([maze.geodesic(goal, xy) for goal in xy]), xy, maze)
    assert (along.spearman, along.stuck) == (pytest.approx(1), 0)
    # As the crow flies, a goal in one arm draws the ball in the other one against the inner wall.
    through = measure_landscape(squared_distances(xy, xy), xy, maze)
    assert through.spearman < 0.99
    assert through.stuck > 0.2


def test_fewer_coordinates_have_the_same_distances() -> None:
    for shape in ((50, 3, 4), (50, 30, 40), (30, 200, 64)):
        tokens = noise(*shape[1:], shape[0]).astype(np.float16)
        points = principal_coordinates(tokens, np.full(shape[2], 2.0, np.float32))
        assert points.shape[1] <= min(shape[0], shape[1] * shape[2])
        flat = tokens.reshape(shape[0], -1).astype(np.float64) / 2
        true = np.square(flat[:, None] - flat).sum(-1)
        np.testing.assert_allclose(squared_distances(points, points), true, rtol=1e-4, atol=1e-6 * true.max())
        sizes = np.linalg.norm(points, axis=0)
        assert (np.diff(sizes) <= 1e-9).all()
        np.testing.assert_allclose(sizes, np.linalg.svd(flat - flat.mean(0), compute_uv=False)[: len(sizes)], rtol=1e-3)


def test_velocities_in_tokens_are_found_and_a_channel_that_never_changes_divides_nothing(
    make: Make, steps: dict[str, NDArray[Any]]
) -> None:
    tokens = np.concatenate([np.tile(steps["state"][:, None], (1, 2, 1)), np.full((FRAMES, 2, 1), 7.0)], 2)
    assert min(probe(make(tokens)).linear.values()) > 0.999


def test_the_landscape_is_that_of_the_encoder(store_path: Path, dataset: FrameDataset, encoder: Encoder) -> None:
    live, cached = probe_landscape(dataset, encoder, Maze.load("UMaze")), probe(store_path, frames=100)
    assert probe(store_path, frames=100) == cached
    assert cached.spearman == pytest.approx(live.spearman, abs=1e-3)
    assert cached.stuck == pytest.approx(live.stuck, abs=0.02)


def test_no_held_out_episode_trains_a_probe(store: TokenStore) -> None:
    train, val = choose_frames(store, 100)
    assert (len(train), len(val)) == (100, min(60, PROBED_FRAMES))
    assert not set(store.episode[train]) & set(store.episode[val])
    np.testing.assert_array_equal(choose_frames(store, 300)[1], val)


def test_the_geometry_of_a_store_without_one_is_read_from_its_dataset(
    make: Make, dataset: FrameDataset, dataset_path: Path
) -> None:
    path = make(noise(1, 2), maze=False)
    assert find_geometry(TokenStore.open(path)) is None
    assert find_geometry(TokenStore.open(path), dataset_path).rows == tuple(dataset.card.maze)


def test_constant_and_missing_states_and_moves_have_no_figures(make: Make, steps: dict[str, NDArray[Any]]) -> None:
    state = steps["state"].copy()
    state[:, 3] = 1.0
    found = probe(make(position_tokens(steps), state=state))
    assert (found.linear["vy"], found.mlp["vy"]) == (None, None)
    assert found.moves is not None
    # No states, and episodes that are shorter than the frameskip.
    episode, step = np.divmod(np.arange(FRAMES, dtype=np.int32), 5)
    found = probe(make(noise(2, 5), "other.zarr", maze=False, state=state[:, :0], episode=episode, step=step))
    assert (found.linear, found.mlp, found.moves) == ({}, {}, None)
    assert found.effective_rank > 9


def test_too_few_frames_and_constant_tokens_are_refused(make: Make) -> None:
    few, path = make(noise(1, 4, frames=100), "few.zarr"), make(np.full((FRAMES, 2, 3), 3.0))
    for frames in (100, 10):
        with pytest.raises(UserError, match=" 20 "):
            probe(few, frames=frames)
    with pytest.raises(UserError, match=f"{path} .*1200"):
        probe(path)


def test_the_picture_is_a_png_with_a_star_for_each_goal(store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "picture.png"
    widths = []
    for goals in (2, 4):
        draw_probe(store_path, out, goals=goals)
        with Image.open(out) as image:
            assert image.format == "PNG"
            widths.append(image.size[0])
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 200
    assert widths[1] > 1.5 * widths[0]
    assert [file.name for file in out.parent.iterdir()] == ["picture.png"]


def test_goals_are_far_from_each_other() -> None:
    maze, rng = Maze.load("UMaze"), np.random.default_rng(0)
    xy = np.stack([maze.sample_xy(rng) for _ in range(100)])
    chosen, lengths = spread(xy, maze, 3)
    assert len(set(chosen)) == 3
    assert lengths.shape == (3, 100)
    np.testing.assert_array_equal(lengths[1], maze.geodesic(xy[chosen[1]], xy))
    assert min(lengths[0][chosen[1]], lengths[0][chosen[2]], lengths[1][chosen[2]]) > 1.5
    assert len(spread(xy[:2], maze, 5)[0]) == 2


THOROUGH = (
    test_tokens_that_are_the_position_predict_it,
    test_noise_predicts_nothing,
    test_only_the_network_finds_a_nonlinear_function,
)
