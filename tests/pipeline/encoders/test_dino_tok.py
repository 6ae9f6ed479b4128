from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wmcache.cache import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.common.errors import UserError
from wmcache.common.options import check_options
from wmcache.engine.codebook import Codebook
from wmcache.pipeline import encoders
from wmcache.pipeline import fit as fits
from wmcache.pipeline.encoders import Encoder, FitOptions, base
from wmcache.pipeline.encoders.base import LAST, Features, hash_parameters
from wmcache.pipeline.encoders.dino_tok import (
    Clusters,
    DinoTokFitting,
    DinoTokOptions,
    DinoTokVqOptions,
    DominantSubspace,
)
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.pca import principal_axes
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.encoders.vfm_vae import VfmVaeOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset

Fit = Callable[..., Encoder]
Restore = Callable[[TokenStore, int], Features]
MakeData = Callable[[TokenStore], FitData]

TINY = DinoTokOptions(steps=2, batch=16, shallow=6)
TINY_VQ = DinoTokVqOptions(steps=2, batch=16, shallow=6, codes=24)
BOTH = pytest.mark.parametrize(("name", "options"), [("dino-tok", TINY), ("dino-tok-vq", TINY_VQ)])


def test_meaning_is_the_bases_tokens_standardised(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    encoder, features = fitted(layers, "dino-tok", TINY), restored(layers, 32)
    patches, channels = features.patches(LAST).float(), features.layers[LAST].shape[2]
    train = np.flatnonzero(np.isin(layers.episode, split_episodes(6, "train", 42)))
    known = torch.from_numpy(layers.gather(train)[:, features.prefix :, -channels:]).double().flatten(0, 1)
    expected = (patches - known.mean(0)) / known.std(0, correction=0)
    tokens = encoder.tokens(features)
    torch.testing.assert_close(tokens[..., :channels].double(), expected, atol=1e-3, rtol=1e-3)
    assert tokens.shape[2] == channels + 6


def test_texture_has_mean_0_and_deviation_1_in_every_token(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    texture = fitted(layers, "dino-tok", TINY).tokens(restored(layers, 32))[..., -6:].float()
    torch.testing.assert_close(texture.mean(-1), torch.zeros(texture.shape[:2]), atol=2e-3, rtol=0)
    torch.testing.assert_close(texture.std(-1, correction=0), torch.ones(texture.shape[:2]), atol=2e-2, rtol=0)


@BOTH
def test_live_frames_give_the_bits_that_cached_features_give(
    layers: TokenStore, dataset: FrameDataset, fitted: Fit, restored: Restore, name: str, options: FitOptions
) -> None:
    encoder = fitted(layers, name, options)
    live = encoder(dataset.read_shard(0)[:32])
    torch.testing.assert_close(encoder.tokens(restored(layers, 32)), live, atol=0, rtol=0)


@BOTH
def test_the_same_fit_gives_the_same_weights(
    tcn_layers: TokenStore, fitted: Fit, name: str, options: FitOptions
) -> None:
    first, second = (fitted(tcn_layers, name, options, out=out).weights_sha256 for out in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dino-tok", DinoTokOptions(steps=4, batch=16)),
        ("dino-tok-vq", DinoTokVqOptions(steps=4, batch=16, codes=24)),
        ("vfm-vae", VfmVaeOptions(steps=4, batch=16)),
    ],
)
def test_a_fit_that_was_killed_goes_on_as_if_it_had_not_been(
    tcn_layers: TokenStore, fitted: Fit, monkeypatch: pytest.MonkeyPatch, name: str, options: FitOptions
) -> None:
    whole = fitted(tcn_layers, name, options, out="whole").weights_sha256
    monkeypatch.setattr(fits, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    rate = fits.learning_rate

    def killed(step: int, options: FitOptions) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return rate(step, options)

    monkeypatch.setattr(fits, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(tcn_layers, name, options, out="parts")
    monkeypatch.setattr(fits, "learning_rate", lambda step, options: rate(step, options) if step >= 2 else 1 / 0)
    assert fitted(tcn_layers, name, options, out="parts").weights_sha256 == whole


@pytest.mark.parametrize("kind", [DinoTokOptions, DinoTokVqOptions])
def test_descent_makes_the_features_better_known(
    tcn_layers: TokenStore, fit_data: MakeData, kind: type[DinoTokOptions]
) -> None:
    torch.manual_seed(0)
    fitting = DinoTokFitting(fit_data(tcn_layers), kind(batch=64))
    optimiser, rng, errors = torch.optim.Adam(fitting.parameters(), 3e-3), np.random.default_rng(0), []
    for _ in range(30):
        losses = fitting.loss(fitting.rows(rng))
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        errors.append(losses["error"].item())
    assert errors[-1] < 0.6 * errors[0]
    # Texture's adapter is taught through its codes.
    assert all(parameter.grad.abs().sum() > 0 for parameter in fitting.kept.texture.parameters())


def test_quantised_tokens_are_codes(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    encoder, features = fitted(layers, "dino-tok-vq", TINY_VQ), restored(layers, 32)
    channels = features.layers[LAST].shape[2]
    meaning, texture = encoder.tokens(features).flatten(0, 1).split([channels, 6], 1)
    for part, branch in ((meaning, encoder.head.meaning), (texture, encoder.head.texture)):
        codes = {tuple(code) for code in branch.book.codes.half().tolist()}
        found = {tuple(token) for token in part.tolist()}
        assert found <= codes
        assert len(found) > 1


def test_codes_of_meaning_lie_in_the_leading_components_subspace(tcn_layers: TokenStore, fitted: Fit) -> None:
    meaning = fitted(tcn_layers, "dino-tok-vq", TINY_VQ).head.meaning
    assert int(torch.linalg.matrix_rank(meaning.subspace.projection)) < 32
    torch.testing.assert_close(meaning.subspace(meaning.book.codes), meaning.book.codes, atol=1e-4, rtol=1e-4)


def test_a_subspace_holds_its_share_of_the_variance_with_as_few_axes_as_can_be() -> None:
    tokens = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 2.0, 1.0, 0.1])
    _, variances, axes = principal_axes([tokens])
    for share, rank in ((0.5, 1), (0.9, 2), (0.99, 3), (1.0, 4)):
        subspace = DominantSubspace(4)
        subspace.look_at(variances, axes, share)
        kept = subspace(tokens)
        assert torch.linalg.matrix_rank(subspace.projection) == rank
        assert kept.var(0).sum() >= (share - 1e-3) * tokens.var(0).sum()
        torch.testing.assert_close(subspace(kept), kept, atol=1e-5, rtol=1e-5)


def blobs(generator: torch.Generator, centres: torch.Tensor) -> torch.Tensor:
    return centres.repeat(50, 1) + 0.1 * torch.randn(50 * len(centres), 3, generator=generator)


def test_codes_become_the_means_of_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, book = 10 * torch.randn(4, 3, generator=generator), Codebook(4, 3)
    book.codes.copy_(centres + torch.eye(4, 3))
    clusters = Clusters(book)
    for _ in range(150):
        clusters(book, blobs(generator, centres))
    torch.testing.assert_close(book.codes, centres, atol=0.02, rtol=0)


def test_codes_that_nothing_is_near_start_again_where_tokens_are() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, book = 10 * torch.randn(4, 3, generator=generator), Codebook(6, 3)
    book.codes.copy_(torch.cat([centres[:1] + torch.eye(3), 1e3 + torch.eye(3)]))
    clusters = Clusters(book)
    torch.manual_seed(0)
    for _ in range(150):
        clusters(book, tokens := blobs(generator, centres))
    assert set(book.nearest(tokens).tolist()) == set(range(6))
    assert book.codes.abs().max() < 50


def test_after_a_fit_all_codes_are_in_use(tcn_layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    options = DinoTokVqOptions(steps=30, batch=32, codes=16)
    head = fitted(tcn_layers, "dino-tok-vq", options).head
    features = restored(tcn_layers, 360)
    wide = type(features)({layer: values.float() for layer, values in features.layers.items()}, features.prefix)
    for branch in head.branches:
        assert len(branch.book.nearest(branch(wide)).unique()) >= 15


def test_pixels_are_made_of_the_tokens_where_there_are_frames(
    tcn_layers: TokenStore, dataset: FrameDataset, fitted: Fit
) -> None:
    options = DinoTokOptions(steps=1, batch=4, decoder="pixels")
    with pytest.raises(UserError, match="this fit of dino-tok needs the frames; pass --dataset"):
        fitted(tcn_layers, "dino-tok", options)
    assert fitted(tcn_layers, "dino-tok", options, dataset).frame_shape == (4, 32 + 64)


def test_a_store_without_the_layers_is_refused(store: TokenStore, fitted: Fit) -> None:
    with pytest.raises(UserError, match=r"dino-tok reads early, last features, and here are no early ones; extract"):
        fitted(store, "dino-tok", TINY)


@pytest.mark.parametrize(
    "settings", [{"shallow": 1}, {"codes": 0}, {"variance": 0.0}, {"variance": 1.5}, {"decoder": "x"}]
)
def test_options_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(settings))}"):
        check_options(DinoTokVqOptions(**settings))


def test_the_identity_names_both_layers_and_changes_with_the_fit(tcn_layers: TokenStore, fitted: Fit) -> None:
    first = fitted(tcn_layers, "dino-tok", TINY).identity("x")
    other = fitted(tcn_layers, "dino-tok", DinoTokOptions(steps=3, batch=16, shallow=6), out="other").identity("x")
    assert first.layer == "stem+head"
    assert [line.split(":")[0].split(" ")[0] for line in first.differences(other)] == ["weights_sha256"]


def test_an_adapters_backbone_is_hashed_once(
    tcn_layers: TokenStore, fitted: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, hashed = fitted(tcn_layers, "dino-tok", TINY), []

    def noted(network: nn.Module) -> str:
        hashed.append(network)
        return hash_parameters(network)

    monkeypatch.setattr(base, "hash_parameters", noted)
    again = encoders.create_again(encoder.recipe(), device="cpu")
    assert hashed == [hashed[0], again.head]
    assert hashed[0]["backbone"] is again.backbone
    assert again.weights_sha256 == encoder.weights_sha256 != again.backbone_sha256


def test_a_base_is_found_where_it_was_or_beside_the_adapter_and_no_other_is_taken(
    dataset: FrameDataset, tcn_weights: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    old = there / "tcn.safetensors"
    shutil.copy(tcn_weights, old)
    store = there / "layers.zarr"
    extract(dataset, encoders.create("tcn-layers", weights=old, device="cpu"), store)
    out = here / "dino-tok.safetensors"
    fit_adapter(TokenStore.open(store), "dino-tok", out, TINY, max_frames=1000, device="cpu")
    expected = encoders.create("dino-tok", weights=out, device="cpu")(dataset.read_shard(0)[:4])
    moved = Path(shutil.move(old, here / old.name))
    assert torch.equal(encoders.create("dino-tok", weights=out, device="cpu")(dataset.read_shard(0)[:4]), expected)
    moved.unlink()
    with pytest.raises(UserError, match=r"tcn\.safetensors, which are not there any more; put them beside it"):
        encoders.create("dino-tok", weights=out, device="cpu")
    other = fit(
        dataset, "tcn", here / "other.safetensors", TcnOptions(steps=1, batch=16), max_frames=1000, device="cpu"
    )
    with pytest.raises(UserError, match=r"was fitted on other weights of tcn-layers .* --base-weights"):
        encoders.create("dino-tok", weights=out, base_weights=other.weights, device="cpu")
    with pytest.raises(UserError, match="holds dino-tok, not dino-tok-vq"):
        encoders.create("dino-tok-vq", weights=out, device="cpu")
