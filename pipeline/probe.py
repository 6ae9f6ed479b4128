"""How much of the state, of distances and of variance is in tokens, and whether a planner can descend their distance to a goal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_frames
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.common.sampling import descend
from wmcache.envs import ENVIRONMENTS, Geometry, open_environment, open_geometry
from wmcache.envs.distract import split_name
from wmcache.pipeline.disentanglement import information_gaps, measure_information
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import read_for
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import require_frames

FEWEST_FRAMES = 20
PROBED_FRAMES = 1000
PROBED_GOALS = 40
STEP_DISTANCE = 0.5
STUCK_DISTANCE = 0.5
"""Distances in units of the geometry: of a step of the descent, and from the goal at its end."""
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
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Landscape:
    """Figures of held-out frames.

    Attributes:
        spearman: rank correlation of token distance and true geodesic distance over pairs of frames; None if all distances are equal.
        stuck: share of frames from which descent over neighbouring frames does not end at the goal.
    """

    spearman: float | None
    stuck: float


def probe_landscape(dataset: FrameDataset, encoder: Encoder, geometry: Geometry) -> Landscape:
    """Measure an encoder on held-out frames of a dataset with this geometry; raises UserError where it has no state."""
    if (state := dataset.steps.state) is None:
        raise UserError(f"{dataset.path} has no column with the role state, which the probe needs")
    chosen = _sample(dataset.steps.episode, "val", PROBED_FRAMES)
    parts = np.array_split(read_for(encoder, dataset, chosen), max(1, len(chosen) // 64))
    tokens = torch.cat([encoder(part).float().cpu() for part in parts]).flatten(1).double().numpy()
    return measure_landscape(squared_distances(tokens, tokens), state[chosen], geometry)


def measure_landscape(distances: NDArray[np.floating], states: Float, geometry: Geometry) -> Landscape:
    """Measure squared token distances [n, n] between frames of states [n, S]."""
    goals = np.random.default_rng(0).choice(len(states), min(PROBED_GOALS, len(states)), replace=False)
    latent, update = distances[goals], seconds_between_updates()
    with tqdm(goals, desc="distances", unit=" goals", delay=2, leave=False, mininterval=update) as bar:
        true = np.stack([geometry.distance(states[goal], states) for goal in bar])
    reachable = np.isfinite(true)
    near = neighbours(geometry, states)
    ends = [descend(values, near) for values in latent]
    stuck = [(true[i, end] > STUCK_DISTANCE)[reachable[i]].mean() for i, end in enumerate(ends)]
    return Landscape(rank_correlation(latent[reachable], true[reachable]), float(np.mean(stuck)))


def rank_correlation(values: NDArray[np.floating], others: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation of [n] and [n]; None if one of them is constant."""
    if not (np.ptp(values) and np.ptp(others)):
        return None
    return float(spearmanr(values, others).statistic)


def squared_distances(points: Float, others: Float) -> Float:
    """Compute squared distances, [n, k], [m, k] -> [n, m]."""
    from sklearn.metrics.pairwise import euclidean_distances

    return np.asarray(euclidean_distances(points, others, squared=True))


def neighbours(geometry: Geometry, states: Float) -> NDArray[np.bool_]:
    """Find the states whose positions see each other within STEP_DISTANCE, [n, n]."""
    xy = geometry.position(states)
    near: NDArray[np.bool_] = np.linalg.norm(xy[:, None] - xy, axis=-1) < STEP_DISTANCE
    for share in (0.25, 0.5, 0.75):
        near &= geometry.is_free(share * states[:, None] + (1 - share) * states)
    return near


def find_geometry(store: TokenStore, dataset: AnyPath | None = None) -> Geometry | None:
    """Find the geometry of a store's frames, by its card or else its dataset; None where it is not known, or no state is."""
    name, layout = store.card.dataset.get("env", ""), store.card.layout
    if dataset is not None:
        frames = FrameDataset.open(dataset)
        require_frames(store, frames)
        layout = layout or frames.card.layout
    has_xy = store.state is not None and store.state.shape[1] >= 2
    return open_known_geometry(name, layout, store.path) if has_xy else None


