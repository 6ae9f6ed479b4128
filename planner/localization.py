"""Where a world model looks for change, as a picture: over the frames of an episode that it was not trained on."""

from __future__ import annotations

import io
from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from wmcache.common.device import autocast
from wmcache.envs import PointMazeSimulator
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.planner.evaluate import EvalContext, cached_maze
from wmcache.trainer.models import Localizes

PICTURED = 8
SIDE = 224
MOST_STEPS = 40
TRUE, COMPUTED, LIKELY = "#1b6ca8", "#d1672b", "#8a4fa3"


def draw_localization(setting: EvalContext) -> bytes:
    """A PNG: frames with the patches that are about to change and those that the model computes; below, their shares of a frame over time.

    Args:
        setting: a run whose model can `locate`.
    """
    store, frameskip = setting.store, setting.frameskip
    seed = int(setting.config.get("split_seed", 42))
    steps = max(1, min(MOST_STEPS, store.longest_episode("val", seed=seed) // frameskip - 1))
    windows = store.windows(1, steps, frameskip, "val", seed=seed)
    data = {name: torch.from_numpy(value).to(setting.device) for name, value in windows.batch(np.zeros(1, int)).items()}
    model = setting.model
    assert isinstance(model, Localizes)
    simulator = PointMazeSimulator(cached_maze(setting.card), SIDE)
    images = np.stack([simulator.render(state) for state in store.state[windows.frames(np.zeros(1, int))[0]]])
    simulator.close()
    if model.labels_from_pixels:  # of no first frame, as in a store's change maps
        changes = changes_for(setting.card.token_grid, frameskip, "cpu")(np.stack([images[:-1], images[1:]], 1))
        data["changes"] = torch.cat([torch.zeros_like(changes[:1]), changes])[None].to(setting.device)
    with torch.inference_mode(), autocast(setting.device, setting.dtype):
        masks = {name: mask[0].cpu().numpy() for name, mask in model.change_masks(data).items()}
    return _draw(images, masks, setting.card.token_grid, frameskip)


def _draw(
    images: NDArray[np.uint8], masks: dict[str, NDArray[np.bool_]], grid: tuple[int, int], frameskip: int
) -> bytes:
    shown = np.unique(np.linspace(0, len(images) - 2, min(PICTURED, len(images) - 1)).astype(int))
    figure = Figure(figsize=(1.25 * len(shown) + 0.2, 3.4), layout="constrained", dpi=120)
    above, below = cast("tuple[SubFigure, SubFigure]", figure.subfigures(2, 1, height_ratios=(1.25, 2)))
    for axes, step in zip(above.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(images[step], extent=(0, grid[1], grid[0], 0))
        _fill(axes, masks["computed"][step].reshape(grid), COMPUTED, 0.45)
        _outline(axes, masks["changes"][step].reshape(grid), TRUE)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"env step {step * frameskip}", fontsize=7)
    curve = below.subplots()
    env_steps = frameskip * np.arange(len(images) - 1)
    for (name, mask), colour in zip(masks.items(), (TRUE, COMPUTED, LIKELY), strict=True):
        curve.plot(env_steps, mask.mean(1), ".-", color=colour, label=name, linewidth=1)
    curve.set_xlabel("env step", fontsize=8)
    curve.set_ylabel("share of the tokens", fontsize=8)
    curve.set(ylim=(0, 1.3 * max(mask.mean(1).max() for mask in masks.values())))
    curve.legend(fontsize=7, frameon=False, loc="upper center", ncols=3)
    curve.tick_params(labelsize=7)
    curve.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _fill(axes: Axes, mask: NDArray[np.bool_], colour: str, opacity: float) -> None:
    picture = np.zeros((*mask.shape, 4))
    picture[mask] = to_rgba(colour, opacity)
    axes.imshow(picture, extent=(0, mask.shape[1], mask.shape[0], 0), interpolation="nearest")


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    padded = np.pad(mask, 1)
    for row, column in np.argwhere(mask):
        for di, dj, x, y in (
            (0, -1, (0, 0), (0, 1)),
            (0, 1, (1, 1), (0, 1)),
            (-1, 0, (0, 1), (0, 0)),
            (1, 0, (0, 1), (1, 1)),
        ):
            if not padded[row + 1 + di, column + 1 + dj]:
                axes.plot([column + x[0], column + x[1]], [row + y[0], row + y[1]], color=colour, linewidth=1.3)
