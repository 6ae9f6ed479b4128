"""Evaluations: a policy acts in episodes under a budget of env steps, then the judge reads the recorded states."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from wmcache.cluster.tasks import WorkerTask, run_tasks
from wmcache.common.columns import of_role
from wmcache.common.errors import UserError
from wmcache.common.files import make_folder
from wmcache.common.paths import absolute, as_path
from wmcache.envs import Steps, Task
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.goals import Separation, start_and_goal, task_names
from wmcache.planner.judge import (
    count_at_goal,
    judge,
    judge_by_task,
    judge_return,
    reported_thresholds,
    shortest_path_lengths,
)
from wmcache.planner.live import act, all_ended, shown, shown_goals
from wmcache.planner.options import SOURCES, TASKS, PlanOptions, absolute_file, is_policy_folder
from wmcache.planner.policies import PLAN_POLICIES, make_policy
from wmcache.planner.reach import FrameTask, frame_tasks
from wmcache.planner.world import states_of, world_name
from wmcache.trainer.runs import data_split


def run_episodes(context: EvalContext, options: PlanOptions, numbers: Iterable[int]) -> Episodes:
    """Act in the episodes of these numbers, all at once.

    The policy receives frames and proprio, never a distance or a success, and a state only where it says so; MPC with `alpha` above 0
    also receives the goal's proprio.
    """
    numbers, frameskip, options = list(numbers), context.frameskip, context.settled(options)
    tasks, policy = tasks_of(context, options, numbers), make_policy(context, options)
    env = context.open_env(len(numbers))
    generators = [torch.Generator().manual_seed(99 * number + 1) for number in numbers]
    policy.reset(shown_goals(policy, env, tasks), generators)
    seen = env.reset(tasks)
    policy.observe(shown(policy, env, seen))
    steps: list[Steps] = []
    executed: list[NDArray[np.floating]] = []
    for part in act(context, options, policy, env, options.budget):
        steps += part.columns
        executed.append(part.actions)
        if context.by_return and all_ended(env, part.columns[-1]):
            break
    env.close()
    start = states_of(env.spec, seen.columns, (len(numbers),), context.success.columns)
    recorded = _recorded(context, tasks, start, steps, np.concatenate(executed, 1))
    if context.by_return:
        recorded |= _padded(recorded, options.budget)
    return Episodes(
        chunk=options.execute * frameskip,
        encoder_frames=policy.encoder_frames,
        replans=policy.decisions,
        seconds=policy.seconds,
        distance=context.success.distance,
        **recorded,
    )


def _recorded(
    context: EvalContext,
    tasks: Sequence[Task],
    start: NDArray[np.float64],
    steps: Sequence[Steps],
    actions: NDArray[np.floating],
) -> dict[str, NDArray[Any]]:
    """Return start, goal, states, rewards and actions, see `Episodes`."""
    spec, success = context.env.spec, context.success
    lengths = [next(iter(part.values())).shape[1] for part in steps]
    parts = [
        states_of(spec, part, (len(start), length), success.columns)
        for part, length in zip(steps, lengths, strict=True)
    ]
    states, kept = np.concatenate(parts, 1), actions.astype(np.float32)
    if success.named:
        goal = np.stack([task.target for task in tasks if isinstance(task, FrameTask)])
        return {"start": start, "goal": goal, "states": states, "rewards": states[:, :0, 0], "actions": kept}
    if not context.by_return:
        start, goal = (
            np.array(ends, np.float64) for ends in zip(*((task.start, task.goal) for task in tasks), strict=True)
        )
        nothing: dict[str, NDArray[Any]] = {
            "rewards": states[:, :0, 0],
            "actions": np.zeros((len(tasks), 0, 0), np.float32),
        }
        return {"start": start, "goal": goal, "states": states, **nothing}
    (name,) = of_role(spec.columns, "reward")
    rewards = np.concatenate([part[name].reshape(part[name].shape[:2]) for part in steps], 1)
    rewards = rewards.astype(np.float64)
    return {"start": start, "goal": start[:, :0], "states": states, "rewards": rewards, "actions": kept}


def _padded(recorded: dict[str, NDArray[Any]], budget: int) -> dict[str, NDArray[Any]]:
    """Return states, rewards and actions of `budget` env steps: after the end the last state and action, and rewards of 0."""
    missing = budget - recorded["rewards"].shape[1]
    return {
        "states": np.pad(recorded["states"], ((0, 0), (0, missing), (0, 0)), mode="edge"),
        "rewards": np.pad(recorded["rewards"], ((0, 0), (0, missing))),
        "actions": np.pad(recorded["actions"], ((0, 0), (0, missing), (0, 0)), mode="edge"),
    }


def tasks_of(context: EvalContext, options: PlanOptions, numbers: Sequence[int]) -> Sequence[Task]:
    """Draw the tasks of episodes; that of episode n depends on n alone."""
    env = context.open_env()
    if context.by_return:
        tasks = [env.sample_task(np.random.default_rng(99 * number + 1), goal=False) for number in numbers]
        env.close()
        return tasks
    split_seed, _ = data_split(context.config)
    steps, success = context.goal_steps(options), context.success
    if success.named:
        apart = max((options.threshold or 0.0) if options.strict else 0.0, options.min_distance)
        reached = frame_tasks(env, context.store, success, numbers, steps, split_seed, apart)
        env.close()
        return reached
    separation = Separation.of(options, env, context.frameskip, success.thresholds)
    start, goal = start_and_goal(options.goals, numbers, env, context.store, steps, split_seed, separation)
    env.close()
    return [Task(one, other) for one, other in zip(start, goal, strict=True)]


@dataclass(frozen=True)
class PlanBatch(WorkerTask[int, EvalContext]):
    """Plans a batch of episodes on any worker, and saves it in a file of the folder; paths are absolute."""

    run_path: Path
    options: PlanOptions
    weights: Path | None
    caches: tuple[str, ...]
    untrained: bool
    folder: Path
    fingerprint: str  # workers keep the loaded run by all fields, and files may change under the same path

    def setup(self) -> EvalContext:
        """Load the run."""
        caches = [as_path(path) for path in self.caches]
        return EvalContext(self.run_path, self.options, weights=self.weights, cache=caches, untrained=self.untrained)

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
    options = context.settled(options)
    numbers = range(options.seed, options.seed + options.episodes)
    # What cannot work is reported before any work.
    tasks_of(context, options, numbers)
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
            dtype=context.precision,  # chosen here
            goals=options.goals if options.goals in SOURCES else absolute_file(options.goals),
            env=options.env and absolute_file(options.env),
            policy=absolute_file(options.policy)
            if options.policy and is_policy_folder(options.policy)
            else options.policy,
        ),
        context.weights and context.weights.absolute(),
        tuple(map(absolute, context.caches)),
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
    episodes = Episodes.load((_batch_file(folder, first) for first in firsts), context.success.distance)
    return episodes, summarise(context, options, episodes)


def summarise(context: EvalContext, options: PlanOptions, episodes: Episodes) -> dict[str, Any]:
    """Judge episodes, and the baselines on the same tasks; returns the content of `results.json`."""
    options = context.settled(options)
    own, judged = _judge_return(episodes) if context.by_return else _judge_goals(context, options, episodes)
    return {
        "episodes": options.episodes,
        **own,
        "budget_env_steps": options.budget,
        "encoder_frames": episodes.encoder_frames,
        "replans": episodes.replans,
        "candidates_per_replan": context.solver.evaluations if context.policy(options) == "mpc" else 0,
        "seconds_per_replan": episodes.seconds / episodes.replans,
        "operations_per_decision": operations_per_decision(context, options),
        "policy": context.policy(options),
        "reads_state": make_policy(context, options).reads == "state",
        "baselines": {name: judged(run_baseline(context, options, name)) for name in baselines_of(context, options)},
        "live_drift": context.drift,
        "maze" if context.env.geometry else "env": world_name(context.env),
        "options": asdict(options),
        "resolved": context.resolved(options),
    }


def remove_unfinished(out: Path) -> None:
    """Delete the saved batches of evaluations whose results in `out` are complete."""
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)


def _judge_return(episodes: Episodes) -> tuple[dict[str, Any], Callable[[Episodes], Any]]:
    return {"return": judge_return(episodes)}, judge_return


def _judge_goals(
    context: EvalContext, options: PlanOptions, episodes: Episodes
) -> tuple[dict[str, Any], Callable[[Episodes], Any]]:
    assert options.threshold is not None
    geometry = context.success.geometry
    thresholds = reported_thresholds(context.success.thresholds, options.threshold)
    shortest = None if geometry is None else shortest_path_lengths(episodes, geometry)

    numbers = range(options.seed, options.seed + options.episodes)
    known = task_names(context.env) if options.goals == TASKS else []
    tasks = [known[number % len(known)] for number in numbers] if known else []

    def judge_all(done: Episodes) -> list[dict[str, Any]]:
        judged = [judge(done, threshold, geometry, shortest) for threshold in thresholds]
        if tasks:
            for row in judged:
                row["by_task"] = judge_by_task(done, row["threshold"], tasks)
        return judged

    by_threshold = judge_all(episodes)
    headline = by_threshold[thresholds.index(options.threshold)]
    names = ("successes", "success_rate", "ci95", "held", "held_rate", "held_ci95", "mean_env_steps", "mean_distance")
    found = {
        **{name: headline[name] for name in names},
        "began_at_goal": {str(threshold): count_at_goal(episodes, threshold) for threshold in thresholds},
        "threshold": options.threshold,
        "by_threshold": by_threshold,
    }
    return found, judge_all


def baselines_of(context: EvalContext, options: PlanOptions) -> list[str]:
    """List the policies of `options.baselines` that no model is needed for; raises UserError for one that sees frames."""
    names = [name for name in dict.fromkeys(options.baselines.split(",")) if name not in ("", "untrained")]
    for name in names:
        if name not in PLAN_POLICIES or make_policy(context, baseline_of(options, name)).reads == "frames":
            blind = [known for known in PLAN_POLICIES if getattr(PLAN_POLICIES.get(known), "reads", "") != "frames"]
            known = ", ".join(["untrained", *blind])
            raise UserError(f"--baselines {options.baselines}: {name} is no baseline; known are {known}")
    return [name for name in names if name != context.policy(options)]


def baseline_of(options: PlanOptions, name: str) -> PlanOptions:
    """Return the options of a baseline in the same episodes."""
    return replace(options, policy=name, draw=False)


def run_baseline(context: EvalContext, options: PlanOptions, name: str) -> Episodes:
    """Let a policy that sees no frame act in the same episodes; physics alone, no frame is rendered."""
    options = baseline_of(options, name)
    firsts = range(options.seed, options.seed + options.episodes, options.batch)
    return Episodes.join([run_episodes(context, options, batch_of(options, first)) for first in firsts])


def operations_per_decision(context: EvalContext, options: PlanOptions) -> int:
    """Count the floating-point operations of networks, the encoder's included, of a decision in one episode."""
    tasks = tasks_of(context, options, [options.seed])
    policy, env = make_policy(context, options), context.open_env()
    observations = [shown_goals(policy, env, tasks), shown(policy, env, env.reset(tasks))]
    env.close()
    policy.reset(observations[0], [torch.Generator().manual_seed(99 * options.seed + 1)])
    with FlopCounterMode(display=False) as counter:
        policy.observe(observations[1])
        policy.act()
    return int(counter.get_total_flops())
