"""DINO-WM's checkpoints as runs of ours: the same numbers, and nothing that a stranger's pickle wants is ever done.

The reference's model is written here a second time, from its description, with plain masked attention, and saved as it saves it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.import_dino_wm import import_dino_wm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.pickled_modules import MOST_PROGRAM_BYTES, Archive
from wmcache.trainer.runs import load_model, read_config

HISTORY, FRAMESKIP, HEADS, DEPTH = 3, 5, 2, 2
TINY: dict[str, Any] = {"side": 2, "dim": 12, "embedding": 6, "heads": HEADS, "head_dim": 8, "mlp": 20, "depth": DEPTH}
REAL: dict[str, Any] = {"side": 14, "dim": 384, "embedding": 10, "heads": 16, "head_dim": 64, "mlp": 2048, "depth": 6}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, mask: Tensor, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim), nn.Dropout(dropout))
        self.bias = mask[None, None]

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        split = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, -1)
        ]
        scores = split[0] @ split[1].mT * self.scale
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf)
        mixed = self.dropout(self.attend(scores)) @ split[2]
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        inner = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        self.net = nn.Sequential(nn.LayerNorm(dim), *inner)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, make: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(nn.ModuleList(make()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer:  # type: ignore[attr-defined]
                x = x + part(x)
        out: Tensor = self.norm(x)
        return out


class ViTPredictor(nn.Module):
    def __init__(self, tokens: int, dim: int, depth: int, heads: int, head_dim: int, mlp: int, dropout: float) -> None:
        super().__init__()
        frame = torch.arange(HISTORY * tokens) // tokens
        mask = (frame[:, None] >= frame[None]).float()
        self.num_patches, self.num_frames, self.pool = tokens, HISTORY, "mean"
        self.pos_embedding = nn.Parameter(torch.randn(1, HISTORY * tokens, dim))
        self.dropout = nn.Dropout(0.0)
        self.transformer = Transformer(
            dim, depth, lambda: [Attention(dim, heads, head_dim, mask, dropout), FeedForward(dim, mlp, dropout)]
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.transformer(self.dropout(x + self.pos_embedding[:, : x.shape[1]]))
        return out


class ProprioceptiveEmbedding(nn.Module):
    def __init__(self, in_chans: int, emb_dim: int) -> None:
        super().__init__()
        self.num_frames, self.tubelet_size, self.in_chans, self.emb_dim = 16, 1, in_chans, emb_dim
        self.patch_embed = nn.Conv1d(in_chans, emb_dim, kernel_size=1, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.patch_embed(x.mT).mT
        return out


class VQVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 3, 4, stride=2)
        self.norm = nn.BatchNorm2d(3)


class DinoVisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))


class AcceleratedOptimizer:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler, self.device_placement, self.device = None, True, torch.device("cpu")


WHERE = {
    "models.vit": (Attention, FeedForward, Transformer, ViTPredictor),
    "models.proprio": (ProprioceptiveEmbedding,),
    "models.vqvae": (VQVAE,),
    "dinov2.models.vision_transformer": (DinoVisionTransformer,),
    "accelerate.optimizer": (AcceleratedOptimizer,),
}


@pytest.fixture(autouse=True, scope="module")
def _reference_modules() -> Iterator[None]:
    """The classes where the reference has them, but only so long as something is saved: see `save`."""
    before = {cls: cls.__module__ for classes in WHERE.values() for cls in classes}
    for name, classes in WHERE.items():
        for cls in classes:
            cls.__module__ = name
    yield
    for cls, name in before.items():
        cls.__module__ = name


def save(value: Any, file: Path, **settings: Any) -> None:
    modules: dict[str, Any] = {}
    for name, classes in WHERE.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(modules[name]).update({cls.__name__: cls for cls in classes})
    file.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(value, file, **settings)


def make_parts(concat_dim: int, sizes: dict[str, Any] = TINY, dropout: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(0)
    embedding = sizes["embedding"] if concat_dim else sizes["dim"]
    tokens = sizes["side"] ** 2 + (0 if concat_dim else 2)
    width = sizes["dim"] + 2 * embedding * concat_dim
    chosen = {name: sizes[name] for name in ("depth", "heads", "head_dim", "mlp")}
    parts: dict[str, Any] = {
        "epoch": 7,
        "predictor": ViTPredictor(tokens, width, **chosen, dropout=dropout),
        "action_encoder": ProprioceptiveEmbedding(10, embedding),
        "proprio_encoder": ProprioceptiveEmbedding(4, embedding),
    }
    if sizes is TINY:
        for part in list(parts.values())[1:]:
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.3)
    return parts


def make_hydra(concat_dim: int = 1, sizes: dict[str, Any] = TINY) -> dict[str, Any]:
    return {
        "ckpt_base_path": "./",
        "training": {"seed": 0, "epochs": 100, "batch_size": 32, "predictor_lr": 0.0005},
        "img_size": 16 * sizes["side"],
        "frameskip": FRAMESKIP,
        "concat_dim": concat_dim,
        "normalize_action": True,
        "action_emb_dim": 10,
        "num_action_repeat": 1,
        "proprio_emb_dim": 10,
        "num_proprio_repeat": 1,
        "num_hist": HISTORY,
        "num_pred": 1,
        "has_predictor": True,
        "has_decoder": True,
        "model": {"_target_": "models.visual_world_model.VWorldModel", "train_encoder": False, "train_predictor": True},
        "env": {"name": "point_maze", "dataset": {"n_rollout": None, "normalize_action": True}},
        "encoder": {
            "_target_": "models.dino.DinoV2Encoder",
            "name": "dinov2_vits14",
            "feature_key": "x_norm_patchtokens",
        },
        "predictor": {"_target_": "models.vit.ViTPredictor", "depth": DEPTH, "heads": HEADS, "mlp_dim": 20},
        "action_encoder": {"_target_": "models.proprio.ProprioceptiveEmbedding"},
        "proprio_encoder": {"_target_": "models.proprio.ProprioceptiveEmbedding"},
        "saved_folder": "outputs/2024-01-01/00-00-00",
    }


def write(folder: Path, parts: Any, hydra: dict[str, Any], **settings: Any) -> Path:
    save(parts, folder / "checkpoints" / "model_latest.pth", **settings)
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    return folder


def make_store(path: Path, side: int, dim: int, **changes: Any) -> Path:
    """4 episodes of 30 frames, of noise, as DINOv2 would have made them."""
    episodes, length = 4, 30
    rng = np.random.default_rng(0)
    frames = episodes * length
    size = 14 * side
    settings = {
        "encoder": "dinov2",
        "weights_source": "timm/vit_small_patch14_dinov2.lvd142m",
        "weights_sha256": "0",
        "layer": "norm",
        "token_selection": "patch",
        "image_size": size,
        "resize": f"bilinear antialias {16 * side}>{size}",
        "normalisation": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "compute_dtype": "float32",
        "store_dtype": "float16",
        "dataset_fingerprint": "0",
    }
    card = StoreCard({}, {}, (side, side), dim, frames=frames, frames_per_shard=frames)
    steps: dict[str, Any] = {
        "action": rng.uniform(-1, 1, (frames, 2)).astype(np.float32),
        "state": 3 + 2 * rng.normal(size=(frames, 4)),
        "episode": np.repeat(np.arange(episodes, dtype=np.int32), length),
        "step": np.tile(np.arange(length, dtype=np.int32), episodes),
    }
    writer = StoreWriter.create(path, card, Identity(**{**settings, **changes}), steps)
    writer.write_shard(0, rng.normal(size=(frames, side * side, dim)).astype(np.float16))
    writer.finish()
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "dinov2-28.zarr", TINY["side"], TINY["dim"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "theirs", make_parts(1), make_hydra(1))


def standardised(cache: Path) -> Callable[[str, Tensor], Tensor]:
    """As the reference: by mean and unbiased deviation over all frames of all episodes."""
    store = TokenStore.open(cache)

    def apply(name: str, value: Tensor) -> Tensor:
        column = torch.from_numpy(np.asarray(getattr(store, name))).float()
        repeats = value.shape[-1] // column.shape[1]
        return (value - column.mean(0).repeat(repeats)) / column.std(0).repeat(repeats)

    return apply


def encode(parts: dict[str, Any], concat_dim: int, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
    """[B, T, N (+ 2), D (+ 2 E)] from tokens and standardised proprio and actions."""
    codes = [parts[f"{name}_encoder"](value) for name, value in (("proprio", proprio), ("action", action))]
    if concat_dim == 0:
        return torch.cat([tokens, *(code[:, :, None] for code in codes)], 2)
    return torch.cat([tokens, *(code[:, :, None].expand(-1, -1, tokens.shape[2], -1) for code in codes)], 3)


def predict(parts: dict[str, Any], frames: Tensor) -> Tensor:
    out: Tensor = parts["predictor"](frames.flatten(1, 2)).unflatten(1, frames.shape[1:3])
    return out


def imagine(parts: dict[str, Any], concat_dim: int, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
    """The reference's rollout, from the observed frames on; the action slots of what is imagined are overwritten."""
    observed = tokens.shape[1]
    z = encode(parts, concat_dim, tokens, proprio, action[:, :observed])
    for t in range(observed, action.shape[1] + 1):
        new = predict(parts, z[:, -HISTORY:])[:, -1:]
        if t < action.shape[1]:
            code = parts["action_encoder"](action[:, t : t + 1])
            if concat_dim == 0:
                new[:, :, -1] = code
            else:
                new[..., -code.shape[-1] :] = code[:, :, None]
        z = torch.cat([z, new], 1)
    return z[:, observed:]


