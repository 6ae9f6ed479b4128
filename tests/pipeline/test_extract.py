"""Stores that are extracted from frames or derived from other stores."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from wmcache.cache import StoreWriter, TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Features
from wmcache.pipeline.encoders.weights import read_metadata
from wmcache.pipeline.extract import encode_frames, extract, extract_together, extraction_task, slice_of
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_store

from ..conftest import contents


def test_the_number_of_processes_and_threads_changes_no_bit(
    dataset: FrameDataset, encoder: Encoder, store_path: Path, tmp_path: Path
) -> None:
    extract(dataset, encoder, tmp_path / "processes.zarr", cluster="local:2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    extract(dataset, encoder, tmp_path / "threads.zarr")
    torch.set_num_threads(threads)
    every, reference = np.arange(360), TokenStore.open(store_path)
    for name in ("processes.zarr", "threads.zarr"):
        found = TokenStore.open(tmp_path / name).gather(every)
        np.testing.assert_array_equal(found.view(np.uint16), reference.gather(every).view(np.uint16))
        assert contents(tmp_path / name / "tokens") == contents(store_path / "tokens")


def test_a_batch_that_does_not_fit_the_device_is_halved(dataset: FrameDataset, encoder: Encoder) -> None:
    class SmallDevice(Encoder):
        """The encoder on a device with memory for 5 frames."""

        def __init__(self) -> None:
            self.__dict__.update(encoder.__dict__)

        def features(self, frames: NDArray[np.uint8] | torch.Tensor, layers: Sequence[str]) -> Features:
            if len(frames) > room:
                raise torch.OutOfMemoryError
            return encoder.features(frames, layers)

    frames, room = dataset.read_shard(0)[:19], 5
    np.testing.assert_allclose(
        encode_frames([SmallDevice()], frames, 16)[0], encode_frames([encoder], frames, 16)[0], atol=2e-2, rtol=1e-2
    )
    room = 0
    with pytest.raises(UserError, match="--device cpu"):
        encode_frames([SmallDevice()], frames, 16)


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_slices_are_contiguous_and_together_all_shards(count: int) -> None:
    parts = [slice_of(6, (number, count)) for number in range(count)]
    assert [shard for part in parts for shard in part] == list(range(6))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_worker_with_other_weights_refuses(dataset: FrameDataset, tcn_weights: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(tcn_weights, tmp_path / "mine.safetensors"))
    encoder = encoders.create("tcn", weights=weights, device="cpu")
    writer = create_store(dataset, encoder, tmp_path / "x.zarr")
    task = pickle.loads(pickle.dumps(extraction_task(dataset, [(encoder, writer)], device="cpu", batch=8)))
    assert task(3) == 64
    values = {name: value + 0.1 for name, value in load_file(weights).items()}
    save_file(values, weights, read_metadata(weights))
    other = pickle.loads(pickle.dumps(extraction_task(dataset, [(encoder, writer)], device="cpu", batch=8)))
    with pytest.raises(UserError, match=r"tcn .*weights_sha256"):
        other(4)
    assert 4 in writer.pending()


def test_derived_tokens_are_those_of_an_extraction(
    tcn_layers: TokenStore, encoder: Encoder, store: TokenStore, tmp_path: Path
) -> None:
    derive(tcn_layers, encoder, tmp_path / "tcn-64.zarr", batch=7)
    derived = TokenStore.open(tmp_path / "tcn-64.zarr")
    everything = np.arange(len(store))
    np.testing.assert_array_equal(derived.gather(everything), tcn_layers.gather(everything)[:, :, -32:])
    # Two runs of a network differ by the order of additions.
    np.testing.assert_allclose(derived.gather(everything), store.gather(everything), atol=2e-2, rtol=1e-2)
    assert derived.identity == store.identity
    assert derived.card == store.card
    for name in ("action", "state", "episode", "step"):
        np.testing.assert_array_equal(getattr(derived, name), getattr(store, name))
    np.testing.assert_allclose(derived.mean, store.mean, atol=1e-2)


def test_an_unfinished_derivation_resumes(tcn_layers: TokenStore, encoder: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "tcn-64.zarr"
    assert derive(tcn_layers, encoder, out)
    whole = contents(out / "tokens")
    StoreWriter.resume(out, TokenStore.open(out).identity).reopen([1, 4])
    kept = {file: file.stat().st_mtime_ns for file in (out / "tokens").glob("c.[0235].*")}
    assert derive(tcn_layers, encoder, out)
    assert not derive(tcn_layers, encoder, out)
    assert contents(out / "tokens") == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_missing_layers_other_weights_preprocessing_and_int8_are_refused(
    dataset: FrameDataset,
    tcn_layers: TokenStore,
    store: TokenStore,
    encoder: Encoder,
    tcn_weights: Path,
    tmp_path: Path,
) -> None:
    weights = {name: value + 0.1 for name, value in encoder.backbone.get_submodule("network").state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    create = partial(encoders.create, device="cpu")
    all_layers = create("tcn-layers", weights=tcn_weights)
    extract(dataset, all_layers, tmp_path / "int8.zarr", dtype="int8")
    for source, wanted, named in (
        (store, all_layers, "stem, block 1"),
        (tcn_layers, create("tcn", weights=tmp_path / "other.safetensors"), str(tcn_layers.path)),
        (tcn_layers, create("tcn", weights=tcn_weights, normalisation="imagenet"), "normalisation"),
        (TokenStore.open(tmp_path / "int8.zarr"), encoder, "store_dtype int8"),
    ):
        with pytest.raises(UserError, match=named):
            derive(source, wanted, tmp_path / "new.zarr")
        assert not (tmp_path / "new.zarr").exists()


def test_encoders_that_share_a_backbone_run_it_once(
    dataset: FrameDataset, tcn_weights: Path, store: TokenStore, tcn_layers: TokenStore, tmp_path: Path
) -> None:
    both = [encoders.create(name, weights=tcn_weights, device="cpu") for name in ("tcn", "tcn-layers")]
    seen: list[int] = []
    for encoder in both:
        encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    extract_together(dataset, [(both[0], tmp_path / "tcn.zarr"), (both[1], tmp_path / "layers.zarr")])
    assert sum(seen) == len(dataset.steps)
    assert both[0].backbone is both[1].backbone
    everything = np.arange(len(store))
    for path, alone in (("tcn.zarr", store), ("layers.zarr", tcn_layers)):
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
