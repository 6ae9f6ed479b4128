"""World models small enough to compare number by number, in all their variants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wmcache.engine.codebook import Codebook
from wmcache.trainer.models import MODELS, DataShape, build, rollout
from wmcache.trainer.presets import PRESETS

SHAPE = DataShape(tokens=8, token_dim=5, proprio_dim=4, action_dim=10, history=3, columns=4)
IMAGINED = 4
FUTURES = 3
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "head_dim": 4, "mlp": 12, "dropout": 0.0}
K = 3
DDP_SIZES: dict[str, Any] = {
    **SIZES,
    **{"foreground": K, "locator_width": 6, "locator_depth": 1, "locator_heads": 2, "locator_mlp": 8},
    # The combined frame has 5 + 3 + 3 dimensions, or 5 + 3, so heads do not always divide it.
    **{"embedding": 3, "fusion_heads": 2, "correction_heads": 2},
}


def variants_of(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations that can be built."""
    every = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    return [variant for variant in every if variant["width"] or variant["proprio"] != "raw"]


EVERY_VARIANT = variants_of(
    {
        "combine": ("features", "tokens"),
        "condition": ("concat", "adaln"),
        "proprio": ("raw", "embedding", "none"),
        "predict": ("change", "frame"),
        "position": ("learned", "rope"),
        "width": (16, 0),
    }
)
DDP_VARIANTS = variants_of({"proprio": ("raw", "embedding", "none"), "predict": ("change", "frame"), "width": (16, 0)})
DEFAULTS: dict[str, Any] = {"proprio": "raw", "predict": "change", "width": 16}
REFERENCE: dict[str, Any] = {"proprio": "embedding", "predict": "frame", "width": 0}


