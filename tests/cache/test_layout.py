"""What lies where in a store, and how one tells that it is not as it was written."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.layout import (
    FILL,
    DamagedError,
    check_columns,
    column_sha256,
    is_mappable,
    open_group,
    read_attributes,
    read_card,
    read_column,
    shard_file,
    write_attributes,
)
from wmcache.cache.records import Records
from wmcache.common.errors import UserError
from wmcache.common.files import read_json, require_seal, seal, write_json

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


@pytest.fixture(scope="session")
def card(make_writer: MakeWriter, tmp_path_factory: pytest.TempPathFactory) -> StoreCard:
    """50 frames of [6, 4] in shards of 16."""
    return make_writer(tmp_path_factory.mktemp("card") / "some.zarr").card


@given(value=json_objects)
@example(value={"tuple": (1, 2), "exact": 0.1, "small": -0.0, "name": "Läufe"})
def test_what_is_sealed_stays_whole_through_a_file(value: dict[str, Any]) -> None:
    sealed = json.loads(json.dumps(seal(value), indent=2))
    assert require_seal(sealed, WHERE, "hint it") is sealed
    assert {name: item for name, item in sealed.items() if name != "checksum"} == json.loads(json.dumps(value))


@given(value=json_objects, name=st.text(), other=json_values)
@example(value={"bytes": 100, "sum": [0.5, 1.0]}, name="bytes", other=101)
@example(value={"frames": [0, 16]}, name="frames", other=[0, 17])
@example(value={"complete": False}, name="complete", other=True)
def test_no_value_can_be_changed_or_added_unseen(value: dict[str, Any], name: str, other: Any) -> None:
    sealed = seal(value)
    if name in sealed and json.dumps(sealed[name]) == json.dumps(other):
        return
    with pytest.raises(UserError, match=r"some/file\.json differs from its own checksum; hint it") as caught:
        require_seal({**sealed, name: other}, WHERE, "hint it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["frames", "sum", "checksum"])
def test_no_value_can_be_lost_unseen(lost: str) -> None:
    sealed = seal({"frames": [0, 16], "sum": [0.5, 1.0]})
    del sealed[lost]
    with pytest.raises(UserError, match="checksum"):
        require_seal(sealed, WHERE, "hint it")


def test_every_byte_of_the_attributes_is_under_the_seal(finished: Path) -> None:
    file = finished / "zarr.json"
    whole, meant = file.read_bytes(), read_attributes(finished)
    said = []
    for place in np.random.default_rng(0).choice(len(whole), 300, replace=False).tolist():
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        try:
            found = read_attributes(finished)
        except DamagedError as error:
            said.append(str(error))
            continue
        # A space that became another, or a byte that is not of the attributes.
        assert found == meant, f"byte {place}"
    assert len(said) > 200
    assert all(str(file) in line and "\n" not in line for line in said)


def test_attributes_are_replaced_as_a_whole_and_sealed_anew(finished: Path) -> None:
    before = read_attributes(finished)
    write_attributes(finished, {**before, "complete": False, "mean": [1.5] * 4})
    after = read_attributes(finished)
    assert after["checksum"] != before["checksum"]
    assert {**after, "checksum": 0} == {**before, "complete": False, "mean": [1.5] * 4, "checksum": 0}
    assert zarr.open_group(finished, mode="r").attrs["mean"] == [1.5] * 4
    write_attributes(finished, before)
    assert read_attributes(finished) == before


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 0},
        {"frames": -50},
        {"frames": 50.0},
        {"frames": True},
        {"frames": "50"},
        {"frames": None},
        {"frames": 2**40},
        {"frames_per_shard": 0},
        {"frames_per_shard": 2**64},
        {"frames_per_shard": [16]},
        {"token_dim": 0},
        {"token_dim": 1e3},
        {"token_grid": []},
        {"token_grid": [6]},
        {"token_grid": [1, 2, 3]},
        {"token_grid": [0, 3]},
        {"token_grid": [2, -3]},
        {"token_grid": 6},
        {"token_grid": None},
        {"token_grid": "23"},
        {"dtype": "float64"},
        {"dtype": ""},
        {"dtype": None},
        {"dtype": ["float16"]},
        {"dtype": {}},
        {"dataset": []},
        {"dataset": None},
        {"encoder": "tcn"},
        {"unheard": "of"},
    ],
    ids=repr,
)
def test_a_card_that_no_store_has_is_one_line_of_error(card: StoreCard, change: dict[str, Any]) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(card)))
    assert read_card({"card": values}) == card
    with pytest.raises(UserError, match="card is damaged") as caught:
        read_card({"card": {**values, **change}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["encoder", "dataset", "token_grid", "token_dim", "frames", "frames_per_shard"])
def test_a_card_that_lacks_something_is_one_line_of_error(card: StoreCard, lost: str) -> None:
    values = dataclasses.asdict(card)
    del values[lost]
    with pytest.raises(UserError, match=f"card is damaged .*{lost}"):
        read_card({"card": values})


def test_a_card_without_a_dtype_is_of_float16(card: StoreCard) -> None:
    values = dataclasses.asdict(card)
    del values["dtype"]
    assert read_card({"card": values}) == card


def test_shards_cover_every_frame_once(card: StoreCard) -> None:
    for frames in (1, 15, 16, 17, 32, 50):
        some = dataclasses.replace(card, frames=frames)
        covered = [frame for shard in range(some.num_shards) for frame in some.shard_frames(shard)]
        assert covered == list(range(frames))


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
def test_a_shards_file_has_the_bytes_that_are_expected(
    tmp_path: Path,
    card: StoreCard,
    identity: Identity,
    dtype: str,
    frames: int,
    frames_per_shard: int,
    grid: Any,
    dim: int,
) -> None:
    some = dataclasses.replace(
        card, dtype=dtype, frames=frames, frames_per_shard=frames_per_shard, token_grid=grid, token_dim=dim
    )
    steps: dict[str, NDArray[Any]] = {
        "action": np.zeros((frames, 2), np.float32),
        "state": np.zeros((frames, 4)),
        "episode": np.zeros(frames, np.int32),
        "step": np.arange(frames, dtype=np.int32),
    }
    writer = StoreWriter.create(tmp_path / "some.zarr", some, identity, steps)
    tokens = np.random.default_rng(0).normal(size=(frames, *some.frame_shape)).astype(np.float16)
    tokens[0] = 0  # zarr leaves out what equals its fill value
    for shard in writer.pending():
        rows = some.shard_frames(shard)
        writer.write_shard(shard, tokens[rows.start : rows.stop])
        size = shard_file(writer.path, shard).stat().st_size
        assert size == some.shard_bytes(shard)
        assert Records(writer.path, some, identity).read(shard).bytes == size
    assert sum(len(some.shard_frames(shard)) for shard in range(some.num_shards)) * some.frame_bytes == some.token_bytes


def make_array(path: Path, card: StoreCard, **layout: Any) -> zarr.Array[Any]:
    usual: dict[str, Any] = {
        "shape": (card.frames, *card.frame_shape),
        "chunks": (1, *card.frame_shape),
        "shards": (card.frames_per_shard, *card.frame_shape),
        "dtype": card.dtype,
        "compressors": Crc32cCodec(),
        "fill_value": FILL[card.dtype],
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
    return zarr.create_array(path / "some.zarr", **{**usual, **layout})


def index_without_checksum(card: StoreCard) -> dict[str, Any]:
    codec = ShardingCodec(
        chunk_shape=(1, *card.frame_shape), codecs=[BytesCodec(), Crc32cCodec()], index_codecs=[BytesCodec()]
    )
    whole = (card.frames_per_shard, *card.frame_shape)
    return {"chunks": whole, "shards": None, "serializer": codec, "compressors": None}


def index_in_big_endian(card: StoreCard) -> dict[str, Any]:
    codec = ShardingCodec(
        chunk_shape=(1, *card.frame_shape),
        codecs=[BytesCodec(), Crc32cCodec()],
        index_codecs=[BytesCodec(endian="big"), Crc32cCodec()],
    )
    whole = (card.frames_per_shard, *card.frame_shape)
    return {"chunks": whole, "shards": None, "serializer": codec, "compressors": None}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_a_writer_writes_can_be_mapped(tmp_path: Path, card: StoreCard, dtype: str) -> None:
    card = dataclasses.replace(card, dtype=dtype)
    assert is_mappable(make_array(tmp_path, card), card)


@pytest.mark.parametrize(
    "layout",
    [
        {"compressors": None},
        {"compressors": ZstdCodec()},
        {"compressors": (ZstdCodec(), Crc32cCodec())},
        {"compressors": BloscCodec()},
        {"compressors": (Crc32cCodec(), Crc32cCodec())},
        {"filters": TransposeCodec(order=(0, 2, 1))},
        {"serializer": BytesCodec(endian="big")},
        {"chunks": (2, 6, 4)},
        {"chunks": (1, 3, 4)},
        {"shards": (8, 6, 4)},
        {"shards": None},
        {"shards": {"shape": (16, 6, 4), "index_location": "start"}},
        {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"chunk_key_encoding": {"name": "default", "separator": "/"}},
        {"zarr_format": 2, "shards": None, "compressors": None, "chunk_key_encoding": None},
        index_without_checksum,
        index_in_big_endian,
    ],
    # Up to a set of a codec's, whose order differs between the processes that tests are spread over.
    ids=lambda layout: layout.__name__ if callable(layout) else repr(layout).partition("_tunable_attrs")[0],
)
def test_what_lies_in_any_other_way_is_not_mapped(
    tmp_path: Path, card: StoreCard, layout: dict[str, Any] | Callable[[StoreCard], dict[str, Any]]
) -> None:
    array = make_array(tmp_path, card, **(layout(card) if callable(layout) else layout))
    assert not is_mappable(array, card)


def test_a_card_of_another_shape_is_not_mapped(tmp_path: Path, card: StoreCard) -> None:
    array = make_array(tmp_path, card)
    for change in ({"token_grid": (3, 3)}, {"token_dim": 8}, {"frames_per_shard": 8}):
        assert not is_mappable(array, dataclasses.replace(card, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [50, 6, 5]},
        {"shape": [51, 6, 4]},
        {"data_type": "float32"},
        {"fill_value": 0.0},
        {"node_type": "group"},
    ],
    ids=repr,
)
def test_tokens_whose_description_does_not_fit_the_card_are_refused(finished: Path, change: dict[str, Any]) -> None:
    file = finished / "tokens" / "zarr.json"
    write_json(file, {**read_json(file, ""), **change})
    with pytest.raises(
        DamagedError, match=r"tokens/zarr\.json does not fit the store .* run its wmcache extract again"
    ):
        TokenStore.open(finished)


def _more_rows(path: Path) -> None:
    file = path / "state" / "zarr.json"
    values = copy.deepcopy(read_json(file, ""))
    values["shape"] = [10**15, 4]
    write_json(file, values)


def _wider_rows(path: Path) -> None:
    file = path / "state" / "zarr.json"
    values = copy.deepcopy(read_json(file, ""))
    values["shape"] = [50, 10**15]
    write_json(file, values)


def _other_values(path: Path) -> None:
    zarr.open_group(path, mode="r+")["state"][3, 2] += 1  # type: ignore[index, operator]


def _no_chunk(path: Path) -> None:
    (path / "state" / "c" / "0" / "0").unlink()


def _torn_chunk(path: Path) -> None:
    file = path / "state" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-9])


def _other_column(path: Path) -> None:
    (path / "state").rename(path / "lost")
    (path / "action").rename(path / "state")


def _a_group(path: Path) -> None:
    write_json(path / "state" / "zarr.json", {"zarr_format": 3, "node_type": "group"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        # Before anything of that size is allocated.
        (_more_rows, "state cannot be relied on (it has 1000000000000000 rows for 50)"),
        (_wider_rows, "state cannot be relied on (it has 1000000000000000 values a row)"),
        (_no_chunk, "state cannot be relied on (a chunk is missing)"),
        (_other_values, "state cannot be relied on (it differs from its checksum)"),
        (_torn_chunk, "state cannot be relied on ("),
        (_other_column, "action cannot be relied on ("),
        (_a_group, "state cannot be relied on (it is no array)"),
    ],
)
def test_a_column_that_is_not_what_was_written_is_refused_by_name(
    finished: Path, card: StoreCard, damage: Callable[[Path], None], said: str
) -> None:
    attributes, group = read_attributes(finished), open_group(finished)
    assert attributes["columns"].keys() == {"action", "state", "episode", "step", "sha256"}
    for name in attributes["columns"]:
        array = np.asarray(group[name])
        np.testing.assert_array_equal(read_column(group, card, name, attributes["columns"], finished), array)
    check_columns(group, card, attributes["columns"], finished)
    damage(finished)
    with pytest.raises(DamagedError, match=re.escape(f"{finished}/{said}")) as caught:
        check_columns(open_group(finished), card, attributes["columns"], finished)
    assert str(caught.value).endswith("; run its wmcache extract again")
    assert "\n" not in str(caught.value)


def test_a_column_must_be_listed(finished: Path, card: StoreCard) -> None:
    columns = read_attributes(finished)["columns"]
    del columns["step"]
    with pytest.raises(DamagedError, match="lists no step"):
        check_columns(zarr.open_group(finished, mode="r"), card, columns, finished)


def test_a_columns_checksum_is_over_type_shape_and_values() -> None:
    values = np.arange(6, dtype=np.int32)
    others = [values.reshape(2, 3), values.view(np.float32), values.astype(np.int64), values[::-1], values + 1]
    sums = [column_sha256(other) for other in (values, *others)]
    assert len(set(sums)) == len(sums)
    assert column_sha256(values[::-1]) == column_sha256(values[::-1].copy())
