"""An actor that was trained in a world model's imagination acts: its most probable actions, or actions that it draws."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from wmcache.planner.belief import Decide, FolderPolicy
from wmcache.planner.policies import PLAN_POLICIES
from wmcache.trainer.models import Dreams


@PLAN_POLICIES.register("dream-actor")
class DreamActorPolicy(FolderPolicy):
    """A `Policy`, of the folder that `--policy` names."""

    noun = "an actor"
    program = "wmtrain actor"

    @classmethod
    def load(
        cls,
        folder: Path,
        run: Path,
        model: Dreams,  # noqa: ARG003
        bounds: tuple[Tensor, Tensor],
        frameskip: int,  # noqa: ARG003
    ) -> Decide:
        """See `FolderPolicy.load`."""
        from wmcache.trainer.actor import load_actor

        inputs, network = load_actor(folder, run, bounds[0].device)
        actor = network.actor
        return Decide(
            inputs,
            lambda seen: actor.act([seen[name] for name in inputs]),
            lambda seen, generators: actor.act([seen[name] for name in inputs], generators),
        )
