"""What an encoder is: frames in, patch tokens out, and a record of everything that could change a number."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from wmcache.cache.device import autocast, choose_device, choose_dtype
from wmcache.cache.errors import UserError
from wmcache.cache.identity import Identity

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""DINO-WM's normalisation, to [-1, 1]."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATIONS = {"half": HALF, "imagenet": IMAGENET}

COSINE_TOLERANCE = 0.999
"""Tokens of the same frame that differ by more than this are another latent space than the one a model was trained in."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before its weights are loaded.

    Attributes:
        name: in the registry.
        summary: one line for people.
        image_size: default side of the image that the network sees.
        patch: side of a patch in that image; the token grid is (image_size / patch) squared.
        token_dim: D.
        via: sizes that the frame is resized to before `image_size`, for routes that others took.
        normalisation: default key of NORMALISATIONS.
        dtype: default compute precision, `auto` or a name in `cache.device.DTYPES`.
        layer, token_selection: which features, and which tokens of them.
        source: where weights come from without `--weights`.
        licence: of those weights.
    """

    name: str
    summary: str
    image_size: int
    patch: int
    token_dim: int
    normalisation: str
    layer: str
    token_selection: str
    source: str
    licence: str
    via: tuple[int, ...] = ()
    dtype: str = "auto"

    def token_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of tokens.

        Raises:
            UserError: the size is not a multiple of the patch.
        """
        if image_size <= 0 or image_size % self.patch:
            raise UserError(
                f"--image-size {image_size} does not fit encoder {self.name}; choose a multiple of {self.patch}"
            )
        return image_size // self.patch, image_size // self.patch


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, as a family's loader returns it.

    Attributes:
        network: maps images [B, 3, S, S], normalised, to tokens [B, N, D], row-major over the grid.
        source: hub id, or `file`.
    """

    network: nn.Module
    source: str


Loader = Callable[[EncoderSpec, int, Path | None], Loaded]
"""(spec, image_size, weights file or None for the spec's source) -> network."""


@dataclass(frozen=True)
class FitOptions:
    """How `fit` trains.

    Attributes:
        steps: optimiser steps.
        batch: pairs of frames in each.
        max_lag: positives are 1 to this many env steps later.
        spread: weight of the term that drives all frames apart.
        learning_rate: peak, reached after a tenth of the steps and decayed to 0 as a cosine.
        seed: of initialisation and batches.
    """

    steps: int = 400
    batch: int = 256
    max_lag: int = 4
    spread: float = 0.2
    learning_rate: float = 1e-3
    seed: int = 0


Fitter = Callable[[Tensor, NDArray[np.integer], FitOptions, torch.device], Iterator[tuple[float, nn.Module]]]
"""(images uint8 [frames, 3, S, S], episode [frames], options, device) -> (loss, network) after each step."""


class Encoder:
    """The one path from frames to tokens, for frames that are cached and for frames that are live.

    Attributes:
        spec: what it is.
        token_grid, token_dim: N = rows * columns tokens of D values.
        max_batch: frames that the device has memory for; learnt from the first call that it had none for.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        load: Loader,
        *,
        weights: Path | None = None,
        image_size: int | None = None,
        normalisation: str | None = None,
        dtype: str | None = None,
        device: str = "auto",
    ) -> None:
        """Use `encoders.create`."""
        self.spec = spec
        self.weights = weights
        self.image_size = spec.image_size if image_size is None else image_size
        self.normalisation_name = normalisation or spec.normalisation
        if self.normalisation_name not in NORMALISATIONS:
            raise UserError(f"no normalisation {normalisation!r}; known are {', '.join(NORMALISATIONS)}")
        self.token_grid = spec.token_grid(self.image_size)
        self.token_dim = spec.token_dim
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype or spec.dtype, self.device)
        loaded = load(spec, self.image_size, weights)
        self.source = loaded.source
        if any(not torch.isfinite(parameter).all() for parameter in loaded.network.parameters()):
            raise UserError(
                f"the weights of {spec.name} ({weights or loaded.source}) hold values that are not finite; get them again"
            )
        self.weights_sha256 = hash_parameters(loaded.network)
        # Frozen for good: dropout, batch statistics and gradients have no place here.
        self.network = loaded.network.to(self.device).eval().requires_grad_(False)
        self.max_batch = sys.maxsize
        mean, std = NORMALISATIONS[self.normalisation_name]
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(N, D) of one frame's tokens."""
        return self.token_grid[0] * self.token_grid[1], self.token_dim

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: uint8 [B, H, W, 3], square.

        Returns:
            float16 [B, N, D] on the encoder's device: the precision of the store, so live tokens equal cached ones.
        """
        images = torch.as_tensor(frames).to(self.device)
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] != images.shape[2]
            or images.shape[3] != 3
        ):
            raise ValueError(f"frames must be uint8 [B, S, S, 3], not {images.dtype} {tuple(images.shape)}")
        with autocast(self.device, self.dtype):
            tokens: Tensor = self.network(self.preprocess(images))
        assert tokens.shape[1:] == self.frame_shape, tokens.shape
        return tokens.to(torch.float16)

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, 3, image_size, image_size], resized (bilinear, antialiased) and normalised."""
        images = frames.permute(0, 3, 1, 2).float() / 255
        for size in (*self.spec.via, self.image_size):
            if images.shape[-1] != size:
                images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (images - self._mean) / self._std

    def drift(self, frames: NDArray[np.uint8], cached: NDArray[np.float16]) -> dict[str, float]:
        """How far encoding frames now, uint8 [B, H, W, 3], is from their cached tokens, float16 [B, N, D].

        Returns:
            `cosine`, the smallest over the frames, and `relative_error`, the largest norm of a difference over that of the tokens.
        """
        live, known = self(frames).float().cpu().flatten(1), torch.from_numpy(cached).float().flatten(1)
        cosine = torch.cosine_similarity(live, known, dim=1).min().item()
        relative = ((live - known).norm(dim=1) / known.norm(dim=1)).max().item()
        return {"cosine": cosine, "relative_error": relative}

    def identity(self, dataset_fingerprint: str, store_dtype: str = "float16") -> Identity:
        """The identity of a store of this encoder's tokens."""
        return Identity(
            encoder=self.spec.name,
            weights_source=self.source,
            weights_sha256=self.weights_sha256,
            layer=self.spec.layer,
            token_selection=self.spec.token_selection,
            image_size=self.image_size,
            resize="bilinear antialias " + ">".join(str(size) for size in (*self.spec.via, self.image_size)),
            normalisation=NORMALISATIONS[self.normalisation_name],
            compute_dtype=str(self.dtype).removeprefix("torch."),
            store_dtype=store_dtype,
            dataset_fingerprint=dataset_fingerprint,
        )

    def recipe(self) -> dict[str, str | int | None]:
        """The arguments that `encoders.create` needs to make this encoder again."""
        return {
            "name": self.spec.name,
            "weights": None if self.weights is None else str(self.weights.absolute()),
            "image_size": self.image_size,
            "normalisation": self.normalisation_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def hash_parameters(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the parameters and buffers, so that file formats do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
