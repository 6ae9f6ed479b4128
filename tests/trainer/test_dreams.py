"""What actors need of every model that dreams: noise from one generator for a whole batch, and gradients through steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_tools import SHAPE, generators, make_batch, make_statistics, randomise, remember

from wmcache.trainer.models import build

SIZES: dict[str, dict[str, Any]] = {
    "iris": {"vocabulary": 8, "code_dim": 3, "channels": 6, "width": 8, "depth": 1, "heads": 2},
    "mdn-rnn": {"hidden": 6, "mixtures": 3},
    "rssm": {"deter": 8, "hidden": 6, "stoch": 4, "classes": 8},
    "diswm": {"deter": 8, "hidden": 6, "stoch": 4, "z_dim": 3},
    "rwm": {"hidden": 6, "head": 5, "ensemble": 2},
}
each_model = pytest.mark.parametrize("name", SIZES)


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    return randomise(build(name, SHAPE, SIZES[name] | {"temperature": 1.0}, make_statistics())).eval()


@each_model
def test_one_generator_draws_for_all_episodes(name: str) -> None:
    model, batch = make_model(name), make_batch(batch=1, frames=2)
    batch = {key: value.expand(50, *value.shape[1:]) for key, value in batch.items()}
    belief, action = remember(model, batch, frames=2), batch["action"][:, 1]
    found = [model.step(belief, action, torch.Generator().manual_seed(seed))[1].latents for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.isclose(found[0], found[2]).all()
    assert len(found[0].flatten(1).unique(dim=0)) > 40
    each = model.step(belief, action, generators(*range(50)))[1].latents
    torch.testing.assert_close(found[0].mean(0), each.mean(0), rtol=0, atol=7 * each.std().item() / 50**0.5)


@each_model
def test_gradients_pass_through_steps(name: str) -> None:
    model, batch = make_model(name), make_batch(batch=3, frames=4)
    actions, noise = batch["action"].clone().requires_grad_(), torch.Generator().manual_seed(1)
    belief = remember(model, batch, frames=2)
    for t in (1, 2, 3):
        belief, _ = model.step(belief, actions[:, t], noise)
    loss = torch.stack([value.square().sum() for value in model.features(belief).values()]).sum()
    assert torch.autograd.grad(loss, actions)[0][:, 1:].any(-1).all()
