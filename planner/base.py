"""The contracts of policies and solvers, and what solvers that sample candidates share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, option

Cost = Callable[[Tensor], Tensor]
"""Actions [E, S, T, A] -> cost [E, S]."""
Reads = Literal["frames", "state", "nothing"]


@dataclass(frozen=True)
class Observation:
    """What a policy sees of E episodes.

    Attributes:
        image: uint8 [E, S, S, 3].
        proprio: float32 [E, P].
        earlier: the frame the encoder's lag before, for encoders of frame pairs.
        state: float64 [E, states], only for policies that read it.
    """

    image: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    earlier: NDArray[np.uint8] | None = None
    state: NDArray[np.float64] | None = None


class Policy(Protocol):
    """Acts in E episodes at once; it never receives a success.

    Attributes:
        needs_goal: it cannot act where success is a return; policies without the attribute do.
        draws: it can draw its actions; policies without the attribute do not.
        reads: `frames`, `nothing`, or `state`. A policy that reads the simulator's state is a reference, and is marked so in results.
        seconds: spent on encoding and deciding. encoder_frames, decisions: counts over all episodes.
    """

    reads: ClassVar[Reads]
    seconds: float
    encoder_frames: int
    decisions: int

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """Begin new episodes: with a goal and a random generator each, so that results do not depend on the batch.

        Where success is a return the goal has no pixels.
        """

    def observe(self, observation: Observation) -> None:
        """Receive a frame that the next decision starts from, the newest last."""

    def act(self) -> Tensor:
        """Return the model steps to execute next, [E, k, f * A] in env units."""


class Solver(Protocol):
    """Finds actions of low cost. A solver is a frozen dataclass whose fields are its options.

    A field named `frameskip` is set to the run's, unless the user sets it.

    Attributes:
        discrete: it searches among one-hot actions; solvers without the attribute do not.
        differentiates: costs must carry gradients to the actions. Then the solver must not be called in `torch.inference_mode`, and it
            evaluates costs of actions that require grad, with autograd enabled.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    differentiates: ClassVar[bool]

    @property
    def evaluations(self) -> int:
        """Count the candidates that one call evaluates per episode."""

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return actions [E, T, A] in [-1, 1] of low cost, from the first guess `start` [E, T, A]; -1 and 1 are the env's bounds.

        Each episode has a generator on the CPU, so that its result does not depend on the other episodes of the batch.
        """


@runtime_checkable
class TakesProposals(Protocol):
    """A solver some of whose candidates a model's policy proposes, see `Proposes`."""

    @property
    def proposals(self) -> int:
        """Count them; 0 for none."""

    def search(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator], proposals: Tensor) -> Tensor:
        """Act as `Solver`, with the candidates [E, proposals, T, A]; they may be beyond the bounds."""


def normal(generators: Sequence[torch.Generator], samples: int, start: Tensor) -> Tensor:
    """Draw standard normal noise [E, samples, T, A] on the device of `start` [E, T, A]; the same numbers on every device."""
    drawn = [torch.randn(samples, *start.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(start.device)


def around(
    mean: Tensor, deviation: Tensor, samples: int, generators: Sequence[torch.Generator], largest: float = 1.0
) -> Tensor:
    """Draw candidates [E, samples, T, A] around `mean` [E, T, A], clipped to [-`largest`, `largest`]; the first is the mean."""
    actions = mean[:, None] + deviation[:, None] * normal(generators, samples, mean)
    actions[:, 0] = mean
    return actions.clamp(-largest, largest)


@dataclass(frozen=True)
class Population:
    """A solver that draws candidates, scores them, and fits what it draws from to the best, the elites."""

    differentiates: ClassVar[bool] = False

    # The order is that of the parts of a results folder's name.
    samples: Positive = option(64, "Candidates in each iteration; DINO-WM has 300.", group="Solver")
    elites: Annotated[int, Ge(2)] = option(6, "Best candidates of each iteration; DINO-WM has 30.")
    iterations: Positive = option(5, "Iterations of the search; DINO-WM has 10.")

    def __post_init__(self) -> None:
        """Raise UserError for more elites than samples."""
        self.require_at_most("elites", "samples", self.samples)

    def require_at_most(self, name: str, limit_name: str, limit: float) -> None:
        """Raise UserError where an option is above a limit."""
        if (value := getattr(self, name)) > limit:
            solver = type(self).__name__.lower()
            raise UserError(f"solver {solver}: {name} is {value}; it must be at most {limit_name}, {limit}")

    @property
    def evaluations(self) -> int:
        """See `Solver`."""
        return self.samples * self.iterations


@dataclass(frozen=True)
class Sampling(Population):
    """A solver that draws candidates around a mean, with a deviation."""

    sigma: Annotated[float, Gt(0)] = option(
        0.4, "First standard deviation of the candidates, where env actions are in [-1, 1]."
    )
