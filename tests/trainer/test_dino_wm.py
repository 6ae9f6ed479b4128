"""The frame-causal transformer in all its variants: what may see what, what it learns from, and what it refuses to be built from."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    SHAPE,
    SIZES,
    each_variant,
    make_batch,
    make_model,
    make_statistics,
    make_trained_model,
    name_of,
    predict,
    some_variants,
    standardised,
)
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.trainer.models import MODELS, DataShape, WorldModel, build
from wmcache.trainer.models.dino_wm import DinoWm, DinoWmOptions
from wmcache.trainer.models.latent import pool_grid
from wmcache.trainer.presets import PRESETS

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
                # An input that were a token of another frame would reach too little, or too much.
                assert torch.equal(old[:, :1], new[:, :1])
                assert not torch.isclose(old[:, 1:], new[:, 1:]).all(-1).any() or not old.shape[-1]

    @each_variant
    def test_every_patch_of_a_frame_sees_every_other_one(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        before = predict(model, batch)[0]
        for patch in (0, SHAPE.tokens - 1):
            perturbed = {**batch, "tokens": batch["tokens"].clone()}
            perturbed["tokens"][:, 1, patch] += 1
            assert not torch.isclose(before[:, 1], predict(model, perturbed)[0][:, 1]).all(-1).any()

    @each_variant
    def test_a_prefix_is_predicted_as_in_the_longer_run(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        for frames in (1, 2):
            prefix = predict(model, {name: value[:, :frames] for name, value in batch.items()})
            for long, short in zip(predict(model, batch), prefix, strict=True):
                torch.testing.assert_close(short, long[:, :frames])

    @each_variant
    def test_patches_that_change_places_with_their_positions_change_outputs(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        tokens, code = predict(model, batch)
        order = torch.randperm(SHAPE.tokens, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.position[..., : SHAPE.tokens, :] = model.position[..., order, :]
        moved_tokens, moved_code = predict(model, {**batch, "tokens": batch["tokens"][:, :, order]})
        torch.testing.assert_close(moved_tokens, tokens[:, :, order])
        torch.testing.assert_close(moved_code, code[:, :, order] if code.shape[2] > 1 else code)


class TestVariants:
    @each_variant
    def test_the_loss_reaches_every_parameter(self, variant: dict[str, Any]) -> None:
        model = make_trained_model(**variant)
        model.loss(make_batch(frames=4))["loss"].backward()
        assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []

    @each_variant
    def test_bfloat16_is_the_same_but_for_rounding(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant, rollout_loss=1.0), make_batch(frames=4)
        loss, (imagined, _) = model.loss(batch)["loss"], model.rollout(*batch.values())
        with autocast(torch.device("cpu"), torch.bfloat16):
            rounded = model.loss(batch)["loss"]
            with torch.inference_mode():
                rounded_imagined, code = model.rollout(*batch.values())
        rounded.backward()
        torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)
        assert (rounded_imagined.dtype, code.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(rounded_imagined, imagined, rtol=0.1, atol=0.3)

    @pytest.mark.parametrize("variant", some_variants(proprio="none"), ids=name_of)
    def test_without_proprio_nothing_of_it_is_seen_or_said(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch(frames=4)
        other = {**batch, "proprio": batch["proprio"] + 1}
        losses = model.loss(batch)
        assert "proprio" not in losses
        assert torch.equal(losses["loss"], model.loss(other)["loss"])
        (tokens, code), (same, _) = model.rollout(*batch.values()), model.rollout(*other.values())
        assert torch.equal(tokens, same)
        assert code.shape == (2, 1, 0)
        assert model.encode_proprio(batch["proprio"]).shape == (2, 4, 0)

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

    @pytest.mark.parametrize("variant", some_variants(predict="change", width=16), ids=name_of)
    def test_an_untrained_model_of_changes_copies_the_observed_frame(self, variant: dict[str, Any]) -> None:
        model, batch = make_model(**variant), make_batch()
        tokens, code = model.rollout(batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"])
        torch.testing.assert_close(tokens, batch["tokens"][:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(code, model.encode_proprio(batch["proprio"][:, :1]).expand(-1, 3, -1))

    def test_latents_that_are_not_standardised_are_taken_as_they_come(self) -> None:
        models = [make_trained_model(standardise=False, statistics=make_statistics(seed)) for seed in (1, 2)]
        for name in ("proprio_mean", "proprio_std", "action_mean", "action_std"):
            setattr(models[1], name, getattr(models[0], name))
        batch = make_batch(frames=4)
        assert torch.equal(*(model.rollout(*batch.values())[0] for model in models))
        tokens, _, _ = standardised(models[0], **batch)
        assert torch.equal(tokens, batch["tokens"])

    @pytest.mark.parametrize("variant", some_variants(position="learned", predict="frame"), ids=name_of)
    def test_the_position_of_a_frame_counts(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        still = {name: value[:, :1].expand(-1, 3, *value.shape[2:]) for name, value in batch.items()}
        tokens = predict(model, still)[0]
        assert not torch.isclose(tokens[:, 0], tokens[:, 1]).all()

    def test_the_reference_has_as_many_parameters_as_the_reference(self) -> None:
        known = {field.name for field in fields(DinoWmOptions)}
        options = {key.replace("-", "_"): value for key, value in PRESETS["dino-wm"].items()}
        options = {name: value for name, value in options.items() if name in known}
        assert set(options) == known
        shape = DataShape(tokens=196, token_dim=384, proprio_dim=4, action_dim=10, history=3, columns=14)
        sizes = {"tokens": 384, "proprio": 4, "action": 10}
        with torch.device("meta"):
            statistics = {f"{name}_{of}": torch.ones(size) for name, size in sizes.items() for of in ("mean", "std")}
            model = build("dino-wm", shape, options, statistics)
        counts = {name: value.numel() for name, value in model.named_parameters()}
        embeddings = sum(count for name, count in counts.items() if name.startswith("embed_"))
        assert (sum(counts.values()) - embeddings, embeddings) == (20_122_600, 160)
        assert counts["position"] == 3 * 196 * 404


class TestLoss:
    def test_it_weighs_standardised_errors_by_their_dimensions(self) -> None:
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

    @pytest.mark.parametrize("variant", some_variants(proprio="embedding", width=0), ids=name_of)
    def test_of_the_reference_it_is_the_mean_over_all_that_a_frame_has(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch(frames=4)
        tokens, code, _ = standardised(model, **batch)
        predicted = predict(model, {name: value[:, :-1] for name, value in batch.items()})
        if variant["combine"] == "features":  # D + 10 dimensions of each patch
            target = torch.cat([tokens, code.expand(-1, -1, SHAPE.tokens, -1)], -1)[:, 1:]
            expected = F.mse_loss(torch.cat(predicted, -1), target)
        else:  # N + 1 tokens
            expected = F.mse_loss(torch.cat(predicted, 2), torch.cat([tokens, code], 2)[:, 1:])
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

    def test_it_predicts_from_actions_but_never_predicts_actions(self) -> None:
        model, batch = make_trained_model(), make_batch(frames=4)
        loss = model.loss(batch)["loss"]
        assert torch.equal(model.loss(changed(batch, -1, "action"))["loss"], loss)
        assert not torch.isclose(model.loss(changed(batch, -2, "action"))["loss"], loss)

    @pytest.mark.parametrize("variant", some_variants(predict="frame"), ids=name_of)
    def test_a_second_step_is_a_step_from_the_first_ones_predictions(self, variant: dict[str, Any]) -> None:
        # Of three frames only the last can be a second step: from frame 0, one frame of context after the other.
        once, batch = make_trained_model(**variant), make_batch(frames=3)
        twice = make_trained_model(**variant, rollout_loss=0.5)
        losses = twice.loss(batch)
        imagined, codes = twice.rollout(
            batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"][:, :2], context=1
        )
        tokens, code, _ = standardised(twice, **batch)
        second = F.mse_loss((imagined[:, 1] - twice.tokens_mean) / twice.tokens_std, tokens[:, 2])
        if variant["proprio"] == "none":
            torch.testing.assert_close(losses["rollout"], second)
        elif variant["proprio"] == "raw":
            of_code = F.mse_loss(codes[:, 1], code[:, 2, 0])
            dimensions = SHAPE.token_dim + SHAPE.proprio_dim
            expected = (SHAPE.token_dim * second + SHAPE.proprio_dim * of_code) / dimensions
            torch.testing.assert_close(losses["rollout"], expected)
        torch.testing.assert_close(losses["loss"], once.loss(batch)["loss"] + 0.5 * losses["rollout"])

    def test_the_gradient_stops_between_the_two_steps(self) -> None:
        model, batch = make_trained_model(rollout_loss=1.0), make_batch(frames=4)
        for value in batch.values():
            value.requires_grad_()
        inputs = batch["tokens"], batch["proprio"], batch["action"]
        tokens, proprio, action = torch.autograd.grad(model.loss(batch)["rollout"], inputs, allow_unused=True)
        assert tokens is None
        assert proprio is None
        # Frame 0 has been left by the first step, and what frame 3 does leads out of the window.
        assert [bool(action[:, frame].any()) for frame in range(4)] == [False, True, True, False]

    def test_noise_is_on_what_is_seen_while_training_and_on_nothing_else(self) -> None:
        model, batch = make_model(noise=0.5), make_batch(frames=4)
        clean = make_model().loss(batch)
        assert torch.equal(model.loss(batch)["loss"], clean["loss"])
        tokens, _, _ = standardised(model, **batch)
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
        # Rows of 4, squares of 2 x 2.
        squares = [[0, 1, 4, 5], [2, 3, 6, 7]]
        patches = torch.stack([weights["position"][..., square, :].mean(-2) for square in squares], -2)
        weights["position"] = torch.cat([patches, weights["position"][..., SHAPE.tokens :, :]], -2)
        coarse.load_state_dict(weights)
        averaged = torch.stack([batch["tokens"][:, :, square].mean(2) for square in squares], 2)
        expected = coarse.loss({**batch, "tokens": averaged})
        for name, value in model.loss(batch, pool=2).items():
            torch.testing.assert_close(value, expected[name])

    @pytest.mark.parametrize("pool", [3, 4, 16])
    def test_squares_that_do_not_fit_the_grid_are_refused(self, pool: int) -> None:
        with pytest.raises(UserError, match=f"--pool {pool} does not divide the grid of 2 x 4 tokens"):
            make_model().check_pool(pool)

    def test_a_grid_is_averaged_in_squares(self) -> None:
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
        grid = torch.stack([rows, columns], -1).flatten(0, 1)[None, None]
        pooled = pool_grid(grid, 6, 2)[0, 0]
        assert pooled.tolist() == [[r, c] for r in (0.5, 2.5) for c in (0.5, 2.5, 4.5)]

    def test_a_channel_that_never_varies_is_finite(self) -> None:
        statistics = make_statistics()
        statistics["tokens_std"][0] = 0
        batch = make_batch(frames=4)
        batch["tokens"][..., 0] = statistics["tokens_mean"][0]
        assert make_model(statistics).loss(batch)["loss"].isfinite()


class TestBuilding:
    @pytest.mark.parametrize("name", list(MODELS))
    def test_every_registered_model_is_a_world_model(self, name: str) -> None:
        assert isinstance(build(name, SHAPE, SIZES, make_statistics()), WorldModel)

    def test_its_weights_bring_the_statistics_along(self) -> None:
        batch = make_batch()
        model, other = make_trained_model(), make_model(make_statistics(seed=9))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model.rollout(*batch.values())[0], other.rollout(*batch.values())[0])

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("dreamer", {}, "'dreamer'"),
            ("dino-wm", {"layers": 3}, "has no option layers; it has proprio, "),
            ("dino-wm", {"combine": "patches"}, "option combine: Input should be 'features' or 'tokens'"),
            ("dino-wm", {"condition": None}, "option condition"),
            ("dino-wm", {"position": "Learned"}, "option position"),
            ("dino-wm", {"predict": ["frame"]}, "option predict"),
            ("dino-wm", {"proprio": "xy"}, "option proprio"),
            ("dino-wm", {"width": "wide"}, "option width"),
            ("dino-wm", {"width": 16.5}, "option width"),
            ("dino-wm", {"width": -16}, "option width"),
            ("dino-wm", {"heads": 0}, "option heads"),
            ("dino-wm", {"depth": 0}, "option depth"),
            ("dino-wm", {"embedding": 0}, "option embedding"),
            ("dino-wm", {"mlp": -1}, "option mlp"),
            ("dino-wm", {"dropout": 1.5}, "option dropout"),
            ("dino-wm", {"noise": float("nan")}, "option noise"),
            ("dino-wm", {"rollout_loss": -1.0}, "option rollout_loss"),
            ("dino-wm", {"standardise": "perhaps"}, "option standardise"),
            ("dino-wm", {"width": 16, "heads": 3}, "--width 16 is not a multiple of --heads 3; or give --head-dim"),
            ("dino-wm", {"width": 18, "heads": 6}, "size of a head must be even"),
            ("dino-wm", {"width": 16, "head_dim": 5}, "size of a head must be even"),
            ("dino-wm", {"width": 0, "proprio": "none"}, "--width 0 leaves the heads without a size"),
            ("dino-wm", {"width": 0, "head_dim": 4}, "--width 0 has no head for raw proprio"),
        ],
    )
    def test_what_cannot_be_built_is_refused_in_one_line(self, name: str, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said) as refusal:
            build(name, SHAPE, options, make_statistics())
        assert "\n" not in str(refusal.value)

    def test_a_second_step_needs_two_frames_of_history(self) -> None:
        with pytest.raises(UserError, match=r"--rollout-loss needs a --history of at least 2"):
            make_model(shape=replace(SHAPE, history=1), rollout_loss=1.0)

    def test_heads_need_not_divide_a_width_where_they_have_a_size(self) -> None:
        assert isinstance(make_model(width=15, heads=4, head_dim=6), DinoWm)
