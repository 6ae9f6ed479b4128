"""Live episodes: what a policy sees of them, and how its actions are executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmcache.cluster.tasks import report
from wmcache.common.columns import of_role
from wmcache.envs import Environment, Steps, Task
from wmcache.envs import Observation as Seen
from wmcache.planner.base import Observation, Policy
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.world import states_of


def shown_goals(policy: Policy, env: Environment, tasks: Sequence[Task]) -> Observation:
    """Show the goals; without one, no pixels."""
    if tasks[0].goal is None:
        return Observation(np.zeros((len(tasks), 0, 0, 3), np.uint8), np.zeros((len(tasks), 0), np.float32))
    return shown(policy, env, env.reset([Task(task.goal) for task in tasks if task.goal is not None]))


def shown(policy: Policy, env: Environment, seen: Seen, earlier: NDArray[np.uint8] | None = None) -> Observation:
    """Keep what the policy reads; a frame that it does not read is not drawn."""
    count = env.count
    image = seen.image if policy.reads == "frames" else np.zeros((count, 1, 1, 3), np.uint8)
    proprio = np.zeros((count, 0), np.float32) if seen.proprio is None else seen.proprio
    state = states_of(env.spec, seen.columns, (count,)) if policy.reads == "state" else None
    return Observation(image, proprio, earlier, state)


def advance(env: Environment, actions: NDArray[np.floating], lag: int) -> tuple[list[Steps], NDArray[np.uint8] | None]:
    """Execute actions [E, k, A]; returns the columns in parts [E, k', ...], and the frame `lag` env steps before the end."""
    if not lag:
        return [env.step(actions)], None
    before = actions.shape[1] - min(lag, actions.shape[1])
    parts = [env.step(actions[:, :before])] if before else []
    earlier = env.observe().image
    return [*parts, env.step(actions[:, before:])], earlier


def all_ended(env: Environment, steps: Steps) -> bool:
    """Return whether all episodes have ended with these env steps."""
    ends = [*of_role(env.spec.columns, "terminated"), *of_role(env.spec.columns, "truncated")]
    last = [steps[name].reshape(env.count, -1)[:, -1] for name in ends]
    return bool(last) and bool(np.logical_or.reduce(last).all())


@dataclass(frozen=True)
class Moved:
    """What a model step did in E episodes.

    Attributes:
        actions: [E, k, A], in env units.
        columns: after each env step, [E, k', ...] in parts.
        earlier: the frame the encoder's lag before the end, see `Observation`.
    """

    actions: NDArray[np.floating]
    columns: list[Steps]
    earlier: NDArray[np.uint8] | None


def act(
    context: EvalContext,
    options: PlanOptions,
    policy: Policy,
    env: Environment,
    env_steps: int,
    adjust: Callable[[NDArray[np.floating]], NDArray[np.floating]] | None = None,
) -> Iterator[Moved]:
    """Let a policy act that has observed the current frame; yields each model step, the last one cut off at `env_steps`.

    Args:
        adjust: changes actions [E, k, A] in env units before they are executed.
    """
    frameskip, lag = context.frameskip, context.encoder.lag if policy.reads == "frames" else 0
    done, chunk = 0, options.execute * frameskip
    while done < env_steps:
        actions = policy.act()
        decides_again = done + chunk < env_steps
        for step, action in enumerate(actions.unbind(1)):
            raw = action.reshape(env.count, frameskip, -1).cpu().numpy()[:, : env_steps - done]
            raw = raw if adjust is None else adjust(raw)
            moved, earlier = advance(env, raw, lag)
            yield Moved(raw, moved, earlier)
            done += raw.shape[1]
            if done >= env_steps:
                break
            # Of the frames within a chunk only those are encoded that the next decision starts from.
            if decides_again and options.execute - step <= context.observed:
                policy.observe(shown(policy, env, env.observe(), earlier))
        report(env.count)
