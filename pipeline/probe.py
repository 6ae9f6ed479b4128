"""What a planner needs, and how much of it is in a store's tokens: probes of the state, of distances and of how the tokens are spread."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, beside
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import Maze, MazeError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import read_for
from wmcache.pipeline.frames import FrameDataset

PROBED_FRAMES = 1000
PROBED_GOALS = 40
STEP_DISTANCE = 0.5
STUCK_DISTANCE = 0.5

FEWEST_FRAMES = 20
MLP_COMPONENTS = 512
MLP_HIDDEN = 256
MLP_EPOCHS = 200
MLP_DECAY = 0.1
CHANNEL_FRAMES = 256
FRAMESKIP = 5
DRAWN_GOALS = 5
RESOLVED = 3e-4
"""Of the largest singular value; what is below is the rounding of half precision, or of the multiplication."""
BLOCK = 8192
"""Features of a frame that are multiplied at once, so that no second copy of all tokens is made."""

STATE = ("x", "y", "vx", "vy")

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Landscape:
    """Whether a planner can descend the squared token distance to a goal.

    Attributes:
        spearman: rank correlation with the true geodesic distance, over pairs of held-out frames; None where all distances are equal.
        stuck: share of held-out frames from which moving always to the best place in sight does not lead to the goal.
    """

    spearman: float | None
    stuck: float


@dataclass(frozen=True)
class Probe:
    """How much of what a planner needs is in a store's tokens; figures of held-out episodes, but for effective_rank and channels.

    Attributes:
        store, encoder, dataset: the store's path, and names.
        frames, held_out: how many the probes were trained and scored on.
        linear, mlp: R^2 of a ridge regression and of a network with one hidden layer, from all tokens of a frame to each column of its
            state: 1 is perfect, 0 no better than the mean; None where the column does not change. One frame does not show velocities: what
            is found of them in the tokens of single frames is what position and policy tell of them.
        spearman, stuck: see `Landscape`. None, as the two below, where no maze is known, so that no true distance is.
        nearest, nearest_90: distance in the maze (Euclidean; a cell is 1 wide) to that frame of other episodes whose tokens are nearest:
            its median and 90 % quantile over held-out frames.
        effective_rank: exp of the entropy of the normalised singular values of the centred frames (Roy and Vetterli, EUSIPCO 2007);
            at most the number of frames less one.
        channels: participation ratio, (sum of eigenvalues)^2 / sum of their squares, of the covariance of single tokens
            about the mean of their place in the image: 1 to D.
        moves: mean squared change over FRAMESKIP env steps, the error of copying the last frame, as a share of the variance of the frames:
            0 where nothing moves, 2 where frames have nothing to do with each other. None where no episode is that long.
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
    """Probe a store; no frame and no encoder is loaded, and the same store gives the same figures.

    Args:
        path: the store.
        dataset: the frames it was made from, to take the maze from where the store does not tell it.
        frames: at most so many of the training episodes train the probes; up to PROBED_FRAMES of the held-out ones score them.

    Raises:
        UserError: an unusable store, another dataset, a maze or states that are none, too few frames, or tokens that are the same in all
            frames.
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


def find_maze(store: TokenStore, dataset: AnyPath | None = None) -> Maze | None:
    """The maze that a store's frames show, by what the store says or else by its dataset; None where they show none."""
    name, rows = store.card.dataset.get("name", ""), store.card.dataset.get("maze")
    if dataset is not None:
        frames = FrameDataset.open(dataset)
        if frames.card.fingerprint != store.identity.dataset_fingerprint:
            raise UserError(f"{dataset} does not hold the frames of {store.path}; pass the right --dataset")
        rows = rows or frames.card.maze
    require_finite(store.state, store.path)
    return make_maze(str(name), rows, store.path) if rows and store.state.shape[1] >= 2 else None


def make_maze(name: str, rows: Any, where: AnyPath | str) -> Maze:
    """The maze of a card, which may be anybody's; raises UserError where it is none."""
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise UserError(f"the maze in the card of {where} is no list of lines of text; extract or import it again")
    try:
        return Maze(name, tuple(rows))
    except MazeError as error:
        raise UserError(f"{where}: {error}") from error


