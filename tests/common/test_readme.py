"""Cards: what the Hugging Face Hub reads, facts alone, and edits that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import zarr
from huggingface_hub import DatasetCard, ModelCard
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.verify import verify
from wmcache.common.readme import Readme, write_readme
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

from ..conftest import IDENTITY, contents, make_writer, write


def test_the_card_of_a_dataset(dataset: FrameDataset) -> None:
    card = DatasetCard.load(dataset.path / "README.md")
    assert (card.data.license, card.data.size_categories, card.data.task_categories) == (
        "unknown",
        ["n<1K"],
        ["robotics"],
    )
    for fact in (dataset.card.env, dataset.card.fingerprint, "32 x 32 RGB", "| action | action | float32 | 2 |"):
        assert fact in card.text
    assert "\n".join(dataset.card.layout) in card.text


def test_the_card_of_a_store(store: TokenStore) -> None:
    card = DatasetCard.load(store.path / "README.md")
    assert card.data.tags == ["wmcache", "world-model", "zarr", "tcn"]
    for fact in (
        store.identity.weights_sha256,
        "2 x 2 of 32 numbers",
        "UMaze",
        "state, proprio",
    ):
        assert fact in card.text
    assert verify(store.path).leftovers == []
    assert sorted(zarr.open_group(store.path, mode="r").array_keys()) == [
        "action",
        "episode",
        "sha256",
        "state",
        "step",
        "tokens",
    ]


def test_the_card_of_a_run_has_its_last_validation(run_path: Path) -> None:
    card = ModelCard.load(run_path / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("unknown", "wmcache", "robotics")
    assert "dino-wm" in card.data.tags
    for fact in ("| skill_5 |", "| width | 16 |", "| learning_rate | 0.003 |", "UMaze"):
        assert fact in card.text
    assert str(run_path.parent) not in card.content


def test_a_licence_is_named_where_it_is_known(tmp_path: Path) -> None:
    write(make_writer(tmp_path / "a.zarr", licence="Apache-2.0"))
    assert "| encoder's licence | Apache-2.0 |" in (tmp_path / "a.zarr/README.md").read_text()
    assert TokenStore.open(tmp_path / "a.zarr").card.licence == "Apache-2.0"


def test_a_resumed_run_has_another_card_and_an_edited_one_stays(
    store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    run, card = tmp_path / "run", tmp_path / "run/README.md"
    train(store_path, run, tiny)
    whole = contents(run)
    card.unlink()
    train(store_path, run, tiny)
    assert contents(run) == whole
    train(store_path, run, replace(tiny, steps=9), resume=True)
    assert "| steps | 9 |" in card.read_text()
    card.write_text(edited := card.read_text().replace("license: unknown", "license: mit"))
    train(store_path, run, replace(tiny, steps=10), resume=True)
    assert card.read_text() == edited


def test_a_store_at_a_url_has_one_and_is_deleted_with_it(far: UPath, bucket: UPath, finished: Path) -> None:
    writer = make_writer(bucket / "b.zarr", IDENTITY)
    write(writer)
    assert (bucket / "b.zarr/README.md").read_bytes() == (finished / "README.md").read_bytes()
    remove(bucket / "b.zarr")
    assert not (bucket / "b.zarr/README.md").exists()
    assert verify(far).sound


def test_names_of_others_break_no_table_and_no_front_matter(tmp_path: Path) -> None:
    readme = Readme("a|b\n# c", "A card.", ["x: y", "- [z", "<script>"], {"pretty_name": "é: 'q'"})
    readme.facts({"env|ironment": "one | two\n| three <b>", "empty": "", "none": None})
    write_readme(tmp_path, readme)
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.tags == ["wmcache", "x: y", "- [z", "<script>"]
    (row,) = [line for line in card.text.splitlines() if "ironment" in line]
    assert row.replace("\\|", "").count("|") == 3
    assert "<b>" not in row


def test_a_store_without_one_is_whole(store_path: Path, tmp_path: Path) -> None:
    path = copytree(store_path, tmp_path / "s.zarr")
    (path / "README.md").unlink()
    assert verify(path).sound
    assert TokenStore.open(path).gather(np.arange(3)).shape == (3, 4, 32)
