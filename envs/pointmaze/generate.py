"""Random mazes: a spanning tree over the cells of a grid, with some more openings so that there are loops."""

from __future__ import annotations

import numpy as np

LEAST, MOST = 5, 99
"""Lines and columns of a grid, walls included; an odd number of each."""
OPENINGS = 0.1
"""Share of the walls between two cells that are opened beside those of the tree."""


def random_rows(rows: int, columns: int, seed: int) -> tuple[str, ...]:
    """Draw a text grid of `rows` lines of `columns` characters; cells are at odd places, and all of them are connected."""
    rng = np.random.default_rng((rows, columns, seed))
    grid = np.full((rows, columns), "#")
    walk = [(1, 1)]
    grid[1, 1] = "O"
    while walk:
        row, column = walk[-1]
        around = [(row - 2, column), (row, column - 2), (row, column + 2), (row + 2, column)]
        closed = [(r, c) for r, c in around if 0 < r < rows and 0 < c < columns and grid[r, c] == "#"]
        if not closed:
            walk.pop()
            continue
        r, c = closed[rng.integers(len(closed))]
        grid[(row + r) // 2, (column + c) // 2] = grid[r, c] = "O"
        walk.append((r, c))
    between = [(r, c) for r in range(1, rows - 1) for c in range(1, columns - 1) if (r + c) % 2]
    for r, c in between:
        if grid[r, c] == "#" and rng.random() < OPENINGS:
            grid[r, c] = "O"
    return tuple("".join(line) for line in grid)
