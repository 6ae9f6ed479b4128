"""V-JEPA 2-AC: its loss and rollouts against slow independent code, what may see what, its energy, its first weights and its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    FUTURES,
    IMAGINED,
    SHAPE,
    build_preset,
    make_batch,
    make_futures,
    make_observed,
    make_statistics,
    model_inputs,
    name_of,
    predict,
    randomise,
    remember,
    roll_out,
)
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, Imagined, build
from wmcache.trainer.options import TrainOptions

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "mlp": 12}
VARIANTS = [
    {"normalize": "layer", "predict": "frame", "proprio": "raw"},  # the reference
    {"normalize": "layer", "predict": "change", "proprio": "none"},
    {"normalize": "store", "predict": "frame", "proprio": "none"},
    {"normalize": "store", "predict": "change", "proprio": "raw"},
]
GRID = [(patch // SHAPE.columns, patch % SHAPE.columns) for patch in range(SHAPE.tokens)]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
Pair = tuple[Tensor, Tensor]


def make_model(shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    return build("vjepa2-ac", shape, SIZES | options, make_statistics()).eval()


def make_trained_model(**options: Any) -> Any:
    return randomise(make_model(**options))


def slow_turn(x: Tensor, positions: Sequence[Sequence[float]]) -> Tensor:
    """Rotary positions of [B, heads, L, c]: channels k and k + c / 2 are a complex number that turns by the position on one axis."""
    pairs = x.shape[-1] // 2
    numbers, share = torch.complex(x[..., :pairs], x[..., pairs:]), pairs // 3
    factors = torch.ones(len(positions), pairs, dtype=torch.complex64)
    for row, position in enumerate(positions):
        for axis in range(3):
            for k in range(share):
                angle = torch.tensor(position[axis] * 10_000 ** (-k / share))
                factors[row, axis * share + k] = torch.polar(torch.tensor(1.0), angle)
    turned = numbers * factors
    return torch.cat([turned.real, turned.imag], -1)


def slow_predict(
    model: Any, inputs: tuple[Tensor, Tensor, Tensor], window: int, grid: Sequence[tuple[float, float]] = GRID
) -> Pair:
    """One step from each frame: all tokens in one sequence, under an explicit mask."""
    tokens, embedding, action = inputs
    frames, heads = tokens.shape[1], model.options.heads
    parts, frame_of, positions = [], [], []
    for t in range(frames):
        own = [model.embed_action(action[:, t])]
        if model.options.proprio == "raw":
            own.append(model.embed_proprio(embedding[:, t, 0]))
        places = [(0.0, 0.0)] * len(own) + list(grid)
        own += [model.project_in(tokens[:, t, patch]) for patch in range(len(grid))]
        parts += own
        frame_of += [t] * len(own)
        positions += [(float(t), *place) for place in places]
    x, frame = torch.stack(parts, 1), torch.tensor(frame_of)
    behind = frame[:, None] - frame
    mask = (behind >= 0) & (behind < window)
    for block in model.blocks:
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.qkv(block.norm_attention(x)).chunk(3, -1)
        )
        found = F.scaled_dot_product_attention(slow_turn(q, positions), slow_turn(k, positions), v, attn_mask=mask)
        x = x + block.out(found.transpose(1, 2).flatten(2))
        x = x + block.mlp[3](F.gelu(block.mlp[0](block.norm_mlp(x))))
    x = model.norm(x).unflatten(1, (frames, -1))
    following = model.project_out(x[:, :, -len(grid) :])
    if model.options.predict == "change":
        following = tokens + following
    if model.options.normalize == "layer":
        following = slow_norm(following)
    if model.options.proprio == "none":
        return following, embedding
    proprio = model.project_proprio(x[:, :, 1:2])
    return following, embedding + proprio if model.options.predict == "change" else proprio


def slow_norm(tokens: Tensor) -> Tensor:
    mean = tokens.mean(-1, keepdim=True)
    return (tokens - mean) / ((tokens - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()


def slow_inputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized tokens, proprio [B, T, 1, P or 0] and actions."""
    standardised = (batch["tokens"] - model.tokens_mean) / model.tokens_std
    tokens = slow_norm(batch["tokens"]) if model.options.normalize == "layer" else standardised
    proprio = ((batch["proprio"] - model.proprio_mean) / model.proprio_std)[:, :, None]
    if model.options.proprio == "none":
        proprio = proprio[..., :0]
    return tokens, proprio, (batch["action"] - model.action_mean) / model.action_std


