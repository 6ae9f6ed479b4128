"""Encoders: a frozen backbone turns images into features, and a head turns features into patch tokens.

This is the one path from frames to tokens, for cached frames and for live ones. Heads receive features in float16, as a store contains
them, so tokens derived from a store equal those extracted from frames.
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

COSINE_TOLERANCE = 0.999
"""Below this cosine, tokens of the same frame belong to another latent space than the one that a model was trained in."""
NORMALISATIONS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # DINO-WM's, to [-1, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tensorflow": ((127 / 255,) * 3, (128 / 255,) * 3),
}
"""Name -> mean and standard deviation of the channels."""
DECODED_AT_ONCE = 256
EARLY, MIDDLE, LAST = "early", "middle", "last"
"""Names of a backbone's features. Every backbone has `LAST`; those with intermediate features have the others too."""
SELECTIONS = {
    "patch": "patch tokens",
    "cls": "class token",
    "pooled": "mean of the patch tokens",
    "layers": "all tokens of three layers",
}
"""What `Select` can take. `wmcache derive` and adapters make the other selections from `layers`."""


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before its weights are loaded. A local folder of weights may change grid and dimension.

    Attributes:
        image_size, patch: default side of the image that the network receives, and side of a patch in it, in pixels.
        source, revision: where weights come from without `--weights`: a hub's repository and commit.
        accept: page on which a gated model's licence is accepted; empty for open models.
        grid: of tokens at `image_size`, if it is not one token for each patch.
        via: sizes that the frame is resized to before `image_size`; resizing is antialiased.
        lag: env steps between the two frames of a token; 0 for one frame.
        log_variance: encoder on the same backbone that gives the logarithm of the variance of these tokens, for encoders whose tokens
            are the means of Gaussians; else empty.
    """

    name: str
    summary: str
    image_size: int
    patch: int
    token_dim: int
    normalisation: str = "half"
    source: str = "no weights"
    licence: str = "-"
    layer: str = "norm"
    token_selection: str = "patch"
    revision: str = ""
    accept: str = ""
    grid: tuple[int, int] | None = None
    via: tuple[int, ...] = ()
    filter: str = "bilinear"
    dtype: str = "auto"
    lag: int = 0
    log_variance: str = ""

    def patch_grid(self, image_size: int) -> tuple[int, int]:
        """Return rows and columns of patches; raises UserError if the size is not a multiple of the patch."""
        if image_size % self.patch:
            raise UserError(f"--image-size {image_size} does not fit {self.name}; choose a multiple of {self.patch}")
        return image_size // self.patch, image_size // self.patch

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the default size."""
        return self.grid or self.patch_grid(self.image_size)

    @property
    def preprocess(self) -> Preprocess:
        """The default preprocessing."""
        return Preprocess(self.image_size, self.via, self.normalisation, self.filter, self.lag)


@dataclass(frozen=True)
class Features:
    """A backbone's features of B frames: layer -> [B, prefix + N, channels], a class token first, N patches row-major over the grid."""

    layers: Mapping[str, Tensor]
    prefix: int

    def patches(self, layer: str) -> Tensor:
        """[B, N, channels]."""
        return self.layers[layer][:, self.prefix :]


class Backbone(nn.Module):
    """A network up to its features.

    Attributes:
        dims: layer -> channels, from the shallowest layer to `LAST`.
        described: layer -> its name in the network, such as `block 2`; part of the identity.
        grid: rows and columns of patches.
        prefix: number of tokens before the patches.
        config: settings of the arithmetic that differ from the family's own, as sorted JSON; empty if none do.
    """

    dims: dict[str, int]
    described: dict[str, str]
    grid: tuple[int, int]
    prefix: int = 0
    config: str = ""

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of parameters and config; computed once, because encoders freeze the backbone."""
        parameters = hash_parameters(nn.ModuleDict({"backbone": self}))
        return hashlib.sha256(f"{parameters}{self.config}".encode()).hexdigest() if self.config else parameters

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Compute the features of some layers, each [B, prefix + N, dims[layer]].

        Normalised images are [B, 3, S, S]; for encoders with a lag [B, 2, 3, S, S], the earlier frame first.
        """
        raise NotImplementedError


