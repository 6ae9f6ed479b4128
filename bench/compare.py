"""World models compared in one run: arithmetic, rollouts per second, seconds per plan, success and the planner's landscape."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter
from tqdm import tqdm

from wmcache.bench.limit import MatmulLimit, count_flops
from wmcache.bench.reference import PlanRace
from wmcache.bench.timing import median_ratio, seconds
from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.common.paths import AnyPath
from wmcache.common.sampling import descend
from wmcache.planner.base import Cost
from wmcache.planner.context import EvalContext, random_episode
from wmcache.planner.evaluate import evaluate
from wmcache.planner.mpc import make_mpc, require_keep
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import make_solver
from wmcache.planner.solvers.cem import Cem

ROUNDS = 3
CANDIDATES = 32
GRID = 31
REACH = 0.5
"""Half the side of a landscape: root mean square of the change of the plan's actions, in env units."""
REFERENCE = "DINO-WM's code"
REFERENCE_CANDIDATES = 4
"""Of the reference's code at once; they are slow, and its speed does not depend on their number."""


@dataclass(frozen=True)
class Contender:
    """A column of the comparison; `options` are those of its plans.

    Attributes:
        reference: candidates are imagined by the reference's code, see `PlanRace.reference`.
    """

    name: str
    context: EvalContext
    options: PlanOptions
    reference: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its matrix products."""
        return torch.float32 if self.reference else self.context.dtype

    @property
    def candidates(self) -> int:
        """Rollouts that are timed at once."""
        return REFERENCE_CANDIDATES if self.reference else CANDIDATES

    def cost(self) -> Cost:
        """Return the cost of its first plan."""
        if not self.reference:
            return _first_cost(self.context, self.options, 0)
        return PlanRace(self.context, Cem(), self.options.horizon).reference


def compare_runs(
    runs: Sequence[Path],
    options: PlanOptions,
    episodes: int = 200,
    picture: Path | None = None,
    *,
    keep: Sequence[float] = (),
    reference: bool = False,
    weights: Path | None = None,
    cache: AnyPath | Sequence[AnyPath] | None = None,
) -> list[dict[str, Any]]:
    """Measure several runs, a row for each; `fewer_flop` and `faster` are ratios to the first.

    Args:
        options: of the plans whose speed is measured. Success is that of the protocol `mpc-100`, in the same precision and context.
        episodes: of that protocol; 0 leaves it out. Finished batches are kept in the run's folder.
        picture: PNG to write the landscapes to; None measures none.
        keep: shares of the tokens; each run has another row for each of them, see `PlanOptions.keep_tokens`.
        reference: whether the first row is that of DINO-WM's code on the first run. It encodes a frame for every candidate, and has no
            success of its own: on the same weights, with --context of its window, its plans are this implementation's.
        weights, cache: see `EvalContext`.
    """
    names = names_of(runs, "--model")
    usual = replace(options, search={})  # success and landscape are those of the protocol's own search
    contexts = {
        name: EvalContext(run, usual, weights=weights, cache=cache) for name, run in zip(names, runs, strict=True)
    }
    contenders = [Contender(REFERENCE, contexts[names[0]], options, reference=True)] if reference else []
    contenders += [
        Contender(f"{name}, keep {share:g}" if share < 1 else name, context, replace(options, keep_tokens=share))
        for name, context in contexts.items()
        for share in dict.fromkeys((1.0, *keep))
    ]
    speed = compare_speed(contenders)
    rows: list[dict[str, Any]] = []
    planes: dict[str, NDArray[np.float64]] = {}
    for one in contenders:
        context, model = one.context, one.context.world_model
        kind = ", ".join(filter(None, [context.config["model"], model.stage_name]))
        frames = model.shape.history if one.reference else context.context_frames
        row: dict[str, Any] = {"run": one.name, "model": kind, "context": frames, **speed[one.name]}
        row["fewer_flop"] = speed[contenders[0].name]["gflop_per_step"] / row["gflop_per_step"]
        row["faster"] = row["rollouts_per_second"] / speed[contenders[0].name]["rollouts_per_second"]
        own = replace(one.options, search={})
        if picture is not None and not one.reference:
            planes[one.name] = landscape(context, own)
            row |= roughness(planes[one.name])
        if episodes and not one.reference:
            row |= _success(context, replace(own, episodes=episodes))
        rows.append(row)
    if picture is not None:
        with atomic_write(picture) as file:
            file.write(draw_landscapes(planes))
    return [{name: row.get(name) for name in rows[-1]} for row in rows]


def names_of(runs: Sequence[Path], flag: str) -> list[str]:
    """Name runs by their folders, with the parents' where two are alike; raises UserError where `flag` names one twice."""
    alike = Counter(run.resolve().name for run in runs)
    names = ["/".join(run.resolve().parts[-2 if alike[run.resolve().name] > 1 else -1 :]) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"{flag} names a run twice: {', '.join(names)}; name each run once")
    return names


