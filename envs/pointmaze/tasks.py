"""Fixed tasks of a layout: cells of start and goal (OGBench, locomaze/maze.py: set_tasks)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.envs.base import Task
from wmcache.envs.pointmaze.cells import Cells
from wmcache.envs.pointmaze.maze import CENTRE, Maze

COUNT = 5
NOISE = 0.25
"""A start or goal is uniform within this distance of its cell's centre, along each axis."""

Cell = tuple[int, int]
OGBENCH: dict[str, tuple[tuple[Cell, Cell], ...]] = {
    "Medium": (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))),
    "Large": (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4))),
    "OGBenchGiant": (((1, 1), (10, 14)), ((1, 14), (10, 1)), ((8, 14), (1, 1)), ((8, 3), (5, 12)), ((5, 9), (3, 8))),
    "Teleport": (((1, 10), (7, 1)), ((1, 1), (7, 10)), ((5, 6), (7, 10)), ((7, 1), (7, 10)), ((5, 6), (7, 1))),
}
"""Layout -> (row, column) of start and goal of each task."""


def fixed_cells(maze: Maze) -> tuple[tuple[Cell, Cell], ...]:
    """Return the cells of start and goal of the tasks of a maze: OGBench's for its layouts, else those of `longest_pairs`."""
    grid = _grid(maze)
    for name, cells in OGBENCH.items():
        if _grid(Maze.load(name)) == grid:
            return cells
    return longest_pairs(maze)


def longest_pairs(maze: Maze) -> tuple[tuple[Cell, Cell], ...]:
    """Choose the pairs of cells that are farthest apart, in which each cell starts at most one task and ends at most one.

    Paths count moves from cell to cell and lead around teleporters; the first of equal ones is chosen, by rows and columns of start and
    goal. A small maze may have fewer than COUNT pairs.

    Raises:
        UserError: no two cells are connected.
    """
    cells = Cells(maze, entrances=False)
    lengths = cells.lengths(np.arange(len(cells.places)))
    lengths[np.isinf(lengths)] = 0.0
    pairs: list[tuple[Cell, Cell]] = []
    while len(pairs) < COUNT and lengths.max() > 0:
        start, goal = np.unravel_index(lengths.argmax(), lengths.shape)
        lengths[start], lengths[:, goal] = 0.0, 0.0
        (first, second), (third, fourth) = cells.places[[start, goal]].tolist()
        pairs.append(((first, second), (third, fourth)))
    if not pairs:
        raise UserError(f"maze {maze.name}: no two cells are connected, so there is no fixed task; choose other goals")
    return tuple(pairs)


def draw_task(start: Cell, goal: Cell, rng: np.random.Generator) -> Task:
    """Draw positions near the centres of two cells, at rest."""
    return Task(*(np.append(near(np.array(cell) - CENTRE, rng), (0.0, 0.0)) for cell in (start, goal)))


def near(centre: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a position [2] in the middle of the cell of a centre [2]."""
    return centre + rng.uniform(-NOISE, NOISE, 2)


def _grid(maze: Maze) -> tuple[str, ...]:
    return tuple(row.replace("G", "O") for row in maze.rows)
