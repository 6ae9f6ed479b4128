"""Pictures of imagination: figures that agree with a calculation by hand, and nothing of another store."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import click
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.commands.decode import decoder as decoder_command
from wmcache.commands.decode import imagine as imagine_command
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.imagine import imagine, write_video
from wmcache.planner.options import ImagineOptions
from wmcache.trainer.decoder import load_decoder, train_decoder
from wmcache.trainer.metrics import to_unit
from wmcache.trainer.models import Belief, Imagined
from wmcache.trainer.options import DecoderOptions

OPTIONS = ImagineOptions(steps=4, windows=6, videos=2, device="cpu", dtype="float32", lpips=False)
DECODER = DecoderOptions(
    decoder="vqvae",
    decoder_options={"channels": 16, "residual": 8, "blocks": 1},
    steps=40,
    batch=16,
    learning_rate=3e-3,
    dtype="float32",
    device="cpu",
    lpips=False,
)


@pytest.fixture(scope="module")
def decoder_path(store_path: Path, dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("decoders") / "tiny"
    train_decoder(store_path, dataset, path, DECODER)
    return path


@pytest.fixture(scope="module")
def imagined(
    run_path: Path, decoder_path: Path, dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("imagined") / "imagine"
    return out, imagine(run_path, decoder_path, dataset, out, OPTIONS)


def pixels(video: Path, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(decode, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def test_files_and_figures_are_complete(imagined: tuple[Path, dict[str, Any]]) -> None:
    out, result = imagined
    names = {file.name for file in out.iterdir()}
    assert names == {"metrics.json", "errors.png", "rollouts.png", "rollout-000.mp4", "rollout-001.mp4"}
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert [row["step"] for row in result["steps"]] == [1, 2, 3, 4]
    assert result["windows"] == 6
    assert result["lpips_absent"]
    for row in result["steps"]:
        for name in ("imagined", "floor", "copying", "mean_frame"):
            assert set(row[name]) == {"mse", "moving", "moving_mse", "ssim"}
            assert row[name]["moving_mse"] > row[name]["mse"] > 0
            assert row[name]["moving"] == row["imagined"]["moving"]
            assert -1 <= row[name]["ssim"] <= 1
    picture = iio.imread(out / "rollouts.png")
    assert picture.shape[0] > 900
    assert picture.std() > 10


def test_floor_and_copying_are_those_of_a_calculation_by_hand(
    imagined: tuple[Path, dict[str, Any]], decoder_path: Path, store: TokenStore, dataset: FrameDataset
) -> None:
    windows = store.windows(1, 4, 5, "val")
    frames = windows.frames(np.random.default_rng(0).permutation(len(windows))[:6])
    draw = load_decoder(decoder_path, torch.device("cpu"))
    real = [to_unit(dataset.read_frames(column)) for column in frames.T]
    for k, row in enumerate(imagined[1]["steps"], 1):
        drawn = draw(torch.from_numpy(store.gather(frames[:, k]))).clamp(-1, 1)
        assert row["floor"]["mse"] == pytest.approx(float((drawn - real[k]).div(2).square().mean()), rel=1e-3)
        assert row["copying"]["mse"] == pytest.approx(float((real[0] - real[k]).div(2).square().mean()), rel=1e-3)
        mean = draw.images_mean.expand_as(real[k])
        moving = ((real[k] - mean).abs() / 2 > 0.1).any(1)
        for name, shown in (("floor", drawn), ("mean_frame", mean)):
            errors = (shown - real[k]).div(2).square().mean(1)
            assert row[name]["moving_mse"] == pytest.approx(float(errors[moving].mean()), rel=1e-3)


def test_a_perfect_world_model_reaches_the_floor(
    run_path: Path, decoder_path: Path, store: TokenStore, dataset: FrameDataset, tmp_path: Path
) -> None:
    windows = store.windows(1, 4, 5, "val")
    chosen = np.random.default_rng(0).permutation(len(windows))[:6]
    batch = {name: torch.from_numpy(value).float() for name, value in windows.batch(chosen).items()}

    class Oracle:
        context = 1
        has_latents = True

        def start(self, count: int) -> Belief:
            return {"number": torch.arange(count)}

        def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, _: Tensor | None) -> Belief:
            torch.testing.assert_close(tokens, batch["tokens"][:, 0])
            torch.testing.assert_close(proprio, batch["proprio"][:, 0])
            return belief

        def imagine(self, belief: Belief, actions: Tensor) -> Imagined:
            torch.testing.assert_close(actions[:, 0], batch["action"][:, :4])
            latents = batch["tokens"][belief["number"], None, 1:]
            return Imagined(latents, latents[..., 0, :0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmcache.planner.imagine.load_model", lambda *_: Oracle())
        result = imagine(run_path, decoder_path, dataset, tmp_path / "out", OPTIONS)
    for row in result["steps"]:
        assert row["imagined"] == pytest.approx(row["floor"], rel=1e-5)


def test_videos_show_the_real_frames_above_the_imagined_ones(tmp_path: Path) -> None:
    real = np.zeros((3, 5, 31, 31, 3), np.uint8)
    real[1, 2:, :, :, 0] = 250
    imagined = np.full((3, 5, 31, 31, 3), 120, np.uint8)
    write_video(tmp_path / "video.mp4", real, imagined, 4.0)
    side = 31 * (224 // 31) + 9  # an even number of pixels: the frames are not stretched
    frames = pixels(tmp_path / "video.mp4", 2 * side, 3 * side)
    assert len(frames) == 5
    centres = frames[:, side // 2 :: side, side // 2 :: side].astype(int)
    assert np.abs(centres[:, 1] - 120).max() < 20
    red = centres[:, 0, :, 0] > 200
    np.testing.assert_array_equal(red, [[False, step >= 2, False] for step in range(5)])


def test_videos_show_windows_side_by_side_and_old_ones_are_replaced(
    run_path: Path, decoder_path: Path, dataset: FrameDataset, imagined: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    side = 32 * 7 + 8
    assert len(pixels(imagined[0] / "rollout-000.mp4", 2 * side, 4 * side)) == 5
    assert len(pixels(imagined[0] / "rollout-001.mp4", 2 * side, 2 * side)) == 5
    copytree(imagined[0], tmp_path / "out")
    imagine(run_path, decoder_path, dataset, tmp_path / "out", replace(OPTIONS, videos=1))
    assert [file.name for file in tmp_path.rglob("*.mp4")] == ["rollout-000.mp4"]


@pytest.fixture(scope="module")
def other_decoder(dataset: FrameDataset, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a store of the same frames by the same encoder, in another type."""
    folder = tmp_path_factory.mktemp("other")
    extract(dataset, encoder, folder / "other.zarr", dtype="int8")
    train_decoder(folder / "other.zarr", dataset, folder / "decoder", replace(DECODER, steps=1))
    return folder / "decoder"