def require_finite(state: NDArray[np.floating], where: AnyPath | str) -> None:
    """Raises UserError where a state, which nothing can be measured against, is not finite."""
    if (broken := np.flatnonzero(~np.isfinite(state).all(1))).size:
        raise UserError(
            f"{where}: the state of {broken.size} frames, the first of them number {broken[0]}, is not finite; extract or import it again"
        )


def split_frames(episode: NDArray[np.integer], split: str) -> NDArray[np.int64]:
    """Return the frames of the split that the trainer uses by default, ascending."""
    return np.flatnonzero(np.isin(episode, split_episodes(int(episode[-1]) + 1, split, 42)))


def choose_frames(store: TokenStore, frames: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Some training frames and some held-out ones, ascending; raises UserError where a split has fewer than FEWEST_FRAMES."""
    splits = []
    for split, most in (("train", frames), ("val", PROBED_FRAMES)):
        known = split_frames(store.episode, split)
        count = min(most, len(known))
        if count < FEWEST_FRAMES:
            raise UserError(
                f"{store.path}: {count} {split} frames are too few to probe, {FEWEST_FRAMES} are needed; raise --frames, or collect more"
            )
        # A generator for each, so that the held-out frames are those of `probe_landscape`, whatever the number of others.
        splits.append(np.sort(np.random.default_rng(0).choice(known, count, replace=False)))
    return splits[0], splits[1]


def principal_coordinates(tokens: NDArray[np.floating], scale: NDArray[np.floating]) -> Float:
    """Frames as points in as few dimensions as hold all their distances, so that no probe has to know how many features there are.

    Args:
        tokens: [n, N, D]. scale: [D], what to divide each channel by; 0 counts as 1.

    Returns:
        [n, k], k < n and k <= N * D, centred: each column is a principal component, the largest first, its norm a singular value.
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


def squared_distances(points: Float, others: Float) -> Float:
    """[n, k], [m, k] -> [n, m]."""
    from sklearn.metrics.pairwise import euclidean_distances

    distances: Float = euclidean_distances(points, others, squared=True)
    return distances


Regress = Callable[[Float, Float, Float], Float]
"""(points to learn from [n, k], their targets [n, S], points to predict [m, k]) -> [m, S]"""


def score(regress: Regress, points: Float, state: Float, cut: int) -> list[float | None]:
    """R^2 of each column of the state [n, S] on the rows from `cut` on, by what the rows before it teach; None where it is constant."""
    mean, std = state[:cut].mean(0), state[:cut].std(0)
    targets = (state - mean) / np.where(std > 0, std, 1.0)
    if not targets.shape[1]:
        return []
    found, true = regress(points[:cut], targets[:cut], points[cut:]), targets[cut:]
    missed, total = np.square(found - true).sum(0), np.square(true - true.mean(0)).sum(0)
    return [float(1 - error / whole) if whole > 0 else None for error, whole in zip(missed, total, strict=True)]


def fit_linear(points: Float, targets: Float, unseen: Float) -> Float:
    """Ridge regression, each target's penalty by leave-one-out error; `points` are a rotation of the tokens, which ridge cannot tell."""
    from sklearn.linear_model import RidgeCV

    penalties = np.square(points).sum() / len(points) * np.logspace(-6, 4, 21)
    model = RidgeCV(penalties, alpha_per_target=True).fit(points, targets)
    return np.asarray(model.predict(unseen)).reshape(len(unseen), -1)


def fit_mlp(points: Float, targets: Float, unseen: Float) -> Float:
    """A network with one hidden layer on the first principal components."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    # One divisor for all, so that directions in which tokens hardly differ stay small.
    size = np.sqrt(np.square(points).sum(1).mean()) / 4
    train, test = ((part[:, :MLP_COMPONENTS] / size).astype(np.float32) for part in (points, unseen))
    model = MLPRegressor(hidden_layer_sizes=(MLP_HIDDEN,), max_iter=MLP_EPOCHS, alpha=MLP_DECAY, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many epochs are what the figure is of
        model.fit(train, targets.astype(np.float32))
    return np.asarray(model.predict(test), np.float64).reshape(len(unseen), -1)


def effective_rank(points: Float) -> float:
    """exp of the entropy of the normalised singular values of principal coordinates (Roy and Vetterli, EUSIPCO 2007)."""
    values = np.linalg.norm(points, axis=0)
    shares = values / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def participation(tokens: NDArray[np.floating]) -> float:
    """How many channels of single tokens [n, N, D] take part in their variance; see `Probe.channels`."""
    values = tokens.astype(np.float32)
    flat = (values - values.mean(0)).reshape(-1, tokens.shape[2])
    covariance = (flat.T @ flat).astype(np.float64)
    return float(np.trace(covariance) ** 2 / np.square(covariance).sum())


def measure_moves(store: TokenStore, frames: NDArray[np.int64], variance: float) -> float | None:
    """Mean squared change from the frames to those FRAMESKIP later in their episodes over `variance`; None where there are none."""
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


def draw_probe(path: AnyPath, out: Path, *, dataset: AnyPath | None = None, goals: int = DRAWN_GOALS) -> None:
    """Draw held-out frames at the ball's places, coloured by their distance to some goals: of tokens above, along the maze below.

    A red point marks the places from which descending the token distance ends away from the goal.

    Args:
        path: the store. out: the PNG to write.
        dataset: see `probe`.
        goals: how many, as far from each other as they can be.

    Raises:
        UserError: an unusable store, another dataset, too few frames, or frames that show no maze.
    """
    # Here, since all that fits or extracts imports this module, and few draw.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from wmcache.pipeline.preview import write_png

    store = TokenStore.open(path)
    maze = find_maze(store, dataset)
    if maze is None:
        raise UserError(f"{path} shows no maze, so there is no true distance to draw; its other figures: wmcache probe")
    _, val = choose_frames(store, FEWEST_FRAMES)
    tokens, xy = store.gather(val).astype(np.float32), store.state[val, :2]
    chosen, true = spread(xy, maze, goals)
    latent = np.stack([np.square(tokens - tokens[goal]).sum((1, 2)) for goal in chosen])
    near = neighbours(maze, xy)
    # The outermost walls are thick and say nothing.
    low, high = np.argwhere(maze.free).min(0) - 0.85, np.argwhere(maze.free).max(0) + 0.45
    across, up = high - low
    width = 2.2 if up < 1.2 * across else 1.9
    figure = Figure(
        figsize=(width * len(chosen) + 1.0, 2 * width * up / across + 0.75),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.01, hspace=0.01),
        dpi=130,
    )
    panels = figure.subplots(2, len(chosen), squeeze=False)
    rows = (("distance of tokens", np.sqrt(latent)), ("distance along the maze", true))
    for axes_row, (label, distances) in zip(panels, rows, strict=True):
        most = float(np.quantile(distances[np.isfinite(distances)], 0.995))
        for i, (axes, goal) in enumerate(zip(axes_row, chosen, strict=True)):
            axes.imshow(
                np.where(maze.free, np.nan, 1.0).T,
                origin="lower",
                extent=maze.extent,
                cmap="Greys",
                vmin=0,
                vmax=3,
                interpolation="nearest",
            )
            order = np.argsort(-distances[i])  # so that what is near the goal is not covered
            dots = axes.scatter(
                *xy[order].T, c=distances[i][order], s=11, cmap="viridis_r", vmin=0, vmax=most, linewidths=0
            )
            axes.plot(*xy[goal], "*", color="#111111", markersize=13, markeredgecolor="white", markeredgewidth=0.8)
            axes.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(label, fontsize=9)
        figure.colorbar(dots, ax=list(axes_row), shrink=0.85, aspect=18, pad=0.01).outline.set_visible(False)
    for i, axes in enumerate(panels[0]):
        reachable = np.isfinite(true[i])
        lost = reachable & (true[i][descend(latent[i], near)] > STUCK_DISTANCE)
        axes.plot(*xy[lost].T, "o", color="#ff4a30", markersize=1.6, markeredgewidth=0)
        rank = rank_correlation(latent[i][reachable], true[i][reachable])
        shown = "-" if rank is None else f"{rank:.2f}"
        axes.set_title(f"Spearman {shown}, stuck {lost.sum() / reachable.sum():.0%}", fontsize=8)
    figure.suptitle(
        f"{path.resolve().parent.name}/{path.name}: {len(val)} held-out frames by their distance to the star, "
        "a red point where descending it gets stuck",
        fontsize=9,
        parse_math=False,  # a name may hold a dollar
    )
    write_png(figure, out)


def picture_paths(stores: Sequence[AnyPath], out: Path | None = None) -> list[Path]:
    """Where to draw each store: beside it, or in `out` by the names of its folder and itself; raises UserError if two agree."""
    resolved = [store.resolve() for store in stores]
    paths = [
        beside(store, ".probe.png") if out is None else out / f"{store.parent.name}-{store.stem}.probe.png"
        for store in resolved
    ]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"two of the stores would be drawn at {path}; name each once, or leave out --out")
    return paths


def spread(xy: Float, maze: Maze, count: int) -> tuple[list[int], Float]:
    """Places far from each other: at most `count` of xy [n, 2], the farthest from those before first; and their ways to all, [count, n]."""
    ways: list[Float] = [maze.geodesic(xy[0], xy)]
    chosen: list[int] = []
    nearest = np.where(np.isfinite(ways[0]), ways[0], -1.0)
    for _ in range(min(count, len(xy))):
        chosen.append(int(nearest.argmax()))
        way = maze.geodesic(xy[chosen[-1]], xy)
        nearest = np.minimum(nearest, way) if len(chosen) > 1 else np.where(np.isfinite(way), way, -1.0)
        ways.append(way)
    return chosen, np.stack(ways[1:])


def probe_landscape(dataset: FrameDataset, encoder: Encoder) -> Landscape:
    """Measure the latent distance between held-out frames of a dataset that shows a maze; see `Landscape`.

    Raises:
        UserError: the maze or the states are none.
    """
    held_out = split_frames(dataset.steps.episode, "val")
    chosen = np.sort(np.random.default_rng(0).choice(held_out, min(PROBED_FRAMES, len(held_out)), replace=False))
    frames = read_for(encoder, dataset, chosen)
    tokens = torch.cat(
        [encoder(part).float().cpu() for part in np.array_split(frames, max(1, len(frames) // 64))]
    ).flatten(1)
    maze = make_maze(dataset.card.name, dataset.card.maze, dataset.path)
    require_finite(dataset.steps.state, dataset.path)
    xy = dataset.steps.state[chosen, :2]
    return measure_landscape(squared_distances(tokens.double().numpy(), tokens.double().numpy()), xy, maze)


def measure_landscape(distances: NDArray[np.floating], xy: Float, maze: Maze) -> Landscape:
    """The landscape of squared token distances [n, n] between frames at the places xy [n, 2] of a maze."""
    goals = np.random.default_rng(0).choice(len(xy), min(PROBED_GOALS, len(xy)), replace=False)
    latent = distances[goals]
    with tqdm(
        goals, desc="distances", unit=" goals", delay=2, leave=False, mininterval=seconds_between_updates()
    ) as bar:
        true = np.stack([maze.geodesic(xy[goal], xy) for goal in bar])
    reachable = np.isfinite(true)
    near = neighbours(maze, xy)
    ends = [descend(values, near) for values in latent]
    stuck = [(true[i, end] > STUCK_DISTANCE)[reachable[i]].mean() for i, end in enumerate(ends)]
    return Landscape(rank_correlation(latent[reachable], true[reachable]), float(np.mean(stuck)))


def rank_correlation(values: NDArray[np.floating], others: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation of [n] and [n]; None where one of them is constant."""
    if not (np.ptp(values) and np.ptp(others)):
        return None
    return float(spearmanr(values, others).statistic)


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
