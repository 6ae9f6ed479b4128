"""DDP-WM: which tokens of a frame are computed, what each stage trains, what it takes from the data. Rollouts are in test_rollout.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    DEFAULTS,
    FUTURES,
    IMAGINED,
    REFERENCE,
    SHAPE,
    K,
    build_preset,
    each_ddp_variant,
    make_batch,
    make_ddp_model,
    make_futures,
    make_observed,
    model_inputs,
    name_of,
    roll_out,
)
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.cache.change_maps import open_change_maps
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.trainer.models import build, read_options
from wmcache.trainer.models.ddp_wm import DdpWm
from wmcache.trainer.models.ddp_wm.measure import foreground_size, localization
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

STAGES = DdpWm.stages
each_stage = pytest.mark.parametrize("stage", STAGES)


def make_ddp_batch(frames: int = 4) -> dict[str, Tensor]:
    """With change maps in which about every second patch has changed by the usual threshold."""
    generator = torch.Generator().manual_seed(4)
    changes = torch.rand(2, frames, SHAPE.tokens, 4, generator=generator).pow(16).half()
    return {**make_batch(batch=2, frames=frames), "changes": changes}


def locate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model.locate(batch["tokens"], batch["proprio"], batch["action"])
    return logits


class TestRollout:
    @pytest.mark.parametrize("variant", [DEFAULTS, REFERENCE], ids=name_of)
    def test_a_model_without_history_sees_the_newest_frame_alone(self, variant: dict[str, Any]) -> None:
        model, observation = make_ddp_model(shape=replace(SHAPE, history=1), **variant), make_observed(observed=3)
        found = roll_out(model, *observation)
        for one, expected in zip(found, naive_models.roll_out("ddp-wm", model, *observation, 1), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(roll_out(model, *(value[:, 2:] for value in observation))[0], found[0])

    @pytest.mark.parametrize("batch", [1, 5])
    @pytest.mark.parametrize("foreground", [1, 4, 7])
    def test_k_tokens_of_each_frame_go_through_the_large_transformer(self, foreground: int, batch: int) -> None:
        model, data = make_ddp_model(foreground=foreground), make_batch(batch=batch, frames=3)
        seen: list[tuple[int, ...]] = []
        model.primary.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:3])))
        roll_out(model, *data.values())
        roll_out(model, data["tokens"][:, :1], data["proprio"][:, :1], make_futures(data["action"], past=0))
        assert seen == [(batch, 1, foreground)] + [(FUTURES * batch, 1, foreground)] * 3

    @pytest.mark.parametrize("observed", [1, 3])
    def test_no_frame_is_remembered_twice_and_shared_ones_not_for_each_future(self, observed: int) -> None:
        model, (tokens, proprio, actions) = make_ddp_model(), make_observed(observed)
        remembered: list[int] = []
        model.fusion.attention.v.register_forward_pre_hook(lambda _, inputs: remembered.append(len(inputs[0])))
        roll_out(model, tokens, proprio, make_futures(actions, past=observed - 1))
        # No later frame attends to the last two: the newest, and the one that it is imagined from.
        assert remembered == [len(tokens)] * (observed - 1) + [FUTURES * len(tokens)] * (IMAGINED - 1)

    @pytest.mark.parametrize("stage", ["localization", "primary"])
    @pytest.mark.parametrize("predict", ["change", "frame"])
    def test_before_the_last_stage_unchanged_tokens_are_copied_bit_for_bit(self, predict: str, stage: str) -> None:
        model = make_ddp_model(stage, predict=predict, standardise=False)
        tokens, proprio, actions = make_observed(1)
        frames = torch.cat([tokens, roll_out(model, tokens, proprio, actions)[0]], 1)
        same = (frames[:, 1:] == frames[:, :-1]).all(-1)
        assert (same.sum(-1) == SHAPE.tokens - K).all()
        assert same.all(1).sum() < 2 * (SHAPE.tokens - K)  # not always the same ones


class TestLocalization:
    def test_a_step_is_located_by_the_frames_of_its_history(self) -> None:
        model, batch = make_ddp_model(), make_batch(frames=6)
        logits, inputs = locate(model, batch), model_inputs(model, batch)
        for one, step in itertools.product(range(2), range(5)):
            seen = slice(max(0, step + 1 - SHAPE.history), step + 1)
            frames = zip(*(value[one, seen] for value in inputs), strict=True)
            fused = naive_models.fuse(model.fusion, [naive_models.join(model, *frame) for frame in frames])
            torch.testing.assert_close(logits[one, step], model.localiser(fused[None])[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("threshold", "expected"), [(0.0, [3, 6]), (0.35, [3, 5, 6])])
    def test_labels_of_features_mark_all_cells_of_a_patch(self, threshold: float, expected: list[int]) -> None:
        model = make_ddp_model(labels="features", threshold=threshold)
        tokens = torch.randn(1, 1, SHAPE.tokens, SHAPE.token_dim).repeat(1, 2, 1, 1)
        tokens[0, 1, 3] += 0.6
        tokens[0, 1, 5] -= 0.4
        tokens[0, 1, 6, 0] += 0.6 * SHAPE.token_dim**0.5  # the same root mean square
        (labels,) = model.labels(tokens, {}).unbind(1)
        assert labels[0].all(-1).nonzero()[:, 0].tolist() == expected
        assert labels[0].any(-1).nonzero()[:, 0].tolist() == expected

    def test_the_masks_are_of_the_labels_the_selection_and_the_logits(self) -> None:
        model, batch = make_ddp_model(), make_ddp_batch()
        masks, logits = model.change_masks(batch), locate(model, batch)
        assert torch.equal(masks["changes"], model.labels(batch["tokens"], batch).any(-1))
        assert torch.equal(masks["likely to change"], (logits > 0).any(-1))
        computed = masks["computed"].nonzero()[:, 2].view(2, 3, K)
        assert torch.equal(computed, model.select(logits))


class TestStages:
    @each_stage
    @pytest.mark.parametrize("variant", [DEFAULTS, REFERENCE, REFERENCE | {"proprio": "none"}], ids=name_of)
    def test_each_trains_its_own_parts_and_leaves_the_others_as_they_are(
        self, variant: dict[str, Any], stage: str
    ) -> None:
        model, options = make_ddp_model(stage, **variant, dropout=0.1), TrainOptions(decay_all=True)
        parts = {id(value) for part in model.parts()[stage] for value in part.parameters()}
        own = {name for name, value in model.named_parameters() if id(value) in parts}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = make_optimiser(model.train(), options)
        model.loss(make_ddp_batch())["loss"].backward()
        # A bias of the keys cancels in the softmax.
        still = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
        others = {name for name, _ in model.named_parameters()} - own
        assert still - {name for name in own if name.endswith("attention.k.bias")} == others
        optimiser.step()
        assert own == {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    @each_stage
    def test_without_history_every_trained_parameter_has_a_gradient(self, stage: str) -> None:
        # Processes that train together would wait for one without.
        model = make_ddp_model(stage, shape=replace(SHAPE, history=1))
        model.loss(make_ddp_batch(frames=2))["loss"].backward()
        assert all((value.grad is not None) == value.requires_grad for value in model.parameters())

    def test_together_they_train_everything_once(self) -> None:
        model = make_ddp_model()
        parts = [value for stage in STAGES for part in model.parts()[stage] for value in part.parameters()]
        assert len(parts) == len(set(parts))
        assert set(parts) == set(model.parameters())

    @each_stage
    def test_a_stage_starts_without_gradients(self, stage: str) -> None:
        # Those of frozen parts would count when the norm is clipped.
        model = make_ddp_model(stage)
        model.loss(make_ddp_batch())["loss"].backward()
        for following in STAGES:
            model.begin(following)
            assert (model.stage_name, {value.grad for value in model.parameters()}) == (following, {None})

    @each_stage
    def test_frozen_parts_do_without_dropout(self, stage: str) -> None:
        model = make_ddp_model(stage, dropout=0.5).train()
        parts = model.parts().items()
        modes = {name: {part.training for root in roots for part in root.modules()} for name, roots in parts}
        assert modes == {name: {name == stage} for name in STAGES}
        assert not any(part.training for part in model.eval().modules())
        losses = [model.train().loss(make_ddp_batch())["loss"] for _ in range(2)]
        assert torch.equal(*losses) == (stage == "lrm")  # the correction has no dropout


class TestLoss:
    def test_localization_weights_changed_cells_tenfold_after_histories_of_every_length(self) -> None:
        model, batch = make_ddp_model("localization"), make_ddp_batch()
        with torch.no_grad():  # so that it finds about half of the patches
            model.localiser.head[-1].bias -= locate(model, batch).amax(-1).median()
        logits, labels = locate(model, batch), batch["changes"][:, 1:] > 0.1
        chance = logits.sigmoid()
        losses = model.loss(batch)
        torch.testing.assert_close(losses["loss"], -torch.where(labels, 10 * chance.log(), (1 - chance).log()).mean())
        found, there = (logits > 0).any(-1), labels.any(-1)
        assert 0 < (found & there).sum() < min(found.sum(), there.sum())
        torch.testing.assert_close(losses["recall"], (found & there).sum() / there.sum())
        torch.testing.assert_close(losses["precision"], (found & there).sum() / found.sum())

    def test_localization_by_features_needs_no_change_maps(self) -> None:
        model, batch = make_ddp_model("localization", labels="features"), make_batch(frames=4)
        changes = model_inputs(model, batch)[0].diff(dim=1).square().mean(-1).sqrt()
        labels = (changes > 0.5)[..., None].expand(-1, -1, -1, 4).float()
        expected = F.binary_cross_entropy_with_logits(locate(model, batch), labels, pos_weight=torch.tensor(10.0))
        torch.testing.assert_close(model.loss(batch)["loss"], expected)

    @each_ddp_variant
    def test_the_primary_predictor_is_trained_on_selected_tokens_of_frames_as_a_rollout_makes_them(
        self, variant: dict[str, Any]
    ) -> None:
        model, batch = make_ddp_model("primary", **variant), make_ddp_batch()
        errors, proprio_errors = [], []
        for tokens, embedding, action in zip(*model_inputs(model, batch), strict=True):
            seen = tokens[:1]
            for end in range(1, len(tokens)):
                step = naive_models.step_ddp(model, seen, embedding[:end], action[:end])
                errors.append((step.tokens - tokens[end, step.chosen]).square().mean())
                proprio_errors.append((step.embedding - embedding[end]).square().mean())
                following = seen[-1].clone()
                following[step.chosen] = tokens[end, step.chosen]
                seen = torch.cat([seen, following[None]])
        check_losses(model, model.loss(batch), torch.stack(errors).mean(), torch.stack(proprio_errors).mean())

    @each_ddp_variant
    def test_the_correction_is_trained_on_the_other_tokens_of_true_frames(self, variant: dict[str, Any]) -> None:
        model, batch = make_ddp_model("lrm", **variant), make_ddp_batch()
        errors, proprio_errors = [], []
        for tokens, embedding, action in zip(*model_inputs(model, batch), strict=True):
            for end in range(1, len(tokens)):
                step = naive_models.step_ddp(model, tokens[:end], embedding[:end], action[:end])
                errors.append((step.rest_tokens - tokens[end, step.rest]).square().mean())
                if variant["proprio"] == "embedding":
                    proprio_errors.append((step.rest_embedding - embedding[end]).square().mean())
        of_proprio = torch.stack(proprio_errors).mean() if proprio_errors else None
        check_losses(model, model.loss(batch), torch.stack(errors).mean(), of_proprio)

    @each_stage
    def test_bfloat16_differs_by_rounding_alone(self, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        # Where two tokens are equally likely to change, rounding would select the other one.
        model, batch = make_ddp_model(stage), make_ddp_batch()
        monkeypatch.setattr(model, "select", lambda logits: torch.arange(K).expand(len(logits), K))
        loss = model.loss(batch)["loss"]
        with autocast(torch.device("cpu"), torch.bfloat16):
            rounded = model.loss(batch)["loss"]
        rounded.backward()
        torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)


def check_losses(model: Any, losses: dict[str, Tensor], of_tokens: Tensor, of_proprio: Tensor | None) -> None:
    expected, size = {"tokens": of_tokens, "loss": of_tokens}, model.encode_proprio(torch.zeros(1, 1, 4)).shape[-1]
    if of_proprio is not None and size:
        weighted = (SHAPE.token_dim * of_tokens + size * of_proprio) / (SHAPE.token_dim + size)
        expected |= {"proprio": of_proprio, "loss": weighted}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_the_preset_has_as_many_parameters_as_the_reference() -> None:
    model, left_out = build_preset("ddp-wm")
    assert left_out == {"threshold"}
    counts = {name: sum(value.numel() for value in part.parameters()) for name, part in model.named_children()}
    sizes = {"fusion": 814_464, "localiser": 3_149_988, "primary": 19_964_232, "correction": 734_472}
    assert counts == {"embed_proprio": 50, "embed_action": 110, "project_in": 0, **sizes}
    assert (model.foreground, model.primary.position.shape) == (32, (196, 404))


def configured(store: TokenStore, **options: Any) -> int:
    """K for the windows of a store."""
    windows = store.windows(3, 1, 5, "train")
    return DdpWm.configure(store, windows, read_options("ddp-wm", options)).foreground


def figures_of(store: TokenStore, answers: Any, **chosen: Any) -> tuple[dict[str, float | None], Windows]:
    """Localization of a model that predicts `answers`, in all windows of one observed frame and five that follow."""
    options = TrainOptions(model="ddp-wm", model_options={"foreground": 1, "width": 12, **chosen})
    model = build("ddp-wm", data_shape(store, options), options.model_options, statistics_of(store, 5))
    assert isinstance(model, DdpWm)
    model.locate = answers  # type: ignore[method-assign]
    windows = store.windows(1, 5, 5, "all")
    windows = windows.with_extras(DdpWm.extras(store, windows, model.options))
    return localization(model, windows, torch.device("cpu"), torch.float32), windows


def no_change(tokens: Tensor, *_: Tensor) -> Tensor:
    return torch.full((len(tokens), tokens.shape[1] - 1, 4, 4), -1.0)


@pytest.mark.parametrize(
    ("tokens", "counts", "expected"),
    [
        (196, [5] * 100, 8),
        (196, [6] * 100, 16),
        # One step in a hundred may have more.
        (196, [3] * 1000 + [100] * 5, 8),
        (196, [3] * 1000 + [100] * 20, 98),
        (3, [3] * 100, 1),
        (196, [], 1),
    ],
)
def test_k_is_the_least_power_of_two_that_nearly_always_has_room_to_spare_and_at_most_half(
    tokens: int, counts: list[int], expected: int
) -> None:
    steps = np.random.default_rng(0).permutation(counts)
    assert foreground_size(np.arange(tokens) < steps[:, None]) == expected


@pytest.mark.parametrize(("labels", "thresholds"), [("pixels", (0.1, 0.2, 1.0)), ("features", (0.5, 1.5, 100.0))])
def test_k_comes_from_the_changes_in_the_steps_of_the_windows(
    ddp_store_path: Path, labels: str, thresholds: tuple[float, ...]
) -> None:
    store = TokenStore.open(ddp_store_path)
    windows = store.windows(3, 1, 5, "train")
    frames = windows.frames(np.arange(len(windows)))
    if labels == "pixels":
        changes = open_change_maps(store, 5).gather(frames[:, 1:].ravel()).max(-1)
    else:
        tokens = store.gather(frames.ravel()).reshape(*frames.shape, 4, 32) / store.std
        changes = np.sqrt(np.square(np.diff(tokens, axis=1)).mean(-1)).reshape(-1, 4)
    expected = [foreground_size(changes > threshold) for threshold in thresholds]
    assert [configured(store, labels=labels, threshold=threshold) for threshold in thresholds] == expected
    assert (expected[0], expected[-1]) == (2, 1)
    assert configured(store, labels=labels) == expected[0]  # the usual threshold
    assert configured(store, labels=labels, foreground=3) == 3


def test_a_constant_channel_hides_no_change(ddp_store_path: Path) -> None:
    store = TokenStore.open(ddp_store_path)
    expected = configured(store, labels="features")
    store.std[0], gather = 0, store.gather
    store.gather = lambda *args: gather(*args) * (np.arange(store.card.token_dim) > 0)  # type: ignore[method-assign]
    assert configured(store, labels="features") == expected


def test_a_constant_answer_is_right_as_often_as_those_patches_change(ddp_store_path: Path) -> None:
    store = TokenStore.open(ddp_store_path)

    def answers(tokens: Tensor, *_: Tensor) -> Tensor:
        logits = no_change(tokens)
        logits[:, :, 1, 2], logits[:, :, 2, 0] = 1.0, 2.0
        return logits

    figures, windows = figures_of(store, answers)
    frames = windows.frames(np.arange(len(windows)))[:, 1:]  # each has what changed since the frame before it
    changed = (open_change_maps(store, 5).gather(frames.ravel()) > 0.1).any(-1)
    changing = changed.sum()
    assert 0 < changed[:, 2].sum() < changed[:, [1, 2]].sum() < changing
    assert figures == pytest.approx(
        {
            "recall": changed[:, 2].sum() / changing,
            "precision": changed[:, 2].mean(),
            "recall_likely": changed[:, [1, 2]].sum() / changing,
            "precision_likely": changed[:, [1, 2]].mean(),
            "changed": changed.mean(),
        }
    )


def test_a_true_answer_finds_all_changes_but_those_that_k_leaves_out(store: TokenStore) -> None:
    threshold = 0.5

    def answers(tokens: Tensor, *_: Tensor) -> Tensor:
        change = tokens.float().diff(dim=1) / torch.from_numpy(store.std)
        return (change.square().mean(-1).sqrt() - threshold)[..., None].expand(-1, -1, -1, 4)

    figures, windows = figures_of(store, answers, labels="features", threshold=threshold)
    change = np.diff(windows.batch(np.arange(len(windows)))["tokens"].astype(np.float32) / store.std, axis=1)
    changed = np.sqrt((change**2).mean(-1)) > threshold
    assert (figures["recall_likely"], figures["precision_likely"]) == (1, 1)
    assert figures["changed"] == pytest.approx(changed.mean())
    # One patch is computed in each step, and it is a right one wherever there is one.
    assert figures["recall"] == pytest.approx(changed.any(-1).sum() / changed.sum())
    assert figures["precision"] == pytest.approx(changed.any(-1).mean())


def test_without_changes_all_figures_are_zero(store: TokenStore) -> None:
    assert set(figures_of(store, no_change, labels="features", threshold=1e3)[0].values()) == {0.0}
