"""What a person looks at: results.json, episodes.parquet, pictures, videos and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

from wmcache import __version__
from wmcache.cache.store import TokenStore
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.jsonfiles import write_json
from wmcache.common.paths import cause_outside, unreadable
from wmcache.common.video import write_mp4
from wmcache.envs import FPS, Maze, PointMazeSimulator
from wmcache.planner.episodes import THRESHOLDS, Episodes, env_steps, shortest_ways
from wmcache.planner.evaluate import EvalContext, cached_maze
from wmcache.planner.goals import SOURCES
from wmcache.planner.graph import LatentGraph
from wmcache.planner.localization import draw_localization

VIDEOS = 4
VIDEO_SIZE = 224
MAPPED_FRAMES = 4000
COLOURS = ("#1b6ca8", "#d1672b", "#3a8f4d", "#8a4fa3", "#b03a48")

RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 120,
}


def write_report(
    out: Path, run: Path, setting: EvalContext, episodes: Episodes, results: dict[str, Any], command: str
) -> dict[str, Any]:
    """Write everything that a plan leaves behind.

    Args:
        out: the plan's folder. run: the run's folder, for its training curves.
        setting, episodes, results: what `evaluate` used and gave.
        command: what the user typed, for the page.

    Returns:
        What results.json has: `results`, and when and where they were made.
    """
    results = {**results, "made": describe_making(setting.device)}
    actors = {"planner": results["by_threshold"], **results["baselines"]}
    write_episodes(out / "episodes.parquet", episodes)
    pictures = {
        "success": draw_success(episodes),
        "training": draw_training(run),
        "distance": draw_distance_map(setting.store, setting.graph),
        "paths": draw_paths(episodes, setting.maze, results["threshold"]),
    }
    if hasattr(setting.model, "locate"):
        pictures["localization"] = draw_localization(setting)
    for name, picture in pictures.items():
        with atomic_write(out / "figures" / f"{name}.png") as file:
            file.write(picture)
    videos = write_videos(out / "videos", episodes, setting)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("wmcache.planner").joinpath("report.html.jinja").read_text()
    )
    html = page.render(
        results=results,
        options=results["options"],
        table=[dict(zip(actors, judged, strict=True)) for judged in zip(*actors.values(), strict=True)],
        actors=actors,
        pairs=("strict" if results["options"]["strict"] else "any")
        if results["options"]["goals"] in SOURCES
        else "file",
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        videos=[(caption, base64.b64encode(path.read_bytes()).decode()) for caption, path in videos],
        encoder=setting.encoder.spec.name,
        blind=setting.blind,
        run=run.name,
        command=command,
        identity=json.dumps(setting.store.identity.to_json(), indent=2),
    )
    with atomic_write(out / "report.html") as file:
        file.write(html.encode())
    # Last, so that its presence means that all of the above is there.
    write_json(out / "results.json", results)
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    return results


def describe_making(device: torch.device) -> dict[str, str]:
    """When and where results are made: `date` (UTC), `wmcache` (its version), `machine`."""
    return {
        "wmcache": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(device),
    }


def describe_machine(device: torch.device) -> str:
    """The processor, its cores, the accelerator where one is used, the system, and the versions of Python and torch."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    parts = [f"{names[0] if names else platform.processor() or platform.machine()}, {available_cpus()} CPUs"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, platform.platform(), f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def write_episodes(path: Path, episodes: Episodes) -> None:
    """One row an episode: start, goal, the states after each env step, and env steps to each threshold (-1: never)."""
    count = len(episodes.start)
    columns: dict[str, Any] = {"episode": np.arange(count), "start": list(episodes.start), "goal": list(episodes.goal)}
    for threshold in THRESHOLDS:
        reached = (episodes.distances() < threshold).any(1)
        columns[f"env_steps_{threshold}"] = np.where(reached, env_steps(episodes, threshold), -1)
    columns["states"] = [states.tolist() for states in episodes.states]
    with atomic_write(path) as file:
        pq.write_table(pa.table(columns), file)


