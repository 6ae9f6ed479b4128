"""World models compared in one run: arithmetic, rollouts a second, seconds a plan, success, and the landscape that a planner descends."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter
from tqdm import tqdm

from wmcache.bench.plan import count_flops
from wmcache.common.device import synchronise
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.paths import AnyPath
from wmcache.planner.base import Cost
from wmcache.planner.evaluate import EvalContext, evaluate, random_episode
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import make_solver

ROUNDS = 3
CANDIDATES = 32
GRID = 31
REACH = 0.5
"""Of the landscape around a plan: root mean square of the change of its actions, in env units."""


def compare_speed(settings: Mapping[str, EvalContext], options: PlanOptions) -> dict[str, dict[str, float]]:
    """What imagining costs with each of several runs, by turns.

    Args:
        settings: name -> run.
        options: of the plan: horizon, solver and its search.

    Returns:
        For each `parameters_m`, millions; `gflop_per_step` of a candidate; `rollouts_per_second`, candidates of a whole horizon, and
        `seconds_per_replan`, both medians over the turns.
    """
    costs = {name: _cost(setting, options, 0) for name, setting in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    replans: dict[str, list[float]] = {name: [] for name in settings}
    solver = make_solver(options.solver, **options.search)
    for turn in tqdm(range(ROUNDS + 1), desc="bench plan", unit=" turns"):
        for name, setting in settings.items():
            width = setting.model.shape.action_dim
            actions = torch.rand(1, CANDIDATES, options.horizon, width, device=setting.device) * 2 - 1
            spent = _timed(setting, lambda name=name, actions=actions: costs[name](actions))
            start = torch.zeros(1, options.horizon, width, device=setting.device)
            generators = [torch.Generator().manual_seed(turn)]
            planned = _timed(
                setting, lambda name=name, start=start, generators=generators: solver(costs[name], start, generators)
            )
            if turn:  # the first pays for set-up
                seconds[name].append(spent)
                replans[name].append(planned)
    result = {}
    for name, setting in settings.items():
        two = torch.zeros(1, 2, options.horizon, setting.model.shape.action_dim, device=setting.device)
        with torch.inference_mode():
            flops = count_flops(costs[name], two) / (2 * options.horizon)
        result[name] = {
            "parameters_m": sum(value.numel() for value in setting.model.parameters()) / 1e6,
            "gflop_per_step": flops / 1e9,
            "rollouts_per_second": CANDIDATES / statistics.median(seconds[name]),
            "seconds_per_replan": statistics.median(replans[name]),
        }
    return result


def landscape(setting: EvalContext, options: PlanOptions, episodes: int = 8) -> NDArray[np.float64]:
    """Costs of plans around the best one, [episodes, G, G]: in a plane through it, which two random directions span.

    Args:
        setting: a run.
        options: of the plan. Each episode has the start, the goal and the directions that its number gives it, whatever the run.
        episodes: how many.
    """
    steps = torch.linspace(-REACH, REACH, GRID)
    planes = []
    for number in range(episodes):
        cost = _cost(setting, options, number)
        generator = torch.Generator().manual_seed(99 * number + 1)
        shape = (1, options.horizon, setting.model.shape.action_dim)
        with torch.inference_mode():
            best = setting.solver(cost, torch.zeros(shape, device=setting.device), [generator])
            directions = torch.linalg.qr(torch.randn(math.prod(shape), 2, generator=generator))[0].T
            u, v = (direction.view(shape).to(setting.device) * math.sqrt(math.prod(shape)) for direction in directions)
            rows = [best + a * u + steps[:, None, None].to(setting.device) * v for a in steps.tolist()]
            # As the solver has them: what is scored is what the env would do.
            costs = [cost(row[None].clamp(-1.0, 1.0))[0] for row in rows]
            planes.append(torch.stack(costs).double().cpu().numpy())
    return np.stack(planes)


def roughness(planes: NDArray[np.float64]) -> dict[str, float]:
    """How hard landscapes [episodes, G, G] are to descend, means over the episodes.

    Returns:
        `minima`: places that no neighbour is below. `stuck`: share of the places from which steepest descent from neighbour to neighbour
        ends elsewhere than at the lowest one. `curvature`: root mean square of second differences, over the spread of the costs.
    """
    found = [_roughness(plane) for plane in planes]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def draw_landscapes(planes: Mapping[str, NDArray[np.float64]], episode: int = 0) -> bytes:
    """A PNG: the landscape of one episode for each run, in shares of its own range, a dot where its plan is."""
    figure = Figure(figsize=(2.7 * len(planes) + 0.9, 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    for axes, (name, costs) in zip(panels, planes.items(), strict=True):
        plane = costs[episode]
        scaled = (plane - plane.min()) / max(float(np.ptp(plane)), 1e-12)
        image = axes.imshow(scaled, origin="lower", extent=(-REACH, REACH, -REACH, REACH), cmap="viridis")
        if scaled.any():  # a flat landscape has no contours
            axes.contour(scaled, extent=(-REACH, REACH, -REACH, REACH), levels=12, colors="white", linewidths=0.4)
        axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=5, label="the solver's plan")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("change along one random direction (RMS, env units)", fontsize=6)
        axes.tick_params(labelsize=6)
    panels[0].set_ylabel("change along another one (RMS, env units)", fontsize=6)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    bar.set_label("cost (0: lowest, 1: highest of the panel)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _roughness(plane: NDArray[np.float64]) -> dict[str, float]:
    lowest = minimum_filter(plane, size=3, mode="nearest")
    size = len(plane)
    padded = np.pad(plane, 1, constant_values=np.inf)
    neighbours = np.stack([padded[i : i + size, j : j + size] for i in range(3) for j in range(3)])
    i, j = np.divmod(neighbours.argmin(0), 3)
    rows, columns = np.indices(plane.shape)
    following = ((rows + i - 1) * size + columns + j - 1).ravel()
    ends = np.arange(size * size)
    for _ in range(size * size):
        if np.array_equal(further := following[ends], ends):
            break
        ends = further
    second = [np.diff(plane, 2, axis) for axis in (0, 1)]
    return {
        "minima": float((plane == lowest).sum()),
        "stuck": float((ends != plane.argmin()).mean()),
        "curvature": math.sqrt(sum(float(np.square(part).mean()) for part in second) / 2)
        / max(float(plane.std()), 1e-12),
    }


def _cost(setting: EvalContext, options: PlanOptions, number: int) -> Cost:
    """What a planner descends at the beginning of an episode."""
    (start, goal), frames = random_episode(setting, number)
    tokens, goal_tokens = (setting.encoder(frame[None]) for frame in frames)
    mpc = setting.make_mpc(options, goal_tokens, goal[None].astype(np.float32))
    proprio = torch.from_numpy(start.astype(np.float32)).to(setting.device)
    return mpc.cost_of(tokens[:, None], proprio[None, None])


def _timed(setting: EvalContext, call: Any) -> float:
    synchronise(setting.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        call()
    synchronise(setting.device)
    return time.perf_counter() - begun


def compare_runs(
    runs: Sequence[Path],
    options: PlanOptions,
    episodes: int = 200,
    picture: Path | None = None,
    *,
    weights: Path | None = None,
    cache: AnyPath | None = None,
) -> list[dict[str, Any]]:
    """Everything of this module for several runs; the first is what the others are compared with.

    Args:
        runs: their folders.
        options: of the plans that are measured; success is that of the protocol `mpc-100`, in the same precision and context.
        episodes: of that protocol; 0 leaves it out. Finished batches of them are kept in a run's folder.
        picture: where the landscapes go; None measures none.
        weights, cache: as of `EvalContext`.

    Returns:
        A row for each run, see `compare_speed`, `roughness` and `evaluate`; `fewer_flop` and `faster` are ratios to the first.

    Raises:
        UserError: one is no run, or two have the same name.
    """
    names = [_name(run, runs) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: name each run once")
    usual = replace(options, search={})  # success and landscape are those of the protocol's own search
    settings = {
        name: EvalContext(run, usual, weights=weights, cache=cache) for name, run in zip(names, runs, strict=True)
    }
    speed = compare_speed(settings, options)
    rows: list[dict[str, Any]] = []
    for name, setting in settings.items():
        model = setting.config["model"]
        stage = f", {setting.model.stage_name}" if setting.model.stages else ""
        rows.append({"run": name, "model": f"{model}{stage}", "context": setting.context, **speed[name]})
        first = rows[0]
        rows[-1]["fewer_flop"] = first["gflop_per_step"] / rows[-1]["gflop_per_step"]
        rows[-1]["faster"] = rows[-1]["rollouts_per_second"] / first["rollouts_per_second"]
    planes = {}
    for (name, setting), row in zip(settings.items(), rows, strict=True):
        if picture is not None:
            planes[name] = landscape(setting, usual)
            row |= roughness(planes[name])
        if episodes:
            row |= _success(setting, replace(usual, episodes=episodes))
    if picture is not None:
        with atomic_write(picture) as file:
            file.write(draw_landscapes(planes))
    return rows


def _success(setting: EvalContext, options: PlanOptions) -> dict[str, Any]:
    """Under the protocol `mpc-100`: episodes within each threshold, still so at the end, and the 95 % interval of the headline."""
    told = replace(options, **PROTOCOLS["mpc-100"])
    out = setting.run / f"bench-mpc-100-{told.episodes}"
    make_folder(out)
    _, results = evaluate(setting, told, out)
    reached = {
        f"{word}_{row['threshold']}": row[name]
        for word, name in (("within", "successes"), ("held", "held"))
        for row in results["by_threshold"]
    }
    intervals = {
        f"{name}_{told.threshold}": "{:.3f} to {:.3f}".format(*results[name]) for name in ("ci95", "held_ci95")
    }
    at = [row["threshold"] for row in results["by_threshold"]].index(told.threshold)
    random = results["baselines"]["random"][at]
    baseline = {f"random_within_{told.threshold}": random["successes"], f"random_held_{told.threshold}": random["held"]}
    return {"episodes": told.episodes, **reached, **intervals, **baseline}


def _name(run: Path, runs: Sequence[Path]) -> str:
    """Of the run alone, or with its folder where another has the same."""
    alone = run.resolve()
    same = sum(other.resolve().name == alone.name for other in runs) > 1
    return f"{alone.parent.name}/{alone.name}" if same else alone.name
