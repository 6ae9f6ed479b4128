"""Where things are in a store, and how a change of them is detected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.cache.arrays import column_sha256
from wmcache.cache.layout import DamagedError, read_attributes, read_card, shard_file, write_attributes
from wmcache.cache.records import Records
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import require_seal, seal

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
WHERE = Path("some/file.json")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text().filter(lambda name: name != "checksum"), json_values, max_size=5)


@given(value=json_objects)
@example(value={"tuple": (1, 2), "exact": 0.1, "small": -0.0, "name": "Läufe"})
def test_a_sealed_object_passes_through_json(value: dict[str, Any]) -> None:
    sealed = json.loads(json.dumps(seal(value), indent=2))
    assert require_seal(sealed, WHERE, "HINT") is sealed
    assert {name: item for name, item in sealed.items() if name != "checksum"} == json.loads(json.dumps(value))


@given(value=json_objects, name=st.text(), other=json_values)
@example(value={"bytes": 100, "sum": [0.5, 1.0]}, name="bytes", other=101)
@example(value={"frames": [0, 16]}, name="frames", other=[0, 17])
@example(value={"complete": False}, name="complete", other=True)
def test_a_changed_or_added_value_is_detected(value: dict[str, Any], name: str, other: Any) -> None:
    sealed = seal(value)
    if name in sealed and json.dumps(sealed[name]) == json.dumps(other):
        return
    with pytest.raises(UserError, match=r"some/file\.json.*; HINT") as caught:
        require_seal({**sealed, name: other}, WHERE, "HINT")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["frames", "sum", "checksum"])
def test_a_lost_value_is_detected(lost: str) -> None:
    sealed = seal({"frames": [0, 16], "sum": [0.5, 1.0]})
    del sealed[lost]
    with pytest.raises(UserError, match=r"some/file\.json"):
        require_seal(sealed, WHERE, "HINT")


def test_a_changed_byte_of_the_attributes_is_detected(finished: Path) -> None:
    file = finished / "zarr.json"
    whole, expected = file.read_bytes(), read_attributes(finished)
    refused = []
    for offset in np.random.default_rng(0).choice(len(whole), 300, replace=False).tolist():
        data = bytearray(whole)
        data[offset] ^= 1
        file.write_bytes(data)
        try:
            found = read_attributes(finished)
        except DamagedError as error:
            refused.append(str(error))
            continue
        # White space, or a byte outside of the attributes.
        assert found == expected, f"byte {offset}"
    assert len(refused) > 200
    assert all(str(file) in line and "\n" not in line for line in refused)


def test_attributes_are_replaced_and_sealed_again(finished: Path) -> None:
    before = read_attributes(finished)
    write_attributes(finished, {**before, "complete": False, "mean": [1.5] * 4})
    after = read_attributes(finished)
    assert after["checksum"] != before["checksum"]
    assert {**after, "checksum": 0} == {**before, "complete": False, "mean": [1.5] * 4, "checksum": 0}
    assert zarr.open_group(finished, mode="r").attrs["mean"] == [1.5] * 4
    write_attributes(finished, before)
    assert read_attributes(finished) == before


def test_a_card_needs_all_fields_but_the_dtype(card: StoreCard) -> None:
    values = dataclasses.asdict(card)
    for name in values:
        rest = {"card": {field: value for field, value in values.items() if field != name}}
        if name == "dtype":
            assert read_card(rest) == card
        else:
            with pytest.raises(UserError, match=name):
                read_card(rest)


def test_shards_cover_every_frame_once(card: StoreCard) -> None:
    for frames in (1, 15, 16, 17, 32, 50):
        some = dataclasses.replace(card, frames=frames)
        assert [frame for shard in range(some.num_shards) for frame in some.shard_frames(shard)] == [*range(frames)]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("frames", "frames_per_shard", "grid", "dim"),
    [
        (50, 16, (2, 3), 4),
        (32, 16, (2, 3), 4),
        (1, 1, (1, 1), 1),
        (3, 7, (1, 1), 5),
        (9, 2, (3, 1), 3),
        (33, 11, (1, 5), 2),
    ],
)
def test_a_shards_file_has_the_expected_size(
    tmp_path: Path,
    card: StoreCard,
    identity: Identity,
    steps: dict[str, NDArray[Any]],
    dtype: str,
    frames: int,
    frames_per_shard: int,
    grid: Any,
    dim: int,
) -> None:
    some = StoreCard({}, {}, grid, dim, frames, frames_per_shard, dtype)
    rows = {name: values[:frames] for name, values in steps.items()}
    writer = StoreWriter.create(tmp_path / "some.zarr", some, identity, rows)
    tokens = np.random.default_rng(0).normal(size=(frames, *some.frame_shape)).astype(np.float16)
    tokens[0] = 0  # zarr would leave out its fill value
    for shard in writer.pending():
        part = some.shard_frames(shard)
        writer.write_shard(shard, tokens[part.start : part.stop])
        assert shard_file(writer.path, shard).stat().st_size == some.shard_bytes(shard)
        assert Records(writer.path, some, identity).read(shard).bytes == some.shard_bytes(shard)
    assert sum(len(some.shard_frames(shard)) for shard in range(some.num_shards)) == frames
    assert some.token_bytes == tokens.nbytes // (2 if dtype == "int8" else 1)


def test_a_columns_checksum_covers_dtype_shape_and_values() -> None:
    values = np.arange(6, dtype=np.int32)
    others = [values.reshape(2, 3), values.view(np.float32), values.astype(np.int64), values[::-1], values + 1]
    sums = [column_sha256(other) for other in (values, *others)]
    assert len(set(sums)) == len(sums)
    assert column_sha256(values[::-1]) == column_sha256(values[::-1].copy())
