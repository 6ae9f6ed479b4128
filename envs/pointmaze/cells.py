"""The free cells of a maze as a graph, in which cells that share a side are neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import dijkstra

from wmcache.envs.pointmaze.maze import CENTRE, Maze


@dataclass(frozen=True)
class Cells:
    """Free cells of a maze, numbered row by row.

    Attributes:
        entrances: include entrances of teleporters, as floor.
    """

    maze: Maze
    entrances: bool = True

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        """[rows, columns]; True for cells of the graph."""
        return self.maze.free if self.entrances else self.maze.free & ~self.maze.entrances

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Row and column of each cell, [n, 2]."""
        return np.argwhere(self.free)

    @cached_property
    def centres(self) -> NDArray[np.float64]:
        """Position of each cell's centre, [n, 2]."""
        return self.places.astype(np.float64) - CENTRE

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        numbers = np.full(self.free.shape, -1)
        numbers[self.free] = np.arange(len(self.places))
        return numbers

    @cached_property
    def graph(self) -> csr_array:
        """Neighbours, [n, n]."""
        numbers = self._numbers
        pairs = [(numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])]
        here, there = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
        both = (here >= 0) & (there >= 0)
        sources, targets = np.concatenate([here[both], there[both]]), np.concatenate([there[both], here[both]])
        return coo_array((np.ones(len(sources)), (sources, targets)), shape=(len(self.places),) * 2).tocsr()

    @cached_property
    def corners(self) -> NDArray[np.int64]:
        """Cells that are no hallway: those with other free neighbours than two opposite ones."""
        free = np.pad(self.free, 1)
        row, column = (self.places + 1).T
        above, below, left, right = (
            free[row + down, column + along] for down, along in ((-1, 0), (1, 0), (0, -1), (0, 1))
        )
        along_x, along_y = above & below & ~left & ~right, left & right & ~above & ~below
        return np.flatnonzero(~(along_x | along_y))

    def number_of(self, xy: NDArray[np.float64]) -> int:
        """Return the cell of a position [2]; -1 outside the graph."""
        row, column = np.floor(xy + 0.7).astype(int)
        return int(self._numbers[row, column])

    def neighbours(self, cell: int) -> NDArray[np.int32]:
        """Return the cells that share a side with one."""
        graph = self.graph
        return np.asarray(graph.indices[graph.indptr[cell] : graph.indptr[cell + 1]])

    def lengths(self, cells: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Count the moves between a cell, or cells [k], and all others, [n] or [k, n]; inf where no path leads."""
        return np.asarray(dijkstra(self.graph, unweighted=True, indices=cells))
