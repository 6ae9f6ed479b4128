"""DDP-WM: what of a frame is computed, from what, what each stage trains, and that a rollout keeps nothing that it should compute anew."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    FUTURES,
    IMAGINED,
    SHAPE,
    make_batch,
    make_beginning,
    make_futures,
    make_statistics,
    name_of,
    standardised,
)
from torch import Tensor, nn

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, build
from wmcache.trainer.models.ddp_wm import DdpWm, DdpWmOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.train import make_optimiser

K = 3
SIZES: dict[str, Any] = {
    **{"width": 16, "depth": 2, "heads": 2, "head_dim": 4, "mlp": 12, "dropout": 0.0, "foreground": K},
    **{"locator_width": 6, "locator_depth": 1, "locator_heads": 2, "locator_mlp": 8},
    # The combined frame has 5 + 3 + 3 dimensions, or 5 + 3, so heads do not always divide it.
    **{"embedding": 3, "fusion_heads": 2, "correction_heads": 2},
}
STAGES = DdpWm.stages
CHOICES = {"proprio": ("raw", "embedding", "none"), "predict": ("change", "frame"), "width": (16, 0)}
VARIANTS: list[dict[str, Any]] = [
    variant
    for values in itertools.product(*CHOICES.values())
    if (variant := dict(zip(CHOICES, values, strict=True)))["width"] or variant["proprio"] != "raw"
]
OURS: dict[str, Any] = {"proprio": "raw", "predict": "change", "width": 16}
REFERENCE: dict[str, Any] = {"proprio": "embedding", "predict": "frame", "width": 0}
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
each_of_two = pytest.mark.parametrize("variant", [OURS, REFERENCE], ids=name_of)
each_stage = pytest.mark.parametrize("stage", STAGES)


def make_model(stage: str = "lrm", shape: DataShape = SHAPE, **options: Any) -> Any:
    """A model in a stage of its training; random weights make it show what it sees."""
    torch.manual_seed(0)
    model = build("ddp-wm", shape, SIZES | options, make_statistics())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.begin(stage)
    return model.eval()


def make_ddp_batch(frames: int = 4) -> dict[str, Tensor]:
    """With change maps in which about every second patch has changed by the usual threshold."""
    batch = make_batch(batch=2, frames=frames)
    generator = torch.Generator().manual_seed(4)
    return {**batch, "changes": torch.rand(2, frames, SHAPE.tokens, 4, generator=generator).pow(16).half()}


def standard(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, code and action as the model takes them."""
    return standardised(model, batch["tokens"], batch["proprio"], batch["action"])


def changed(batch: dict[str, Tensor], frame: int, patch: int) -> dict[str, Tensor]:
    """The batch with 1 added to a token of the first sequence."""
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][0, frame, patch] += 1
    return other


