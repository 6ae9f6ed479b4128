"""Pictures of a store: frames above their tokens, and distances of tokens above path lengths."""

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
from wmcache.common.files import write_whole
from wmcache.common.paths import AnyPath, beside
from wmcache.common.sampling import descend, farthest_points
from wmcache.envs import Geometry
from wmcache.pipeline.probe import (
    FEWEST_FRAMES,
    STUCK_DISTANCE,
    Float,
    choose_frames,
    find_geometry,
    neighbours,
    rank_correlation,
)
from wmcache.pipeline.stores import frames_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FITTED_FRAMES = 256
DRAWN_GOALS = 5


def preview(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, count: int = 8) -> NDArray[np.int64]:
    """Draw `count` frames of a store, and under each the first three principal components of its tokens as red, green and blue.

    Returns the numbers of the frames, which are evenly spaced over the store; raises UserError if they are missing or others.
    """
    from matplotlib.figure import Figure  # half a second that a study does not need

    store = TokenStore.open(path)
    frames = frames_of(store, dataset)
    chosen = np.unique(np.linspace(0, len(store) - 1, count).astype(np.int64))
    images, colours = frames.read_frames(chosen), principal_colours(store, chosen)
    figure = Figure(figsize=(max(8.0, 1.7 * len(chosen)), 3.9), layout="constrained", dpi=110)
    rows = figure.subplots(2, len(chosen), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for column, frame in enumerate(chosen):
        rows[0, column].imshow(images[column])
        rows[0, column].set_title(f"episode {store.episode[frame]}\nstep {store.step[frame]}", fontsize=8)
        rows[1, column].imshow(colours[column], interpolation="nearest")
    grid = "{} x {}".format(*store.card.token_grid)
    figure.suptitle(
        f"{path.name}: {grid} tokens of {store.card.token_dim}, principal components as colours",
        fontsize=9,
        parse_math=False,  # a name may contain a dollar sign
    )
    write_whole(out, png_bytes(figure))
    return chosen


def principal_colours(store: TokenStore, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    """Project tokens on three principal components of the whole store, scaled to [0, 1], [len(chosen), rows, columns, 3]."""
    fitted = np.unique(np.linspace(0, len(store) - 1, FITTED_FRAMES).astype(np.int64))
    mean = store.mean.astype(np.float32)
    everywhere = store.gather(fitted).astype(np.float32).reshape(-1, store.card.token_dim) - mean
    _, axes = np.linalg.eigh(everywhere.T @ everywhere)
    axes = axes[:, ::-1][:, :3]
    low, high = np.percentile(everywhere @ axes, [1, 99], axis=0)
    values = (store.gather(chosen).astype(np.float32) - mean) @ axes
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1)
    colours = np.zeros((len(chosen), *store.card.token_grid, 3), np.float32)
    colours[..., : axes.shape[1]] = scaled.reshape(len(chosen), *store.card.token_grid, -1)
    return colours


def draw_probe(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, goals: int = DRAWN_GOALS) -> None:
    """Draw held-out frames at their positions, coloured by their distance to some goals: of tokens above, of paths below.

    Red points mark frames from which descent of the token distance does not end at the goal. Raises UserError as `probe` does, and for
    frames whose geometry is not known.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    store = TokenStore.open(path)
    geometry = find_geometry(store, dataset)
    if geometry is None:
        raise UserError(
            f"{path}: shortest paths are not known in its environment, so none are drawn; other figures: wmcache probe"
        )
    _, val = choose_frames(store, FEWEST_FRAMES)
    tokens, states = store.gather(val).astype(np.float32), store.require_state()[val]
    xy = geometry.position(states)
    chosen, true = spread(states, geometry, goals)
    latent = np.stack([np.square(tokens - tokens[goal]).sum((1, 2)) for goal in chosen])
    low, high = _bounds(geometry)
    across, up = high - low
    width = 2.2 if up < 1.2 * across else 1.9
    figure = Figure(
        figsize=(width * len(chosen) + 1.0, 2 * width * up / across + 0.75),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.01, hspace=0.01),
        dpi=130,
    )
    panels = figure.subplots(2, len(chosen), squeeze=False)
    rows = (("distance of tokens", np.sqrt(latent)), ("length of the shortest path", true))
    for axes_row, (label, distances) in zip(panels, rows, strict=True):
        most = float(np.quantile(distances[np.isfinite(distances)], 0.995))
        for axes, goal, values in zip(axes_row, chosen, distances, strict=True):
            dots = _draw_distances(axes, geometry, xy, goal, values, most)
        axes_row[0].set_ylabel(label, fontsize=9)
        figure.colorbar(dots, ax=list(axes_row), shrink=0.85, aspect=18, pad=0.01).outline.set_visible(False)
    near = neighbours(geometry, states)
    for axes, values, lengths in zip(panels[0], latent, true, strict=True):
        _mark_stuck(axes, xy, lengths, descend(values, near), values)
    figure.suptitle(
        f"{path.resolve().parent.name}/{path.name}: {len(val)} held-out frames by their distance to the star, "
        "a red point where descending it gets stuck",
        fontsize=9,
        parse_math=False,
    )
    write_whole(out, png_bytes(figure))


def _bounds(geometry: Geometry) -> tuple[Float, Float]:
    # Corners of the free cells, without most of the outer walls.
    x_min, x_max, y_min, y_max = geometry.extent
    cell = np.array([x_max - x_min, y_max - y_min]) / geometry.walls.shape
    free = np.argwhere(~geometry.walls)
    return (x_min, y_min) + (free.min(0) - 0.15) * cell, (x_min, y_min) + (free.max(0) + 1.15) * cell


def _draw_distances(
    axes: Axes, geometry: Geometry, xy: Float, goal: int, values: NDArray[np.floating], most: float
) -> Any:
    low, high = _bounds(geometry)
    walls = np.where(geometry.walls, 1.0, np.nan).T
    axes.imshow(walls, origin="lower", extent=geometry.extent, cmap="Greys", vmin=0, vmax=3, interpolation="nearest")
    order = np.argsort(-values)  # points near the goal on top
    dots = axes.scatter(
        xy[order, 0], xy[order, 1], c=values[order], s=11, cmap="viridis_r", vmin=0, vmax=most, linewidths=0
    )
    axes.plot(*xy[goal], "*", color="#111111", markersize=13, markeredgecolor="white", markeredgewidth=0.8)
    axes.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.spines[:].set_visible(False)
    return dots


def _mark_stuck(axes: Axes, xy: Float, true: Float, ends: NDArray[np.int64], latent: NDArray[np.floating]) -> None:
    reachable = np.isfinite(true)
    stuck = reachable & (true[ends] > STUCK_DISTANCE)
    axes.plot(*xy[stuck].T, "o", color="#ff4a30", markersize=1.6, markeredgewidth=0)
    rank = rank_correlation(latent[reachable], true[reachable])
    shown = "-" if rank is None else f"{rank:.2f}"
    axes.set_title(f"Spearman {shown}, stuck {stuck.sum() / reachable.sum():.0%}", fontsize=8)


def picture_paths(stores: Sequence[AnyPath], out: Path | None = None) -> list[Path]:
    """Name the picture of each store: beside it, or in `out` as `<folder>-<store>.probe.png`; raises UserError for equal paths."""
    resolved = [store.resolve() for store in stores]
    paths = [
        beside(store, ".probe.png") if out is None else out / f"{store.parent.name}-{store.stem}.probe.png"
        for store in resolved
    ]
    if repeated := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise UserError(f"two of the stores would be drawn at {repeated[0]}; name each once, or leave out --out")
    return paths


def spread(states: Float, geometry: Geometry, count: int) -> tuple[list[int], Float]:
    """Choose at most `count` of states [n, S], far from each other; returns them and their path lengths to all, [count, n]."""
    lengths: dict[int, Float] = {}

    def distances(index: int) -> torch.Tensor:
        lengths[index] = geometry.distance(states[index], states)
        return torch.from_numpy(np.where(np.isfinite(lengths[index]), lengths[index], -1.0))

    chosen = farthest_points(distances, min(count, len(states)), first=int(distances(0).argmax()))
    return chosen, np.stack([lengths[index] for index in chosen])
