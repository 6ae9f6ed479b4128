"""MDN-RNN as World Models trains it: on whole episodes of different lengths, and on latents drawn from their Gaussians."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import SHAPE, make_batch, make_statistics, randomise
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.cache.log_variances import open_log_variances
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.models import DataShape, build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model

FULL = replace(SHAPE, has_reward=True, has_end=True)
LENGTHS = (5, 2, 4)
each_mixture = pytest.mark.parametrize("mixture", ["dimension", "vector"])


def make_model(shape: DataShape = FULL, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden": 6, "mixtures": 3, "sequence": 5}
    return randomise(build("mdn-rnn", shape, sizes | options, make_statistics())).eval()


def make_episodes() -> dict[str, Tensor]:
    """Episodes of `LENGTHS` frames, padded to the longest."""
    batch = make_batch(batch=3, frames=5)
    ended = torch.zeros(3, 5, dtype=torch.bool)
    ended[0, 4] = ended[1, 0] = True  # at the last frame, before it, and not at all
    batch |= {"reward": torch.rand(3, 5), "terminated": ended}
    weight = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()
    return batch | {"weight": weight / weight.mean()}


@pytest.fixture(scope="module")
def vae_store(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of means with log-variances; read only."""
    folder = tmp_path_factory.mktemp("vae")
    options = encoders.fit_options("vae", {"steps": 2, "batch": 8})
    weights = fit(dataset, "vae", folder / "vae.safetensors", options, max_frames=80, device="cpu").weights
    encoder = encoders.create("vae", weights=weights, device="cpu")
    extract_together(dataset, with_log_variances([(encoder, folder / "vae-64.zarr")]))
    return folder / "vae-64.zarr"


@pytest.fixture
def drawn(vae_store: Path, tiny: TrainOptions) -> Go:
    options = {"hidden": 8, "sequence": 5, "latents": "drawn"}
    return make_go(vae_store, replace(tiny, model="mdn-rnn", model_options=options))


@each_mixture
def test_the_loss_of_padded_episodes_is_that_of_each_alone(mixture: str) -> None:
    model, batch = make_model(mixture=mixture), make_episodes()
    scale, losses = batch["weight"].max(), model.loss(batch)
    expected = {name: torch.zeros(()) for name in ("nll", "proprio", "reward", "end")}
    for row, length in enumerate(LENGTHS):
        for name, slots in {"nll": 12, "proprio": 12, "reward": 15, "end": 15}.items():
            # Nothing is known of the step after the last frame of an episode that has not ended.
            steps = length - (name in ("reward", "end") and not batch["terminated"][row, length - 1])
            alone = {key: value[row : row + 1, :steps] for key, value in batch.items() if key != "weight"}
            count = length - 1 if slots == 12 else steps
            expected[name] += scale * model.loss(alone)[name] * count / slots
    total = losses.pop("loss")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, torch.stack([*expected.values()]).sum(), rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_and_slices_of_a_batch_average_to_it() -> None:
    model, batch = make_model(), make_episodes()
    expected = model.loss(batch)["loss"]
    padded = {name: value.clone() for name, value in batch.items()}
    for name in ("tokens", "proprio", "action", "reward", "terminated"):
        for row, length in enumerate(LENGTHS):
            padded[name][row, length:] = 0
    torch.testing.assert_close(model.loss(padded)["loss"], expected)
    slices = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    torch.testing.assert_close(torch.stack([model.loss(part)["loss"] for part in slices]).mean(), expected)


def test_gradients_of_whole_episodes_are_those_of_windows() -> None:
    model, batch = make_model(), make_episodes()
    batch["terminated"][:, 4] = True
    found = []
    for same in (_without(batch, "weight"), {**batch, "weight": torch.ones(3, 5)}):
        model.zero_grad()
        model.loss(same)["loss"].backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_ends_weigh_as_they_are_told() -> None:
    batch, plain, heavy = make_episodes(), make_model(), make_model(end_weight=10.0)
    batch["terminated"][:] = False
    assert torch.equal(plain.loss(batch)["end"], heavy.loss(batch)["end"])
    batch["terminated"][:] = True
    torch.testing.assert_close(10 * plain.loss(batch)["end"], heavy.loss(batch)["end"])
    unpadded = _without(batch, "weight")
    torch.testing.assert_close(10 * plain.loss(unpadded)["end"], heavy.loss(unpadded)["end"])


def test_latents_are_drawn_from_their_gaussians_while_training() -> None:
    model, frames = make_model(SHAPE, predict="frame"), 4000
    tokens = make_batch(batch=1, frames=2)
    batch = {name: value.expand(frames, *value.shape[1:]) for name, value in tokens.items()}
    logvar = torch.linspace(-4, 1, SHAPE.token_dim).expand(frames, 2, SHAPE.tokens, -1)
    seen: list[Tensor] = []
    model.inputs.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0]))
    model.train()
    torch.manual_seed(1)
    for _ in range(2):
        model.loss({**batch, "logvar": logvar})
    first, second = (
        part[:, : SHAPE.tokens * SHAPE.token_dim].unflatten(1, (-1, SHAPE.token_dim)) * model.tokens_std
        + model.tokens_mean
        for part in seen
    )
    assert not torch.isclose(first, second).all()
    deviation = (logvar[0, 0] / 2).exp()
    assert ((first.mean(0) - tokens["tokens"][0, 0]).abs() < 5 * deviation / frames**0.5).all()
    torch.testing.assert_close(first.std(0), deviation, rtol=0.1, atol=0)
    model.eval()
    assert torch.equal(model.loss({**batch, "logvar": logvar})["loss"], model.loss(batch)["loss"])


@pytest.mark.parametrize("sequences", ["windows", "episodes"])
def test_a_stopped_run_draws_the_same_latents(drawn: Go, tmp_path: Path, sequences: str) -> None:
    options = {"sequences": sequences}
    drawn(tmp_path / "straight", model_options=options)
    with stopped_at(6):
        drawn(tmp_path / "stopped", model_options=options)
    drawn(tmp_path / "stopped", model_options=options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
    drawn(tmp_path / "means", model_options={**options, "latents": "mean"})
    assert weights_of(tmp_path / "means") != weights_of(tmp_path / "straight")
    models = [load_model(tmp_path / name, torch.device("cpu")) for name in ("straight", "means")]
    assert [bool((model.tokens_std == 1).all()) for model in models] == [True, False]


def test_a_store_without_log_variances_is_refused(drawn: Go, store_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"tcn-64\.logvar\.zarr"):
        drawn(run, cache=store_path)
    assert not run.exists()


def test_rows_of_log_variances_belong_to_the_frames_of_a_batch(vae_store: Path) -> None:
    store = TokenStore.open(vae_store)
    windows = store.windows(2, 1, 5, "train").with_extras({"logvar": open_log_variances(store)})
    batch = windows.batch(windows.starts[:3] * 0)
    expected = open_log_variances(store).gather(windows.frames(windows.starts[:1] * 0)[0])
    assert (batch["logvar"][2] == expected).all()


def test_it_learns_from_whole_episodes(uneven_path: Path, tiny: TrainOptions, run: Path) -> None:
    sizes = {"hidden": 64, "sequence": 50, "sequences": "episodes"}
    base = replace(tiny, model="mdn-rnn", model_options=sizes, log_every=50, validate_every=120, checkpoint_every=120)
    skills = make_go(uneven_path, base)(run, steps=120, batch=8, frameskip=2, learning_rate=5e-3)
    assert min(value for value in skills.values() if value is not None) > 0.3


def _without(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != name}
