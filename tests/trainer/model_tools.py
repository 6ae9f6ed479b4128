"""World models small enough to compare number by number, in all their variants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wmcache.trainer.models import DataShape, build

SHAPE = DataShape(tokens=8, token_dim=5, proprio_dim=4, action_dim=10, history=3, columns=4)
IMAGINED = 4
FUTURES = 3
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "head_dim": 4, "mlp": 12, "dropout": 0.0}

_CHOICES = {
    "combine": ("features", "tokens"),
    "condition": ("concat", "adaln"),
    "proprio": ("raw", "embedding", "none"),
    "predict": ("change", "frame"),
    "position": ("learned", "rope"),
    "width": (16, 0),
}
EVERY_VARIANT: list[dict[str, Any]] = [
    variant
    for values in itertools.product(*_CHOICES.values())
    if (variant := dict(zip(_CHOICES, values, strict=True)))["width"] or variant["proprio"] != "raw"
]


def _enough(variants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Some of them, in which every two choices meet that can."""
    met: set[Any] = set()
    for variant in variants:
        pairs = set(itertools.combinations(variant.items(), 2))
        if not pairs <= met:
            met |= pairs
            yield variant


VARIANTS = list(_enough(EVERY_VARIANT))


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)


def some_variants(**fixed: Any) -> list[dict[str, Any]]:
    return [variant for variant in EVERY_VARIANT if fixed.items() <= variant.items()]


def make_statistics(seed: int = 1) -> dict[str, Tensor]:
    """Far from 0 and 1, so that a forgotten (de)standardisation shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"tokens": SHAPE.token_dim, "proprio": SHAPE.proprio_dim, "action": SHAPE.action_dim}
    means = {f"{name}_mean": 3 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    stds = {f"{name}_std": 0.5 + 2 * torch.rand(size, generator=generator) for name, size in sizes.items()}
    return means | stds


def make_model(statistics: dict[str, Tensor] | None = None, shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    return build("dino-wm", shape, SIZES | options, statistics or make_statistics()).eval()


def make_trained_model(**options: Any) -> Any:
    """An untrained model predicts that nothing changes, whatever it attends to; random weights make it show what it sees."""
    model = make_model(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(batch: int = 2, frames: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randn(batch, frames, SHAPE.tokens, SHAPE.token_dim, generator=generator),
        "proprio": torch.randn(batch, frames, SHAPE.proprio_dim, generator=generator),
        "action": torch.rand(batch, frames, SHAPE.action_dim, generator=generator) * 2 - 1,
    }


def make_beginning(observed: int, imagined: int = IMAGINED) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and proprio of the observed frames, and actions."""
    batch = make_batch(frames=observed + imagined)
    return batch["tokens"][:, :observed], batch["proprio"][:, :observed], batch["action"][:, : observed - 1 + imagined]


def make_futures(actions: Tensor, past: int) -> Tensor:
    """[B, S, …] of [B, …]: other actions from `past` on."""
    noise = torch.randn(FUTURES, *actions.shape[1:], generator=torch.Generator().manual_seed(3))
    noise[:, :past] = 0
    return actions[:, None] + noise


def standardised(model: Any, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `predict` takes: tokens, code and action."""
    return (
        (tokens.float() - model.tokens_mean) / model.tokens_std,
        model.embed((proprio - model.proprio_mean) / model.proprio_std),
        (action - model.action_mean) / model.action_std,
    )


def predict(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    predicted: tuple[Tensor, Tensor] = model.predict(*standardised(model, **batch))
    return predicted
