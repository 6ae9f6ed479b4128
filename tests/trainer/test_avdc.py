"""AVDC's dynamics: schedule, loss and rollouts against slow independent code, what they depend on, the moving average, and runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import (
    FUTURES,
    IMAGINED,
    SHAPE,
    build_preset,
    make_batch,
    make_futures,
    make_observed,
    make_statistics,
    name_of,
    randomise,
    roll_out,
)
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import FILES, last_checkpoint, load_tensors
from wmcache.trainer.models import DataShape, build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_trained

pytest.importorskip("diffusers")
from naive_diffusion import STEPS, kept, naive_dit, naive_errors, naive_sample

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "sampling_steps": 2}
VARIANTS: list[dict[str, Any]] = [
    {"predict": "change", "proprio": "raw", "scale": 0.4},
    {"predict": "frame", "proprio": "raw", "scale": 1.0},
    {"predict": "change", "proprio": "none", "scale": 2.0},
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
N, D, H = SHAPE.tokens, SHAPE.token_dim, SHAPE.history


def make_model(shape: DataShape = SHAPE, **options: Any) -> Any:
    """With random weights, those of the moving average too."""
    torch.manual_seed(0)
    return randomise(build("avdc", shape, SIZES | options, make_statistics())).eval()


def standardised(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Frames [B, T, proprio and tokens] and actions."""
    tokens = (batch["tokens"] - model.tokens_mean) / model.tokens_std
    proprio = (batch["proprio"] - model.proprio_mean) / model.proprio_std
    frames = torch.cat([proprio[..., : 0 if model.blind else None], tokens.flatten(2)], -1)
    return frames, (batch["action"] - model.action_mean) / model.action_std


def naive_velocity(model: Any, network: Any, seen: Tensor, action: Tensor) -> Any:
    """Of the frame after frames [T, V], and an action."""
    size = 0 if model.blind else SHAPE.proprio_dim

    def velocity(noisy: Tensor, step: int) -> Tensor:
        proprio, tokens = [[noisy[:size]]], [[noisy[size + n * D : size + (n + 1) * D]] for n in range(N)]
        for behind in range(H, 0, -1):
            frame = seen[-behind] if behind <= len(seen) else torch.zeros_like(noisy)
            proprio[0].append(frame[:size])
            for n in range(N):
                tokens[n].append(frame[size + n * D : size + (n + 1) * D])
        known = torch.tensor([float(behind <= len(seen)) for behind in range(H, 0, -1)])
        rows = [torch.stack([torch.cat([*row, known]) for row in part]) for part in (proprio, tokens)]
        condition = torch.cat([seen[-1][:size], action])
        return torch.cat([part.flatten() for part in naive_dit(network, rows[not size :], condition, step)])

    return velocity


def naive_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    frames, actions = standardised(model, batch)
    size, rows = 0 if model.blind else SHAPE.proprio_dim, len(frames) * (frames.shape[1] - 1)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(STEPS, (rows,), generator=generator).view(len(frames), -1)
    noise = torch.randn(rows, frames.shape[2], generator=generator).view(len(frames), -1, frames.shape[2])
    found = []
    for row in range(len(frames)):
        for t in range(1, frames.shape[1]):
            clean = frames[row, t] - (frames[row, t - 1] if model.options.predict == "change" else 0.0)
            velocity = naive_velocity(model, model.diffusion.network, frames[row, :t], actions[row, t - 1])
            step = int(steps[row, t - 1])
            found.append(naive_errors(clean / model.options.scale, noise[row, t - 1], step, velocity))
    errors = torch.stack(found)
    if not size:
        return errors.mean()
    return (D * errors[:, size:].mean() + size * errors[:, :size].mean()) / (D + size)


def naive_rollout(model: Any, frames: Tensor, actions: Tensor, observed: int, context: int) -> Tensor:
    """Frames [T, V] after some observed ones of one sequence, every one computed from the frames before it alone."""
    seen = list(frames[:observed])
    for t in range(observed, len(actions) + 1):
        window = torch.stack(seen[-context:])
        velocity = naive_velocity(model, model.diffusion.average.module, window, actions[t - 1])
        found = model.options.scale * naive_sample(model.noise, model.options.sampling_steps, velocity)
        seen.append(found + (seen[-1] if model.options.predict == "change" else 0.0))
    return torch.stack(seen[observed:])


def test_the_schedule_is_the_closed_form() -> None:
    model = make_model()
    expected = torch.tensor([kept(step) for step in range(STEPS)])
    torch.testing.assert_close(model.diffusion.scheduler.alphas_cumprod, expected, rtol=1e-3, atol=1e-9)
    assert 0 < expected[-1] < 1e-6


