"""All settings of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from wmcache.common.errors import UserError
from wmcache.planner.objective import DISTANCES, MODES


@dataclass(frozen=True)
class PlanOptions:
    """All settings of an evaluation.

    Attributes:
        episodes: how many.
        budget: env steps of each episode. Every episode uses all of it: nobody tells the planner that it has arrived.
        threshold: distance below which the headline figures count a goal as reached.
        goals: where starts and goals come from, see `start_and_goal`. goal_steps: env steps between them; None means the horizon's.
        strict: start and goal are at least the largest reported threshold and one model step apart, see `Apart`; a file's are taken
            as they are.
        horizon: model steps of a plan. execute: model steps before the next plan.
        objective: `last` or `all`. distance: `latent` or `graph`. alpha: weight of proprio in it.
        mask: score only the tokens in which the present frame and the goal's differ.
        proprio: `auto`, whatever the model sees; `none` insists on a model that plans from pixels alone.
        context: frames that an imagined step sees, no more than the model's history; None means 1, or for a model without proprio, and
            so without velocity, its history.
        observed: live frames that a plan starts from, a model step apart; None means 1, or for such a model its history.
        solver: name in SOLVERS. search: options of that solver.
        batch: episodes planned at once.
        seed: number of the first episode; episode n starts, ends and searches by seed 99 n + 1 (DINO-WM, plan.py).
        env: another maze than the data's. device, dtype: of the model and the encoder.
    """

    episodes: int = 50
    budget: int = 100
    threshold: float = 0.5
    goals: str = "random-state"
    goal_steps: int | None = None
    strict: bool = True
    horizon: int = 5
    execute: int = 1
    objective: str = "all"
    distance: str = "latent"
    alpha: float = 0.0
    mask: bool = False
    proprio: str = "auto"
    context: int | None = None
    observed: int | None = None
    solver: str = "cem"
    search: dict[str, Any] = field(default_factory=dict)
    batch: int = 50
    seed: int = 0
    env: str | None = None
    device: str = "auto"
    dtype: str = "auto"


def check_options(options: PlanOptions) -> None:
    """Refuse, as a UserError, what no evaluation can be made of."""
    positive = ("episodes", "budget", "threshold", "horizon", "execute", "batch")
    for name in (
        *positive,
        *(name for name in ("context", "observed", "goal_steps") if getattr(options, name) is not None),
    ):
        if not 0 < getattr(options, name) < math.inf:
            flag = "batch-size" if name == "batch" else name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(options, name)}; it must be above 0")
    for name, known in (("objective", MODES), ("distance", DISTANCES), ("proprio", ("auto", "none"))):
        if getattr(options, name) not in known:
            raise UserError(f"no {name} {getattr(options, name)!r}; known are {', '.join(known)}")
    if options.mask and options.distance != "latent":
        raise UserError(f"--mask weighs tokens, and --distance {options.distance} has none; leave one of them out")
    if not 0 <= options.alpha < math.inf:
        raise UserError(f"--alpha is {options.alpha}; it must be 0 or more")
    if options.execute > options.horizon:
        raise UserError(f"--execute {options.execute} is more than the --horizon of {options.horizon} model steps")
