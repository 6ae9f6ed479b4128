"""The environment of a store's frames: opened from the store's card, and what evaluations read of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wmcache.cache.joined import JoinedStore
from wmcache.cache.layout import StoreCard
from wmcache.cache.store import TokenStore
from wmcache.common.columns import of_role
from wmcache.common.errors import UserError
from wmcache.envs import VIEW, Environment, EnvSpec, Replay, Steps, Task, find_environment, open_environment
from wmcache.pipeline.play import task_of_episode

States = NDArray[np.float64]


def open_world(
    card: StoreCard, name: str | None = None, *, count: int = 1, image_size: int | None = None
) -> Environment:
    """Open the environment of a store's frames, or `name` in its place.

    Args:
        image_size: side of the frames in pixels; None takes the store's.

    Raises:
        UserError: the frames are imported from elsewhere, or the environment cannot be opened.
    """
    recorded, layout = str(card.dataset.get("env")), card.layout
    size = image_size or int(card.dataset["image_size"])
    try:
        find_environment(recorded, layout)
    except UserError as error:
        raise UserError(
            f"the frames of {recorded!r} have no environment to plan in; plan as in docs/import.md"
        ) from error
    return open_environment(name, count, size) if name else open_environment(recorded, count, size, layout)


def world_name(env: Environment) -> str:
    """Return the name of an environment in results."""
    if env.geometry is None:
        return env.spec.id
    return f"{env.geometry.name}+{env.spec.distraction}" if env.spec.distraction else env.geometry.name


def states_of(spec: EnvSpec, columns: Steps, leading: tuple[int, ...], names: Sequence[str] | None = None) -> States:
    """Join the columns of role `state`, or these, [*leading, S] float64; S is 0 in an environment that shows none."""
    parts = []
    for name in of_role(spec.columns, "state") if names is None else names:
        values = np.asarray(columns[name], np.float64)
        parts.append(values.reshape(*values.shape[: values.ndim - len(spec.columns[name].shape)], -1))
    return np.concatenate([np.zeros((*leading, 0)), *parts], -1)


def state_size(spec: EnvSpec) -> int:
    """Count the numbers of a state."""
    return sum(spec.columns[name].width for name in of_role(spec.columns, "state"))


def draw_states(
    card: StoreCard, states: Sequence[States] | States, *, name: str | None = None, image_size: int | None = None
) -> NDArray[np.uint8]:
    """Render frames [n, S, S, 3] of states [n, S]; arguments as for `open_world`."""
    env = open_world(card, name, image_size=image_size)
    frames = env.render(np.stack(list(states)))
    env.close()
    return frames


def cached_states(spec: EnvSpec, store: TokenStore, frames: slice | NDArray[np.int64] = slice(None)) -> States:
    """Return the states of cached frames, [n, S] float64, as an environment has them, which may be distracted otherwise.

    Raises:
        UserError: the store has no state, or not this environment's.
    """
    store.require_state()
    names = of_role(spec.columns, "state")
    columns = {name: store.column(name)[frames] for name in names if name in store.columns}
    if VIEW in names:  # of a plain store: an episode's number is as good as any
        columns.setdefault(VIEW, np.stack([store.episode[frames], store.step[frames]], 1))
    if missing := [name for name in names if name not in columns]:
        raise UserError(
            f"{store.path} has no column {missing[0]}, a state of environment {spec.id}; choose another --env"
        )
    return states_of(spec, columns, (len(columns[names[0]]),))


def same_view(spec: EnvSpec, goal: States, start: States) -> States:
    """Return a goal [S] that looks as the start does, where the environment is distracted."""
    first, goal = 0, goal.copy()
    for name in of_role(spec.columns, "state"):
        end = first + spec.columns[name].width
        if name == VIEW:
            goal[first:end] = start[first:end]
        first = end
    return goal


def start_at(env: Environment, store: TokenStore, frame: int) -> States | Replay:
    """Return where an episode starts that goes on from a cached frame.

    Raises:
        UserError: the store has no state, or was extracted before the seed of its episodes was recorded.
    """
    if isinstance(store, JoinedStore):
        ((part, numbers, _),) = store.by_part(np.array([frame]))
        return start_at(env, part, int(numbers[0]))
    if env.spec.renders_states:
        state: States = cached_states(env.spec, store, np.array([frame]))[0]
        return state
    if (seed := store.card.dataset.get("seed")) is None:
        raise UserError(f"{store.path} does not record the seed of its episodes; extract it again")
    task, _ = task_of_episode(env, int(seed), int(store.episode[frame]))
    assert not isinstance(task.start, Replay)
    return Replay(task.start, store.action[frame - int(store.step[frame]) : frame])


def draw_again(store: TokenStore, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Draw cached frames as live ones are, [n, S, S, 3]: from their states, or by replaying their episodes up to them.

    Raises:
        UserError: see `start_at`.
    """
    if isinstance(store, JoinedStore):
        size = int(store.card.dataset["image_size"])
        drawn = np.empty((len(frames), size, size, 3), np.uint8)
        for part, numbers, places in store.by_part(frames):
            drawn[places] = draw_again(part, numbers)
        return drawn
    env = open_world(store.card)
    if env.spec.renders_states:
        images = env.render(cached_states(env.spec, store, frames))
    else:
        images = np.stack([env.reset([Task(start_at(env, store, frame))]).image[0] for frame in frames.tolist()])
    env.close()
    return images
