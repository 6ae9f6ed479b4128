"""Videos without actions, from files to a model that imagines them; what needs actions refuses them."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter
from wmcache.pipeline.steps import read_steps

from .conftest import error_of, run, succeed

LENGTHS = (24, 30, 12)
TRAIN = (
    "wmtrain --cache {cache} --model rssm --deter 8 --stoch 2 --hidden 8 --sequence 4 --frameskip 2 --steps 3 --batch-size 4 --device cpu "
    "--dtype float32"
)


def make_frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (sum(LENGTHS), 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose numbers are not in the order of letters, without loss."""
    folder, start = tmp_path_factory.mktemp("videos"), 0
    for name, length in zip(("take 2", "take 9", "take 10"), LENGTHS, strict=True):
        frames = make_frames()[start : start + length]
        settings = {"codec": "ffv1", "pixelformat": "bgr0", "fps": 7, "macro_block_size": 1}
        iio.imwrite(folder / f"{name}.mkv", frames, plugin="FFMPEG", **settings)
        start += length
    return folder


@pytest.fixture(scope="module")
def store(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    succeed("wmcache import frames {videos} --out {home}/videos", home, videos=videos)
    succeed("wmcache extract --dataset {home}/videos --encoder pixels --device cpu --out {home}/pixels.zarr", home)
    return home / "pixels.zarr"


def test_videos_and_folders_of_images_are_episodes_in_the_order_of_their_numbers(videos: Path, tmp_path: Path) -> None:
    images, start = tmp_path / "images", 0
    for name, length in zip(("take 2", "take 9", "take 10"), LENGTHS, strict=True):
        (images / name).mkdir(parents=True)
        for step in range(length):
            Image.fromarray(make_frames()[start + step]).save(images / name / f"{step}.png")
        start += length
    found = []
    for folder in (videos, images):
        write_dataset(FramesImporter(str(folder)).open(), tmp_path / f"of {folder.name}", frames_per_shard=20)
        found.append(FrameDataset.open(tmp_path / f"of {folder.name}"))
        np.testing.assert_array_equal(found[-1].read_frames(range(sum(LENGTHS))), make_frames())
        assert tuple(np.bincount(found[-1].steps.episode)) == LENGTHS
        assert found[-1].steps.action.shape == (sum(LENGTHS), 0)
        assert (found[-1].steps.state, found[-1].steps.proprio, found[-1].card.columns) == (None, None, {})
    assert found[0].card.fingerprint == found[1].card.fingerprint
    Image.fromarray(make_frames()[0]).save(images / "take 2" / "0.bmp")
    (images / "film.mp4").touch()
    with pytest.raises(UserError, match=r"images.*--actions"):
        FramesImporter(str(images)).open()


def test_a_table_may_have_other_columns_and_no_action(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "steps.csv"
    rows = [f"0,{step},take 2.mkv,{step / 10},{step + 1}" for step in range(LENGTHS[0])]
    table.write_text("\n".join(["episode,step,video,state_0,reward", *rows]))
    write_dataset(FramesImporter(str(videos), actions=str(table)).open(), tmp_path / "out", frames_per_shard=20)
    steps = read_steps(tmp_path / "out", described=FrameDataset.open(tmp_path / "out").card.columns)
    assert set(steps.columns) == {"state", "reward"}
    assert steps.action.shape == (LENGTHS[0], 0)
    assert steps.state is not None
    np.testing.assert_allclose(steps.state[:, 0], np.arange(LENGTHS[0]) / 10)


def test_a_store_without_actions_is_described_verified_and_derived(store: Path, tmp_path: Path) -> None:
    succeed("wmcache verify {store} --deep --device cpu", store=store)
    assert json.loads(succeed("wmcache info {store} --json", store=store).stdout)["card"]["columns"] == {}
    opened = TokenStore.open(store)
    assert (opened.action.shape, opened.columns, opened.proprio) == ((sum(LENGTHS), 0), {}, None)
    batch = opened.windows(2, 1, 3).batch(np.arange(5))
    assert batch["action"].shape == (5, 3, 0)
    succeed("wmcache derive {store} --encoder pixels --device cpu --out {out}", store=store, out=tmp_path / "out.zarr")
    assert TokenStore.open(tmp_path / "out.zarr").columns == {}


def test_a_model_of_videos_trains_on_them_and_imagines(store: Path, tmp_path: Path) -> None:
    paths = {"cache": store, "out": tmp_path / "run", "decoder": tmp_path / "decoder"}
    succeed(TRAIN + " --actions none --out {out}", **paths)
    row = json.loads(succeed("wmcache bench rollout --run {out} --steps 3 --device cpu --json", **paths).stdout)[-1]
    assert row["copying"] > 0
    assert row["runs"]["run"] > 0
    succeed("wmtrain decoder --cache {cache} --steps 2 --batch-size 4 --device cpu --out {decoder} --no-lpips", **paths)
    imagine = "wmcache imagine --run {out} --decoder {decoder} --out {out}/imagined --steps 3 --videos 1 --no-lpips --device cpu"
    succeed(imagine, **paths)
    assert (tmp_path / "run" / "imagined" / "metrics.json").is_file()


@pytest.mark.parametrize("model", ["rssm", "dino-wm", "mdn-rnn", "rwm", "gcbc", "gc-idm", "ddp-wm"])
def test_models_that_need_actions_refuse_them(store: Path, tmp_path: Path, model: str) -> None:
    found = run("wmtrain --cache {cache} --model {model} --out {out}", cache=store, model=model, out=tmp_path / "run")
    assert "--actions none" in error_of(found)
    assert not (tmp_path / "run").exists()


def test_what_acts_refuses_a_model_of_them(store: Path, tmp_path: Path) -> None:
    succeed(TRAIN + " --actions none --out {out}", cache=store, out=tmp_path / "run")
    for line in (
        "wmplan --run {out}",
        "wmtrain actor --run {out} --out {out}-actor",
        "wmcache dream --run {out} --out {out}-dream",
    ):
        assert "--actions none" in error_of(run(line, out=tmp_path / "run"))
