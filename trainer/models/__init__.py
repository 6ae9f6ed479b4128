"""World models: a file or a folder for each, registered by `@MODELS.register("name")`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.common.schema import Size

VALIDATION_WINDOWS, BATCH = 256, 64
Belief = Mapping[str, Tensor]
"""What a model remembers of E episodes. Each tensor is [E, …], so a belief is cut and repeated along its episodes."""


@dataclass(frozen=True)
class DataShape:
    """Sizes of the data: N, D, P, f * A, H context frames, and the columns of the token grid, which has N / columns rows.

    Attributes:
        has_reward, has_end: whether batches have `reward` and `terminated`.
    """

    tokens: Size
    token_dim: Size
    proprio_dim: Annotated[int, Field(ge=0, le=2**16)]
    action_dim: Size
    history: Annotated[int, Field(gt=0, le=1024)]
    columns: Size = 1
    has_reward: bool = False
    has_end: bool = False


@dataclass(frozen=True)
class Imagined:
    """What a model imagines of E episodes, S futures, T model steps; latents and reward in the store's units.

    Attributes:
        latents: [E, S, T, N, D].
        proprio: [E, S, T, Q], embedded as `WorldModel.encode_proprio` does.
        reward: [E, S, T], of a model that predicts it.
        continues: [E, S, T], the probability that the episode goes on, of a model that predicts it.
    """

    latents: Tensor
    proprio: Tensor
    reward: Tensor | None = None
    continues: Tensor | None = None

    def last(self) -> Imagined:
        """Return the last model step alone."""
        values = {name: value[:, :, -1:] for name, value in vars(self).items() if value is not None}
        return replace(self, **values)


class WorldModel(nn.Module, ABC):
    """An action-conditioned predictor of latents. Latents and actions are in the store's units.

    `loss`, `observe` and `imagine` have no default.

    Attributes:
        context: frames, observed or imagined, that an imagined step sees; the history, unless a planner lowers it.
        observed: newest frames that a belief keeps; the history, unless a planner lowers it.
    """

    Options: ClassVar[type[Any]]  # dataclass, whose fields become options of the command line
    stages: ClassVar[tuple[str, ...]] = ()  # empty for a model that is trained in one go
    plannable_after: ClassVar[str] = ""  # the first stage after which `imagine` is meaningful
    pools: ClassVar[bool] = False  # whether `loss` can average the token grid (`--pool`)
    recurrent: ClassVar[bool] = False  # remembers every frame of an episode, so a planner must observe each model step
    draws: ClassVar[bool] = False  # whether `imagine` uses its generators
    stage: Tensor  # of a model with stages: number of the one that is or was trained last, from 1; 0 before the first

    def __init__(self, shape: DataShape, options: Any, statistics: Mapping[str, Tensor]) -> None:
        """Keep `{tokens,proprio,action}_{mean,std}`, float32 vectors, as buffers, so that a planner opens no store."""
        super().__init__()
        self.shape, self.options = shape, options
        self.context = self.observed = shape.history
        for name, value in statistics.items():
            self.register_buffer(name, value)
        if self.stages:
            self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: Any) -> Any:  # noqa: ARG003
        """Fill in what depends on the data; raises UserError where the model cannot be trained on this store."""
        return options

    @classmethod
    def window(cls, options: Any, history: int) -> int:  # noqa: ARG003
        """Return the frames of a training window."""
        return history + 1

    @classmethod
    def extras(cls, store: TokenStore, windows: Windows, options: Any) -> dict[str, TokenStore]:  # noqa: ARG003
        """Open stores whose rows batches have beside tokens (`Windows.with_extras`); raises UserError where one is missing."""
        return {}

    @classmethod
    def may_change_after(cls, stage: str) -> frozenset[str]:  # noqa: ARG003
        """Return the options that what was trained up to this stage does not depend on."""
        return frozenset()

    @classmethod
    def stage_before_planning(cls, reached: str) -> str:
        """Return the stage to train next where `imagine` is not meaningful after stage `reached` ("": none), else ""."""
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
                Where the shape has them also reward [B, T] and terminated [B, T], of the env steps from each frame to the next.
            pool: side of the squares of the token grid to average first; above 1 only where `check_pool` allows it.

        Returns:
            `loss`, and parts of it to log; scalars.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups for the optimiser; keys beside `params` override its settings. Default: all trainable parameters in one group."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def after_step(self) -> None:
        """Update what no gradient moves, such as target networks; called after each optimiser step."""

    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Measure the model on held-out windows of one observed frame and some that follow; they have the model's `extras`.

        Default: `skill_k` for each model step k, see `skills`. A figure that is not defined is None.
        """
        found = skills(*rollout_errors(self, windows, device, dtype))
        return {f"skill_{k}": value for k, value in enumerate(found, start=1)}

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """Embed proprio as `imagine` predicts it, [B, T, P] -> [B, T, Q]. Q is 0 for a model that sees no proprio, the default."""
        return proprio[..., :0]

    def start(self, count: int) -> Belief:  # noqa: ARG002
        """Return the belief of so many episodes before their first frame; default: nothing."""
        return {}

    @abstractmethod
    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """Return the belief after one more frame.

        Args:
            tokens: [E, N, D]. proprio: [E, P].
            previous_action: [E, f * A], which led to this frame; None for the first frame.
        """

    @abstractmethod
    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        """Imagine what actions lead to.

        Args:
            belief: of E episodes, with at least one frame.
            actions: [E, S, T, f * A], S futures of each episode.
            generators: one on the CPU for each episode, whose futures all see the same noise; None: imagine without noise.
        """

    def cost(self, imagined: Imagined, goal: Tensor) -> Tensor:
        """Score imagined frames against goals [E, N, D], [E, S, T]; default: `latent_distance`."""
        return latent_distance(imagined, goal)


