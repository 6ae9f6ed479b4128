"""Evaluations: a policy acts in episodes under a budget of env steps, then the judge reads the recorded states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from wmcache.cluster.tasks import WorkerTask, report, run_tasks
from wmcache.common.errors import UserError
from wmcache.common.files import make_folder
from wmcache.common.paths import absolute, as_path
from wmcache.envs import PointMazeVectorEnv, longest_move
from wmcache.planner.base import Observation
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.goals import Separation, start_and_goal
from wmcache.planner.judge import count_at_goal, judge, reported_thresholds, shortest_path_lengths
from wmcache.planner.options import SOURCES, PlanOptions, Precision, absolute_file
from wmcache.planner.policies import PLAN_POLICIES, make_policy


class _Undrawn(PointMazeVectorEnv):
    """Draws nothing, for policies that see no frame."""

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        return (np.zeros((1, 1, 3), np.uint8),) * self.num_envs


def run_episodes(context: EvalContext, options: PlanOptions, numbers: Iterable[int]) -> Episodes:
    """Act in the episodes of these numbers, all at once.

    The policy receives frames and proprio, never a distance or a success, and a state only where it says so; MPC with `alpha` above 0
    also receives the goal's proprio.
    """
    numbers, frameskip = list(numbers), context.frameskip
    start, goal = _start_and_goal(context, options, numbers)
    policy = make_policy(context, options)
    env = (PointMazeVectorEnv if policy.reads == "frames" else _Undrawn)(len(numbers), context.maze, context.image_size)

    def seen(state: NDArray[np.float64], earlier: NDArray[np.uint8] | None = None) -> Observation:
        return Observation(**env.observe(), earlier=earlier, state=state if policy.reads == "state" else None)

    env.reset(options={"state": goal, "goal": goal})
    policy.reset(seen(goal), [torch.Generator().manual_seed(99 * number + 1) for number in numbers])
    env.reset(options={"state": start, "goal": goal})
    policy.observe(seen(start))
    states: list[NDArray[np.float64]] = []
    done, chunk = 0, options.execute * frameskip
    while done < options.budget:
        actions = policy.act()
        decides_again = done + chunk < options.budget
        for step, action in enumerate(actions.unbind(1)):
            raw = action.reshape(len(numbers), frameskip, -1).cpu().numpy()[:, : options.budget - done]
            moved, earlier = _advance(env, raw, context.encoder.lag if policy.reads == "frames" else 0)
            states += moved
            done += raw.shape[1]
            if done >= options.budget:
                break
            # Of the frames within a chunk only those are encoded that the next decision starts from.
            if decides_again and options.execute - step <= context.observed:
                policy.observe(seen(moved[-1][:, -1], earlier))
        report(len(numbers))
    env.close()
    counts = (policy.encoder_frames, policy.decisions, policy.seconds)
    return Episodes(start, goal, np.concatenate(states, 1), chunk, *counts)


def _advance(
    env: PointMazeVectorEnv, actions: NDArray[np.floating], lag: int
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
    """Run all episodes in batches, then judge them; returns the episodes and the content of `results.json`.

    Args:
        out: folder that keeps finished batches, so that a stopped evaluation resumes.
        cluster: that plans the batches, see `parse_cluster`.
    """
    numbers = range(options.seed, options.seed + options.episodes)
    # What cannot work is reported before any work.
    _start_and_goal(context, options, numbers)
    make_policy(context, options)
    baselines_of(context, options)
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
        "candidates_per_replan": context.solver.evaluations if context.policy(options) == "mpc" else 0,
        "seconds_per_replan": episodes.seconds / episodes.replans,
        "operations_per_decision": operations_per_decision(context, options),
        "policy": context.policy(options),
        "reads_state": make_policy(context, options).reads == "state",
        "by_threshold": by_threshold,
        "baselines": {name: judge_all(run_baseline(context, options, name)) for name in baselines_of(context, options)},
        "live_drift": context.drift,
        "maze": context.maze.name,
        "options": asdict(options),
        "resolved": context.resolved(options),
    }


def baselines_of(context: EvalContext, options: PlanOptions) -> list[str]:
    """List the policies of `options.baselines` that no model is needed for; raises UserError for one that sees frames."""
    names = [name for name in dict.fromkeys(options.baselines.split(",")) if name not in ("", "untrained")]
    for name in names:
        if name not in PLAN_POLICIES or make_policy(context, replace(options, policy=name)).reads == "frames":
            known = ", ".join(["untrained", *(name for name in PLAN_POLICIES if name not in ("actor", "mpc"))])
            raise UserError(f"--baselines {options.baselines}: {name} is no baseline; known are {known}")
    return [name for name in names if name != context.policy(options)]


def run_baseline(context: EvalContext, options: PlanOptions, name: str) -> Episodes:
    """Let a policy that sees no frame act in the same episodes; physics alone, no frame is rendered."""
    options = replace(options, policy=name)
    firsts = range(options.seed, options.seed + options.episodes, options.batch)
    return Episodes.join([run_episodes(context, options, batch_of(options, first)) for first in firsts])


def operations_per_decision(context: EvalContext, options: PlanOptions) -> int:
    """Count the floating-point operations of networks, the encoder's included, of a decision in one episode."""
    start, goal = _start_and_goal(context, options, [options.seed])
    policy = make_policy(context, options)
    env = PointMazeVectorEnv(1, context.maze, context.image_size)
    observations = []
    for state in (goal, start):
        env.reset(options={"state": state, "goal": goal})
        observations.append(Observation(**env.observe(), state=state if policy.reads == "state" else None))
    env.close()
    policy.reset(observations[0], [torch.Generator().manual_seed(99 * options.seed + 1)])
    with FlopCounterMode(display=False) as counter:
        policy.observe(observations[1])
        policy.act()
    return int(counter.get_total_flops())
