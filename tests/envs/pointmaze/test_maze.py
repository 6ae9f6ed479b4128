from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmcache.envs import Maze, MazeError, env_id, find_maze, maze_names, sample_state


@pytest.mark.parametrize(
    "rows",
    [
        (),
        ("####", "#O#", "####"),
        ("###", "#X#", "###"),
        ("#O#", "#O#", "###"),
        ("###", "###", "###"),
        ("####", "#OI#", "####"),
        ("####", "#OE#", "####"),
    ],
)
def test_an_unusable_grid_is_refused(rows: tuple[str, ...]) -> None:
    with pytest.raises(MazeError, match="odd"):
        Maze("odd", rows)


def test_a_file_that_is_no_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MazeError, match=r"binary\.txt"):
        Maze.load(tmp_path / "binary.txt")


def test_an_id_and_its_layouts_name_are_the_same_maze() -> None:
    assert find_maze("wmcache/PointMaze-Medium-v0") == find_maze("Medium") == Maze.load("Medium")
    assert env_id(find_maze("Medium")) == "wmcache/PointMaze-Medium-v0"
    assert env_id(Maze("Medium", ("###", "#O#", "###"))) == "Medium"


def test_u_maze_starts_where_dino_wm_starts() -> None:
    rng = np.random.default_rng(0)
    x, y, vx, vy = np.stack([sample_state(Maze.load("UMaze"), rng) for _ in range(3000)], 1)
    # DINO-WM, env/pointmaze: two arms and the corridor that joins them.
    lower = (x >= 0.5) & (x <= 1.1) & (y >= 0.5) & (y <= 3.1)
    upper = (x >= 2.5) & (x <= 3.1) & (y >= 0.5) & (y <= 3.1)
    joint = (x > 1.1) & (x < 2.5) & (y >= 2.5) & (y <= 3.1)
    assert (lower | upper | joint).all()
    areas = np.array([0.6 * 2.6, 0.6 * 2.6, 1.4 * 0.6])
    np.testing.assert_allclose([lower.mean(), upper.mean(), joint.mean()], areas / areas.sum(), atol=0.04)
    for values, low, high in ((x, 0.5, 3.1), (y, 0.5, 3.1), (vx, -5.226, 5.226), (vy, -5.226, 5.226)):
        np.testing.assert_allclose([values.min(), values.max()], [low, high], atol=0.02)


@pytest.mark.parametrize(
    ("start", "end", "length"),
    [
        # The centre rounds the inner wall's two corners at the ball's radius: 1.649 + 1.2 + 1.649.
        ((0.8, 0.8), (2.8, 0.8), 4.498),
        ((0.8, 2.8), (2.8, 2.8), 2.0),
        ((0.8, 0.8), (0.8, 3.0), 2.2),
        ((0.8, 0.8), (0.83, 0.84), 0.05),
        ((0.8, 0.8), (0.8, 0.8), 0.0),
    ],
)
def test_geodesic_goes_around_the_inner_wall(
    start: tuple[float, float], end: tuple[float, float], length: float
) -> None:
    found = Maze.load("UMaze").geodesic(np.array(start), np.array([end]))
    assert found == pytest.approx([length], rel=0.03)


@settings(max_examples=15)
@given(name=st.sampled_from([name for name in maze_names() if name != "Teleport"]), seed=st.integers(0, 2**32 - 1))
def test_geodesic_is_a_distance(name: str, seed: int) -> None:
    maze, rng = Maze.load(name), np.random.default_rng(seed)
    a, b = maze.sample_xy(rng), maze.sample_xy(rng)
    there, back = maze.geodesic(a, b[None])[0], maze.geodesic(b, a[None])[0]
    assert there == pytest.approx(back)
    # In open space both are the same sum of squares, rounded differently.
    assert np.linalg.norm(a - b) <= there * (1 + 1e-12) < np.inf


def test_separate_rooms_are_infinitely_far_apart() -> None:
    maze = Maze("rooms", ("#####", "#O#O#", "#####"))
    found = maze.geodesic(np.array([0.8, 0.8]), np.array([[0.8, 2.8], [0.8, 1.0]]))
    assert np.isinf(found[0])
    assert found[1] == pytest.approx(0.2, rel=0.1)
