"""DisWM (arXiv 2503.08751): an RSSM that sees frames through a beta-VAE, whose latents are distilled from a frozen teacher.

The teacher is trained on videos without actions, the student on data with actions. Here the beta-VAE sees cached tokens, so no frame is
encoded again. Differences from the released code (qiwang067/DisWM):

- It distils samples, so both sides are noisy; here the means are distilled.
- It sums the distillation over the frames of a sequence (`batchmean` of three dimensions); here it is the mean over frames.
- Its schedule counts env steps; here it counts optimiser steps.

As there, latents are compared by their softmax: only their differences within a frame are distilled, and an offset is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import dump_json
from wmcache.common.options import Positive, Weight, option
from wmcache.engine.mlp import make_mlp
from wmcache.engine.token_vae import (
    MeanEncoder,
    TokenDecoder,
    VaeSizes,
    divergence,
    moments,
    softmax_divergence,
)
from wmcache.trainer.models import MODELS, DataShape
from wmcache.trainer.models.rssm import Rssm, RssmOptions
from wmcache.trainer.runs import load_trained, read_config, read_identity, weights_checksum

LEAST_SHARE = 0.1
"""Of the weight of the distillation, at the end of its schedule."""
DIGITS = 32
"""Of the SHA-256 of a teacher's weights, which a run records."""
OWN = re.compile(r"(teacher|heads)\.|(proprio|action)_(mean|std)$|trained_steps$")
"""What `--init teacher` does not take from the teacher."""


@dataclass(frozen=True)
class DiswmOptions(RssmOptions):
    """Sizes and variants."""

    z_dim: Positive = option(20, "Latents of the beta-VAE, which the memory sees.", group="Model")
    beta: Weight = option(0.015, "Weight of the KL divergence of a frame's latents from the standard normal, in nats.")
    redraw_weight: Weight = option(
        1.0,
        "Weight of tokens that are decoded from latents alone, so that latents can be drawn; 0: tokens are decoded from states only (the "
        "paper's code).",
    )
    teacher: str = option(
        "",
        "Run of this model whose latents are distilled; to resume without its folder, the checksum in config.json.  [default: none]",
    )
    init: Literal["random", "teacher"] = option(
        "random", "Begin with random weights, or those of the teacher that fit."
    )
    distill_weight: Weight = option(0.1, "Weight of the distillation, the KL divergence from the teacher's latents.")
    distill_steps: Positive = option(50_000, "Optimiser steps of the schedule of --distill-weight.")
    cross_domain: bool = option(
        False,
        "Begin to distil after --distill-steps, for a teacher of another kind of task; or at once.",
        flag="--cross-domain/--same-domain",
    )

    def __post_init__(self) -> None:
        """Refuse to begin with the weights of no teacher."""
        super().__post_init__()
        if self.init == "teacher" and not self.teacher:
            raise UserError("--init teacher needs the teacher's weights; add --teacher RUN")


class _Decoder(nn.Module):
    """States [..., state] -> frames [..., V + Q]: tokens through as many numbers as the VAE has latents, and proprio."""

    def __init__(self, state: int, sizes: VaeSizes, proprio: int) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(state, sizes.latents)
        self.tokens = sizes.make_decoder()
        self.proprio = make_mlp(state, sizes.hidden, sizes.layers, proprio) if proprio else None

    def forward(self, state: Tensor) -> Tensor:
        tokens = self.tokens(self.bottleneck(state))
        return tokens if self.proprio is None else torch.cat([tokens, self.proprio(state)], -1)


