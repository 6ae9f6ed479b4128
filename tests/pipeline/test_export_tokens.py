"""Exports: every value to the bit, the same bytes after a kill, and no mixture of two stores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from huggingface_hub import DatasetCard
from safetensors.numpy import load_file
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline import export_tokens as module
from wmcache.pipeline.export_lerobot import feature_names
from wmcache.pipeline.export_tokens import FORMATS, export_tokens

from ..conftest import CARD, STEPS, contents, make_writer, write

NAMED = {
    "action": Column(("action",), "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
    "state": Column(("state",), "float64", (4,)),
    "arm": Column(("proprio",), "float32", (3,)),
    "map": Column(("extra",), "uint8", (2, 2)),
    "gain": Column(("reward",), "float32", ()),
    "over": Column(("terminated",), "bool", ()),
}
LEROBOT = {
    "action": "action",
    "state": "observation.environment_state",
    "arm": "observation.state",
    "map": "observation.map",
    "gain": "next.reward",
    "over": "next.done",
}


@pytest.fixture(params=["float16", "int8", "named"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    """A store of 4 shards: of float16, of int8, and with columns of all roles."""
    changes = {}
    if request.param == "named":
        rng, frames = np.random.default_rng(3), CARD.frames
        more = {
            "arm": rng.normal(size=(frames, 3)).astype(np.float32),
            "map": rng.integers(0, 255, (frames, 2, 2)).astype(np.uint8),
            "gain": rng.normal(size=frames).astype(np.float32),
            "over": rng.random(frames) > 0.5,
        }
        for name, values in more.items():
            monkeypatch.setitem(STEPS, name, values)
        changes = {"columns": NAMED}
    else:
        changes = {"dtype": request.param}
    write(make_writer(tmp_path / "made-up.zarr", **changes))
    return TokenStore.open(tmp_path / "made-up.zarr")


def read(out: Path, file_format: str, store: TokenStore) -> dict[str, np.ndarray]:
    """Read an export as other programs do, under the store's names, and with its shapes."""
    files = [out / record["name"] for record in json.loads((out / "export.json").read_text())["files"]]
    if file_format == "safetensors":
        parts = [load_file(file) for file in files]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = pq.read_table(files)
    assert table["index"].to_pylist() == list(range(len(store)))
    found, names = {}, {"tokens": "observation.tokens", "episode": "episode_index", "step": "frame_index"}
    for name, feature in (names | feature_names(store.columns)).items():
        values = table[feature].combine_chunks()
        values = values.flatten() if hasattr(values, "flatten") and hasattr(values.type, "list_size") else values
        found[name] = values.to_numpy(zero_copy_only=False)
    return found


def test_columns_have_lerobots_names() -> None:
    assert feature_names(NAMED) == LEROBOT
    with pytest.raises(UserError, match="arm"):
        feature_names({**NAMED, "state": Column(("extra",), "float32", (1,)), "environment_state": NAMED["map"]})


@pytest.mark.parametrize("file_format", FORMATS)
def test_values_are_equal_to_the_bit(source: TokenStore, file_format: str, tmp_path: Path) -> None:
    assert export_tokens(source, tmp_path / "out", file_format)
    found = read(tmp_path / "out", file_format, source)
    expected = {"tokens": source.gather(np.arange(len(source))), **source.step_columns()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        whole = found[name].reshape(values.shape)
        if name in ("episode", "step"):  # int64 in LeRobot
            np.testing.assert_array_equal(whole, values)
        else:
            assert whole.dtype == values.dtype
            assert whole.tobytes() == values.tobytes()
    values = json.loads((tmp_path / "out/export.json").read_text())
    np.testing.assert_array_equal(np.array(values["mean"], np.float32), source.mean)
    assert DatasetCard.load(tmp_path / "out/README.md").data.tags[2] == file_format


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_interrupted_export_continues_and_a_finished_one_is_left_alone(
    finished: Path, file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out, whole = TokenStore.open(finished), tmp_path / "out", tmp_path / "whole"
    export_tokens(store, whole, file_format)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            export_tokens(store, out, file_format)
    (out / f"tokens-000002.{file_format}").unlink()
    first = (out / f"tokens-000000.{file_format}").stat().st_mtime_ns
    assert export_tokens(store, out, file_format)
    assert (out / f"tokens-000000.{file_format}").stat().st_mtime_ns == first
    assert contents(out) == contents(whole)
    assert not export_tokens(store, out, file_format)


def test_what_is_there_already_is_not_mixed_with_another_export(
    finished: Path, planted_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_tokens(TokenStore.open(finished), out, "safetensors")
    before = contents(out)
    for store, file_format in ((planted_path, "safetensors"), (finished, "parquet")):
        with pytest.raises(UserError, match=out.name):
            export_tokens(TokenStore.open(store), out, file_format)
    with pytest.raises(UserError, match="made-up"):
        export_tokens(TokenStore.open(finished), finished.parent / "made-up.zarr", "parquet")
    assert contents(out) == before


def test_the_command_writes_to_a_folder_and_to_a_bucket(finished: Path, bucket: UPath, tmp_path: Path) -> None:
    for out in (str(tmp_path / "out"), str(bucket / "out")):
        line = ["export", "tokens", str(finished), "--format", "parquet", "--out", out]
        assert CliRunner().invoke(main, line).stdout == f"{out}: 50 frames in 4 files\n"
        assert CliRunner().invoke(main, line).stdout == f"{out}: 50 frames in 4 files (already complete)\n"
    here, there = tmp_path / "out", bucket / "out"
    assert sorted(path.name for path in here.iterdir()) == sorted(path.name for path in there.iterdir())
    assert (here / "tokens-000003.parquet").read_bytes() == (there / "tokens-000003.parquet").read_bytes()
