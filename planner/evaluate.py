"""Evaluations: a policy acts in episodes under a budget of env steps, then the judge reads the recorded states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cluster.tasks import WorkerTask, report, run_tasks
from wmcache.common.files import make_folder
from wmcache.common.paths import absolute, as_path
from wmcache.envs import Maze, PointMazeSimulator, PointMazeVectorEnv, longest_move
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.judge import count_at_goal, judge, reported_thresholds, shortest_path_lengths
from wmcache.planner.goals import Separation, start_and_goal
from wmcache.planner.mpc import MpcPolicy, Observation
from wmcache.planner.options import SOURCES, PlanOptions, Precision, absolute_file


def run_episodes(context: EvalContext, options: PlanOptions, numbers: Iterable[int]) -> Episodes:
    """Plan and act in the episodes of these numbers, all at once.

    The policy receives frames and proprio, never a state, a distance or a success; with `alpha` above 0 also the goal's proprio.
    """
    numbers, frameskip = list(numbers), context.frameskip
    start, goal = _start_and_goal(context, options, numbers)
    env = PointMazeVectorEnv(len(numbers), context.maze, context.image_size)
    policy = MpcPolicy(context, options)
    goal_seen, _ = env.reset(options={"state": goal, "goal": goal})
    policy.reset(Observation(**goal_seen), [torch.Generator().manual_seed(99 * number + 1) for number in numbers])
    start_seen, _ = env.reset(options={"state": start, "goal": goal})
    policy.observe(Observation(**start_seen))
    states: list[NDArray[np.float64]] = []
    done, chunk = 0, options.execute * frameskip
    while done < options.budget:
        actions = policy.act()
        replans_again = done + chunk < options.budget
        for step, action in enumerate(actions.unbind(1)):
            raw = action.reshape(len(numbers), frameskip, -1).cpu().numpy()[:, : options.budget - done]
            moved, earlier = _advance(env, raw, context.encoder.lag)
            states += moved
            done += raw.shape[1]
            if done >= options.budget:
                break
            # Of the frames within a chunk only those are encoded that the next plan starts from.
            if replans_again and options.execute - step <= context.observed:
                policy.observe(Observation(**env.observe(), earlier=earlier))
        report(len(numbers))
    env.close()
    counts = (policy.encoder_frames, policy.replans, policy.seconds)
    return Episodes(start, goal, np.concatenate(states, 1), chunk, *counts)


def _advance(
    env: PointMazeVectorEnv, actions: NDArray[np.float32], lag: int
) -> tuple[list[NDArray[np.float64]], NDArray[np.uint8] | None]:
    """Execute actions [E, k, A]; returns the states in parts [E, k', 4], and the frame `lag` env steps before the end."""
    if not lag:
        return [env.advance(actions)], None
    before = actions.shape[1] - min(lag, actions.shape[1])
    states = [env.advance(actions[:, :before])]
    earlier = np.stack(env.render())
    return [*states, env.advance(actions[:, before:])], earlier


def _start_and_goal(
    context: EvalContext, options: PlanOptions, numbers: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    separation = None
    if options.strict:
        separation = Separation(reported_thresholds(options.threshold)[0], longest_move(context.frameskip))
    split_seed = int(context.config.get("split_seed", 42))
    steps = context.goal_steps(options)
    return start_and_goal(options.goals, numbers, context.maze, context.store, steps, split_seed, separation)


@dataclass(frozen=True)
class PlanBatch(WorkerTask[int, EvalContext]):
    """Plans a batch of episodes on any worker, and saves it in a file of the folder; paths are absolute."""

    run_path: Path
    options: PlanOptions
    weights: Path | None
    cache: str
    untrained: bool
    folder: Path
    fingerprint: str  # workers keep the loaded run by all fields, and files may change under the same path

    def setup(self) -> EvalContext:
        """Load the run."""
        cache = as_path(self.cache)
        return EvalContext(self.run_path, self.options, weights=self.weights, cache=cache, untrained=self.untrained)

    def run(self, state: EvalContext, item: int) -> int:
        """Plan the batch that begins with this episode; returns its replans."""
        episodes = run_episodes(state, self.options, batch_of(self.options, item))
        episodes.save(_batch_file(self.folder, item))
        return episodes.replans


def batch_of(options: PlanOptions, first: int) -> range:
    """Return the episodes of the batch that begins with this one."""
    return range(first, min(options.seed + options.episodes, first + options.batch))


def _batch_file(folder: Path, first: int) -> Path:
    return folder / f"{first:06d}.npz"


def evaluate(
    context: EvalContext, options: PlanOptions, out: Path, cluster: str = "local:1"
) -> tuple[Episodes, dict[str, Any]]:
    """Plan all episodes in batches, then judge them; returns the episodes and the content of `results.json`.

    Args:
        out: folder that keeps finished batches, so that a stopped evaluation resumes.
        cluster: that plans the batches, see `parse_cluster`.
    """
    numbers = range(options.seed, options.seed + options.episodes)
    _start_and_goal(context, options, numbers)  # unusable goals are reported before any work
    fingerprint = context.fingerprint(options)
    folder = out / f"unfinished-{fingerprint}"
    make_folder(folder)
    firsts = numbers[:: options.batch]
    pending = [first for first in firsts if not _batch_file(folder, first).exists()]
    replans = -(-options.budget // (options.execute * context.frameskip))
    task = PlanBatch(
        context.run.absolute(),
        replace(
            options,
            dtype=cast(Precision, str(context.dtype).removeprefix("torch.")),  # chosen here
            goals=options.goals if options.goals in SOURCES else absolute_file(options.goals),
            env=options.env and absolute_file(options.env),
        ),
        context.weights and context.weights.absolute(),
        absolute(context.store.path),
        context.untrained,
        folder.absolute(),
        fingerprint,
    )
    run_tasks(
        task.with_state(context),
        pending,
        cluster=cluster,
        total=sum(len(batch_of(options, first)) for first in pending) * replans,
        label="wmplan",
        unit="replans",
        what="batches",
        more="a smaller --batch-size makes more of them",
    )
    episodes = Episodes.load(_batch_file(folder, first) for first in firsts)
    return episodes, summarise(context, options, episodes)


def summarise(context: EvalContext, options: PlanOptions, episodes: Episodes) -> dict[str, Any]:
    """Judge episodes, and the baselines on the same starts and goals; returns the content of `results.json`."""
    thresholds = reported_thresholds(options.threshold)
    shortest = shortest_path_lengths(episodes, context.maze)
    numbers = range(options.seed, options.seed + options.episodes)

    def judge_all(done: Episodes) -> list[dict[str, Any]]:
        return [judge(done, threshold, context.maze, shortest) for threshold in thresholds]

    by_threshold = judge_all(episodes)
    headline = by_threshold[thresholds.index(options.threshold)]
    names = ("successes", "success_rate", "ci95", "held", "held_rate", "held_ci95")
    return {
        "episodes": options.episodes,
        **{name: headline[name] for name in names},
        "began_at_goal": {str(threshold): count_at_goal(episodes, threshold) for threshold in thresholds},
        "threshold": options.threshold,
        "budget_env_steps": options.budget,
        "mean_env_steps": headline["mean_env_steps"],
        "encoder_frames": episodes.encoder_frames,
        "replans": episodes.replans,
        "candidates_per_replan": context.solver.evaluations,
        "seconds_per_replan": episodes.seconds / episodes.replans,
        "by_threshold": by_threshold,
        "baselines": {name: judge_all(run_baseline(name, context.maze, episodes, numbers)) for name in BASELINES},
        "live_drift": context.drift,
        "maze": context.maze.name,
        "options": asdict(options),
        "resolved": context.resolved(options),
    }


BASELINES: dict[str, Callable[[int, int], NDArray[np.float64]]] = {
    # Not the generator of start and goal, so that the actions do not depend on them.
    "random": lambda number, steps: np.random.default_rng((99 * number + 1, 1)).normal(size=(steps, 2)).clip(-1.0, 1.0),
    "zero": lambda _, steps: np.zeros((steps, 2)),
}
"""Name -> function of the number of an episode and env steps -> actions [env steps, 2] in [-1, 1]."""


def run_baseline(name: str, maze: Maze, planned: Episodes, numbers: Sequence[int]) -> Episodes:
    """Act in the starts, goals, budget and chunks of planned episodes with these numbers; physics alone, no frame is rendered."""
    simulator = PointMazeSimulator(maze)
    states = np.empty_like(planned.states)
    for i, number in enumerate(numbers):
        state = planned.start[i]
        for step, action in enumerate(BASELINES[name](number, states.shape[1])):
            state = states[i, step] = simulator.step(state, action)
    return Episodes(planned.start, planned.goal, states, planned.chunk, encoder_frames=0, replans=0, seconds=0.0)