def make_batch(frames: int, actions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, frames, TINY["side"] ** 2, TINY["dim"], generator=generator)
    return tokens, 3 + torch.randn(2, frames, 4, generator=generator), torch.randn(2, actions, 10, generator=generator)


@pytest.fixture(params=[1, 0], ids=["concat_dim-1", "concat_dim-0"])
def pair(request: pytest.FixtureRequest, cache: Path, tmp_path: Path) -> tuple[int, dict[str, Any], Any]:
    """concat_dim, the reference's modules, and our model."""
    parts = make_parts(request.param)
    theirs = write(tmp_path / "theirs", parts, make_hydra(request.param))
    import_dino_wm(theirs, cache, tmp_path / "run")
    for name in ("predictor", "action_encoder", "proprio_encoder"):
        parts[name].eval()
    return request.param, parts, load_model(tmp_path / "run", torch.device("cpu"))


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_step_gives_the_references_numbers(pair: tuple[int, dict[str, Any], Any], cache: Path, frames: int) -> None:
    concat_dim, parts, model = pair
    by_store = standardised(cache)
    tokens, proprio, action = make_batch(frames, frames)
    scaled = by_store("state", proprio), by_store("action", action)
    theirs = predict(parts, encode(parts, concat_dim, tokens, *scaled))
    new_tokens, new_code = model.predict(tokens, model.code(scaled[0]), scaled[1])
    patches, dim = TINY["side"] ** 2, TINY["dim"]
    torch.testing.assert_close(new_tokens, theirs[:, :, :patches, :dim], atol=1e-5, rtol=0)
    wanted = theirs[..., dim : dim + TINY["embedding"]] if concat_dim else theirs[:, :, patches : patches + 1]
    torch.testing.assert_close(new_code, wanted, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("observed", [1, 3])
def test_a_rollout_gives_the_references_numbers(
    pair: tuple[int, dict[str, Any], Any], cache: Path, observed: int
) -> None:
    # From one frame, five steps: windows of 1, 2, 3, 3, 3 frames.
    concat_dim, parts, model = pair
    by_store = standardised(cache)
    tokens, proprio, action = make_batch(observed, observed + 4)
    theirs = imagine(parts, concat_dim, tokens, by_store("state", proprio), by_store("action", action))
    imagined, code = model.rollout(tokens, proprio, action)
    patches, dim = TINY["side"] ** 2, TINY["dim"]
    assert imagined.shape[1] == 5
    torch.testing.assert_close(imagined, theirs[:, :, :patches, :dim], atol=1e-5, rtol=0)
    wanted = theirs[:, :, 0, dim : dim + TINY["embedding"]] if concat_dim else theirs[:, :, patches]
    torch.testing.assert_close(code, wanted, atol=1e-5, rtol=0)


def test_the_run_is_as_wmtrain_would_have_left_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    imported = import_dino_wm(folder, cache, tmp_path / "run")
    config, store = read_config(tmp_path / "run"), TokenStore.open(cache)
    assert imported.epoch == config["imported"]["epoch"] == 7
    assert config["cache"] == str(cache)
    assert (config["history"], config["frameskip"]) == (HISTORY, FRAMESKIP)
    assert config["shape"]["tokens"] == TINY["side"] ** 2
    model = load_model(tmp_path / "run", torch.device("cpu"))
    assert imported.parameters == sum(value.numel() for value in model.parameters())
    for buffer, column in (("proprio", store.state), ("action", np.tile(store.action, FRAMESKIP))):
        np.testing.assert_allclose(getattr(model, f"{buffer}_mean"), column.mean(0), atol=1e-5)
        np.testing.assert_allclose(getattr(model, f"{buffer}_std"), column.std(0, ddof=1), atol=1e-5)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "run"}


