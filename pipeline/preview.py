"""A picture of a store: frames above their tokens, with principal components as colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.common.paths import AnyPath
from wmcache.pipeline.repair import open_frames

FITTED_FRAMES = 256


def preview(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, count: int = 8) -> NDArray[np.int64]:
    """Draw frames of a store, and under each the first three principal components of its tokens as red, green and blue.

    Args:
        path: the store.
        out: the PNG to write.
        dataset: path of the frames, if they have moved.
        count: number of frames, evenly spaced over the store.

    Returns:
        The numbers of the frames.

    Raises:
        UserError: an unusable store, or missing or other frames.
    """
    store = TokenStore.open(path)
    frames = open_frames(store.card, dataset)
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not contain the frames of {path}; pass the right --dataset")
    chosen = np.unique(np.linspace(0, len(store) - 1, count).astype(np.int64))
    images = frames.read_frames(chosen)
    colours = principal_colours(store, chosen)
    figure = Figure(figsize=(max(8.0, 1.7 * len(chosen)), 3.9), layout="constrained", dpi=110)
    rows = figure.subplots(2, len(chosen), squeeze=False)
    for column, frame in enumerate(chosen):
        rows[0, column].imshow(images[column])
        rows[0, column].set_title(f"episode {store.episode[frame]}\nstep {store.step[frame]}", fontsize=8)
        rows[1, column].imshow(colours[column], interpolation="nearest")
        for axes in rows[:, column]:
            axes.set_xticks([])
            axes.set_yticks([])
    grid = "{} x {}".format(*store.card.token_grid)
    figure.suptitle(
        f"{path.name}: {grid} tokens of {store.card.token_dim}, principal components as colours",
        fontsize=9,
        parse_math=False,  # a name may contain a dollar sign
    )
    with atomic_write(out) as file:
        file.write(png_bytes(figure))
    return chosen


def principal_colours(store: TokenStore, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    """Project tokens on their first three principal components, scaled to [0, 1], [len(chosen), rows, columns, 3].

    They are computed from frames of the whole store, so that a colour means the same in every picture of it.
    """
    fitted = np.unique(np.linspace(0, len(store) - 1, FITTED_FRAMES).astype(np.int64))
    mean = store.mean.astype(np.float32)
    everywhere = store.gather(fitted).astype(np.float32).reshape(-1, store.card.token_dim) - mean
    _, axes = np.linalg.eigh(everywhere.T @ everywhere)
    axes = axes[:, ::-1][:, : min(3, store.card.token_dim)]
    low, high = np.percentile(everywhere @ axes, [1, 99], axis=0)
    values = (store.gather(chosen).astype(np.float32) - mean) @ axes
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1)
    colours = np.zeros((len(chosen), *store.card.token_grid, 3), np.float32)
    colours[..., : axes.shape[1]] = scaled.reshape(len(chosen), *store.card.token_grid, -1)
    return colours
