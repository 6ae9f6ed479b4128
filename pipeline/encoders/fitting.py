"""Training of an encoder: data to draw batches from, options, and a loss. The loop is the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import Natural, Positive, option
from wmcache.pipeline.encoders.base import Backbone, EncoderSpec, Features, Preprocess
from wmcache.pipeline.encoders.encoder import Encoder

FRAMES_AT_ONCE = 32
BACKGROUND_FRAMES = 1000


@dataclass(frozen=True)
class FitOptions:
    """How any encoder is trained; subclasses have other defaults and more options."""

    steps: Positive = option(400, "Optimiser steps.", group="Fit")
    batch: Annotated[int, Ge(2)] = option(256, "Frames, or pairs of frames, in each step.", flag="--batch-size")
    learning_rate: Annotated[float, Gt(0)] = option(1e-3, "Peak learning rate.", flag="--lr")
    seed: Natural = option(0, "Seed of weights and batches.")

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames; adapters may get by with cached features."""
        return True


def adapter_spec(name: str, summary: str, token_dim: int, **more: Any) -> EncoderSpec:
    """Describe an adapter on DINOv2's features; `more` are other fields."""
    return EncoderSpec(
        name=name,
        summary=f"{summary} (wmcache fit)",
        image_size=196,
        via=(224,),
        patch=14,
        token_dim=token_dim,
        source=f"wmcache fit --encoder {name}",
        licence="yours, on the base's",
        **more,
    )


@dataclass(frozen=True)
class FitData:
    """Frames of the training episodes; for an adapter also the cached features of its base.

    Attributes:
        episode: [frames], ascending.
        preprocess: of the encoder that is trained, or of the base.
        images: uint8 [frames, 3, S, S], resized by `preprocess`; None if the training reads only a store.
        base, gather: an adapter's base, and rows -> its features, float32 on the device; None for others.
    """

    episode: NDArray[np.integer]
    preprocess: Preprocess
    device: torch.device
    images: Tensor | None = None
    base: Encoder | None = None
    gather: Callable[[NDArray[np.integer]], Features] | None = None

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode)

    @property
    def backbone(self) -> Backbone:
        """The base's."""
        assert self.base is not None
        return self.base.backbone

    def pixels(self, rows: NDArray[np.integer]) -> Tensor:
        """Return images as the network receives them: normalised float32 [len(rows), 3, S, S]."""
        assert self.images is not None
        some = self.images[torch.from_numpy(np.asarray(rows))].to(self.device)
        return self.preprocess.normalise(some.float() / 255)

    def sample_pixels(self, seed: int) -> Tensor:
        """Return `pixels` of at most BACKGROUND_FRAMES frames, drawn from all."""
        return self.pixels(self.random_rows(min(len(self), BACKGROUND_FRAMES), np.random.default_rng(seed)))

    def features(self, rows: NDArray[np.integer]) -> Features:
        """Return the base's features of some frames, float32 on the device."""
        assert self.gather is not None
        return self.gather(rows)

    def sample_features(self, frames: int, seed: int) -> Iterator[Features]:
        """Yield `features` of at most `frames` frames, drawn from all, in parts."""
        rows = self.random_rows(min(len(self), frames), np.random.default_rng(seed))
        for part in np.array_split(rows, -(-len(rows) // FRAMES_AT_ONCE)):
            yield self.features(part)

    def random_rows(self, frames: int, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw frames, each at most once, ascending: the order in which a store reads fastest."""
        return np.sort(rng.choice(len(self), frames, replace=False))


class Fitting(nn.Module):
    """A network in training: the part that is kept, and what only the training needs.

    Attributes:
        kept: its state dict becomes the weights file. Register it under this name only: checkpoints contain every tensor once.
    """

    kept: nn.Module

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw the frames of a batch; a pure function of the generator."""
        raise NotImplementedError

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute `loss`, which is minimised, and scalars to log. May draw from torch's generator."""
        raise NotImplementedError
