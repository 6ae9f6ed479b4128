from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract, extract_together
from wmcache.pipeline.frames import FrameDataset

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def layers(dataset: FrameDataset, tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """tcn's stem, first block and tokens."""
    path = tmp_path_factory.mktemp("layers") / "tcn-layers-64.zarr"
    extract(dataset, encoders.create("tcn-layers", weights=tcn_weights, device="cpu"), path)
    return TokenStore.open(path)


def test_derived_tokens_are_those_of_an_extraction(
    layers: TokenStore, encoder: Encoder, store: TokenStore, tmp_path: Path
) -> None:
    derive(layers, encoder, tmp_path / "tcn-64.zarr", batch=7)
    derived = TokenStore.open(tmp_path / "tcn-64.zarr")
    everything = np.arange(len(store))
    np.testing.assert_array_equal(derived.gather(everything), layers.gather(everything)[:, :, -32:])
    # Two runs of a network differ by the order of additions.
    np.testing.assert_allclose(derived.gather(everything), store.gather(everything), atol=2e-2, rtol=1e-2)
    assert derived.identity == store.identity
    assert derived.card == store.card
    for name in ("action", "state", "episode", "step"):
        np.testing.assert_array_equal(getattr(derived, name), getattr(store, name))
    np.testing.assert_allclose(derived.mean, store.mean, atol=1e-2)


def test_an_unfinished_derivation_resumes(
    layers: TokenStore, encoder: Encoder, tmp_path: Path, stop_after: Callable[..., Any], contents: Snapshot
) -> None:
    whole, stopped = tmp_path / "whole.zarr", tmp_path / "stopped.zarr"
    derive(layers, encoder, whole)
    with stop_after(2):
        derive(layers, encoder, stopped)
    assert len([name for name in contents(stopped / "tokens") if name.startswith("c.")]) == 2
    assert derive(layers, encoder, stopped)
    assert not derive(layers, encoder, stopped)
    assert contents(stopped / "tokens") == contents(whole / "tokens")


def test_missing_layers_other_weights_preprocessing_and_int8_are_refused(
    dataset: FrameDataset, layers: TokenStore, store: TokenStore, encoder: Encoder, tcn_weights: Path, tmp_path: Path
) -> None:
    weights = {name: value + 0.1 for name, value in encoder.backbone.get_submodule("network").state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    create = partial(encoders.create, device="cpu")
    all_layers = create("tcn-layers", weights=tcn_weights)
    extract(dataset, all_layers, tmp_path / "int8.zarr", dtype="int8")
    for source, wanted, named in (
        (store, all_layers, "stem, block 1"),
        (layers, create("tcn", weights=tmp_path / "other.safetensors"), str(layers.path)),
        (layers, create("tcn", weights=tcn_weights, normalisation="imagenet"), "normalisation"),
        (TokenStore.open(tmp_path / "int8.zarr"), encoder, "store_dtype int8"),
    ):
        with pytest.raises(UserError, match=named):
            derive(source, wanted, tmp_path / "new.zarr")
        assert not (tmp_path / "new.zarr").exists()


def test_encoders_that_share_a_backbone_run_it_once(
    dataset: FrameDataset, tcn_weights: Path, store: TokenStore, layers: TokenStore, tmp_path: Path
) -> None:
    both = [encoders.create(name, weights=tcn_weights, device="cpu") for name in ("tcn", "tcn-layers")]
    seen: list[int] = []
    for encoder in both:
        encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    extract_together(dataset, [(both[0], tmp_path / "tcn.zarr"), (both[1], tmp_path / "layers.zarr")])
    assert sum(seen) == len(dataset.steps)
    assert both[0].backbone is both[1].backbone
    everything = np.arange(len(store))
    for path, alone in (("tcn.zarr", store), ("layers.zarr", layers)):
        together = TokenStore.open(tmp_path / path)
        assert together.identity == alone.identity
        np.testing.assert_allclose(together.gather(everything), alone.gather(everything), atol=2e-2, rtol=1e-2)


def test_a_failing_encoder_leaves_the_other_store_whole(
    dataset: FrameDataset, tcn_weights: Path, tmp_path: Path
) -> None:
    good = encoders.create("tcn", weights=tcn_weights, device="cpu")
    bad = encoders.create("tcn", weights=tcn_weights, normalisation="imagenet", device="cpu")
    with torch.no_grad():
        bad.backbone.get_parameter("network.head.1.bias").fill_(1e9)
    stores = [(bad, tmp_path / "bad.zarr"), (good, tmp_path / "good.zarr")]
    with pytest.raises(UserError, match=r"^6 of 6 .*bad\.zarr"):
        extract_together(dataset, stores)
    extract(dataset, good, tmp_path / "good.zarr")
    assert TokenStore.open(tmp_path / "good.zarr").complete
