"""A linear controller that CMA-ES has trained acts: one step of the world model's memory and one matrix for each model step."""

from __future__ import annotations

from pathlib import Path

from wmcache.common.errors import UserError
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.linear import LinearPolicy
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("controller")
class ControllerPolicy(LinearPolicy):
    """A `Policy`, of the folder that `--policy` names."""

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Raise UserError for a folder of another model, or a decision of several model steps."""
        from wmcache.planner.controllers.folder import load_controller

        if options.policy is None or options.policy == "controller":
            raise UserError(
                "--policy controller needs its folder; write --policy FOLDER, as wmcache controller names it"
            )
        if options.execute > 1:
            raise UserError(f"--execute {options.execute}: a controller decides after each model step; leave it out")
        linear, solution = load_controller(Path(options.policy), context)
        super().__init__(context, linear, solution[None])