class Head(nn.Module):
    """Turns the features of `layers` into `grid[0] * grid[1]` tokens of `dim` channels; `prefix` if it reads those before the patches."""

    layers: tuple[str, ...]
    prefix: bool = False
    grid: tuple[int, int]
    dim: int
    base_selection: str = ""  # of a head that reads what `Select` gives, a key of SELECTIONS

    def forward(self, features: Features) -> Tensor:
        """Float32 features -> [B, rows * columns, dim]."""
        raise NotImplementedError


class Select(Head):
    """A selection of the backbone's own tokens."""

    def __init__(self, backbone: Backbone, selection: str) -> None:
        """Select by a key of SELECTIONS."""
        super().__init__()
        assert backbone.prefix or selection != "cls", "this backbone has no class token"
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
                return features.layers[LAST][:, :1]
            case "pooled":
                return features.patches(LAST).mean(1, keepdim=True)
            case _:
                return torch.cat([features.layers[layer] for layer in self.layers], -1)

    def restore(self, tokens: Tensor, *, same: bool = False) -> Features:
        """Return the features that tokens [B, N, D] contain; with `same`, for a head that reads this selection alone.

        Raises:
            UserError: tokens that are neither patch tokens nor layers, for another head.
        """
        if same and self.selection in ("cls", "pooled"):
            return Features({LAST: tokens}, int(self.selection == "cls"))
        if self.selection not in ("patch", "layers"):
            raise UserError(f"{SELECTIONS[self.selection]} alone: nothing can be derived; use patch tokens or layers")
        parts = torch.split(tokens, list(self.dims.values()), -1)
        layers = dict(zip(self.layers, parts, strict=True))
        return Features(layers, self._prefix_tokens * (self.selection == "layers"))


@dataclass(frozen=True)
class Loaded:
    """What a family's loader returns: networks with their weights, and where these came from (hub id and revision, or `file`).

    Attributes:
        decoder: tokens [B, N, D] -> images float [B, 3, S, S] in [0, 1]; None where there is none. No part of the identity.
    """

    backbone: Backbone
    head: Head
    source: str
    decoder: nn.Module | None = None


@dataclass(frozen=True)
class Preprocess:
    """Turns frames into the images that a backbone receives; fields as in `EncoderSpec`."""

    image_size: int
    via: tuple[int, ...]
    normalisation: str
    filter: str
    lag: int

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] -> float32 [..., 3, image_size, image_size], resized and normalised."""
        return self.normalise(self.resize(frames))

    def resize(self, frames: Tensor) -> Tensor:
        """Resize as `__call__` does, to values of 0 to 1 (bicubic slightly beyond)."""
        images = frames.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
        for size in (*self.via, self.image_size):
            if images.shape[-1] != size:
                images = F.interpolate(images, (size, size), mode=self.filter, antialias=True, align_corners=False)
        return images.view(*frames.shape[:-3], 3, self.image_size, self.image_size)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise the channels of what `resize` returns."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in NORMALISATIONS[self.normalisation])
        return (images - mean) / std


def transformer_layer(width: int) -> nn.TransformerEncoderLayer:
    """Make a block of 4 heads without dropout, [B, N, width] -> the same."""
    return nn.TransformerEncoderLayer(
        width, 4, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def hash_parameters(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of parameters and buffers: independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Encoder:
    """A frozen backbone and head with their preprocessing. `create` makes one.

    Attributes:
        weights_sha256: hash of all parameters; equals `backbone_sha256` if the head has none.
        decoder: see `Loaded`; `decode` runs it.
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
        self.decoder = loaded.decoder
        if loaded.decoder is not None:
            networks["decoder"] = loaded.decoder
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

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> NDArray[np.uint8]:
        """Draw frames of tokens [B, N, D] with the encoder's own decoder, uint8 [B, S, S, 3] at its image size.

        Raises:
            UserError: the encoder has no decoder.
        """
        if self.decoder is None:
            hint = "train one on its store with: wmtrain decoder; or fit it again with --overwrite, if its fit has one"
            raise UserError(f"{self.spec.name} has no decoder: {self.weights or self.source}; {hint}")
        drawn = [self.decoder(part.to(self.device).float()) for part in torch.split(tokens, DECODED_AT_ONCE)]
        pixels = (torch.cat(drawn).clamp(0, 1) * 255).round().byte()
        return np.asarray(pixels.permute(0, 2, 3, 1).cpu().numpy())

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
