"""Videos of a plan's episodes: the live frame, beside the goal's where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wmcache.common.files import make_folder
from wmcache.common.video import write_mp4
from wmcache.envs import Environment, Task
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.evaluate import tasks_of
from wmcache.planner.judge import env_steps, shortest_path_lengths
from wmcache.planner.options import PlanOptions

VIDEOS = 4
SIDE = 224

Frames = list[NDArray[np.uint8]]


def write_videos(
    folder: Path, episodes: Episodes, context: EvalContext, options: PlanOptions, count: int = VIDEOS
) -> list[tuple[str, Path]]:
    """Write `count` videos of the episodes with the longest ways to the goal, or the highest returns; returns captions and files."""
    make_folder(folder)
    success = context.success
    if success.by_return:
        measure = episodes.rewards.sum(1)
    elif success.geometry:
        measure = shortest_path_lengths(episodes, success.geometry)
    else:
        measure = episodes.distance(episodes.start, episodes.goal)
    written = []
    for i in np.argsort(-np.where(np.isfinite(measure), measure, -1.0), kind="stable")[:count].tolist():
        number = options.seed + i
        path = folder / f"episode-{number:03d}.mp4"
        write_mp4(path, _frames(episodes, context, options, i), max(1, round(context.env.spec.fps)))
        found = f"return {measure[i]:.1f}"
        if not success.by_return:
            found = f"{measure[i]:.1f} from the goal: {_outcome(episodes, options, i)}"
        written.append((f"episode {number}{':' if success.by_return else ','} {found}", path))
    return written


def _outcome(episodes: Episodes, options: PlanOptions, i: int) -> str:
    threshold = options.threshold
    assert threshold is not None
    arrived = bool((episodes.distances()[i] < threshold).any())
    return f"within {threshold} after {int(env_steps(episodes, threshold)[i])} env steps" if arrived else "not reached"


def _frames(episodes: Episodes, context: EvalContext, options: PlanOptions, i: int) -> Frames:
    """Draw an episode from its recorded states, or by replaying its actions."""
    success, goal = context.success, None
    if not success.by_return and not success.named:
        goal, *frames = context.draw(
            np.concatenate([episodes.goal[i : i + 1], episodes.start[i : i + 1], episodes.states[i]]), SIDE
        )
    else:
        env = context.open_env(image_size=SIDE)
        (task,) = tasks_of(context, options, [options.seed + i])
        if task.goal is not None:
            goal = env.reset([Task(task.goal)]).image[0]
        frames = _replay(env, task, episodes.actions[i])
        env.close()
    if goal is None:
        return frames
    gap = np.full((SIDE, 16, 3), 255, np.uint8)
    return [np.concatenate([frame, gap, goal], axis=1) for frame in frames]


def _replay(env: Environment, task: Task, actions: NDArray[np.float32]) -> Frames:
    frames = [env.reset([task]).image[0]]
    for action in actions:
        env.step(action[None, None])
        frames.append(env.observe().image[0])
    return frames
