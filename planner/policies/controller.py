"""A linear controller that CMA-ES has trained acts: one step of the world model's memory and one matrix for each model step."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from wmcache.planner.belief import Decide, FolderPolicy
from wmcache.planner.policies import PLAN_POLICIES
from wmcache.trainer.models import Dreams


@PLAN_POLICIES.register("controller")
class ControllerPolicy(FolderPolicy):
    """A `Policy`, of the folder that `--policy` names."""

    noun = "a controller"
    program = "wmcache controller"

    @classmethod
    def load(cls, folder: Path, run: Path, model: Dreams, bounds: tuple[Tensor, Tensor], frameskip: int) -> Decide:
        """See `FolderPolicy.load`."""
        from wmcache.planner.controllers.folder import load_linear

        linear, solution = load_linear(folder, run, model, bounds, frameskip)
        return linear.decide(solution[None].to(bounds[0].device))
