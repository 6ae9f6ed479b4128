"""`wmcache traverse`: which latents are drawn and how far they move, by the encoder's decoder or a trained one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.pipeline import encoders
from wmcache.pipeline.disentanglement import information_shares
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.decoder import load_decoder, train_decoder
from wmcache.trainer.metrics import to_pixels
from wmcache.trainer.options import DecoderOptions

from ..conftest import columns_of, write_tokens

WIDTH, LATENTS, FRAME = 100_000, 3, 70
"""So many standard deviations, because networks that are hardly trained draw only large latents."""


@pytest.fixture(scope="module")
def folder(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vae, its store `vae.zarr`, and that of its log-variances, of which no encoder has a decoder; read only."""
    folder = tmp_path_factory.mktemp("traversed")
    options = encoders.fit_options("vae", {"steps": 3, "batch": 4, "latent": 6})
    weights = fit(dataset, "vae", folder / "vae.safetensors", options, max_frames=40, device="cpu").weights
    encoder = encoders.create("vae", weights=weights, device="cpu")
    extract_together(dataset, with_log_variances([(encoder, folder / "vae.zarr")]))
    return folder


def run(store: Path, *words: object, out: Path) -> Result:
    arguments = ["traverse", "--cache", store, "--out", out, "--device", "cpu", *words]
    return CliRunner().invoke(main, [str(word) for word in arguments])


def drawn(store: Path, *words: object, out: Path) -> dict[str, Any]:
    """The JSON file, which is what is printed."""
    words = ("--width", WIDTH, "--latents", LATENTS, "--frame", FRAME, "--json", *words)
    result = run(store, *words, out=out)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert json.loads(result.stdout) == found
    with Image.open(out) as image:
        assert image.format == "PNG"
    return found


def slow_tokens(store: TokenStore, channels: list[int]) -> torch.Tensor:
    """Latents [7 * channels, 1, D] with one channel moved by -3/3 to 3/3 of WIDTH standard deviations."""
    own = store.gather(np.array([FRAME]))[0].astype(np.float32)
    rows = []
    for channel in channels:
        for step in range(-3, 4):
            rows.append(own.copy())
            rows[-1][0, channel] += np.float32(step / 3 * WIDTH) * store.std[channel]
    return torch.from_numpy(np.stack(rows))


def slow_changes(images: np.ndarray[Any, np.dtype[np.uint8]]) -> list[float]:
    found = []
    for row in images.reshape(-1, 7, *images.shape[1:]).astype(int):
        others = [abs(image - row[3]).mean() / 255 for number, image in enumerate(row) if number != 3]
        found.append(sum(others) / 6)
    return found


def test_the_latents_of_the_largest_variance_move_by_standard_deviations(folder: Path, tmp_path: Path) -> None:
    found = drawn(folder / "vae.zarr", out=tmp_path / "new folder" / "picture.png")
    store = TokenStore.open(folder / "vae.zarr")
    latents, state = store.gather(np.arange(len(store)))[:, 0].astype(float), store.require_state()
    shares = information_shares(latents, state)
    order = sorted(range(6), key=lambda channel: -latents[:, channel].std())[:LATENTS]
    assert [row["latent"] for row in found["latents"]] == order
    assert found["deviations"] == pytest.approx([WIDTH * step / 3 for step in range(-3, 4)])
    for row, channel in zip(found["latents"], order, strict=True):
        assert row["information"] == pytest.approx(dict(zip(("x", "y", "vx", "vy"), shares[channel], strict=True)))
        assert row["value"] == latents[FRAME, channel]
        assert row["std"] == pytest.approx(latents[:, channel].std(), rel=1e-3)
    encoder = encoders.create("vae", weights=folder / "vae.safetensors", device="cpu")
    changes = slow_changes(encoder.decode(slow_tokens(store, order)))
    assert [row["change"] for row in found["latents"]] == pytest.approx(changes, abs=0.5 / 255)
    assert min(changes) > 0.01
    assert (found["episode"], found["step"], found["decoder"]) == (1, 10, None)


def test_a_store_without_a_state_is_drawn_without_information(folder: Path, tmp_path: Path) -> None:
    like = TokenStore.open(folder / "vae.zarr")
    columns = columns_of(like)
    columns["state"] = columns["state"][:, :0]
    tokens = like.gather(np.arange(len(like)))
    path = write_tokens(tmp_path / "bare.zarr", tokens, like.card, like.identity, columns)
    found = drawn(path, out=tmp_path / "bare.png")
    assert all(row["information"] is None for row in found["latents"])
    assert len(run(path, out=tmp_path / "all.png").stdout.splitlines()) == 1 + 6 + 2


def test_a_trained_decoder_draws_where_the_encoder_has_none(
    folder: Path, store_path: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    store, decoder = folder / "vae.logvar.zarr", tmp_path / "decoder"
    refused = run(store, out=tmp_path / "none.png")
    assert (refused.exit_code, "wmtrain decoder" in refused.stderr) == (1, True)
    assert not (tmp_path / "none.png").exists()
    options = DecoderOptions(
        decoder="transposed-conv",
        decoder_options={"depth": 2},
        steps=2,
        batch=4,
        max_frames=40,
        device="cpu",
        lpips=False,
    )
    train_decoder(store, dataset, decoder, options)
    found = drawn(store, "--decoder", decoder, out=tmp_path / "trained.png")
    order = [row["latent"] for row in found["latents"]]
    with torch.no_grad():
        images = to_pixels(load_decoder(decoder, torch.device("cpu"))(slow_tokens(TokenStore.open(store), order)))
    assert [row["change"] for row in found["latents"]] == pytest.approx(slow_changes(images), abs=0.5 / 255)
    assert found["decoder"] == str(decoder)
    other = run(folder / "vae.zarr", "--decoder", decoder, out=tmp_path / "other.png")
    assert (other.exit_code, str(decoder) in other.stderr) == (1, True)


def test_weights_and_frames_that_have_moved_are_passed(folder: Path, dataset_path: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "there")
    moved = (tmp_path / "there/vae.safetensors").rename(tmp_path / "moved.safetensors")
    frames = shutil.copytree(dataset_path, tmp_path / "frames")
    words = ("--encoder-weights", moved, "--dataset", frames)
    found = drawn(tmp_path / "there/vae.zarr", *words, out=tmp_path / "moved.png")
    own = drawn(folder / "vae.zarr", out=tmp_path / "own.png")
    assert found["latents"] == own["latents"]


@pytest.mark.parametrize(
    ("store", "words", "named"),
    [
        ("{tcn}", "", "{tcn}"),
        ("{folder}/vae.zarr", "--frame 360", "--frame"),
        ("{folder}/vae.zarr", "--width 0", "--width"),
        ("{folder}/vae.zarr", "--width nan", "--width"),
        ("{folder}/vae.zarr", "--latents 0", "--latents"),
        ("{folder}/vae.zarr", "--out {tmp}/picture.json", "--out"),
        ("{folder}/vae.zarr", "--weights {weights}", "{weights}"),
        ("{folder}/vae.zarr", "--decoder {tmp}", "{tmp}"),
        ("{tmp}/none.zarr", "", "none.zarr"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    folder: Path, store_path: Path, tcn_weights: Path, tmp_path: Path, store: str, words: str, named: str
) -> None:
    paths = {"tcn": store_path, "folder": folder, "tmp": tmp_path, "weights": tcn_weights}
    result = run(Path(store.format(**paths)), *words.format(**paths).split(), out=tmp_path / "picture.png")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert named.format(**paths) in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
