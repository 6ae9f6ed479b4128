"""The report of a plan: results.json, episodes.parquet, figures, videos and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import jinja2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from numpy.typing import NDArray
from scipy.stats import spearmanr

from wmcache import __version__
from wmcache.cache.store import TokenStore
from wmcache.common.cpus import available_cpus
from wmcache.common.device import autocast
from wmcache.common.errors import UserError, reason
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.common.jsonfiles import write_json
from wmcache.envs import Geometry
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.evaluate import remove_unfinished
from wmcache.planner.graph import LatentGraph
from wmcache.planner.judge import env_steps, wilson
from wmcache.planner.options import DRAWN, TASKS, PlanOptions
from wmcache.planner.videos import SIDE, write_videos
from wmcache.planner.world import draw_states, open_world
from wmcache.trainer.models import Localizes
from wmcache.trainer.runs import data_split

PICTURED_STEPS = 8
MOST_STEPS = 40
MAPPED_FRAMES = 4000
DRAWN_PATHS = 12
COLOURS = ("#1b6ca8", "#d1672b", "#3a8f4d", "#8a4fa3", "#b03a48")
MASK_COLOURS = {"changes": COLOURS[0], "computed": COLOURS[1], "likely to change": COLOURS[3]}

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
    out: Path, run: Path, context: EvalContext, episodes: Episodes, results: dict[str, Any], command: str
) -> dict[str, Any]:
    """Write all files of a plan, and return the content of results.json: `results`, and when and where they were made."""
    results = {**results, "made": describe_making(context.device)}
    options, actors, env = results["options"], actors_of(results), context.env
    geometry = context.success.geometry
    write_episodes(out / "episodes.parquet", episodes, results)
    pictures = {"training": draw_training(run)}
    if context.by_return:
        pictures["returns"] = draw_returns(episodes)
    else:
        pictures["success"] = draw_success(episodes, _thresholds(results))
    if geometry:
        pictures["distance"] = draw_distance_map(context.store, context.graph)
        pictures["paths"] = draw_paths(episodes, geometry, results["threshold"])
    if isinstance(context.model, Localizes) and env.spec.renders_states:
        pictures["localization"] = draw_localization(context)
    for name, picture in pictures.items():
        with atomic_write(out / "figures" / f"{name}.png") as file:
            file.write(picture)
    videos = write_videos(out / "videos", episodes, context, PlanOptions(**options))
    write_page(
        out / "report.html",
        "wmcache.planner",
        "returns.html.jinja" if context.by_return else "report.html.jinja",
        results=results,
        options=options,
        table=[]
        if context.by_return
        else [dict(zip(actors, rows, strict=True)) for rows in zip(*actors.values(), strict=True)],
        actors=actors,
        pairs=_pairs_of(options),
        by_task=tasks_of(results),
        pictures=pictures,
        videos=[(caption, path.read_bytes()) for caption, path in videos],
        encoder=context.encoder.spec.name,
        blind=context.blind,
        run=run.name,
        command=command,
        identity=json.dumps(context.store.identity.to_json(), indent=2),
    )
    write_json(out / "results.json", results)  # last, so that its presence means that the rest is complete
    remove_unfinished(out)
    return results


def _pairs_of(options: dict[str, Any]) -> str:
    """Name how starts and goals were chosen."""
    if options["goals"] in DRAWN:
        return "strict" if options["strict"] else "any"
    return TASKS if options["goals"] == TASKS else "file"


def actors_of(results: dict[str, Any]) -> dict[str, Any]:
    """Return the judgements of the policy, first, and of the baselines, by name: a list by threshold, or a return's."""
    policy = results["policy"]
    own = results["return"] if "return" in results else results["by_threshold"]
    return {"planner" if policy == "mpc" else policy: own, **results["baselines"]}


