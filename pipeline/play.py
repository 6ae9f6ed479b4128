"""Episodes of an environment: played to make a step table, and replayed to draw it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cluster.tasks import open_pool, parse_cluster
from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import POLICIES, Environment, Observation, Task, open_environment
from wmcache.pipeline.played import PlayedEpisodes, Rows, join_episodes
from wmcache.pipeline.steps import Steps

ENDS = ("terminated", "truncated")
PATIENCE = 10.0
"""Seconds for which this process plays episodes alone, before workers help."""
SAVE_EVERY = 60.0
"""Seconds of playing that a killed collection loses at most."""
TOLERANCE = 1e-6
"""Largest difference of a replayed value, relative to the value, or to 1 where it is smaller."""

_thread = threading.local()


def task_of_episode(env: Environment, seed: int, episode: int) -> tuple[Task, np.random.Generator]:
    """Return the task of an episode of a dataset with this seed, and the generator for all that follows."""
    rng = np.random.default_rng((seed, episode))
    return env.sample_task(rng, goal=False), rng


def begin_episode(env: Environment, seed: int, episode: int) -> tuple[Observation, np.random.Generator]:
    """Start an episode of a dataset with this seed; returns the first frame, and the generator that the policy draws from."""
    task, rng = task_of_episode(env, seed, episode)
    return env.reset([task]), rng


@dataclass(frozen=True)
class Player:
    """Plays episodes; episode e is a function of `seed` and e.

    Attributes:
        layout: see `EnvSpec`.
        policy: behaviour policy.
        length: most frames of an episode.
    """

    env: str
    layout: tuple[str, ...]
    image_size: int
    seed: int
    policy: str
    length: int

    def open(self) -> Environment:
        """Return the environment of this thread: a GL context takes 0.1 s to open, and is used and freed in one thread only."""
        key = (self.env, self.layout, self.image_size)
        if getattr(_thread, "key", None) != key:
            if hasattr(_thread, "environment"):
                _thread.environment.close()
            _thread.environment = open_environment(self.env, 1, self.image_size, self.layout)
            _thread.key = key
        environment: Environment = _thread.environment
        return environment

    def play(self, episodes: Sequence[int]) -> list[Rows]:
        """Play episodes without drawing."""
        return [self._play(self.open(), episode) for episode in episodes]

    def _play(self, env: Environment, episode: int) -> Rows:
        begun, rng = begin_episode(env, self.seed, episode)
        first = begun.columns
        if self.policy in env.policies:
            actions, moved = self._react(env, rng, first)
        else:
            actions = self._planned_actions(env, rng)
            moved = env.step(actions[None, :-1]) if self.length > 1 else {}
        return join_rows(env.spec.columns, actions, first, moved)

    def _planned_actions(self, env: Environment, rng: np.random.Generator) -> NDArray[np.float32]:
        space = env.spec.action
        actions = np.asarray(POLICIES.get(self.policy)(rng, self.length, space), np.float32)
        if actions.shape != (self.length, space.width) or not np.isfinite(actions).all():
            wanted = f"({self.length}, {space.width}) finite numbers"
            raise UserError(f"policy {self.policy} returned actions {actions.shape} for {self.env}, not {wanted}")
        return actions

    def _react(self, env: Environment, rng: np.random.Generator, first: Rows) -> tuple[NDArray[np.float32], Rows]:
        act = env.policies[self.policy](rng, env)
        seen = {name: values[0] for name, values in first.items()}
        actions, moved = [act(seen)], []
        while len(actions) < self.length:
            moved.append(env.step(actions[-1][None, None]))
            seen = {name: moved[-1][name][0, 0] for name in first}
            actions.append(act(seen))
            if any(moved[-1][name].any() for name in ENDS if name in moved[-1]):
                break
        joined = {name: np.concatenate([part[name] for part in moved], 1) for name in (moved[0] if moved else ())}
        return np.stack(actions), joined

    def replay(self, episode: int, recorded: Rows, frames: int) -> Iterator[tuple[Observation, float]]:
        """Execute the recorded actions of an episode again, and compare it with the table.

        Args:
            recorded: the table's columns of the episode.
            frames: how many to replay.

        Yields:
            The observation of each frame, whose image is to be read before the next, and the largest relative difference so far.

        Raises:
            UserError: the episode differs from the table; names the first step.
        """
        env = self.open()
        seen, _ = begin_episode(env, self.seed, episode)
        drift = 0.0
        for t in range(frames):
            found = {name: values[0] for name, values in seen.columns.items()}
            drift = max(drift, *(self._difference(name, found, recorded, episode, t) for name in found), 0.0)
            yield seen, drift
            if t + 1 < frames:
                moved = env.step(recorded["action"][None, t : t + 1])
                seen = env.observe()
                after = {name: values[0, 0] for name, values in moved.items() if name not in found}
                drift = max(drift, *(self._difference(name, after, recorded, episode, t) for name in after), 0.0)

    def _difference(self, name: str, found: Rows, recorded: Rows, episode: int, step: int) -> float:
        one, two = (np.asarray(values, np.float64) for values in (found[name], recorded[name][step]))
        difference = float((np.abs(one - two) / np.maximum(1.0, np.abs(two))).max())
        if difference > TOLERANCE:
            raise UserError(
                f"environment {self.env} does not replay: {name} of episode {episode} differs at step {step} by {difference:.2g}; "
                "take all of its random numbers from the seed of reset"
            )
        return difference


def play_all(player: Player, episodes: int, cluster: str = "local:1", saved: PlayedEpisodes | None = None) -> Steps:
    """Play all episodes of a dataset but those that are saved; after `PATIENCE` the cluster's workers play the others."""
    played = saved.load() if saved else {}
    missing = [episode for episode in range(episodes) if episode not in played]
    fresh: dict[int, Rows] = {}
    last = monotonic()
    with tqdm(
        total=episodes,
        initial=len(played),
        desc="play",
        unit=" episodes",
        mininterval=seconds_between_updates(),
        delay=5,
    ) as bar:
        for episode, rows in _play(player, missing, cluster):
            fresh[episode] = rows
            bar.update()
            if saved and monotonic() - last > SAVE_EVERY:
                saved.save(fresh)
                played, fresh, last = played | fresh, {}, monotonic()
    if saved and played and fresh:
        saved.save(fresh)
    return join_episodes(played | fresh, player.open().spec.columns)


