"""Training windows, splits of episodes and orders of batches; pure functions, so that any run can be repeated."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError

if TYPE_CHECKING:
    from wmcache.cache.store import TokenStore

    Int = NDArray[np.int64]

TRAIN_FRACTION = 0.9
SPLIT_SEED = 42
"""DINO-WM's."""


@dataclass(frozen=True)
class Windows:
    """Training windows: frames s, s + f, s + 2f, … with the f env actions that follow each (DINO-WM, datasets/traj_dset.py).

    Attributes:
        starts: int64 [windows], the first frame of each.
        history, predict: context and target frames.
        frameskip: f, env steps between frames.
        dropped_episodes: how many episodes of the split are too short for one window.
        extras: name in a batch -> store with a row for each frame of `source`.
    """

    source: TokenStore
    starts: Int
    history: int
    predict: int
    frameskip: int
    dropped_episodes: int
    extras: Mapping[str, TokenStore] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    @property
    def length(self) -> int:
        """T, frames in a window."""
        return self.history + self.predict

    def with_extras(self, extras: Mapping[str, TokenStore]) -> Windows:
        """Return the same windows with rows of other stores beside the tokens."""
        return replace(self, extras=extras)

    def frames(self, windows: Int) -> Int:
        """Return the frames of some windows, int64 [B, T]."""
        return self.starts[windows][:, None] + self.frameskip * np.arange(self.length)

    def batch(self, windows: Int, out: NDArray[np.float16] | None = None) -> dict[str, NDArray[Any]]:
        """Read windows [B]: tokens float16 [B, T, N, D], in `out` [B * T, N, D] if given, and what `steps` returns."""
        frames = self.frames(windows)
        tokens = self.source.gather(frames.ravel(), out)
        return {"tokens": tokens.reshape(*frames.shape, *tokens.shape[1:]), **self.steps(frames)}

    def steps(self, frames: Int) -> dict[str, NDArray[Any]]:
        """Read what accompanies the tokens of frames [B, T].

        Returns:
            proprio float32 [B, T, P], P = 0 where the store has none; action float32 [B, T, f * A], the f env actions from each frame to
            the next; where the store has them, reward float32 [B, T], the sum over those env steps, and terminated bool [B, T], whether
            one of them ends the episode; float16 [B, T, …] of each of `extras`.
        """
        source, following = self.source, frames[:, :, None] + np.arange(self.frameskip)
        found = {name: store.gather(frames.ravel()) for name, store in self.extras.items()}
        rows = {name: values.reshape(*frames.shape, *values.shape[1:]) for name, values in found.items()}
        if source.reward is not None:
            rows["reward"] = source.reward[following].sum(-1)
        if source.terminated is not None:
            rows["terminated"] = source.terminated[following].any(-1)
        proprio = np.zeros((*frames.shape, 0), np.float32) if source.proprio is None else source.proprio[frames]
        return {"proprio": proprio, "action": source.action[following].reshape(*frames.shape, -1), **rows}


def split_episodes(episodes: int, split: str, seed: int, fraction: float = 1.0) -> Int:
    """Choose the episodes of `train`, `val` or `all`: 90 % train, and at least one val where there are two or more.

    A larger `fraction` of a split's episodes contains every smaller one. Raise UserError for an unknown or an empty split.
    """
    order = np.random.default_rng(seed).permutation(episodes)
    cut = min(round(TRAIN_FRACTION * episodes), episodes - 1)
    parts = {"train": order[:cut], "val": order[cut:], "all": order}
    if split not in parts:
        raise UserError(f"no split {split!r}; known are {', '.join(parts)}")
    if not len(parts[split]):
        raise UserError(f"{episodes} episodes are too few for a {split} split; collect more")
    return np.sort(parts[split][: max(1, round(fraction * len(parts[split])))])


def window_starts(episode: NDArray[np.integer], episodes: Int, span: int) -> tuple[Int, int]:
    """Find the first frames of all windows of `span` consecutive frames inside the given episodes.

    `episode` [frames] is the episode of each frame, ascending. The actions after the last frame of a window belong to its span.

    Returns:
        int64 [windows], ascending, and the number of episodes that are shorter than `span`.
    """
    first = np.searchsorted(episode, episodes, side="left")
    length = np.searchsorted(episode, episodes, side="right") - first
    long_enough = length >= span
    counts = np.where(long_enough, length - span + 1, 0)
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum()), int((~long_enough).sum())


@functools.lru_cache(maxsize=2)  # the present epoch and the next one
def epoch_order(windows: int, seed: int, epoch: int) -> Int:
    """Return the order of an epoch, which depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batch_windows(windows: int, seed: int, step: int, batch: int, rank: int = 0, world_size: int = 1) -> Int:
    """Return the windows of a training step, or a rank's slice of them; it depends on the arguments alone.

    The orders of epochs 0, 1, … one after another are cut into batches, and each batch into `world_size` equal slices, so a resumed run
    continues with the same batches, with any number of processes.
    """
    if batch % world_size:
        raise ValueError(f"a batch of {batch} cannot be cut into {world_size} equal slices")
    size = batch // world_size
    first = step * batch + rank * size
    epochs, positions = np.divmod(np.arange(first, first + size), windows)
    parts = [epoch_order(windows, seed, epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    return np.concatenate(parts)


def split_frames(episode: NDArray[np.integer], split: str, seed: int = SPLIT_SEED) -> Int:
    """Return the frames of a split, ascending; `episode` [frames] is the episode of each frame. See `split_episodes`."""
    return np.flatnonzero(np.isin(episode, split_episodes(int(episode[-1]) + 1, split, seed)))
