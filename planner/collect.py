"""Frame datasets of the episodes that a trained model or policy plays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cluster.tasks import WorkerTask, run_tasks
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import json_digest
from wmcache.common.paths import AnyPath, absolute, as_path, exists
from wmcache.envs import (
    POLICIES,
    Distraction,
    Environment,
    Task,
    distraction_of,
    find_environment,
    open_environment,
)
from wmcache.pipeline import collect as behaviour
from wmcache.pipeline.frames import DatasetCard
from wmcache.pipeline.options import CollectOptions
from wmcache.pipeline.play import join_rows, task_of_episode
from wmcache.pipeline.played import PlayedEpisodes, Rows, join_episodes
from wmcache.pipeline.steps import Steps
from wmcache.planner.base import Observation, Policy
from wmcache.planner.context import EvalContext
from wmcache.planner.goals import Separation
from wmcache.planner.live import Moved, act, all_ended, shown, shown_goals
from wmcache.planner.options import PlanOptions, is_policy_folder, policy_run, policy_weights, recorded
from wmcache.planner.policies import make_policy
from wmcache.planner.world import cached_states, same_view
from wmcache.trainer.runs import weights_checksum

EPISODES_AT_ONCE = 10
"""Episodes of a batch. It is no option, because the last bits of what a network computes depend on it."""
MOST_DRAWS = 200
"""Goals that are drawn before one that is too near is used."""
GOAL_SOURCES = ("random-state", "dataset")
UNUSED = ("episodes", "budget", "batch", "seed", "env", "baselines", "device", "dtype")
"""Fields of `PlanOptions` that a collection does not use, or that do not name what acts."""


def collect(
    env: str,
    out: AnyPath,
    *,
    plan: PlanOptions | None = None,
    cluster: str = "local:1",
    **settings: Any,
) -> DatasetCard:
    """Collect a dataset of `CollectOptions(env, **settings)`, whose policy may also be the folder of a run, or of a trained policy.

    Episodes start as with any other policy. Where the environment has goals, an episode gets a new one every `plan.goal_steps` env
    steps, by default two horizons, and the policy is reset: the rule depends on time alone. `plan.goals` is `random-state`, or `dataset`
    for frames of the run's store. With `plan.strict`, a goal is at least the largest reported threshold and one model step from the
    one before; the first, from the start.

    Run again, it plays only missing batches and draws only missing shards. The same run and settings give the same bytes on the same
    kind of device, for any number of workers.

    Args:
        plan: how the run acts; by default as `wmplan` does.
    """
    options = CollectOptions(env, **settings)
    if (folder := folder_of(options)) is None:
        return behaviour.collect(env, out, cluster=cluster, **settings)
    context, plan = _load(folder, options, plan or PlanOptions())
    options = replace(options, policy=_describe(context, plan, options))
    task = PlayBatch(context.run.absolute(), plan, options, absolute(out), context.frameskip)
    saved = task.saved(context)
    if (steps := behaviour.played_steps(out, options, saved.described)) is None:
        behaviour.check_drawing(replace(behaviour.player_of(options), policy="random"), options, out)
        steps = _play_all(task.with_state(context), saved, cluster)
    card = behaviour.draw_dataset(out, options, steps, cluster)
    saved.remove()
    return card


def choose_env(env: str, distract: str | None = None, distract_seed: int = 0) -> tuple[str, str]:
    """Return the name of an environment with its distraction, and the default name of its dataset's folder.

    Raises:
        UserError: the environment is unknown, or options of its distraction do not go together.
    """
    if distract is not None:
        if distraction_of(env):
            raise UserError(f"--env {env} is distracted already; leave out --distract")
        env = Distraction.of(distract, distract_seed).name(env)
    elif distract_seed:
        raise UserError("--distract-seed needs --distract; add it")
    try:
        opened = open_environment(env)
    except UserError as error:
        raise UserError(f"--env: {error}; for frames that exist already: wmcache import frames") from error
    opened.close()
    return env, opened.spec.dataset


def folder_of(options: CollectOptions) -> Path | None:
    """Return the folder of what acts where `policy` is a path; None for the name of a behaviour policy."""
    path = Path(options.policy)
    if not (os.sep in options.policy or path.is_dir()) or options.policy in POLICIES:
        return None
    return None if options.policy in find_environment(options.env).policies else path


def _load(folder: Path, options: CollectOptions, plan: PlanOptions) -> tuple[EvalContext, PlanOptions]:
    """Load a run, or a trained policy's, and settle how it acts; raises UserError where it cannot act in this environment."""
    if (run := policy_run(folder)) is not None:
        plan = replace(plan, policy=str(folder.absolute()))
    context = EvalContext(run or folder, plan)
    plan = replace(context.settled(plan), dtype=context.precision)
    wanted, own = behaviour.player_of(options).open().spec, context.env.spec
    if wanted.world != own.world:
        name = context.card.dataset["env"]
        raise UserError(f"--policy {folder} is of environment {name}; collect with --env {name}")
    if not context.by_return:
        if plan.goals not in GOAL_SOURCES or plan.judge_columns:
            raise UserError(
                f"a collection takes goals {' or '.join(GOAL_SOURCES)}, states of the environment; choose one"
            )
        plan = replace(plan, goal_steps=plan.goal_steps or 2 * plan.horizon * context.frameskip)
    make_policy(context, plan)
    return context, plan


