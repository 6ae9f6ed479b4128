"""What an encoder is: a frozen backbone that makes features of frames, and a head that makes patch tokens of features.

Encoders that share a backbone, say DINOv2's patch tokens, its class token and an adapter on both, run it once (`encode_together`). Heads
see features as a store holds them, in float16, so tokens that are derived from a store equal those that are extracted from frames.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.cache.identity import Identity
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""DINO-WM's normalisation, to [-1, 1]."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATIONS = {"half": HALF, "imagenet": IMAGENET}
FILTERS = ("bilinear", "bicubic")

COSINE_TOLERANCE = 0.999
"""Tokens of the same frame that differ by more than this are another latent space than the one a model was trained in."""

LAST = "last"
"""Every backbone's name for its final features; those with more also have `EARLY` and `MIDDLE`."""
EARLY, MIDDLE = "early", "middle"


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before its weights are loaded; a local folder of weights may say otherwise of grid and dimension.

    Attributes:
        name: in the registry.
        summary: one line for people.
        image_size: default side of the image that the network sees.
        patch: side of a patch in that image; `image_size` has to be a multiple of it.
        token_dim: D.
        normalisation: default key of NORMALISATIONS.
        layer, token_selection: which features, and which tokens of them.
        source: where weights come from without `--weights`.
        licence: of those weights.
        revision: of the source, on a hub; empty where none has been pinned.
        accept: the page on which a gated model's licence has to be accepted; empty for open ones.
        grid: of tokens at `image_size`, where it is not one for each patch.
        via: sizes that the frame is resized to before `image_size`, for routes that others took.
        filter: default of resizing, in FILTERS, always antialiased.
        dtype: default compute precision, `auto` or a name in `common.device.DTYPES`.
        lag: env steps between the two frames that a token is made of; 0 for one frame.
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
    revision: str = ""
    accept: str = ""
    grid: tuple[int, int] | None = None
    via: tuple[int, ...] = ()
    filter: str = "bilinear"
    dtype: str = "auto"
    lag: int = 0

    def patch_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            UserError: the size is not a multiple of the patch.
        """
        if image_size <= 0 or image_size % self.patch:
            raise UserError(
                f"--image-size {image_size} does not fit encoder {self.name}; choose a multiple of {self.patch}"
            )
        return image_size // self.patch, image_size // self.patch

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the default size."""
        return self.grid or self.patch_grid(self.image_size)


@dataclass(frozen=True)
class Features:
    """What a backbone made of some frames.

    Attributes:
        layers: name -> [B, prefix + N, channels of the layer], N patches row-major over the grid.
        prefix: tokens before the patches, the class token first.
    """

    layers: Mapping[str, Tensor]
    prefix: int

    def patches(self, layer: str) -> Tensor:
        """[B, N, channels]."""
        return self.layers[layer][:, self.prefix :]

    def class_token(self, layer: str) -> Tensor:
        """[B, 1, channels]."""
        return self.layers[layer][:, :1]