def _play(player: Player, episodes: Sequence[int], cluster: str) -> Iterator[tuple[int, Rows]]:
    """Yield episodes as they are finished: this process plays alone at first, then workers."""
    where, begun = parse_cluster(cluster), monotonic()
    alone, waiting = not where.elsewhere and where.workers == 1, deque(episodes)
    while waiting and (alone or monotonic() - begun < PATIENCE):
        episode = waiting.popleft()
        yield episode, player.play([episode])[0]
    yield from _play_on_workers(player, tuple(waiting), cluster)


def _play_on_workers(player: Player, episodes: Sequence[int], cluster: str) -> Iterator[tuple[int, Rows]]:
    """Play episodes in tasks of a few; yields them as they finish."""
    if not episodes:
        return
    size = max(1, min(16, len(episodes) // (4 * max(1, parse_cluster(cluster).workers))))
    parts = [episodes[first : first + size] for first in range(0, len(episodes), size)]
    with open_pool(cluster, most=len(parts), label="collect") as pool:
        waiting = iter(parts)
        while True:
            pool.submit((part, partial(player.play, part)) for part in islice(waiting, pool.room))
            if not pool.running:
                return
            for part, played in pool.finished():
                if isinstance(played, UserError):
                    raise played
                yield from zip(part, played, strict=True)


def join_rows(described: dict[str, Column], actions: NDArray[np.float32], first: Rows, moved: Rows) -> Rows:
    """Join the first frame and those after each env step, up to the end of the episode.

    Rewards and ends belong to the frame that an env step starts at, so the last frame has none.

    Args:
        actions: [frames, A]; the last one is not executed.
        first: columns of the first frame, [1, ...].
        moved: columns after each env step, [1, frames - 1, ...]; {} for an episode of one frame.
    """
    rows = {"action": actions}
    for name, column in described.items():
        if name in first:
            rows[name] = np.concatenate([first[name], *([moved[name][0]] if moved else [])])
        elif name != "action":
            last = np.zeros((1, *column.shape), column.dtype)
            rows[name] = np.concatenate([*([moved[name][0]] if moved else []), last])
    ended = np.zeros(len(actions), bool)
    for name in ENDS:
        ended |= rows.get(name, False)
    frames = int(ended.argmax()) + 2 if ended.any() else len(ended)
    rows = {name: values[:frames].copy() for name, values in rows.items()}
    for name in set(rows) - set(first) - {"action"}:
        rows[name][-1] = 0
    return rows