def slow_error(found: Pair, target: Pair) -> Tensor:
    error = (found[0] - target[0]).abs().mean()
    size = target[1].shape[-1]
    if not size:
        return error
    proprio = (found[1] - target[1]).abs().mean()
    return (SHAPE.token_dim * error + size * proprio) / (SHAPE.token_dim + size)


def slow_loss(model: Any, inputs: tuple[Tensor, Tensor, Tensor], grid: Sequence[tuple[float, float]] = GRID) -> Tensor:
    """Teacher forcing at each frame, each from the frames up to it alone; and one rollout from the first frame."""
    tokens, proprio, action = inputs
    frames = tokens.shape[1]
    forced = []
    for t in range(1, frames):
        found = slow_predict(model, (tokens[:, :t], proprio[:, :t], action[:, :t]), frames, grid)
        forced.append(slow_error((found[0][:, -1], found[1][:, -1]), (tokens[:, t], proprio[:, t])))
    own, errors = (tokens[:, :1], proprio[:, :1]), []
    for t in range(1, model.options.auto_steps + 1):
        found = slow_predict(model, (*own, action[:, :t]), frames, grid)
        errors.append(slow_error((found[0][:, -1], found[1][:, -1]), (tokens[:, t], proprio[:, t])))
        own = torch.cat([own[0], found[0][:, -1:]], 1), torch.cat([own[1], found[1][:, -1:]], 1)
    loss: Tensor = sum(forced) / len(forced) + model.options.rollout_loss * sum(errors) / len(errors)
    return loss


