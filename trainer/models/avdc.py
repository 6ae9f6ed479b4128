"""AVDC's diffusion (arXiv 2310.08576) as a world model: the next frame given frames and actions (DINO-WM, arXiv 2411.04983, A.6).

A transformer denoises the tokens of the next frame beside those of the frames before, concatenated on channels; the action and the newest
proprio scale its blocks. Proprio is one more token of the sample: one sampler then makes both, and they agree with each other, whereas a
head beside it would see another amount of noise at every step. All candidates and steps of all plans start from the same noise, so
imagining is a deterministic function of the actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.options import option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS, DataShape
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
from wmcache.trainer.models.latent import Frames, LatentModel


@dataclass(frozen=True)
class AvdcOptions:
    """Sizes and variants."""

    proprio: Literal["raw", "none"] = option(
        "raw", "Generate proprio beside the tokens, or use pixels alone.", group="Model"
    )
    predict: Predict = option("change", "Generate the change, or the next frame (AVDC).")
    scale: Scale = option(
        0.3, "Standard deviation of what is generated, in units of standardised tokens; noise is scaled by it."
    )
    width: Size = option(256, "Width of the transformer.")
    depth: Size = option(6, "Transformer blocks.")
    heads: Size = option(4, "Attention heads.")
    sampling_steps: SamplingSteps = option(4, "DDIM steps of an imagined frame; a divisor of 100.")

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        self.sizes.require_even_heads()
        require_sampling_steps(self.sampling_steps)

    @property
    def sizes(self) -> DitSizes:
        """Sizes of the transformer."""
        return DitSizes(self.width, self.depth, self.heads)

    @property
    def standardise(self) -> bool:
        """See `UnitOptions.standardise`."""
        return True


@MODELS.register("avdc")
class Avdc(LatentModel):
    """AVDC, see the module. A frame [..., V] is its tokens and its proprio, standardised."""

    pools = False

    Options = AvdcOptions
    options: AvdcOptions
    noise: Tensor

    def __init__(self, shape: DataShape, options: AvdcOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`."""
        super().__init__(shape, options, statistics, 0, 0)
        proprio = (1, self.proprio_size) if self.proprio_size else None
        self.kinds = [kind for kind in (proprio, (shape.tokens, shape.token_dim)) if kind]
        known = shape.history
        kinds = [(count, (1 + known) * channels + known, channels) for count, channels in self.kinds]
        network = Dit(kinds, shape.action_dim + self.proprio_size, options.sizes)
        self.diffusion = Diffusion(network, options.sampling_steps)
        self.register_buffer("noise", fixed_noise(sum(count * channels for count, channels in self.kinds)))

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: Any) -> Any:
        """See `Trainable.configure`."""
        make_scheduler()  # an error is raised before a run exists
        return super().configure(store, windows, options)

    def after_step(self) -> None:
        """See `Trainable.after_step`."""
        self.diffusion.follow()

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the errors of the velocities of each frame but the first, from the frames before, see `Diffusion.errors`.

        Tokens and proprio are weighted by their dimensions, see `LatentModel.weigh`; see `WorldModel.loss`.
        """
        tokens, proprio, action = self.standardise(batch["tokens"], batch["proprio"], batch["action"])
        frames = self._join(tokens, self.embed(proprio))
        before = frames[:, :-1]
        clean = frames[:, 1:] - before if self.options.predict == "change" else frames[:, 1:]
        denoise = self._denoiser(self._windows(before).flatten(0, 1), action[:, :-1].flatten(0, 1))
        errors = self.diffusion.errors((clean / self.options.scale).flatten(0, 1), denoise)
        of_proprio, of_tokens = errors[:, : self.proprio_size], errors[:, self.proprio_size :]
        return self.weigh(of_tokens.mean(), of_proprio.mean() if self.proprio_size else None)

    def roll_out(
        self,
        tokens: Tensor,
        embedding: Tensor,
        futures: Tensor,
        samples: int,
        context: int,
        patches: Tensor | None = None,  # noqa: ARG002
    ) -> list[Frames]:
        """See `LatentModel.roll_out`."""
        observed = tokens.shape[1]
        frames = self._join(tokens, embedding).repeat_interleave(samples, 0)
        for action in futures[:, observed - 1 :].unbind(1):
            window = self._windows(frames[:, -context:])[:, -1]
            noise = self.noise.expand(len(frames), -1)
            following = self.options.scale * self.diffusion.sample(noise, self._denoiser(window, action))
            if self.options.predict == "change":
                following = frames[:, -1] + following
            frames = torch.cat([frames, following[:, None]], 1)
        return [self._split(frame) for frame in torch.split(frames[:, observed:], 1, 1)]

    def _windows(self, frames: Tensor) -> Tensor:
        """Return the newest `history` frames up to each of frames [B, T, V], the newest last, [B, T, history, V + 1].

        The last number is 1 for a frame, and 0 where there is none.
        """
        known = self.shape.history
        padded = F.pad(F.pad(frames, (0, 1), value=1.0), (0, 0, known - 1, 0))
        return padded.unfold(1, known, 1).movedim(-1, 2)

    def _denoiser(self, window: Tensor, action: Tensor) -> Denoise:
        """Return what denoises the frame after windows [B, history, V + 1] and actions [B, f * A]."""
        frames, known = window[..., :-1], window[..., -1]
        seen = [
            torch.cat([rearrange(part, "b h n c -> b n (h c)"), known[:, None].expand(-1, part.shape[2], -1)], -1)
            for part in self._parts(frames)
        ]
        condition = torch.cat([frames[:, -1, : self.proprio_size], action], -1)

        def denoise(network: nn.Module, noisy: Tensor, steps: Tensor) -> Tensor:
            inputs = [torch.cat(pair, -1) for pair in zip(self._parts(noisy), seen, strict=True)]
            return torch.cat([part.flatten(1) for part in network(inputs, condition, steps)], -1)

        return denoise

    def _join(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Return frames [B, T, V] of tokens [B, T, N, D] and proprio [B, T, 1, Q]."""
        return torch.cat([embedding.flatten(2), tokens.flatten(2)], -1)

    def _split(self, frames: Tensor) -> Frames:
        """Return tokens [B, T, N, D] and proprio [B, T, 1, Q] of frames [B, T, V]."""
        parts = self._parts(frames)
        return parts[-1], parts[0] if self.proprio_size else frames[..., None, :0]

    def _parts(self, frames: Tensor) -> list[Tensor]:
        """Return the tokens [..., n, channels] of each kind of frames [..., V]."""
        sizes = [count * channels for count, channels in self.kinds]
        parts = zip(torch.split(frames, sizes, -1), self.kinds, strict=True)
        return [part.reshape(*part.shape[:-1], *kind) for part, kind in parts]
