"""A folder and a bucket are handled alike; what appears is whole, and what goes wrong is an OSError with a reason."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, sha256_of
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.paths import (
    AnyPath,
    Found,
    absolute,
    as_path,
    exists,
    files_in,
    free_space,
    is_local,
    names_in,
    open_to_read,
    put,
    read_bytes,
    reading_hint,
    remove,
    size_of,
    stamp,
    upload,
)
from wmcache.common.space import require_space
from wmcache.common.storage import as_os_errors


@pytest.fixture(params=["folder", "bucket"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path, bucket: UPath) -> AnyPath:
    return tmp_path if request.param == "folder" else bucket / "folder"


@pytest.mark.parametrize("text", ["s3:/one/slash", "file://relative/folder", "s3://", "file://"])
def test_what_is_nearly_a_url_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        as_path(text)


def test_a_path_is_a_path(tmp_path: Path) -> None:
    for text in ("data/stores", "/data/some store.zarr", "./s3:/one/slash", "C:data", ""):
        assert as_path(text) == Path(text)
    assert as_path(f"file://{tmp_path}/x.zarr") == tmp_path / "x.zarr"
    assert as_path(tmp_path) is tmp_path
    assert is_local(as_path("x"))


def test_a_url_stays_what_it_is(bucket: UPath) -> None:
    found = as_path("memory://bucket/a/x.zarr")
    assert not is_local(found)
    assert str(found) == absolute(found) == "memory://bucket/a/x.zarr"
    assert str(found / "tokens" / "c.0.0.0") == "memory://bucket/a/x.zarr/tokens/c.0.0.0"
    assert as_path(found) is found


def test_a_path_means_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(Path("x.zarr")) == str(tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abacus://bucket/x", r"abacus://bucket/x cannot be used \(.*abacus.*\); check the address and its settings"),
        ("s3://", r"s3:// names no place; write s3://bucket/folder"),
        ("memory:///", r"memory:/// names no place; write memory://bucket/folder"),
    ],
)
def test_an_address_of_nothing_is_one_line_of_error(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        as_path(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "module", "hint"),
    [
        ("s3://bucket/x", "s3fs", "pip install 'wmcache[s3]'"),
        ("gs://bucket/x", "gcsfs", "pip install the file system that fsspec names for it"),
    ],
)
def test_a_file_system_that_is_not_installed_says_how_to_get_it(text: str, module: str, hint: str) -> None:
    # In another process: here it may be imported already.
    script = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from wmcache.common.errors import UserError\nfrom wmcache.common.paths import as_path\n"
        "try: as_path(sys.argv[1])\nexcept UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, text, module], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{text}: there is no file system for {text[:2]}:// here (")
    assert done.stdout.endswith(f"; {hint}\n")
    assert done.stdout.count("\n") == 1


def test_naming_a_path_costs_no_import_of_object_stores() -> None:
    script = (
        "import sys; from wmcache.common.paths import as_path; as_path('a/b'); as_path('file:///a');"
        "print([name for name in ('upath', 'fsspec', 's3fs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "upath" not in done.stdout
    assert "s3fs" not in done.stdout


def test_what_is_written_is_there_and_what_is_removed_is_not(somewhere: AnyPath) -> None:
    at = somewhere / "a" / "file.bin"
    assert not exists(at)
    assert not exists(somewhere / "a")
    with atomic_write(at) as file:
        file.write(b"content")
    assert exists(at)
    assert exists(somewhere / "a")
    assert (read_bytes(at), size_of(at)) == (b"content", 7)
    assert sha256_of(at) == hashlib.sha256(b"content").hexdigest()
    with open_to_read(at) as opened:
        assert opened.read() == b"content"
        opened.seek(3)
        assert opened.read(2) == b"te"
    remove(at)
    assert not exists(at)
    remove(at)  # nothing there: nothing to do
    remove(somewhere / "none" / "of this")


def test_a_folder_is_removed_with_all_that_is_in_it(somewhere: AnyPath) -> None:
    for name in ("a/b/c", "a/d", "e"):
        with atomic_write(somewhere / name) as file:
            file.write(b"x")
    remove(somewhere / "a")
    assert names_in(somewhere) == ["e"]
    assert not exists(somewhere / "a")


def test_what_cannot_be_finished_never_appears(somewhere: AnyPath) -> None:
    write_json(somewhere / "known.json", {"a": 1})
    for name in ("known.json", "new.json"):
        with pytest.raises(ZeroDivisionError), atomic_write(somewhere / name) as file:
            file.write(b"half" * (1 // 0))
    assert names_in(somewhere) == ["known.json"]
    assert read_json(somewhere / "known.json", "") == {"a": 1}


def test_a_folder_is_listed_by_the_beginnings_of_names(somewhere: AnyPath) -> None:
    for name in ("c.1.0.0", "c.10.0.0", "d", "c.2/inside"):
        with atomic_write(somewhere / name) as file:
            file.write(b"x" * len(name))
    files = dict(files_in(somewhere, "c."))
    assert {name: found.bytes for name, found in files.items()} == {"c.1.0.0": 7, "c.10.0.0": 8}
    assert set(names_in(somewhere, "c.1")) == {"c.1.0.0", "c.10.0.0"}
    assert list(files_in(somewhere / "none")) == []
    assert names_in(somewhere / "none") == []


def test_a_stamp_tells_a_file_from_the_one_that_was_there(somewhere: AnyPath) -> None:
    at = somewhere / "file"
    stamps = set()
    for content in (b"a", b"bc", b"d"):
        with atomic_write(at) as file:
            file.write(content)
        stamps.add(stamp(at))
        assert stamp(at) in stamps
    assert len(stamps) == 3
    with pytest.raises(FileNotFoundError):
        stamp(somewhere / "none")


@pytest.mark.parametrize("function", [read_bytes, size_of, sha256_of, stamp])
def test_what_is_not_there_is_a_file_that_is_not_found(somewhere: AnyPath, function: Callable[[AnyPath], Any]) -> None:
    with pytest.raises(FileNotFoundError):
        function(somewhere / "none")
    with pytest.raises(UserError, match=r"none\.json does not exist; make it"):
        read_json(somewhere / "none.json", "make it")


def test_an_object_can_be_put_only_where_there_is_none(bucket: UPath) -> None:
    at = bucket / "x"
    put(at, b"first", new=True)
    with pytest.raises(FileExistsError):
        put(at, b"second", new=True)
    assert read_bytes(at) == b"first"
    put(at, b"third")
    assert read_bytes(at) == b"third"


def test_the_last_object_of_a_folder_is_put_last(
    tmp_path: Path, bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zarr.json", "a/zarr.json", "z/c/0"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(name)
    order = []

    def note(at: UPath, data: bytes, *, new: bool = False) -> str | None:
        order.append(str(at).removeprefix(str(bucket)))
        return put(at, data, new=new)

    monkeypatch.setattr("wmcache.common.paths.put", note)
    assert upload(tmp_path / "x", bucket / "x", last="zarr.json")
    assert order[-1] == "/x/zarr.json"
    assert sorted(order) == ["/x/a/zarr.json", "/x/z/c/0", "/x/zarr.json"]
    (tmp_path / "x" / "zarr.json").write_text("another")
    assert not upload(tmp_path / "x", bucket / "x", last="zarr.json")
    assert read_bytes(bucket / "x" / "zarr.json") == b"zarr.json"


class FailedError(Exception):
    """What a file system far away may raise."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FailedError("Access\nDenied  here"), "Access Denied here"),
        (FailedError(), "FailedError"),
        (TimeoutError("too late"), "too late"),
        (FailedError("x" * 1000), "x" * 200),
    ],
)
def test_whatever_is_raised_is_an_os_error_of_one_line(error: Exception, said: str) -> None:
    with pytest.raises(OSError, match=re.escape(said)) as caught, as_os_errors(Path("bucket/x")):
        raise error
    assert (caught.value.strerror, caught.value.filename) == (said, "bucket/x")


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError("bucket/x"), "it does not exist"), (FileNotFoundError("no such bucket"), "no such bucket")],
)
def test_what_is_not_there_says_so(error: Exception, said: str) -> None:
    with pytest.raises(FileNotFoundError) as caught, as_os_errors(Path("bucket/x")):
        raise error
    assert (caught.value.strerror, caught.value.filename) == (said, "bucket/x")


