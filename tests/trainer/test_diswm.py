"""DisWM: its losses against slow independent code, what the distillation trains and when, and runs with a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import SHAPE, make_batch, make_statistics, randomise, remember
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import load_tensors
from wmcache.trainer.models import build, rollout
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model, read_config

from ..conftest import write_tokens

Z = 3
SIZES: dict[str, Any] = {"deter": 6, "stoch": 4, "hidden": 8, "z_dim": Z}
TEACHER = "0" * 32
CPU = torch.device("cpu")


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {"free_nats": 0.0, "beta": 0.3, "redraw_weight": 0.7, "teacher": TEACHER, "distill_steps": 10}
    model = randomise(build("diswm", SHAPE, SIZES | given | options, make_statistics()))
    if model.teacher is not None:
        model.teacher.set_units(torch.randn(SHAPE.token_dim), 1 + torch.rand(SHAPE.token_dim))
    return model.eval()


def slow_losses(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over frames of what each frame costs, one after another; latents and values are their means."""

    def gaussian(parameters: Tensor) -> Independent:
        mean, raw = parameters.chunk(2)
        return Independent(Normal(mean, 2 * torch.sigmoid(raw / 2) + 0.1), 1)

    costs: list[dict[str, Tensor]] = []
    for tokens, proprio, actions in zip(batch["tokens"], batch["proprio"], batch["action"], strict=True):
        memory, value, action = torch.zeros(6), torch.zeros(4), torch.zeros(SHAPE.action_dim)
        for t in range(len(tokens)):
            frame = ((tokens[t] - model.tokens_mean) / model.tokens_std).flatten()
            own = (proprio[t] - model.proprio_mean) / model.proprio_std
            mean, logvar = model.encoder(frame)[:Z], model.encoder(frame)[Z:]
            memory = model.memory(memory, value, action)
            posterior, prior = model.posterior(torch.cat([memory, mean, own])), model.prior(memory)
            value, action = posterior[:4], (actions[t] - model.action_mean) / model.action_std
            state = torch.cat([memory, value])
            drawn = model.decoder.tokens(model.decoder.bottleneck(state))
            kl = kl_divergence(gaussian(posterior), gaussian(prior))
            seen = (tokens[t] - model.teacher.centre) / model.teacher.scale
            target, found = model.teacher.network(seen.flatten())[:Z].exp(), mean.exp()
            target, found = target / target.sum(), found / found.sum()
            normal = Independent(Normal(torch.zeros(Z), 1.0), 1)
            costs.append(
                {
                    "tokens": (drawn - frame).square().sum(),
                    "proprio": (model.decoder.proprio(state) - own).square().sum(),
                    "dynamics": 0.8 * kl,
                    "representation": 0.2 * kl,
                    "divergence": 0.3 * kl_divergence(Independent(Normal(mean, (logvar / 2).exp()), 1), normal),
                    "redraw": 0.7 * (model.decoder.tokens(mean) - frame).square().sum(),
                    "distillation": 0.1 * (target * (target / found).log()).sum(),
                }
            )
    return {name: torch.stack([cost[name] for cost in costs]).mean() for name in costs[0]}


def test_the_loss_is_that_of_each_frame_after_the_one_before() -> None:
    model, batch = make_model(), make_batch(batch=3, frames=4)
    expected, losses = slow_losses(model, batch), model.loss(batch)
    total, _ = losses.pop("loss"), losses.pop("kl")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, torch.stack([*expected.values()]).sum(), rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing() -> None:
    model, batch = make_model(), make_batch(batch=2, frames=4)
    weight = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    batch["weight"] = weight / weight.mean()
    padded = {name: value.clone() for name, value in batch.items()}
    for name in ("tokens", "proprio", "action"):
        padded[name][1, 2:] = 0
    torch.testing.assert_close(model.loss(padded), model.loss(batch))