class TestLoss:
    @pytest.mark.parametrize(("auto_steps", "weight"), [(1, 1.0), (2, 1.0), (3, 0.5)])
    @each_variant
    def test_it_and_its_gradient_are_those_of_slow_code(
        self, variant: dict[str, Any], auto_steps: int, weight: float
    ) -> None:
        model, batch = make_trained_model(**variant, auto_steps=auto_steps, rollout_loss=weight), make_batch(frames=4)
        loss, expected = model.loss(batch)["loss"], slow_loss(model, slow_inputs(model, batch))
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, list(model.parameters()))
        slow = torch.autograd.grad(expected, list(model.parameters()))
        for one, other in zip(found, slow, strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_on_a_coarse_grid_patches_are_at_the_middle_of_their_squares(self) -> None:
        model, batch = make_trained_model(**VARIANTS[0]), make_batch(frames=4)
        squares = [[0, 1, 4, 5], [2, 3, 6, 7]]  # rows of 4, squares of 2 x 2
        averaged = torch.stack([batch["tokens"][:, :, square].mean(2) for square in squares], 2)
        inputs = slow_inputs(model, {**batch, "tokens": averaged})
        torch.testing.assert_close(
            model.loss(batch, pool=2)["loss"], slow_loss(model, inputs, [(0.5, 0.5), (0.5, 2.5)])
        )

    def test_without_the_rollout_it_is_teacher_forcing_alone(self) -> None:
        both, batch = make_trained_model(rollout_loss=0.5).loss(make_batch(frames=4)), make_batch(frames=4)
        forced = make_trained_model(rollout_loss=0.0).loss(batch)
        assert "rollout" not in forced
        torch.testing.assert_close(both["loss"], forced["loss"] + 0.5 * both["rollout"])

    @each_variant
    def test_no_gradient_comes_through_the_last_frame_and_its_action(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch(frames=4)
        for value in batch.values():
            value.requires_grad_()
        model.loss(batch)["loss"].backward()
        assert not batch["action"].grad[:, -1].any()  # T - 1 actions
        assert batch["action"].grad[:, :-1].flatten(2).any(-1).all()

    def test_in_bfloat16_it_differs_by_rounding_alone(self) -> None:
        model, batch = make_trained_model(), make_batch(frames=4)
        with autocast(torch.device("cpu"), torch.bfloat16):
            rounded = model.loss(batch)["loss"]
        torch.testing.assert_close(rounded, model.loss(batch)["loss"], rtol=0.05, atol=0)


class TestMask:
    @each_variant
    def test_a_frame_reaches_all_tokens_of_its_own_and_later_frames_and_none_before(
        self, variant: dict[str, Any]
    ) -> None:
        model, batch = make_trained_model(**variant), make_batch()
        before = predict(model, batch)
        for name in ("tokens", "action", *["proprio"] * (variant["proprio"] == "raw")):
            for frame in (1, 2):
                other = {key: value.clone() for key, value in batch.items()}
                other[name][:, frame] += torch.rand(other[name].shape[2:], generator=torch.Generator().manual_seed(4))
                for old, new in zip(before, predict(model, other), strict=True):
                    assert torch.equal(old[:, :frame], new[:, :frame])
                    assert not torch.isclose(old[:, frame:], new[:, frame:]).all(-1).any() or not old.shape[-1]

    def test_places_matter_and_only_their_distances_do(self) -> None:
        model = make_trained_model()
        inputs = model_inputs(model, make_batch())
        order = [1, 0, *range(2, SHAPE.tokens)]
        swapped, _ = model.predict(inputs[0][:, :, order], *inputs[1:])
        assert not torch.isclose(swapped, model.predict(*inputs)[0][:, :, order]).all()
        x = torch.randn(2, 3, SHAPE.tokens, 32, generator=torch.Generator().manual_seed(5))
        grid = torch.tensor([(t, *place) for t in range(3) for place in GRID])
        found = [
            model.blocks[0](x, window=3, positions=grid + torch.tensor(moved))[0] for moved in ((0, 0, 0), (9, 2, 5))
        ]
        torch.testing.assert_close(*found, rtol=0, atol=1e-4)


class TestRollout:
    @pytest.mark.parametrize("context", [1, 2, 3])
    @pytest.mark.parametrize("observed", [1, 2, 3, 5])
    @each_variant
    def test_it_gives_the_numbers_of_a_rollout_that_computes_all_again(
        self, variant: dict[str, Any], observed: int, context: int
    ) -> None:
        model, (tokens, proprio, actions) = make_trained_model(**variant), make_observed(observed)
        found = roll_out(model, tokens, proprio, actions, context=context)
        *seen, action = slow_inputs(model, {"tokens": tokens, "proprio": proprio, "action": actions})
        first = max(0, observed - context)
        for end in range(observed, actions.shape[1] + 1):
            own = slow_predict(model, (seen[0][:, first:], seen[1][:, first:], action[:, first:end]), context)
            seen = [torch.cat([before, after[:, -1:]], 1) for before, after in zip(seen, own, strict=True)]
        imagined = seen[0][:, observed:]
        if variant["normalize"] == "layer":
            # The mean and the deviation of each token are those of the newest observed frame.
            newest = tokens[:, -1:]
            imagined = imagined * (newest.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() + newest.mean(-1, True)
        else:
            imagined = imagined * model.tokens_std + model.tokens_mean
        assert found[0].shape == (2, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
        torch.testing.assert_close(found[0], imagined, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], seen[1][:, observed:, 0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("observed", [1, 3])
    @each_variant
    def test_many_futures_of_a_batch_are_as_many_rollouts(self, variant: dict[str, Any], observed: int) -> None:
        model, (tokens, proprio, actions) = make_trained_model(**variant), make_observed(observed)
        futures = make_futures(actions, past=observed - 1)
        together = roll_out(model, tokens, proprio, futures, context=2)
        assert not torch.isclose(together[0][:, 0], together[0][:, 1]).all()
        for one in range(2):
            for future in range(FUTURES):
                own = slice(one, one + 1)
                alone = roll_out(model, tokens[own], proprio[own], futures[own, future], context=2)
                for found, expected in zip(together, alone, strict=True):
                    torch.testing.assert_close(found[own, future], expected, rtol=1e-4, atol=1e-4)

    def test_no_frame_is_computed_twice_and_shared_ones_not_for_each_future(self) -> None:
        model, (tokens, proprio, actions) = make_trained_model(), make_observed(observed=2)
        computed: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[0]))
        roll_out(model, tokens, proprio, make_futures(actions, past=1))
        assert computed == [len(tokens), *[FUTURES * len(tokens)] * IMAGINED]

    @each_variant
    def test_it_takes_half_precision_and_returns_float32(self, variant: dict[str, Any]) -> None:
        model, (tokens, proprio, actions) = make_trained_model(**variant), make_observed(observed=2)
        imagined, _ = roll_out(model, tokens.half(), proprio, actions)
        assert torch.equal(imagined, roll_out(model, tokens.half().float(), proprio, actions)[0])
        with autocast(torch.device("cpu"), torch.bfloat16), torch.inference_mode():
            rounded, proprios = roll_out(model, tokens, proprio, actions)
        assert (imagined.dtype, rounded.dtype, proprios.dtype) == (torch.float32,) * 3

    def test_without_proprio_it_is_neither_seen_nor_predicted(self) -> None:
        model, (tokens, proprio, actions) = make_trained_model(proprio="none"), make_observed(observed=2)
        imagined, embedding = roll_out(model, tokens, proprio, actions)
        assert torch.equal(roll_out(model, tokens, proprio + 1, actions)[0], imagined)
        assert embedding.shape == (2, IMAGINED, 0)
        assert model.blind


class TestEnergy:
    @each_variant
    def test_it_is_the_mean_absolute_difference_of_normalized_latents(self, variant: dict[str, Any]) -> None:
        model, batch = make_trained_model(**variant), make_batch(frames=5)
        futures = make_futures(batch["action"][:, :4], past=0)
        imagined, goal = model.imagine(remember(model, batch, 1), futures), batch["tokens"][:, -1]
        found = model.cost(imagined, goal)
        assert found.shape == (2, FUTURES, 4)
        normed = slow_inputs(model, {**batch, "tokens": goal})[0]
        for future in range(FUTURES):
            for t in range(4):
                latents = slow_inputs(model, {**batch, "tokens": imagined.latents[:, future, t]})[0]
                torch.testing.assert_close(found[:, future, t], (latents - normed).abs().flatten(1).mean(1))

    def test_a_layer_norm_does_not_see_the_scale_of_a_token(self) -> None:
        model, batch = make_model(normalize="layer"), make_batch(frames=1)
        scaled = Imagined(7.0 * batch["tokens"][:, None] - 2.0, torch.empty(2, 1, 1, 0))
        torch.testing.assert_close(model.cost(scaled, batch["tokens"][:, 0]), torch.zeros(2, 1, 1), rtol=0, atol=1e-4)


class TestBuilding:
    @pytest.mark.parametrize("normalize", ["layer", "store"])
    def test_an_untrained_model_of_changes_copies_the_observed_frame(self, normalize: str) -> None:
        model, (tokens, proprio, actions) = make_model(normalize=normalize), make_observed(1)
        imagined, embedding = roll_out(model, tokens, proprio, actions)
        torch.testing.assert_close(imagined, tokens.expand(-1, IMAGINED, -1, -1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(embedding, model.encode_proprio(proprio).expand(-1, IMAGINED, -1))

    def test_first_weights_are_small_and_residual_ones_smaller_with_depth(self) -> None:
        model = make_model(width=192, mlp=0, depth=3, predict="frame")
        for number, block in enumerate(model.blocks, start=1):
            assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
            for layer in (block.out, block.mlp[3]):
                assert layer.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)
        assert not any(
            value.any() for name, value in model.named_parameters() if name.endswith("bias") and "norm" not in name
        )

    def test_the_preset_has_the_papers_sizes(self) -> None:
        model, left_out = build_preset("vjepa2-ac", history=7)
        assert left_out == set()
        width, blocks = 1024, sum(value.numel() for value in model.blocks.parameters())
        assert (len(model.blocks), blocks) == (24, 24 * (12 * width**2 + 13 * width))  # about 300 M

    @pytest.mark.parametrize(
        ("shape", "options", "named"),
        [
            (SHAPE, {"width": 30, "heads": 4}, "--width 30 .*--heads 4"),
            (SHAPE, {"width": 20, "heads": 4}, "--width 20 .*--heads 4"),
            (SHAPE, {"auto_steps": 4}, "--auto-steps 4 .*--history 3"),
            (replace(SHAPE, token_dim=2), {"normalize": "layer"}, "--normalize layer .*--normalize store"),
            (SHAPE, {"normalize": "batch"}, "normalize"),
        ],
    )
    def test_options_that_do_not_fit_are_refused_by_name(
        self, shape: DataShape, options: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(UserError, match=named):
            build("vjepa2-ac", shape, SIZES | options, make_statistics())


class TestRuns:
    @pytest.mark.parametrize("normalize", ["layer", "store"])
    def test_a_stopped_run_resumes_exactly_and_a_seed_gives_the_same_run(
        self, store_path: Path, tiny: TrainOptions, tmp_path: Path, normalize: str
    ) -> None:
        sizes = {**SIZES, "dropout": 0.1, "normalize": normalize}
        go: Go = make_go(store_path, replace(tiny, model="vjepa2-ac", model_options=sizes))
        go(tmp_path / "straight")
        with stopped_at(6):
            go(tmp_path / "stopped")
        go(tmp_path / "stopped")
        assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
        assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
        go(tmp_path / "other", seed=1)
        assert weights_of(tmp_path / "other") != weights_of(tmp_path / "straight")

    def test_it_learns_a_planted_linear_system(self, planted_path: Path, tiny: TrainOptions, run: Path) -> None:
        base = replace(tiny, model="vjepa2-ac", model_options=SIZES | {"mlp": 0}, log_every=50, validate_every=200)
        go = make_go(planted_path, replace(base, checkpoint_every=200))
        skills = go(run, steps=200, batch=32, frameskip=2, learning_rate=5e-3)
        assert [value for value in skills.values() if value is None or value < 0.5] == []
