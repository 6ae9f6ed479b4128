from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys

import numpy as np
import pytest

from wmcache.envs import Maze, PointMazeSimulator, maze_names, sample_state

MASS = 1000 * 4 / 3 * np.pi * 0.1**3
REST = np.array([0.8, 1.8, 0.0, 0.0])


def run_with(backend: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with another MUJOCO_GL."""
    # PYOPENGL_PLATFORM is set by this process's MuJoCo and would change the failure of the other process.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYOPENGL_PLATFORM", "DISPLAY")}
    env = {**kept, "MUJOCO_GL": backend}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def simulator() -> PointMazeSimulator:
    return PointMazeSimulator(Maze.load("UMaze"), 32)


@pytest.mark.parametrize("direction", [(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1)])
def test_full_force_accelerates_by_force_over_mass(
    simulator: PointMazeSimulator, direction: tuple[float, float]
) -> None:
    after = simulator.step(REST, np.array(direction))
    np.testing.assert_allclose(after[2:] / 0.05, 100 / MASS * np.array(direction), rtol=0.02)


def test_damping_slows_a_free_ball(simulator: PointMazeSimulator) -> None:
    after = simulator.step(np.array([0.8, 1.8, 0.0, 2.0]), np.zeros(2))
    assert after[3] == pytest.approx(2.0 * np.exp(-0.05 / MASS), rel=1e-3)
    assert after[1] == pytest.approx(1.8 + 2.0 * 0.05, rel=1e-2)


def test_speed_is_clipped_to_5_before_a_step(simulator: PointMazeSimulator) -> None:
    fast, limit = np.array([0.8, 1.0, 0.0, 50.0]), np.array([0.8, 1.0, 0.0, 5.0])
    slower = np.array([0.8, 1.0, 0.0, 4.9])
    force = np.array([0.0, 1.0])
    np.testing.assert_array_equal(simulator.step(fast, force), simulator.step(limit, force))
    assert (simulator.step(slower, force) != simulator.step(limit, force)).any()


def test_actions_are_clipped_to_the_unit_square(simulator: PointMazeSimulator) -> None:
    clipped, beyond, inside = (simulator.step(REST, np.array(force)) for force in ([1, -1], [3, -9], [0.9, -1]))
    np.testing.assert_array_equal(beyond, clipped)
    assert (inside != clipped).any()


@pytest.mark.parametrize("name", maze_names())
def test_no_push_gets_the_ball_through_a_wall(name: str) -> None:
    maze = Maze.load(name)
    simulator, rng = PointMazeSimulator(maze, 32), np.random.default_rng(0)
    state = sample_state(maze, rng)
    positions = []
    for _ in range(300):
        push = rng.choice([-1.0, 1.0], 2)
        for _ in range(int(rng.integers(1, 20))):
            state = simulator.step(state, push)
            positions.append(state[:2])
    # Contacts are soft: at full speed the ball enters a wall by less than its radius.
    assert maze.is_clear(np.array(positions), 0.02).all()
    assert np.ptp(positions, axis=0).min() > 1.0


def test_step_depends_on_state_and_action_alone(simulator: PointMazeSimulator) -> None:
    state, action = np.array([1.19, 0.8, 4.0, 1.0]), np.array([1.0, 0.3])
    first = simulator.step(state, action)
    for _ in range(5):
        simulator.step(np.array([2.8, 0.8, -3.0, 5.0]), np.array([-1.0, -1.0]))
        simulator.render(REST)
    np.testing.assert_array_equal(simulator.step(state, action), first)
    np.testing.assert_array_equal(state, [1.19, 0.8, 4.0, 1.0])


def test_a_frame_depends_on_its_state_alone(simulator: PointMazeSimulator) -> None:
    first = simulator.render(REST)
    simulator.step(np.array([1.19, 0.8, 5.0, 1.0]), np.array([1.0, 1.0]))
    simulator.render(np.array([2.8, 0.8, 0.0, 0.0]))
    np.testing.assert_array_equal(simulator.render(REST + np.array([0, 0, 1, 1])), first)


def test_x_points_right_and_y_up(simulator: PointMazeSimulator) -> None:
    def brightest(x: float, y: float) -> tuple[float, float]:
        change = np.abs(simulator.render(np.array([x, y, 0, 0])).astype(int) - simulator.render(REST)).sum(-1)
        rows, columns = np.nonzero(change[:, 16:] > change.max() / 2)
        return rows.mean(), columns.mean()

    # Both positions are in the right half, away from the ball at rest in the left one.
    top_row, top_column = brightest(2.8, 2.8)
    bottom_row, _ = brightest(2.8, 0.8)
    _, middle_column = brightest(2.2, 2.8)
    assert top_row < bottom_row
    assert middle_column < top_column


@pytest.mark.parametrize("backend", ["disabled", "nonsense", "osmesa"])
def test_without_opengl_one_line_names_the_choices(backend: str) -> None:
    if backend == "osmesa" and ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa works here")
    done = run_with(backend, "-m", "wmcache.envs.check")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert all(choice in done.stderr for choice in ("MUJOCO_GL", backend, "egl", "osmesa", "glfw"))


def test_physics_runs_without_opengl() -> None:
    script = (
        "import numpy as np; from wmcache.envs import Maze, PointMazeSimulator;"
        "print(PointMazeSimulator(Maze.load('UMaze')).step(np.array([0.8, 0.8, 0, 0]), np.ones(2))[2])"
    )
    done = run_with("disabled", "-c", script)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1.0