def _describe(context: EvalContext, plan: PlanOptions, options: CollectOptions) -> str:
    """Name what acts by content: its kind, its weights, and a digest of what else an action depends on."""
    known = {name: value for name, value in recorded(plan).items() if name not in UNUSED}
    weights = weights_checksum(context.run)
    if plan.policy and is_policy_folder(plan.policy):
        weights += f" and {sha256_of(policy_weights(Path(plan.policy)))}"
        del known["policy"]
    machine = [context.device.type, str(context.dtype)]
    digest = json_digest([known, options.length, machine, context.store.identity.to_json()])[:16]
    return f"{context.policy(plan)} of {context.config['model']}, weights {weights}, settings {digest}"


@dataclass(frozen=True)
class PlayBatch(WorkerTask[range, EvalContext]):
    """Plays a batch of episodes on any worker, and saves their step table in a file of `out`."""

    run_path: Path
    plan: PlanOptions
    options: CollectOptions  # its policy names the weights: files may change under the same path
    out: str
    frameskip: int

    def setup(self) -> EvalContext:
        """Load the run."""
        return EvalContext(self.run_path, self.plan)

    def run(self, state: EvalContext, item: range) -> int:
        """Play episodes of these numbers; returns their decisions."""
        self.saved(state).save(play_batch(state, self.plan, self.options, item))
        return self.decisions(item)

    def decisions(self, episodes: range) -> int:
        """Count the decisions of a batch."""
        chunk = self.plan.execute * self.frameskip
        return len(episodes) * sum(-(-steps // chunk) for steps in leg_lengths(self.plan, self.options.length))

    def saved(self, context: EvalContext) -> PlayedEpisodes:
        """Return the batches that were played."""
        return PlayedEpisodes(as_path(self.out), self.options, context.env.spec.columns)


def _play_all(task: PlayBatch, saved: PlayedEpisodes, cluster: str) -> Steps:
    """Play the batches that are missing; returns the step table of all episodes."""
    episodes = range(task.options.episodes)
    batches = [episodes[first : first + EPISODES_AT_ONCE] for first in episodes[::EPISODES_AT_ONCE]]
    pending = [batch for batch in batches if not exists(saved.file(batch.start))]
    total = sum(map(task.decisions, pending))
    run_tasks(task, pending, cluster=cluster, total=total, label="play", unit="decisions", what="batches")
    return join_episodes(saved.load(), saved.described)


def play_batch(
    context: EvalContext, plan: PlanOptions, options: CollectOptions, numbers: Sequence[int]
) -> dict[int, Rows]:
    """Play the episodes of these numbers, all at once; only frames that the policy sees are drawn."""
    env, policy = context.open_env(len(numbers)), make_policy(context, plan)
    begun = [task_of_episode(env, options.seed, number) for number in numbers]
    tasks, rngs = [task for task, _ in begun], [rng for _, rng in begun]
    legs = _draw_legs(context, plan, env, tasks, rngs, options.length)
    # Before the episodes start, because an environment shows a goal by a reset.
    goals = [shown_goals(policy, env, leg.tasks) for leg in legs]
    first = env.reset(tasks).columns
    parts = list(_moves(context, plan, policy, env, list(zip(legs, goals, strict=True))))
    env.close()
    actions = np.concatenate([part.actions for part in parts], 1).astype(np.float32)
    columns = [moved for part in parts for moved in part.columns]
    # The last action of an episode is recorded and leads nowhere.
    moved = {name: np.concatenate([part[name] for part in columns], 1)[:, :-1] for name in columns[0]}
    return {
        number: join_rows(
            env.spec.columns,
            actions[row],
            {name: values[row : row + 1] for name, values in first.items()},
            {name: values[row : row + 1] for name, values in moved.items()} if options.length > 1 else {},
        )
        for row, number in enumerate(numbers)
    }


@dataclass(frozen=True)
class Leg:
    """A part of E episodes with one goal each, or without.

    Attributes:
        tasks: for their goals.
        generators: of the policy.
    """

    tasks: list[Task]
    generators: list[torch.Generator]
    env_steps: int


def leg_lengths(plan: PlanOptions, length: int) -> list[int]:
    """Return the env steps of each goal of an episode of `length` frames, one env step for each."""
    every = plan.goal_steps or length
    return [min(every, length - first) for first in range(0, length, every)]


def _draw_legs(
    context: EvalContext,
    plan: PlanOptions,
    env: Environment,
    starts: Sequence[Task],
    rngs: Sequence[np.random.Generator],
    length: int,
) -> list[Leg]:
    """Draw goals and the policy's generators, those of an episode from its own generator."""
    legs, tasks = [], list(starts)
    for env_steps in leg_lengths(plan, length):
        if not context.by_return:
            tasks = [_draw_goal(context, plan, env, task, rng) for task, rng in zip(tasks, rngs, strict=True)]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**63))) for rng in rngs]
        legs.append(Leg(tasks, generators, env_steps))
    return legs


