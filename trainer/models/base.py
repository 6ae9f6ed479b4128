"""What every world model is to the trainer and to the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from wmcache.common.schema import Size


@dataclass(frozen=True)
class DataShape:
    """What a model must know of the data, beside its own options.

    Attributes:
        tokens: N, tokens of a frame.
        token_dim: D.
        proprio_dim: P; 4 for PointMaze (x, y, vx, vy).
        action_dim: f * A, the f env actions of a model step; 10 at frameskip 5.
        history: H, context frames.
        columns: of the token grid, which has N / columns rows.
    """

    tokens: Size
    token_dim: Size
    proprio_dim: Size
    action_dim: Size
    history: Annotated[int, Field(gt=0, le=1024)]
    columns: Size = 1


@runtime_checkable
class WorldModel(Protocol):
    """An action-conditioned predictor of latents. Latents and actions in and out are in the store's own units."""

    shape: DataShape

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        """Training loss.

        Args:
            batch: tokens [B, T, N, D], proprio [B, T, P], action [B, T, f * A], with T = H + 1 (see `Windows.batch`).
            pool: side of the squares of the token grid that are averaged first; 1 leaves the tokens as they are.

        Returns:
            `loss` to descend, and parts of it to log; scalars.
        """
        ...

    def proprio_code(self, proprio: Tensor) -> Tensor:
        """What the model makes of proprio, [B, T, P] -> [B, T, Q]: the terms in which `rollout` speaks of it. Q is 0 where it sees none."""
        ...

    def rollout(
        self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Imagine what actions lead to.

        Args:
            tokens: [B, n, N, D], n >= 1 observed frames.
            proprio: [B, n, P] of those frames.
            actions: [B, n - 1 + t, f * A]; action k leads from frame k to frame k + 1. Or [B, S, n - 1 + t, f * A], S futures of each
                beginning, whose first n - 1 actions, the past, are the same.
            context: frames, observed or imagined, that a step sees; None means all of the model's history.

        Returns:
            Latents [B, t, N, D] and proprio codes [B, t, Q] of the t frames after the observed ones; [B, S, t, …] for S futures.
        """
        ...
