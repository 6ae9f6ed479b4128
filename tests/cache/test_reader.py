"""Every reader returns the bytes that plain zarr returns, or an error that names the damaged file."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from upath import UPath
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from wmcache.cache import TokenStore, reader
from wmcache.cache.layout import FILL, read_attributes, shard_file, write_attributes
from wmcache.cache.reader import MappedReader, MemoryReader, ZarrReader
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.paths import upload

from ..conftest import TOKENS, columns_of, make_writer, write, write_tokens

Tokens = NDArray[np.float16]
DTYPES = ("float16", "int8")
INDEX_BYTES = 16 * 16 + 4
STRIDE = 6 * 4 * 2 + 4
"""Of a frame of the made-up store: its tokens, and their checksum."""


@settings(max_examples=30)
@given(
    frames=st.integers(1, 40), frames_per_shard=st.integers(1, 12), zeros=st.sets(st.integers(0, 39)), data=st.data()
)
def test_gather_reads_what_was_written_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    store: TokenStore,
    frames: int,
    frames_per_shard: int,
    zeros: set[int],
    data: st.DataObject,
) -> None:
    card = dataclasses.replace(store.card, frames=frames, frames_per_shard=frames_per_shard)
    tokens = store.gather(np.arange(frames))
    tokens[[frame for frame in zeros if frame < frames]] = 0
    path = write_tokens(
        tmp_path_factory.mktemp("layout") / "some.zarr", tokens, card, store.identity, columns_of(store, slice(frames))
    )
    chosen = np.array(data.draw(st.lists(st.integers(0, frames - 1))), dtype=np.int64)
    np.testing.assert_array_equal(TokenStore.open(path).gather(chosen), tokens[chosen])


@pytest.mark.parametrize("frames", [[360], [-1], [0, 10**9], [[0, 1], [2, 3]]])
def test_frames_out_of_range_and_matrices_are_refused(store: TokenStore, frames: Any) -> None:
    with pytest.raises(IndexError, match=r"360|2, 2"):
        store.gather(np.array(frames))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "index": lambda data: data[:-INDEX_BYTES] + bytes([data[-INDEX_BYTES] ^ 1]) + data[1 - INDEX_BYTES :],
    "cut at the end": lambda data: data[:-50],
    "empty": lambda data: b"",
}


def rewrite_tokens(path: Path, *, adopt: bool = True, **layout: Any) -> Path:
    """Store the same tokens in another layout, as a user might to save room; the records stay."""
    group = zarr.open_group(path, mode="r+")
    values = np.asarray(group["tokens"])
    shutil.move(path / "tokens" / "commits", path / "commits")
    fill = FILL[str(values.dtype)]
    layout.setdefault("chunk_key_encoding", {"name": "default", "separator": "."})
    array = group.create_array(
        "tokens", shape=values.shape, dtype=values.dtype, fill_value=fill, overwrite=True, **layout
    )
    array[:] = values
    shutil.move(path / "commits", path / "tokens" / "commits")
    if adopt:
        digest = sha256_of(path / "tokens" / "zarr.json")
        write_attributes(path, {**read_attributes(path), "layout": digest})
    return path


def flip(file: Path, offset: int) -> None:
    """Flip a bit in place, so that it changes in memory maps too."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each dtype, of the same 50 frames; read-only."""
    folder = tmp_path_factory.mktemp("parity")
    for dtype in DTYPES:
        write(make_writer(folder / f"{dtype}.zarr", dtype=dtype))
    return {dtype: folder / f"{dtype}.zarr" for dtype in DTYPES}


def stored(path: Path) -> zarr.Array[Any]:
    array = zarr.open_group(path, mode="r")["tokens"]
    assert isinstance(array, zarr.Array)
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(batches=st.lists(st.lists(st.integers(0, 49), max_size=80), max_size=3), threads=st.integers(1, 5))
@example(batches=[[49, 0, 49, 48, 16, 15, 32, 0], [], [0]], threads=1)
@example(batches=[list(range(50)), list(reversed(range(50)))], threads=4)
def test_every_reader_returns_the_bytes_of_zarr(
    stores: dict[str, Path], dtype: str, batches: list[list[int]], threads: int
) -> None:
    path = stores[dtype]
    whole, card = np.asarray(stored(path)), TokenStore.open(path).card
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "address_space_left", lambda: 0)
        one_map = MappedReader(path, card)
    for tested in (MappedReader(path, card), one_map, ZarrReader(stored(path), card, path), MemoryReader(whole)):
        for frames in (np.array(batch, np.int64) for batch in batches):
            out = np.full((len(frames), 6, 4), 77, dtype)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reader, "BYTES_WORTH_A_THREAD", 100)
                patch.setattr(reader, "COPY_THREADS", threads)
                tested.prefetch(frames)
                tested.gather(frames, out)
            assert out.tobytes() == whole[frames].tobytes(), type(tested).__name__


