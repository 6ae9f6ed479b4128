"""Returns of candidates, in the dream and in the real environment. A goal's is minus the distance of latents to it, summed over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cluster.tasks import Pool, WorkerTask, run_tasks
from wmcache.common.columns import of_role
from wmcache.common.files import atomic_write, make_folder
from wmcache.envs import Environment, Steps, Task
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.folder import linear_of
from wmcache.planner.controllers.linear import Linear, LinearPolicy
from wmcache.planner.controllers.options import Choice
from wmcache.planner.dream import Dream
from wmcache.planner.evaluate import tasks_of
from wmcache.planner.live import advance, all_ended, shown, shown_goals
from wmcache.planner.options import PlanOptions
from wmcache.trainer.dreaming import goal_distance
from wmcache.trainer.models import Imagined

Array = NDArray[np.float64]

DREAMED = 2048
"""Most episodes that are imagined at once."""
LIVE = 16
"""Most real episodes of a task."""


@dataclass(frozen=True)
class DreamRollouts:
    """Rolls candidates out in a dream."""

    dream: Dream
    linear: Linear
    steps: int
    goals: bool

    def returns(self, candidates: Array, numbers: Sequence[int]) -> Array:
        """Return the sums of rewards of episodes, which are the same for all candidates, [candidates, episodes]."""
        together = max(1, DREAMED // len(numbers))
        parts = [candidates[first : first + together] for first in range(0, len(candidates), together)]
        return np.concatenate([self._returns(part, numbers) for part in parts])

    def _returns(self, candidates: Array, numbers: Sequence[int]) -> Array:
        solutions = torch.from_numpy(candidates)
        features = self.dream.reset(list(numbers) * len(candidates), goals=self.goals)
        total = torch.zeros(len(candidates) * len(numbers), dtype=torch.float64)
        for _ in range(self.steps):
            features, reward, ended = self.dream.step(self.linear(solutions, features))
            total += reward.cpu()
            if ended.all():
                break
        return total.view(len(candidates), -1).numpy()


@dataclass(frozen=True)
class Live:
    """A loaded run, and its environments by their number of episodes."""

    context: EvalContext
    linear: Linear
    envs: dict[int, Environment] = field(default_factory=dict)

    def env(self, count: int) -> Environment:
        """Return an environment of so many episodes, which stays open."""
        if count not in self.envs:
            self.envs[count] = self.context.open_env(count)
        return self.envs[count]

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs.values():
            env.close()
        self.envs.clear()


class Batch(NamedTuple):
    """Candidates [C, parameters] and the real episodes to roll each of them out in."""

    name: str
    candidates: Array
    tasks: list[Task]


@dataclass(frozen=True)
class LiveBatch(WorkerTask[Batch, Live]):
    """Rolls candidates out in the real environment on any worker, and saves their returns; paths are absolute.

    Attributes:
        inputs, choose: see `Linear`. steps: most model steps of an episode.
        model_sha256: of the run's weights, which may change under the same path.
    """

    run_path: Path
    options: PlanOptions
    weights: Path | None
    inputs: tuple[str, ...]
    choose: Choice | None
    steps: int
    folder: Path
    model_sha256: str

    def setup(self) -> Live:
        """Load the run."""
        context = EvalContext(self.run_path, self.options, weights=self.weights)
        return Live(context, linear_of(context, self.inputs, self.choose))

    def run(self, state: Live, item: Batch) -> int:
        """Roll out; returns the number of episodes."""
        found = live_returns(state, item, self.steps)
        with atomic_write(self.folder / f"{item.name}.npy") as file:
            np.save(file, found, allow_pickle=False)
        return found.size


@dataclass(frozen=True)
class LiveRollouts:
    """Rolls candidates out in the real environment.

    Attributes:
        task: what workers do. live: its state in this process.
        pool: where the tasks run.
    """

    task: LiveBatch
    live: Live
    pool: Pool

    def returns(self, candidates: Array, numbers: Sequence[int], label: str) -> Array:
        """Return the sums of rewards of episodes, which are the same for all candidates, [candidates, episodes].

        Files of finished tasks named by `label` are kept in the task's folder, so that a stopped call goes on.
        """
        context = self.live.context
        tasks = list(tasks_of(context, context.settled(self.task.options), numbers))
        episodes = [slice(first, min(first + LIVE, len(numbers))) for first in range(0, len(numbers), LIVE)]
        most = max(1, LIVE // len(numbers))
        together = max(size for size in range(1, most + 1) if len(candidates) % size == 0)
        groups = [slice(first, first + together) for first in range(0, len(candidates), together)]
        batches = [
            Batch(f"{label}-{group.start:05d}-{part.start:05d}-{part.stop:05d}", candidates[group], tasks[part])
            for group in groups
            for part in episodes
        ]
        make_folder(self.task.folder)
        run_tasks(
            self.task.with_state(self.live),
            [batch for batch in batches if not self._file(batch).exists()],
            cluster=self.pool,
            total=len(candidates) * len(numbers),
            label=label,
            unit="episodes",
            what="batches",
            leave=False,
        )
        found = [np.load(self._file(batch), allow_pickle=False) for batch in batches]
        rows = [np.concatenate(found[row : row + len(episodes)], 1) for row in range(0, len(found), len(episodes))]
        return np.concatenate(rows)

    def _file(self, batch: Batch) -> Path:
        return self.task.folder / f"{batch.name}.npy"


def live_returns(live: Live, batch: Batch, steps: int) -> Array:
    """Roll candidates out in the real environment for at most `steps` model steps; returns the sums of rewards, [C, R]."""
    context, count = live.context, len(batch.candidates) * len(batch.tasks)
    env, policy = live.env(count), LinearPolicy(context, live.linear, torch.from_numpy(batch.candidates))
    tasks = batch.tasks * len(batch.candidates)
    policy.reset(shown_goals(policy, env, tasks), [torch.Generator()] * count)
    policy.observe(shown(policy, env, env.reset(tasks)))
    total = np.zeros(count)
    for _ in range(steps):
        actions = policy.act().view(count, context.frameskip, -1).cpu().numpy()
        moved, earlier = advance(env, actions, context.encoder.lag)
        if context.by_return:
            total += sum(rewards(env, part) for part in moved)
        if context.by_return and all_ended(env, moved[-1]):
            break
        policy.observe(shown(policy, env, env.observe(), earlier))
        if not context.by_return:
            total -= distance_of(policy)
    return total.reshape(len(batch.candidates), -1)


def rewards(env: Environment, steps: Steps) -> Array:
    """Sum the rewards of env steps, [E]."""
    (name,) = of_role(env.spec.columns, "reward")
    found: Array = steps[name].reshape(env.count, -1).sum(1, dtype=np.float64)
    return found


def distance_of(policy: LinearPolicy) -> Array:
    """Compute the distance of the newest live frames to the goal, as the dream does, [E]."""
    model = policy.context.world_model
    seen = Imagined(policy.tokens[:, None, None], model.encode_proprio(policy.proprio[:, None])[:, None])
    distance = goal_distance(model, seen, policy.goal_tokens, policy.goal_feature)
    return distance.double().cpu().numpy()
