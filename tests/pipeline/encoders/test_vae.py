from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from wmcache.cache import TokenStore
from wmcache.cache.joined import JoinedStore
from wmcache.cache.log_variances import open_log_variances
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders.base import Preprocess
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.vae import VaeEncoder, VaeFitting, VaeOptions, make_decoder
from wmcache.pipeline.extract import extract, extract_together, with_log_variances
from wmcache.pipeline.fit import fit, load_images, read_fit
from wmcache.pipeline.frames import FrameDataset

from ...conftest import shards_of

NAMES = ("vae", "beta-vae")


def fit_vae(dataset: FrameDataset, name: str, out: Path, **settings: object) -> Path:
    options = encoders.fit_options(name, {"steps": 3, "batch": 4, **settings})
    return fit(dataset, name, out, options, max_frames=40, device="cpu").weights


PREPROCESS = Preprocess(64, (), "half", "bilinear", 0)


def make_fitting(name: str, images: torch.Tensor, **settings: object) -> VaeFitting:
    """On uint8 images [n, 3, 64, 64]."""
    torch.manual_seed(0)
    data = FitData(np.zeros(len(images), np.int64), PREPROCESS, torch.device("cpu"), images)
    return VaeFitting(data, encoders.fit_options(name, settings))  # type: ignore[arg-type]


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def encoder_of(name: str, path: Path) -> VaeEncoder:
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("decoder.")}
    network = VaeEncoder(name, len(tensors["mean.bias"]))
    network.load_state_dict(tensors)
    return network


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def weights(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    return {name: fit_vae(dataset, name, folder / f"{name}.safetensors") for name in NAMES}


@pytest.mark.parametrize(
    ("name", "latent", "encoder", "decoder"),
    [
        # Convolutions k4 of 3-32-64-128-256 channels: 1 568 + 32 832 + 131 200 + 524 544; two maps 1024 -> 32: 65 600.
        # 32 -> 1024: 33 792; transposed k5, 5, 6, 6 of 1024-128-64-32-3: 3 276 928 + 204 864 + 73 760 + 3 459. In all 4 348 547.
        ("vae", 32, 690_144 + 65_600, 4_348_547 - 690_144 - 65_600),
        # Convolutions k4 of 3-32-32-64-64-256 channels: 1 568 + 16 416 + 32 832 + 65 600 + 262 400; two maps 256 -> 20: 10 280.
        # Mirrored; 20 -> 256: 5 376, then 262 208 + 65 600 + 32 800 + 16 416 + 1 539.
        ("beta-vae", 20, 378_816 + 10_280, 5_376 + 378_563),
    ],
)
def test_networks_have_the_papers_parameters(name: str, latent: int, encoder: int, decoder: int) -> None:
    options = encoders.fit_options(name, {})
    assert isinstance(options, VaeOptions)
    assert (count(VaeEncoder(name, latent)), count(make_decoder(name, options))) == (encoder, decoder)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_papers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    fitting, rows = make_fitting(name, noise_images(4), free_bits=0.0, beta=0.25), np.arange(4)
    found = fitting.loss(rows)
    target = noise_images(4).double() / 255 - (0.5 if name == "beta-vae" else 0.0)
    mean, logvar = (values.double() for values in fitting.kept(target.float()))
    drawn = fitting.decoder(mean.float()).double()
    posterior = Independent(Normal(mean, (logvar / 2).exp()), 1)
    divergence = kl_divergence(posterior, Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)).mean()
    if name == "vae":
        error = (drawn - target).square().sum() / 4
    else:
        # Of the density of a Gaussian of variance 1, without its constant.
        likelihood = Independent(Normal(drawn, torch.ones_like(drawn)), 3).log_prob(target)
        error = -(likelihood + 0.5 * np.log(2 * np.pi) * 3 * 64 * 64).mean()
    torch.testing.assert_close(found["loss"].double(), error + 0.25 * divergence, rtol=1e-4, atol=1e-3)


