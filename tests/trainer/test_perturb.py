"""Adversarial training, and runs that begin from the weights of another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from model_tools import SHAPE, SIZES, make_batch, make_statistics, randomise
from run_tools import Go, files_of, make_go, read_curve, read_log, stopped_at, weights_of
from safetensors.torch import load_file
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.models import build
from wmcache.trainer.options import TrainOptions, recorded
from wmcache.trainer.perturb import perturb, radii_of
from wmcache.trainer.runs import read_config

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("dino-wm", SIZES),
    ("dino-wm", {**SIZES, "proprio": "embedding", "predict": "frame", "width": 0}),
    ("dino-wm", {**SIZES, "proprio": "none"}),
    ("vjepa2-ac", {"width": 32, "depth": 1, "heads": 2, "auto_steps": 1, "normalize": "layer"}),
    ("mdn-rnn", {"hidden": 8}),
    ("rwm", {"hidden": 8, "head": 8, "observed_steps": 1, "forecast": 1}),
]
SHARES = {"tokens": 0.5, "proprio": 0.2, "action": 0.1}
RADII = {"perturb_tokens": 0.05, "perturb_proprio": 0.02, "perturb_actions": 0.02}
each_model = pytest.mark.parametrize(
    ("name", "options"), MODELS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(MODELS)]
)


def make_model(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return randomise(build(name, replace(SHAPE, history=1), options, make_statistics())).eval()


def losses_of(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(7)  # a loss may draw
    found: dict[str, Tensor] = model.loss(batch)
    return found


def moved(batch: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of two frames with another first one, which is seen and not predicted."""
    return {
        **batch,
        **{
            name: torch.cat([batch[name][:, :1] + shift[:, :1], batch[name][:, 1:]], 1)
            for name, shift in shifts.items()
        },
    }


@each_model
def test_shifts_are_those_of_an_independent_version(name: str, options: dict[str, Any]) -> None:
    model, batch, statistics = make_model(name, options), make_batch(batch=16, frames=2), make_statistics()
    radii = {part: share * statistics[f"{part}_std"] for part, share in SHARES.items()}
    torch.manual_seed(3)
    found = perturb(partial(losses_of, model), batch, radii_of(SHARES, statistics, torch.device("cpu")))
    torch.manual_seed(3)
    starts = {part: radii[part] * (2 * torch.rand(batch[part].shape) - 1) for part in SHARES}
    for start in starts.values():
        start.requires_grad_()
    losses_of(model, moved(batch, starts))["loss"].backward()
    for part, start in starts.items():
        assert torch.equal(found[part], batch[part])
        gradient = torch.zeros_like(start) if start.grad is None else start.grad
        gradient[:, 1:] = 0  # which it sees in no other way
        sure = gradient.abs() >= 1e-5 * gradient.abs().max()
        wanted = (start + 1.25 * radii[part] * gradient.sign()).clamp(-radii[part], radii[part])
        torch.testing.assert_close(found[f"shift_{part}"][:, :1][sure[:, :1]], wanted[:, :1][sure[:, :1]])
        assert (found[f"shift_{part}"].abs() <= radii[part]).all()


@each_model
def test_what_is_predicted_is_not_shifted(name: str, options: dict[str, Any]) -> None:
    model, batch = make_model(name, options), make_batch(batch=16, frames=2)
    radii = {part: share * make_statistics()[f"{part}_std"] for part, share in SHARES.items()}
    found = perturb(partial(losses_of, model), batch, radii)
    shifts = {part: found[f"shift_{part}"] for part in SHARES}
    loss = losses_of(model, found)["loss"]
    torch.testing.assert_close(loss, losses_of(model, moved(batch, shifts))["loss"])
    assert loss > losses_of(model, batch)["loss"]


@pytest.fixture(scope="module")
def go(store_path: Path, tiny: TrainOptions) -> Go:
    return make_go(store_path, tiny)


@pytest.fixture(scope="module")
def base(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    run = tmp_path_factory.mktemp("runs") / "base"
    go(run)
    return run


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"model_options": {"dropout": 0.1, "rollout_loss": 1.0}}])
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, more: dict[str, Any]) -> None:
    go(tmp_path / "straight", **RADII, **more)
    with stopped_at(6):
        go(tmp_path / "stopped", **RADII, **more)
    go(tmp_path / "stopped", **RADII, **more)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
    go(tmp_path / "plain", **more)
    assert read_curve(tmp_path / "straight")[1] > read_curve(tmp_path / "plain")[1]


def test_a_run_and_a_study_from_before_stay_valid(go: Go, run: Path, base: Path) -> None:
    copytree(base, run, symlinks=True)
    config = read_config(run)
    for name in RADII:
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    before = files_of(run)
    assert go(run) == {}
    assert weights_of(run) == before["checkpoints/step-00000008/model.safetensors"]
    with pytest.raises(UserError, match=r"perturb_tokens 0\.0 != 0\.05"):
        go(run, **RADII)
    assert not set(RADII) & recorded(TrainOptions()).keys()
    assert recorded(TrainOptions(perturb_tokens=0.05))["perturb_tokens"] == 0.05


@pytest.mark.parametrize("kind", ["gcbc", "td-mpc2"])
def test_a_model_that_cannot_is_refused_before_a_run_exists(
    go: Go, store_path: Path, tiny: TrainOptions, run: Path, kind: str
) -> None:
    base = replace(tiny, model=kind, model_options={}, history=1)
    with pytest.raises(UserError, match=f"--perturb.*{kind}.*dino-wm"):
        make_go(store_path, base)(run, perturb_actions=0.1)
    assert not run.exists()


class TestFrom:
    def test_a_run_begins_with_the_weights_of_another(self, go: Go, run: Path, base: Path) -> None:
        before = files_of(base)
        go(run, start=str(base), steps=1, learning_rate=1e-12, weight_decay=0.0)
        assert files_of(base) == before
        first, second = (load_file(last_checkpoint(one) / "model.safetensors") for one in (base, run))
        torch.testing.assert_close(second, first)

    def test_it_resumes_exactly_and_by_itself(self, go: Go, tmp_path: Path, base: Path) -> None:
        go(tmp_path / "straight", start=str(base), **RADII)
        run = tmp_path / "run"
        for stop in (2, 6):  # before the first checkpoint, and after it
            with stopped_at(stop):
                go(run, start=str(base) if stop == 2 else None, **RADII)
        go(run, **RADII)
        assert weights_of(run) == weights_of(tmp_path / "straight")
        assert read_config(run)["start"] == str(base)
        go(run, start=str(base), **RADII)  # is done

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"model_options": {"depth": 2}}, "depth"),
            ({"history": 2}, "history 3 != 2"),
            ({"start": "nowhere"}, "nowhere"),
            ({"model_options": {"condition": "adaln"}}, "concat != adaln"),
        ],
    )
    def test_another_model_or_no_run_is_refused(
        self, go: Go, run: Path, base: Path, changed: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(UserError, match=named):
            go(run, **{"start": str(base), **changed})
        assert not run.exists()

    def test_a_run_of_its_own_is_not_replaced(self, go: Go, run: Path, base: Path) -> None:
        go(run, seed=1)
        before = files_of(run)
        with pytest.raises(UserError, match=f"{base}.*--from"):
            go(run, seed=1, start=str(base))
        with pytest.raises(UserError, match=f"{run}.*--from"):
            go(run, seed=1, start=str(run), overwrite=True)
        assert files_of(run) == before
