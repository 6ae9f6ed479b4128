"""The frame-causal transformer: what may see what, which units it speaks, and what it refuses to be built from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wmcache.cache import UserError
from wmcache.trainer.models import MODELS, DataShape, WorldModel, build

SHAPE = DataShape(tokens=3, token_dim=5, proprio_dim=4, action_dim=10, history=3)
SIZES = {"width": 16, "depth": 2, "heads": 2, "dropout": 0.0}


def make_statistics(seed: int = 1) -> dict[str, Tensor]:
    """Far from 0 and 1, so that a forgotten (de)standardisation shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"tokens": SHAPE.token_dim, "proprio": SHAPE.proprio_dim, "action": SHAPE.action_dim}
    means = {f"{name}_mean": 3 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    stds = {f"{name}_std": 0.5 + 2 * torch.rand(size, generator=generator) for name, size in sizes.items()}
    return means | stds


def make_model(statistics: dict[str, Tensor] | None = None) -> Any:
    torch.manual_seed(0)
    return build("dino-wm", SHAPE, SIZES, statistics or make_statistics()).eval()


def make_trained_model() -> Any:
    """An untrained model predicts that nothing changes, whatever it attends to; random weights make it show what it sees."""
    model = make_model()
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


@pytest.mark.parametrize("changed", ["tokens", "proprio", "action"])
@pytest.mark.parametrize("frame", [0, 1, 2])
def test_a_frame_has_no_influence_on_the_past(changed: str, frame: int) -> None:
    model, batch = make_trained_model(), make_batch()
    perturbed = {**batch, changed: batch[changed].clone()}
    perturbed[changed][:, frame] += 1
    for before, after in zip(model.predict(**batch), model.predict(**perturbed), strict=True):
        assert torch.equal(before[:, :frame], after[:, :frame])
        assert not torch.isclose(before[:, frame:], after[:, frame:]).flatten(2).all(-1).any()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_prefix_is_predicted_as_in_the_longer_run(frames: int) -> None:
    model, batch = make_trained_model(), make_batch()
    whole = model.predict(**batch)
    prefix = model.predict(**{name: value[:, :frames] for name, value in batch.items()})
    for long, short in zip(whole, prefix, strict=True):
        torch.testing.assert_close(short, long[:, :frames])


@pytest.mark.parametrize("token", range(SHAPE.tokens))
def test_every_token_of_a_frame_sees_every_other_one(token: int) -> None:
    model, batch = make_trained_model(), make_batch()
    perturbed = {**batch, "tokens": batch["tokens"].clone()}
    perturbed["tokens"][:, 1, token] += 1
    before, after = model.predict(**batch)[0], model.predict(**perturbed)[0]
    assert not torch.isclose(before[:, 1], after[:, 1]).all(-1).any()


def test_an_untrained_model_copies_the_observed_frame() -> None:
    model, batch = make_model(), make_batch()
    tokens, proprio = model.rollout(batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"])
    torch.testing.assert_close(tokens, batch["tokens"][:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(proprio, batch["proprio"][:, :1].expand(-1, 3, -1))


def test_the_loss_weighs_standardised_errors_by_their_dimensions() -> None:
    statistics, batch = make_statistics(), make_batch(frames=4)
    losses = make_model(statistics).loss(batch)
    # What an untrained model leaves unexplained is the whole change from frame to frame.
    tokens = ((batch["tokens"][:, 1:] - batch["tokens"][:, :-1]) / statistics["tokens_std"]).square().mean()
    proprio = ((batch["proprio"][:, 1:] - batch["proprio"][:, :-1]) / statistics["proprio_std"]).square().mean()
    torch.testing.assert_close(losses["tokens"], tokens)
    torch.testing.assert_close(losses["proprio"], proprio)
    dimensions = SHAPE.token_dim + SHAPE.proprio_dim
    expected = (SHAPE.token_dim * tokens + SHAPE.proprio_dim * proprio) / dimensions
    torch.testing.assert_close(losses["loss"], expected)


def test_the_loss_predicts_from_actions_but_never_predicts_actions() -> None:
    model, batch = make_trained_model(), make_batch(frames=4)
    target_changed = {**batch, "action": batch["action"].clone()}
    target_changed["action"][:, -1] += 1
    assert torch.equal(model.loss(target_changed)["loss"], model.loss(batch)["loss"])
    context_changed = {**batch, "action": batch["action"].clone()}
    context_changed["action"][:, -2] += 1
    assert not torch.isclose(model.loss(context_changed)["loss"], model.loss(batch)["loss"])


def test_the_loss_reaches_every_parameter() -> None:
    model = make_trained_model()
    model.loss(make_batch(frames=4))["loss"].backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("observed", [1, 2, 3, 5])
@pytest.mark.parametrize("imagined", [1, 2, 5])
def test_a_rollout_returns_the_frames_after_the_observed_ones(observed: int, imagined: int) -> None:
    batch = make_batch(frames=observed + imagined)
    tokens, proprio = make_model().rollout(
        batch["tokens"][:, :observed], batch["proprio"][:, :observed], batch["action"][:, : observed - 1 + imagined]
    )
    assert tokens.shape == (2, imagined, SHAPE.tokens, SHAPE.token_dim)
    assert proprio.shape == (2, imagined, SHAPE.proprio_dim)


def test_a_rollout_with_one_frame_of_context_is_one_step_after_another() -> None:
    model, batch = make_trained_model(), make_batch(frames=4)
    tokens, proprio = batch["tokens"][:, :1], batch["proprio"][:, :1]
    rollout = model.rollout(tokens, proprio, batch["action"], context=1)
    for step in range(4):
        tokens, proprio = model.rollout(tokens, proprio, batch["action"][:, step : step + 1])
        torch.testing.assert_close(rollout[0][:, step : step + 1], tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout[1][:, step : step + 1], proprio, rtol=1e-4, atol=1e-4)


def test_a_rollout_speaks_the_units_of_the_store() -> None:
    statistics, batch = make_statistics(), make_batch()
    model = make_trained_model()
    standardised = {
        name: (value - statistics[f"{name}_mean"]) / statistics[f"{name}_std"] for name, value in batch.items()
    }
    tokens, proprio = (predicted[:, -1:] for predicted in model.predict(**standardised))
    imagined = model.rollout(batch["tokens"], batch["proprio"], batch["action"])
    torch.testing.assert_close(imagined[0], tokens * statistics["tokens_std"] + statistics["tokens_mean"])
    torch.testing.assert_close(imagined[1], proprio * statistics["proprio_std"] + statistics["proprio_mean"])


def test_a_rollout_forgets_what_is_older_than_the_history() -> None:
    model, batch = make_trained_model(), make_batch(frames=5)
    recent = {name: value[:, 2:] for name, value in batch.items()}
    torch.testing.assert_close(model.rollout(**as_rollout(batch))[0], model.rollout(**as_rollout(recent))[0])


def as_rollout(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"tokens": batch["tokens"], "proprio": batch["proprio"], "actions": batch["action"]}


def test_a_rollout_takes_the_half_precision_of_the_store() -> None:
    model, batch = make_trained_model(), make_batch()
    half = {**batch, "tokens": batch["tokens"].half()}
    imagined, _ = model.rollout(**as_rollout(half))
    assert imagined.dtype == torch.float32
    expected, _ = model.rollout(**as_rollout({**half, "tokens": half["tokens"].float()}))
    torch.testing.assert_close(imagined, expected)


def test_its_weights_bring_the_statistics_along() -> None:
    batch = make_batch()
    model, other = make_trained_model(), make_model(make_statistics(seed=9))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.rollout(**as_rollout(batch))[0], other.rollout(**as_rollout(batch))[0])


def test_a_channel_that_never_varies_gives_finite_predictions() -> None:
    statistics = make_statistics()
    statistics["tokens_std"][0] = 0
    batch = make_batch(frames=4)
    batch["tokens"][..., 0] = statistics["tokens_mean"][0]
    assert make_model(statistics).loss(batch)["loss"].isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_every_registered_model_is_a_world_model(name: str) -> None:
    assert isinstance(build(name, SHAPE, SIZES, make_statistics()), WorldModel)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dreamer", {}, "no world model 'dreamer'; known are dino-wm"),
        ("dino-wm", {"layers": 3}, "layers"),
        ("dino-wm", {"width": 16, "heads": 3}, "--width 16 is not a multiple of --heads 3"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        build(name, SHAPE, options, make_statistics())
    assert "\n" not in str(refusal.value)
