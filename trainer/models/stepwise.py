"""What world models share that imagine one frame after the other, and can be stepped without frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from wmcache.trainer.models import Belief, Generators, Imagined, WorldModel


class StepwiseModel(WorldModel):
    """A world model, also `Dreams`. Inside, tokens and proprio are standardised."""

    draws = True

    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        """See `WorldModel.imagine`. Frames are drawn where the temperature is above 0."""
        samples, frames = actions.shape[1], []
        belief = {name: value.repeat_interleave(samples, 0) for name, value in belief.items()}
        for action in actions.flatten(0, 1).unbind(1):
            belief, frame = self._advance(belief, action, generators, samples)
            frames.append(frame)
        return self._describe(frames, samples)

    def step(self, belief: Belief, action: Tensor, generators: Generators | None = None) -> tuple[Belief, Imagined]:
        """See `Dreams.step`."""
        belief, frame = self._advance(belief, action, generators, 1)
        return belief, self._describe([frame], 1)

    @abstractmethod
    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`."""

    @abstractmethod
    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        """Imagine a frame of S futures of E episodes.

        Returns:
            The belief after it, and the frame: tokens, proprio, and where the model has such heads reward and the logits of the end,
            [E * S, …] each.
        """

    def _describe(self, frames: Sequence[Mapping[str, Tensor]], samples: int) -> Imagined:
        """Convert T frames of `_advance` to the store's units."""
        stacked = {name: torch.stack([frame[name] for frame in frames], 1) for name in frames[0]}
        every = {name: rearrange(value, "(e s) ... -> e s ...", s=samples) for name, value in stacked.items()}
        latents = rearrange(every["tokens"], "e s t (n d) -> e s t n d", n=self.shape.tokens)
        if self.has_latents:
            latents = latents * self.tokens_std + self.tokens_mean
        reward = every["reward"][..., 0] if "reward" in every else None
        continues = torch.sigmoid(-every["end"][..., 0]) if "end" in every else None
        return Imagined(latents, every["proprio"], reward, continues)


def draw_noise(
    draw: Callable[..., Tensor], size: tuple[int, ...], generators: Generators, like: Tensor, samples: int
) -> Tensor:
    """Draw noise of a size for S futures of each episode, [E * S, *size]; those of one episode see the same noise.

    Args:
        draw: such as `torch.randn`.
        like: [E * S, …], on the device of the result.
    """
    if isinstance(generators, torch.Generator):
        noise = draw((len(like) // samples, *size), generator=generators, device=generators.device)
    else:
        noise = torch.stack([draw(size, generator=one) for one in generators])
    return noise.to(like.device).repeat_interleave(samples, 0)