@dataclass
class Step:
    """What follows some frames, of one sequence: of patches at `places` and of the `rest`."""

    places: list[int]
    rest: list[int]
    tokens: Tensor
    code: Tensor
    rest_tokens: Tensor
    rest_code: Tensor

    def merged(self, corrects: bool, tokens: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """The next frame; without correction the rest is that of the one before, but for proprio, which is the whole frame's."""
        following = tokens.clone()
        following[self.places] = self.tokens
        if corrects:
            following[self.rest] = self.rest_tokens
        if len(self.code) == 1:
            return following, self.code
        codes = code.expand(len(tokens), -1).clone()
        codes[self.places] = self.code
        codes[self.rest] = self.rest_code if corrects else self.code.mean(0)
        return following, codes


def join_naively(model: Any, tokens: Tensor, code: Tensor, action: Tensor) -> Tensor:
    beside = [model.embed_action(action).expand(len(tokens), -1)]
    if model.options.proprio != "none":
        embedded = model.embed_proprio(code) if model.options.proprio == "raw" else code
        beside.insert(0, embedded.expand(len(tokens), -1))
    return torch.cat([tokens, *beside], -1)


def attend_naively(part: Any, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    attention = part.attention
    layers = (attention.q, queries), (attention.k, keys), (attention.v, values)
    q, k, v = (layer(of).unflatten(-1, (attention.heads, -1)).transpose(0, 1) for layer, of in layers)
    found = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    normed: Tensor = part.norm(x + attention.out(found.transpose(0, 1).flatten(1)))
    return normed


def fuse_naively(fusion: Any, frames: list[Tensor]) -> Tensor:
    *past, newest = frames
    if not past:
        alone: Tensor = fusion.norm(newest)
        return alone
    keys = [frame + fusion.position + fusion.age[age] for age, frame in enumerate(reversed(past))]
    return attend_naively(fusion, newest, newest + fusion.query_position, torch.cat(keys), torch.cat(past[::-1]))


def step_naively(model: Any, tokens: Tensor, code: Tensor, action: Tensor) -> Step:
    """From the tokens [n, N, D] and code [n, M, Q] of the last frames of one sequence and what was done at each [n, A]."""
    dim, end = SHAPE.token_dim, SHAPE.token_dim + code.shape[-1]
    fused = fuse_naively(
        model.fusion, [join_naively(model, *frame) for frame in zip(tokens, code, action, strict=True)]
    )
    likely = model.localiser(fused[None])[0].amax(-1).tolist()
    places = sorted(sorted(range(len(likely)), key=lambda patch: -likely[patch])[: model.foreground])
    rest = [patch for patch in range(len(likely)) if patch not in places]

    x = model.project_in(fused[places]) + model.primary.position[places]
    for block in model.primary.blocks:
        x = block(x[None, None], window=1)[0][0, 0]
    hidden = model.primary.norm(x)
    ahead = hidden if model.primary_out is None else model.primary_out(hidden)
    asked = model.correction.project(hidden)
    corrected = attend_naively(
        model.correction,
        fused[rest],
        fused[rest] + model.correction.position[rest],
        asked + model.correction.position[places],
        asked,
    )
    behind = corrected if model.correction_out is None else model.correction_out(corrected)

    raw, change = model.options.proprio == "raw", model.options.predict == "change"
    step = Step(places, rest, ahead[:, :dim], ahead[:, dim:end], behind[:, :dim], behind[:, dim:end])
    if raw:
        step.code = step.code.mean(0, keepdim=True)
    if change:
        codes = code[-1] if raw else code[-1].expand(SHAPE.tokens, -1)[places]
        step.tokens, step.code = tokens[-1][places] + step.tokens, codes + step.code
        step.rest_tokens = tokens[-1][rest] + step.rest_tokens
        if not raw:
            step.rest_code = code[-1].expand(SHAPE.tokens, -1)[rest] + step.rest_code
    return step


def roll_out_naively(
    model: Any, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int
) -> tuple[Tensor, Tensor]:
    """One sequence after the other, from all frames of the context anew at each step; keeps nothing but frames."""
    corrects, imagined = int(model.stage) == len(STAGES), []
    for frames, codes, own in zip(*standardised(model, tokens, proprio, actions), strict=True):
        seen, known = list(frames), list(codes)
        for end in range(len(frames), len(own) + 1):
            last = slice(max(0, end - context), end)
            # Proprio that is one for all patches at first is each patch's own later.
            code = torch.stack([part.expand(max(map(len, known)), -1) for part in known[last]])
            following = step_naively(model, torch.stack(seen[last]), code, own[last]).merged(
                corrects, seen[-1], known[-1]
            )
            seen.append(following[0])
            known.append(following[1])
        observed = len(frames)
        imagined.append((torch.stack(seen[observed:]), torch.stack([code[0] for code in known[observed:]])))
    latents, codes = (torch.stack(part) for part in zip(*imagined, strict=True))
    return latents * model.tokens_std + model.tokens_mean, codes


class TestRollout:
    @pytest.mark.parametrize("context", [1, 2, 3])
    @pytest.mark.parametrize("observed", [1, 2, 3, 5])
    @each_of_two
    def test_it_is_the_rollout_that_computes_everything_anew(
        self, variant: dict[str, Any], observed: int, context: int
    ) -> None:
        model, beginning = make_model(**variant), make_beginning(observed)
        tokens, code = model.rollout(*beginning, context=context)
        assert tokens.shape == (2, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
        expected_tokens, expected_code = roll_out_naively(model, *beginning, context)
        torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(code, expected_code, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("stage", ["primary", "lrm"])
    @each_variant
    def test_of_every_variant_it_is_the_rollout_that_computes_everything_anew(
        self, variant: dict[str, Any], stage: str
    ) -> None:
        model, beginning = make_model(stage, **variant), make_beginning(observed=2)
        tokens, code = model.rollout(*beginning, context=2)
        expected_tokens, expected_code = roll_out_naively(model, *beginning, 2)
        assert code.shape == (2, IMAGINED, model.encode_proprio(beginning[1]).shape[-1])
        torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(code, expected_code, rtol=1e-4, atol=1e-4)

    @each_of_two
    def test_a_model_without_history_sees_the_newest_frame_alone(self, variant: dict[str, Any]) -> None:
        model = make_model(shape=replace(SHAPE, history=1), **variant)
        tokens, proprio, actions = make_beginning(observed=3)
        imagined, code = model.rollout(tokens, proprio, actions)
        expected_tokens, expected_code = roll_out_naively(model, tokens, proprio, actions, 1)
        torch.testing.assert_close(imagined, expected_tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(code, expected_code, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.rollout(tokens[:, 2:], proprio[:, 2:], actions[:, 2:])[0], imagined)

    @pytest.mark.parametrize("context", [1, 3])
    @pytest.mark.parametrize("observed", [1, 3])
    @each_of_two
    def test_many_futures_are_as_many_rollouts(self, variant: dict[str, Any], observed: int, context: int) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_beginning(observed)
        futures = make_futures(actions, past=observed - 1)
        together = model.rollout(tokens, proprio, futures, context=context)
        apart = [model.rollout(tokens, proprio, futures[:, future], context=context) for future in range(FUTURES)]
        assert not torch.isclose(apart[0][0], apart[1][0]).all()
        for all_of_them, part in zip(together, zip(*apart, strict=True), strict=True):
            torch.testing.assert_close(all_of_them, torch.stack(part, 1), rtol=1e-4, atol=1e-4)

    @each_of_two
    def test_a_future_does_not_depend_on_those_that_share_its_batch(self, variant: dict[str, Any]) -> None:
        # Of the reference the busiest one of a batch decides how many tokens of all are computed, and random ones fill the others up.
        model, batch = make_model(**variant), make_batch(batch=6, frames=4)
        inputs = batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"]
        chosen = model.select(model.locate(*batch.values())[:, 0])
        assert len(chosen.unique(dim=0)) > 1
        together = model.rollout(*inputs)
        alone = [model.rollout(*(value[one : one + 1] for value in inputs)) for one in range(6)]
        for all_of_them, part in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(all_of_them, torch.cat(part))

    @pytest.mark.parametrize("batch", [1, 5])
    @pytest.mark.parametrize("foreground", [1, 4, 7])
    def test_just_k_tokens_of_each_frame_go_through_the_large_transformer(self, foreground: int, batch: int) -> None:
        model, data = make_model(foreground=foreground), make_batch(batch=batch, frames=3)
        seen: list[tuple[int, ...]] = []
        model.primary.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:3])))
        model.rollout(*data.values())
        model.rollout(data["tokens"][:, :1], data["proprio"][:, :1], make_futures(data["action"], past=0))
        assert seen == [(batch, 1, foreground)] + [(FUTURES * batch, 1, foreground)] * 3

    @pytest.mark.parametrize("observed", [1, 3])
    def test_no_frame_is_remembered_twice_nor_for_each_future_what_they_share(self, observed: int) -> None:
        model, (tokens, proprio, actions) = make_model(), make_beginning(observed)
        remembered: list[int] = []
        model.fusion.attention.v.register_forward_pre_hook(lambda _, inputs: remembered.append(len(inputs[0])))
        model.rollout(tokens, proprio, make_futures(actions, past=observed - 1))
        # Nobody asks the last frame that is imagined, nor the one before it, of which it is imagined.
        assert remembered == [len(tokens)] * (observed - 1) + [FUTURES * len(tokens)] * (IMAGINED - 1)

    @each_of_two
    def test_one_future_of_many_dimensions_is_that_of_one(self, variant: dict[str, Any]) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_beginning(observed=2)
        for one, plain in zip(
            model.rollout(tokens, proprio, actions[:, None]), model.rollout(tokens, proprio, actions), strict=True
        ):
            assert torch.equal(one[:, 0], plain)

    @pytest.mark.parametrize("context", [1, 3])
    @pytest.mark.parametrize("stage", ["primary", "lrm"])
    @each_of_two
    def test_the_gradient_reaches_every_action_that_was_taken(
        self, variant: dict[str, Any], stage: str, context: int
    ) -> None:
        model, (tokens, proprio, actions) = make_model(stage, **variant), make_beginning(observed=2)
        futures = make_futures(actions, past=1).requires_grad_()
        # Not the sum of the tokens, which a norm may have made a constant.
        (together,) = torch.autograd.grad(
            model.rollout(tokens, proprio, futures, context=context)[0].square().sum(), futures
        )
        assert together[:, :, 1:].flatten(3).any(-1).all()
        for future in range(FUTURES):
            alone = futures[:, future].detach().requires_grad_()
            (expected,) = torch.autograd.grad(
                model.rollout(tokens, proprio, alone, context=context)[0].square().sum(), alone
            )
            torch.testing.assert_close(together[:, future, 1:], expected[:, 1:], rtol=1e-3, atol=1e-3)

    @each_of_two
    def test_what_is_imagined_knows_only_the_actions_before_it(self, variant: dict[str, Any]) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_beginning(observed=2)
        other = actions.clone()
        other[:, 3] += 1  # leads to the third imagined frame
        before, after = model.rollout(tokens, proprio, actions)[0], model.rollout(tokens, proprio, other)[0]
        assert torch.equal(before[:, :2], after[:, :2])
        assert not torch.isclose(before[:, 2:], after[:, 2:]).flatten(2).all(-1).any()

    def test_it_forgets_what_is_older_than_the_history(self) -> None:
        model, (tokens, proprio, actions) = make_model(), make_beginning(observed=5)
        whole = model.rollout(tokens, proprio, actions)[0]
        assert torch.equal(model.rollout(tokens[:, 2:], proprio[:, 2:], actions[:, 2:])[0], whole)
        assert torch.equal(model.rollout(tokens, proprio, actions, context=9)[0], whole)
        assert not torch.isclose(model.rollout(tokens[:, 3:], proprio[:, 3:], actions[:, 3:])[0], whole).all()

    @pytest.mark.parametrize("stage", ["localization", "primary"])
    @pytest.mark.parametrize("predict", ["change", "frame"])
    def test_until_the_last_stage_has_begun_what_stays_is_copied_bit_for_bit(self, predict: str, stage: str) -> None:
        model, (tokens, proprio, actions) = make_model(stage, predict=predict, standardise=False), make_beginning(1)
        frames = torch.cat([tokens, model.rollout(tokens, proprio, actions)[0]], 1)
        same = (frames[:, 1:] == frames[:, :-1]).all(-1)
        assert (same.sum(-1) == SHAPE.tokens - K).all()
        # Not the same ones for ever.
        assert same.all(1).sum() < 2 * (SHAPE.tokens - K)

    @each_variant
    def test_the_last_stage_corrects_what_stays(self, variant: dict[str, Any]) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_beginning(1)
        frames = torch.cat([tokens, model.rollout(tokens, proprio, actions)[0]], 1)
        assert not torch.isclose(frames[:, 1:], frames[:, :-1]).all(-1).any()

    @pytest.mark.parametrize("stage", ["primary", "lrm"])
    @pytest.mark.parametrize("variant", [v for v in VARIANTS if v["proprio"] != "none"], ids=name_of)
    def test_proprio_moves_at_every_step_whichever_patches_are_computed(
        self, variant: dict[str, Any], stage: str
    ) -> None:
        model, (tokens, proprio, actions) = make_model(stage, **variant), make_beginning(1)
        codes = torch.cat([model.encode_proprio(proprio), model.rollout(tokens, proprio, actions)[1]], 1)
        assert not torch.isclose(codes[:, 1:], codes[:, :-1]).all(-1).any()

    def test_an_untrained_model_of_changes_copies_the_observed_frame(self) -> None:
        model, (tokens, proprio, actions) = build("ddp-wm", SHAPE, SIZES, make_statistics()), make_beginning(1)
        model.begin("lrm")
        imagined, code = model.eval().rollout(tokens, proprio, actions)
        torch.testing.assert_close(imagined, tokens.expand(-1, IMAGINED, -1, -1))
        torch.testing.assert_close(code, model.encode_proprio(proprio).expand(-1, IMAGINED, -1))

    @each_of_two
    def test_it_takes_the_half_precision_of_the_store_and_computes_in_another(self, variant: dict[str, Any]) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_beginning(observed=2)
        imagined, _ = model.rollout(tokens.half(), proprio, actions)
        assert torch.equal(imagined, model.rollout(tokens.half().float(), proprio, actions)[0])
        with autocast(torch.device("cpu"), torch.bfloat16), torch.inference_mode():
            rounded, code = model.rollout(tokens, proprio, actions)
        assert (imagined.dtype, rounded.dtype, code.dtype) == (torch.float32,) * 3
        # Later frames may be of other tokens, where two are likely alike.
        torch.testing.assert_close(rounded[:, 0], model.rollout(tokens, proprio, actions)[0][:, 0], rtol=0.1, atol=0.3)

    def test_without_proprio_nothing_of_it_is_seen_or_said(self) -> None:
        model, (tokens, proprio, actions) = make_model(proprio="none"), make_beginning(observed=2)
        imagined, code = model.rollout(tokens, proprio, actions)
        assert torch.equal(model.rollout(tokens, proprio + 1, actions)[0], imagined)
        assert code.shape == (2, IMAGINED, 0)


class TestLocalising:
    def test_the_k_patches_of_the_surest_cells_are_selected_in_the_order_of_the_frame(self) -> None:
        model = make_model()
        logits = torch.full((2, SHAPE.tokens, 4), -5.0)
        # One sure cell counts for more than four that are nearly so.
        logits[0, [6, 1, 4], [0, 3, 2]] = torch.tensor([3.0, 1.0, 2.0])
        logits[0, 2] = 0.9
        logits[1, [7, 0, 3], [1, 1, 1]] = torch.tensor([-1.0, -2.0, -3.0])
        assert model.select(logits).tolist() == [[1, 4, 6], [0, 3, 7]]

    def test_a_step_is_located_by_the_frames_of_a_history_and_by_no_later_one(self) -> None:
        model, batch = make_model(), make_batch(frames=6)
        logits = model.locate(*batch.values())
        tokens, code, action = standard(model, batch)
        for one, step in itertools.product(range(2), range(5)):
            seen = slice(max(0, step + 1 - SHAPE.history), step + 1)
            frames = zip(tokens[one, seen], code[one, seen], action[one, seen], strict=True)
            fused = fuse_naively(model.fusion, [join_naively(model, *frame) for frame in frames])
            torch.testing.assert_close(logits[one, step], model.localiser(fused[None])[0], rtol=1e-4, atol=1e-4)

    def test_a_frame_of_an_age_is_asked_by_the_same_key_however_long_the_history_is(self) -> None:
        fusion = make_model().fusion
        asked: list[Tensor] = []
        fusion.attention.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1].keys))
        older, old, newest = make_batch(batch=3)["tokens"].new_zeros(3, 1, SHAPE.tokens, 11).normal_().unbind()
        past = [fusion.remember(older), fusion.remember(old)]
        fusion(newest, past[1:])
        fusion(newest, past)
        fusion(newest, past[:1])
        short, long, aged = asked
        assert torch.equal(short, long[:, :, SHAPE.tokens :])
        # The same frame at another age.
        assert not torch.isclose(aged, long[:, :, : SHAPE.tokens]).all()

    def test_a_frame_without_others_before_it_is_normed_as_one_that_finds_nothing(self) -> None:
        fusion = make_model().fusion
        nn.init.zeros_(fusion.attention.out.weight)
        nn.init.zeros_(fusion.attention.out.bias)
        frame, other = torch.randn(2, 1, SHAPE.tokens, 11).unbind()
        torch.testing.assert_close(fusion(frame, []), fusion(frame, [fusion.remember(other)]))
        assert not torch.isclose(fusion(frame, []), frame).all()

    @pytest.mark.parametrize(("threshold", "least"), [(0.0, 0.1), (0.5, 0.5)])
    def test_by_pixels_a_cell_has_changed_where_the_map_of_the_next_frame_says_so(
        self, threshold: float, least: float
    ) -> None:
        model, batch = make_model(threshold=threshold), make_ddp_batch()
        labels = model.labels(standard(model, batch)[0], batch)
        assert labels.shape == (2, 3, SHAPE.tokens, 4)
        for step in range(3):
            assert torch.equal(labels[:, step], batch["changes"][:, step + 1] > least)

    @pytest.mark.parametrize(("threshold", "expected"), [(0.0, [3, 6]), (0.35, [3, 5, 6])])
    def test_by_features_all_cells_of_a_patch_have_where_its_token_has(
        self, threshold: float, expected: list[int]
    ) -> None:
        model = make_model(labels="features", threshold=threshold)
        tokens = torch.randn(1, 1, SHAPE.tokens, SHAPE.token_dim).repeat(1, 2, 1, 1)
        tokens[0, 1, 3] += 0.6
        tokens[0, 1, 5] -= 0.4
        tokens[0, 1, 6, 0] += 0.6 * SHAPE.token_dim**0.5  # as far by the root mean square
        (labels,) = model.labels(tokens, {}).unbind(1)
        assert labels[0].all(-1).nonzero()[:, 0].tolist() == expected
        assert labels[0].any(-1).nonzero()[:, 0].tolist() == expected


