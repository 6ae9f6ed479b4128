"""Probes of a store: how much of the state, of distances and of variance is in its tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_frames
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.pipeline.landscape import (
    PROBED_FRAMES,
    Float,
    find_maze,
    measure_landscape,
    squared_distances,
)

FEWEST_FRAMES = 20
MLP_COMPONENTS = 512
MLP_HIDDEN = 256
MLP_EPOCHS = 200
MLP_DECAY = 0.1
CHANNEL_FRAMES = 256
FRAMESKIP = 5
RESOLVED = 3e-4
"""Share of the largest singular value; smaller ones are rounding of half precision or of the product."""
BLOCK = 8192
"""Features of a frame that are multiplied at once, so that there is no second copy of all tokens."""

STATE = ("x", "y", "vx", "vy")


@dataclass(frozen=True)
class Probe:
    """Figures of held-out episodes, except effective_rank and channels.

    Attributes:
        frames, held_out: frames that train the probes, and that score them.
        linear, mlp: R^2 of a ridge regression and of a network with one hidden layer, from all tokens of a frame to each column of its
            state: 1 is perfect, 0 no better than the mean; None for a constant column. Tokens of one frame do not show velocities; a
            score for them comes from what position and policy reveal.
        spearman, stuck: see `Landscape`; None without a maze, as are the next two.
        nearest, nearest_90: median and 90 % quantile of the distance in the maze (Euclidean; a cell is 1 wide) to the frame of another
            episode whose tokens are nearest.
        effective_rank: exp of the entropy of the normalised singular values of the centred frames (Roy and Vetterli, EUSIPCO 2007);
            less than the number of frames.
        channels: participation ratio, (sum of eigenvalues)^2 / sum of their squares, of the covariance of single tokens about the mean
            of their patch: 1 to D.
        moves: mean squared change over FRAMESKIP env steps (the error of copying the last frame) as a share of the variance of the
            frames: 0 if nothing moves, 2 for unrelated frames; None if all episodes are shorter.
    """

    store: str
    encoder: str
    dataset: str
    frames: int
    held_out: int
    linear: dict[str, float | None]
    mlp: dict[str, float | None]
    spearman: float | None
    stuck: float | None
    nearest: float | None
    nearest_90: float | None
    effective_rank: float
    channels: float
    moves: float | None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def probe(path: AnyPath, *, dataset: AnyPath | None = None, frames: int = 2000) -> Probe:
    """Probe a store deterministically, without loading a frame or an encoder.

    Args:
        path: the store.
        dataset: the store's dataset, for a maze that the store's card lacks.
        frames: most frames of training episodes that train the probes; at most PROBED_FRAMES of held-out episodes score them.

    Raises:
        UserError: an unusable store, another dataset, an invalid maze or state, too few frames, or constant tokens.
    """
    store = TokenStore.open(path)
    maze = find_maze(store, dataset)
    train, val = choose_frames(store, frames)
    chosen = np.concatenate([train, val])
    tokens = store.gather(chosen)
    plain = principal_coordinates(tokens, np.ones_like(store.std))
    if not plain.any():
        raise UserError(
            f"the tokens of {path} are the same in all {len(chosen)} frames probed; extract another encoder"
        )
    standardised = principal_coordinates(tokens, store.std)
    channels = participation(tokens[:: max(1, len(chosen) // CHANNEL_FRAMES)])
    del tokens
    state = store.state[chosen]
    names = STATE if maze and state.shape[1] == len(STATE) else tuple(f"state_{i}" for i in range(state.shape[1]))
    cut = len(train)
    linear, mlp = (
        dict(zip(names, score(regress, standardised, state, cut), strict=True)) for regress in (fit_linear, fit_mlp)
    )
    landscape, near = None, None
    if maze:
        xy, other = state[:, :2], store.episode[chosen] != store.episode[val][:, None]
        distances = squared_distances(plain[cut:], plain)
        landscape = measure_landscape(distances[:, cut:], xy[cut:], maze)
        nearest = np.where(other, distances, np.inf).argmin(1)
        near = np.linalg.norm(xy[cut:] - xy[nearest], axis=1)
    return Probe(
        store=str(path),
        encoder=store.identity.encoder,
        dataset=str(store.card.dataset.get("name", "")),
        frames=cut,
        held_out=len(val),
        linear=linear,
        mlp=mlp,
        spearman=None if landscape is None else landscape.spearman,
        stuck=None if landscape is None or not math.isfinite(landscape.stuck) else landscape.stuck,
        nearest=None if near is None else float(np.median(near)),
        nearest_90=None if near is None else float(np.quantile(near, 0.9)),
        effective_rank=effective_rank(plain),
        channels=channels,
        moves=measure_moves(store, val, float(np.square(plain).sum(1).mean())),
    )


def choose_frames(store: TokenStore, frames: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose training and held-out frames, ascending; raises UserError if a split has fewer than FEWEST_FRAMES."""
    splits = []
    for split, most in (("train", frames), ("val", PROBED_FRAMES)):
        known = split_frames(store.episode, split)
        count = min(most, len(known))
        if count < FEWEST_FRAMES:
            raise UserError(
                f"{store.path}: {count} {split} frames are too few to probe, {FEWEST_FRAMES} are needed; raise --frames, or collect more"
            )
        # A new generator, so that the held-out frames are those of `probe_landscape`.
        splits.append(np.sort(np.random.default_rng(0).choice(known, count, replace=False)))
    return splits[0], splits[1]


