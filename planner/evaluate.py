"""Planning episodes: who starts where, within which budget, and who arrived. The planner sees frames and proprio, the judge states."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.layout import StoreCard
from wmcache.cache.store import TokenStore
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import make_folder, sha256_of
from wmcache.common.jsonfiles import dump_json, read_json
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import Maze, PointMazeSimulator, PointMazeVectorEnv, find_maze, longest_move
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.encoders.changes import LEAST_CHANGE, changes_for
from wmcache.planner.baselines import BASELINES, run_baseline
from wmcache.planner.episodes import (
    Episodes,
    began_at_goal,
    join,
    judge,
    load_episodes,
    save_episodes,
    shortest_ways,
    thresholds_of,
)
from wmcache.planner.goals import ANY, SOURCES, Apart, start_and_goal
from wmcache.planner.graph import LatentGraph
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.options import PlanOptions, Precision, check_options
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import make_solver
from wmcache.trainer.checkpoint import last_checkpoint, load_model, open_store, read_config, read_identity

CHECKED_FRAMES = 16
LONGEST_NAME = 120


class EvalContext:
    """A run, brought to life: its model, its encoder, its maze and its store."""

    def __init__(
        self,
        run: Path,
        options: PlanOptions,
        *,
        weights: Path | None = None,
        cache: AnyPath | None = None,
        untrained: bool = False,
    ) -> None:
        """Load everything and check that live encoding reproduces the store.

        Args:
            run: the run's folder. options: see `PlanOptions`.
            weights, cache: where the encoder's weights and the store are now, if not where they were.
            untrained: plan with random weights in place of the run's, as a baseline.

        Raises:
            UserError: not a run, options that do not fit, missing weights, or an encoder that does not match the store.
        """
        check_options(options)
        self.run, self.weights, self.untrained = run, weights, untrained
        self.config = read_config(run)
        self.card, identity = read_identity(run)
        self.device = choose_device(options.device)
        self.model = load_model(run, self.device, untrained=untrained)
        if self.model.stages and int(self.model.stage) < 2:
            raise UserError(
                f"{run} knows where something changes, but not yet what; train it further with the same options and --stage primary"
            )
        there = self.card.encoder.get("weights")
        if weights is None and there and not Path(there).exists():
            raise UserError(
                f"{there}, the weights of the encoder of {run}, does not exist; if it has moved, pass its path now with --weights"
            )
        self.encoder = encoders.create_again(self.card.encoder, weights=weights, device=options.device)
        if different := identity.differences(self.encoder.identity(identity.dataset_fingerprint, identity.store_dtype)):
            raise UserError(
                f"the encoder is not the one that {run} was trained on ({'; '.join(different)}); pass the right --weights"
            )
        self.store = open_store(run, cache)
        if not self.card.dataset.get("maze"):
            raise UserError(
                f"{run} was trained on frames of no known maze, so there is no simulator to plan in; "
                "docs/import.md has a script that plans in your own"
            )
        self.maze = find_maze(options.env) if options.env else cached_maze(self.card)
        self.image_size = int(self.card.dataset["image_size"])
        self.frameskip = int(self.config["frameskip"])
        if self.encoder.lag > self.frameskip:
            raise UserError(
                f"the encoder of {run} looks {self.encoder.lag} env steps back, beyond its frames of {self.frameskip}; "
                "train with a --frameskip of at least that, or extract with a smaller --lag"
            )
        self.drift = live_drift(self.store, self.encoder)
        self.blind = not self.model.proprio_code(
            torch.zeros(1, 1, self.model.shape.proprio_dim, device=self.device)
        ).numel()
        if options.proprio == "none" and not self.blind:
            raise UserError(
                f"{run} was trained with proprio; train another run without: wmtrain --proprio none --out RUN"
            )
        if options.alpha and self.blind:
            raise UserError(f"{run} was trained without proprio, which --alpha {options.alpha} weighs; leave it at 0")
        usual = self.model.shape.history if self.blind else 1
        self.context = min(options.context or usual, self.model.shape.history)
        if (options.observed or 0) > self.context:
            raise UserError(
                f"--observed {options.observed} is more than the {self.context} frames that a step sees; raise --context"
            )
        self.observed = min(options.observed or usual, self.context)
        # The one solver whose noise runs in env steps.
        known = {"frameskip": self.frameskip} if options.solver == "icem" else {}
        self.solver = make_solver(options.solver, **{**known, **options.search})
        self.dtype = choose_dtype(options.dtype, self.device)
        self.differs = changes_for(self.card.token_grid, self.frameskip, options.device) if options.mask else None
        self.graph = (
            LatentGraph.from_store(self.store, self.frameskip, self.device) if options.distance == "graph" else None
        )

    def make_mpc(self, options: PlanOptions, goal: Tensor, goal_proprio: NDArray[np.float32]) -> Mpc:
        """A planner for goals [E, N, D]; their proprio [E, P] is used where `alpha` asks for it."""
        code = None
        if options.alpha:
            code = self.model.proprio_code(torch.from_numpy(goal_proprio).to(self.device)[:, None])[:, 0]
        goal = goal.float()
        to_goal = None if self.graph is None else self.graph.to_goal(goal)
        return Mpc(
            model=self.model,
            solver=self.solver,
            objective=GoalDistance(goal, options.objective, options.alpha, code, self.graph, to_goal),
            horizon=options.horizon,
            context=self.context,
            frameskip=self.frameskip,
            device=self.device,
            dtype=self.dtype,
        )

    def mask(self, images: NDArray[np.uint8], goal_images: NDArray[np.uint8]) -> Tensor:
        """Where two frames [E, S, S, 3] differ, bool [E, N]; everywhere, where they differ nowhere."""
        assert self.differs is not None
        differs = (self.differs(np.stack([images, goal_images], 1)) > LEAST_CHANGE).any(-1)
        return differs | ~differs.any(1, keepdim=True)

    def resolved(self, options: PlanOptions) -> dict[str, Any]:
        """The settings as they were used: with the values that `None` and `auto` stood for."""
        used = {
            **asdict(options),
            "context": self.context,
            "observed": self.observed,
            "search": asdict(self.solver),  # type: ignore[call-overload]
            "env": self.maze.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if options.goals in ("dataset", "random-action"):
            used["goal_steps"] = self.goal_steps(options)
        else:
            del used["goal_steps"]
        if options.goals not in SOURCES:
            del used["strict"]
        return used

    def goal_steps(self, options: PlanOptions) -> int:
        """Env steps from start to goal, for goals that lie so far apart."""
        return options.goal_steps or options.horizon * self.frameskip

    def fingerprint(self, options: PlanOptions) -> str:
        """Of everything that the episodes depend on: options, weights of the model, goals, identity of the store."""
        weights = sha256_of(last_checkpoint(self.run) / "model.safetensors")
        goals = "" if options.goals in SOURCES else sha256_of(Path(options.goals))
        parts = [recorded(options), weights, goals, self.store.identity.to_json(), self.maze.rows]
        known = dump_json([*parts, "untrained"] if self.untrained else parts)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def recorded(options: PlanOptions) -> dict[str, Any]:
    """The settings by which an evaluation is known; `strict` only where it changes the episodes, so that older ones are still known."""
    known = asdict(options)
    if not options.strict or options.goals not in SOURCES:
        del known["strict"]
    return known


def default_out(run: Path, protocol: str | None, options: PlanOptions) -> Path:
    """The folder of an evaluation's results: named by its protocol, its sizes and every setting that differs from the protocol's.

    Args:
        run: the run's folder, in which it is. protocol: of `PROTOCOLS`, or None. options: the settings.
    """
    usual: dict[str, Any] = {**asdict(PlanOptions()), **PROTOCOLS.get(protocol or "", {})}
    known = {**asdict(options), **options.search}
    # These are in every name.
    named = {"search", "episodes", "budget", "env", *(() if protocol else ("objective", "execute"))}
    differ = {name: value for name, value in known.items() if name not in named and value != usual.get(name)}
    # Those that were always named come first, as they always did.
    first = [name for name in ("solver", "mask", "distance", "goals") if name in differ]
    parts = [protocol or f"{options.objective}-x{options.execute}"]
    parts += [_named(name, differ[name]) for name in dict.fromkeys([*first, *differ])]
    parts += [f"{options.episodes}x{options.budget}", _named("env", options.env) if options.env else ""]
    name = "-".join(["plan", *filter(None, parts)])
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{_digest(name)}"
    return run / name


def _named(name: str, value: Any) -> str:
    """A setting as a part of a folder's name."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if (name == "goals" and value not in SOURCES) or (name == "env" and Path(value).suffix):
        return f"{Path(value).stem}-{_digest(value)}"  # a file; another folder may have one of the same name
    if name in ("solver", "distance", "objective", "goals", "env"):
        return Path(value).name
    if name == "execute":
        return f"x{value}"
    return f"{flag}-{value.replace(':', '')}" if isinstance(value, str) else f"{flag}{value}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def refuse_other_results(out: Path, options: PlanOptions) -> None:
    """Refuse, as a UserError, to write over the results of other settings."""
    if not (out / "results.json").exists():
        return
    there = read_json(out / "results.json", "choose another --out").get("options", {})
    mine = recorded(options)
    there, mine = ({"strict": False, **known} for known in (there, mine))  # what evaluations did before it existed
    if options.goals not in SOURCES:
        there["strict"] = False
    different = [f"{name} {there.get(name)} != {mine[name]}" for name in mine if there.get(name) != mine[name]]
    if different:
        raise UserError(
            f"{out} has results of other settings ({'; '.join(different)}); write these beside them: --out {out}-2"
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
    if encoder.lag:
        before = store.state[frames - np.minimum(encoder.lag, store.step[frames])]
        live = np.stack([np.stack([simulator.render(state) for state in before]), live], 1)
    simulator.close()
    drift = encoder.drift(live, store.gather(frames))
    if not drift["cosine"] > COSINE_TOLERANCE:
        raise UserError(
            f"encoding cached frames live gives other tokens than {store.path} holds (smallest cosine {drift['cosine']:.4f}, allowed "
            f"{COSINE_TOLERANCE}); the renderer or the libraries are others: use the versions in {store.path / 'zarr.json'}, "
            "or extract another store with --out on this machine and train on that"
        )
    return drift


def run_episodes(
    setting: EvalContext, options: PlanOptions, numbers: Iterable[int], progress: tqdm[Any] | None = None
) -> Episodes:
    """Plan and act in some episodes at once.

    Args:
        setting, options: what to plan with. numbers: which episodes. progress: told of every replan.

    Returns:
        What happened. The planner was given frames and proprio, never a state, a distance or a success; with `alpha` above 0 the goal's
        proprio too.
    """
    numbers = list(numbers)
    count, frameskip, observed = len(numbers), setting.frameskip, setting.observed
    start, goal = _start_and_goal(setting, options, numbers)
    env = PointMazeVectorEnv(count, setting.maze, setting.image_size)
    generators = [torch.Generator().manual_seed(99 * n + 1) for n in numbers]
    observation, _ = env.reset(options={"state": goal, "goal": goal})
    begun = time.perf_counter()
    goal_images = observation["image"]
    mpc = setting.make_mpc(options, setting.encoder(goal_images), observation["proprio"])
    clock = time.perf_counter() - begun
    encoder_frames, replans, done = count, 0, 0
    observation, _ = env.reset(options={"state": start, "goal": goal})
    live = [_see(setting, observation, None)]
    encoder_frames += count
    executed: list[Tensor] = []
    plan, states, earlier = None, [], None
    while done < options.budget:
        begun = time.perf_counter()
        live, executed = live[-observed:], executed[len(executed) - min(observed, len(live)) + 1 :]
        tokens, proprio = (torch.stack(parts, 1) for parts in zip(*live, strict=True))
        past = torch.stack(executed, 1) if executed else None
        if options.mask:
            assert isinstance(mpc.objective, GoalDistance)
            mpc.objective = replace(mpc.objective, mask=setting.mask(observation["image"], goal_images))
        plan = mpc.plan(tokens, proprio, plan, generators, past)
        clock += time.perf_counter() - begun
        replans += count
        goes_on = done + options.execute * frameskip < options.budget
        for step in range(options.execute):
            action = plan[:, step]
            raw = action.reshape(count, frameskip, -1).cpu().numpy()[:, : options.budget - done]
            lag = min(setting.encoder.lag, raw.shape[1])
            states.append(env.advance(raw[:, : raw.shape[1] - lag]))
            if lag:
                earlier = np.stack(env.render())
                states.append(env.advance(raw[:, raw.shape[1] - lag :]))
            executed.append(action)
            done += raw.shape[1]
            if done >= options.budget:
                break
            # Frames in the middle of a chunk are looked at only where a plan will start from them.
            if goes_on and options.execute - step <= observed:
                begun = time.perf_counter()
                observation = env.observe()
                live.append(_see(setting, observation, earlier))
                clock += time.perf_counter() - begun
                encoder_frames += count
        plan = mpc.shift(plan, options.execute)
        if progress is not None:
            progress.update(count)
    env.close()
    chunk = options.execute * frameskip
    return Episodes(start, goal, np.concatenate(states, 1), chunk, encoder_frames, replans, clock)


def _start_and_goal(
    setting: EvalContext, options: PlanOptions, numbers: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`start_and_goal` by an evaluation's settings."""
    split_seed = int(setting.config.get("split_seed", 42))
    apart = ANY
    if options.strict:
        apart = Apart(thresholds_of(options.threshold)[0], longest_move(setting.frameskip))
    return start_and_goal(
        options.goals, numbers, setting.maze, setting.store, setting.goal_steps(options), split_seed, apart
    )


def _see(
    setting: EvalContext, observation: dict[str, NDArray[Any]], earlier: NDArray[np.uint8] | None
) -> tuple[Tensor, Tensor]:
    """Tokens [E, N, D] and proprio [E, P] of what is seen now, and for an encoder of frame pairs of what was seen before."""
    images = observation["image"] if earlier is None else np.stack([earlier, observation["image"]], 1)
    return setting.encoder(images), torch.from_numpy(observation["proprio"]).to(setting.device)


Spread = Callable[[Callable[[int], int], Sequence[int], int], None]
"""(task, items, units in all of them) -> None when it is done: runs a picklable task, which returns its units, on every item."""


@dataclass(frozen=True)
class PlanTask:
    """Plans a batch of episodes wherever it is called, and keeps it in a file.

    Attributes:
        run, options, weights, cache, untrained: as of `EvalContext`; paths are absolute.
        fingerprint: of the setting. folder: of the files.
    """

    run: Path
    options: PlanOptions
    weights: Path | None
    cache: str
    untrained: bool
    fingerprint: str
    folder: Path

    def __call__(self, begin: int) -> int:
        """Plan the batch that begins with this episode; returns its replans.

        Raises:
            UserError: the run, its encoder or its store are not the same here.
        """
        if _kept.fingerprint != self.fingerprint:
            _kept.setting = EvalContext(
                self.run, self.options, weights=self.weights, cache=as_path(self.cache), untrained=self.untrained
            )
            _kept.fingerprint = self.fingerprint
        numbers = batch_of(self.options, begin)
        episodes = run_episodes(_kept.setting, self.options, numbers)
        save_episodes(_batch_file(self.folder, begin), episodes)
        return episodes.replans


class _Kept:
    """The setting of the tasks in this process, brought to life once."""

    fingerprint = ""
    setting: EvalContext


_kept = _Kept()


def batch_of(options: PlanOptions, begin: int) -> range:
    """The episodes of the batch that begins with that one; what is planned at once never depends on where."""
    return range(begin, min(options.seed + options.episodes, begin + options.batch))


def _batch_file(folder: Path, begin: int) -> Path:
    return folder / f"{begin:06d}.npz"


def evaluate(
    setting: EvalContext, options: PlanOptions, out: Path, spread: Spread | None = None
) -> tuple[Episodes, dict[str, Any]]:
    """All episodes, in batches.

    Args:
        setting, options: what to plan with.
        out: folder in which finished batches are kept, so that a stopped evaluation goes on when it is run again.
        spread: what runs the batches elsewhere; None plans them here.

    Returns:
        What happened, and the content of `results.json`.
    """
    first, last = options.seed, options.seed + options.episodes
    replans = -(-options.budget // (options.execute * setting.frameskip))
    _start_and_goal(setting, options, range(first, last))  # what cannot be had is said before any work
    folder = out / f"unfinished-{setting.fingerprint(options)}"
    make_folder(folder)
    begins = range(first, last, options.batch)
    pending = [begin for begin in begins if not _batch_file(folder, begin).exists()]
    if spread is not None and pending:
        task = _task(setting, options, folder)
        spread(task, pending, sum(len(batch_of(options, begin)) for begin in pending) * replans)
    else:
        total, update = options.episodes * replans, seconds_between_updates()
        with tqdm(total=total, desc="wmplan", unit=" replans", mininterval=update) as bar:
            bar.update(total - sum(len(batch_of(options, begin)) for begin in pending) * replans)
            for begin in pending:
                done = run_episodes(setting, options, batch_of(options, begin), bar)
                save_episodes(_batch_file(folder, begin), done)
    parts = [load_episodes(_batch_file(folder, begin)) for begin in begins]
    episodes = join(parts)
    shortest = shortest_ways(episodes, setting.maze)
    thresholds = thresholds_of(options.threshold)

    def judged(done: Episodes) -> list[dict[str, Any]]:
        return [judge(done, threshold, setting.maze, shortest) for threshold in thresholds]

    by_threshold = judged(episodes)
    headline = by_threshold[thresholds.index(options.threshold)]
    acted = {
        name: run_baseline(
            name, setting.maze, episodes.start, episodes.goal, range(first, last), options.budget, episodes.chunk
        )
        for name in BASELINES
    }
    return episodes, {
        "episodes": options.episodes,
        "successes": headline["successes"],
        "success_rate": headline["success_rate"],
        "ci95": headline["ci95"],
        "held": headline["held"],
        "held_rate": headline["held_rate"],
        "held_ci95": headline["held_ci95"],
        "began_at_goal": {str(threshold): began_at_goal(episodes, threshold) for threshold in thresholds},
        "threshold": options.threshold,
        "budget_env_steps": options.budget,
        "mean_env_steps": headline["mean_env_steps"],
        "encoder_frames": episodes.encoder_frames,
        "replans": episodes.replans,
        "candidates_per_replan": setting.solver.evaluations,
        "seconds_per_replan": episodes.seconds / episodes.replans,
        "by_threshold": by_threshold,
        "baselines": {name: judged(done) for name, done in acted.items()},
        "live_drift": setting.drift,
        "maze": setting.maze.name,
        "options": asdict(options),
        "resolved": setting.resolved(options),
    }


def _task(setting: EvalContext, options: PlanOptions, folder: Path) -> PlanTask:
    """The task of a setting that is alive here: in its precision, and by paths that hold in any working directory."""
    known = replace(options, dtype=cast(Precision, str(setting.dtype).removeprefix("torch.")))
    if options.goals not in SOURCES:
        known = replace(known, goals=str(Path(options.goals).absolute()))
    if options.env and Path(options.env).exists():
        known = replace(known, env=str(Path(options.env).absolute()))
    return PlanTask(
        run=setting.run.absolute(),
        options=known,
        weights=setting.weights and setting.weights.absolute(),
        cache=absolute(setting.store.path),
        untrained=setting.untrained,
        fingerprint=setting.fingerprint(options),
        folder=folder.absolute(),
    )


def random_episode(
    setting: EvalContext, number: int
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], list[NDArray[np.uint8]]]:
    """States [4] of the random start and goal of an episode, and frames [S, S, 3] of them."""
    start, goal = (states[0] for states in start_and_goal("random-state", [number], setting.maze, setting.store, 0))
    simulator = PointMazeSimulator(setting.maze, setting.image_size)
    frames = [simulator.render(state) for state in (start, goal)]
    simulator.close()
    return (start, goal), frames