class TestStages:
    @each_stage
    @pytest.mark.parametrize("variant", [OURS, REFERENCE, REFERENCE | {"proprio": "none"}], ids=name_of)
    def test_each_trains_its_own_parts_and_leaves_the_others_as_they_are(
        self, variant: dict[str, Any], stage: str
    ) -> None:
        model, options = make_model(stage, **variant, dropout=0.1), TrainOptions(decay_all=True)
        parts = {id(value) for part in model.parts()[stage] for value in part.parameters()}
        own = {name for name, value in model.named_parameters() if id(value) in parts}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = make_optimiser(model.train(), options)
        model.loss(make_ddp_batch())["loss"].backward()
        # What is added to all keys alike is lost in the softmax.
        still = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
        assert still - {name for name in own if name.endswith("attention.k.bias")} == before.keys() & (
            {name for name, _ in model.named_parameters()} - own
        )
        optimiser.step()
        assert own == {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    @each_stage
    def test_without_history_no_parameter_is_left_without_a_gradient(self, stage: str) -> None:
        # Processes that train together would wait for it.
        model = make_model(stage, shape=replace(SHAPE, history=1))
        model.loss(make_ddp_batch(frames=2))["loss"].backward()
        assert all((value.grad is not None) == value.requires_grad for value in model.parameters())

    def test_together_they_train_everything_once(self) -> None:
        model = make_model()
        parts = [value for stage in STAGES for part in model.parts()[stage] for value in part.parameters()]
        assert len(parts) == len(set(parts))
        assert set(parts) == set(model.parameters())

    @each_stage
    def test_one_that_begins_leaves_no_gradient_of_the_one_before(self, stage: str) -> None:
        # It would count when gradients are clipped.
        model = make_model(stage)
        model.loss(make_ddp_batch())["loss"].backward()
        for following in STAGES:
            model.begin(following)
            assert all(value.grad is None for value in model.parameters())

    @each_stage
    def test_what_is_frozen_does_without_dropout(self, stage: str) -> None:
        model = make_model(stage, dropout=0.5).train()
        modes = {name: {part.training for root in model.parts()[name] for part in root.modules()} for name in STAGES}
        assert modes == {name: {name == stage} for name in STAGES}
        assert not any(part.training for part in model.eval().modules())

    def test_the_loss_of_the_correction_which_has_no_dropout_is_the_same_twice(self) -> None:
        model, batch = make_model("lrm", dropout=0.5).train(), make_ddp_batch()
        assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
        assert not torch.equal(
            *(model.train().loss(batch)["loss"] for model in [make_model("primary", dropout=0.5)] * 2)
        )

    def test_the_stage_comes_back_with_the_weights(self) -> None:
        other = build("ddp-wm", SHAPE, SIZES, make_statistics(seed=9)).eval()
        model, beginning = make_model("lrm"), make_beginning(2)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.rollout(*beginning)[0], model.rollout(*beginning)[0])