def _pairwise(variants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A few variants that cover every pair of choices."""
    met: set[Any] = set()
    for variant in variants:
        pairs = set(itertools.combinations(variant.items(), 2))
        if not pairs <= met:
            met |= pairs
            yield variant


VARIANTS = list(_pairwise(EVERY_VARIANT))


def name_of(variant: Any) -> str:
    return "-".join(map(str, variant.values())) if isinstance(variant, dict) else str(variant)


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
each_ddp_variant = pytest.mark.parametrize("variant", DDP_VARIANTS, ids=name_of)


def some_variants(**fixed: Any) -> list[dict[str, Any]]:
    return [variant for variant in EVERY_VARIANT if fixed.items() <= variant.items()]


def make_statistics(seed: int = 1) -> dict[str, Tensor]:
    """Far from 0 and 1, so that a missing (de)standardisation shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"tokens": SHAPE.token_dim, "proprio": SHAPE.proprio_dim, "action": SHAPE.action_dim}
    means = {f"{name}_mean": 3 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    stds = {f"{name}_std": 0.5 + 2 * torch.rand(size, generator=generator) for name, size in sizes.items()}
    return means | stds


def make_model(statistics: dict[str, Tensor] | None = None, shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    return build("dino-wm", shape, SIZES | options, statistics or make_statistics()).eval()


def build_preset(name: str, history: int = 3) -> tuple[Any, set[str]]:
    """The model of a preset at the reference's sizes, without memory; and which of its options the preset leaves out."""
    known = {field.name for field in fields(MODELS.get(name).Options)}
    values = {key.replace("-", "_"): value for key, value in PRESETS[name].items()}
    options = {key: value for key, value in values.items() if key in known}
    shape = DataShape(tokens=196, token_dim=384, proprio_dim=4, action_dim=10, history=history, columns=14)
    sizes = {"tokens": 384, "proprio": 4, "action": 10}
    with torch.device("meta"):
        statistics = {f"{name}_{of}": torch.ones(size) for name, size in sizes.items() for of in ("mean", "std")}
        return build(name, shape, options, statistics), known - set(options)


def make_trained_model(**options: Any) -> Any:
    """A model with random weights; an untrained one predicts no change, whatever its input."""
    return randomise(make_model(**options))


def make_ddp_model(stage: str = "lrm", shape: DataShape = SHAPE, **options: Any) -> Any:
    """DDP-WM with random weights, in a stage of its training."""
    torch.manual_seed(0)
    model = randomise(build("ddp-wm", shape, DDP_SIZES | options, make_statistics()))
    model.begin(stage)
    return model.eval()


def make_trained(name: str, **options: Any) -> Any:
    return (make_ddp_model if name == "ddp-wm" else make_trained_model)(**options)


def randomise(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, Codebook):
            nn.init.normal_(module.entries)
    return model


def make_batch(batch: int = 2, frames: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randn(batch, frames, SHAPE.tokens, SHAPE.token_dim, generator=generator),
        "proprio": torch.randn(batch, frames, SHAPE.proprio_dim, generator=generator),
        "action": torch.rand(batch, frames, SHAPE.action_dim, generator=generator) * 2 - 1,
    }


def make_observed(observed: int, imagined: int = IMAGINED) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and proprio of the observed frames, and actions."""
    batch = make_batch(frames=observed + imagined)
    return batch["tokens"][:, :observed], batch["proprio"][:, :observed], batch["action"][:, : observed - 1 + imagined]


def make_futures(actions: Tensor, past: int) -> Tensor:
    """[B, S, …] of [B, …]: other actions from `past` on."""
    noise = torch.randn(FUTURES, *actions.shape[1:], generator=torch.Generator().manual_seed(3))
    noise[:, :past] = 0
    return actions[:, None] + noise


def roll_out(
    model: Any, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
) -> tuple[Tensor, Tensor]:
    """Latents and proprio of one future [B, n - 1 + T, f * A] of each sequence, or of several [B, S, n - 1 + T, f * A]."""
    model.context = context or model.shape.history
    if actions.ndim == 3:
        found = rollout(model, tokens, proprio, actions)
        return found.latents[:, 0], found.proprio[:, 0]
    belief, observed = model.start(len(tokens)), tokens.shape[1]
    for t in range(observed):
        belief = model.observe(belief, tokens[:, t], proprio[:, t], actions[:, 0, t - 1] if t else None)
    found = model.imagine(belief, actions[:, :, observed - 1 :])
    return found.latents, found.proprio


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised tokens, the proprio embedding and standardised actions, as `predict` takes them."""
    tokens, proprio, action = model.standardise(batch["tokens"], batch["proprio"], batch["action"])
    return tokens, model.embed(proprio), action


def predict(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    predicted: tuple[Tensor, Tensor] = model.predict(*model_inputs(model, batch))
    return predicted


def generators(*seeds: int) -> list[torch.Generator]:
    """One for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def remember(model: Any, batch: dict[str, Tensor], frames: int) -> Any:
    """Return a model's belief after the first frames of a batch."""
    belief = model.start(len(batch["tokens"]))
    for t in range(frames):
        action = batch["action"][:, t - 1] if t else None
        belief = model.observe(belief, batch["tokens"][:, t], batch["proprio"][:, t], action)
    return belief


def require_noise_of_each_episode(model: Any, batch: dict[str, Tensor]) -> None:
    """Assert that what an episode draws depends on its generator alone, and that nothing is drawn at temperature 0."""
    belief, futures = remember(model, batch, 2), make_futures(batch["action"], past=0)
    together = model.imagine(belief, futures, generators(1, 2)).latents
    alone = {name: value[1:] for name, value in belief.items()}
    for part in (slice(0, 2), slice(1, 3)):  # candidates see the same noise, however they are cut
        found = model.imagine(alone, futures[1:, part], generators(2)).latents
        torch.testing.assert_close(found, together[1:, part], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(model.imagine(belief, futures, generators(1, 3)).latents[1], together[1]).all()
    certain = model.imagine(belief, futures).latents
    model.temperature = 0.0
    assert torch.equal(model.imagine(belief, futures, generators(1, 2)).latents, certain)
    assert not torch.isclose(certain, together).all()