def principal_coordinates(tokens: NDArray[np.floating], scale: NDArray[np.floating]) -> Float:
    """Reduce frames to the fewest dimensions that keep all their distances.

    Args:
        tokens: [n, N, D].
        scale: [D], divides each channel; 0 counts as 1.

    Returns:
        Centred points [n, k], k < n and k <= N * D. Columns are principal components, the largest first; their norms are the singular
        values.
    """
    flat = tokens.reshape(len(tokens), -1)
    divisor = np.tile(np.where(scale > 0, scale, 1.0).astype(np.float32), tokens.shape[1])

    def block(start: int) -> NDArray[np.float32]:
        part: NDArray[np.float32] = flat[:, start : start + BLOCK].astype(np.float32)
        part -= part.mean(0, dtype=np.float64).astype(np.float32)
        part /= divisor[start : start + BLOCK]
        return part

    if flat.shape[1] <= len(flat):
        points = block(0).astype(np.float64)
        squares, axes = np.linalg.eigh(points.T @ points)
        coordinates: Float = points @ axes
    else:
        gram = np.zeros((len(flat), len(flat)))
        for start in range(0, flat.shape[1], BLOCK):
            part = block(start)
            gram += part @ part.T
        squares, vectors = np.linalg.eigh(gram)
        coordinates = vectors * np.sqrt(np.maximum(squares, 0))
    kept = squares > RESOLVED**2 * squares[-1]
    return coordinates[:, kept][:, ::-1]


Regress = Callable[[Float, Float, Float], Float]
"""(points to learn from [n, k], their targets [n, S], points to predict [m, k]) -> [m, S]"""


def score(regress: Regress, points: Float, state: Float, cut: int) -> list[float | None]:
    """R^2 of each column of the state [n, S] on the rows from `cut` on, fitted on the rows before; None for a constant column."""
    mean, std = state[:cut].mean(0), state[:cut].std(0)
    targets = (state - mean) / np.where(std > 0, std, 1.0)
    if not targets.shape[1]:
        return []
    found, true = regress(points[:cut], targets[:cut], points[cut:]), targets[cut:]
    missed, total = np.square(found - true).sum(0), np.square(true - true.mean(0)).sum(0)
    return [float(1 - error / whole) if whole > 0 else None for error, whole in zip(missed, total, strict=True)]


def fit_linear(points: Float, targets: Float, unseen: Float) -> Float:
    """Ridge regression, with a penalty per target by leave-one-out error; it does not depend on the rotation of the tokens."""
    from sklearn.linear_model import RidgeCV

    penalties = np.square(points).sum() / len(points) * np.logspace(-6, 4, 21)
    model = RidgeCV(penalties, alpha_per_target=True).fit(points, targets)
    return np.asarray(model.predict(unseen)).reshape(len(unseen), -1)


def fit_mlp(points: Float, targets: Float, unseen: Float) -> Float:
    """A network with one hidden layer on the first principal components."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    # One divisor for all, so that minor components stay small.
    size = np.sqrt(np.square(points).sum(1).mean()) / 4
    train, test = ((part[:, :MLP_COMPONENTS] / size).astype(np.float32) for part in (points, unseen))
    model = MLPRegressor(hidden_layer_sizes=(MLP_HIDDEN,), max_iter=MLP_EPOCHS, alpha=MLP_DECAY, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is part of the figure's definition
        model.fit(train, targets.astype(np.float32))
    return np.asarray(model.predict(test), np.float64).reshape(len(unseen), -1)


def effective_rank(points: Float) -> float:
    """exp of the entropy of the normalised singular values of principal coordinates (Roy and Vetterli, EUSIPCO 2007)."""
    values = np.linalg.norm(points, axis=0)
    shares = values / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def participation(tokens: NDArray[np.floating]) -> float:
    """Participation ratio of the channels of tokens [n, N, D]; see `Probe.channels`."""
    values = tokens.astype(np.float32)
    flat = (values - values.mean(0)).reshape(-1, tokens.shape[2])
    covariance = (flat.T @ flat).astype(np.float64)
    return float(np.trace(covariance) ** 2 / np.square(covariance).sum())


def measure_moves(store: TokenStore, frames: NDArray[np.int64], variance: float) -> float | None:
    """Mean squared change from the frames to those FRAMESKIP later, divided by `variance`; None without such pairs."""
    later = np.minimum(frames + FRAMESKIP, len(store) - 1)
    pairs = np.flatnonzero(
        (store.episode[later] == store.episode[frames]) & (store.step[later] == store.step[frames] + FRAMESKIP)
    )
    if not len(pairs):
        return None
    total = 0.0
    for part in np.array_split(pairs, -(-len(pairs) // 64)):
        here, there = store.gather(frames[part]), store.gather(later[part])
        total += float(np.square(there.astype(np.float32) - here).sum(dtype=np.float64))
    return total / len(pairs) / variance
