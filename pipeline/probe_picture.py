"""Pictures of a store's landscape: token distances beside distances along the maze."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.common.landscapes import descend
from wmcache.common.paths import AnyPath, beside
from wmcache.common.sampling import farthest_points
from wmcache.envs import Maze
from wmcache.pipeline.landscape import STUCK_DISTANCE, Float, find_maze, neighbours, rank_correlation
from wmcache.pipeline.probe import FEWEST_FRAMES, choose_frames

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_GOALS = 5


def draw_probe(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, goals: int = DRAWN_GOALS) -> None:
    """Draw held-out frames at their positions, coloured by their distance to some goals: of tokens above, along the maze below.

    Red points mark frames from which descent of the token distance does not end at the goal.

    Args:
        path: the store.
        out: the PNG to write.
        dataset: as in `probe`.
        goals: number of goals, as far from each other as possible.

    Raises:
        UserError: an unusable store, another dataset, too few frames, or no maze.
    """
    # Only here: half a second that fits and extractions do not need.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    store = TokenStore.open(path)
    maze = find_maze(store, dataset)
    if maze is None:
        raise UserError(f"{path} has no maze, so there are no true distances to draw; its other figures: wmcache probe")
    _, val = choose_frames(store, FEWEST_FRAMES)
    tokens, xy = store.gather(val).astype(np.float32), store.state[val, :2]
    chosen, true = spread(xy, maze, goals)
    latent = np.stack([np.square(tokens - tokens[goal]).sum((1, 2)) for goal in chosen])
    low, high = _bounds(maze)
    across, up = high - low
    width = 2.2 if up < 1.2 * across else 1.9
    figure = Figure(
        figsize=(width * len(chosen) + 1.0, 2 * width * up / across + 0.75),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.01, hspace=0.01),
        dpi=130,
    )
    panels = figure.subplots(2, len(chosen), squeeze=False)
    rows = (("distance of tokens", np.sqrt(latent)), ("distance along the maze", true))
    for axes_row, (label, distances) in zip(panels, rows, strict=True):
        most = float(np.quantile(distances[np.isfinite(distances)], 0.995))
        for axes, goal, values in zip(axes_row, chosen, distances, strict=True):
            dots = _draw_distances(axes, maze, xy, goal, values, most)
        axes_row[0].set_ylabel(label, fontsize=9)
        figure.colorbar(dots, ax=list(axes_row), shrink=0.85, aspect=18, pad=0.01).outline.set_visible(False)
    near = neighbours(maze, xy)
    for axes, values, lengths in zip(panels[0], latent, true, strict=True):
        _mark_stuck(axes, xy, lengths, descend(values, near), values)
    figure.suptitle(
        f"{path.resolve().parent.name}/{path.name}: {len(val)} held-out frames by their distance to the star, "
        "a red point where descending it gets stuck",
        fontsize=9,
        parse_math=False,  # a name may contain a dollar sign
    )
    with atomic_write(out) as file:
        file.write(png_bytes(figure))


def _bounds(maze: Maze) -> tuple[Float, Float]:
    """Corners of the free cells, without most of the outer walls."""
    free = np.argwhere(maze.free)
    return free.min(0) - 0.85, free.max(0) + 0.45


def _draw_distances(axes: Axes, maze: Maze, xy: Float, goal: int, values: NDArray[np.floating], most: float) -> Any:
    """Draw the maze, and the positions coloured by a distance up to `most`; returns the points."""
    low, high = _bounds(maze)
    walls = np.where(maze.free, np.nan, 1.0).T
    axes.imshow(walls, origin="lower", extent=maze.extent, cmap="Greys", vmin=0, vmax=3, interpolation="nearest")
    order = np.argsort(-values)  # points near the goal on top
    dots = axes.scatter(
        xy[order, 0], xy[order, 1], c=values[order], s=11, cmap="viridis_r", vmin=0, vmax=most, linewidths=0
    )
    axes.plot(*xy[goal], "*", color="#111111", markersize=13, markeredgecolor="white", markeredgewidth=0.8)
    axes.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.spines[:].set_visible(False)
    return dots


def _mark_stuck(axes: Axes, xy: Float, true: Float, ends: NDArray[np.int64], latent: NDArray[np.floating]) -> None:
    """Mark frames from which descent gets stuck, and write the figures of this goal as the title."""
    reachable = np.isfinite(true)
    stuck = reachable & (true[ends] > STUCK_DISTANCE)
    axes.plot(*xy[stuck].T, "o", color="#ff4a30", markersize=1.6, markeredgewidth=0)
    rank = rank_correlation(latent[reachable], true[reachable])
    shown = "-" if rank is None else f"{rank:.2f}"
    axes.set_title(f"Spearman {shown}, stuck {stuck.sum() / reachable.sum():.0%}", fontsize=8)


def picture_paths(stores: Sequence[AnyPath], out: Path | None = None) -> list[Path]:
    """The picture of each store: beside it, or in `out` as `<folder>-<store>.probe.png`; raises UserError for equal paths."""
    resolved = [store.resolve() for store in stores]
    paths = [
        beside(store, ".probe.png") if out is None else out / f"{store.parent.name}-{store.stem}.probe.png"
        for store in resolved
    ]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"two of the stores would be drawn at {path}; name each once, or leave out --out")
    return paths


def spread(xy: Float, maze: Maze, count: int) -> tuple[list[int], Float]:
    """Choose at most `count` positions far from each other of xy [n, 2]; returns them and their path lengths to all, [count, n]."""
    lengths: dict[int, Float] = {}

    def distances(index: int) -> torch.Tensor:
        lengths[index] = maze.geodesic(xy[index], xy)
        return torch.from_numpy(np.where(np.isfinite(lengths[index]), lengths[index], -1.0))

    chosen = farthest_points(distances, min(count, len(xy)), first=int(distances(0).argmax()))
    return chosen, np.stack([lengths[index] for index in chosen])
