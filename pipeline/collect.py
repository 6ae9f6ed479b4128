"""Environment -> frame dataset: simulate all episodes, then draw each row of the step table in independent tasks, one per tar shard."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wmcache.cluster.tasks import WorkerTask, run_tasks
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.common.space import require_space
from wmcache.envs import FPS, POLICIES, Maze, PointMazeSimulator, Policy, find_maze, sample_state
from wmcache.pipeline.frames import DatasetCard, FrameDatasetWriter, write_shard
from wmcache.pipeline.options import CollectOptions
from wmcache.pipeline.steps import Steps, read_steps


def collect(env: str, out: AnyPath, *, cluster: str = "local:1", **settings: Any) -> DatasetCard:
    """Collect a dataset of `CollectOptions(env, **settings)`; run again, it draws only missing shards."""
    options = CollectOptions(env, **settings)
    policy, maze, frames = POLICIES.get(options.policy), find_maze(env), options.episodes * options.length
    # A frame of a maze is about 2 kB at 112 px as PNG; twice the pixels, twice the edges.
    require_space(out, 30 * options.image_size * frames, f"a dataset of {frames} frames")
    PointMazeSimulator(maze, options.image_size).render(np.zeros(4))  # fails before anything is written, without OpenGL
    steps = simulate(maze, policy, options.episodes, options.length, options.seed)
    shared = {name: value for name, value in asdict(options).items() if name != "length"}
    card = DatasetCard(name=out.name, maze=list(maze.rows), frames=frames, fps=FPS, **shared)
    writer = FrameDatasetWriter(out, card, steps)
    pending = writer.pending()
    total = sum(len(card.shard_frames(shard)) for shard in pending)
    task = DrawShard(absolute(out), steps.sha256(), maze, card)
    run_tasks(task, pending, cluster=cluster, total=total, label="collect")
    return writer.finish()


def simulate(maze: Maze, policy: Policy, episodes: int, length: int, seed: int) -> Steps:
    """Simulate a dataset's step table without drawing; episode e is a function of (seed, e)."""
    simulator = PointMazeSimulator(maze)
    action = np.empty((episodes, length, 2), np.float32)
    state = np.empty((episodes, length, 4))
    for episode in range(episodes):
        rng = np.random.default_rng((seed, episode))
        state[episode, 0] = sample_state(maze, rng)
        action[episode] = policy(rng, length)
        for t in range(length - 1):
            state[episode, t + 1] = simulator.step(state[episode, t], action[episode, t])
    return Steps.plain(
        np.repeat(np.arange(episodes, dtype=np.int32), length),
        np.tile(np.arange(length, dtype=np.int32), episodes),
        action.reshape(-1, 2),
        state.reshape(-1, 4),
    )


@dataclass(frozen=True)
class DrawShard(WorkerTask[int, Steps]):
    """Draw the frames of a shard. A worker reads the step table at `out`, whose checksum is `steps_sha256`, once."""

    out: str
    steps_sha256: str
    maze: Maze
    card: DatasetCard

    def setup(self) -> Steps:
        """Read the step table."""
        return read_steps(as_path(self.out))

    def run(self, state: Steps, item: int) -> int:
        """Draw a shard; returns its frames."""
        frames = self.card.shard_frames(item)
        render = _simulator_of_thread(self.maze, self.card.image_size).render
        write_shard(
            as_path(self.out), item, ((state.key(frame), render(state.columns["state"][frame])) for frame in frames)
        )
        return len(frames)


_thread = threading.local()


def _simulator_of_thread(maze: Maze, image_size: int) -> PointMazeSimulator:
    """Return the simulator of this thread: an OpenGL context takes 0.1 s to open, and is used and freed in one thread only."""
    simulator: PointMazeSimulator | None = getattr(_thread, "simulator", None)
    if simulator is None or (simulator.maze, simulator.image_size) != (maze, image_size):
        _thread.simulator = simulator = PointMazeSimulator(maze, image_size)
    return simulator
