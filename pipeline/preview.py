"""A picture of a store: frames beside their tokens, as the eye can see them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write
from wmcache.common.paths import AnyPath
from wmcache.pipeline.repair import open_frames

FITTED_FRAMES = 256


def preview(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, count: int = 8) -> NDArray[np.int64]:
    """Draw frames of a store, and under each its tokens: red, green and blue are their first three principal components.

    Args:
        path: the store. out: the PNG to write.
        dataset: where the frames are now, if not where they were.
        count: how many, evenly spaced over the store.

    Returns:
        The frames that were drawn.

    Raises:
        UserError: an unusable store; frames that are missing or are not the store's.
    """
    store = TokenStore.open(path)
    frames = open_frames(store.card, dataset)
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not hold the frames of {path}; pass the right --dataset")
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
        parse_math=False,  # a name may hold a dollar
    )
    write_png(figure, out)
    return chosen


def write_png(figure: Figure, out: Path) -> None:
    """A figure as a PNG file, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(out) as file:
        file.write(picture.getvalue())


def principal_colours(store: TokenStore, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    """The first three principal components of the chosen frames' tokens, in [0, 1], [len(chosen), rows, columns, 3].

    The components are those of tokens all over the store, so that a colour means the same in every picture of it.
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