def tasks_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the judgements at the threshold of an evaluation by fixed task and who acts; {} where goals are others."""
    found: dict[str, dict[str, Any]] = {}
    if "return" in results:
        return found
    for actor, rows in actors_of(results).items():
        (row,) = (row for row in rows if row["threshold"] == results["threshold"])
        for task, judged in row.get("by_task", {}).items():
            found.setdefault(task, {})[actor] = judged
    return found


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Render a template of a package. It has the filters `base64`, of bytes, and `figure`, of a number or None to 2 digits or others."""
    loader = jinja2.PackageLoader(package, "")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    environment.filters |= {"base64": lambda content: base64.b64encode(content).decode(), "figure": _figure}
    html = environment.get_template(template).render(**values)
    with atomic_write(path) as file:
        file.write(html.encode())


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"


def describe_making(device: torch.device) -> dict[str, str]:
    """Describe when and where results are made: `date` (UTC), `wmcache` (its version), `machine`."""
    names = [platform.processor() or platform.machine()]
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) or names
    parts = [f"{names[0]}, {available_cpus()} CPUs"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    parts += [platform.platform(), f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"wmcache": __version__, "date": date, "machine": ", ".join(parts)}


def _thresholds(results: dict[str, Any]) -> list[float]:
    return [judged["threshold"] for judged in results.get("by_threshold", ())]


def write_episodes(path: Path, episodes: Episodes, results: dict[str, Any]) -> None:
    """Write a row per episode: start, goal, the states after each env step, and env steps to each threshold of `results` (-1: never)."""
    columns: dict[str, Any] = {"episode": results["options"]["seed"] + np.arange(len(episodes.start))}
    columns |= {"start": list(episodes.start), "goal": list(episodes.goal)}
    if episodes.rewards.size:
        columns |= {"return": episodes.rewards.sum(1), "rewards": list(episodes.rewards)}
    for threshold in _thresholds(results):
        reached = (episodes.distances() < threshold).any(1)
        columns[f"env_steps_{threshold}"] = np.where(reached, env_steps(episodes, threshold), -1)
    columns["states"] = [states.tolist() for states in episodes.states]
    with atomic_write(path) as file:
        pq.write_table(pa.table(columns), file)


@matplotlib.rc_context(RC)
def draw_success(episodes: Episodes, thresholds: Sequence[float]) -> bytes:
    """Draw the share of episodes that have reached the goal by env steps, with Wilson's 95 % band, for each threshold."""
    count, budget = episodes.states.shape[:2]
    figure, axes = _new_figure(4.6, 3.2)
    # A little beyond the budget, so that arrivals at its end are visible.
    ends = np.concatenate([[0], episodes.chunk_ends(), [1.03 * budget]])
    for threshold, colour in zip(thresholds, COLOURS, strict=False):
        reached = np.maximum.accumulate(episodes.distances() < threshold, axis=1).sum(0)
        counts = np.concatenate([[0], reached, reached[-1:]]).astype(int)
        low, high = zip(*(wilson(int(k), count) for k in counts), strict=True)
        axes.step(ends, counts / count, where="post", color=colour, label=f"within {threshold}")
        axes.fill_between(ends, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="env steps", ylabel="episodes that reached the goal", ylim=(0, 1.02), xlim=(0, ends[-1]))
    axes.legend(loc="lower right")
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_returns(episodes: Episodes) -> bytes:
    """Draw the sum of rewards so far by env steps: each episode, and their mean."""
    figure, axes = _new_figure(4.6, 3.2)
    sums = episodes.rewards.cumsum(1)
    env_steps = np.arange(1, sums.shape[1] + 1)
    axes.plot(env_steps, sums.T, color="#888", linewidth=0.6, alpha=0.5)
    axes.plot(env_steps, sums.mean(0), color=COLOURS[0], linewidth=2)
    axes.set(xlabel="env steps", ylabel="return so far")
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_training(run: Path) -> bytes:
    """Draw the training loss, and the validation skill of rollouts of 1 to 5 model steps."""
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}); restore it, or replace it by an empty file"
        ) from error
    # Undefined skills are null, or NaN from earlier versions.
    lines = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    skills = [line for line in lines if "skill_1" in line]
    defined = any(math.isfinite(line["skill_1"]) for line in skills)
    figure, (left, right) = _new_figure(7.2, 2.8, columns=2)
    if losses:
        left.plot(*zip(*losses, strict=True), color=COLOURS[0])
        left.set(yscale="log" if all(loss > 0 for _, loss in losses) else "linear")  # a log-likelihood may be negative
    left.set(xlabel="step", ylabel="training loss")
    for k, colour in enumerate(COLOURS, start=1):
        points = [(line["step"], line[f"skill_{k}"]) for line in skills if f"skill_{k}" in line]
        if points:
            right.plot(*zip(*points, strict=True), ".-", color=colour, label=f"{k} step{'s' * (k > 1)}")
    right.set(xlabel="step", ylabel="skill against copying\n(1: perfect, 0: useless)", ylim=(None, 1))
    if defined:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    no_skill = "no skill: the frames do not change" if skills else "no metrics"  # imported runs have none
    for axes, drawn, text in ((left, losses, "no metrics"), (right, defined, no_skill)):
        if not drawn:
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888")
            axes.set(xticks=[], yticks=[])
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_distance_map(store: TokenStore, graph: LatentGraph | None = None) -> bytes:
    """Draw cached frames at their positions, coloured by distance to a goal: in the latent space or along `graph`, and of the path."""
    chosen = np.random.default_rng(0).choice(len(store), min(MAPPED_FRAMES, len(store)), replace=False)
    geometry = open_world(store.card).geometry
    assert geometry is not None
    states = store.require_state()[chosen]
    xy = geometry.position(states)
    goal = int(np.argmax(xy[:, 0] - xy[:, 1]))  # a corner
    tokens = store.gather(chosen).astype(np.float32)
    if graph is None:
        title, latent = "latent distance", np.square(tokens - tokens[goal]).sum((1, 2))
    else:
        latents = torch.from_numpy(tokens).to(graph.nodes.device)
        target = latents[goal : goal + 1]
        title = "distance along the cached frames"
        latent = graph.distance(latents[None, :, None], target, graph.to_goal(target))[0, :, 0].cpu().numpy()
    true = geometry.distance(states[goal], states)
    correlation = f"{spearmanr(latent, true).statistic:.2f}" if np.ptp(latent) and np.ptp(true) else "none"
    figure, panels = _new_figure(7.2, 3.2, columns=2)
    for axes, values, name in zip(panels, (latent, true), (title, "length of the shortest path"), strict=True):
        _draw_walls(axes, geometry)
        points = axes.scatter(xy[:, 0], xy[:, 1], c=values, s=3, cmap="viridis_r", linewidths=0)
        axes.plot(*xy[goal], "*", color="#d1272b", markersize=12)
        axes.set_title(name, fontsize=9)
        figure.colorbar(points, ax=axes, shrink=0.8)
    figure.suptitle(f"distance to the star; Spearman correlation {correlation}", fontsize=9)
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_paths(episodes: Episodes, geometry: Geometry, threshold: float) -> bytes:
    """Draw the paths in some episodes, from start to goal, with a circle of the threshold around the goal."""
    figure, axes = _new_figure(3.8, 3.9)
    _draw_walls(axes, geometry)
    palette = matplotlib.colormaps["tab20"]
    for i in range(min(DRAWN_PATHS, len(episodes.start))):
        path = geometry.position(np.concatenate([episodes.start[i : i + 1], episodes.states[i]]))
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        jumps = [
            step for step, moved in enumerate(steps, 1) if geometry.path_length(path[step - 1 : step + 1]) < moved / 2
        ]
        axes.plot(*np.insert(path, jumps, np.nan, axis=0).T, color=palette(i), linewidth=0.9)
        axes.plot(*path[0], ".", color=palette(i))
        x, y = geometry.position(episodes.goal[i]).tolist()
        axes.plot(x, y, "*", color=palette(i), markersize=9)
        axes.add_patch(Circle((x, y), threshold, fill=False, color=palette(i), linewidth=0.6))
    handles = [Line2D([], [], color="#555", linewidth=0.9, label="path")]
    for name, sign in {"start": ".", "goal": "*", f"within {threshold}": "$\\bigcirc$"}.items():
        handles.append(Line2D([], [], color="#555", marker=sign, linestyle="", markersize=9, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, handletextpad=0.3)
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_localization(context: EvalContext) -> bytes:
    """Draw frames with the patches that change and those that the model computes, and their shares over time; returns a PNG."""
    images, masks = locate(context)
    grid, frameskip = context.card.token_grid, context.frameskip
    shown = np.unique(np.linspace(0, len(images) - 2, min(PICTURED_STEPS, len(images) - 1)).astype(int))
    figure = Figure(figsize=(1.25 * len(shown) + 0.2, 3.4), layout="constrained", dpi=120)
    above, below = cast("tuple[SubFigure, SubFigure]", figure.subfigures(2, 1, height_ratios=(1.25, 2)))
    for axes, step in zip(above.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        changes, computed = (masks[name][step].reshape(grid) for name in ("changes", "computed"))
        extent = (0, grid[1], grid[0], 0)
        axes.imshow(images[step], extent=extent)
        axes.imshow(
            computed[..., None] * to_rgba(MASK_COLOURS["computed"], 0.45), extent=extent, interpolation="nearest"
        )
        outlined = np.ma.array(changes, mask=~changes)
        axes.pcolor(outlined, facecolor="none", edgecolors=MASK_COLOURS["changes"], linewidth=1.3)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.set_title(f"env step {step * frameskip}", fontsize=7)
    curve = below.subplots()
    env_steps = frameskip * np.arange(len(images) - 1)
    for name, mask in masks.items():
        curve.plot(env_steps, mask.mean(1), ".-", color=MASK_COLOURS[name], label=name, linewidth=1)
    highest = max(mask.mean(1).max() for mask in masks.values())
    curve.set(xlabel="env step", ylabel="share of the tokens", ylim=(0, 1.3 * highest))
    curve.legend(loc="upper center", ncols=3)
    return png_bytes(figure)


def locate(context: EvalContext) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
    """Mark the patches of a held-out episode; returns frames [T, S, S, 3], and masks [T - 1, N] by the names of MASK_COLOURS."""
    store, frameskip, model = context.store, context.frameskip, context.model
    assert isinstance(model, Localizes)
    seed, _ = data_split(context.config)
    steps = max(1, min(MOST_STEPS, store.longest_episode("val", seed=seed) // frameskip - 1))
    windows, first = store.windows(1, steps, frameskip, "val", seed=seed), np.zeros(1, int)
    batch = {name: torch.from_numpy(value).to(context.device) for name, value in windows.batch(first).items()}
    images = draw_states(context.card, store.require_state()[windows.frames(first)[0]], image_size=SIDE)
    if model.labels_from_pixels:  # a first frame has no changes, as in a store of change maps
        changes = changes_for(context.card.token_grid, frameskip, "cpu")(np.stack([images[:-1], images[1:]], 1))
        batch["changes"] = torch.cat([torch.zeros_like(changes[:1]), changes])[None].to(context.device)
    with torch.inference_mode(), autocast(context.device, context.dtype):
        return images, {name: mask[0].cpu().numpy() for name, mask in model.change_masks(batch).items()}


def _draw_walls(axes: Axes, geometry: Geometry) -> None:
    walls = geometry.walls.T
    axes.imshow(walls, origin="lower", extent=geometry.extent, cmap="Greys", vmin=0, vmax=2.5, interpolation="nearest")
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)