def open_known_geometry(name: Any, layout: Any, where: AnyPath) -> Geometry | None:
    """Open the geometry of frames by the environment and the layout in their card; None where none is known.

    Raises:
        UserError: the layout is invalid.
    """
    if not layout:
        try:
            # The names of imported frames are anything, and some would import a package.
            if split_name(str(name))[0] not in ENVIRONMENTS:
                return None
            opened = open_environment(str(name))
        except UserError:  # no name of a distraction, or not installed
            return None
        opened.close()
        return None if opened.spec.layout else opened.geometry
    try:
        geometry = open_geometry(str(name), tuple(layout))
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: the layout in its card is invalid ({error}); extract or import it again") from error
    if geometry is None:
        raise UserError(f"{where}: no geometry of environment {name} is known; extract or import it again")
    return geometry


@dataclass(frozen=True)
class Probe:
    """Figures of held-out episodes, except effective_rank, channels, gaps and mig.

    Attributes:
        frames, held_out: frames that train the probes, and that score them.
        linear, mlp: R^2 of a ridge regression and of a network with one hidden layer, from all tokens of a frame to each column of its
            state: 1 is perfect, 0 no better than the mean; None for a constant column. Empty where the store has no state.
        spearman, stuck: see `Landscape`; None where no geometry is known, as are the next two.
        nearest, nearest_90: median and 90 % quantile of the Euclidean distance of positions to the frame of another
            episode whose tokens are nearest.
        effective_rank: exp of the entropy of the normalised singular values of the centred frames (Roy and Vetterli, EUSIPCO 2007);
            less than the number of frames.
        channels: participation ratio, (sum of eigenvalues)^2 / sum of their squares, of the covariance of single tokens about the mean
            of their patch: 1 to D.
        moves: mean squared change over FRAMESKIP env steps (the error of copying the last frame) as a share of the variance of the
            frames: 0 if nothing moves, 2 for unrelated frames; None if all episodes are shorter.
        gaps, mig: the mutual information gap of each column of the state, see `information_gaps`, and their mean; from frames of all
            episodes. Empty and None unless frames have one token, of several channels, and a state.
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
    gaps: dict[str, float | None]
    mig: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def probe(path: AnyPath, *, dataset: AnyPath | None = None, frames: int = 2000) -> Probe:
    """Probe a store deterministically, without loading a frame or an encoder.

    Args:
        dataset: the store's dataset, for a layout that the store's card lacks.
        frames: most frames of training episodes that train the probes.

    Raises:
        UserError: an unusable store, another dataset, an invalid layout, too few frames, or constant tokens.
    """
    store = TokenStore.open(path)
    geometry = find_geometry(store, dataset)
    train, val = choose_frames(store, frames)
    chosen = np.concatenate([train, val])
    tokens = store.gather(chosen)
    plain = principal_coordinates(tokens, np.ones_like(store.std))
    if not plain.any():
        raise UserError(f"{path} has the same tokens in all {len(chosen)} frames probed; extract another encoder")
    standardised = principal_coordinates(tokens, store.std)
    channels = participation(tokens[:: max(1, len(chosen) // CHANNEL_FRAMES)])
    del tokens
    state = np.zeros((len(chosen), 0)) if store.state is None else store.state[chosen]
    names, gaps = state_names(state.shape[1], geometry), measure_gaps(store)
    known = [gap for gap in gaps if gap is not None]
    cut = len(train)
    distances: dict[str, float | None] = dict.fromkeys(("spearman", "stuck", "nearest", "nearest_90"))
    if geometry:
        xy, other = geometry.position(state), store.episode[chosen] != store.episode[val][:, None]
        squares = squared_distances(plain[cut:], plain)
        found = measure_landscape(squares[:, cut:], state[cut:], geometry)
        near = np.linalg.norm(xy[cut:] - xy[np.where(other, squares, np.inf).argmin(1)], axis=1)
        distances = {
            "spearman": found.spearman,
            "stuck": found.stuck if math.isfinite(found.stuck) else None,
            "nearest": float(np.median(near)),
            "nearest_90": float(np.quantile(near, 0.9)),
        }
    return Probe(
        store=str(path),
        encoder=store.identity.encoder,
        dataset=str(store.card.dataset.get("name", "")),
        frames=cut,
        held_out=len(val),
        linear=dict(zip(names, score(fit_linear, standardised, state, cut), strict=True)),
        mlp=dict(zip(names, score(fit_mlp, standardised, state, cut), strict=True)),
        **distances,
        effective_rank=effective_rank(plain),
        channels=channels,
        moves=measure_moves(store, val, float(np.square(plain).sum(1).mean())),
        gaps=dict(zip(names, gaps, strict=False)),
        mig=float(np.mean(known)) if known else None,
    )


def state_names(columns: int, geometry: Geometry | None) -> tuple[str, ...]:
    """Name the columns of a state."""
    return STATE if geometry and columns == len(STATE) else tuple(f"state_{number}" for number in range(columns))


def measure_gaps(store: TokenStore) -> list[float | None]:
    """Compute the mutual information gap of each column of the state; none where `Probe.gaps` is empty."""
    shares = measure_information(store) if store.card.token_dim > 1 else None
    return [] if shares is None else information_gaps(shares)


def choose_frames(store: TokenStore, frames: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose training and held-out frames, ascending; raises UserError if a split has fewer than FEWEST_FRAMES."""
    train, val = (_sample(store.episode, split, most) for split, most in (("train", frames), ("val", PROBED_FRAMES)))
    if (count := min(len(train), len(val))) < FEWEST_FRAMES:
        raise UserError(
            f"{store.path}: {count} frames of a split, {FEWEST_FRAMES} are needed; raise --frames, or collect more"
        )
    return train, val


