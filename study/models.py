"""The systems of a study beside its encoders: evaluations, and the world models and policies that take part in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import MinLen

from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES
from wmcache.trainer.models import MODELS, WorldModel
from wmcache.trainer.options import ActorOptions, TrainOptions

SHARED = (
    *("episodes", "budget", "threshold", "goals", "goal_steps", "judge_columns", "strict", "min_distance"),
    *("baselines", "batch", "seed", "env", "device", "dtype"),
)
"""Settings of an evaluation that are the same for all models; the others are how a model acts."""
UNTRAINED = "untrained"
"""The baseline of a model's own sizes with random weights."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation. All systems have the same starts and goals.

    Attributes:
        name: in tables; that of its protocol by default.
        thresholds: that tables report, its own among them, the largest first; known once there are frames, see `run.settled`.
        untrained_episodes: of the baseline `untrained`, the first ones; None: all.
    """

    name: str
    options: PlanOptions
    thresholds: tuple[float, ...] = ()
    untrained_episodes: int | None = None

    @property
    def baselines(self) -> list[str]:
        """Names of its baselines, each once; `random` and `zero` are always evaluated."""
        return [name for name in dict.fromkeys(self.options.baselines.split(",")) if name]


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    """What a table of `[[models]]` has beside the fields of `TrainOptions`.

    Attributes:
        label: name in tables; the model's by default.
        actor: settings of an actor that is trained in the model's imagination, and acts instead of plans.
        plan: settings that win over those of evaluations; with a `protocol` they replace them.
        evaluations: names of those that the model takes part in. Default: all, or the first one where an actor or a policy acts.
    """

    label: str = ""
    actor: dict[str, Any] | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    evaluations: Annotated[tuple[str, ...], MinLen(1)] | None = None


@dataclass(frozen=True)
class ModelChoice:
    """A world model or a policy, and how it acts.

    Attributes:
        label: name in tables.
        train: its settings, except for seed and fraction.
        plan: how it acts, by the name of each evaluation that it takes part in; None: in all, as they are.
    """

    label: str
    train: TrainOptions
    actor: ActorOptions | None = None
    plan: Mapping[str, PlanOptions] | None = None

    @property
    def plans(self) -> bool:
        """Whether it acts by planning."""
        return self.actor is None and issubclass(MODELS.get(self.train.model), WorldModel)

    def options(self, evaluation: Evaluation) -> PlanOptions | None:
        """Return all settings of an evaluation of the model; None where it does not take part."""
        task = evaluation.options
        if self.plan is None:
            return task
        if (how := self.plan.get(evaluation.name)) is None:
            return None
        shared = {name: getattr(task, name) for name in SHARED}
        if task.goals in ("dataset", "random-action") or task.judge_columns:
            # Goals that follow the start by so many env steps must not depend on the model's horizon.
            shared["goal_steps"] = task.goal_steps or task.horizon * self.train.frameskip
        return replace(how, **shared)

    def acts_by(self, evaluations: tuple[Evaluation, ...]) -> str:
        """Describe how it acts in the first evaluation that it takes part in."""
        if self.actor is not None:
            return "actor"
        if not self.plans:
            return "policy"
        known = [options for plan in evaluations if (options := self.options(plan))]
        return f"{known[0].solver}, horizon {known[0].horizon}" if known else "-"


def sees_no_frame(policy: str) -> bool:
    """Return whether a registered policy acts without frames, as baselines do; raises UserError for an unknown name."""
    return getattr(PLAN_POLICIES.get(policy), "reads", "frames") != "frames"