def test_free_bits_are_counted_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = make_fitting("vae", noise_images(4), free_bits=1.0, latent=8)
    means = torch.zeros(4, 8)
    means[3] = 2.0  # (16 nats)
    monkeypatch.setattr(fitting.kept, "forward", lambda seen: (means, torch.zeros(4, 8)))
    found = fitting.loss(np.arange(4))
    torch.testing.assert_close(found["kl"], torch.tensor(16.0 / 4))
    # Three frames at 8 nats and one at 16, and not the larger of 8 and the mean.
    torch.testing.assert_close(found["loss"] - found["error"], torch.tensor((3 * 8.0 + 16.0) / 4), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("name", "foreground"), [("vae", False), ("beta-vae", True)])
def test_the_loss_falls(dataset: FrameDataset, name: str, foreground: bool) -> None:
    images = load_images(dataset, np.arange(0, 64, 4), PREPROCESS)
    fitting = make_fitting(name, images, foreground=foreground, free_bits=0.0, beta=0.001)
    optimiser = torch.optim.Adam(fitting.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss = fitting.loss(np.arange(0, 16, 4))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_foreground_is_the_scaled_difference_from_the_mean_frame(dataset: FrameDataset) -> None:
    images = load_images(dataset, np.arange(32), PREPROCESS)
    fitting = make_fitting("vae", images, foreground=True)
    seen = fitting.kept.scale(fitting.data.pixels(np.arange(32)))
    torch.testing.assert_close(seen.mean(0), torch.zeros(3, 64, 64), rtol=0, atol=1e-3)
    torch.testing.assert_close(seen.std(), torch.tensor(1.0), rtol=0, atol=1e-3)
    assert not any(isinstance(layer, nn.Sigmoid) for layer in fitting.decoder)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_of_a_file_gives_the_means(dataset: FrameDataset, weights: dict[str, Path], name: str) -> None:
    encoder = encoders.create(name, weights=weights[name], device="cpu")
    frames = dataset.read_shard(0)[:5]
    tokens = encoder(frames)
    assert tokens.shape == (5, 1, encoder.spec.token_dim)
    assert encoder.token_grid == encoder.spec.token_grid == (1, 1)
    network = encoder_of(name, weights[name])
    mean, _ = network(network.scale(encoder.preprocess(torch.from_numpy(frames))))
    torch.testing.assert_close(tokens[:, 0].float(), mean, rtol=2e-3, atol=2e-3)


def test_the_size_of_the_latent_is_read_from_the_file(dataset: FrameDataset, tmp_path: Path) -> None:
    path = fit_vae(dataset, "beta-vae", tmp_path / "small.safetensors", latent=3, foreground=True, steps=1)
    encoder = encoders.create("beta-vae", weights=path, device="cpu")
    assert encoder.frame_shape == (1, 3)
    tensors = load_file(path)
    assert tensors["contrast"] < 0.5
    parts = {"convolutions", "mean", "logvar", "background", "contrast", "decoder"}
    assert {key.split(".")[0] for key in tensors} == parts


@pytest.mark.parametrize(("name", "foreground"), [("vae", False), ("vae", True), ("beta-vae", False)])
def test_an_encoder_draws_what_its_fit_decodes(
    dataset: FrameDataset, tmp_path: Path, name: str, foreground: bool
) -> None:
    path = fit_vae(dataset, name, tmp_path / "drawing.safetensors", foreground=foreground)
    encoder, frames = encoders.create(name, weights=path, device="cpu"), dataset.read_shard(0)[:5]
    images = load_images(dataset, np.arange(64), PREPROCESS)
    fitting = make_fitting(name, images, foreground=foreground)
    tensors = load_file(path)
    fitting.kept = encoder_of(name, path)
    drawing = {key.removeprefix("decoder."): value for key, value in tensors.items() if key.startswith("decoder.")}
    fitting.decoder.load_state_dict(drawing)
    tokens = encoder(frames)
    drawn = encoder.decode(tokens)
    assert (drawn.shape, drawn.dtype) == ((5, 64, 64, 3), np.uint8)
    with torch.no_grad():
        expected = fitting.decoder(tokens[:, 0].float())
    # Compared in the units of the fit: `scale` turns frames into them.
    found = fitting.kept.scale(encoder.preprocess(torch.from_numpy(drawn)))
    inside = ((drawn > 0) & (drawn < 255)).transpose(0, 3, 1, 2)
    assert inside.mean() > 0.5
    contrast = fitting.kept.contrast.item()
    assert ((found - expected).abs()[torch.from_numpy(inside)] < 0.6 / 255 / contrast).all()


def test_a_file_without_a_decoder_gives_the_same_encoder_and_draws_nothing(
    dataset: FrameDataset, weights: dict[str, Path], tmp_path: Path
) -> None:
    now, frames = encoders.create("vae", weights=weights["vae"], device="cpu"), dataset.read_shard(0)[:5]
    tensors = {key: value for key, value in load_file(weights["vae"]).items() if not key.startswith("decoder.")}
    save_file(tensors, tmp_path / "before.safetensors", read_fit(weights["vae"]))
    before = encoders.create("vae", weights=tmp_path / "before.safetensors", device="cpu")
    assert before.identity("frames") == now.identity("frames")
    assert torch.equal(before(frames), now(frames))
    with pytest.raises(UserError, match=r"before\.safetensors"):
        before.decode(before(frames))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_log_variances_are_written_in_the_pass_of_the_means(
    dataset: FrameDataset, weights: dict[str, Path], tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders.create("vae", weights=weights["vae"], device="cpu")
    extract(dataset, encoder, tmp_path / "alone.zarr", dtype=dtype)
    passes, run = list[int](), VaeEncoder.forward

    def counted(self: VaeEncoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(len(images))
        return run(self, images)

    monkeypatch.setattr(VaeEncoder, "forward", counted)
    extract_together(dataset, with_log_variances([(encoder, tmp_path / "both.zarr")]), dtype=dtype)
    assert sum(passes) == dataset.card.frames
    store, alone = TokenStore.open(tmp_path / "both.zarr"), TokenStore.open(tmp_path / "alone.zarr")
    assert shards_of(store.path) == shards_of(alone.path)
    with pytest.raises(UserError, match=r"alone\.logvar\.zarr.*extract"):
        open_log_variances(alone)
    found, frames = open_log_variances(store), np.arange(8)
    network = encoder_of("vae", weights["vae"])
    _, logvar = network(network.scale(encoder.preprocess(torch.from_numpy(dataset.read_shard(0)[:8]))))
    close = {"rtol": 2e-3, "atol": 2e-3 if dtype == "float16" else 0.02 * logvar.std().item() + 0.02}
    torch.testing.assert_close(torch.from_numpy(found.gather(frames)[:, 0]).float(), logvar, **close)
    assert verify(found.path).sound
    joined = JoinedStore([store])
    np.testing.assert_array_equal(open_log_variances(joined).gather(frames), found.gather(frames))


def test_log_variances_of_other_weights_are_refused(
    dataset: FrameDataset, weights: dict[str, Path], tmp_path: Path
) -> None:
    other = fit_vae(dataset, "vae", tmp_path / "other.safetensors", seed=1)
    for name, path in (("mine", weights["vae"]), ("other", other)):
        encoder = encoders.create("vae", weights=path, device="cpu")
        extract_together(dataset, with_log_variances([(encoder, tmp_path / f"{name}.zarr")]))
    shutil.rmtree(tmp_path / "mine.logvar.zarr")
    (tmp_path / "other.logvar.zarr").rename(tmp_path / "mine.logvar.zarr")
    with pytest.raises(UserError, match=r"weights_sha256"):
        open_log_variances(TokenStore.open(tmp_path / "mine.zarr"))
