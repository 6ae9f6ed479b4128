"""Train an encoder on the dataset's own frames, and measure whether its latent distance is one that a planner can descend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm
from wmcache.cache.device import choose_device
from wmcache.cache.errors import UserError
from wmcache.cache.files import atomic_write, home, seconds_between_updates
from wmcache.cache.windows import split_episodes
from wmcache.envs import Maze
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.frames import FrameDataset

PROBED_FRAMES = 1000
PROBED_GOALS = 40
STEP_DISTANCE = 0.5
STUCK_DISTANCE = 0.5


@dataclass(frozen=True)
class Landscape:
    """Whether a planner can descend the squared token distance to a goal.

    Attributes:
        spearman: rank correlation with the true geodesic distance, over pairs of held-out frames.
        stuck: share of held-out frames from which moving always to the best place in sight does not lead to the goal.
    """

    spearman: float
    stuck: float


@dataclass(frozen=True)
class Fitted:
    """What a fit gave.

    Attributes:
        weights: the file.
        frames: trained on.
        landscape: of held-out frames; None where the dataset shows no maze, so that no true distance is known.
    """

    weights: Path
    frames: int
    landscape: Landscape | None


def default_weights(dataset: FrameDataset, encoder: str) -> Path:
    """`$WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors`."""
    return home() / "encoders" / f"{dataset.card.name}-{encoder}.safetensors"


def fit(
    dataset: FrameDataset,
    name: str,
    out: Path,
    options: FitOptions,
    *,
    max_frames: int,
    device: str = "auto",
    overwrite: bool = False,
) -> Fitted:
    """Fit an encoder and save its weights; where the same fit has been done before, only measure it again.

    Args:
        dataset: frames to train on; a tenth of the episodes is held out.
        name: of an encoder that can be fitted.
        out: safetensors file to write.
        options: how to train.
        max_frames: held in memory; the first episodes are taken where there are more.
        device: where to train.
        overwrite: replace the weights of another fit.

    Raises:
        UserError: the encoder cannot be fitted, other weights are at `out`, the dataset is too small, or the loss is not finite.
    """
    encoders.get_fitter(name)  # refuses before anything is read
    if not 0 < options.learning_rate < np.inf:
        raise UserError(f"--lr is {options.learning_rate}; it must be above 0")
    where = choose_device(device)
    chosen = split_frames(dataset, "train")[:max_frames]
    if len(chosen) < 2 * options.batch:
        raise UserError(
            f"{dataset.path} has {len(chosen)} training frames; a batch of {options.batch} pairs needs twice as many: collect more"
        )
    settings = {"encoder": name, "dataset": dataset.card.fingerprint, "frames": len(chosen), **asdict(options)}
    metadata = {key: str(value) for key, value in settings.items()}
    if overwrite or not out.exists():
        _train_and_save(dataset, name, chosen, out, options, metadata, where)
    elif read_metadata(out) != metadata:
        raise UserError(f"{out} holds the weights of another fit; choose another --out, or replace it with --overwrite")
    landscape = None
    if dataset.card.maze and dataset.steps.state.shape[1] >= 2:
        landscape = probe_landscape(dataset, encoders.create(name, weights=out, device=device))
    return Fitted(out, len(chosen), landscape)


def read_metadata(weights: Path) -> dict[str, str]:
    """What a fit wrote into the head of its file; raises UserError where it cannot be read."""
    try:
        with safe_open(weights, "np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read ({error}); replace it with --overwrite") from error


def _train_and_save(
    dataset: FrameDataset,
    name: str,
    chosen: NDArray[np.int64],
    out: Path,
    options: FitOptions,
    metadata: dict[str, str],
    device: torch.device,
) -> None:
    images = load_images(dataset, chosen, encoders.get_spec(name).image_size)
    steps = encoders.get_fitter(name)(images, dataset.steps.episode[chosen], options, device)
    trained: torch.nn.Module | None = None
    with tqdm(total=options.steps, desc=f"fit {name}", unit=" steps", mininterval=seconds_between_updates()) as bar:
        for loss, network in steps:
            if not np.isfinite(loss):
                raise UserError(f"the loss is not finite after {bar.n} steps; try a lower --lr")
            trained = network
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
    assert trained is not None
    weights = {key: value.detach().cpu().contiguous() for key, value in trained.state_dict().items()}
    with atomic_write(out) as file:
        file.write(save(weights, metadata=metadata))


def probe_landscape(dataset: FrameDataset, encoder: Encoder) -> Landscape:
    """Measure the latent distance between held-out frames; see `Landscape`."""
    held_out = split_frames(dataset, "val")
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(held_out, min(PROBED_FRAMES, len(held_out)), replace=False))
    frames = dataset.read_frames(chosen)
    tokens = torch.cat(
        [encoder(part).float().cpu() for part in np.array_split(frames, max(1, len(frames) // 64))]
    ).flatten(1)
    maze, xy = Maze(dataset.card.name, tuple(dataset.card.maze)), dataset.steps.state[chosen, :2]
    goals = rng.choice(len(chosen), min(PROBED_GOALS, len(chosen)), replace=False)
    latent = np.stack([(tokens - tokens[goal]).square().sum(1).numpy() for goal in goals])
    true = np.stack([maze.geodesic(xy[goal], xy) for goal in goals])
    reachable = np.isfinite(true)
    correlation = spearmanr(latent[reachable], true[reachable]).statistic
    near = neighbours(maze, xy)
    ends = [descend(values, near) for values in latent]
    stuck = [(true[i, end] > STUCK_DISTANCE)[reachable[i]].mean() for i, end in enumerate(ends)]
    return Landscape(float(correlation), float(np.mean(stuck)))


def split_frames(dataset: FrameDataset, split: str) -> NDArray[np.int64]:
    """The frames of a split of the episodes, ascending: the split that the trainer uses by default."""
    episode = dataset.steps.episode
    return np.flatnonzero(np.isin(episode, split_episodes(int(episode[-1]) + 1, split, 42)))


def neighbours(maze: Maze, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n, n]: which places see each other within STEP_DISTANCE."""
    near: NDArray[np.bool_] = np.linalg.norm(xy[:, None] - xy, axis=-1) < STEP_DISTANCE
    for share in (0.25, 0.5, 0.75):
        near &= maze.is_clear(share * xy[:, None] + (1 - share) * xy, 0.0)
    return near


def descend(values: NDArray[np.floating], near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where each place ends that always moves to its neighbour of lowest value, [n]."""
    step = np.where(near, values, np.inf).argmin(1)
    place = np.arange(len(values))
    while not (step[place] == place).all():
        place = step[place]
    return place


def load_images(dataset: FrameDataset, frames: NDArray[np.int64], size: int) -> Tensor:
    """Some frames, ascending, as uint8 [n, 3, size, size], resized as the encoder will; reads each shard once."""
    images = torch.empty(len(frames), 3, size, size, dtype=torch.uint8)
    shard_of = frames // dataset.card.frames_per_shard

    def load(shard: int) -> int:
        rows = np.flatnonzero(shard_of == shard)
        raw = dataset.read_shard(shard)[frames[rows] - dataset.shard_frames(shard).start]
        pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).float()
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        images[torch.from_numpy(rows)] = pixels.round_().byte()
        return len(rows)

    shards: Sequence[int] = np.unique(shard_of).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(frames), desc="read frames", unit=" frames") as bar:
        for count in pool.map(load, shards):
            bar.update(count)
    return images