def test_who_wants_to_stop_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt), as_os_errors(Path("x")):
        raise KeyboardInterrupt


FAILING: list[Callable[[AnyPath], Any]] = [exists, read_bytes, size_of, stamp, remove, names_in, open_to_read]


@pytest.mark.parametrize("function", FAILING)
def test_a_server_that_fails_is_an_os_error(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch, function: Callable[[AnyPath], Any]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FailedError("503 Slow Down")

    put(bucket / "x", b"x")
    for name in ("exists", "cat_file", "info", "find", "rm", "ls"):
        monkeypatch.setattr(type(bucket.fs), name, fail)
    with pytest.raises(OSError, match="503 Slow Down"):
        function(bucket / "x")
    monkeypatch.undo()


def test_a_server_that_takes_nothing_is_one_line(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> Any:
        raise FailedError("AccessDenied")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.fs), "pipe_file", deny)
        with pytest.raises(
            UserError, match=r"^cannot write memory://bucket/x: AccessDenied; check address, credentials and network"
        ):
            write_json(bucket / "x", {})
    assert reading_hint(bucket) == "check address, credentials and network, then run it again"
    assert reading_hint(Path("x")) == "make it readable"


def test_an_object_store_has_no_end(bucket: UPath, tmp_path: Path) -> None:
    assert free_space(bucket) is None
    require_space(bucket, 10**18, "the store")
    with pytest.raises(UserError, match="the store needs"):
        require_space(tmp_path, 10**18, "the store")


def test_a_found_file_says_its_checksum_only_where_it_is_one() -> None:
    assert Found(3) == Found(3, None)
