"""Environment -> frame dataset.

The physics of all episodes runs first, in a few seconds, and gives the step table. A frame is then a picture of a row of that
table: the tasks, one a tar shard, share nothing, and their number and order cannot change a byte.
"""

from __future__ import annotations

import functools
import threading

import numpy as np

from wmcache.cluster.tasks import run_tasks
from wmcache.common.files import require_space
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.envs import FPS, POLICIES, Maze, PointMazeSimulator, Policy, find_maze, sample_state
from wmcache.pipeline.frames import DatasetCard, FrameDatasetWriter, Steps, read_steps, shard_range, write_shard


def collect(
    env: str,
    out: AnyPath,
    *,
    episodes: int = 2000,
    length: int = 100,
    policy: str = "random",
    seed: int = 0,
    image_size: int = 224,
    frames_per_shard: int,
    cluster: str = "local:1",
) -> DatasetCard:
    """Collect a dataset; run again, it goes on where it was stopped.

    Args:
        env: environment id, layout name or path to a text grid.
        out: the dataset's folder.
        episodes, length: number of episodes, and frames in each (DINO-WM's PointMaze set: 2 000 x 100).
        policy: a name in `envs.POLICIES`.
        seed: of the dataset. Episode e depends on (seed, e) alone.
        image_size: side of the frames in pixels.
        frames_per_shard: frames in each tar, and in each Zarr shard of the stores made from it.
        cluster: where, see `cluster.parse_cluster`.

    Raises:
        UserError: unknown policy, unusable folder, too little space, or shards that failed.
        MazeError: unknown maze.
        RendererError: no OpenGL.
    """
    behaviour, maze = POLICIES.get(policy), find_maze(env)
    # A frame of a maze is about 2 kB at 112 px as PNG; twice the pixels, twice the edges.
    require_space(out, 30 * image_size * episodes * length, f"a dataset of {episodes * length} frames")
    PointMazeSimulator(maze, image_size).render(
        np.zeros(4)
    )  # fails here, before anything is written, where there is no OpenGL
    steps = simulate(maze, behaviour, episodes, length, seed)
    card = DatasetCard(
        name=out.name,
        env=env,
        maze=list(maze.rows),
        image_size=image_size,
        policy=policy,
        seed=seed,
        episodes=episodes,
        frames=len(steps),
        frames_per_shard=frames_per_shard,
        fps=FPS,
    )
    writer = FrameDatasetWriter(out, card, steps)
    pending = writer.pending()
    # Workers have working directories of their own, and may live longer than one collection.
    task = functools.partial(_draw_shard, absolute(out), steps.sha256(), maze, image_size, frames_per_shard)
    total = sum(len(writer.shard_frames(shard)) for shard in pending)
    run_tasks(task, pending, cluster=cluster, total=total, label="collect")
    return writer.finish()


def simulate(maze: Maze, policy: Policy, episodes: int, length: int, seed: int) -> Steps:
    """The step table of a dataset, without drawing anything; episode e is a function of (seed, e)."""
    simulator = PointMazeSimulator(maze)
    action = np.empty((episodes, length, 2), np.float32)
    state = np.empty((episodes, length, 4))
    for episode in range(episodes):
        rng = np.random.default_rng((seed, episode))
        state[episode, 0] = sample_state(maze, rng)
        action[episode] = policy(rng, length)
        for t in range(length - 1):
            state[episode, t + 1] = simulator.step(state[episode, t], action[episode, t])
    return Steps(
        np.repeat(np.arange(episodes, dtype=np.int32), length),
        np.tile(np.arange(length, dtype=np.int32), episodes),
        action.reshape(-1, 2),
        state.reshape(-1, 4),
    )


def _draw_shard(out: str, table: str, maze: Maze, image_size: int, frames_per_shard: int, shard: int) -> int:
    simulator, steps = _simulator(maze, image_size), _steps(out, table)
    frames = shard_range(shard, len(steps), frames_per_shard)
    write_shard(as_path(out), shard, ((steps.key(frame), simulator.render(steps.state[frame])) for frame in frames))
    return len(frames)


class _Drawing(threading.local):
    """One GL context a thread, for it is bound to that, whatever the number of shards it draws."""

    known: tuple[Maze, int] | None = None
    simulator: PointMazeSimulator


_drawing = _Drawing()


def _simulator(maze: Maze, image_size: int) -> PointMazeSimulator:
    if _drawing.known != (maze, image_size):
        _drawing.simulator = PointMazeSimulator(maze, image_size)
        _drawing.known = maze, image_size
    return _drawing.simulator


@functools.lru_cache(maxsize=1)
def _steps(out: str, table: str) -> Steps:  # noqa: ARG001 (a part of the cache's key)
    # Read from disk once a process: cheaper than sending the table along with every task.
    return read_steps(as_path(out))