@torch.inference_mode()
def compare_speed(contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """Measure the cost of imagining, in turns; rollouts are candidates of a whole horizon, and give the reference's time of a replan.

    `share_of_limit` is that of the rate of a large matrix product (`limit_gflops`), measured in turn, which a replan reaches.
    """
    costs = {one.name: one.cost() for one in contenders}
    solvers = {one.name: make_solver(one.options.solver, **one.options.search) for one in contenders}
    products = {dtype: MatmulLimit(contenders[0].context.device, dtype) for dtype in {one.dtype for one in contenders}}
    rollouts: dict[str, list[float]] = {one.name: [] for one in contenders}
    replans: dict[str, list[float]] = {one.name: [] for one in contenders}
    limits: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    gflop: dict[str, float] = {}
    for turn in tqdm(range(ROUNDS + 1), desc="bench plan", unit=" turns"):
        if turn:  # the first includes set-up, and counts
            for dtype, product in products.items():
                limits[dtype].append(product.gflops())
        for one in contenders:
            device, solver, cost = one.context.device, solvers[one.name], costs[one.name]
            actions = torch.rand_like(_zeros(one.context, one.options, one.candidates)) * 2 - 1
            rollout = seconds(cost, actions, device=device) / one.candidates
            replan = solver, cost, _zeros(one.context, one.options, 1)[0], [torch.Generator().manual_seed(turn)]
            if turn:
                rollouts[one.name].append(rollout)
                whole = rollout * solver.evaluations if one.reference else seconds(*replan, device=device)
                replans[one.name].append(whole)
            elif one.reference:
                gflop[one.name] = count_flops(cost, actions) / one.candidates * solver.evaluations / 1e9
            else:
                gflop[one.name] = count_flops(*replan) / 1e9
    found = {}
    for one in contenders:
        two, rates = _zeros(one.context, one.options, 2), [gflop[one.name] / spent for spent in replans[one.name]]
        found[one.name] = {
            "parameters_m": sum(value.numel() for value in one.context.world_model.parameters()) / 1e6,
            "gflop_per_step": count_flops(costs[one.name], two) / (2 * one.options.horizon) / 1e9,
            "rollouts_per_second": 1 / statistics.median(rollouts[one.name]),
            "seconds_per_replan": statistics.median(replans[one.name]),
            "limit_gflops": statistics.median(limits[one.dtype]),
            "share_of_limit": median_ratio(rates, limits[one.dtype]),
        }
    return found


def _zeros(context: EvalContext, options: PlanOptions, samples: int) -> torch.Tensor:
    return torch.zeros(1, samples, options.horizon, context.world_model.shape.action_dim, device=context.device)


def _first_cost(context: EvalContext, options: PlanOptions, number: int) -> Cost:
    require_keep(context, options)
    (start, goal), frames = random_episode(context, number)
    tokens, goal_tokens = (context.encoder(frame[None]) for frame in frames)
    mpc = make_mpc(context, options, goal_tokens, goal[None].astype(np.float32))
    proprio = torch.from_numpy(start.astype(np.float32)).to(context.device)
    belief = context.world_model.observe(context.world_model.start(1), tokens, proprio[None], None)
    return mpc.cost_of(belief, [torch.Generator().manual_seed(number)])


def landscape(context: EvalContext, options: PlanOptions, episodes: int = 8) -> NDArray[np.float64]:
    """Compute costs around the solver's plan, [episodes, G, G], in a plane that two random directions span.

    Start, goal and directions depend on the number of the episode alone, not on the run.
    """
    steps = torch.linspace(-REACH, REACH, GRID)
    offsets = steps[:, None, None].to(context.device)
    planes = []
    for number in range(episodes):
        cost = _first_cost(context, options, number)
        generator = torch.Generator().manual_seed(99 * number + 1)
        start = _zeros(context, options, 1)[0]
        with torch.inference_mode():
            best = context.solver(cost, start, [generator])
            directions = torch.linalg.qr(torch.randn(start.numel(), 2, generator=generator))[0].T
            u, v = (axis.view_as(start).to(start.device) * math.sqrt(start.numel()) for axis in directions)
            # Clipped to the env's bounds, as solvers clip their candidates.
            rows = [(best + a * u + offsets * v).clamp(-1.0, 1.0) for a in steps.tolist()]
            planes.append(torch.stack([cost(row[None])[0] for row in rows]).double().cpu().numpy())
    return np.stack(planes)


def roughness(planes: NDArray[np.float64]) -> dict[str, float]:
    """Measure how hard landscapes [episodes, G, G] are to descend; means over the episodes.

    `minima` are points without a lower neighbour; `stuck` the share of the points from which steepest descent ends elsewhere than at the
    lowest point; `curvature` the root mean square of second differences over the spread of the costs.
    """
    rows, columns = (axis.ravel() for axis in np.indices(planes.shape[1:]))
    near = (np.abs(rows[:, None] - rows) <= 1) & (np.abs(columns[:, None] - columns) <= 1)
    minima = [(plane == minimum_filter(plane, size=3, mode="nearest")).sum() for plane in planes]
    stuck = [(descend(plane.ravel(), near) != plane.argmin()).mean() for plane in planes]
    bends = [np.mean([np.square(np.diff(plane, 2, axis)).mean() for axis in (0, 1)]) for plane in planes]
    curvature = [np.sqrt(bend) / max(plane.std(), 1e-12) for bend, plane in zip(bends, planes, strict=True)]
    found = {"minima": minima, "stuck": stuck, "curvature": curvature}
    return {name: float(np.mean(values)) for name, values in found.items()}


@matplotlib.rc_context({"font.size": 6, "axes.titlesize": 8})
def draw_landscapes(planes: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Draw the first episode's landscape for each run, scaled to its own range, with a dot at its plan; returns a PNG."""
    figure = Figure(figsize=(2.7 * len(planes) + 0.9, 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    extent = (-REACH, REACH, -REACH, REACH)
    for axes, (name, costs) in zip(panels, planes.items(), strict=True):
        scaled = (costs[0] - costs[0].min()) / max(float(np.ptp(costs[0])), 1e-12)
        image = axes.imshow(scaled, origin="lower", extent=extent, cmap="viridis")
        if scaled.any():  # a flat landscape has no contours
            axes.contour(scaled, extent=extent, levels=12, colors="white", linewidths=0.4)
        axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=5, label="the solver's plan")
        axes.set(title=name, xlabel="change along one random direction (RMS, env units)")
    panels[0].set_ylabel("change along another one (RMS, env units)")
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="cost (0: lowest, 1: highest of the panel)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    return png_bytes(figure)


def _success(context: EvalContext, options: PlanOptions) -> dict[str, Any]:
    """Evaluate under the protocol `mpc-100`; returns counts for each threshold, and 95 % intervals and baselines for the headline's."""
    options = replace(options, **PROTOCOLS.get("mpc-100"))
    kept = f"-keep{options.keep_tokens:g}" if options.keep_tokens < 1 else ""
    _, results = evaluate(context, options, context.run / f"bench-mpc-100-{options.episodes}{kept}")
    threshold, words = results["threshold"], {"within": "successes", "held": "held"}
    counts = {
        f"{word}_{row['threshold']}": row[name] for word, name in words.items() for row in results["by_threshold"]
    }
    intervals = {f"{name}_{threshold}": "{:.3f} to {:.3f}".format(*results[name]) for name in ("ci95", "held_ci95")}
    random = next(row for row in results["baselines"]["random"] if row["threshold"] == threshold)
    baseline = {f"random_{word}_{threshold}": random[name] for word, name in words.items()}
    return {"episodes": options.episodes, **counts, **intervals, **baseline}