@pytest.mark.parametrize("cross_domain", [False, True])
def test_the_schedule_of_the_distillation_is_the_released_one(cross_domain: bool) -> None:
    model, batch = make_model(distill_weight=0.1, distill_steps=20, cross_domain=cross_domain), make_batch()
    parts: dict[int, float] = {}
    for step in range(45):
        parts[step] = model.loss(batch)["distillation"].item()
        model.after_step()
    whole = make_model(distill_weight=1.0).loss(batch)["distillation"].item()
    for step, found in parts.items():
        later = 0.1 * max(2 - step / 20, 0.1) if step >= 20 else 0.0
        eta = later if cross_domain else 0.1 * max(1 - step / 20, 0.1)
        assert found == pytest.approx(eta * whole, rel=1e-4)


def test_the_distillation_trains_the_students_encoder_alone() -> None:
    batch = make_batch(batch=3, frames=1)  # no memory leads from one frame to the other

    def gradients(**options: Any) -> dict[str, Tensor | None]:
        model = make_model(**options)
        model.loss(batch)["loss"].backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with_it, without = gradients(distill_weight=5.0), gradients(distill_weight=0.0)
    for name, found in with_it.items():
        if name.startswith("teacher."):
            assert found is None
        elif name.startswith("encoder."):
            assert found is not None
            assert not torch.allclose(found, without[name])
        else:
            torch.testing.assert_close(found, without[name])
    model = make_model()
    trained = {id(parameter) for group in model.parameter_groups() for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in model.teacher.parameters()}


def test_latents_are_drawn_while_training_and_their_means_are_observed() -> None:
    model, batch = make_model(), make_batch(batch=2, frames=3)
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
    before = remember(model, batch, 3)
    model.train()
    assert torch.equal(remember(model, batch, 3)["value"], before["value"])
    first, second = model.loss(batch), model.loss(batch)
    assert first["redraw"] != second["redraw"]
    assert torch.equal(first["divergence"], second["divergence"])
    assert torch.equal(first["distillation"], second["distillation"])


def plant(path: Path, actions: int, seed: int = 0, **changes: Any) -> Path:
    """A store of 12 episodes of 20 frames of 2 tokens of 3, with so many actions; of 0, there is no column at all."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(seed, 1 + seed, (240, 2, 3)).cumsum(0).astype(np.float16)
    numbers = np.arange(240, dtype=np.int32)
    columns: dict[str, Any] = {"episode": numbers // 20, "step": numbers % 20}
    source = TokenStore.open(changes.pop("like"))
    card = replace(source.card, frames_per_shard=240, columns={})
    if actions:
        columns |= {"action": rng.normal(size=(240, actions)).astype(np.float32), "state": rng.normal(size=(240, 4))}
        card = replace(card, columns=None)
    identity = replace(source.identity, dataset_fingerprint=str(seed), **changes)
    return write_tokens(path, tokens, card, identity, columns)


@pytest.fixture(scope="module")
def videos(planted_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("videos") / "videos.zarr", 0, like=planted_path)


@pytest.fixture(scope="module")
def base(tiny: TrainOptions) -> TrainOptions:
    return replace(tiny, model="diswm", model_options=SIZES | {"sequence": 4, "distill_steps": 5}, frameskip=2)


@pytest.fixture(scope="module")
def teacher(videos: Path, base: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of videos without actions; read only."""
    run = tmp_path_factory.mktemp("teachers") / "teacher"
    make_go(videos, base)(run, model_options={"actions": "none"})
    return run


@pytest.fixture
def go(planted_path: Path, base: TrainOptions, tmp_path: Path) -> Go:
    return make_go(plant(tmp_path / "student.zarr", 2, seed=1, like=planted_path), base)