def _draw_goal(
    context: EvalContext, plan: PlanOptions, env: Environment, before: Task, rng: np.random.Generator
) -> Task:
    """Draw a goal apart from the goal before, or from the start."""
    start = np.asarray(before.start if before.goal is None else before.goal, np.float64)
    apart = Separation.of(plan, env, context.frameskip, env.spec.thresholds)
    states = cached_states(env.spec, context.store) if plan.goals == "dataset" else None
    for _ in range(MOST_DRAWS):
        goal = env.sample_goal(rng, start) if states is None else states[rng.integers(len(states))]
        if apart.allows(env, start, np.asarray(goal, np.float64)):
            break
    goal = same_view(env.spec, np.asarray(goal, np.float64), start)
    if not np.isfinite(env.distance(start, goal)):
        raise UserError(
            f"--goals {plan.goals}: none of {MOST_DRAWS} frames is of the same world; use --goals random-state"
        )
    return Task(start, goal)


def _moves(
    context: EvalContext,
    plan: PlanOptions,
    policy: Policy,
    env: Environment,
    legs: Sequence[tuple[Leg, Observation]],
) -> Iterator[Moved]:
    """Act towards one goal after another, until a model step after all episodes have ended."""
    low, high = context.action_bounds
    earlier, ended = None, False

    def as_recorded(actions: NDArray[np.floating]) -> NDArray[np.floating]:
        return actions.astype(np.float32).clip(low, high)

    for leg, goal in legs:
        policy.reset(goal, leg.generators)
        policy.observe(shown(policy, env, env.observe(), earlier))
        for part in act(context, plan, policy, env, leg.env_steps, as_recorded):
            yield part
            if ended:
                return
            ended = all_ended(env, part.columns[-1])
            earlier = part.earlier
