"""A dataset, a store and a run that were written before columns had names (by commit d207d33) are read, resumed and written as before.

`tests/data/before-columns.tar.xz` has two episodes of 20 frames of 8 px, their store of pixels, and a run of 4 steps of `OPTIONS`.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import TokenStore
from wmcache.cache.verify import verify
from wmcache.common.columns import default_columns
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

from ..conftest import contents

KEPT = Path(__file__).parents[1] / "data" / "before-columns.tar.xz"
SIZES = {"width": 2, "depth": 1, "heads": 1, "embedding": 2, "dropout": 0.0}
OPTIONS = {"batch": 4, "frameskip": 2, "history": 2, "device": "cpu", "dtype": "float32", "model_options": SIZES}
OPTIONS |= {"log_every": 1, "validate_every": 4, "checkpoint_every": 4}
LOSS_AT_8 = 0.7880764007568359
"""Of the code that wrote the run."""
CARD = "README.md"
"""Written beside what is finished since later versions."""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_dataset_is_opened_and_continued_unchanged(kept: Path) -> None:
    dataset = kept / "umaze-8"
    before = contents(dataset)
    found = FrameDataset.open(dataset)
    assert found.card.columns == found.steps.described == default_columns(2, 4)
    (dataset / "frames-000001.tar").unlink()
    started = json.loads(before["dataset.json"]) | {"shards": [], "steps_sha256": "", "fingerprint": ""}
    (dataset / "dataset.json").rename(dataset / "unfinished.json").write_text(json.dumps(started))
    collect("UMaze", dataset, episodes=2, length=20, image_size=8, frames_per_shard=20)
    after = contents(dataset)
    assert after.keys() == before.keys() | {CARD}
    # Pixels may differ between renderers.
    assert {name for name in before if after[name] != before[name]} <= {"frames-000001.tar", "dataset.json"}
    assert json.loads(after["dataset.json"]).keys() == json.loads(before["dataset.json"]).keys()


def test_a_store_is_read_verified_repaired_and_written_as_before(kept: Path) -> None:
    path, dataset = kept / "pixels-8.zarr", FrameDataset.open(kept / "umaze-8")
    before = contents(path)
    store = TokenStore.open(path)
    assert store.columns == default_columns(2, 4)
    np.testing.assert_array_equal(store.action, dataset.steps.action)
    np.testing.assert_array_equal(store.proprio, dataset.steps.columns["state"].astype(np.float32))
    np.testing.assert_array_equal(store.bounds, np.float32([[-1, -1], [1, 1]]))
    assert (store.reward, store.terminated) == (None, None)
    assert verify(path).sound
    (path / "tokens" / "c.1.0.0").unlink()
    repair(path, dataset=dataset.path, device="cpu")
    assert {name: data for name, data in contents(path).items() if name != CARD} == before
    extract(dataset, encoders.create("pixels", image_size=8, device="cpu"), kept / "new.zarr")
    new = contents(kept / "new.zarr")
    assert CARD in new
    del new[CARD]
    described = [json.loads(files.pop("zarr.json")) for files in (new, before)]
    assert new == before
    for group in described:  # versions of packages and the path of the dataset may differ
        attributes = group["attributes"]
        del attributes["versions"], attributes["checksum"], attributes["card"]["dataset"]["path"]
    assert described[0] == described[1]


def test_a_run_resumes_with_the_same_numbers(kept: Path) -> None:
    train(kept / "pixels-8.zarr", kept / "run", TrainOptions(**OPTIONS, steps=8), resume=True)
    lines = [json.loads(line) for line in (kept / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[8] == pytest.approx(LOSS_AT_8, rel=1e-5)
