"""Planning episodes: who starts where, within which budget, and who arrived. The planner sees frames and proprio, the judge states."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm import tqdm
from wmcache.cache.device import choose_device, choose_dtype
from wmcache.cache.errors import UserError
from wmcache.cache.files import atomic_write, make_folder, read_json, seconds_between_updates, sha256_of
from wmcache.cache.layout import StoreCard
from wmcache.cache.store import TokenStore
from wmcache.envs import Maze, PointMazeSimulator, PointMazeVectorEnv, find_maze, sample_state
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.planner.cem import Cem
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import MODES
from wmcache.trainer.checkpoint import last_checkpoint, load_model, read_config, read_identity

THRESHOLDS = (0.5, 0.25, 0.1)
CHECKED_FRAMES = 16


@dataclass(frozen=True)
class PlanOptions:
    """All settings of an evaluation.

    Attributes:
        episodes: how many. Episode n starts and ends at states drawn with seed 99 * (seed + n) + 1 (DINO-WM, plan.py).
        budget: env steps of each episode. Every episode uses all of it: nobody tells the planner that it has arrived.
        threshold: distance below which the headline figures count a goal as reached.
        horizon: model steps of a plan. execute: model steps before the next plan.
        objective: `last` or `all`. context: frames that an imagined step sees.
        samples, elites, iterations, sigma: of the cross-entropy method.
        batch: episodes planned at once.
        seed: of episodes and candidates.
        env: another maze than the data's. device, dtype: of the model and the encoder.
    """

    episodes: int = 50
    budget: int = 100
    threshold: float = 0.5
    horizon: int = 5
    execute: int = 1
    objective: str = "all"
    context: int = 1
    samples: int = 64
    elites: int = 6
    iterations: int = 5
    sigma: float = 0.4
    batch: int = 50
    seed: int = 0
    env: str | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Episodes:
    """What happened, for the judge and the report.

    Attributes:
        start, goal: float64 [E, 4].
        states: float64 [E, budget, 4], after each env step.
        chunk: env steps between replans.
        encoder_frames, replans: counts over all episodes.
        seconds: spent on encoding live frames and planning.
    """

    start: NDArray[np.float64]
    goal: NDArray[np.float64]
    states: NDArray[np.float64]
    chunk: int
    encoder_frames: int
    replans: int
    seconds: float

    def distances(self) -> NDArray[np.float64]:
        """Distance in (x, y) to the goal at the end of every executed chunk, [E, chunks]."""
        ends = self.chunk_ends() - 1
        distance: NDArray[np.float64] = np.linalg.norm(self.states[:, ends, :2] - self.goal[:, None, :2], axis=-1)
        return distance

    def chunk_ends(self) -> NDArray[np.int64]:
        """Env steps after which a chunk ended, [chunks]; the last is the budget."""
        budget = self.states.shape[1]
        return np.minimum(np.arange(self.chunk, budget + self.chunk, self.chunk), budget)


class Setting:
    """A run, brought to life: its model, its encoder, its maze and its store."""

    def __init__(
        self, run: Path, options: PlanOptions, *, weights: Path | None = None, cache: Path | None = None
    ) -> None:
        """Load everything and check that live encoding reproduces the store.

        Args:
            run: the run's folder. options: see `PlanOptions`.
            weights, cache: where the encoder's weights and the store are now, if not where they were.

        Raises:
            UserError: not a run, options that do not fit, missing weights, or an encoder that does not match the store.
        """
        check_options(options)
        self.run = run
        self.config = read_config(run)
        self.card, identity = read_identity(run)
        self.device = choose_device(options.device)
        self.model = load_model(run, self.device)
        self.encoder = encoders.create_again(self.card.encoder, weights=weights, device=options.device)
        if different := identity.differences(self.encoder.identity(identity.dataset_fingerprint, identity.store_dtype)):
            raise UserError(
                f"the encoder is not the one that {run} was trained on ({'; '.join(different)}); pass the right --weights"
            )
        self.store = TokenStore.open(cache or self.config["cache"])
        if different := identity.differences(self.store.identity):
            raise UserError(
                f"{self.store.path} is not the store that {run} was trained on ({'; '.join(different)}); pass the right --cache"
            )
        data = self.card.dataset
        self.maze = find_maze(options.env) if options.env else cached_maze(self.card)
        self.image_size = int(data["image_size"])
        self.drift = live_drift(self.store, self.encoder)
        self.mpc = Mpc(
            model=self.model,
            solver=Cem(options.samples, options.elites, options.iterations, options.sigma),
            objective=options.objective,
            horizon=options.horizon,
            context=options.context,
            frameskip=int(self.config["frameskip"]),
            device=self.device,
            dtype=choose_dtype(options.dtype, self.device),
        )

    def fingerprint(self, options: PlanOptions) -> str:
        """Of everything that the episodes depend on: options, weights of the model, identity of the store."""
        weights = sha256_of(last_checkpoint(self.run) / "model.safetensors")
        known = json.dumps([asdict(options), weights, self.store.identity.to_json(), self.maze.rows])
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def check_options(options: PlanOptions) -> None:
    """Refuse, as a UserError, what no evaluation can be made of."""
    positive = (
        "episodes",
        "budget",
        "threshold",
        "horizon",
        "execute",
        "context",
        "samples",
        "iterations",
        "sigma",
        "batch",
    )
    for name in positive:
        if not 0 < getattr(options, name) < np.inf:
            flag = "batch-size" if name == "batch" else name
            raise UserError(f"--{flag} is {getattr(options, name)}; it must be above 0")
    if options.objective not in MODES:
        raise UserError(f"no objective {options.objective!r}; known are {', '.join(MODES)}")
    if options.execute > options.horizon:
        raise UserError(f"--execute {options.execute} is more than the --horizon of {options.horizon} model steps")
    if not 2 <= options.elites <= options.samples:
        raise UserError(f"--elites {options.elites} must lie between 2 and --samples {options.samples}")


def refuse_other_results(out: Path, options: PlanOptions) -> None:
    """Refuse, as a UserError, to write over the results of other settings."""
    if not (out / "results.json").exists():
        return
    there = read_json(out / "results.json", "choose another --out")["options"]
    mine = asdict(options)
    different = [f"{name} {there.get(name)} != {mine[name]}" for name in mine if there.get(name) != mine[name]]
    if different:
        raise UserError(
            f"{out} holds results of other settings ({'; '.join(different)}); choose another --out, or delete it first"
        )


def cached_maze(card: StoreCard) -> Maze:
    """The maze that a store's frames show."""
    return Maze(Path(card.dataset["env"]).stem, tuple(card.dataset["maze"]))


