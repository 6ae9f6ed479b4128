from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmcache.common.device import CPU
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.tcn import TcnFitting, TcnOptions, time_contrastive_loss
from wmcache.pipeline.frames import FrameDataset


@pytest.mark.parametrize("shape", [(2, 32, 40, 3), (32, 32, 3), (2, 3, 32, 32)])
def test_frames_of_another_shape_or_type_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    for frames in (np.zeros(shape, np.uint8), np.zeros((2, 32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            encoder(frames)


def test_the_hash_is_of_the_weights_and_not_of_the_file(encoder: Encoder, tcn_weights: Path, tmp_path: Path) -> None:
    weights = load_file(tcn_weights)
    save_file(weights, tmp_path / "copy.safetensors", metadata={"made": "elsewhere"})
    assert (tmp_path / "copy.safetensors").read_bytes() != tcn_weights.read_bytes()
    copy = encoders.create("tcn", weights=tmp_path / "copy.safetensors", device="cpu")
    assert copy.weights_sha256 == encoder.weights_sha256 == encoder.backbone_sha256
    assert copy.identity("data") == encoder.identity("data")

    weights["position"][0, 0, 0] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    other = encoders.create("tcn", weights=tmp_path / "other.safetensors", device="cpu")
    assert [text.split(":")[0] for text in other.identity("data").differences(encoder.identity("data"))] == [
        "weights_sha256"
    ]


def test_a_recipe_makes_the_same_encoder_again(dataset: FrameDataset, tcn_weights: Path, encoder: Encoder) -> None:
    options = {"normalisation": "imagenet", "dtype": "bfloat16", "device": "cpu"}
    first = encoders.create("tcn", weights=tcn_weights, **options)
    again = encoders.create(**first.recipe(), device="cpu")
    assert again.identity("data") == first.identity("data")
    found = {text.split(":")[0] for text in first.identity("data").differences(encoder.identity("data"))}
    assert found == {"normalisation", "compute_dtype"}
    frames = dataset.read_shard(0)[:4]
    torch.testing.assert_close(again(frames), first(frames), atol=0, rtol=0)


def test_episodes_of_one_frame_have_no_pairs(encoder: Encoder) -> None:
    data = FitData(np.arange(40), encoder.preprocess, CPU, torch.zeros(40, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match="tcn"):
        TcnFitting(data, TcnOptions(batch=4))


def test_the_loss_is_info_nce_of_squared_distances() -> None:
    first, second = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likelihood = torch.exp(-(torch.cdist(first, second) ** 2))
    forwards = -torch.log(likelihood.diag() / likelihood.sum(1)).mean()
    backwards = -torch.log(likelihood.diag() / likelihood.sum(0)).mean()
    torch.testing.assert_close(time_contrastive_loss(first, second), (forwards + backwards) / 2)


def test_spread_rewards_distance() -> None:
    first, second = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    near = time_contrastive_loss(first, second, 0.5) - time_contrastive_loss(first, second)
    far = time_contrastive_loss(9 * first, 9 * second, 0.5) - time_contrastive_loss(9 * first, 9 * second)
    assert far < near < 0


def test_equal_frames_have_a_finite_gradient() -> None:
    tokens = torch.ones(4, 8, requires_grad=True)
    time_contrastive_loss(tokens, tokens, 0.2).backward()
    assert tokens.grad.isfinite().all()
