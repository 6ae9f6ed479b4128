from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from wmcache.cache import StoreWriter, TokenStore, UserError
from wmcache.cache.layout import read_attributes, write_attributes

Tokens = NDArray[np.float16]
INDEX_BYTES = 16 * 16 + 4


def edit_attributes(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    attributes = read_attributes(path)
    edit(attributes)
    write_attributes(path, attributes)


@settings(deadline=None, max_examples=60)
@given(frames=st.lists(st.integers(0, 359), max_size=40))
@example(frames=[])
@example(frames=[359, 0, 359, 320, 319, 64, 63])
def test_gather_reads_what_zarr_reads(store: TokenStore, store_path: Path, frames: list[int]) -> None:
    reference = zarr.open_group(store_path, mode="r")["tokens"]
    found = store.gather(np.array(frames, dtype=np.int64))
    np.testing.assert_array_equal(found, reference.oindex[frames] if frames else reference[:0])
    assert found.dtype == np.float16


@settings(deadline=None, max_examples=30)
@given(
    frames=st.integers(1, 40), frames_per_shard=st.integers(1, 12), zeros=st.sets(st.integers(0, 39)), data=st.data()
)
def test_gather_reads_what_was_written_whatever_the_layout(
    tmp_path_factory: pytest.TempPathFactory,
    store: TokenStore,
    frames: int,
    frames_per_shard: int,
    zeros: set[int],
    data: st.DataObject,
) -> None:
    card = dataclasses.replace(store.card, frames=frames, frames_per_shard=frames_per_shard)
    steps = {name: getattr(store, name)[:frames] for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(tmp_path_factory.mktemp("layout") / "some.zarr", card, store.identity, steps)
    tokens = store.gather(np.arange(frames))
    tokens[[frame for frame in zeros if frame < frames]] = 0
    for shard in data.draw(st.permutations(writer.pending())):
        rows = card.shard_frames(shard)
        writer.write_shard(shard, tokens[rows.start : rows.stop])
    writer.finish()
    chosen = np.array(data.draw(st.lists(st.integers(0, frames - 1))), dtype=np.int64)
    np.testing.assert_array_equal(TokenStore.open(writer.path).gather(chosen), tokens[chosen])


def test_out_is_filled_and_returned(store: TokenStore) -> None:
    frames = np.array([5, 300, 5])
    out = np.full((3, *store.gather(frames).shape[1:]), np.nan, np.float16)
    assert store.gather(frames, out) is out
    np.testing.assert_array_equal(out, store.gather(frames))


def test_what_is_gathered_is_a_copy(store: TokenStore) -> None:
    frames = np.array([1, 2])
    first = store.gather(frames)
    expected = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(store.gather(frames), expected)


@pytest.mark.parametrize("frames", [[360], [-1], [0, 10**9]])
def test_a_frame_out_of_range_is_refused(store: TokenStore, frames: list[int]) -> None:
    with pytest.raises(IndexError, match=r"\[0, 360\)"):
        store.gather(np.array(frames))


def test_frames_must_be_a_vector(store: TokenStore) -> None:
    with pytest.raises(IndexError, match="vector"):
        store.gather(np.zeros((2, 2), np.int64))


def _flip_in_index(data: bytearray) -> None:
    data[-INDEX_BYTES + 3] ^= 1


def _flip_in_index_checksum(data: bytearray) -> None:
    data[-1] ^= 1


def _cut_tail(data: bytearray) -> None:
    del data[-50:]


def _cut_middle(data: bytearray) -> None:
    # Truncated and glued: the index is whole, the frames before it are fewer than it says.
    del data[100:200]


def _cut_to_stub(data: bytearray) -> None:
    del data[20:]


def _empty(data: bytearray) -> None:
    data.clear()


def _drop_inner_chunk(data: bytearray) -> None:
    _rewrite_entry(data, 2, 2**64 - 1, 2**64 - 1)


def _move_inner_chunk(data: bytearray) -> None:
    _rewrite_entry(data, 2, 0, 52)


def _resize_inner_chunk(data: bytearray) -> None:
    _rewrite_entry(data, 2, 2 * 52, 51)


def _rewrite_entry(data: bytearray, frame: int, offset: int, size: int) -> None:
    index = data[-INDEX_BYTES:-4]
    struct.pack_into("<QQ", index, 16 * frame, offset, size)
    data[-INDEX_BYTES:] = index + struct.pack("<I", google_crc32c.value(bytes(index)))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_in_index,
        _flip_in_index_checksum,
        _cut_tail,
        _cut_middle,
        _cut_to_stub,
        _empty,
        _drop_inner_chunk,
        _move_inner_chunk,
        _resize_inner_chunk,
    ],
)
def test_a_damaged_shard_is_named_and_the_others_are_read(
    finished: Path, tokens: Tokens, damage: Callable[[bytearray], None]
) -> None:
    file = finished / "tokens/c/1/0/0"
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    with pytest.raises(UserError, match="tokens/c/1/0/0"):
        TokenStore.open(finished).gather(np.array([16]))
    edit_attributes(finished, lambda attributes: attributes.update(complete=False))
    store = TokenStore.open(finished, allow_incomplete=True)
    with pytest.raises(UserError, match="tokens/c/1/0/0"):
        store.gather(np.array([16]))
    np.testing.assert_array_equal(store.gather(np.array([15, 32, 49])), tokens[[15, 32, 49]])


def test_a_missing_inner_chunk_is_named(finished: Path) -> None:
    file = finished / "tokens/c/1/0/0"
    data = bytearray(file.read_bytes())
    _drop_inner_chunk(data)
    file.write_bytes(data)
    with pytest.raises(UserError, match="lacks frame 18;"):
        TokenStore.open(finished).gather(np.array([16]))


def test_a_missing_shard_is_an_error_and_never_zeros(finished: Path) -> None:
    store = TokenStore.open(finished)
    (finished / "tokens/c/2/0/0").unlink()
    with pytest.raises(UserError, match="tokens/c/2/0/0"):
        store.gather(np.array([40]))
    with pytest.raises(UserError, match=r"1 of 4 shards are missing or cut short, the first is .*tokens/c/2/0/0; mend"):
        TokenStore.open(finished)


def test_zarr_sees_a_flipped_bit_in_the_tokens(finished: Path) -> None:
    # The mapped reader trades this check for speed; the checksum must be there for whoever wants to look.
    file = finished / "tokens/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(finished, mode="r")["tokens"][16:32]
