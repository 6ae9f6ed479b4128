"""Maze layouts: text grids, their free region, and shortest path lengths.

A layout is a text file of `#` (wall) and `O` or `G` (free). Row r, column c of the text covers the square
[r - 0.7, r + 0.3] x [c - 0.7, c + 0.3] of the ball's coordinates, as in D4RL: the row runs along x, the column along y.
Every file in `mazes/` is an environment of its name. `Maze7x9-3` is a random maze of 7 lines of 9 characters, drawn from seed 3.

`I` is an entrance of a teleporter and `E` an exit: a ball whose centre is in an entrance after an env step is at rest in the centre of a
random exit instead (OGBench, locomaze: pointmaze-teleport). Every entrance leads to every exit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import KDTree

from wmcache.common.errors import UserError, reason
from wmcache.envs.pointmaze.generate import LEAST, MOST, random_rows

ENV_PREFIX = "wmcache/PointMaze-"
MAZES_DIR = Path(__file__).parent / "mazes"
GENERATED = re.compile(r"Maze(?P<rows>[0-9]{1,3})x(?P<columns>[0-9]{1,3})-(?P<seed>[0-9]{1,9})")

BALL_RADIUS = 0.1
START_MARGIN = 0.2
"""Distance of starts and goals from every wall (DINO-WM, env/pointmaze: [0.5, 1.1] in a corridor [0.3, 1.3])."""
LATTICE_STEP = 0.05
CENTRE = 0.2
"""A cell's row and column less its centre's coordinates."""
ENTRANCE, EXIT = "I", "E"
JUMP = 1e-9
"""Length of the way through a teleporter; not 0, which sparse graphs may drop."""

Float = NDArray[np.float64]


class MazeError(UserError):
    """A layout or a state in it that cannot be used."""


@dataclass(frozen=True)
class Maze:
    """A grid of walls.

    Attributes:
        name: as in the environment id, for example `UMaze`.
        rows: the text grid, equal lengths, closed by walls all around.
    """

    name: str
    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise MazeError for a grid without free cells, or that the ball could leave."""
        rows = self.rows
        if not rows or len({len(row) for row in rows}) != 1:
            raise MazeError(f"maze {self.name}: the lines of the grid must have equal length")
        if unknown := set("".join(rows)) - {*"#OG", ENTRANCE, EXIT}:
            raise MazeError(
                f"maze {self.name}: unknown characters {sorted(unknown)}; use # for walls, O or G for free, I and E for teleporters"
            )
        border = rows[0] + rows[-1] + "".join(row[0] + row[-1] for row in rows)
        if set(border) != {"#"}:
            raise MazeError(f"maze {self.name}: the outermost cells must all be walls (#)")
        if not (self.free & ~self.entrances).any():
            raise MazeError(f"maze {self.name}: no cell is free (O)")
        if self.entrances.any() != bool(len(self.exits)):
            raise MazeError(f"maze {self.name}: a teleporter needs an entrance (I) and an exit (E); add the other")

    @classmethod
    def load(cls, name: str | Path) -> Maze:
        """Read a layout by its name (`UMaze`) or from a text file, or draw one (`Maze7x9-3`); raises MazeError."""
        path = Path(name)
        if drawn := GENERATED.fullmatch(str(name)):
            return cls._draw(str(name), *map(int, drawn.groups()))
        if path.suffix != ".txt":
            path = MAZES_DIR / f"{name}.txt"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(maze_names())
            raise MazeError(
                f"no maze {str(name)!r} ({reason(error)}): known are {known}, Maze7x7-SEED, or a .txt grid"
            ) from error
        return cls(path.stem, tuple(line.strip() for line in text.splitlines() if line.strip()))

    @classmethod
    def _draw(cls, name: str, rows: int, columns: int, seed: int) -> Maze:
        if not all(LEAST <= side <= MOST and side % 2 for side in (rows, columns)):
            raise MazeError(f"maze {name}: lines and columns must be odd numbers from {LEAST} to {MOST}")
        return cls(name, random_rows(rows, columns, seed))

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        """[rows, columns]; True where the ball may be."""
        return np.array([[cell != "#" for cell in row] for row in self.rows])

    @cached_property
    def entrances(self) -> NDArray[np.bool_]:
        """[rows, columns]; True for entrances of teleporters."""
        return np.array([[cell == ENTRANCE for cell in row] for row in self.rows])

    @cached_property
    def exits(self) -> Float:
        """Centres [n, 2] of the exits of teleporters."""
        return np.argwhere([[cell == EXIT for cell in row] for row in self.rows]).astype(np.float64) - CENTRE

    def in_entrance(self, xy: Float) -> NDArray[np.bool_]:
        """Whether each position [..., 2] is in an entrance of a teleporter."""
        row, column = np.moveaxis(np.clip(np.floor(xy + 0.7).astype(int), 0, np.array(self.free.shape) - 1), -1, 0)
        return np.asarray(self.entrances[row, column])

    def teleport(self, state: Float, rng: np.random.Generator) -> Float:
        """Return a state [4]; of a ball in an entrance that of a ball at rest in an exit, which is all that draws from `rng`."""
        if not len(self.exits) or not self.in_entrance(state[:2]):
            return state
        return np.append(self.exits[rng.integers(len(self.exits))], (0.0, 0.0))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """x_min, x_max, y_min, y_max of the whole grid, walls included, in the ball's coordinates."""
        return -0.7, len(self.rows) - 0.7, -0.7, len(self.rows[0]) - 0.7

    def is_clear(self, xy: Float, margin: float = BALL_RADIUS) -> NDArray[np.bool_]:
        """Whether each position [..., 2] keeps `margin` (per axis, as a square ball would; a cell is 1 wide) from every wall."""
        clear = np.ones(xy.shape[:-1], dtype=bool)
        limit = np.array(self.free.shape) - 1
        for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            cell = np.floor(xy + margin * np.array(corner) + 0.7).astype(int)
            inside = ((cell >= 0) & (cell <= limit)).all(-1)
            row, column = np.moveaxis(np.clip(cell, 0, limit), -1, 0)
            clear &= inside & self.free[row, column]
        return clear

    def sample_xy(self, rng: np.random.Generator) -> Float:
        """Draw a position [2] uniformly from the free region outside entrances, START_MARGIN away from the walls."""
        x_min, x_max, y_min, y_max = self.extent
        while True:
            xy = rng.uniform((x_min, y_min), (x_max, y_max))
            if self.is_clear(xy, START_MARGIN) and not self.in_entrance(xy):
                return xy

    @property
    def walls(self) -> NDArray[np.bool_]:
        """[rows, columns]; True where the ball cannot be."""
        return ~self.free

    def position(self, states: Float) -> Float:
        """Return (x, y) of states [..., 4], or of positions [..., 2]."""
        return states[..., :2]

    def is_free(self, states: Float) -> NDArray[np.bool_]:
        """Return whether states [..., 4] are outside the walls and entrances, where a ball never is after an env step."""
        return self.is_clear(states[..., :2], 0.0) & ~self.in_entrance(states[..., :2])

    def distance(self, start: Float, ends: Float) -> Float:
        """Compute `geodesic` of states [4] and [n, 4]."""
        return self.geodesic(start[:2], ends[:, :2])

    def path_length(self, path: Float) -> float:
        """Measure a path [n, 2] of successive positions; a jump, which ends exactly in an exit's centre, has no length."""
        jumps = (path[1:, None] == self.exits).all(-1).any(-1)
        return float(np.linalg.norm(np.diff(path, axis=0), axis=1)[~jumps].sum())

    @cached_property
    def _lattice(self) -> tuple[Float, csr_array]:
        """Free lattice points [n, 2], and the symmetric graph of straight moves between them (16 directions, at most 2.7 % too long)."""
        x_min, x_max, y_min, y_max = self.extent
        xs, ys = np.arange(x_min, x_max, LATTICE_STEP), np.arange(y_min, y_max, LATTICE_STEP)
        points = np.stack(np.meshgrid(xs, ys, indexing="ij"), -1)
        free = self.is_clear(points)
        number = np.full(free.shape, -1)
        number[free] = np.arange(free.sum())
        edges = []
        for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1)):
            low, high = max(0, -dy), free.shape[1] - max(0, dy)
            here, there = number[: free.shape[0] - dx, low:high], number[dx:, low + dy : high + dy]
            both = (here >= 0) & (there >= 0)
            edges.append((np.full(both.sum(), LATTICE_STEP * np.hypot(dx, dy)), here[both], there[both]))
        lengths, sources, targets = (np.concatenate(parts) for parts in zip(*edges, strict=True))
        size = int(free.sum())
        graph = coo_array((lengths, (sources, targets)), shape=(size, size)).tocsr()
        return points[free], (graph + graph.T).tocsr()

    @cached_property
    def _outside(self) -> tuple[KDTree, NDArray[np.int64]]:
        """Lattice points outside entrances, and their numbers."""
        numbers = np.flatnonzero(~self.in_entrance(self._lattice[0]))
        return KDTree(self._lattice[0][numbers]), numbers

    def _nearest(self, xy: Float) -> NDArray[np.int64]:
        """Return the numbers [n] of the lattice points next to positions [n, 2]."""
        tree, numbers = self._outside
        return np.asarray(numbers[tree.query(xy)[1]])

    @cached_property
    def _routes(self) -> list[csr_array]:
        """Graphs of the lattice: around the teleporters; also, where there are any, through them, from an entrance to each exit."""
        graph = self._lattice[1]
        if not len(self.exits):
            return [graph]
        entered = self.in_entrance(self._lattice[0])
        around = (diags_array((~entered).astype(float)) @ graph).tocsr()
        around.eliminate_zeros()
        sources, targets = np.meshgrid(np.flatnonzero(entered), self._nearest(self.exits))
        jumps = coo_array((np.full(sources.size, JUMP), (sources.ravel(), targets.ravel())), shape=graph.shape)
        return [around, (around + jumps.tocsr()).tocsr()]

    def geodesic(self, start: Float, ends: Float) -> Float:
        """Compute shortest path lengths of the ball's centre from start [2] to ends [n, 2], in maze units; inf if unreachable.

        A path may use teleporters, always with the luckiest exit, and a jump has no length: no recorded path is shorter.
        """
        length: Float = dijkstra(self._routes[-1], indices=self._nearest(start[None])[0])[self._nearest(ends)]
        straight = np.linalg.norm(ends - start, axis=-1)
        if not len(self.exits):
            length = np.maximum(length, straight)
        # Within a few lattice steps the lattice's own error dominates, and the path is straight.
        result: Float = np.where(straight < 2 * LATTICE_STEP, straight, length)
        return result

    def toward(self, start: Float, end: Float, ahead: float) -> Float:
        """Return the point [2] that is `ahead` along the shortest path from start [2] to end [2]; `end` where that is nearer.

        The path leads through a teleporter only where no other one exists. Where a teleporter has led to a room without a path to the end,
        it is `start`.

        Raises:
            MazeError: no path leads to the end in a maze without teleporters.
        """
        if np.linalg.norm(end - start) <= ahead:
            return end
        points = self._lattice[0]
        here, there = self._nearest(np.stack([start, end])).tolist()
        found = (self._next_points(there, route) for route in range(len(self._routes)))
        if (next_points := next((known for known in found if here == there or known[here] >= 0), None)) is None:
            if len(self.exits):
                return start
            raise MazeError(f"maze {self.name}: no path leads from {start.round(2)} to {end.round(2)}")
        length, point = 0.0, here
        while length < ahead and point != there and not self.in_entrance(points[point]):
            following = int(next_points[point])
            length += float(np.linalg.norm(points[following] - points[point]))
            point = following
        return end if point == there else np.asarray(points[point])

    def _next_points(self, end: int, route: int) -> NDArray[np.int32]:
        """Return for each lattice point the next one on its shortest path to the lattice point `end`; negative for none."""
        if (end, route) not in self._paths:
            graph = self._routes[route]
            backwards = graph.T.tocsr() if len(self.exits) else graph
            self._paths[end, route] = dijkstra(backwards, indices=end, return_predecessors=True)[1]
        return self._paths[end, route]

    @cached_property
    def _paths(self) -> dict[tuple[int, int], NDArray[np.int32]]:
        return {}


def maze_names() -> list[str]:
    """Return the names of the layouts that come with wmcache."""
    return sorted(path.stem for path in MAZES_DIR.glob("*.txt"))


def find_maze(env: str) -> Maze:
    """Return the maze of an environment id (`wmcache/PointMaze-UMaze-v0`), of a layout's name (`UMaze`) or of a text file."""
    return Maze.load(env.removeprefix(ENV_PREFIX).removesuffix("-v0") if env.startswith(ENV_PREFIX) else env)


def env_id(maze: Maze) -> str:
    """Return the environment id of a maze that comes with wmcache; the name of any other."""
    is_known = maze.name in maze_names() and find_maze(maze.name) == maze
    return f"{ENV_PREFIX}{maze.name}-v0" if is_known else maze.name
