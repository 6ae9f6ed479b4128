"""AVDC's plans: loss and videos against slow independent code, what actions depend on, and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import SHAPE, make_batch, make_statistics, name_of, randomise
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.trainer.models import build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model

pytest.importorskip("diffusers")
from naive_diffusion import STEPS, naive_dit, naive_errors, naive_sample

REACH = 3
SIZES: dict[str, Any] = {
    **{"width": 16, "depth": 1, "video_width": 16, "video_depth": 2, "video_heads": 2},
    **{"reach": REACH, "sampling_steps": 2},
}
VARIANTS: list[dict[str, Any]] = [
    {"predict": "change", "proprio": "raw", "scale": 0.4},
    {"predict": "frame", "proprio": "none", "scale": 2.0},
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
N, D = SHAPE.tokens, SHAPE.token_dim


def make_model(**options: Any) -> Any:
    """With random weights, those of the moving average too."""
    torch.manual_seed(0)
    return randomise(build("avdc-plan", SHAPE, SIZES | options, make_statistics())).eval()


def make_ends(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, proprio and goals of three episodes."""
    generator = torch.Generator().manual_seed(seed)
    tokens, goal = torch.randn(2, 3, N, D, generator=generator)
    return tokens, torch.randn(3, SHAPE.proprio_dim, generator=generator), goal


def naive_velocity(model: Any, network: Any, ends: tuple[Tensor, Tensor], proprio: Tensor) -> Any:
    """Of the frames [REACH - 1, N, D] between two standardised frames [N, D]."""

    def velocity(noisy: Tensor, step: int) -> Tensor:
        rows = [torch.cat([noisy[t, n], ends[0][n], ends[1][n]]) for t in range(REACH - 1) for n in range(N)]
        condition = proprio[:0] if model.blind else (proprio - model.proprio_mean) / model.proprio_std
        return naive_dit(network, [torch.stack(rows)], condition, step)[0].view(REACH - 1, N, D)

    return velocity


def naive_base(model: Any, start: Tensor, goal: Tensor) -> Tensor:
    shares = [t / REACH if model.options.predict == "change" else None for t in range(1, REACH)]
    zero = torch.zeros_like(start)
    return torch.stack([zero if share is None else (1 - share) * start + share * goal for share in shares])


@each_variant
def test_the_loss_and_its_gradient_are_those_of_slow_code(variant: dict[str, Any]) -> None:
    model, batch = make_model(**variant), make_batch(frames=REACH + 1)
    frames = (batch["tokens"] - model.tokens_mean) / model.tokens_std
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(STEPS, (2,), generator=generator).tolist()
    noise = torch.randn(2, REACH - 1, N, D, generator=generator)
    errors, missed = [], []
    for row in range(2):
        ends = frames[row, 0], frames[row, REACH]
        clean = (frames[row, 1:REACH] - naive_base(model, *ends)) / model.options.scale
        velocity = naive_velocity(model, model.diffusion.network, ends, batch["proprio"][row, 0])
        errors.append(naive_errors(clean, noise[row], numbers[row], velocity))
        for t in range(REACH):
            own = batch["tokens"][row, t], batch["proprio"][row, t], batch["tokens"][row, t + 1]
            action = model.decide(*(part[None] for part in own), 1)[0]
            missed.append((action - batch["action"][row, t]) / model.action_std)
    video, actions = torch.stack(errors).mean(), torch.stack(missed).square().mean()
    found = model.loss(batch)
    torch.testing.assert_close(found["video"], video.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["actions"], actions.detach(), rtol=1e-4, atol=1e-4)
    trained = [one for group in model.parameter_groups() for one in group["params"]]
    slow = torch.autograd.grad(video + actions, trained)
    for one, other in zip(torch.autograd.grad(found["loss"], trained), slow, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_noise_is_drawn_in_training_alone() -> None:
    model, batch = make_model(), make_batch(frames=REACH + 1)
    state = torch.get_rng_state()
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    first, second = model.loss(batch), model.loss(batch)
    assert first["video"] != second["video"]
    assert first["actions"] == second["actions"]


@each_variant
def test_a_video_is_that_of_slow_code(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, goal) = make_model(**variant), make_ends()
    found = model.generate(tokens, proprio, goal)
    assert found.shape == (3, REACH - 1, N, D)
    for row in range(3):
        start, end = ((one[row] - model.tokens_mean) / model.tokens_std for one in (tokens, goal))
        velocity = naive_velocity(model, model.diffusion.average.module, (start, end), proprio[row])
        drawn = naive_sample(model.noise, SIZES["sampling_steps"], velocity)
        video = naive_base(model, start, end) + model.options.scale * drawn
        expected = video * model.tokens_std + model.tokens_mean
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


@each_variant
def test_an_action_leads_to_the_first_frame_of_the_episodes_own_video(variant: dict[str, Any]) -> None:
    model, (tokens, proprio, goal) = make_model(**variant), make_ends()
    actions = model.act(tokens, proprio, goal)
    assert actions.shape == (3, SHAPE.action_dim)
    assert torch.equal(model.act(tokens, proprio, goal), actions)
    first = model.generate(tokens, proprio, goal)[:, 0]
    torch.testing.assert_close(actions, model.decide(tokens, proprio, first, 1))
    for row in range(3):
        own = slice(row, row + 1)
        torch.testing.assert_close(model.act(tokens[own], proprio[own], goal[own]), actions[own], rtol=1e-3, atol=1e-3)
    assert not torch.isclose(model.act(tokens + 1, proprio, goal), actions).any()
    assert not torch.isclose(model.act(tokens, proprio, goal + 1), actions).any()
    assert torch.equal(model.act(tokens, proprio + 1, goal), actions) == model.blind == (variant["proprio"] == "none")


class TestRuns:
    @pytest.fixture
    def go(self, store_path: Path, tiny: TrainOptions) -> Go:
        return make_go(store_path, replace(tiny, model="avdc-plan", model_options={**SIZES, "dropout": 0.1}))

    def test_a_stopped_run_resumes_exactly(self, go: Go, tmp_path: Path) -> None:
        result = go(tmp_path / "straight")
        assert list(result) == ["explained", "skill"]
        with stopped_at(6):
            go(tmp_path / "stopped")
        assert go(tmp_path / "stopped") == result
        assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
        assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
        with pytest.raises(UserError, match=str(tmp_path / "straight")):
            load_model(tmp_path / "straight", torch.device("cpu"))

    def test_it_learns_a_planted_linear_system(self, planted_path: Path, tiny: TrainOptions, run: Path) -> None:
        sizes = {**SIZES, "width": 64, "video_width": 32, "predict": "frame", "scale": 1.0}
        base = replace(tiny, model="avdc-plan", model_options=sizes, frameskip=1, log_every=60)
        make_go(planted_path, replace(base, validate_every=600, checkpoint_every=600))(
            run, steps=600, batch=64, learning_rate=5e-3
        )
        log = [line for line in read_log(run) if "video" in line]
        assert log[-1]["video"] < 0.3 * log[0]["video"]
        assert log[-1]["actions"] < 0.02