def test_other_stores_and_splits_and_too_many_steps_are_refused(
    run_path: Path, store_path: Path, decoder_path: Path, other_decoder: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    split = tmp_path / "decoder"
    train_decoder(store_path, dataset, split, replace(DECODER, steps=1, split_seed=1))
    for decoder, steps, named in (
        (other_decoder, 4, r"store_dtype.*--decoder"),
        (split, 4, "--split-seed 1 != 42"),
        (decoder_path, 12, r"--steps 12 .* 11 "),
    ):
        with pytest.raises(UserError, match=named):
            imagine(run_path, decoder, dataset, tmp_path / "out", replace(OPTIONS, steps=steps))
    assert not (tmp_path / "out").exists()


def test_from_a_store_to_pictures(store_path: Path, run_path: Path, dataset_path: Path, tmp_path: Path) -> None:
    def run(command: click.Command, *words: object) -> Result:
        return CliRunner(env={"WMCACHE_HOME": str(tmp_path / "home")}).invoke(command, list(map(str, words)))

    sizes = ("--channels", 8, "--residual", 4, "--blocks", 1)
    settings = ("--steps", 2, "--batch-size", 8, "--device", "cpu", "--no-lpips")
    trained = run(decoder_command, "--cache", store_path, "--frames", dataset_path, *sizes, *settings)
    assert trained.exit_code == 0, trained.output
    assert "mse 0.0" in trained.output
    (folder,) = (tmp_path / "home" / "decoders").glob("*-tcn-64")
    words = ("--run", run_path, "--decoder", folder, "--steps", 2, "--windows", 2, "--device", "cpu", "--no-lpips")
    drawn = run(imagine_command, *words, "--out", tmp_path / "out", "--json")
    assert drawn.exit_code == 0, drawn.output
    assert len(json.loads(drawn.stdout)["steps"]) == 2
    assert (tmp_path / "out" / "rollout-000.mp4").exists()
    printed = run(imagine_command, *words, "--out", tmp_path / "out").stdout
    assert max(map(len, printed.splitlines()[:-1])) <= 120
    assert printed.count("mean frame") == 3  # of each metric