def live_drift(store: TokenStore, encoder: Encoder) -> dict[str, float]:
    """Draw and encode some cached frames anew and compare: the whole way that a live frame takes, from the simulator on.

    Returns:
        `cosine`, the smallest over the frames, and `relative_error`, the largest norm of a difference over that of the tokens.

    Raises:
        UserError: the cosine is below 0.999: plans would be made in another latent space than the model's.
    """
    data = store.card.dataset
    frames = np.linspace(0, len(store) - 1, CHECKED_FRAMES).astype(int)
    simulator = PointMazeSimulator(cached_maze(store.card), int(data["image_size"]))
    live = np.stack([simulator.render(state) for state in store.state[frames]])
    simulator.close()
    drift = encoder.drift(live, store.gather(frames))
    if not drift["cosine"] > COSINE_TOLERANCE:
        raise UserError(
            f"encoding cached frames live gives other tokens than {store.path} holds (smallest cosine {drift['cosine']:.4f}, allowed "
            f"{COSINE_TOLERANCE}); the renderer or the libraries have changed: extract the store again on this machine"
        )
    return drift


def sample_episode(maze: Maze, number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and goal state [4] of episode `number`: random places and velocities, seed 99 n + 1 (DINO-WM, plan.py)."""
    rng = np.random.default_rng(99 * number + 1)
    return sample_state(maze, rng), sample_state(maze, rng)


def run_episodes(
    setting: Setting, options: PlanOptions, numbers: Iterable[int], progress: tqdm[Any] | None = None
) -> Episodes:
    """Plan and act in some episodes at once.

    Args:
        setting, options: what to plan with. numbers: which episodes. progress: told of every replan.

    Returns:
        What happened. The planner was given frames and proprio, never a state, a distance or a success.
    """
    numbers = list(numbers)
    count, mpc, encoder = len(numbers), setting.mpc, setting.encoder
    start, goal = (np.stack(states) for states in zip(*(sample_episode(setting.maze, n) for n in numbers), strict=True))
    env = PointMazeVectorEnv(count, setting.maze, setting.image_size)
    generators = [torch.Generator().manual_seed(99 * n + 1) for n in numbers]
    clock = 0.0
    observation, _ = env.reset(options={"state": goal, "goal": goal})
    goal_tokens = encoder(observation["image"])
    encoder_frames, replans, done = count, 0, 0
    observation, _ = env.reset(options={"state": start, "goal": goal})
    plan, states = None, []
    while done < options.budget:
        begun = time.perf_counter()
        tokens = encoder(observation["image"])
        proprio = torch.from_numpy(observation["proprio"]).to(setting.device)
        plan = mpc.plan(tokens, proprio, goal_tokens, plan, generators)
        clock += time.perf_counter() - begun
        encoder_frames += count
        replans += count
        actions = plan[:, : options.execute].reshape(count, options.execute * mpc.frameskip, -1).cpu().numpy()
        states.append(env.advance(actions[:, : options.budget - done]))
        done += states[-1].shape[1]
        if done < options.budget:
            observation = env.observe()
        plan = mpc.shift(plan, options.execute)
        if progress is not None:
            progress.update(count)
    env.close()
    return Episodes(
        start, goal, np.concatenate(states, 1), options.execute * mpc.frameskip, encoder_frames, replans, clock
    )


def save_episodes(file: Path, episodes: Episodes) -> None:
    """Write a finished batch, atomically."""
    with atomic_write(file) as stream:
        arrays = {field.name: np.asarray(getattr(episodes, field.name)) for field in fields(episodes)}
        np.savez(stream, allow_pickle=False, **arrays)


def load_episodes(file: Path) -> Episodes:
    """Read what `save_episodes` wrote."""
    with np.load(file) as arrays:
        values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    return Episodes(**values)


def join(parts: list[Episodes]) -> Episodes:
    """Several batches of episodes as one."""
    return Episodes(
        start=np.concatenate([part.start for part in parts]),
        goal=np.concatenate([part.goal for part in parts]),
        states=np.concatenate([part.states for part in parts]),
        chunk=parts[0].chunk,
        encoder_frames=sum(part.encoder_frames for part in parts),
        replans=sum(part.replans for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def judge(episodes: Episodes, threshold: float) -> dict[str, Any]:
    """Success at one threshold, from the recorded states.

    Returns:
        successes: episodes within `threshold` of the goal at the end of some executed chunk. success_rate, ci95: of those, with
        Wilson's interval. mean_env_steps: until then; an episode that never arrives counts with its whole budget.
        held: episodes within `threshold` at the end of the budget.
    """
    close = episodes.distances() < threshold
    count, successes = len(close), int(close.any(1).sum())
    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return {
        "threshold": threshold,
        "successes": successes,
        "success_rate": successes / count,
        "ci95": [interval.low, interval.high],
        "mean_env_steps": float(env_steps(episodes, threshold).mean()),
        "held": int(close[:, -1].sum()),
    }


def env_steps(episodes: Episodes, threshold: float) -> NDArray[np.int64]:
    """Env steps until the end of the first chunk within `threshold`, [E]; the budget where there is none."""
    close = episodes.distances() < threshold
    steps: NDArray[np.int64] = np.where(close.any(1), episodes.chunk_ends()[close.argmax(1)], episodes.states.shape[1])
    return steps


def evaluate(setting: Setting, options: PlanOptions, out: Path) -> tuple[Episodes, dict[str, Any]]:
    """All episodes, in batches.

    Args:
        setting, options: what to plan with.
        out: folder in which finished batches are kept, so that a stopped evaluation goes on when it is run again.

    Returns:
        What happened, and the content of `results.json`.
    """
    first, last = options.seed, options.seed + options.episodes
    replans = -(-options.budget // (options.execute * setting.mpc.frameskip))
    folder = out / f"unfinished-{setting.fingerprint(options)}"
    parts = []
    make_folder(folder)
    with tqdm(
        total=options.episodes * replans, desc="wmplan", unit=" replans", mininterval=seconds_between_updates()
    ) as bar:
        for begin in range(first, last, options.batch):
            numbers, file = range(begin, min(last, begin + options.batch)), folder / f"{begin:06d}.npz"
            if file.exists():
                bar.update(len(numbers) * replans)
            else:
                save_episodes(file, run_episodes(setting, options, numbers, bar))
            parts.append(load_episodes(file))
    episodes = join(parts)
    headline = judge(episodes, options.threshold)
    return episodes, {
        "episodes": options.episodes,
        "successes": headline["successes"],
        "success_rate": headline["success_rate"],
        "ci95": headline["ci95"],
        "threshold": options.threshold,
        "budget_env_steps": options.budget,
        "mean_env_steps": headline["mean_env_steps"],
        "encoder_frames": episodes.encoder_frames,
        "replans": episodes.replans,
        "seconds_per_replan": episodes.seconds / episodes.replans,
        "by_threshold": [
            judge(episodes, threshold) for threshold in sorted({*THRESHOLDS, options.threshold}, reverse=True)
        ],
        "live_drift": setting.drift,
        "maze": setting.maze.name,
        "options": asdict(options),
    }
