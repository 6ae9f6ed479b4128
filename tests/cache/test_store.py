from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.common.errors import UserError
from wmcache.common.files import seal

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]

SHARDS = [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]


def all_bytes(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def edit_attributes(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what the store says of itself, and seal it again, so that only the check behind the seal is left."""
    metadata = json.loads((path / "zarr.json").read_bytes())
    edit(metadata["attributes"])
    metadata["attributes"].pop("checksum")
    metadata["attributes"] = seal(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(metadata))


def test_a_store_gives_back_what_was_written(finished: Path, tokens: Tokens, identity: Identity) -> None:
    store = TokenStore.open(finished)
    assert len(store) == 50
    assert store.identity == identity
    assert store.complete
    np.testing.assert_array_equal(store.gather(np.arange(50)), tokens)
    np.testing.assert_array_equal(store.episode, np.repeat([0, 1], [20, 30]))
    np.testing.assert_array_equal(store.step, [*range(20), *range(30)])
    assert store.action.shape == (50, 2)
    assert store.state.shape == (50, 4)


def test_plain_zarr_opens_a_store(finished: Path, tokens: Tokens) -> None:
    # Another process, with warnings as errors: a reader that has never heard of us.
    script = (
        "import sys, numpy as np, zarr; group = zarr.open_group(sys.argv[1], mode='r'); "
        "np.save(sys.argv[2], group['tokens'][:]); print(sorted(group.array_keys()))"
    )
    copy = finished.parent / "tokens.npy"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(finished), str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['action', 'episode', 'sha256', 'state', 'step', 'tokens']"
    np.testing.assert_array_equal(np.load(copy), tokens)


def test_mean_and_std_are_numpys(finished: Path, tokens: Tokens) -> None:
    store = TokenStore.open(finished)
    np.testing.assert_allclose(store.mean, tokens.astype(np.float64).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(store.std, tokens.astype(np.float64).std((0, 1)), rtol=1e-5)


def test_an_incomplete_store_is_refused(tmp_path: Path, make_writer: MakeWriter, tokens: Tokens) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    writer.write_shard(2, tokens[SHARDS[2]])
    with pytest.raises(UserError, match="lacks 3 of 4 shards"):
        writer.finish()
    with pytest.raises(UserError, match=r"some\.zarr is incomplete"):
        TokenStore.open(writer.path)
    store = TokenStore.open(writer.path, allow_incomplete=True)
    assert not store.complete
    np.testing.assert_array_equal(store.gather(np.array([32, 47])), tokens[[32, 47]])
    with pytest.raises(UserError, match=r"tokens/c\.0\.0\.0"):
        store.gather(np.array([32, 3]))


def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, finished: Path, make_writer: MakeWriter, tokens: Tokens
) -> None:
    path = tmp_path / "resumed.zarr"
    writer = make_writer(path)
    for shard in (2, 0):
        writer.write_shard(shard, tokens[SHARDS[shard]])
    # Two shards torn by a kill: their files are there, their records are not.
    whole = (finished / "tokens/c.3.0.0").read_bytes()
    for shard, torn in ((1, whole[:100]), (3, whole[:-50])):
        (path / f"tokens/c.{shard}.0.0").write_bytes(torn)
    untouched = (path / "tokens/c.0.0.0").stat().st_mtime_ns

    again = make_writer(path)
    assert again.pending() == [1, 3]
    for shard in again.pending():
        again.write_shard(shard, tokens[SHARDS[shard]])
    again.finish()
    assert (path / "tokens/c.0.0.0").stat().st_mtime_ns == untouched
    assert all_bytes(path) == all_bytes(finished)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_frame(
    tmp_path: Path, make_writer: MakeWriter, tokens: Tokens, value: float
) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    bad = tokens[SHARDS[1]].copy()
    bad[5, 2, 1] = value
    with pytest.raises(UserError, match="frame 21;"):
        writer.write_shard(1, bad)
    assert 1 in writer.pending()


def test_a_shard_of_another_shape_or_type_is_refused(tmp_path: Path, make_writer: MakeWriter, tokens: Tokens) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    with pytest.raises(ValueError, match=r"\(16, 6, 4\)"):
        writer.write_shard(0, tokens[:15])
    with pytest.raises(ValueError, match="float32"):
        writer.write_shard(0, tokens[:16].astype(np.float32))
    assert writer.pending() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "00" * 32),
        ("image_size", 32),
        ("normalisation", ((0.0,) * 3, (1.0,) * 3)),
        ("dataset_fingerprint", ""),
    ],
)
def test_a_store_of_another_identity_is_refused_naming_the_field(
    finished: Path, make_writer: MakeWriter, identity: Identity, field: str, value: Any
) -> None:
    before = all_bytes(finished)
    with pytest.raises(UserError, match=rf"other settings \({field}: "):
        make_writer(finished, dataclasses.replace(identity, **{field: value}))
    assert all_bytes(finished) == before


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, make_writer: MakeWriter) -> None:
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"mine\.zarr"):
        make_writer(tmp_path / "mine.zarr")
    assert all_bytes(tmp_path) == {"mine.zarr/thesis.txt": b"years of work"}


def test_starting_a_store_leaves_no_scratch_folder(finished: Path) -> None:
    assert [path.name for path in finished.parent.iterdir()] == ["made-up.zarr"]


def test_a_missing_store_names_the_command() -> None:
    with pytest.raises(UserError, match=r"no/where\.zarr does not exist; .*wmcache extract"):
        TokenStore.open("no/where.zarr")


def test_another_groups_attributes_are_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr", attributes={"format": "somebody-elses"})
    with pytest.raises(UserError, match=r"other\.zarr is not a token store"):
        TokenStore.open(tmp_path / "other.zarr")
    zarr.create_group(tmp_path / "bare.zarr")
    with pytest.raises(UserError, match=r"bare\.zarr is not a token store"):
        TokenStore.open(tmp_path / "bare.zarr")


def test_another_format_version_is_refused(finished: Path) -> None:
    edit_attributes(finished, lambda attributes: attributes.update(format_version=99))
    with pytest.raises(UserError, match="format 99, this wmcache reads 2"):
        TokenStore.open(finished)


@pytest.mark.parametrize("lost", ["identity", "card"])
def test_a_store_that_has_lost_an_attribute_is_refused(finished: Path, lost: str) -> None:
    edit_attributes(finished, lambda attributes: attributes.pop(lost))
    with pytest.raises(UserError, match=r"made-up\.zarr"):
        TokenStore.open(finished)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", "<html>404</html>"])
def test_garbled_metadata_is_refused_naming_the_file(finished: Path, text: str) -> None:
    (finished / "zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"zarr\.json"):
        TokenStore.open(finished)


def test_a_store_without_its_step_table_is_refused(finished: Path) -> None:
    (finished / "state" / "zarr.json").unlink()
    with pytest.raises(UserError, match=r"made-up\.zarr"):
        TokenStore.open(finished)


def test_a_lost_part_of_the_step_table_is_not_read_as_zeros(finished: Path) -> None:
    for file in (finished / "state" / "c").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match=r"made-up\.zarr"):
        TokenStore.open(finished)
