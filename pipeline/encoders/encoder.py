"""The one path from frames to tokens, for cached frames and for live ones.

Encoders that share a backbone, such as DINOv2's patch tokens, its class token and an adapter on both, run it once (`encode_together`).
Heads receive features in float16, as a store contains them, so tokens derived from a store equal those extracted from frames.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.cache.identity import Identity
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders.base import NORMALISATIONS, EncoderSpec, Features, Loaded, Preprocess, hash_parameters

COSINE_TOLERANCE = 0.999
"""Below this cosine, tokens of the same frame belong to another latent space than the one that a model was trained in."""


class Encoder:
    """A frozen backbone and head with their preprocessing. `create` makes one.

    Attributes:
        weights_sha256: hash of all parameters; equals `backbone_sha256` if the head has none.
        max_batch: frames that fit the device's memory; `extract` lowers it.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        loaded: Loaded,
        preprocess: Preprocess,
        *,
        weights: Path | None,
        base_weights: Path | None = None,
        dtype: str | None,
        device: str = "auto",
    ) -> None:
        """Freeze the networks and move them to the device; raises UserError if a weight is not finite."""
        self.spec, self.weights, self.base_weights, self.preprocess = spec, weights, base_weights, preprocess
        self.image_size, self.lag = preprocess.image_size, preprocess.lag
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype or spec.dtype, self.device)
        self.source = loaded.source
        networks = nn.ModuleDict({"backbone": loaded.backbone, "head": loaded.head})
        if any(not torch.isfinite(value).all() for value in networks.state_dict().values()):
            raise UserError(f"weights of {spec.name} are not finite: {weights or loaded.source}; get or fit them again")
        self.backbone_sha256 = self.weights_sha256 = loaded.backbone.sha256
        if loaded.head.state_dict():
            both = self.backbone_sha256 + hash_parameters(loaded.head)
            self.weights_sha256 = hashlib.sha256(both.encode()).hexdigest()
        networks.to(self.device).eval().requires_grad_(False)
        self.backbone, self.head = loaded.backbone, loaded.head
        self.token_grid, self.token_dim = loaded.head.grid, loaded.head.dim
        self.max_batch = sys.maxsize

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(N, D) of one frame's tokens."""
        return self.token_grid[0] * self.token_grid[1], self.token_dim

    @property
    def backbone_key(self) -> tuple[object, ...]:
        """Equal for encoders that can share one pass of their backbones."""
        return self.backbone_sha256, self.preprocess, self.dtype, self.device, type(self.backbone)

    def __call__(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """Encode frames to float16 [B, N, D], the precision of the store, so live tokens equal cached ones.

        Args:
            frames: uint8 [B, S, S, 3]; for an encoder with a lag [B, 2, S, S, 3] with the earlier frame first, or single frames, each
                paired with itself.
        """
        return encode_together([self], frames)[0]

    @torch.inference_mode()
    def features(self, frames: NDArray[np.uint8] | Tensor, layers: Sequence[str]) -> Features:
        """Compute the backbone's features of frames (see `__call__`), float16."""
        images = torch.as_tensor(frames).to(self.device)
        shape, known = tuple(images.shape), (4, 5) if self.lag else (4,)
        if images.dtype != torch.uint8 or len(shape) not in known or shape[-2:] != (shape[-3], 3):
            raise ValueError(f"frames must be uint8 [B, S, S, 3], not {images.dtype} {shape}")
        if self.lag and images.ndim == 4:
            images = images[:, None].expand(-1, 2, -1, -1, -1)
        with autocast(self.device, self.dtype):
            found = self.backbone(self.preprocess(images), layers)
        return Features({name: value.to(torch.float16) for name, value in found.items()}, self.backbone.prefix)

    @torch.inference_mode()
    def tokens(self, features: Features) -> Tensor:
        """Compute the head's tokens of features, float16 [B, N, D]."""
        wide = {name: features.layers[name].float() for name in self.head.layers}
        tokens: Tensor = self.head(replace(features, layers=wide))
        assert tokens.shape[1:] == self.frame_shape, tokens.shape
        return tokens.to(torch.float16)

    def drift(self, frames: NDArray[np.uint8], cached: NDArray[np.float16]) -> dict[str, float]:
        """Return the smallest `cosine` of live and cached tokens [B, N, D], and the largest `relative_error` of a frame."""
        live, known = self(frames).float().cpu().flatten(1), torch.from_numpy(cached).float().flatten(1)
        cosines = torch.cosine_similarity(live, known, dim=1)
        # The cosine of two zero vectors is not defined; equal tokens have not drifted.
        cosine = torch.where((live == known).all(1), 1.0, cosines).min().item()
        relative = ((live - known).norm(dim=1) / known.norm(dim=1).clamp_min(1e-6)).max().item()
        return {"cosine": cosine, "relative_error": relative}

    def identity(self, dataset_fingerprint: str, store_dtype: str = "float16") -> Identity:
        """Return the identity of a store of this encoder's tokens."""
        pair = f", of the frame and the one {self.lag} env steps before" if self.lag else ""
        sizes = ">".join(map(str, (*self.preprocess.via, self.image_size)))
        return Identity(
            encoder=self.spec.name,
            weights_source=self.source,
            weights_sha256=self.weights_sha256,
            layer="+".join(self.backbone.described[layer] for layer in self.head.layers),
            token_selection=self.spec.token_selection + pair,
            image_size=self.image_size,
            resize=f"{self.preprocess.filter} antialias {sizes}",
            normalisation=NORMALISATIONS[self.preprocess.normalisation],
            compute_dtype=str(self.dtype).removeprefix("torch."),
            store_dtype=store_dtype,
            dataset_fingerprint=dataset_fingerprint,
        )

    def recipe(self) -> dict[str, Any]:
        """Return the arguments with which `create` makes this encoder again; plain JSON values."""
        return {
            "name": self.spec.name,
            "weights": self.weights and str(self.weights.absolute()),
            "base_weights": self.base_weights and str(self.base_weights.absolute()),
            "image_size": self.image_size,
            "normalisation": self.preprocess.normalisation,
            "filter": self.preprocess.filter,
            "lag": self.lag,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def encode_together(encoders: Sequence[Encoder], frames: NDArray[np.uint8] | Tensor) -> list[Tensor]:
    """Encode the same frames as `Encoder.__call__` does with several encoders; those of equal `backbone_key` share a pass."""
    shared: dict[tuple[object, ...], Features] = {}
    for key in dict.fromkeys(encoder.backbone_key for encoder in encoders):
        group = [encoder for encoder in encoders if encoder.backbone_key == key]
        wanted = {layer for encoder in group for layer in encoder.head.layers}
        shared[key] = group[0].features(frames, [layer for layer in group[0].backbone.dims if layer in wanted])
    return [encoder.tokens(shared[encoder.backbone_key]) for encoder in encoders]