def draw_success(episodes: Episodes) -> bytes:
    """Share of episodes that have reached the goal, against env steps, with Wilson's 95 % band, for each threshold."""
    with _figure(4.6, 3.2) as (figure, axes):
        # A little beyond the budget, or who arrives at its very end would not be seen.
        ends = np.concatenate([[0], episodes.chunk_ends(), [1.03 * episodes.states.shape[1]]])
        for threshold, colour in zip(THRESHOLDS, COLOURS, strict=False):
            reached = np.maximum.accumulate(episodes.distances() < threshold, axis=1).sum(0)
            counts = np.concatenate([[0], reached, reached[-1:]]).astype(int)
            bands = [binomtest(int(k), len(episodes.start)).proportion_ci(method="wilson") for k in counts]
            axes.step(ends, counts / len(episodes.start), where="post", color=colour, label=f"within {threshold}")
            low, high = [band.low for band in bands], [band.high for band in bands]
            axes.fill_between(ends, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="env steps", ylabel="episodes that reached the goal", ylim=(0, 1.02), xlim=(0, ends[-1]))
        axes.legend(loc="lower right")
        return _png(figure)


def draw_training(run: Path) -> bytes:
    """Training loss, and validation skill of rollouts of 1 to 5 model steps."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        if outside := cause_outside(error):
            raise unreadable(run / "metrics.jsonl", outside) from error
        raise UserError(
            f"{run / 'metrics.jsonl'} cannot be read ({error}); restore it, or put an empty file there to go without training curves"
        ) from error
    # A figure that is not defined is null, in files of earlier versions NaN.
    lines = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    skills = [line for line in lines if "skill_1" in line]
    known = any(math.isfinite(line["skill_1"]) for line in skills)
    with _figure(7.2, 2.8, columns=2) as (figure, (left, right)):
        if losses:
            left.plot(*zip(*losses, strict=True), color=COLOURS[0])
            left.set(yscale="log")
        left.set(xlabel="step", ylabel="training loss")
        for k, colour in zip(range(1, 6), COLOURS, strict=True):
            if skills and f"skill_{k}" in skills[0]:
                right.plot(
                    [line["step"] for line in skills],
                    [line[f"skill_{k}"] for line in skills],
                    ".-",
                    color=colour,
                    label=f"{k} step{'s' * (k > 1)}",
                )
        right.set(xlabel="step", ylabel="skill against copying\n(1: perfect, 0: useless)", ylim=(None, 1))
        if known:
            right.legend(loc="lower right", fontsize=7)
        why = "no skill: the frames do not change" if skills else "no metrics"  # an imported run was trained elsewhere
        for axes, there, text in ((left, losses, "no metrics"), (right, known, why)):
            if not there:
                axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888")
                axes.set(xticks=[], yticks=[])
        return _png(figure)


def draw_distance_map(store: TokenStore, graph: LatentGraph | None = None) -> bytes:
    """Cached frames at the ball's place, coloured by distance to a goal: in the latent space or along `graph`, and along the maze."""
    chosen = np.random.default_rng(0).choice(len(store), min(MAPPED_FRAMES, len(store)), replace=False)
    xy = store.state[chosen, :2]
    goal = int(np.argmax(xy[:, 0] - xy[:, 1]))  # the end of the U-maze's way
    tokens = store.gather(chosen).astype(np.float32)
    latent = np.square(tokens - tokens[goal]).sum((1, 2))
    if graph is not None:
        latents, target = torch.from_numpy(tokens).to(graph.places.device), torch.from_numpy(tokens[goal : goal + 1])
        target = target.to(latents.device)
        latent = graph.distance(latents[None, :, None], target, graph.to_goal(target))[0, :, 0].cpu().numpy()
    title = "latent distance" if graph is None else "distance along the cached frames"
    maze = cached_maze(store.card)
    true = maze.geodesic(xy[goal], xy)
    constant = not (np.ptp(latent) and np.ptp(true))
    correlation = "none" if constant else f"{spearmanr(latent, true).statistic:.2f}"
    with _figure(7.2, 3.2, columns=2) as (figure, panels):
        for axes, values, name in zip(panels, (latent, true), (title, "true distance along the maze"), strict=True):
            _draw_walls(axes, maze)
            points = axes.scatter(xy[:, 0], xy[:, 1], c=values, s=3, cmap="viridis_r", linewidths=0)
            axes.plot(*xy[goal], "*", color="#d1272b", markersize=12)
            axes.set_title(name, fontsize=9)
            figure.colorbar(points, ax=axes, shrink=0.8)
        figure.suptitle(f"distance to the star; Spearman correlation {correlation}", fontsize=9)
        return _png(figure)


