"""Every encoder, with small weights of the real classes: live tokens equal cached ones, and a model trained on them plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)

from wmcache.cache import TokenStore
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract, extract_together, read_for
from wmcache.pipeline.fit import fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

# Change maps are labels, not a representation: in the single frame of a plan nothing has changed.
NAMES = [spec.name for spec in encoders.specs() if spec.name != "changes"]
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VJEPA2 = {
    **{"mlp_ratio": 2.0, "crop_size": 32, "frames_per_clip": 4},
    **{"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
}
SIZES = {"efficientnet-lite0": 64, "dinov2": 28, "dinov3": 32, "siglip2": 32, "vjepa2": 32, "resnet18": 64, "r3m": 64}
ADAPTERS = {"straighten": {"width": 16}, "dino-tok-vq": {"codes": 8}, "dino-tok": {}, "vfm-vae": {}, "pca": {"dim": 4}}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    """4 episodes of 26 frames; fewer would leave no held-out window of two frames 5 apart."""
    path = tmp_path_factory.mktemp("few") / "pointmaze-umaze"
    collect("UMaze", path, episodes=4, length=26, image_size=32, frames_per_shard=40, cluster="local:1")
    return FrameDataset.open(path)


@pytest.fixture(scope="module")
def weights(frames: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """Family -> small weights, as `save_pretrained`, timm and `wmcache fit` write them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**TRANSFORMER, image_size=28)),
        "dinov3": DINOv3ViTModel(DINOv3ViTConfig(**TRANSFORMER, intermediate_size=64, num_register_tokens=4)),
        "siglip2": SiglipVisionModel(SiglipVisionConfig(**TRANSFORMER, intermediate_size=64, image_size=32)),
        "vjepa2": VJEPA2Model(VJEPA2Config(**TRANSFORMER, **VJEPA2)),
    }
    made: dict[str, Path | None] = dict.fromkeys(("pixels", "random-vit", "efficientnet-lite0"))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        made[name] = folder / name
    body = timm.create_model("resnet18", num_classes=0).state_dict()
    for name, prefix in (("resnet18", ""), ("r3m", "module.convnet.")):
        made[name] = folder / f"{name}.safetensors"
        save_file({prefix + key: value for key, value in body.items()}, made[name])
    for name in ("tcn", "vae", "beta-vae"):
        options = encoders.fit_options(name, {"steps": 1, "batch": 8})
        made[name] = fit(frames, name, folder / f"{name}.safetensors", options, max_frames=80, device="cpu").weights
    layers = encoders.create("tcn-layers", weights=made["tcn"], device="cpu")
    extract(frames, layers, folder / "layers.zarr")
    store = TokenStore.open(folder / "layers.zarr")
    for name, more in ADAPTERS.items():
        options = encoders.fit_options(name, {**({} if name == "pca" else {"steps": 1}), "batch": 8, **more})
        made[name] = fit_adapter(
            store, name, folder / f"{name}.safetensors", options, max_frames=80, device="cpu"
        ).weights
    made["diswm"] = train_diswm(frames, encoders.create("vae", weights=made["vae"], device="cpu"), folder)
    return made


def train_diswm(frames: FrameDataset, base: Encoder, folder: Path) -> Path:
    """Train the encoder that a world model trains, on the tokens of another one."""
    extract(frames, base, folder / "base.zarr")
    sizes = {"deter": 8, "stoch": 4, "hidden": 8, "sequence": 4}
    train(folder / "base.zarr", folder / "run", TrainOptions(model="diswm", model_options=sizes, steps=1, device="cpu"))
    return folder / "run" / "encoder-00000001.safetensors"


def family(name: str, known: dict[str, Path | None]) -> str:
    return max((found for found in known if name.startswith(found)), key=len)


def create(name: str, weights: dict[str, Path | None]) -> Encoder:
    of = family(name, weights)
    return encoders.create(name, weights=weights[of], image_size=SIZES.get(of), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def stores(
    frames: FrameDataset, weights: dict[str, Path | None], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """All encoders' stores, made in one pass over the frames."""
    folder = tmp_path_factory.mktemp("stores")
    paths = {name: folder / f"{name}.zarr" for name in NAMES}
    extract_together(frames, [(create(name, weights), path) for name, path in paths.items()])
    return paths


@pytest.mark.parametrize("name", NAMES)
def test_live_tokens_equal_cached_ones(
    frames: FrameDataset, weights: dict[str, Path | None], stores: dict[str, Path], name: str
) -> None:
    encoder, store = create(name, weights), TokenStore.open(stores[name])
    assert store.identity == encoder.identity(frames.card.fingerprint)
    chosen = np.array([0, 7, 30, 41, 103])  # both shards, and the beginnings of episodes
    live = encoder(read_for(encoder, frames, chosen))
    np.testing.assert_allclose(live, store.gather(chosen), atol=5e-3, rtol=1e-2)
    again = encoders.create_again(store.card.encoder, device="cpu")
    assert again.identity(frames.card.fingerprint) == store.identity


# In these tests the sizes of a family are the same small network.
@pytest.mark.parametrize("name", [name for name in NAMES if not {"base", "large"} & set(name.split("-"))])
def test_the_batch_size_changes_at_most_the_last_bit(
    frames: FrameDataset, weights: dict[str, Path | None], name: str
) -> None:
    encoder = create(name, weights)
    seen = read_for(encoder, frames, np.arange(32))
    whole = encoder(seen)
    assert torch.equal(encoder(seen), whole)
    # Sums in another order differ by float32's rounding, so that float16 takes the next value at most: a step, which is no more than this
    # share of the largest value. An adapter multiplies what its base's features, kept in float16, differ by.
    steps = 4 if family(name, weights) in {*ADAPTERS, "diswm"} else 1
    largest = whole.float().abs().amax((1, 2), keepdim=True)
    for size, count in ((1, 6), (2, 8), (7, 21)):
        parts = torch.cat([encoder(seen[start : start + size]) for start in range(0, count, size)])
        close = (parts.float() - whole[:count].float()).abs() <= steps * 2**-10 * largest[:count]
        if name == "dino-tok-vq":  # a token between two codes may take the other one
            assert close.all(-1).float().mean() > 0.9, size
        else:
            assert close.all(), size
        # Nothing is summed over more than a pixel's own window.
        assert name != "pixels" or torch.equal(parts, whole[:count])


@pytest.mark.parametrize(
    "name", ["dinov2-cls", "vjepa2", "vjepa2-pair", "resnet18", "vae", "dino-tok", "diswm", "pixels"]
)
def test_a_model_trained_on_them_plans(stores: dict[str, Path], tmp_path: Path, name: str) -> None:
    sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    options = TrainOptions(model_options=sizes, history=2, steps=2, batch=8, dtype="float32", device="cpu")
    train(stores[name], tmp_path / "run", options)
    search = {"samples": 8, "elites": 3, "iterations": 2}
    plan = PlanOptions(episodes=2, budget=12, horizon=2, search=search, device="cpu", dtype="float32")
    setting = EvalContext(tmp_path / "run", plan)
    _, results = evaluate(setting, plan, tmp_path / "plan")
    assert results["live_drift"]["cosine"] > 0.999
    assert results["encoder_frames"] == 2 * (1 + 3)
