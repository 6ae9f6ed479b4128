"""The frame-causal transformer in all its variants: what may see what, what it learns from, and what it refuses to be built from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    DDP_SIZES,
    SHAPE,
    build_preset,
    each_variant,
    make_batch,
    make_model,
    make_statistics,
    make_trained_model,
    model_inputs,
    name_of,
    predict,
    roll_out,
    some_variants,
)
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.trainer.models import build

GRADIENT_STEPS = 3


def inputs_of(variant: dict[str, Any]) -> list[str]:
    return ["tokens", "action"] + ["proprio"] * (variant["proprio"] != "none")


def changed(batch: dict[str, Tensor], frame: int, *names: str) -> dict[str, Tensor]:
    """The batch with 1 added to a frame of these inputs."""
    other = {name: value.clone() for name, value in batch.items()}
    for name in names:
        other[name][:, frame] += 1
    return other


class TestMask:
    @each_variant
    def test_a_frame_has_no_influence_on_the_past(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        for frame in (1, 2):
            perturbed = changed(batch, frame, "tokens", "proprio", "action")
            for before, after in zip(predict(model, batch), predict(model, perturbed), strict=True):
                assert torch.equal(before[:, :frame], after[:, :frame])

    @each_variant
    def test_every_input_reaches_all_tokens_of_its_own_and_of_later_frames(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        before = predict(model, batch)
        for name in inputs_of(variant):
            for old, new in zip(before, predict(model, changed(batch, 1, name)), strict=True):
                assert torch.equal(old[:, :1], new[:, :1])
                assert not torch.isclose(old[:, 1:], new[:, 1:]).all(-1).any() or not old.shape[-1]

    @each_variant
    def test_permuting_patches_with_their_positions_permutes_outputs(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        tokens, embedding = predict(model, batch)
        order = torch.randperm(SHAPE.tokens, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.position[..., : SHAPE.tokens, :] = model.position[..., order, :]
        permuted = predict(model, {**batch, "tokens": batch["tokens"][:, :, order]})
        torch.testing.assert_close(permuted[0], tokens[:, :, order])
        torch.testing.assert_close(permuted[1], embedding[:, :, order] if embedding.shape[2] > 1 else embedding)


class TestVariants:
    @each_variant
    def test_the_loss_reaches_every_parameter(self, variant: dict[str, Any]) -> None:
        model = make_trained_model(**variant)
        model.loss(make_batch(frames=4))["loss"].backward()
        assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []

    @each_variant
    def test_the_loss_in_bfloat16_differs_by_rounding_alone(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant, rollout_loss=1.0), make_batch(frames=4)
        loss = model.loss(batch)["loss"]
        with autocast(torch.device("cpu"), torch.bfloat16):
            rounded = model.loss(batch)["loss"]
        rounded.backward()
        torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)

    @pytest.mark.parametrize("variant", some_variants(condition="adaln", predict="frame", width=16), ids=name_of)
    def test_an_adaptive_norm_starts_without_the_action_and_learns_it(self, variant: dict[str, Any]) -> None:
        model, batch, training = make_model(**variant), make_batch(), make_batch(frames=4)
        other = changed(batch, 0, "action")
        assert torch.equal(predict(model, batch)[0], predict(model, other)[0])
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(GRADIENT_STEPS):
            optimiser.zero_grad()
            model.loss(training)["loss"].backward()
            optimiser.step()
        assert not torch.equal(predict(model, batch)[0], predict(model, other)[0])

    def test_latents_need_not_be_standardised(self) -> None:
        models = [make_trained_model(standardise=False, statistics=make_statistics(seed)) for seed in (1, 2)]
        for name in ("proprio_mean", "proprio_std", "action_mean", "action_std"):
            setattr(models[1], name, getattr(models[0], name))
        batch = make_batch(frames=4)
        assert torch.equal(*(roll_out(model, *batch.values())[0] for model in models))
        assert torch.equal(model_inputs(models[0], batch)[0], batch["tokens"])

    def test_the_preset_has_as_many_parameters_as_the_reference(self) -> None:
        model, left_out = build_preset("dino-wm")
        assert left_out == set()
        counts = {name: value.numel() for name, value in model.named_parameters()}
        embeddings = sum(count for name, count in counts.items() if name.startswith("embed_"))
        assert (sum(counts.values()) - embeddings, embeddings) == (20_122_600, 160)
        assert counts["position"] == 3 * 196 * 404


class TestLoss:
    def test_standardised_errors_are_weighted_by_their_dimensions(self) -> None:
        statistics, batch = make_statistics(), make_batch(frames=4)
        losses = make_model(statistics).loss(batch)
        # An untrained model predicts no change, so its errors are the changes from frame to frame.
        tokens = ((batch["tokens"][:, 1:] - batch["tokens"][:, :-1]) / statistics["tokens_std"]).square().mean()
        proprio = ((batch["proprio"][:, 1:] - batch["proprio"][:, :-1]) / statistics["proprio_std"]).square().mean()
        torch.testing.assert_close(losses["tokens"], tokens)
        torch.testing.assert_close(losses["proprio"], proprio)
        dimensions = SHAPE.token_dim + SHAPE.proprio_dim
        expected = (SHAPE.token_dim * tokens + SHAPE.proprio_dim * proprio) / dimensions
        torch.testing.assert_close(losses["loss"], expected)

    @pytest.mark.parametrize("variant", some_variants(proprio="embedding", width=0), ids=name_of)
    def test_the_loss_of_the_reference_is_the_mean_over_the_combined_frame(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch(frames=4)
        tokens, embedding, _ = model_inputs(model, batch)
        predicted = predict(model, {name: value[:, :-1] for name, value in batch.items()})
        if variant["combine"] == "features":  # D + 10 dimensions of each patch
            target = torch.cat([tokens, embedding.expand(-1, -1, SHAPE.tokens, -1)], -1)[:, 1:]
            expected = F.mse_loss(torch.cat(predicted, -1), target)
        else:  # N + 1 tokens
            expected = F.mse_loss(torch.cat(predicted, 2), torch.cat([tokens, embedding], 2)[:, 1:])
        torch.testing.assert_close(model.loss(batch)["loss"], expected)

    @each_variant
    def test_no_gradient_comes_through_the_target(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant, rollout_loss=1.0), make_batch(frames=4)
        for value in batch.values():
            value.requires_grad_()
        model.loss(batch)["loss"].backward()
        for name in inputs_of(variant):
            assert batch[name].grad is not None
            assert batch[name].grad[:, :-1].flatten(2).any(-1).all()
            assert not batch[name].grad[:, -1].any()

    @pytest.mark.parametrize("variant", some_variants(predict="frame"), ids=name_of)
    def test_the_rollout_loss_is_of_a_second_step_from_the_first_predictions(self, variant: dict[str, Any]) -> None:
        # With three frames only the last can be a second step: from frame 0, one frame of context after the other.
        once, batch = make_trained_model(**variant), make_batch(frames=3)
        twice = make_trained_model(**variant, rollout_loss=0.5)
        losses = twice.loss(batch)
        observed = batch["tokens"][:, :1], batch["proprio"][:, :1]
        imagined, embeddings = roll_out(twice, *observed, batch["action"][:, :2], context=1)
        tokens, embedding, _ = model_inputs(twice, batch)
        second = F.mse_loss((imagined[:, 1] - twice.tokens_mean) / twice.tokens_std, tokens[:, 2])
        if variant["proprio"] == "none":
            torch.testing.assert_close(losses["rollout"], second)
        elif variant["proprio"] == "raw":
            error = F.mse_loss(embeddings[:, 1], embedding[:, 2, 0])
            dimensions = SHAPE.token_dim + SHAPE.proprio_dim
            expected = (SHAPE.token_dim * second + SHAPE.proprio_dim * error) / dimensions
            torch.testing.assert_close(losses["rollout"], expected)
        torch.testing.assert_close(losses["loss"], once.loss(batch)["loss"] + 0.5 * losses["rollout"])

    def test_the_gradient_stops_between_the_two_steps(self) -> None:
        model, batch = make_trained_model(rollout_loss=1.0), make_batch(frames=4)
        inputs = tuple(value.requires_grad_() for value in batch.values())
        tokens, proprio, action = torch.autograd.grad(model.loss(batch)["rollout"], inputs, allow_unused=True)
        assert tokens is None
        assert proprio is None
        # The second step starts after frame 0, and the action of frame 3 leads out of the window.
        assert [bool(action[:, frame].any()) for frame in range(4)] == [False, True, True, False]

    def test_noise_is_added_to_the_input_while_training_alone(self) -> None:
        model, batch = make_model(noise=0.5), make_batch(frames=4)
        clean = make_model().loss(batch)
        assert torch.equal(model.loss(batch)["loss"], clean["loss"])
        tokens, _, _ = model_inputs(model, batch)
        torch.manual_seed(3)
        seen = tokens[:, :-1] + 0.5 * torch.randn_like(tokens[:, :-1])
        torch.manual_seed(3)
        noisy = model.train().loss(batch)
        torch.testing.assert_close(noisy["tokens"], F.mse_loss(seen, tokens[:, 1:]))
        torch.testing.assert_close(noisy["proprio"], clean["proprio"])

    @each_variant
    def test_on_a_coarse_grid_it_is_that_of_a_store_of_averaged_tokens(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant, rollout_loss=1.0), make_batch(frames=4)
        coarse_shape = replace(SHAPE, tokens=SHAPE.tokens // 4, columns=SHAPE.columns // 2)
        coarse = make_model(shape=coarse_shape, **variant, rollout_loss=1.0)
        weights = model.state_dict()
        squares = [[0, 1, 4, 5], [2, 3, 6, 7]]  # rows of 4, squares of 2 x 2
        patches = torch.stack([weights["position"][..., square, :].mean(-2) for square in squares], -2)
        weights["position"] = torch.cat([patches, weights["position"][..., SHAPE.tokens :, :]], -2)
        coarse.load_state_dict(weights)
        averaged = torch.stack([batch["tokens"][:, :, square].mean(2) for square in squares], 2)
        expected = coarse.loss({**batch, "tokens": averaged})
        for name, value in model.loss(batch, pool=2).items():
            torch.testing.assert_close(value, expected[name])

    def test_a_constant_channel_gives_a_finite_loss(self) -> None:
        statistics, batch = make_statistics(), make_batch(frames=4)
        statistics["tokens_std"][0] = 0
        batch["tokens"][..., 0] = statistics["tokens_mean"][0]
        assert make_model(statistics).loss(batch)["loss"].isfinite()


class TestBuilding:
    @pytest.mark.parametrize(
        ("name", "options", "named"),
        [
            ("dino-wm", {"layers": 3}, "layers"),
            ("dino-wm", {"width": 16.5}, "width"),
            ("dino-wm", {"width": 16, "head_dim": 5}, "--width, --heads or --head-dim"),
            ("ddp-wm", {"width": 15}, "--width 15 .*--heads 2.*--head-dim"),
            ("ddp-wm", {"width": 0, "head_dim": 4}, "--width 0 .*--proprio"),
            ("ddp-wm", {"locator_width": 7}, "--locator-width 7 .*--locator-heads 2"),
        ],
    )
    def test_options_that_do_not_fit_are_refused_by_name(self, name: str, options: dict[str, Any], named: str) -> None:
        sizes = DDP_SIZES | {"head_dim": 0} if name == "ddp-wm" else {}
        with pytest.raises(UserError, match=named):
            build(name, SHAPE, sizes | options, make_statistics())
