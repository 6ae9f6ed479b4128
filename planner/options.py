"""All settings of an evaluation, and of drawing what a model imagines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt

from wmcache.common.errors import UserError
from wmcache.common.options import Natural, Positive, Weight, option
from wmcache.common.options import check_options as validate_options

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class PlanOptions:
    """All settings of an evaluation.

    Every episode uses all of its budget: the planner does not learn whether it has arrived. Episode n starts, ends and searches by seed
    99 n + 1 (DINO-WM, plan.py). `context` and `observed` are 1, or for a model without proprio, and so without velocity, its history.
    """

    episodes: Positive = option(50, "Episodes to plan.", group="Evaluation")
    budget: Positive = option(100, "Env steps of each episode.")
    threshold: Annotated[float, Gt(0)] = option(
        0.5, "Distance below which a goal is reached; 0.5, 0.25 and 0.1 are always reported."
    )
    goals: str = option("random-state", "Starts and goals: random-state, dataset, random-action, or a Parquet file.")
    goal_steps: Positive | None = option(
        None, "Env steps from start to goal (dataset, random-action).  [default: the horizon's]"
    )
    strict: bool = option(
        True,
        "Draw start and goal at least the largest reported threshold and one model step apart, or anywhere (DINO-WM).",
    )
    horizon: Positive = option(5, "Model steps of a plan.", group="Planning")
    execute: Positive = option(1, "Model steps before the next plan.")
    objective: Literal["last", "all"] = option("all", "Score the last imagined frame (DINO-WM) or all.")
    distance: Literal["latent", "graph"] = option(
        "latent",
        "Distance to the goal: between latents (DINO-WM), or along the cached frames, for goals beyond the horizon.",
    )
    alpha: Weight = option(0.0, "Weight of proprio; above 0 the goal is more than an image.")
    mask: bool = option(
        False, "Score only tokens in which the present frame and the goal's differ (DDP-WM).", flag="--mask"
    )
    proprio: Literal["auto", "none"] = option("auto", "none: refuse a model that sees proprio.")
    context: Positive | None = option(None, "Frames that an imagined step sees.  [default: 1; without proprio all]")
    observed: Positive | None = option(None, "Live frames that a plan starts from.  [default: 1; without proprio all]")
    solver: str = option("cem", "Solver: {names}.", group="Solver")
    search: dict[str, Any] = field(default_factory=dict)
    batch: Positive = option(50, "Episodes planned at once.", flag="--batch-size", group="Run")
    seed: Natural = option(0, "Number of the first episode.", group="Evaluation")
    env: str | None = option(None, "Environment to plan in, instead of the data's.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.", group="Run")
    dtype: Precision = option("auto", "Precision of the model.")


def check_options(options: PlanOptions) -> None:
    """Refuse, as a UserError, what no evaluation can be made of."""
    validate_options(options)
    if options.mask and options.distance != "latent":
        raise UserError(f"--mask weighs tokens, and --distance {options.distance} has none; leave one of them out")
    if options.execute > options.horizon:
        raise UserError(f"--execute {options.execute} is more than the --horizon of {options.horizon} model steps")


@dataclass(frozen=True)
class ImagineOptions:
    """All settings of open-loop rollouts beside the real frames; saved in `metrics.json`."""

    steps: Positive = option(10, "Model steps from one observed frame.")
    windows: Positive = option(64, "Held-out windows that are compared.")
    videos: Natural = option(2, "Videos to write, each of 4 windows side by side.")
    context: Positive | None = option(None, "Frames that an imagined step sees.  [default: the history]")
    seed: Natural = option(0, "Seed of the sample of windows.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
    dtype: Precision = option("auto", "Compute precision.")
    lpips: bool = option(True, "Try to compute LPIPS; its network is fetched once, 244 MB.")