class Backbone(nn.Module):
    """A network up to its features.

    Attributes:
        dims: layer -> channels, from the shallowest to `LAST`.
        described: layer -> what it is in the network, for example `block 2`; enters the identity.
        grid: rows and columns of patches.
        prefix: tokens before the patches.
        config: what a folder's config says of the arithmetic, where that is not the family's own: JSON, keys sorted; empty otherwise.
    """

    dims: dict[str, int]
    described: dict[str, str]
    grid: tuple[int, int]
    prefix: int = 0
    config: str = ""

    @functools.cached_property
    def sha256(self) -> str:
        """Over its parameters and its config; taken once, as encoders freeze it."""
        parameters = hash_parameters(nn.ModuleDict({"backbone": self}))
        return hashlib.sha256(f"{parameters}{self.config}".encode()).hexdigest() if self.config else parameters

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Make features.

        Args:
            images: normalised, [B, 3, S, S], or [B, 2, 3, S, S] (the earlier frame first) for encoders with a lag.
            layers: which are wanted.

        Returns:
            For each of these [B, prefix + N, dims[layer]].
        """
        raise NotImplementedError


class Head(nn.Module):
    """Makes tokens of features; without parameters, or fitted.

    Attributes:
        layers: what it reads.
        prefix: whether it reads the tokens before the patches.
        grid: rows and columns of its tokens.
        dim: channels of its tokens.
    """

    layers: tuple[str, ...]
    prefix: bool = False
    grid: tuple[int, int]
    dim: int

    def forward(self, features: Features) -> Tensor:
        """Float32 features -> [B, rows * columns, dim]."""
        raise NotImplementedError


SELECTIONS = {
    "patch": "patch tokens",
    "cls": "class token",
    "pooled": "mean of the patch tokens",
    "layers": "all tokens of three layers",
}
"""What `Select` can take; `layers` is what `wmcache derive` and adapters make all the others of."""


class Select(Head):
    """A selection of the backbone's own tokens."""

    def __init__(self, backbone: Backbone, selection: str) -> None:
        """Args: `backbone` whose features they are, `selection` a key of SELECTIONS."""
        super().__init__()
        if selection == "cls" and not backbone.prefix:
            raise ValueError("a backbone without a class token has no such selection")
        self.selection = selection
        self.prefix = selection in ("cls", "layers") and backbone.prefix > 0
        self.layers = tuple(backbone.dims) if selection == "layers" else (LAST,)
        self.dims = {layer: backbone.dims[layer] for layer in self.layers}
        self.dim = sum(self.dims.values())
        tokens = backbone.prefix + backbone.grid[0] * backbone.grid[1]
        with_prefix = (1, tokens) if backbone.prefix else backbone.grid
        self.grid = {"patch": backbone.grid, "layers": with_prefix}.get(selection, (1, 1))
        self._prefix_tokens = backbone.prefix

    def forward(self, features: Features) -> Tensor:
        """See `Head.forward`."""
        match self.selection:
            case "patch":
                return features.patches(LAST)
            case "cls":
                return features.class_token(LAST)
            case "pooled":
                return features.patches(LAST).mean(1, keepdim=True)
            case _:
                return torch.cat([features.layers[layer] for layer in self.layers], -1)

    def restore(self, tokens: Tensor) -> Features:
        """The features that tokens [B, N, D] were selected from, as far as they hold them.

        Raises:
            UserError: they are neither patch tokens nor layers.
        """
        if self.selection not in ("patch", "layers"):
            raise UserError(
                f"nothing can be derived from a store of the {SELECTIONS[self.selection]} alone; take one of patch tokens or layers"
            )
        return Features(self.by_layer(tokens), self._prefix_tokens * (self.selection == "layers"))

    def by_layer(self, channels: Tensor) -> dict[str, Tensor]:
        """[..., D] -> for each layer its part, [..., channels of the layer]."""
        parts = torch.split(channels, list(self.dims.values()), -1)
        return dict(zip(self.layers, parts, strict=True))


@dataclass(frozen=True)
class Loaded:
    """What a family's loader returns.

    Attributes:
        backbone, head: with their weights.
        source: where these came from: hub id and revision, or `file`.
    """

    backbone: Backbone
    head: Head
    source: str


