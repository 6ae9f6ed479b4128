"""Training a decoder: it learns from cached tokens alone, goes on exactly, refuses rather than spoils, and is measured honestly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.engine.log import Log
from wmcache.pipeline.fit import load_images
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer import decoder, metrics
from wmcache.trainer.decoder import choose_frames, load_decoder, train_decoder
from wmcache.trainer.decoders.transposed_conv import TransposedConvDecoder
from wmcache.trainer.decoders.vqvae import VqVaeDecoder
from wmcache.trainer.metrics import ImageMetrics, summarise, to_pixels, to_unit
from wmcache.trainer.options import DecoderOptions

CPU = torch.device("cpu")
TINY = DecoderOptions(
    decoder="vqvae",
    decoder_options={"channels": 8, "residual": 4, "blocks": 1},
    steps=8,
    batch=8,
    dtype="float32",
    device="cpu",
    log_every=1,
    checkpoint_every=4,
    lpips=False,
)
QUANTISED = replace(TINY, decoder_options=TINY.decoder_options | {"quantize": True, "codes": 16})


def weights_of(folder: Path) -> bytes:
    return (last_checkpoint(folder) / "model.safetensors").read_bytes()


def losses_of(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def files_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "tensorboard" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def train(store_path: Path, dataset: FrameDataset) -> Callable[..., dict[str, Any]]:
    def run(out: Path, options: DecoderOptions = TINY, **more: Any) -> dict[str, Any]:
        return train_decoder(store_path, dataset.read_frames, out, options, **more)

    return run


@pytest.fixture(scope="module")
def trained(store_path: Path, dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    out = tmp_path_factory.mktemp("decoders") / "tiny"
    train_decoder(store_path, dataset.read_frames, out, replace(TINY, steps=1))
    return out


class StoppedAtSix(Log):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        if step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [TINY, QUANTISED], ids=["plain", "quantised"])
def test_a_stopped_decoder_goes_on_exactly(
    train: Callable[..., dict[str, Any]], tmp_path: Path, options: DecoderOptions
) -> None:
    straight = train(tmp_path / "straight", options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "Log", StoppedAtSix)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", options)
    assert last_checkpoint(tmp_path / "stopped").name == "step-00000004"
    assert train(tmp_path / "stopped", options) == straight
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")


def test_a_killed_decoder_goes_on_exactly(
    train: Callable[..., dict[str, Any]], store_path: Path, dataset_path: Path, tmp_path: Path
) -> None:
    train(tmp_path / "straight")
    # Dies by SIGKILL after the last step, at the very moment that would make its checkpoint the newest.
    program = """