def _sample(episode: NDArray[np.integer], split: str, most: int) -> NDArray[np.int64]:
    known = split_frames(episode, split)
    return np.sort(np.random.default_rng(0).choice(known, min(most, len(known)), replace=False))


def principal_coordinates(tokens: NDArray[np.floating], scale: NDArray[np.floating]) -> Float:
    """Reduce frames [n, N, D], divided by a scale [D] where it is not 0, to the fewest dimensions that keep all their distances.

    Returns centred points [n, k]. Columns are principal components, the largest first; their norms are the singular values.
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


def score(regress: Callable[[Float, Float, Float], Float], points: Float, state: Float, cut: int) -> list[float | None]:
    """R^2 of each column of the state [n, S] on the rows from `cut` on, fitted on the rows before; None for a constant column."""
    mean, std = state[:cut].mean(0), state[:cut].std(0)
    targets = (state - mean) / np.where(std > 0, std, 1.0)
    if not targets.shape[1]:
        return []
    found, true = regress(points[:cut], targets[:cut], points[cut:]), targets[cut:]
    missed, total = np.square(found - true).sum(0), np.square(true - true.mean(0)).sum(0)
    return [float(1 - error / whole) if whole > 0 else None for error, whole in zip(missed, total, strict=True)]


def fit_linear(points: Float, targets: Float, unseen: Float) -> Float:
    """Ridge regression, with a penalty per target by leave-one-out error: (points [n, k], targets [n, S], points [m, k]) -> [m, S]."""
    from sklearn.linear_model import RidgeCV

    penalties = np.square(points).sum() / len(points) * np.logspace(-6, 4, 21)
    model = RidgeCV(penalties, alpha_per_target=True).fit(points, targets)
    return np.asarray(model.predict(unseen)).reshape(len(unseen), -1)


def fit_mlp(points: Float, targets: Float, unseen: Float) -> Float:
    """Fit a network with one hidden layer on the first principal components, as `fit_linear`."""
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
