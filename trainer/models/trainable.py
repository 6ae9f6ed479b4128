"""The contract of everything that `wmtrain` trains on cached latents: world models and policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Goals, Windows
from wmcache.common.errors import UserError
from wmcache.common.schema import Size

MIN_STD = 1e-6  # standard deviation of a channel that never changes
SHIFT = "shift_"
"""Before the name of what it is added to, in batches of adversarial training."""


@dataclass(frozen=True)
class DataShape:
    """Sizes of the data: N, D, P, f * A, H context frames, and the columns of the token grid, which has N / columns rows.

    Attributes:
        has_reward, has_end: whether batches have `reward` and `terminated`.
    """

    tokens: Size
    token_dim: Size
    proprio_dim: Annotated[int, Field(ge=0, le=2**16)]
    action_dim: Annotated[int, Field(ge=0, le=2**16)]
    history: Annotated[int, Field(gt=0, le=1024)]
    columns: Size = 1
    has_reward: bool = False
    has_end: bool = False


def without_proprio(options: Any) -> Any:
    """Return a model's options for data without proprio."""
    return replace(options, proprio="none") if hasattr(options, "proprio") else options


def shifted(batch: Mapping[str, Tensor], name: str, value: Tensor | None = None) -> Tensor:
    """Return `tokens`, `proprio` or `action` of a batch, or a `value` in its place, as the model sees it: with the shift, if any.

    What the model has to predict has no shift.
    """
    value = batch[name] if value is None else value
    shift = batch.get(SHIFT + name)
    return value if shift is None else value + shift


class Trainable(nn.Module, ABC):
    """A network that learns from windows of cached latents. Latents and actions are in the store's units."""

    Options: ClassVar[type[Any]]  # dataclass, whose fields become options of the command line
    stages: ClassVar[tuple[str, ...]] = ()  # empty for a model that is trained in one go
    plannable_after: ClassVar[str] = ""  # the first stage after which a planner can use the model
    pools: ClassVar[bool] = False  # whether `loss` can average the token grid (`--pool`)
    shifts: ClassVar[bool] = (
        False  # whether `loss` adds the shifts of a batch to what the model sees (`--perturb-tokens`)
    )
    tokens_mean: Tensor
    tokens_std: Tensor
    proprio_mean: Tensor
    proprio_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    stage: Tensor  # of a model with stages: number of the one that is or was trained last, from 1; 0 before the first

    def __init__(self, shape: DataShape, options: Any, statistics: Mapping[str, Tensor]) -> None:
        """Keep `statistics`, `{tokens,proprio,action}_{mean,std}`, as float32 buffers, so that a planner opens no store."""
        super().__init__()
        self.shape, self.options = shape, options
        for name, value in statistics.items():
            self.register_buffer(name, value.float().clamp_min(MIN_STD) if name.endswith("std") else value.float())
        if self.stages:
            self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: Any) -> Any:  # noqa: ARG003
        """Fill in what depends on the data; raises UserError where the model cannot be trained on this store.

        Default: an option `proprio` becomes `none` where the store has none.
        """
        return without_proprio(options) if store.proprio is None else options

    @classmethod
    def needs_actions(cls, options: Any) -> bool:  # noqa: ARG003
        """Return whether the model can be trained on stores with actions alone; default: yes."""
        return True

    @classmethod
    def window(cls, options: Any, history: int) -> int:  # noqa: ARG003
        """Return the frames of a training window, T; default: the history and one that follows."""
        return history + 1

    @classmethod
    def whole_episodes(cls, options: Any) -> bool:  # noqa: ARG003
        """Return whether windows are whole episodes of at most `window` frames, padded, and batches have `weight`; default: no."""
        return False

    @classmethod
    def extras(cls, store: TokenStore, windows: Windows, options: Any) -> dict[str, TokenStore]:  # noqa: ARG003
        """Open stores whose rows batches have beside tokens (`Windows.with_extras`); raises UserError where one is missing."""
        return {}

    @classmethod
    def goals(cls, options: Any) -> Goals | None:  # noqa: ARG003
        """Return how a batch's goal frames are drawn; None, the default, for a batch without goals."""
        return None

    @classmethod
    def may_change_after(cls, stage: str) -> frozenset[str]:  # noqa: ARG003
        """Return the options that what was trained up to this stage does not depend on."""
        return frozenset()

    @classmethod
    def stage_before_planning(cls, reached: str) -> str:
        """Return the stage to train next where the model cannot plan after stage `reached` ("": none), else ""."""
        done = cls.stage_number(reached)
        return cls.stages[done] if done < cls.stage_number(cls.plannable_after) else ""

    @classmethod
    def stage_number(cls, stage: str) -> int:
        """Return the position of a stage, from 1; 0 for none."""
        return cls.stages.index(stage) + 1 if stage in cls.stages else 0

    @property
    def stage_name(self) -> str:
        """Name of the stage that is or was trained last; "" for none."""
        number = int(self.stage) if self.stages else 0
        return self.stages[number - 1] if number else ""

    def initialise(self, given: Any) -> None:
        """Load what a new run takes from other runs; `given` are the options before `configure`. Default: nothing."""

    def trained_encoder(self, store: TokenStore) -> tuple[dict[str, Tensor], dict[str, str]] | None:  # noqa: ARG002
        """Return tensors and header of the weights file of an encoder on the store's that the model has trained; default: none."""
        return None

    def begin(self, stage: str) -> None:
        """Prepare to train a stage. A model with stages also freezes here what the stage does not train."""
        self.stage.fill_(self.stage_number(stage))

    def check_pool(self, pool: int) -> None:
        """Raise UserError where `loss` cannot average squares of `pool` x `pool` tokens."""
        rows, columns = self.shape.tokens // self.shape.columns, self.shape.columns
        if (pool > 1 and not self.pools) or rows % pool or columns % pool:
            raise UserError(f"--pool {pool} suits no {rows} x {columns} tokens of this model; choose 1, or divide both")

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        """Compute the training loss, of the present stage where there are stages.

        Args:
            batch: tokens [B, T, N, D], proprio [B, T, P], action [B, T, f * A], and a row of each of `extras` [B, T, …]; T of `window`.
                With `whole_episodes` also weight [B, T], 0 for padding, see `Windows.steps`.
                Where the shape has them also reward [B, T] and terminated [B, T], of the env steps from each frame to the next. With
                `goals` also goal_tokens [B, N, D] and goal_steps [B], see `Windows.batch`. Where the model `shifts` also shift_tokens,
                shift_proprio or shift_action, float32: see `shifted`.
            pool: side of the squares of the token grid to average first; above 1 only where `check_pool` allows it.

        Returns:
            `loss`, and parts of it to log; scalars.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups for the optimiser; keys beside `params` override its settings. Default: all trainable parameters in one group."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def after_step(self) -> None:
        """Update what no gradient moves, such as target networks; called after each optimiser step."""

    @property
    def blind(self) -> bool:
        """Whether the model sees no proprio."""
        return True

    @abstractmethod
    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Measure the model on held-out windows, with the model's `extras` and `goals`. A figure that is not defined is None."""