import json, os, signal, sys
from pathlib import Path
import torch
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.decoder import DecoderOptions, train_decoder
torch.set_num_threads(1)
def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("step-00000008"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
read = FrameDataset.open(sys.argv[2]).read_frames
train_decoder(Path(sys.argv[1]), read, Path(sys.argv[3]), DecoderOptions(**json.loads(sys.argv[4])))
"""
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-c", program, store_path, dataset_path, killed, json.dumps(asdict(TINY))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, arguments)), check=False, capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert last_checkpoint(killed).name == "step-00000004"
    train(killed)
    assert weights_of(killed) == weights_of(tmp_path / "straight")


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_once(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train(tmp_path / "twice", replace(TINY, steps=4))
    train(tmp_path / "twice")
    train(tmp_path / "once")
    assert weights_of(tmp_path / "twice") == weights_of(tmp_path / "once")


def test_a_finished_decoder_is_left_as_it_is(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = train(tmp_path / "out")
    before = files_of(tmp_path / "out")
    assert train(tmp_path / "out") == first
    assert files_of(tmp_path / "out") == before


def test_it_learns_to_draw(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = replace(TINY, decoder_options={"channels": 32, "residual": 8, "blocks": 1}, batch=16, learning_rate=3e-3)
    before = train(tmp_path / "before", replace(options, steps=1))["mse"]
    after = train(tmp_path / "after", replace(options, steps=200, checkpoint_every=200))["mse"]
    assert after < before


def test_the_default_is_the_references_decoder_for_the_tokens(
    train: Callable[..., dict[str, Any]], dataset: FrameDataset, tmp_path: Path
) -> None:
    identity = Identity("one", "file", "0", "norm", "cls", 32, "none", ((0.5,), (0.5,)), "float32", "float16", "0")
    card = StoreCard({}, {}, (1, 1), 6, frames=360, frames_per_shard=360)
    writer = StoreWriter.create(tmp_path / "one.zarr", card, identity, dataset.steps.columns())
    writer.write_shard(0, np.random.default_rng(0).normal(size=(360, 1, 6)).astype(np.float16))
    writer.finish()
    one, few = replace(TINY, decoder="auto", decoder_options={"depth": 2}, steps=1), replace(TINY, steps=1)
    train_decoder(tmp_path / "one.zarr", dataset.read_frames, tmp_path / "one", one)
    train(tmp_path / "grid", replace(few, decoder="auto"))
    kinds = [type(load_decoder(tmp_path / name, CPU)) for name in ("one", "grid")]
    assert kinds == [TransposedConvDecoder, VqVaeDecoder]


def test_it_trains_on_train_episodes_and_is_judged_on_the_others(store: TokenStore) -> None:
    frames, held_out = choose_frames(store, replace(TINY, max_frames=10_000))
    assert set(store.episode[frames]).isdisjoint(store.episode[held_out])
    windows = store.windows(1, 1, 5, "val", seed=TINY.split_seed)
    assert set(store.episode[windows.starts]) == set(store.episode[held_out])
    assert len(frames) + len(held_out) == len(store)


def test_a_sample_is_taken_where_there_are_too_many_frames(store: TokenStore) -> None:
    some, _ = choose_frames(store, replace(TINY, max_frames=50))
    every, _ = choose_frames(store, TINY)
    assert len(some) == 50
    assert set(some) < set(every)
    assert (np.diff(some) > 0).all()
    np.testing.assert_array_equal(some, choose_frames(store, replace(TINY, max_frames=50))[0])


def test_frames_are_read_a_shard_at_a_time_and_each_once(dataset: FrameDataset) -> None:
    asked: list[NDArray[np.int64]] = []

    def read(frames: NDArray[np.int64]) -> metrics.Images:
        asked.append(frames)
        return dataset.read_frames(frames)

    wanted = np.array([3, 5, 64, 200, 359])
    images = load_images(read, wanted, 64, 32)
    np.testing.assert_array_equal(images, dataset.read_frames(wanted))
    assert [part.tolist() for part in asked] == [[3, 5], [64], [200], [359]]


def test_images_that_do_not_fit_into_memory_are_refused(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "available_ram", lambda: 100_000)
    with pytest.raises(UserError, match="lower --max-frames"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_store_is_only_read(train: Callable[..., dict[str, Any]], store_path: Path, tmp_path: Path) -> None:
    before = files_of(store_path)
    train(tmp_path / "out")
    assert files_of(store_path) == before


def test_what_is_loaded_draws_what_was_measured(
    train: Callable[..., dict[str, Any]], store: TokenStore, dataset: FrameDataset, tmp_path: Path
) -> None:
    result = train(tmp_path / "out")
    model = load_decoder(tmp_path / "out", CPU)
    _, held_out = choose_frames(store, TINY)
    drawn = model(torch.from_numpy(store.gather(held_out)))
    real = to_unit(dataset.read_frames(held_out))
    assert float((drawn.clamp(-1, 1) - real).div(2).square().mean()) == pytest.approx(result["mse"], rel=1e-4)
    mean = model.images_mean.expand_as(real)
    assert float((mean - real).div(2).square().mean()) == pytest.approx(result["mean_frame"]["mse"], rel=1e-4)
    assert 0 < result["moving"] < 0.1  # the ball
    assert result["mean_frame"]["moving_mse"] > 10 * result["mean_frame"]["mse"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert result["frames"] == len(held_out)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3},
        {"batch": 4},
        {"seed": 1},
        {"split_seed": 1},
        {"max_frames": 20},
        {"decoder_options": {"channels": 16}},
        {"decoder": "transposed-conv", "decoder_options": {}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_refused_by_name(
    train: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    copytree(trained, tmp_path / "out", symlinks=True)
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=next(iter(changed))):
        train(tmp_path / "out", replace(TINY, **changed))
    assert files_of(tmp_path / "out") == before


def test_another_store_is_refused(
    train: Callable[..., dict[str, Any]], planted_path: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    train(tmp_path / "out", replace(TINY, steps=1))
    with pytest.raises(UserError, match="identity"):
        train_decoder(planted_path, lambda frames: dataset.read_frames(frames % 360), tmp_path / "out", TINY)


def test_overwrite_begins_anew(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    train(tmp_path / "out", replace(TINY, seed=1))
    train(tmp_path / "out", replace(TINY, steps=4), overwrite=True)
    train(tmp_path / "fresh", replace(TINY, steps=4))
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_decoder_is_never_touched(
    train: Callable[..., dict[str, Any]], tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"precious": true}')
    with pytest.raises(UserError, match="not a decoder of ours"):
        train(tmp_path / "out", overwrite=overwrite)
    assert files_of(tmp_path / "out") == {"config.json": b'{"precious": true}'}


@pytest.mark.parametrize(
    "impossible", [{"learning_rate": 0.0}, {"max_frames": 0}, {"device": "abacus"}], ids=lambda value: next(iter(value))
)
def test_what_cannot_be_trained_costs_no_decoder(
    train: Callable[..., dict[str, Any]], tmp_path: Path, impossible: dict[str, Any]
) -> None:
    with pytest.raises(UserError):
        train(tmp_path / "out", replace(TINY, **impossible))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not finite"):
        train(tmp_path / "out", replace(TINY, learning_rate=1e30))
    assert not (tmp_path / "out" / "validation.json").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder", "gan"),
        ("decoder_options", {"channels": 10**9}),
        ("decoder_options", {"channels": 16}),
        ("decoder_options", {"width": 3}),
        ("shape", {"rows": 2, "columns": 2, "token_dim": 32, "image_size": 10**9}),
        ("shape", {"rows": 2, "columns": 2, "token_dim": 31, "image_size": 32}),
        ("split_seed", "x"),
    ],
)
def test_settings_that_cannot_be_true_are_refused_before_anything_is_built(
    trained: Path, tmp_path: Path, field: str, value: object
) -> None:
    folder = tmp_path / "copy"
    copytree(trained, folder, symlinks=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError):
        load_decoder(folder, CPU)


def test_a_flipped_bit_is_noticed(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    copytree(trained, folder, symlinks=True)
    file = last_checkpoint(folder) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        load_decoder(folder, CPU)


class TestImageMetrics:
    def test_equal_images_have_no_error_and_full_similarity(self) -> None:
        images = torch.rand(3, 3, 32, 32) * 2 - 1
        found = ImageMetrics(32, CPU, lpips=False)(images, images, images[0])
        np.testing.assert_array_equal(found["mse"], np.zeros(3))
        np.testing.assert_allclose(found["ssim"], np.ones(3), atol=1e-6)

    def test_the_error_is_that_of_pixels_between_nothing_and_one(self) -> None:
        black, white = -torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
        found = ImageMetrics(32, CPU, lpips=False)(black, 7 * white, black[0])
        assert found["mse"].tolist() == [1.0]
        assert found["ssim"][0] < 0.01

    def test_each_image_is_compared_with_its_own(self) -> None:
        real = torch.zeros(2, 3, 32, 32)
        drawn = torch.stack([real[0], real[0] + 0.5])
        found = ImageMetrics(32, CPU, lpips=False)(drawn, real, real[0])
        np.testing.assert_allclose(found["mse"], [0, 0.0625])

    def test_only_pixels_unlike_the_mean_frame_move(self) -> None:
        mean, real = torch.zeros(3, 32, 32), torch.zeros(2, 3, 32, 32)
        real[0, 1, :4, :4] = 0.5  # a quarter of the range, in one channel
        real[1, :, 8:, 8:] = 0.1  # too little to count
        metrics = ImageMetrics(32, CPU, lpips=False)
        nothing = metrics(mean.expand(2, -1, -1, -1), real, mean)
        np.testing.assert_allclose(nothing["moving"], [16 / 1024, 0])
        whole = summarise(nothing)
        assert whole["moving"] == pytest.approx(8 / 1024)
        assert whole["moving_mse"] == pytest.approx(0.25**2 / 3)
        assert summarise(metrics(real, real, mean))["moving_mse"] == 0
        assert summarise(metrics(real[1:], real[1:], mean))["moving_mse"] is None

    def test_without_the_network_the_absence_is_said_in_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr("urllib.request.OpenerDirector.open", _no_network)
        found = ImageMetrics(32, CPU)
        assert found.lpips_absent is not None
        assert "cannot be fetched" in found.lpips_absent
        assert "lpips" not in found(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32))
        assert "Downloading" not in "".join(capfd.readouterr())

    def test_with_the_network_it_is_a_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import AlexNet_Weights, alexnet

        torch.manual_seed(0)
        weights = alexnet().state_dict()
        # Its layers after the features are large, and LPIPS has no use for them.
        monkeypatch.setattr(AlexNet_Weights, "get_state_dict", lambda *_, **__: weights)
        monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: weights)
        found = ImageMetrics(32, CPU)
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        assert found.lpips_absent is None
        np.testing.assert_allclose(found(images, images, images[0])["lpips"], [0, 0], atol=1e-6)
        assert (found(images, -images, images[0])["lpips"] > 0.01).all()

    @pytest.mark.parametrize("lpips", [True, False])
    def test_what_was_not_computed_has_a_reason(self, lpips: bool) -> None:
        absent = ImageMetrics(16, CPU, lpips=lpips).lpips_absent
        assert absent == ("frames of 16 px are too small for it, it needs 31" if lpips else "it was not asked for")

    def test_images_too_small_to_compare_are_refused(self) -> None:
        with pytest.raises(UserError, match="too small for SSIM"):
            ImageMetrics(8, CPU)

    def test_pixels_survive_the_way_there_and_back(self) -> None:
        pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
        np.testing.assert_array_equal(to_pixels(to_unit(pixels)), pixels)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network here")