class TestLoss:
    def test_of_the_localiser_it_weighs_cells_that_change_tenfold_after_histories_of_every_length(self) -> None:
        model, batch = make_model("localization"), make_ddp_batch()
        with torch.no_grad():  # so that it finds about half of the patches
            model.localiser.head[-1].bias -= model.locate(*standard_inputs(batch)).amax(-1).median()
        logits, labels = model.locate(*standard_inputs(batch)), batch["changes"][:, 1:] > 0.1
        chance = logits.sigmoid()
        expected = -torch.where(labels, 10 * chance.log(), (1 - chance).log()).mean()
        losses = model.loss(batch)
        torch.testing.assert_close(losses["loss"], expected)
        found, there = (logits > 0).any(-1), labels.any(-1)
        assert 0 < (found & there).sum() < min(found.sum(), there.sum())
        torch.testing.assert_close(losses["recall"], (found & there).sum() / there.sum())
        torch.testing.assert_close(losses["precision"], (found & there).sum() / found.sum())

    def test_of_the_localiser_by_features_needs_no_change_maps(self) -> None:
        model, batch = make_model("localization", labels="features"), make_batch(frames=4)
        tokens = standard(model, batch)[0]
        labels = (tokens.diff(dim=1).square().mean(-1).sqrt() > 0.5)[..., None].expand(-1, -1, -1, 4).float()
        expected = F.binary_cross_entropy_with_logits(
            model.locate(*batch.values()), labels, pos_weight=torch.tensor(10.0)
        )
        torch.testing.assert_close(model.loss(batch)["loss"], expected)

    def test_the_first_change_map_of_a_window_is_of_what_was_before_it(self) -> None:
        model, batch = make_model("localization"), make_ddp_batch()
        loss = model.loss(batch)["loss"]
        for frame, counts in ((0, False), (1, True), (3, True)):
            other = {**batch, "changes": batch["changes"].clone()}
            other["changes"][:, frame] = 1
            assert torch.equal(model.loss(other)["loss"], loss) != counts

    @each_variant
    def test_of_the_primary_predictor_it_is_of_what_is_computed_of_frames_as_a_rollout_makes_them(
        self, variant: dict[str, Any]
    ) -> None:
        model, batch = make_model("primary", **variant), make_ddp_batch()
        errors, code_errors = [], []
        for tokens, code, action in zip(*standard(model, batch), strict=True):
            seen = tokens[:1]
            for end in range(1, len(tokens)):
                step = step_naively(model, seen, code[:end], action[:end])
                errors.append((step.tokens - tokens[end, step.places]).square().mean())
                code_errors.append((step.code - code[end]).square().mean())
                following = seen[-1].clone()
                following[step.places] = tokens[end, step.places]
                seen = torch.cat([seen, following[None]])
        check_losses(model, model.loss(batch), torch.stack(errors).mean(), torch.stack(code_errors).mean())

    @each_variant
    def test_of_the_correction_it_is_of_what_stays_of_true_frames(self, variant: dict[str, Any]) -> None:
        model, batch = make_model("lrm", **variant), make_ddp_batch()
        errors, code_errors = [], []
        for tokens, code, action in zip(*standard(model, batch), strict=True):
            for end in range(1, len(tokens)):
                step = step_naively(model, tokens[:end], code[:end], action[:end])
                errors.append((step.rest_tokens - tokens[end, step.rest]).square().mean())
                if variant["proprio"] == "embedding":
                    code_errors.append((step.rest_code - code[end]).square().mean())
        of_code = torch.stack(code_errors).mean() if code_errors else None
        check_losses(model, model.loss(batch), torch.stack(errors).mean(), of_code)

    @each_of_two
    def test_what_is_not_selected_is_nothing_to_the_primary_predictor_and_all_to_the_correction(
        self, variant: dict[str, Any]
    ) -> None:
        model, batch = make_model("primary", **variant), make_ddp_batch(frames=2)
        tokens, code, action = (value[0] for value in standard(model, batch))
        step = step_naively(model, tokens[:1], code[:1], action[:1])
        for stage, looked_at in (("primary", step.places), ("lrm", step.rest)):
            model.begin(stage)
            loss = model.loss(batch)["loss"]
            for patch in range(SHAPE.tokens):
                # Of the frame that is to be predicted, which nothing else is known of.
                other = model.loss(changed(batch, 1, patch))["loss"]
                assert torch.equal(other, loss) == (patch not in looked_at)

    def test_the_primary_predictor_sees_of_a_later_frame_only_what_was_selected(self) -> None:
        # The reference means to, but keeps the first frame instead.
        model, batch = make_model("primary"), make_ddp_batch(frames=3)
        tokens, code, action = (value[0] for value in standard(model, batch))
        step = step_naively(model, tokens[:1], code[:1], action[:1])
        seen: list[Tensor] = []
        model.fusion.attention.q.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
        model.loss(batch)
        for patch in range(SHAPE.tokens):
            model.loss(changed(batch, 1, patch))
            differs = (seen[-1] != seen[0]).any(-1).nonzero()[:, 0].tolist()
            assert differs == [patch] * (patch in step.places)

    @each_stage
    def test_bfloat16_is_the_same_but_for_rounding(self, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        # Of two tokens that are as likely to change rounding would select the other one.
        model, batch = make_model(stage), make_ddp_batch()
        monkeypatch.setattr(model, "select", lambda logits: torch.arange(K).expand(len(logits), K))
        loss = model.loss(batch)["loss"]
        with autocast(torch.device("cpu"), torch.bfloat16):
            rounded = model.loss(batch)["loss"]
        rounded.backward()
        torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)