@dataclass(frozen=True)
class Preprocess:
    """The way from a frame to what a backbone sees.

    Attributes:
        image_size: side of that image.
        via: sizes before that one.
        normalisation: key of NORMALISATIONS.
        filter: of resizing.
        lag: see `EncoderSpec`.
    """

    image_size: int
    via: tuple[int, ...]
    normalisation: str
    filter: str
    lag: int

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] -> float32 [..., 3, image_size, image_size], resized and normalised."""
        return self.normalise(self.resize(frames))

    def resize(self, frames: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] -> float32 [..., 3, image_size, image_size], 0 to 1 (bicubic ones a little beyond), antialiased."""
        images = frames.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
        for size in (*self.via, self.image_size):
            if images.shape[-1] != size:
                images = F.interpolate(images, (size, size), mode=self.filter, antialias=True, align_corners=False)
        return images.view(*frames.shape[:-3], 3, self.image_size, self.image_size)

    def normalise(self, images: Tensor) -> Tensor:
        """What `resize` gives -> the same shape, normalised."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in NORMALISATIONS[self.normalisation])
        return (images - mean) / std


class Encoder:
    """The one path from frames to tokens, for frames that are cached and for frames that are live.

    Attributes:
        spec: what it is.
        backbone, head: the networks, frozen.
        token_grid, token_dim: N = rows * columns tokens of D values.
        image_size, lag: of what it sees.
        backbone_sha256: of its backbone. weights_sha256: of all its parameters; the same where the head has none.
        max_batch: frames that the device has memory for; learnt from the first call that it had none for.
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
        """Use `encoders.create`."""
        self.spec, self.weights, self.base_weights, self.preprocess = spec, weights, base_weights, preprocess
        self.image_size, self.lag = preprocess.image_size, preprocess.lag
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype or spec.dtype, self.device)
        self.source = loaded.source
        networks = nn.ModuleDict({"backbone": loaded.backbone, "head": loaded.head})
        if any(not torch.isfinite(value).all() for value in networks.state_dict().values()):
            raise UserError(
                f"the weights of {spec.name} ({weights or loaded.source}) hold values that are not finite; get them again"
            )
        self.backbone_sha256 = self.weights_sha256 = loaded.backbone.sha256
        if loaded.head.state_dict():
            both = self.backbone_sha256 + hash_parameters(loaded.head)
            self.weights_sha256 = hashlib.sha256(both.encode()).hexdigest()
        # Frozen for good: dropout, batch statistics and gradients have no place here.
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

    def share(self, other: Encoder) -> None:
        """Use another encoder's backbone, which has to have the same `backbone_key`, so that it is in memory once."""
        assert self.backbone_key == other.backbone_key
        self.backbone = other.backbone

    def __call__(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: uint8 [B, S, S, 3]; for an encoder with a lag [B, 2, S, S, 3], the earlier frame first, or one frame that is taken
                for both.

        Returns:
            float16 [B, N, D] on the encoder's device: the precision of the store, so live tokens equal cached ones.
        """
        return encode_together([self], frames)[0]

    @torch.inference_mode()
    def features(self, frames: NDArray[np.uint8] | Tensor, layers: Sequence[str]) -> Features:
        """The backbone's features of frames (see `__call__`), float16."""
        images = torch.as_tensor(frames).to(self.device)
        if (
            images.dtype != torch.uint8
            or images.ndim not in ((4, 5) if self.lag else (4,))
            or images.shape[-3] != images.shape[-2]
            or images.shape[-1] != 3
        ):
            raise ValueError(f"frames must be uint8 [B, S, S, 3], not {images.dtype} {tuple(images.shape)}")
        if self.lag and images.ndim == 4:
            images = images[:, None].expand(-1, 2, -1, -1, -1)
        with autocast(self.device, self.dtype):
            found = self.backbone(self.preprocess(images), layers)
        return Features({name: value.to(torch.float16) for name, value in found.items()}, self.backbone.prefix)

    @torch.inference_mode()
    def tokens(self, features: Features) -> Tensor:
        """The head's tokens of features, float16 [B, N, D]."""
        wide = {name: features.layers[name].float() for name in self.head.layers}
        tokens: Tensor = self.head(replace(features, layers=wide))
        assert tokens.shape[1:] == self.frame_shape, tokens.shape
        return tokens.to(torch.float16)

    def drift(self, frames: NDArray[np.uint8], cached: NDArray[np.float16]) -> dict[str, float]:
        """How far encoding frames now (see `__call__`) is from their cached tokens, float16 [B, N, D].

        Returns:
            `cosine`, the smallest over the frames, and `relative_error`, the largest norm of a difference over that of the tokens.
        """
        live, known = self(frames).float().cpu().flatten(1), torch.from_numpy(cached).float().flatten(1)
        cosines = torch.cosine_similarity(live, known, dim=1)
        cosine = (
            torch.where((live == known).all(1), 1.0, cosines).min().item()
        )  # which nothing but zeros have no cosine of
        relative = ((live - known).norm(dim=1) / known.norm(dim=1).clamp_min(1e-6)).max().item()
        return {"cosine": cosine, "relative_error": relative}

    def identity(self, dataset_fingerprint: str, store_dtype: str = "float16") -> Identity:
        """The identity of a store of this encoder's tokens."""
        pair = f", of the frame and the one {self.lag} env steps before" if self.lag else ""
        return Identity(
            encoder=self.spec.name,
            weights_source=self.source,
            weights_sha256=self.weights_sha256,
            layer="+".join(self.backbone.described[layer] for layer in self.head.layers),
            token_selection=self.spec.token_selection + pair,
            image_size=self.image_size,
            resize=f"{self.preprocess.filter} antialias "
            + ">".join(str(size) for size in (*self.preprocess.via, self.image_size)),
            normalisation=NORMALISATIONS[self.preprocess.normalisation],
            compute_dtype=str(self.dtype).removeprefix("torch."),
            store_dtype=store_dtype,
            dataset_fingerprint=dataset_fingerprint,
        )

    def recipe(self) -> dict[str, Any]:
        """The arguments that `encoders.create` needs to make this encoder again."""
        return {
            "name": self.spec.name,
            "weights": None if self.weights is None else str(self.weights.absolute()),
            "base_weights": None if self.base_weights is None else str(self.base_weights.absolute()),
            "image_size": self.image_size,
            "normalisation": self.preprocess.normalisation,
            "filter": self.preprocess.filter,
            "lag": self.lag,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def encode_together(encoders: Sequence[Encoder], frames: NDArray[np.uint8] | Tensor) -> list[Tensor]:
    """Tokens of the same frames from several encoders, each backbone run once.

    Args:
        encoders: any; those of equal `backbone_key` share a pass.
        frames: as for `Encoder.__call__`; frame pairs are for encoders with a lag alone.

    Returns:
        For each encoder float16 [B, N, D].
    """
    shared: dict[tuple[object, ...], Features] = {}
    for key in dict.fromkeys(encoder.backbone_key for encoder in encoders):
        group = [encoder for encoder in encoders if encoder.backbone_key == key]
        wanted = {layer for encoder in group for layer in encoder.head.layers}
        shared[key] = group[0].features(frames, [layer for layer in group[0].backbone.dims if layer in wanted])
    return [encoder.tokens(shared[encoder.backbone_key]) for encoder in encoders]


def hash_parameters(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the parameters and buffers, so that file formats do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
