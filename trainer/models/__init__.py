"""World models and policies: a file or a folder for each, registered by `@MODELS.register("name")`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.trainer.models.trainable import DataShape as DataShape
from wmcache.trainer.models.trainable import Trainable as Trainable

VALIDATION_WINDOWS, BATCH = 256, 64
Belief = Mapping[str, Tensor]
"""What a model remembers of E episodes. Each tensor is [E, …], so a belief is cut and repeated along its episodes."""
Generators = Sequence[torch.Generator] | torch.Generator
"""Of noise: one on the CPU for each episode, whose noise is then the same in any batch; or one for all, on any device."""


@dataclass(frozen=True)
class Imagined:
    """What a model imagines of E episodes, S futures, T model steps; latents and reward in the store's units.

    Attributes:
        latents: [E, S, T, N, D].
        proprio: [E, S, T, Q], embedded as `WorldModel.encode_proprio` does.
        reward: [E, S, T], of a model that predicts it.
        continues: [E, S, T], the probability that the episode goes on, of a model that predicts it; times the discount, where rewards have
            one.
        value: [E, S, 1], the return after the last step, of a model that predicts it.
        state: [E, S, T, …], what `WorldModel.cost` reads, of a model that scores steps in a space of its own.
        patches: [E, K], those of a frame that the N = K latents are, see `KeepsPatches`; None: all.
    """

    latents: Tensor
    proprio: Tensor
    reward: Tensor | None = None
    continues: Tensor | None = None
    value: Tensor | None = None
    state: Tensor | None = None
    patches: Tensor | None = None

    def last(self) -> Imagined:
        """Return the last model step alone."""
        known = {name: value for name, value in vars(self).items() if value is not None and name != "patches"}
        return replace(self, **{name: value[:, :, -1:] for name, value in known.items()})


class WorldModel(Trainable):
    """An action-conditioned predictor of latents. `loss`, `observe` and `imagine` have no default.

    Attributes:
        context: frames, observed or imagined, that an imagined step sees; the history, unless a planner lowers it.
        observed: newest frames that a belief keeps; the history, unless a planner lowers it.
        temperature: of what `imagine` draws, where the model `draws`; the run's, unless a planner changes it. 0: nothing is drawn.
    """

    recurrent: ClassVar[bool] = False  # remembers every frame of an episode, so a planner must observe each model step
    draws: ClassVar[bool] = False  # whether `imagine` uses its generators
    proprio_size: int = 0  # Q of `encode_proprio`: P, or 0 for a model that sees no proprio
    takes_actions: bool = True  # else it predicts videos, and cannot plan
    temperature: float = 0.0

    def __init__(self, shape: DataShape, options: Any, statistics: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        super().__init__(shape, options, statistics)
        self.context = self.observed = shape.history

    @property
    def blind(self) -> bool:
        """See `Trainable.blind`."""
        no_proprio = torch.zeros(1, 1, self.shape.proprio_dim, device=next(self.parameters()).device)
        return not self.encode_proprio(no_proprio).numel()

    @property
    def has_latents(self) -> bool:
        """Whether imagined frames have latents; else they have proprio alone, and `cost` is 0."""
        return True

    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Measure the model on held-out windows of one observed frame and some that follow; they have the model's `extras`.

        Default: `skill_k` for each model step k, see `skills`. A figure that is not defined is None.
        """
        found = skills(*rollout_errors(self, windows, device, dtype))
        return {f"skill_{k}": value for k, value in enumerate(found, start=1)}

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """Embed proprio as `imagine` predicts it, [B, T, P] -> [B, T, Q]; default: standardised, of `proprio_size` values."""
        if not self.proprio_size:
            return proprio[..., :0]
        return ((proprio - self.proprio_mean) / self.proprio_std)[..., : self.proprio_size]

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
        """Score imagined frames against goals [E, N, D] of the same patches, [E, S, T]; default: `latent_distance`."""
        return latent_distance(imagined, goal)