def standard_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `locate` takes."""
    return batch["tokens"], batch["proprio"], batch["action"]


def check_losses(model: Any, losses: dict[str, Tensor], of_tokens: Tensor, of_code: Tensor | None) -> None:
    torch.testing.assert_close(losses["tokens"], of_tokens, rtol=1e-4, atol=1e-5)
    if of_code is None or not model.proprio_size:
        assert "proprio" not in losses
        torch.testing.assert_close(losses["loss"], of_tokens, rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(losses["proprio"], of_code, rtol=1e-4, atol=1e-5)
    dimensions = SHAPE.token_dim + model.proprio_size
    expected = (SHAPE.token_dim * of_tokens + model.proprio_size * of_code) / dimensions
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)


class TestBuilding:
    def test_the_reference_has_as_many_parameters_as_the_reference(self) -> None:
        known = {field.name for field in fields(DdpWmOptions)}
        options = {key.replace("-", "_"): value for key, value in PRESETS["ddp-wm"].items()}
        options = {name: value for name, value in options.items() if name in known}
        assert set(options) == known - {"threshold"}
        shape = DataShape(tokens=196, token_dim=384, proprio_dim=4, action_dim=10, history=3, columns=14)
        sizes = {"tokens": 384, "proprio": 4, "action": 10}
        with torch.device("meta"):
            statistics = {f"{name}_{of}": torch.ones(size) for name, size in sizes.items() for of in ("mean", "std")}
            model = build("ddp-wm", shape, options, statistics)
        attention = 4 * (404 * 404 + 404) + 2 * 404
        block = 2 * 404 + 404 * 3 * 1024 + 1024 * 404 + 404 + 2 * 404 + 404 * 2048 + 2048 + 2048 * 404 + 404
        small = 2 * 212 + 212 * 3 * 192 + 192 * 212 + 212 + 2 * 212 + 212 * 768 + 768 + 768 * 212 + 212
        head = 2 * (212 * 212 + 212) + 212 * 4 + 4
        expected = {
            "embed_proprio": 4 * 10 + 10,
            "embed_action": 10 * 10 + 10,
            "fusion": attention + (2 * 196 + 2) * 404,
            "localiser": 384 * 192 + 192 + 196 * 212 + 6 * small + 2 * 212 + head,
            "primary": 196 * 404 + 6 * block + 2 * 404,
            "correction": attention + 196 * 404,
        }
        counts = dict.fromkeys(expected, 0)
        for name, value in model.named_parameters():
            counts[name.partition(".")[0]] += value.numel()
        assert counts == expected
        assert (model.foreground, model.primary.position.shape) == (32, (196, 404))

    @pytest.mark.parametrize(
        ("shape", "options", "said"),
        [
            ({"tokens": 1, "columns": 1}, {}, "this store has one; choose --model dino-wm"),
            ({}, {"foreground": 8}, "--foreground 8 leaves none of 8 tokens"),
            ({}, {"foreground": -1}, "foreground"),
            ({}, {"width": 15}, "--width 15 is not a multiple of --heads 2; or give --head-dim"),
            ({}, {"width": 0, "proprio": "none"}, "--width 0 leaves the heads without a size"),
            ({}, {"width": 0, "head_dim": 4}, "--width 0 has no head for raw proprio"),
            ({}, {"locator_width": 7}, "--locator-width 7 is not a multiple of --locator-heads 2"),
            ({}, {"labels": "words"}, "labels"),
            ({}, {"threshold": -1.0}, "threshold"),
            ({}, {"combine": "features"}, "world model ddp-wm has no option combine"),
        ],
    )
    def test_what_cannot_be_built_is_refused_in_one_line(
        self, shape: dict[str, int], options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError, match=said) as refusal:
            build("ddp-wm", replace(SHAPE, **shape), SIZES | {"head_dim": 0} | options, make_statistics())
        assert "\n" not in str(refusal.value)