def draw_paths(episodes: Episodes, maze: Maze, threshold: float, count: int = 12) -> bytes:
    """Paths of the ball in some episodes, each from its start to its goal; a circle shows the threshold around the goal."""
    with _figure(3.8, 3.9) as (figure, axes):
        _draw_walls(axes, maze)
        palette = plt.get_cmap("tab20")
        for i in range(min(count, len(episodes.start))):
            path = np.concatenate([episodes.start[i : i + 1], episodes.states[i]])
            axes.plot(path[:, 0], path[:, 1], color=palette(i % 20), linewidth=0.9)
            axes.plot(*path[0, :2], ".", color=palette(i % 20))
            x, y = episodes.goal[i, :2].tolist()
            axes.plot(x, y, "*", color=palette(i % 20), markersize=9)
            axes.add_patch(Circle((x, y), threshold, fill=False, color=palette(i % 20), linewidth=0.6))
        signs = {"start": ".", "goal": "*", f"within {threshold}": "$\\bigcirc$"}
        handles = [Line2D([], [], color="#555", linewidth=0.9, label="path")]
        handles += [
            Line2D([], [], color="#555", marker=sign, linestyle="", markersize=9, label=name)
            for name, sign in signs.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, handletextpad=0.3)
        return _png(figure)


def write_videos(folder: Path, episodes: Episodes, setting: EvalContext) -> list[tuple[str, Path]]:
    """Videos of the episodes with the longest ways to go, the live frame beside the goal's; returns captions and files."""
    make_folder(folder)
    way = shortest_ways(episodes, setting.maze)
    chosen = np.argsort(-np.where(np.isfinite(way), way, -1.0), kind="stable")[:VIDEOS]
    simulator = PointMazeSimulator(setting.maze, VIDEO_SIZE)
    written = []
    for i in chosen.tolist():
        goal = simulator.render(episodes.goal[i])
        gap = np.full((VIDEO_SIZE, 16, 3), 255, np.uint8)
        states = np.concatenate([episodes.start[i : i + 1], episodes.states[i]])
        path = folder / f"episode-{i:03d}.mp4"
        frames = [np.concatenate([simulator.render(state), gap, goal], axis=1) for state in states]
        write_mp4(path, frames, FPS)
        steps = int(env_steps(episodes, THRESHOLDS[0])[i])
        arrived = bool((episodes.distances()[i] < THRESHOLDS[0]).any())
        outcome = f"within {THRESHOLDS[0]} after {steps} env steps" if arrived else "not reached"
        written.append((f"episode {i}, {way[i]:.1f} from the goal: {outcome}", path))
    simulator.close()
    return written


def _draw_walls(axes: Axes, maze: Maze) -> None:
    x_min, x_max, y_min, y_max = maze.extent
    walls: NDArray[np.bool_] = ~maze.free
    axes.imshow(
        walls.T,
        origin="lower",
        extent=(x_min, x_max, y_min, y_max),
        cmap="Greys",
        vmin=0,
        vmax=2.5,
        interpolation="nearest",
    )
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
