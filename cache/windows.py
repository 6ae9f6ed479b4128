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
class Goals:
    """How goals are drawn in hindsight (arXiv 1707.01495): a later frame of the same episode, k model steps after a window's last frame.

    Attributes:
        horizon: largest k; None: up to the end of the episode.
        discount: k is geometric with this discount, cut off at its largest value; 1: uniform.
    """

    horizon: int | None = None
    discount: float = 1.0

    def steps(self, most: Int, draws: NDArray[np.float64]) -> Int:
        """Return k from 1 to `most` [B], by inverting the distribution at `draws` [B] in [0, 1)."""
        most = most if self.horizon is None else np.minimum(most, self.horizon)
        if self.discount < 1:
            reached = 1 - self.discount**most
            k = 1 + np.floor(np.log1p(-draws * reached) / np.log(self.discount)).astype(np.int64)
        else:
            k = 1 + (draws * most).astype(np.int64)
        chosen: Int = np.clip(k, 1, most)
        return chosen


@dataclass(frozen=True)
class Windows:
    """Training windows: frames s, s + f, s + 2f, … with the f env actions that follow each (DINO-WM, datasets/traj_dset.py).

    Attributes:
        starts: int64 [windows], the first frame of each.
        history, predict: context and target frames.
        frameskip: f, env steps between frames.
        dropped_episodes: how many episodes of the split are too short for one window.
        lengths: int64 [windows], the frames that each has, where some have less than T; the others repeat their last frame. None: all T.
        extras: name in a batch -> store with a row for each frame of `source`.
        goals: how batches draw goal frames; None: they have none.
    """

    source: TokenStore
    starts: Int
    history: int
    predict: int
    frameskip: int
    dropped_episodes: int
    extras: Mapping[str, TokenStore] = field(default_factory=dict)
    goals: Goals | None = None
    lengths: Int | None = None

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

    @property
    def gathered(self) -> int:
        """Frames whose tokens a window needs: T, and the goal's."""
        return self.length + (self.goals is not None)

    def frames(self, windows: Int) -> Int:
        """Return the frames of some windows, int64 [B, T]."""
        number = np.arange(self.length)
        if self.lengths is not None:
            number = np.minimum(number, self.lengths[windows][:, None] - 1)
        return self.starts[windows][:, None] + self.frameskip * number

    def with_goals(self, frames: Int, draws: NDArray[np.float64] | None) -> tuple[Int, dict[str, Int]]:
        """Append the goal's frame, drawn by `draws` (see `goal_draws`), to frames [B, T], where batches have goals; see `batch`."""
        if self.goals is None:
            return frames, {}
        assert draws is not None
        last = frames[:, -1]
        ends = np.searchsorted(self.source.episode, self.source.episode[last], side="right") - 1
        steps = self.goals.steps((ends - last) // self.frameskip, draws)
        return np.concatenate([frames, (last + steps * self.frameskip)[:, None]], 1), {"goal_steps": steps}

    def batch(
        self, windows: Int, out: NDArray[np.float16] | None = None, draws: NDArray[np.float64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read windows [B].

        Args:
            out: [B * gathered, N, D], for the tokens.
            draws: float64 [B] in [0, 1), needed where there are goals, see `goal_draws`.

        Returns:
            tokens float16 [B, T, N, D], what `steps` returns, and where there are goals goal_tokens float16 [B, N, D] and goal_steps
            int64 [B], the model steps from the window's last frame to the goal's.
        """
        frames = self.frames(windows)
        gathered, goal = self.with_goals(frames, draws)
        tokens = self.source.gather(gathered.ravel(), out)
        return {**self.split(tokens.reshape(*gathered.shape, *tokens.shape[1:])), **goal, **self.steps(frames)}

    def split(self, tokens: Any) -> dict[str, Any]:
        """Name the tokens of a batch, [B, gathered, N, D]."""
        if self.goals is None:
            return {"tokens": tokens}
        return {"tokens": tokens[:, :-1], "goal_tokens": tokens[:, -1]}

    def steps(self, frames: Int) -> dict[str, NDArray[Any]]:
        """Read what accompanies the tokens of frames [B, T].

        Returns:
            proprio float32 [B, T, P], P = 0 where the store has none; action float32 [B, T, f * A], the f env actions from each frame to
            the next, the last one repeated where the episode has fewer, A = 0 where the store has none; where the store has them, reward
            float32 [B, T], the sum over those env steps, and terminated bool [B, T], whether one of them ends the episode; float16
            [B, T, …] of each of `extras`; where windows differ in length, weight float32 [B, T]: 0 for repeated frames, equal for all
            others, and 1 on average over all windows.
        """
        source, following = self.source, frames[:, :, None] + np.arange(self.frameskip)
        beyond = None
        found = {name: store.gather(frames.ravel()) for name, store in self.extras.items()}
        rows = {name: values.reshape(*frames.shape, *values.shape[1:]) for name, values in found.items()}
        if self.lengths is not None:
            own = np.diff(frames, axis=1, prepend=-1) > 0
            rows["weight"] = (own * (self.length / self.lengths.mean())).astype(np.float32)
            last = np.searchsorted(source.episode, source.episode[frames], side="right")[:, :, None] - 1
            beyond, following = following > last, np.minimum(following, last)
        if source.reward is not None:
            rewards = source.reward[following]
            rows["reward"] = (rewards if beyond is None else np.where(beyond, 0, rewards)).sum(-1)
        if source.terminated is not None:
            rows["terminated"] = source.terminated[following].any(-1)
        proprio = np.zeros((*frames.shape, 0), np.float32) if source.proprio is None else source.proprio[frames]
        action = source.action[following].reshape(*frames.shape, self.frameskip * source.action.shape[1])
        return {"proprio": proprio, "action": action, **rows}


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


def episode_pieces(
    episode: NDArray[np.integer], episodes: Int, length: int, frameskip: int
) -> tuple[Int, NDArray[np.int64], int]:
    """Cut the given episodes into pieces of up to `length` frames, `frameskip` env steps apart, from each of their first frames on.

    Each frame is in one piece, but for single frames that are left at the end. Less than `frameskip` actions may follow the last frame of
    a piece, so that ends of episodes are in the pieces of all phases.

    Returns:
        The first frame of each piece, int64 [pieces], ascending; its frames, from 2 to `length`; and the number of episodes without pieces.
    """
    first = np.searchsorted(episode, episodes, side="left")
    count = np.searchsorted(episode, episodes, side="right") - first
    phase = np.arange(frameskip)
    frames = np.maximum(0, -((phase - count[:, None]) // frameskip)).ravel()  # of each phase of each episode
    begins = (first[:, None] + phase).ravel()
    pieces = np.maximum(0, -(-frames // length))
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(begins, pieces) + number * length * frameskip
    lengths = np.minimum(length, np.repeat(frames, pieces) - number * length)
    kept = np.flatnonzero(lengths > 1)
    order = kept[np.argsort(starts[kept])]
    dropped = len(episodes) - len(np.unique(episode[starts[kept]]))
    return starts[order], lengths[order], dropped


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


def goal_draws(seed: int, step: int, batch: int, rank: int = 0, world_size: int = 1) -> NDArray[np.float64]:
    """Draw float64 in [0, 1) for the goals of a training step, or a rank's slice of them; it depends on the arguments alone."""
    size = batch // world_size
    return np.random.default_rng((seed, step, 1)).random(batch)[rank * size : (rank + 1) * size]


def split_frames(episode: NDArray[np.integer], split: str, seed: int = SPLIT_SEED) -> Int:
    """Return the frames of a split, ascending; `episode` [frames] is the episode of each frame. See `split_episodes`."""
    return np.flatnonzero(np.isin(episode, split_episodes(int(episode[-1]) + 1, split, seed)))