@MODELS.register("diswm")
class DisWm(Rssm):
    """DisWM, see the module. The posterior sees latents of the beta-VAE, drawn while training and else their mean, and proprio.

    Attributes:
        teacher: the teacher's encoder, frozen; None without one. It is part of the checkpoints.
    """

    Options = DiswmOptions
    options: DiswmOptions
    trained_steps: Tensor

    def __init__(self, shape: DataShape, options: DiswmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values."""
        sizes = options.z_dim, options.hidden, options.layers
        self.sizes = VaeSizes(shape.tokens, shape.token_dim, *sizes)
        super().__init__(shape, options, statistics)
        self.teacher = MeanEncoder(self.sizes).requires_grad_(False) if options.teacher else None
        self.register_buffer("trained_steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: DiswmOptions) -> DiswmOptions:
        """See `Trainable.configure`; the path of the teacher's run becomes the checksum of its weights."""
        options = cast(DiswmOptions, super().configure(store, windows, options))
        return replace(options, teacher=_check_teacher(options, store)) if options.teacher else options

    def initialise(self, given: DiswmOptions) -> None:
        """See `Trainable.initialise`."""
        if self.teacher is None:
            return
        run, device = Path(given.teacher), self.tokens_mean.device
        if not run.is_dir() or _checksum(run) != self.options.teacher:
            raise UserError(f"--teacher {run} is not the run with the weights {self.options.teacher}; name that run")
        model = cast(DisWm, load_trained(run, device))
        self.teacher.load_state_dict(model.mean_encoder().state_dict())
        if self.options.init == "teacher":
            own = self.state_dict()
            fitting = {
                name: value
                for name, value in model.state_dict().items()
                if name in own and own[name].shape == value.shape and not OWN.match(name)
            }
            self.load_state_dict(own | fitting)

    def make_encoder(self) -> tuple[nn.Module, int]:
        """See `Rssm.make_encoder`; proprio is not encoded."""
        return self.sizes.make_encoder(), self.sizes.latents + self.proprio_size

    def make_decoder(self, state: int) -> nn.Module:
        """See `Rssm.make_decoder`."""
        return _Decoder(state, self.sizes, self.proprio_size)

    def embed(self, tokens: Tensor, proprio: Tensor) -> Tensor:
        """See `Rssm.embed`."""
        mean, _ = moments(self.encoder(tokens))
        return torch.cat([mean, proprio], -1)

    def encode(self, tokens: Tensor, proprio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Rssm.encode`; adds the divergence of the latents, the error of tokens drawn from them, and the distillation."""
        options = self.options
        mean, logvar = moments(self.encoder(tokens))
        latents = mean + (logvar / 2).exp() * torch.randn_like(mean) if self.training else mean
        losses = {"divergence": options.beta * divergence(mean, logvar)}
        if options.redraw_weight:
            drawn = cast(_Decoder, self.decoder).tokens(latents).float()
            losses["redraw"] = options.redraw_weight * (drawn - tokens).square().sum(-1)
        if self.teacher is not None and options.distill_weight:
            frames = rearrange(tokens, "... (n d) -> ... n d", n=self.sizes.tokens)
            target = self.teacher(frames * self.tokens_std + self.tokens_mean)
            losses["distillation"] = self.distillation_weight() * softmax_divergence(target, mean)
        return torch.cat([latents, proprio], -1), losses

    def distillation_weight(self) -> Tensor:
        """Return the weight of the distillation at the present step."""
        done = self.trained_steps / self.options.distill_steps
        if not self.options.cross_domain:
            return self.options.distill_weight * (1 - done).clamp_min(LEAST_SHARE)
        return self.options.distill_weight * (2 - done).clamp_min(LEAST_SHARE) * (done >= 1)

    def after_step(self) -> None:
        """Count the step."""
        self.trained_steps += 1

    def mean_encoder(self) -> MeanEncoder:
        """Return the encoder of the latents' means, of tokens in the store's units."""
        found = MeanEncoder(self.sizes).to(self.tokens_mean.device)
        found.network.load_state_dict(self.encoder.state_dict())
        found.set_units(self.tokens_mean, self.tokens_std)
        return found

    def trained_encoder(self, store: TokenStore) -> tuple[dict[str, Tensor], dict[str, str]]:
        """See `Trainable.trained_encoder`: the encoder `diswm`, and what draws its tokens as those of the store."""
        parts: dict[str, nn.Module] = {"encoder": self.mean_encoder()}
        if self.options.redraw_weight:
            drawing = TokenDecoder(self.sizes).to(self.tokens_mean.device)
            drawing.network.load_state_dict(cast(_Decoder, self.decoder).tokens.state_dict())
            drawing.set_units(self.tokens_mean, self.tokens_std)
            parts["decoder"] = drawing
        selection, sizes = store.identity.token_selection, asdict(self.sizes)
        header = {
            "encoder": "diswm",
            "dataset": store.identity.dataset_fingerprint,
            "options": dump_json({"sizes": sizes, "selection": selection}, sort_keys=True),
            "base": dump_json(store.card.encoder, sort_keys=True),
            "base_sha256": store.identity.weights_sha256,
        }
        return dict(nn.ModuleDict(parts).state_dict()), header


def _check_teacher(options: DiswmOptions, store: TokenStore) -> str:
    """Return the recorded digits of a teacher's checksum; raises UserError where it cannot be the teacher of a student on this store."""
    run, known = Path(options.teacher), re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", options.teacher)
    if known and not run.exists():
        return options.teacher
    config = read_config(run)
    if config["model"] != "diswm":
        raise UserError(f"--teacher {run} is of model {config['model']}; name a run of diswm")
    theirs, ours = config["model_options"], asdict(options)
    different = [
        f"--{name.replace('_', '-')} {theirs.get(name)} != {ours[name]}"
        for name in ("z_dim", "hidden", "layers")
        if theirs.get(name) != ours[name]
    ]
    here = store.identity
    there = read_identity(run)[1]
    there = replace(there, dataset_fingerprint=here.dataset_fingerprint, store_dtype=here.store_dtype)
    different += there.differences(here)
    shape: Mapping[str, Any] = config["shape"]
    if (found := (shape["tokens"], shape["token_dim"])) != store.card.frame_shape:
        different.append(f"tokens of {found} != {store.card.frame_shape}")
    if different:
        raise UserError(f"--teacher {run} cannot be that of a student on {store.path}: {'; '.join(different)}")
    return _checksum(run)


def _checksum(run: Path) -> str:
    return weights_checksum(run)[:DIGITS]
