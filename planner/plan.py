"""One evaluation from a run to its report, as `wmplan` and `wmcache.plan` make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.common.video import ffmpeg
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions, default_out, refuse_other_results
from wmcache.planner.report import write_report


@dataclass(frozen=True)
class PlanResult:
    """A finished evaluation.

    Attributes:
        path: its folder.
        values: the content of `results.json`.
    """

    path: Path
    values: dict[str, Any]

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def episodes(self) -> int:
        """How many episodes were planned."""
        return int(self.values["episodes"])

    @property
    def success_rate(self) -> float:
        """Share of the episodes that reached the goal; raises UserError where episodes are judged by their return."""
        return float(self._judged("success_rate"))

    @property
    def success_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `success_rate`; raises as that does."""
        low, high = self._judged("ci95")
        return float(low), float(high)

    @property
    def mean_return(self) -> float:
        """Mean sum of an episode's rewards; raises UserError where episodes have a goal."""
        if "return" not in self.values:
            raise UserError(f"{self.path} is judged by its goals, and has no return; read success_rate")
        return float(self.values["return"]["mean"])

    def _judged(self, name: str) -> Any:
        if name not in self.values:
            raise UserError(f"{self.path} is judged by its return, and has no {name}; read mean_return")
        return self.values[name]


def plan_run(
    run: Path,
    options: PlanOptions,
    *,
    command: str,
    protocol: str | None = None,
    out: Path | None = None,
    cluster: str = "local:1",
    weights: Path | None = None,
    cache: Sequence[AnyPath] = (),
    untrained: bool = False,
    solver_given: bool = False,
) -> PlanResult:
    """Act with a run or a policy, judge it, and write its report.

    Args:
        command: what the report prints as the origin of its figures.
        protocol: whose values `options` has; it names the default folder.
        out: folder of the results; None takes the default one, see `default_out`.
        weights, cache: as for `EvalContext`.
        untrained: also plan with random weights, as a baseline.
        solver_given: refuse to replace `options.solver` by the one of the data's actions.
    """
    ffmpeg()  # the report has videos; a missing program is reported before any work
    untrained = untrained or "untrained" in options.baselines.split(",")
    context, given = EvalContext(run, options, weights=weights, cache=cache), options.solver
    options = context.settled(options)
    if solver_given and given != options.solver:
        raise UserError(f"--solver {given}: the actions of {run} are one-hot; plan with --solver {options.solver}")
    out = out or default_out(run, protocol, options, next(iter(context.success.thresholds), None))
    refuse_other_results(out, options)
    episodes, results = evaluate(context, options, out, cluster)
    if untrained:
        random_model = EvalContext(run, options, weights=weights, cache=cache, untrained=True)
        found = evaluate(random_model, options, out, cluster)[1]
        results["baselines"]["untrained"] = found["return" if "return" in found else "by_threshold"]
    return PlanResult(out, write_report(out, run, context, episodes, {"protocol": protocol, **results}, command))
