"""Rollouts that keep keys and values give the numbers of those that compute everything again, for one future or many."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import naive_models
import pytest
import torch
from model_tools import (
    DDP_SIZES,
    DDP_VARIANTS,
    DEFAULTS,
    FUTURES,
    IMAGINED,
    REFERENCE,
    SHAPE,
    SIZES,
    VARIANTS,
    each_variant,
    make_batch,
    make_futures,
    make_observed,
    make_statistics,
    make_trained,
    make_trained_model,
    name_of,
    roll_out,
    some_variants,
)
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.engine.checkpoint import Progress, save_checkpoint
from wmcache.trainer.models import build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import make_optimiser

# All that decides which keys and values are kept, and how.
TRANSFORMERS = [("dino-wm", variant) for variant in some_variants(proprio="embedding", predict="change", width=0)]
CASES = [*TRANSFORMERS, ("ddp-wm", DEFAULTS), ("ddp-wm", REFERENCE)]
EVERY_CASE = [
    *(("dino-wm", variant) for variant in VARIANTS),
    *(("ddp-wm", variant | {"stage": stage}) for variant in DDP_VARIANTS for stage in ("primary", "lrm")),
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=name_of)
every_case = pytest.mark.parametrize(("name", "options"), EVERY_CASE, ids=name_of)


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("observed", [1, 2, 3, 5])
@each_case
def test_it_gives_the_numbers_of_the_naive_rollout(
    name: str, options: dict[str, Any], observed: int, context: int
) -> None:
    model, observation = make_trained(name, **options), make_observed(observed)
    found = roll_out(model, *observation, context=context)
    assert found[0].shape == (2, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
    assert_near(found, naive_models.roll_out(name, model, *observation, context))


@every_case
def test_every_variant_gives_the_numbers_of_the_naive_rollout(name: str, options: dict[str, Any]) -> None:
    model, observation = make_trained(name, **options), make_observed(observed=2)
    found = roll_out(model, *observation, context=2)
    assert found[1].shape == (2, IMAGINED, model.encode_proprio(observation[1]).shape[-1])
    assert_near(found, naive_models.roll_out(name, model, *observation, 2))


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("observed", [1, 3, 5])
@each_case
def test_many_futures_are_as_many_rollouts(name: str, options: dict[str, Any], observed: int, context: int) -> None:
    model, (tokens, proprio, actions) = make_trained(name, **options), make_observed(observed)
    futures = make_futures(actions, past=observed - 1)
    together = roll_out(model, tokens, proprio, futures, context=context)
    apart = [roll_out(model, tokens, proprio, futures[:, future], context=context) for future in range(FUTURES)]
    assert not torch.isclose(apart[0][0], apart[1][0]).all()
    assert_near(together, tuple(torch.stack(part, 1) for part in zip(*apart, strict=True)))


@each_case
def test_a_future_does_not_depend_on_the_rest_of_the_batch(name: str, options: dict[str, Any]) -> None:
    # In the reference of DDP-WM the busiest sequence decides how many tokens of all are computed.
    model, batch = make_trained(name, **options), make_batch(batch=6, frames=4)
    inputs = batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"]
    if name == "ddp-wm":
        assert len(model.select(model.locate(*batch.values())[:, 0]).unique(dim=0)) > 1
    together = roll_out(model, *inputs)
    alone = [roll_out(model, *(value[one : one + 1] for value in inputs)) for one in range(6)]
    assert_near(together, tuple(torch.cat(part) for part in zip(*alone, strict=True)))


@pytest.mark.parametrize("variant", [variant for _, variant in TRANSFORMERS], ids=name_of)
def test_no_frame_is_computed_twice_and_shared_ones_not_for_each_future(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_observed(observed=2)
    computed: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[0]))
    roll_out(model, tokens, proprio, make_futures(actions, past=1))
    shared, each = len(tokens), FUTURES * len(tokens)
    # With learned positions a window that moves is computed again, and its frames are the futures' own by then.
    moved = [each] * 3 * (IMAGINED - 2) if variant["position"] == "learned" else [each] * (IMAGINED - 2)
    assert computed == [shared, each, each, *moved]


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize(("name", "options"), [*CASES, ("ddp-wm", REFERENCE | {"stage": "primary"})], ids=name_of)
def test_the_gradient_reaches_every_action_that_was_taken(name: str, options: dict[str, Any], context: int) -> None:
    model, (tokens, proprio, actions) = make_trained(name, **options), make_observed(observed=2)

    def gradient(taken: Tensor) -> Tensor:
        # A norm may make the plain sum a constant.
        loss = roll_out(model, tokens, proprio, taken, context=context)[0].square().sum()
        return torch.autograd.grad(loss, taken)[0]

    futures = make_futures(actions, past=1).requires_grad_()
    together = gradient(futures)
    assert together[:, :, 1:].flatten(3).any(-1).all()
    for future in range(FUTURES):
        alone = gradient(futures[:, future].detach().requires_grad_())
        torch.testing.assert_close(together[:, future, 1:], alone[:, 1:], rtol=1e-3, atol=1e-3)


@each_case
def test_a_frame_depends_only_on_the_actions_before_it(name: str, options: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained(name, **options), make_observed(observed=2)
    other = actions.clone()
    other[:, 3] += 1  # leads to the third imagined frame
    before, after = roll_out(model, tokens, proprio, actions)[0], roll_out(model, tokens, proprio, other)[0]
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:], after[:, 2:]).flatten(2).all(-1).any()


@every_case
def test_it_takes_half_precision_and_returns_float32(name: str, options: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained(name, **options), make_observed(observed=2)
    imagined, _ = roll_out(model, tokens.half(), proprio, actions)
    assert torch.equal(imagined, roll_out(model, tokens.half().float(), proprio, actions)[0])
    with autocast(torch.device("cpu"), torch.bfloat16), torch.inference_mode():
        rounded, embedding = roll_out(model, tokens, proprio, actions)
    assert (imagined.dtype, rounded.dtype, embedding.dtype) == (torch.float32,) * 3
    # Later frames of DDP-WM may have other tokens, where two are equally likely to change.
    frames = slice(0, 1) if name == "ddp-wm" else slice(None)
    exact = roll_out(model, tokens, proprio, actions)[0]
    torch.testing.assert_close(rounded[:, frames], exact[:, frames], rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in EVERY_CASE if case[1]["proprio"] == "none"], ids=name_of
)
def test_without_proprio_it_is_neither_seen_nor_predicted(name: str, options: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained(name, **options), make_observed(observed=2)
    imagined, embedding = roll_out(model, tokens, proprio, actions)
    assert torch.equal(roll_out(model, tokens, proprio + 1, actions)[0], imagined)
    assert embedding.shape == (2, IMAGINED, 0)
    assert model.encode_proprio(proprio).shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddp-wm", DDP_SIZES), *(("dino-wm", SIZES | v) for v in some_variants(predict="change", width=16))],
)
def test_an_untrained_model_of_changes_copies_the_observed_frame(name: str, options: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = build(name, SHAPE, options, make_statistics()).eval(), make_observed(1)
    if model.stages:
        model.begin(model.stages[-1])
    imagined, embedding = roll_out(model, tokens, proprio, actions)
    torch.testing.assert_close(imagined, tokens.expand(-1, IMAGINED, -1, -1))
    torch.testing.assert_close(embedding, model.encode_proprio(proprio).expand(-1, IMAGINED, -1))


@each_variant
def test_a_loaded_run_rolls_out_as_the_model_that_was_saved(tmp_path: Path, variant: dict[str, Any]) -> None:
    options = {**variant, "standardise": variant["predict"] == "change"}
    model, batch = make_trained_model(**options), make_batch()
    save_checkpoint(tmp_path, Progress(1), model, make_optimiser(model, TrainOptions()))
    config = TrainOptions(model_options=SIZES | options)
    (tmp_path / "config.json").write_text(json.dumps({**asdict(config), "cache": "x", "shape": asdict(SHAPE)}))
    found = load_model(tmp_path, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for saved, loaded in zip(roll_out(model, *batch.values()), roll_out(found, *batch.values()), strict=True):
        assert torch.equal(saved, loaded)