class TestLoss:
    @each_variant
    def test_it_and_its_gradient_are_those_of_slow_code(self, variant: dict[str, Any]) -> None:
        model, batch = make_model(**variant), make_batch(frames=H + 1)
        loss, expected = model.loss(batch)["loss"], naive_loss(model, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        trained = [one for group in model.parameter_groups() for one in group["params"]]
        for one, other in zip(*(torch.autograd.grad(value, trained) for value in (loss, expected)), strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_noise_is_drawn_in_training_alone(self) -> None:
        model, batch = make_model(), make_batch(frames=H + 1)
        state = torch.get_rng_state()
        assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        torch.manual_seed(1)
        first, second = model.loss(batch)["loss"], model.loss(batch)["loss"]
        assert first != second
        torch.manual_seed(1)
        assert torch.equal(model.loss(batch)["loss"], first)


class TestAverage:
    def test_it_follows_and_is_what_imagines(self) -> None:
        model, (tokens, proprio, actions), batch = make_model(), make_observed(1), make_batch(frames=H + 1)
        trained = {id(one) for group in model.parameter_groups() for one in group["params"]}
        pairs = list(
            zip(model.diffusion.average.module.parameters(), model.diffusion.network.parameters(), strict=True)
        )
        assert trained == {id(fast) for _, fast in pairs}
        model.after_step()
        assert all(torch.equal(slow, fast) for slow, fast in pairs)  # the first weights are no part of it
        imagined, loss = roll_out(model, tokens, proprio, actions)[0], model.loss(batch)["loss"]
        with torch.no_grad():
            for _, fast in pairs:
                fast.add_(torch.randn_like(fast))
        assert torch.equal(roll_out(model, tokens, proprio, actions)[0], imagined)
        assert model.loss(batch)["loss"] != loss
        for updates in range(1, 4):
            rate = min(0.999, (1 + updates) / (10 + updates))
            expected = [rate * slow + (1 - rate) * fast for slow, fast in pairs]
            model.after_step()
            torch.testing.assert_close([slow.detach() for slow, _ in pairs], expected)
        model.diffusion.average.n_averaged.fill_(10**6)
        expected = [0.999 * slow + 0.001 * fast for slow, fast in pairs]
        model.after_step()
        torch.testing.assert_close([slow.detach() for slow, _ in pairs], expected)
        assert not torch.isclose(roll_out(model, tokens, proprio, actions)[0], imagined).all()


class TestRollout:
    @pytest.mark.parametrize(("observed", "context"), [(1, 1), (1, 3), (2, 1), (3, 2), (5, 3)])
    @each_variant
    def test_it_gives_the_numbers_of_slow_code(self, variant: dict[str, Any], observed: int, context: int) -> None:
        model, (tokens, proprio, actions) = make_model(**variant), make_observed(observed)
        found = roll_out(model, tokens, proprio, actions, context=context)
        frames, moves = standardised(model, {"tokens": tokens, "proprio": proprio, "action": actions})
        size = 0 if model.blind else SHAPE.proprio_dim
        assert found[0].shape == (2, IMAGINED, N, D)
        assert found[1].shape == (2, IMAGINED, size)
        for row in range(2):
            expected = naive_rollout(model, frames[row], moves[row], observed, context)
            latents = expected[:, size:].view(-1, N, D) * model.tokens_std + model.tokens_mean
            torch.testing.assert_close(found[0][row], latents, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found[1][row], expected[:, :size], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("observed", [1, 3])
    def test_many_futures_of_a_batch_are_as_many_rollouts(self, observed: int) -> None:
        model, (tokens, proprio, actions) = make_model(), make_observed(observed)
        futures = make_futures(actions, past=observed - 1)
        together = roll_out(model, tokens, proprio, futures, context=2)
        assert torch.equal(roll_out(model, tokens, proprio, futures, context=2)[0], together[0])
        assert not torch.isclose(together[0][:, 0], together[0][:, 1]).all()
        for one in range(2):
            for future in range(FUTURES):
                own = slice(one, one + 1)
                alone = roll_out(model, tokens[own], proprio[own], futures[own, future], context=2)
                for found, expected in zip(together, alone, strict=True):
                    torch.testing.assert_close(found[own, future], expected, rtol=1e-3, atol=1e-3)

    def test_a_step_sees_its_own_past_alone(self) -> None:
        model, (tokens, proprio, actions) = make_model(), make_observed(3)
        usual = roll_out(model, tokens, proprio, actions, context=2)[0]
        for t in range(IMAGINED):
            other = actions.clone()
            other[:, 2 + t] += 1.0
            found = roll_out(model, tokens, proprio, other, context=2)[0]
            assert torch.equal(found[:, :t], usual[:, :t])
            assert not torch.isclose(found[:, t], usual[:, t]).all()
        for frame, seen in ((0, False), (1, True), (2, True)):
            for kind in range(2):
                changed = [tokens.clone(), proprio.clone()]
                changed[kind][:, frame] += 1.0
                assert torch.equal(roll_out(model, *changed, actions, context=2)[0], usual) != seen

    def test_costs_have_gradients_of_every_action(self) -> None:
        model, (tokens, proprio, actions) = make_model(), make_observed(1)
        actions.requires_grad_()
        roll_out(model, tokens, proprio, actions)[0].square().sum().backward()
        assert actions.grad is not None
        assert (actions.grad != 0).all()

    def test_it_takes_half_precision_and_returns_float32(self) -> None:
        model, (tokens, proprio, actions) = make_model(), make_observed(2)
        imagined, _ = roll_out(model, tokens.half(), proprio, actions)
        assert torch.equal(imagined, roll_out(model, tokens.half().float(), proprio, actions)[0])
        with autocast(torch.device("cpu"), torch.bfloat16), torch.inference_mode():
            rounded, proprios = roll_out(model, tokens, proprio, actions)
        assert (imagined.dtype, rounded.dtype, proprios.dtype) == (torch.float32,) * 3


class TestBuilding:
    def test_the_preset_names_every_option(self) -> None:
        for name in ("avdc", "avdc-plan"):
            model, left_out = build_preset(name)
            assert left_out == set()
            trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
            assert 100e6 < trained < 200e6

    @pytest.mark.parametrize(
        ("name", "options", "named"),
        [
            ("avdc", {"width": 18, "heads": 2}, "--width 18 .*--heads 2"),
            ("avdc", {"sampling_steps": 3}, "--sampling-steps 3"),
            ("avdc-plan", {"video_width": 18, "video_heads": 2}, "--video-width 18 .*--video-heads 2"),
            ("avdc-plan", {"sampling_steps": 3}, "--sampling-steps 3"),
            ("avdc-plan", {"reach": 1}, "reach"),
        ],
    )
    def test_options_that_do_not_fit_are_refused_by_name(self, name: str, options: dict[str, Any], named: str) -> None:
        with pytest.raises(UserError, match=named):
            build(name, SHAPE, options, make_statistics())

    @pytest.mark.parametrize("name", ["avdc", "avdc-plan"])
    def test_without_diffusers_the_command_that_installs_it_is_named(
        self, name: str, store_path: Path, run: Path
    ) -> None:
        script = f"""
import sys
sys.modules["diffusers"] = None
from wmcache.cli import wmtrain
wmtrain({["--model", name, "--cache", str(store_path), "--steps", "1", "--out", str(run)]!r})
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "pip install 'wmcache[avdc]'" in done.stderr.splitlines()[-1]
        assert not run.exists()


class TestRuns:
    @pytest.fixture
    def go(self, store_path: Path, tiny: TrainOptions) -> Go:
        return make_go(store_path, replace(tiny, model="avdc", model_options=SIZES))

    @pytest.mark.parametrize("by_signal", [False, True])
    def test_a_stopped_run_resumes_exactly_and_a_seed_gives_the_same_run(
        self, go: Go, tmp_path: Path, by_signal: bool
    ) -> None:
        go(tmp_path / "straight")
        with stopped_at(6, by_signal=by_signal):
            go(tmp_path / "stopped")
        go(tmp_path / "stopped")
        assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
        assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
        weights = load_tensors(last_checkpoint(tmp_path / "stopped"), FILES[0])
        slow = {name.partition(".module.")[2]: value for name, value in weights.items() if ".average.module." in name}
        fast = {name.partition(".network.")[2]: value for name, value in weights.items() if ".network." in name}
        assert slow.keys() == fast.keys()
        assert not any(torch.equal(slow[name], fast[name]) for name in slow)
        go(tmp_path / "other", seed=1)
        assert weights_of(tmp_path / "other") != weights_of(tmp_path / "straight")

    def test_an_untrained_baseline_keeps_no_average(self, go: Go, run: Path) -> None:
        go(run, steps=2)
        weights = [
            load_trained(run, torch.device("cpu"), untrained=untrained).state_dict() for untrained in (False, True)
        ]
        name = "diffusion.average.module.embed_condition.weight"
        assert not torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0]["noise"], weights[1]["noise"])

    def test_it_learns_a_planted_linear_system(self, planted_path: Path, tiny: TrainOptions, run: Path) -> None:
        sizes = {**SIZES, "width": 64, "sampling_steps": 4}
        base = replace(tiny, model="avdc", model_options=sizes, log_every=50, validate_every=300)
        go = make_go(planted_path, replace(base, checkpoint_every=300))
        skills = go(run, steps=300, batch=32, frameskip=2, learning_rate=3e-3)
        assert [value for value in skills.values() if value is None or value < 0.5] == []
