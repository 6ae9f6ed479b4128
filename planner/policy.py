"""The policy that plans: MPC from the newest live frames, of which only those that a plan starts from are encoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.planner.context import EvalContext
from wmcache.planner.objective import GoalDistance
from wmcache.planner.options import PlanOptions


@dataclass(frozen=True)
class Observation:
    """What a policy sees of E episodes; never a state. `earlier` is the frame the encoder's lag before, for encoders of frame pairs."""

    image: NDArray[np.uint8]  # [E, S, S, 3]
    proprio: NDArray[np.float32]  # [E, P]
    earlier: NDArray[np.uint8] | None = None


class MpcPolicy:
    """Plans by MPC and executes the first model steps of each plan; counts as `Episodes` does."""

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Call `reset` before the first plan."""
        self.context, self.options = context, options
        self.seconds, self.encoder_frames, self.replans = 0.0, 0, 0

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """Begin new episodes: with a goal and a random generator each."""
        begun = time.perf_counter()
        self._goal_images, self._generators = goal.image, generators
        self._mpc = self.context.make_mpc(self.options, self._encode(goal), goal.proprio)
        self._plan: Tensor | None = None
        self._frames: list[tuple[Tensor, Tensor]] = []
        self._executed: list[Tensor] = []
        self.seconds += time.perf_counter() - begun

    def observe(self, observation: Observation) -> None:
        """Encode a frame that the next plan starts from, the newest last."""
        begun = time.perf_counter()
        proprio = torch.from_numpy(observation.proprio).to(self.context.device)
        self._frames.append((self._encode(observation), proprio))
        self._images = observation.image
        self.seconds += time.perf_counter() - begun

    def act(self) -> Tensor:
        """Plan from the newest observed frames; returns the model steps to execute, [E, execute, f * A]."""
        begun = time.perf_counter()
        self._frames = self._frames[-self.context.observed :]
        self._executed = self._executed[len(self._executed) - len(self._frames) + 1 :]
        tokens, proprio = (torch.stack(parts, 1) for parts in zip(*self._frames, strict=True))
        past = torch.stack(self._executed, 1) if self._executed else None
        if self.options.mask:
            assert isinstance(self._mpc.objective, GoalDistance)
            mask = self.context.mask(self._images, self._goal_images)
            self._mpc.objective = replace(self._mpc.objective, mask=mask)
        plan = self._mpc.plan(tokens, proprio, self._plan, self._generators, past)
        actions = plan[:, : self.options.execute]
        self._executed += actions.unbind(1)
        self._plan = self._mpc.shift(plan, self.options.execute)
        self.replans += len(actions)
        self.seconds += time.perf_counter() - begun
        return actions

    def _encode(self, observation: Observation) -> Tensor:
        image, earlier = observation.image, observation.earlier
        self.encoder_frames += len(image)
        return self.context.encoder(image if earlier is None else np.stack([earlier, image], 1))