def test_a_student_resumes_exactly_also_without_the_folder_of_its_teacher(
    go: Go, videos: Path, base: TrainOptions, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    make_go(videos, base)(teacher, model_options={"actions": "none"})
    options = {"teacher": str(teacher), "distill_weight": 2.0}
    go(tmp_path / "straight", model_options=options)
    with stopped_at(6):
        go(tmp_path / "stopped", model_options=options)
    recorded = read_config(tmp_path / "stopped")["model_options"]["teacher"]
    assert len(recorded) == 32
    make_go(videos, base)(teacher, resume=True, steps=10, model_options={"actions": "none"})
    with pytest.raises(UserError, match="teacher"):  # it is another one now
        go(tmp_path / "stopped", model_options=options)
    rmtree(teacher)
    with pytest.raises(UserError, match=str(teacher)):
        go(tmp_path / "stopped", model_options=options)
    go(tmp_path / "stopped", model_options={**options, "teacher": recorded})
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
    model = load_model(tmp_path / "stopped", CPU)
    assert int(model.trained_steps) == 8  # type: ignore[call-overload]
    assert len([*tmp_path.glob("stopped/encoder-00000008.safetensors")]) == 1
    with pytest.raises(UserError, match=recorded):
        go(tmp_path / "new", model_options={**options, "teacher": recorded})


@pytest.mark.parametrize("actions", [2, 6])
def test_the_student_may_have_other_actions_and_data_than_the_teacher(
    teacher: Path, planted_path: Path, base: TrainOptions, tmp_path: Path, actions: int
) -> None:
    store = plant(tmp_path / "student.zarr", actions, seed=2, like=planted_path)
    make_go(store, base)(tmp_path / "run", model_options={"teacher": str(teacher)})
    theirs: Any = load_model(teacher, CPU)
    student: Any = load_model(tmp_path / "run", CPU)
    assert (theirs.takes_actions, student.takes_actions) == (False, True)
    assert (theirs.shape.action_dim, student.shape.action_dim) == (0, 2 * actions)
    tokens = torch.from_numpy(TokenStore.open(store).gather(np.arange(5))).float()
    expected = theirs.embed(((tokens - theirs.tokens_mean) / theirs.tokens_std).flatten(1), tokens[:, 0, :0])
    torch.testing.assert_close(student.teacher(tokens), expected)
    torch.testing.assert_close(student.tokens_mean, torch.from_numpy(TokenStore.open(store).mean))
    imagined = rollout(student, tokens[None, :2], torch.zeros(1, 2, 4), torch.randn(1, 3, 2 * actions))
    assert imagined.latents.shape == (1, 1, 2, 2, 3)


def test_init_begins_with_the_weights_of_the_teacher_that_fit(go: Go, teacher: Path, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "steps": 1}
    theirs = load_tensors(next(teacher.glob("checkpoints/step-00000008")), "model.safetensors")
    found = {}
    for init in ("random", "teacher"):
        go(tmp_path / init, model_options={"teacher": str(teacher), "init": init}, **still)
        found[init] = load_tensors(tmp_path / init / "checkpoints" / "step-00000001", "model.safetensors")
    taken = {
        name
        for name, value in found["teacher"].items()
        if name in theirs and value.shape == theirs[name].shape and torch.allclose(value, theirs[name], atol=1e-9)
    }
    networks = ("encoder.", "prior.", "decoder.tokens.", "decoder.bottleneck.", "memory.mix", "memory.gates", "tokens_")
    expected = {name for name in found["teacher"] if name.startswith(networks)}
    assert expected <= taken
    assert not any(name.startswith("memory.project.2.0.weight") for name in taken)  # of actions
    same = [name for name in expected if torch.allclose(found["random"][name], theirs[name], atol=1e-9)]
    assert not [name for name in same if found["random"][name].ndim > 1]
    torch.testing.assert_close(found["teacher"]["proprio_mean"], found["random"]["proprio_mean"])


def test_a_teacher_that_does_not_fit_is_refused(
    go: Go, teacher: Path, videos: Path, planted_path: Path, base: TrainOptions, tmp_path: Path
) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "z_dim"}
    make_go(videos, replace(base, model="rssm", model_options={}))(
        tmp_path / "rssm", model_options=sizes | {"actions": "none", "sequence": 4}, steps=1
    )
    other = plant(tmp_path / "other.zarr", 2, like=planted_path, weights_sha256="1")
    refused: dict[str, dict[str, Any]] = {
        "rssm": {"model_options": {"teacher": str(tmp_path / "rssm")}},
        "--z-dim 3 != 4": {"model_options": {"teacher": str(teacher), "z_dim": 4}},
        "weights_sha256": {"model_options": {"teacher": str(teacher)}, "cache": other},
        "--init teacher": {"model_options": {"init": "teacher"}},
        "nowhere": {"model_options": {"teacher": str(tmp_path / "nowhere")}},
    }
    for words, options in refused.items():
        with pytest.raises(UserError, match=words):
            go(tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