@pytest.fixture
def few_files() -> Iterator[int]:
    """A low limit of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 2 * len(list(Path("/proc/self/fd").iterdir())) + 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_store_may_have_more_shards_than_the_limit_of_open_files(
    tmp_path: Path, stores: dict[str, Path], few_files: int
) -> None:
    store, frames = TokenStore.open(stores["float16"]), few_files + 20
    card = dataclasses.replace(store.card, frames=frames, frames_per_shard=1)
    rows = np.arange(frames) % 50
    tokens = store.gather(rows)
    path = write_tokens(tmp_path / "many.zarr", tokens, card, store.identity, columns_of(store, rows))
    many = TokenStore.open(path)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(frames)
        many.prefetch(order)
        np.testing.assert_array_equal(many.gather(order), tokens[order])


def with_index(*codecs: Any) -> dict[str, Any]:
    codec = ShardingCodec(chunk_shape=(1, 6, 4), codecs=[BytesCodec(), Crc32cCodec()], index_codecs=codecs)
    return {"chunks": (16, 6, 4), "serializer": codec, "compressors": None}


PLAIN = {"chunks": (1, 6, 4), "shards": (16, 6, 4), "compressors": Crc32cCodec()}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zstd, same shards": {**PLAIN, "compressors": ZstdCodec(level=3)},
    "zstd and checksum": {**PLAIN, "compressors": (ZstdCodec(level=3), Crc32cCodec())},
    "blosc, no shards": {"chunks": (7, 6, 4), "compressors": BloscCodec(cname="lz4")},
    "blosc, frames in parts": {"chunks": (5, 3, 2), "shards": (10, 6, 4), "compressors": BloscCodec(cname="zstd")},
    "gzip, one chunk": {"chunks": (50, 6, 4), "compressors": GzipCodec()},
    "plain, no checksums": {**PLAIN, "compressors": None},
    "plain, big-endian": {**PLAIN, "serializer": BytesCodec(endian="big")},
    "plain, transposed": {**PLAIN, "filters": TransposeCodec(order=(0, 2, 1))},
    "plain, the index in front": {**PLAIN, "shards": {"shape": (16, 6, 4), "index_location": "start"}},
    "plain, other names of shards": {**PLAIN, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "plain, an index without a checksum": with_index(BytesCodec()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_rewritten_in_another_layout_reads_the_same(
    tmp_path: Path, stores: dict[str, Path], dtype: str, layout: str
) -> None:
    copy = rewrite_tokens(Path(shutil.copytree(stores[dtype], tmp_path / "copy.zarr")), **LAYOUTS[layout])
    store, original = TokenStore.open(copy), TokenStore.open(stores[dtype])
    for seed in range(3):
        frames = np.random.default_rng(seed).integers(0, 50, 30)
        np.testing.assert_array_equal(store.gather_stored(frames), original.gather_stored(frames))
        np.testing.assert_array_equal(store.gather(frames), original.gather(frames))
    assert store.gather(frames[:0]).shape == (0, 6, 4)
    np.testing.assert_array_equal(store.load(), original.load())


@pytest.mark.parametrize("adopt", [False, True])
def test_a_store_that_another_program_compressed_is_not_sound(
    tmp_path: Path, stores: dict[str, Path], adopt: bool
) -> None:
    copy = Path(shutil.copytree(stores["float16"], tmp_path / "copy.zarr"))
    faults = verify(rewrite_tokens(copy, adopt=adopt, **LAYOUTS["zstd, same shards"])).faults
    assert [fault.shard for fault in faults] == [None] * (not adopt) + [0, 1, 2, 3]
    assert ("tokens/zarr.json" in faults[0].reason) != adopt


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lost_chunk_of_a_compressed_store_is_an_error(tmp_path: Path, stores: dict[str, Path], dtype: str) -> None:
    copy = rewrite_tokens(Path(shutil.copytree(stores[dtype], tmp_path / "copy.zarr")), **LAYOUTS["blosc, no shards"])
    expected = TokenStore.open(stores[dtype]).gather(np.array([6, 14]))
    shard_file(copy, 1).unlink()
    store = TokenStore.open(copy)
    np.testing.assert_array_equal(store.gather(np.array([6, 14])), expected)
    with pytest.raises(UserError, match="frame 9;") as caught:
        store.gather(np.array([6, 13, 9, 14]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["zstd, same shards", "zstd and checksum", "blosc, no shards", "gzip, one chunk"])
def test_a_damaged_chunk_of_a_compressed_store_is_an_error(
    tmp_path: Path, stores: dict[str, Path], layout: str
) -> None:
    copy = rewrite_tokens(Path(shutil.copytree(stores["float16"], tmp_path / "copy.zarr")), **LAYOUTS[layout])
    file = shard_file(copy, 0)
    file.write_bytes(b"not a zarr chunk" * (file.stat().st_size // 16))
    with pytest.raises(UserError, match=r"copy\.zarr/tokens") as caught:
        TokenStore.open(copy).gather(np.array([3]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_store_opened_by_its_address_reads_the_same(
    stores: dict[str, Path], bucket: UPath, dtype: str, protocol: str
) -> None:
    upload(stores[dtype], bucket / "some.zarr", last="zarr.json")
    address = stores[dtype].as_uri() if protocol == "file" else "memory://bucket/some.zarr"
    original, far = TokenStore.open(stores[dtype]), TokenStore.open(address)
    frames = np.array([49, 0, 49, 16, 15, 31, 32])
    far.prefetch(frames)
    np.testing.assert_array_equal(far.gather(frames), original.gather(frames))
    np.testing.assert_array_equal(far.gather_stored(frames), original.gather_stored(frames))
    for name in ("mean", "std", "action", "state", "episode", "step"):
        np.testing.assert_array_equal(getattr(far, name), getattr(original, name))
    assert (far.card, far.identity, far.complete) == (original.card, original.identity, True)
    with pytest.raises(IndexError, match=r"\[0, 50\)"):
        far.gather(np.array([50]))
    windows, expected = far.windows(), original.windows()
    for name, value in expected.batch(np.arange(len(expected))).items():
        np.testing.assert_array_equal(windows.batch(np.arange(len(windows)))[name], value)
    np.testing.assert_array_equal(far.load(), original.load())
    np.testing.assert_array_equal(far.gather(frames), original.gather(frames))


def test_checksums_are_compared_on_the_first_read_only(finished: Path) -> None:
    store = TokenStore.open(finished)
    store.gather(np.array([20]))
    for frame in (20, 21):
        flip(shard_file(finished, 1), (frame - 16) * STRIDE)
    found = store.gather(np.array([20]))
    assert found[0].view(np.uint16)[0, 0] == TOKENS[20].view(np.uint16)[0, 0] ^ 1
    with pytest.raises(UserError, match=r"frame 21 in .*tokens/c\.1\.0\.0 .* wmcache repair"):
        store.gather(np.array([20, 21]))
    with pytest.raises(UserError, match="frame 20 "):
        TokenStore.open(finished).gather(np.array([20]))
    np.testing.assert_array_equal(TokenStore.open(finished).gather(np.array([19, 22])), TOKENS[[19, 22]])


@pytest.mark.parametrize("damage", DAMAGES)
def test_prefetching_a_damaged_shard_is_not_an_error(finished: Path, damage: str) -> None:
    fresh, used = (MappedReader(finished, TokenStore.open(finished).card) for _ in range(2))
    used.gather(np.array([17]), np.empty((1, 6, 4), np.float16))
    data = DAMAGES[damage](shard_file(finished, 1).read_bytes())
    with shard_file(finished, 1).open("r+b") as stream:  # the same file, so that its map sees it
        stream.write(data)
        stream.truncate()
    for tested in (fresh, used):
        tested.prefetch(np.array([0, 17, 31, 49]))
    with pytest.raises(UserError, match=r"tokens/c\.1\.0\.0"):
        fresh.gather(np.array([31]), np.empty((1, 6, 4), np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_store_reads_from_memory(tmp_path: Path, stores: dict[str, Path], dtype: str) -> None:
    copy = Path(shutil.copytree(stores[dtype], tmp_path / "copy.zarr"))
    store, frames = TokenStore.open(copy), np.array([49, 0, 16, 49, 31])
    before, before_stored = store.gather(frames), store.gather_stored(frames)
    loaded = store.load()
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, np.asarray(stored(stores[dtype])))
    shutil.rmtree(copy / "tokens")
    assert store.load() is loaded
    np.testing.assert_array_equal(store.gather(frames), before)
    np.testing.assert_array_equal(store.gather_stored(frames), before_stored)
    out = np.full_like(before, 77)
    assert store.gather(frames, out) is out
    np.testing.assert_array_equal(out, before)
