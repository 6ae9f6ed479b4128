"""Evaluations: a policy acts in episodes under a budget of env steps, then the judge reads the recorded states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cluster.tasks import run_tasks
from wmcache.common.files import make_folder, seconds_between_updates
from wmcache.common.paths import absolute, as_path
from wmcache.envs import PointMazeVectorEnv, longest_move
from wmcache.planner.baselines import BASELINES, run_baseline
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes, join, load_episodes, save_episodes
from wmcache.planner.goals import SOURCES, Separation, start_and_goal
from wmcache.planner.judge import count_at_goal, judge, reported_thresholds, shortest_path_lengths
from wmcache.planner.options import PlanOptions
from wmcache.planner.policy import MpcPolicy, Observation


def run_episodes(
    context: EvalContext, options: PlanOptions, numbers: Iterable[int], progress: tqdm[Any] | None = None
) -> Episodes:
    """Plan and act in some episodes at once.

    The policy receives frames and proprio, never a state, a distance or a success; with `alpha` above 0 also the goal's proprio.

    Args:
        context: a loaded run.
        options: of the evaluation.
        numbers: of the episodes.
        progress: counts replans.
    """
    numbers = list(numbers)
    frameskip = context.frameskip
    start, goal = _start_and_goal(context, options, numbers)
    env = PointMazeVectorEnv(len(numbers), context.maze, context.image_size)
    policy = MpcPolicy(context, options)
    goal_seen, _ = env.reset(options={"state": goal, "goal": goal})
    policy.reset(Observation(**goal_seen), [torch.Generator().manual_seed(99 * number + 1) for number in numbers])
    start_seen, _ = env.reset(options={"state": start, "goal": goal})
    policy.observe(Observation(**start_seen))
    states: list[NDArray[np.float64]] = []
    done = 0
    while done < options.budget:
        actions = policy.act()
        replans_again = done + options.execute * frameskip < options.budget
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
        if progress is not None:
            progress.update(len(numbers))
    env.close()
    chunk = options.execute * frameskip
    return Episodes(
        start, goal, np.concatenate(states, 1), chunk, policy.encoder_frames, policy.replans, policy.seconds
    )


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
class PlanTask:
    """Plans a batch of episodes on any worker, and saves it in a file.

    Attributes:
        run, options, weights, cache, untrained: arguments of `EvalContext`; paths are absolute.
        folder: of the files.
    """

    run: Path
    options: PlanOptions
    weights: Path | None
    cache: str
    untrained: bool
    folder: Path

    @classmethod
    def of(cls, context: EvalContext, options: PlanOptions, folder: Path) -> PlanTask:
        """Describe a loaded run by absolute paths, and in the precision that was chosen here."""
        options = replace(options, dtype=str(context.dtype).removeprefix("torch."))
        if options.goals not in SOURCES:
            options = replace(options, goals=str(Path(options.goals).absolute()))
        if options.env and Path(options.env).exists():
            options = replace(options, env=str(Path(options.env).absolute()))
        weights = context.weights and context.weights.absolute()
        cache = absolute(context.store.path)
        return cls(context.run.absolute(), options, weights, cache, context.untrained, folder.absolute())

    def setup(self) -> EvalContext:
        """Load the run, once per process."""
        return EvalContext(
            self.run, self.options, weights=self.weights, cache=as_path(self.cache), untrained=self.untrained
        )

    def __call__(self, first: int) -> int:
        """Plan the batch that begins with this episode; returns its replans."""
        episodes = run_episodes(_loaded(self), self.options, batch_of(self.options, first))
        save_episodes(_batch_file(self.folder, first), episodes)
        return episodes.replans
