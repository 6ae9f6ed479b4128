"""docs/examples/plan_elsewhere.py: planning in a simulator of the user's own."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "docs/examples/plan_elsewhere.py"


class Point:
    """A blob on a square; an action moves it."""

    def __init__(self, x: float, y: float) -> None:
        self.position = np.array([x, y])

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        y, x = np.mgrid[:32, :32] / 31
        glow = np.exp(-((x - self.position[0]) ** 2 + (y - self.position[1]) ** 2) / 0.02)
        return np.repeat((255 * glow).astype(np.uint8)[:, :, None], 3, axis=2), np.append(self.position, [0, 0])

    def step(self, action: np.ndarray) -> None:
        self.position = np.clip(self.position + 0.05 * np.clip(action, -1, 1), 0, 1)


def test_a_run_plans_in_the_user_s_simulator(run_path: Path) -> None:
    plan_elsewhere = runpy.run_path(str(EXAMPLE))["plan_elsewhere"]
    point, moved = Point(0.2, 0.3), Point(0.2, 0.3)
    executed = plan_elsewhere(run_path, point, Point(0.7, 0.6).observe()[0], 6)
    assert np.shape(executed) == (10, 2)  # two model steps
    assert np.abs(executed).max() <= 1
    for action in executed:
        moved.step(action)
    np.testing.assert_array_equal(moved.position, point.position)