def latent_distance(imagined: Imagined, goal: Tensor) -> Tensor:
    """Compute the mean squared difference of imagined latents from goals [E, N, D], [E, S, T]."""
    return (imagined.latents - goal[:, None, None]).square().mean((3, 4))


def rollout(model: WorldModel, tokens: Tensor, proprio: Tensor, actions: Tensor) -> Imagined:
    """Observe n frames, then imagine one future, without noise.

    Args:
        tokens: [B, n, N, D], n >= 1. proprio: [B, n, P].
        actions: [B, n - 1 + T, f * A]; action k leads from frame k to frame k + 1.
    """
    belief, observed = model.start(len(tokens)), tokens.shape[1]
    for t in range(observed):
        belief = model.observe(belief, tokens[:, t], proprio[:, t], actions[:, t - 1] if t else None)
    return model.imagine(belief, actions[:, None, observed - 1 :])


@torch.inference_mode()
def rollout_errors(
    model: WorldModel, windows: Windows, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the MSE of rollouts from one observed frame, and of copying that frame, float64 [model steps] each, in the store's units."""
    model.eval()
    steps = windows.predict
    error, copying = torch.zeros(2, steps, dtype=torch.float64)
    chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
    for part in np.array_split(chosen, max(1, len(chosen) // BATCH)):
        data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        tokens = data["tokens"].float()
        with autocast(device, dtype):
            imagined = rollout(model, tokens[:, :1], data["proprio"][:, :1], data["action"][:, :steps]).latents[:, 0]
        error += (imagined - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
        copying += (tokens[:, :1] - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
    return error / len(chosen), copying / len(chosen)


def skills(error: Tensor, copying: Tensor) -> list[float | None]:
    """Compute 1 - MSE of the rollout / MSE of copying the observed frame for each model step: 1 is perfect, 0 useless.

    None where the frames do not change, or the rollout is not finite.
    """
    values = (1 - error / copying).tolist()
    return [value if math.isfinite(value) else None for value in values]


@runtime_checkable
class Localizes(Protocol):
    """A world model that predicts which patches change, so that a picture can show it."""

    @property
    def labels_from_pixels(self) -> bool:
        """Whether what has changed is measured on frames: then a batch needs their change maps, `changes` [B, T, N, 4]."""

    def change_masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mark patches for each step of a batch, bool [B, T - 1, N]: those that `changes`, are `computed` and are `likely to change`."""


MODELS: Registry[type[WorldModel]] = Registry("world model", package=__name__, group="wmcache.models")


def read_options(name: str, options: Mapping[str, Any]) -> Any:
    """Make a model's options from some of their values; raises UserError for an unknown model or option, or values that do not fit."""
    return parse_options(MODELS.get(name).Options, dict(options), f"world model {name}")


def build(name: str, shape: DataShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> WorldModel:
    """Make a new model, see `WorldModel`; raises UserError for an unknown name or option, or sizes that do not fit."""
    return MODELS.get(name)(shape, read_options(name, options), statistics)
