"""A picture of where a world model predicts change, over the frames of a held-out episode."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from wmcache.common.device import autocast
from wmcache.common.figures import png_bytes
from wmcache.envs import PointMazeSimulator
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.planner.context import EvalContext, cached_maze
from wmcache.trainer.models import Localizes

PICTURED = 8
SIDE = 224
MOST_STEPS = 40
COLOURS = {"changes": "#1b6ca8", "computed": "#d1672b", "likely to change": "#8a4fa3"}

Mask = NDArray[np.bool_]


def draw_localization(context: EvalContext) -> bytes:
    """Draw frames with the patches that change and those that the model computes, and their shares over time; returns a PNG."""
    images, masks = locate(context)
    grid, frameskip = context.card.token_grid, context.frameskip
    shown = np.unique(np.linspace(0, len(images) - 2, min(PICTURED, len(images) - 1)).astype(int))
    figure = Figure(figsize=(1.25 * len(shown) + 0.2, 3.4), layout="constrained", dpi=120)
    above, below = cast("tuple[SubFigure, SubFigure]", figure.subfigures(2, 1, height_ratios=(1.25, 2)))
    for axes, step in zip(above.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(images[step], extent=(0, grid[1], grid[0], 0))
        _fill(axes, masks["computed"][step].reshape(grid), COLOURS["computed"])
        _outline(axes, masks["changes"][step].reshape(grid), COLOURS["changes"])
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"env step {step * frameskip}", fontsize=7)
    curve = below.subplots()
    env_steps = frameskip * np.arange(len(images) - 1)
    for name, mask in masks.items():
        curve.plot(env_steps, mask.mean(1), ".-", color=COLOURS[name], label=name, linewidth=1)
    curve.set_xlabel("env step", fontsize=8)
    curve.set_ylabel("share of the tokens", fontsize=8)
    curve.set(ylim=(0, 1.3 * max(mask.mean(1).max() for mask in masks.values())))
    curve.legend(fontsize=7, frameon=False, loc="upper center", ncols=3)
    curve.tick_params(labelsize=7)
    curve.spines[["top", "right"]].set_visible(False)
    return png_bytes(figure)


def locate(context: EvalContext) -> tuple[NDArray[np.uint8], dict[str, Mask]]:
    """Mark the patches of a held-out episode; returns frames [T, S, S, 3], and masks [T - 1, N] by the names of COLOURS."""
    store, frameskip, model = context.store, context.frameskip, context.model
    assert isinstance(model, Localizes)
    seed = int(context.config.get("split_seed", 42))
    steps = max(1, min(MOST_STEPS, store.longest_episode("val", seed=seed) // frameskip - 1))
    windows, first = store.windows(1, steps, frameskip, "val", seed=seed), np.zeros(1, int)
    batch = {name: torch.from_numpy(value).to(context.device) for name, value in windows.batch(first).items()}
    simulator = PointMazeSimulator(cached_maze(context.card), SIDE)
    images = np.stack([simulator.render(state) for state in store.state[windows.frames(first)[0]]])
    simulator.close()
    if model.labels_from_pixels:  # a first frame has no changes, as in a store of change maps
        changes = changes_for(context.card.token_grid, frameskip, "cpu")(np.stack([images[:-1], images[1:]], 1))
        batch["changes"] = torch.cat([torch.zeros_like(changes[:1]), changes])[None].to(context.device)
    with torch.inference_mode(), autocast(context.device, context.dtype):
        return images, {name: mask[0].cpu().numpy() for name, mask in model.change_masks(batch).items()}


def _fill(axes: Axes, mask: Mask, colour: str) -> None:
    picture = np.zeros((*mask.shape, 4))
    picture[mask] = to_rgba(colour, 0.45)
    axes.imshow(picture, extent=(0, mask.shape[1], mask.shape[0], 0), interpolation="nearest")


def _outline(axes: Axes, mask: Mask, colour: str) -> None:
    padded = np.pad(mask, 1)
    sides = {(0, -1): ((0, 0), (0, 1)), (0, 1): ((1, 1), (0, 1)), (-1, 0): ((0, 1), (0, 0)), (1, 0): ((0, 1), (1, 1))}
    for row, column in np.argwhere(mask):
        for (di, dj), (x, y) in sides.items():
            if not padded[row + 1 + di, column + 1 + dj]:
                axes.plot([column + x[0], column + x[1]], [row + y[0], row + y[1]], color=colour, linewidth=1.3)
