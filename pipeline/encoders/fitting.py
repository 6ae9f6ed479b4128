"""What an encoder's training is made of: data to draw from, options, and a loss. The loop is `pipeline/fit.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import Natural, Positive, option
from wmcache.pipeline.encoders.base import Encoder, Features, Preprocess

FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class FitOptions:
    """How any encoder is trained; subclasses have other defaults and more options.

    The learning rate reaches its peak after a tenth of the steps and decays to 0 as a cosine.
    """

    steps: Positive = option(400, "Optimiser steps.", group="Fit")
    batch: Annotated[int, Ge(2)] = option(256, "Frames, or pairs of frames, in each step.", flag="--batch-size")
    learning_rate: Annotated[float, Gt(0)] = option(1e-3, "Peak learning rate.", flag="--lr")
    seed: Natural = option(0, "Seed of weights and batches.")

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames; adapters may get by with cached features."""
        return True


@dataclass(frozen=True)
class FitData:
    """Frames of the training episodes, and of an adapter's base their cached features.

    Attributes:
        episode: [frames], ascending.
        preprocess: of the encoder that is trained, or of the base.
        device: where to train.
        images: uint8 [frames, 3, S, S], resized by `preprocess`; None where the training is purely from a cached store.
        base: an adapter's base; None for others.
        gather: rows -> the base's features, float32 on the device; None for others.
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

    def pixels(self, rows: NDArray[np.integer]) -> Tensor:
        """Some images as the network sees them: normalised float32 [len(rows), 3, S, S] on the device."""
        assert self.images is not None
        some = self.images[torch.from_numpy(np.asarray(rows))].to(self.device)
        return self.preprocess.normalise(some.float() / 255)

    def features(self, rows: NDArray[np.integer]) -> Features:
        """The base's features of some frames, float32 on the device."""
        assert self.gather is not None
        return self.gather(rows)

    def sample_features(self, frames: int, seed: int) -> Iterator[Features]:
        """The base's features of at most so many frames, drawn from all, a few frames at a time."""
        rows: NDArray[np.integer] = np.random.default_rng(seed).choice(len(self), min(len(self), frames), replace=False)
        for part in np.array_split(np.sort(rows), -(-len(rows) // FRAMES_AT_ONCE)):
            yield self.features(part)


class Fitting(nn.Module):
    """What is trained: the part that is kept, and whatever it needs only meanwhile. All its parameters are descended.

    Attributes:
        kept: its state dict becomes the weights file. Registered under this name alone: checkpoints hold every tensor once.
    """

    kept: nn.Module

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """The frames of a step's batch; a pure function of the generator."""
        raise NotImplementedError

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """`loss` to descend, and what else is worth showing; scalars. May draw from torch's generator."""
        raise NotImplementedError