def latent_distance(imagined: Imagined, goal: Tensor) -> Tensor:
    """Compute the mean squared difference of imagined latents from goals [E, N, D], [E, S, T]."""
    return (imagined.latents - goal[:, None, None]).square_().mean((3, 4))


def take_patches(frames: Tensor, patches: Tensor) -> Tensor:
    """Select patches [E, K] of frames [E, …, N, D], [E, …, K, D]."""
    index = patches.view(len(patches), *[1] * (frames.ndim - 3), -1, 1)
    return frames.take_along_dim(index, -2)


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
    """Compute the MSE of rollouts from one observed frame, and of copying that frame, float64 [model steps] each.

    It is that of latents in the store's units, of a model without latents that of proprio as `encode_proprio` gives it.
    """
    model.eval()
    steps = windows.predict
    error, copying = torch.zeros(2, steps, dtype=torch.float64)
    chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
    for part in np.array_split(chosen, max(1, len(chosen) // BATCH)):
        data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        tokens = data["tokens"].float()
        with autocast(device, dtype):
            found = rollout(model, tokens[:, :1], data["proprio"][:, :1], data["action"][:, :steps])
        if model.has_latents:
            imagined, real = found.latents[:, 0], tokens
        else:
            imagined, real = found.proprio[:, 0, ..., None], model.encode_proprio(data["proprio"])[..., None]
        error += (imagined - real[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
        copying += (real[:, :1] - real[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
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


@runtime_checkable
class Dreams(Protocol):
    """A world model that can be stepped without frames."""

    def step(self, belief: Belief, action: Tensor, generators: Generators | None = None) -> tuple[Belief, Imagined]:
        """Imagine one model step.

        Args:
            belief: of E episodes, with at least one frame.
            action: [E, f * A] in env units.
            generators: of each episode, or of all; None: imagine without noise.

        Returns:
            The belief after the imagined frame, and that frame, with S = T = 1.
        """

    def features(self, belief: Belief) -> dict[str, Tensor]:
        """Return what a policy may see of a belief, [E, …] each: `latent`, the newest frame in its units; `hidden`; `cell` if any."""


@runtime_checkable
class KeepsPatches(Protocol):
    """A world model that can imagine some patches of a frame without the others (Sparse Imagination, arXiv 2506.01392)."""

    def keep(self, belief: Belief, patches: Tensor) -> Belief:
        """Return the belief from which `imagine` imagines only these patches of each episode, int64 [E, K], in this order.

        The model sees none of the others, in observed frames neither.
        """


@runtime_checkable
class Proposes(Protocol):
    """A world model that may have a policy, whose actions a solver can try."""

    @property
    def has_policy(self) -> bool:
        """Whether it has one."""

    def propose(
        self, belief: Belief, generators: Sequence[torch.Generator], *, goal: Tensor | None, horizon: int, count: int
    ) -> Tensor:
        """Draw sequences of the policy's actions, [E, count, horizon, f * A] in env units; they may be beyond the bounds.

        Args:
            belief: of E episodes, with at least one frame.
            generators: one on the CPU for each episode.
            goal: [E, N, D]; None where plans maximise rewards of the data.
        """


MODELS: Registry[type[Trainable]] = Registry("model", package=__name__, group="wmcache.models")


def models_that_dream() -> list[str]:
    """List the names of models that can be stepped without frames."""
    return [name for name in MODELS if issubclass(MODELS.get(name), Dreams)]


def dreaming_models() -> str:
    """List the names of models that can be stepped without frames, as errors show them."""
    return " or ".join(models_that_dream())


def read_options(name: str, options: Mapping[str, Any]) -> Any:
    """Make a model's options from some of their values; raises UserError for an unknown model or option, or values that do not fit."""
    return parse_options(MODELS.get(name).Options, dict(options), f"model {name}")


def build(name: str, shape: DataShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Trainable:
    """Make a new model, see `Trainable`; raises UserError for an unknown name or option, or sizes that do not fit."""
    return MODELS.get(name)(shape, read_options(name, options), statistics)