def test_wmtrain_goes_on_with_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    sizes = "--depth 2 --heads 2 --head-dim 8 --mlp 20 --embedding 6"
    words = f"--preset dino-wm --resume --epochs 1 {sizes} --device cpu --cache {cache} --out {tmp_path / 'run'}"
    done = CliRunner().invoke(wmtrain, words.split())
    assert done.exit_code == 0, done.output
    assert "steps 0 to 1" in done.output
    last = (tmp_path / "run" / "checkpoints" / "last").resolve()
    assert last.name == "step-00000001"


def test_real_sizes_have_the_references_number_of_parameters(tmp_path: Path) -> None:
    store = make_store(tmp_path / "dinov2-196.zarr", REAL["side"], REAL["dim"])
    hydra = make_hydra(1, REAL)
    theirs = write(tmp_path / "theirs", make_parts(1, REAL), hydra)
    # The predictor, and the linear maps of an action and of proprio.
    assert import_dino_wm(theirs, store, tmp_path / "run").parameters == 20_122_600 + 110 + 50


def test_the_optimisers_the_decoder_and_a_frozen_encoder_are_left_aside(cache: Path, tmp_path: Path) -> None:
    parts = make_parts(1)
    before = write(tmp_path / "before", parts, make_hydra())
    parts["predictor_optimizer"] = AcceleratedOptimizer(list(parts["predictor"].parameters()))
    # The step has changed the parameters, which is not what is to be seen here.
    parts.update({name: value for name, value in make_parts(1).items() if name in ("predictor", "epoch")})
    parts |= {"decoder": VQVAE(), "encoder": DinoVisionTransformer(), "decoder_optimizer": None}
    after = write(tmp_path / "after", parts, make_hydra())
    for folder in (before, after):
        import_dino_wm(folder, cache, folder / "run")
    weights = [load_model(folder / "run", torch.device("cpu")).state_dict() for folder in (before, after)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_model_of_raw_actions_gets_raw_actions(cache: Path, tmp_path: Path) -> None:
    hydra = make_hydra()
    hydra["env"]["dataset"]["normalize_action"] = False
    theirs = write(tmp_path / "theirs", make_parts(1), hydra)
    assert not import_dino_wm(theirs, cache, tmp_path / "run").standardised
    model = load_model(tmp_path / "run", torch.device("cpu"))
    assert not model.proprio_mean.any()
    assert not model.action_mean.any()
    assert (model.action_std == 1).all()
    assert (model.proprio_std == 1).all()


def test_the_same_import_again_changes_nothing(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").stat()
    import_dino_wm(folder, cache, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").stat() == before


def test_another_run_is_replaced_only_when_told(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    parts = make_parts(1)
    parts["epoch"] = 8
    write(folder, parts, make_hydra())
    with pytest.raises(UserError, match=r"run is another run; .*--out"):
        import_dino_wm(folder, cache, tmp_path / "run")
    import_dino_wm(folder, cache, tmp_path / "run", overwrite=True)
    assert read_config(tmp_path / "run")["imported"]["epoch"] == 8


def test_what_is_no_run_is_never_replaced(folder: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="theirs exists and is not a run of ours"):
        import_dino_wm(folder, cache, folder, overwrite=True)
    assert (folder / "hydra.yaml").exists()


def test_an_epoch_is_chosen_by_its_number(folder: Path, cache: Path, tmp_path: Path) -> None:
    save({**make_parts(1), "epoch": 3}, folder / "checkpoints" / "model_3.pth")
    assert import_dino_wm(folder, cache, tmp_path / "run", checkpoint="3").epoch == 3
    with pytest.raises(UserError, match=r"model_4\.pth does not exist"):
        import_dino_wm(folder, cache, tmp_path / "other", checkpoint="4")


class Wish:
    """Asks, when it is unpickled, for a function to be called."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def refuse(theirs: Path, cache: Path, tmp_path: Path, *words: str) -> str:
    """Nothing is made, and the answer is one line that has these words."""
    with pytest.raises(UserError) as caught:
        import_dino_wm(theirs, cache, tmp_path / "run")
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    assert not (tmp_path / "run").exists()
    return text


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {}", "posix.system"),
        (builtins.exec, "open({!r}, 'w')", "exec"),
        (builtins.eval, "open({!r}, 'w')", "eval"),
        (builtins.open, "{}", "open"),
        (os.mkdir, "{}", "posix.mkdir"),
        (pickle.loads, b"", "pickle.loads"),
        (torch.load, "{}", "torch.serialization.load"),
        (torch.hub.load, "{}", "torch.hub.load"),
        (getattr, "{}", "getattr"),
        (io.FileIO, "{}", "_io.FileIO"),
    ],
)
def test_a_function_that_the_file_asks_for_is_named_and_not_called(
    cache: Path, tmp_path: Path, function: Any, argument: Any, name: str, protocol: int
) -> None:
    canary = tmp_path / "canary"
    filled = argument.format(str(canary)) if isinstance(argument, str) else argument
    parts = make_parts(1)
    # In the middle of a file that is good otherwise; a newer protocol has other instructions for a name.
    parts["predictor"].transformer.layers[1][0].to_out.extra = Wish(function, filled)
    value = parts if protocol == 2 else {"epoch": Wish(function, filled)}
    write(tmp_path / "theirs", value, make_hydra(), pickle_protocol=protocol)
    refuse(tmp_path / "theirs", cache, tmp_path, f"{name}, which", "nothing was run")
    assert not canary.exists()


PLACES = [
    *("epoch", "predictor", "action_encoder", "proprio_encoder", "decoder", "encoder", "predictor_optimizer"),
    "a key that nobody knows",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_part_of_the_file_is_exempt(cache: Path, tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    theirs = write(tmp_path / "theirs", {**make_parts(1), place: Wish(os.system, f"touch {canary}")}, make_hydra())
    refuse(theirs, cache, tmp_path, "posix.system, which")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1), "multiarray.scalar"),
        (np.zeros(2), "_reconstruct"),
        (Wish(vars(sys.modules["copyreg"])["_reconstructor"], OrderedDict, dict, {}), "_reconstructor"),
        (os.path.join, "posixpath.join"),
        (Path("x"), "PosixPath"),
        (TrainOptions(), "wmcache.trainer.options.TrainOptions"),
        (torch.zeros(2).to_sparse(), "_rebuild_sparse_tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_no_checkpoint_needs_is_named(cache: Path, tmp_path: Path, value: Any, name: str) -> None:
    write(tmp_path / "theirs", {**make_parts(1), "epoch": value}, make_hydra())
    refuse(tmp_path / "theirs", cache, tmp_path, f"{name}, which")


def test_no_class_of_the_file_is_imported(folder: Path, cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "path" / "models"
    place.mkdir(parents=True)
    (place / "vit.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place.parent)
        import_dino_wm(folder, cache, tmp_path / "run")
    assert not (tmp_path / "canary").exists()
    assert "models.vit" not in sys.modules


def write_program(theirs: Path, program: bytes, storage: bytes = b"", **settings: Any) -> Path:
    """A checkpoint whose pickle is just this, beside one storage."""
    file = theirs / "checkpoints" / "model_latest.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", **settings) as archive:
        archive.writestr("model/data.pkl", program)
        archive.writestr("model/data/0", storage)
    (theirs / "hydra.yaml").write_text(yaml.safe_dump(make_hydra()))
    return theirs


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def tensor(count: int, offset: int, shape: int, stride: int, key: str = "0") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    layout = number(offset) + number(shape) + b"\x85" + number(stride) + b"\x85"
    return b"\x80\x02}" + text("epoch") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + b"\x89}tRs."


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (tensor(4, 0, 2**60, 0), "does not fit the 4 numbers"),
        (tensor(4, 1, 4, 1), "does not fit the 4 numbers"),
        (tensor(4, 0, 2, 4), "does not fit the 4 numbers"),
        (tensor(4, -1, 2, 1), "shape is not one"),
        (tensor(4, 0, 2, -1), "shape is not one"),
        (tensor(2**40, 0, 4, 1), "16 bytes"),
        (tensor(4, 0, 4, 1, "../0"), "not described"),
        (tensor(4, 0, 4, 1, "7"), "damaged"),
        (b"\x80\x02}(K\x01r\xff\xff\xff\x7fK\x02u.", "holds 1, 2"[:5]),
        (b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", "tuple as key"),
        (b"\x80\x02}" + text("epoch") + b"N" + b"\x85" * 100_000 + b"s.", "lacks predictor"),
        (b"\x80\x02ctorch\nFloatStorage\n)R}b.", "no dict of modules"),
        (b"\x80\x02ctorch.nn.modules.container\noperator.attrgetter\n)\x81}(" + text("x") + b"NuR.", "damaged"),
        (b"\x80\x02cmodels.vit\nX\n)\x81}b}b.", "given its contents twice"),
        (b"(iposix\nsystem\n.", "posix system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02P1\n.", "PERSID"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02cos", "damaged"),
        (b"\x80\x04\x8c\x01xK\x01\x93.", "damaged"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_pickle_that_was_made_by_hand_is_refused(cache: Path, tmp_path: Path, program: bytes, words: str) -> None:
    write_program(tmp_path / "theirs", program, b"\0" * 16)
    refuse(tmp_path / "theirs", cache, tmp_path, "model_latest.pth", words)


def test_a_compressed_file_is_not_unpacked(cache: Path, tmp_path: Path) -> None:
    program = b"\x80\x02" + b"N0" * 10_000_000 + b"}."
    write_program(tmp_path / "theirs", program, compression=zipfile.ZIP_DEFLATED)
    refuse(tmp_path / "theirs", cache, tmp_path, "compressed")


def test_a_pickle_that_describes_too_much_is_not_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmcache.trainer.pickled_modules.MOST_PROGRAM_BYTES", 99)
    assert MOST_PROGRAM_BYTES > 1_000_000
    write_program(tmp_path / "theirs", b"\x80\x02" + b"N0" * 100 + b"}.")
    refuse(tmp_path / "theirs", cache, tmp_path, "describes more")


def test_a_module_that_holds_itself_is_refused(cache: Path, tmp_path: Path) -> None:
    parts = make_parts(1)
    parts["predictor"].transformer._modules["again"] = parts["predictor"]
    write(tmp_path / "theirs", parts, make_hydra())
    refuse(tmp_path / "theirs", cache, tmp_path, "more than 2000 modules")


def test_damage_anywhere_in_the_pickle_is_one_line_or_harmless(folder: Path, cache: Path, tmp_path: Path) -> None:
    file = folder / "checkpoints" / "model_latest.pth"
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    generator = random.Random(0)
    for _ in range(60):
        program = bytearray(members[name])
        for _ in range(generator.choice([1, 3])):
            program[generator.randrange(len(program))] = generator.randrange(256)
        with zipfile.ZipFile(file, "w") as archive:
            for member, value in {**members, name: bytes(program)}.items():
                archive.writestr(member, value)
        # Any other error is one too many.
        with contextlib.suppress(UserError):
            import_dino_wm(folder, cache, tmp_path / "run")
            shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(folder: Path, cache: Path, tmp_path: Path, share: float) -> None:
    file = folder / "checkpoints" / "model_latest.pth"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refuse(folder, cache, tmp_path, "not a whole file of torch.save")


def test_a_flipped_bit_of_a_weight_is_noticed(folder: Path, cache: Path, tmp_path: Path) -> None:
    file = folder / "checkpoints" / "model_latest.pth"
    content = bytearray(file.read_bytes())
    weight = make_parts(1)["predictor"].transformer.norm.weight.detach().numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    refuse(folder, cache, tmp_path, "Bad CRC-32")


def test_a_file_from_before_zips_is_refused(cache: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", {"epoch": 1}, make_hydra(), _use_new_zipfile_serialization=False)
    refuse(theirs, cache, tmp_path, "before 1.6 has to be saved again")


def test_a_state_dict_is_not_a_dict_of_modules(cache: Path, tmp_path: Path) -> None:
    parts = make_parts(1)
    parts["predictor"] = OrderedDict(parts["predictor"].state_dict())
    refuse(write(tmp_path / "theirs", parts, make_hydra()), cache, tmp_path, "predictor is no module")


@pytest.mark.parametrize("part", ["epoch", "predictor", "action_encoder", "proprio_encoder"])
def test_a_missing_part_is_named(cache: Path, tmp_path: Path, part: str) -> None:
    parts = make_parts(1)
    del parts[part]
    refuse(write(tmp_path / "theirs", parts, make_hydra()), cache, tmp_path, f"it lacks {part}")


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(parts: dict[str, Any]) -> None:
        *way, name = path.split(".")
        place = functools.reduce(
            lambda at, step: at[int(step)] if step.isdecimal() else getattr(at, step), way[1:], parts[way[0]]
        )
        setattr(place, name, value)

    return apply


def hook(parts: dict[str, Any]) -> None:
    parts["predictor"].transformer.norm._forward_hooks[0] = "anything"


ATTENTION, MLP = "predictor.transformer.layers.0.0", "predictor.transformer.layers.1.1"


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (change("predictor.pos_embedding", nn.Parameter(torch.zeros(1, 8, 24))), "pos_embedding is (1, 8, 24)"),
        (change("predictor.extra", nn.Linear(2, 2)), "predictor.extra (torch.nn.modules.linear.Linear) is not"),
        (change(f"{ATTENTION}.bias", torch.ones(1, 1, 12, 12)), "not causal"),
        (change(f"{ATTENTION}.bias", None), "not causal"),
        (change(f"{ATTENTION}.heads", 5), "5 heads"),
        (change(f"{ATTENTION}.heads", 4), "scales by"),
        (change(f"{ATTENTION}.scale", 1.0), "scales by 1.0"),
        (change(f"{ATTENTION}.attend", nn.Softmax(dim=1)), "attend.dim is 1, not -1"),
        (change(f"{ATTENTION}.dropout.p", 0.2), "different heads or dropouts"),
        (change(f"{ATTENTION}.to_out", nn.Identity()), "to_out is torch.nn.modules.linear.Identity"),
        (change(f"{ATTENTION}.to_qkv", nn.Linear(24, 48)), "to_qkv.bias is not in the reference"),
        (change(f"{ATTENTION}.norm.eps", 1e-6), "norm.eps is 1e-06, not 1e-05"),
        (change(f"{ATTENTION}.norm", nn.LayerNorm(24, elementwise_affine=False)), "norm.bias is missing"),
        (change(f"{MLP}.net", nn.Sequential(nn.Linear(2, 2))), "net.0 is torch.nn.modules.linear.Linear"),
        (change(f"{MLP}.net.1", nn.Linear(24, 21)), "blocks.1.mlp.0.bias is (21,)"),
        (change(f"{MLP}.net.1.weight", nn.Parameter(torch.full((20, 24), math.nan))), "not finite"),
        (change(f"{MLP}.net.1.weight", nn.Parameter(torch.zeros(20, 24).double())), "float64"),
        (change(f"{ATTENTION}.to_qkv.weight", nn.Parameter(torch.zeros(0, 24))), "do not divide its to_qkv"),
        (change("action_encoder.patch_embed.bias", nn.Parameter(torch.tensor(0.0))), "action_encoder makes 1"),
        (change("predictor.dropout.p", 0.1), "emb_dropout"),
        (change("action_encoder.patch_embed", nn.Conv1d(15, 6, 1)), "embed_action.weight is (6, 15)"),
        (change("action_encoder.patch_embed", nn.Conv1d(10, 6, 2)), "tubelet_size"),
        (change("action_encoder.patch_embed", nn.Conv1d(10, 6, 1, padding=1)), "padding is a tuple"),
        (change("proprio_encoder.patch_embed", nn.Conv1d(4, 5, 1)), "proprio_encoder makes 5"),
        (change("proprio_encoder.patch_embed", nn.Linear(4, 6)), "proprio_encoder.patch_embed is torch.nn"),
        (hook, "hooks"),
    ],
)
def test_what_our_model_cannot_express_is_named(
    cache: Path, tmp_path: Path, apply: Callable[[dict[str, Any]], None], words: str
) -> None:
    parts = make_parts(1)
    apply(parts)
    refuse(write(tmp_path / "theirs", parts, make_hydra()), cache, tmp_path, words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hist", 0),
        ("num_hist", None),
        ("num_hist", True),
        ("frameskip", "5"),
        ("concat_dim", 2),
        ("num_pred", 2),
        ("num_action_repeat", 7),
        ("num_proprio_repeat", 2),
        ("has_predictor", False),
        ("normalize_action", 1),
        ("model.train_encoder", True),
        ("env.name", "pusht"),
        ("env.dataset.n_rollout", 3),
        ("encoder.name", "dinov2_vitb14"),
        ("encoder.feature_key", "x_norm_clstoken"),
        ("encoder._target_", "models.encoder.r3m.R3M"),
        ("predictor._target_", "models.mlp.MLP"),
        ("action_encoder._target_", "models.dummy.DummyModel"),
    ],
)
def test_a_setting_that_our_model_cannot_express_is_named(
    folder: Path, cache: Path, tmp_path: Path, name: str, value: Any
) -> None:
    hydra = make_hydra()
    place = functools.reduce(dict.__getitem__, name.split(".")[:-1], hydra)
    place[name.split(".")[-1]] = value
    if name == "normalize_action":
        del hydra["env"]["dataset"][name]
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    refuse(folder, cache, tmp_path, "hydra.yaml", name)


@pytest.mark.parametrize(
    "written",
    [
        "num_hist: !!python/object/apply:os.system ['touch {}']",
        "num_hist: !!python/object/new:os.system ['touch {}']",
        "num_hist: !!python/name:os.system",
        "num_hist: [",
        "[" * 1500,
        "\0",
        "2024-99-99",
        "x: &x [*x, *x]",
        "a: &a [1, 1]\n"
        + "".join(
            f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefghij" * 3, "bcdefghijk" * 3, strict=True)
        )
        + "env: {{name: *k}}",
        "",
        "12",
    ],
)
def test_settings_are_plain_values(folder: Path, cache: Path, tmp_path: Path, written: str) -> None:
    (folder / "hydra.yaml").write_text(
        written.format(tmp_path / "canary") if "touch" in written else written.replace("{{", "{").replace("}}", "}")
    )
    refuse(folder, cache, tmp_path, "hydra.yaml")
    assert not (tmp_path / "canary").exists()


def test_settings_that_are_missing_or_too_large_are_refused(folder: Path, cache: Path, tmp_path: Path) -> None:
    (folder / "hydra.yaml").write_text("# " + "x" * 2_000_000)
    refuse(folder, cache, tmp_path, "too large")
    (folder / "hydra.yaml").unlink()
    refuse(folder, cache, tmp_path, "hydra.yaml does not exist")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", "tcn"),
        ("image_size", 42),
        ("resize", "bilinear antialias 28"),
        ("normalisation", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("token_selection", "cls"),
    ],
)
def test_a_store_of_other_tokens_is_refused(folder: Path, tmp_path: Path, name: str, value: Any) -> None:
    store = make_store(tmp_path / "other.zarr", TINY["side"], TINY["dim"], **{name: value})
    refuse(folder, store, tmp_path, name, "img_size 224")


def test_a_store_of_another_grid_or_width_is_refused(folder: Path, tmp_path: Path) -> None:
    wider = make_store(tmp_path / "wider.zarr", TINY["side"], TINY["dim"] + 1)
    refuse(folder, wider, tmp_path, "wider.zarr", "is (20, 24)", "make it (20, 25)")
    identity = TokenStore.open(make_store(tmp_path / "larger.zarr", 3, TINY["dim"])).identity
    finer = make_store(tmp_path / "finer.zarr", 3, TINY["dim"], image_size=28, resize="bilinear antialias 32>28")
    assert identity.image_size == 42
    refuse(folder, finer, tmp_path, "grid of (3, 3) tokens, not (2, 2)")


def test_the_reader_knows_no_name_by_itself(folder: Path) -> None:
    with Archive(folder / "checkpoints" / "model_latest.pth") as archive, pytest.raises(UserError, match="asks for"):
        archive.load(lambda name: False)


def test_json_of_the_run_is_plain(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    source = json.loads((tmp_path / "run" / "config.json").read_text())["imported"]
    assert source["file"] == str(folder / "checkpoints" / "model_latest.pth")
    assert len(source["sha256"]) == 64


@pytest.fixture(scope="module")
def dinov2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 real frames, by a real DINOv2 of random weights, as tests download nothing."""
    place = tmp_path_factory.mktemp("dinov2")
    collect(
        "wmcache/PointMaze-UMaze-v0",
        place / "data",
        episodes=2,
        length=12,
        image_size=64,
        frames_per_shard=24,
        cluster="local:1",
    )
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=196, pretrained=False, num_classes=0)
    save_file(network.state_dict(), place / "random.safetensors")
    encoder = encoders.create("dinov2", weights=place / "random.safetensors", dtype="float32", device="cpu")
    extract(FrameDataset.open(place / "data"), encoder, place / "dinov2-196.zarr")
    return place / "dinov2-196.zarr"


# The report's picture of a training of which nothing is known has an empty legend.
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_a_checkpoint_is_imported_and_planned_with_by_command(dinov2_cache: Path, tmp_path: Path) -> None:
    sizes = {**TINY, "side": REAL["side"], "dim": REAL["dim"], "depth": 1}
    theirs = write(tmp_path / "theirs", make_parts(1, sizes), make_hydra(1, sizes))
    words = ["import-run", "dino-wm", str(theirs), "--cache", str(dinov2_cache), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "epoch 7" in done.output
    assert "standardised by the store's" in done.output
    search = "--samples 4 --elites 2 --iterations 1 --horizon 2 --budget 5 --episodes 1 --alpha 1 --device cpu"
    done = CliRunner().invoke(
        wmplan, ["--run", str(tmp_path / "run"), *search.split(), "--out", str(tmp_path / "plan")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plan" / "report.html").exists()
    (theirs / "hydra.yaml").unlink()
    done = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "other")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "hydra.yaml does not exist" in done.output
