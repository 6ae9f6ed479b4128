"""Rollouts that keep keys and values are those that compute everything anew, in the store's units, for one future or many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_tools import (
    FUTURES,
    IMAGINED,
    SHAPE,
    each_variant,
    make_batch,
    make_beginning,
    make_futures,
    make_statistics,
    make_trained_model,
    name_of,
    some_variants,
    standardised,
)
from torch import Tensor

TRANSFORMERS = some_variants(proprio="embedding", predict="change", width=0)
"""All that decides which keys and values are kept, and how."""
each_transformer = pytest.mark.parametrize("variant", TRANSFORMERS, ids=name_of)


def pass_over(model: Any, tokens: Tensor, code: Tensor, actions: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """All frames at once, each of which sees the window that ends with it."""
    x, condition = model.join(tokens, code, actions)
    x = x + model.position_of(range(tokens.shape[1]))
    for block in model.blocks:
        x, _ = block(x, condition=condition, window=window)
    predicted: tuple[Tensor, Tensor] = model.split(x, tokens, code)
    return predicted


def roll_out_naively(
    model: Any, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int
) -> tuple[Tensor, Tensor]:
    """A rollout that keeps nothing but frames.

    With learned positions each step looks anew at the last frames, from position 0; with rotary ones at all frames since the first that
    the first step saw, each of which sees the frames of a window.
    """
    observed, rotary = tokens.shape[1], model.options.position == "rope"
    tokens, code, actions = standardised(model, tokens, proprio, actions)
    if model.options.proprio != "raw" and model.options.combine == "features":  # each patch keeps its own
        code = code.expand(-1, -1, tokens.shape[2], -1)
    for end in range(observed, actions.shape[1] + 1):
        seen = slice(max(0, (observed if rotary else end) - context), end)
        if rotary:
            following = pass_over(model, tokens[:, seen], code[:, seen], actions[:, seen], context)
        else:
            following = model.predict(tokens[:, seen], code[:, seen], actions[:, seen])
        tokens = torch.cat([tokens, following[0][:, -1:]], 1)
        code = torch.cat([code, following[1][:, -1:]], 1)
    return tokens[:, observed:] * model.tokens_std + model.tokens_mean, code[:, observed:, 0]


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("observed", [1, 2, 3, 5])
@each_transformer
def test_it_is_the_rollout_that_computes_everything_anew(variant: dict[str, Any], observed: int, context: int) -> None:
    model, beginning = make_trained_model(**variant), make_beginning(observed)
    tokens, code = model.rollout(*beginning, context=context)
    assert tokens.shape == (2, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
    expected_tokens, expected_code = roll_out_naively(model, *beginning, context)
    torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(code, expected_code, rtol=1e-4, atol=1e-4)


@each_variant
def test_of_every_variant_it_is_the_rollout_that_computes_everything_anew(variant: dict[str, Any]) -> None:
    model, beginning = make_trained_model(**variant), make_beginning(observed=2)
    tokens, code = model.rollout(*beginning, context=2)
    expected_tokens, expected_code = roll_out_naively(model, *beginning, 2)
    assert code.shape == (2, IMAGINED, model.encode_proprio(beginning[1]).shape[-1])
    torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(code, expected_code, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("observed", [1, 2, 3, 5])
@each_transformer
def test_many_futures_are_as_many_rollouts(variant: dict[str, Any], observed: int, context: int) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed)
    futures = make_futures(actions, past=observed - 1)
    together = model.rollout(tokens, proprio, futures, context=context)
    apart = [model.rollout(tokens, proprio, futures[:, future], context=context) for future in range(FUTURES)]
    assert not torch.isclose(apart[0][0], apart[1][0]).all()
    for all_of_them, part in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(all_of_them, torch.stack(part, 1), rtol=1e-4, atol=1e-4)


@each_transformer
def test_no_frame_is_computed_twice_nor_for_each_future_what_they_share(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=2)
    computed: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[0]))
    model.rollout(tokens, proprio, make_futures(actions, past=1))
    shared, each = len(tokens), FUTURES * len(tokens)
    # With learned positions a window that moves is computed anew, and by then lies in the futures' own frames.
    moved = [each] * 3 * (IMAGINED - 2) if variant["position"] == "learned" else [each] * (IMAGINED - 2)
    assert computed == [shared, each, each, *moved]


@each_transformer
def test_one_future_of_many_dimensions_is_that_of_one(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=2)
    for one, plain in zip(
        model.rollout(tokens, proprio, actions[:, None]), model.rollout(tokens, proprio, actions), strict=True
    ):
        assert torch.equal(one[:, 0], plain)


@pytest.mark.parametrize("context", [1, 3])
@each_transformer
def test_the_gradient_reaches_every_action_that_was_taken(variant: dict[str, Any], context: int) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=2)
    futures = make_futures(actions, past=1).requires_grad_()
    (together,) = torch.autograd.grad(model.rollout(tokens, proprio, futures, context=context)[0].sum(), futures)
    assert together[:, :, 1:].flatten(3).any(-1).all()
    for future in range(FUTURES):
        alone = futures[:, future].detach().requires_grad_()
        (expected,) = torch.autograd.grad(model.rollout(tokens, proprio, alone, context=context)[0].sum(), alone)
        torch.testing.assert_close(together[:, future, 1:], expected[:, 1:], rtol=1e-3, atol=1e-3)


@each_transformer
def test_what_is_imagined_knows_only_the_actions_before_it(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=2)
    other = actions.clone()
    other[:, 3] += 1  # leads to the third imagined frame
    before, after = model.rollout(tokens, proprio, actions)[0], model.rollout(tokens, proprio, other)[0]
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:], after[:, 2:]).flatten(2).all(-1).any()


@each_transformer
def test_it_forgets_what_is_older_than_the_history(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=5)
    whole, recent = (
        model.rollout(tokens, proprio, actions),
        model.rollout(tokens[:, 2:], proprio[:, 2:], actions[:, 2:]),
    )
    torch.testing.assert_close(whole[0], recent[0], rtol=1e-4, atol=1e-4)


def test_more_context_than_there_was_in_training_is_all_that_there_was() -> None:
    model, beginning = make_trained_model(), make_beginning(observed=5)
    assert torch.equal(model.rollout(*beginning, context=9)[0], model.rollout(*beginning, context=3)[0])


def test_it_speaks_the_units_of_the_store_and_the_terms_of_the_code() -> None:
    statistics, model, batch = make_statistics(), make_trained_model(), make_batch()
    inputs = {name: (value - statistics[f"{name}_mean"]) / statistics[f"{name}_std"] for name, value in batch.items()}
    tokens, code = model.predict(inputs["tokens"], inputs["proprio"][:, :, None], inputs["action"])
    imagined = model.rollout(batch["tokens"], batch["proprio"], batch["action"])
    torch.testing.assert_close(imagined[0], tokens[:, -1:] * statistics["tokens_std"] + statistics["tokens_mean"])
    torch.testing.assert_close(imagined[1], code[:, -1:, 0])
    torch.testing.assert_close(model.encode_proprio(batch["proprio"]), inputs["proprio"])


@each_variant
def test_it_takes_the_half_precision_of_the_store(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, actions) = make_trained_model(**variant), make_beginning(observed=2)
    half = tokens.half()
    imagined, _ = model.rollout(half, proprio, actions)
    assert imagined.dtype == torch.float32
    assert torch.equal(imagined, model.rollout(half.float(), proprio, actions)[0])
