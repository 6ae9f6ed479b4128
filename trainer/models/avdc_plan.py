"""AVDC's plans (arXiv 2310.08576): a video from the present frame to a goal, and the actions between its frames.

A transformer denoises the frames between two frames of an episode, which are always as many model steps apart, and inverse dynamics give
the action from each frame to the next; in the paper optical flow does. Both are trained on the same windows. The policy makes a new video
for each decision, and takes its first action. All videos start from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from einops import rearrange
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.common.options import option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS
from wmcache.trainer.models.actions import BATCH, VALIDATION_WINDOWS, ActionOptions, GoalReacher
from wmcache.trainer.models.diffusion import (
    Denoise,
    Diffusion,
    Dit,
    DitSizes,
    Predict,
    SamplingSteps,
    Scale,
    fixed_noise,
    make_scheduler,
    require_sampling_steps,
)
from wmcache.trainer.models.trainable import DataShape


@dataclass(frozen=True)
class AvdcPlanOptions(ActionOptions):
    """Sizes and variants; width, depth and dropout are those of the inverse dynamics."""

    reach: Annotated[int, Ge(2), Le(256)] = option(
        2, "Model steps from a frame to the goal of its video, in training and when the policy acts."
    )
    ahead: Annotated[int, Ge(1), Le(256)] = option(
        4, "Subgoals ahead that the policy steers to; more than --reach makes it act as fast as it can."
    )
    predict: Predict = option(
        "change", "Generate the difference from frames in equal steps between start and goal, or frames (AVDC)."
    )
    scale: Scale = option(
        0.3, "Standard deviation of what is generated, in units of standardised tokens; noise is scaled by it."
    )
    video_width: Size = option(128, "Width of the transformer that generates frames.")
    video_depth: Size = option(4, "Blocks of the transformer that generates frames.")
    video_heads: Size = option(4, "Attention heads of the transformer that generates frames.")
    sampling_steps: SamplingSteps = option(2, "DDIM steps of a video; a divisor of 100.")

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        self.sizes.require_even_heads("video-")
        require_sampling_steps(self.sampling_steps)

    @property
    def sizes(self) -> DitSizes:
        """Sizes of the transformer."""
        return DitSizes(self.video_width, self.video_depth, self.video_heads)


@MODELS.register("avdc-plan")
class AvdcPlan(GoalReacher):
    """AVDC's plans, see the module. As a `GoalReacher` it is the inverse dynamics: the goal is the next frame."""

    Options = AvdcPlanOptions
    options: AvdcPlanOptions
    noise: Tensor

    def __init__(self, shape: DataShape, options: AvdcPlanOptions, statistics: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        super().__init__(shape, options, statistics, more=0)
        self.ahead = options.ahead
        between, tokens, channels = options.reach - 1, shape.tokens, shape.token_dim
        kinds = [(between * tokens, 3 * channels, channels)]
        network = Dit(kinds, 0 if self.blind else shape.proprio_dim, options.sizes)
        self.diffusion = Diffusion(network, options.sampling_steps)
        self.register_buffer("noise", fixed_noise(between, tokens, channels))

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: Any) -> Any:
        """See `Trainable.configure`."""
        make_scheduler()  # an error is raised before a run exists
        return super().configure(store, windows, options)

    @classmethod
    def window(cls, options: AvdcPlanOptions, history: int) -> int:  # noqa: ARG003
        """See `Trainable.window`: a frame, its goal, and those between them."""
        return options.reach + 1

    def after_step(self) -> None:
        """See `Trainable.after_step`."""
        self.diffusion.follow()

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002
        """Compute the errors of the video's velocities (`Diffusion.errors`), and add the MSE of standardised actions."""
        frames, proprio = self._standardise(batch["tokens"]), batch["proprio"]
        ends = frames[:, 0], frames[:, -1]
        clean = (frames[:, 1:-1] - self._base(*ends)) / self.options.scale
        video = self.diffusion.errors(clean, self._denoiser(*ends, proprio[:, 0])).mean()
        tokens = batch["tokens"]
        pairs = tokens[:, :-1], proprio[:, :-1], tokens[:, 1:]
        found = self(*(part.flatten(0, 1) for part in pairs)).float()
        wanted = (batch["action"][:, :-1].flatten(0, 1) - self.action_mean) / self.action_std
        actions = F.mse_loss(found, wanted)
        return {"loss": video + actions, "video": video.detach(), "actions": actions.detach()}

    def act(self, tokens: Tensor, proprio: Tensor, goal: Tensor) -> Tensor:
        """See `ActionModel.act`."""
        return self.decide(tokens, proprio, self.generate(tokens, proprio, goal)[:, 0], 1)

    def generate(self, tokens: Tensor, proprio: Tensor, goal: Tensor) -> Tensor:
        """Generate the frames between the newest one and a goal, [E, reach - 1, N, D]; arguments as for `act`."""
        ends = self._standardise(tokens), self._standardise(goal)
        noise = self.noise.expand(len(tokens), -1, -1, -1)
        found = self.diffusion.sample(noise, self._denoiser(*ends, proprio))
        video: Tensor = self._base(*ends) + self.options.scale * found
        return video * self.tokens_std + self.tokens_mean

    @torch.inference_mode()
    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Return figures of videos to the frame `reach` model steps ahead; none where windows are shorter.

        `explained`: 1 - MSE / variance of the first action. `skill`: 1 - MSE of the frames / that of equal steps between start and goal.
        """
        self.eval()
        steps = self.options.reach
        if steps > windows.predict:
            return {}
        errors = torch.zeros(3, dtype=torch.float64)
        chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
        for first in range(0, len(chosen), BATCH):
            part = windows.batch(chosen[first : first + BATCH])
            data = {name: torch.from_numpy(value).to(device) for name, value in part.items()}
            tokens, proprio = data["tokens"].float(), data["proprio"][:, 0]
            with autocast(device, dtype):
                video = self.generate(tokens[:, 0], proprio, tokens[:, steps])
                action = self.decide(tokens[:, 0], proprio, video[:, 0], 1)
            wrong = (action - data["action"][:, 0]) / self.action_std
            real, equal = tokens[:, 1:steps], linear(tokens[:, 0], tokens[:, steps], steps)
            missed = (wrong, video - real, equal - real)
            errors += torch.stack([one.float().square().mean().double().cpu() for one in missed]) * len(tokens)
        missing, error, straight = errors / len(chosen)
        found = {"explained": float(1 - missing), "skill": float(1 - error / straight)}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def _base(self, start: Tensor, goal: Tensor) -> Tensor:
        """Return what is added to generated frames, for standardised frames [B, N, D]: [B, reach - 1, N, D]."""
        found = linear(start, goal, self.options.reach)
        return found if self.options.predict == "change" else torch.zeros_like(found)

    def _denoiser(self, start: Tensor, goal: Tensor, proprio: Tensor) -> Denoise:
        """Return what denoises the frames between standardised ones [B, N, D], after a start with proprio [B, P]."""
        between = self.options.reach - 1
        ends = torch.cat([start, goal], -1)[:, None].expand(-1, between, -1, -1)
        condition = ((proprio - self.proprio_mean) / self.proprio_std)[:, : 0 if self.blind else None]

        def denoise(network: nn.Module, noisy: Tensor, at: Tensor) -> Tensor:
            inputs = torch.cat([noisy, ends], -1).flatten(1, 2)
            found: Tensor = network([inputs], condition, at)[0]
            return rearrange(found, "b (t n) d -> b t n d", t=between)

        return denoise

    def _standardise(self, tokens: Tensor) -> Tensor:
        return (tokens.float() - self.tokens_mean) / self.tokens_std


def linear(start: Tensor, goal: Tensor, steps: int) -> Tensor:
    """Return the frames in equal steps between two frames [B, …], [B, steps - 1, …]."""
    shares = torch.arange(1, steps, device=start.device).view(-1, *[1] * (start.ndim - 1)) / steps
    return torch.lerp(start[:, None], goal[:, None], shares)
