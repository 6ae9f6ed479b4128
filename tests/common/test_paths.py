"""The same functions for local files and objects, and errors of one line."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from wmcache.common import paths
from wmcache.common.errors import MissingError, UserError
from wmcache.common.files import atomic_write, sha256_of, write_whole
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.paths import AnyPath, as_path
from wmcache.common.space import require_space


@pytest.fixture(params=["folder", "bucket"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path, bucket: UPath) -> AnyPath:
    return tmp_path if request.param == "folder" else bucket / "folder"


@pytest.mark.parametrize(
    "text", ["s3:/one/slash", "file://relative/folder", "s3://", "file://", "memory:///", "abacus://bucket/x"]
)
def test_text_that_is_not_a_path_or_url_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        as_path(text)
    assert "\n" not in str(caught.value)


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("data/stores", "/data/some store.zarr", "./s3:/one/slash", "C:data", ""):
        assert as_path(text) == Path(text)
    assert as_path(f"file://{tmp_path}/x.zarr") == tmp_path / "x.zarr"
    assert as_path(tmp_path) is tmp_path
    assert paths.is_local(as_path("x"))
    monkeypatch.chdir(tmp_path)
    assert paths.absolute(Path("x.zarr")) == str(tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("text", "module", "hint"), [("s3://b/x", "s3fs", "wmcache[s3]"), ("gs://b/x", "gcsfs", "pip")]
)
def test_the_error_of_a_missing_file_system_is_how_to_install_it(text: str, module: str, hint: str) -> None:
    # In another process: here it may be imported already.
    script = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from wmcache.common.errors import UserError\nfrom wmcache.common.paths import as_path\n"
        "try: as_path(sys.argv[1])\nexcept UserError as error: print(error)"
    )
    words = [sys.executable, "-c", script, text, module]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert text in done.stdout
    assert hint in done.stdout
    assert done.stdout.count("\n") == 1


def test_files_are_written_listed_and_removed(somewhere: AnyPath) -> None:
    for name in ("a/c.1", "a/c.10", "a/d", "a/c.2/inside", "e", "f"):
        write_whole(somewhere / name, name.encode())
    assert (paths.read_bytes(somewhere / "e"), paths.size_of(somewhere / "a" / "c.10")) == (b"e", 6)
    assert sha256_of(somewhere / "e") == hashlib.sha256(b"e").hexdigest()
    with paths.open_to_read(somewhere / "a" / "d") as opened:
        opened.seek(2)
        assert opened.read() == b"d"
    assert {name: found.bytes for name, found in paths.files_in(somewhere / "a", "c.")} == {"c.1": 5, "c.10": 6}
    assert set(paths.names_in(somewhere / "a", "c.1")) == {"c.1", "c.10"}
    assert paths.usage(somewhere) == 5 + 6 + 3 + 12 + 2
    first = paths.stamp(somewhere / "e")
    write_whole(somewhere / "e", b"x")
    assert paths.stamp(somewhere / "e") not in (first, None)
    paths.remove(somewhere / "a")
    paths.remove_files([somewhere / "e", somewhere / "none"])
    paths.remove(somewhere / "none" / "deeper")
    assert paths.names_in(somewhere) == ["f"]
    assert paths.names_in(somewhere / "none") == list(paths.files_in(somewhere / "none")) == []
    assert not paths.exists(somewhere / "a")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_does_not_appear(somewhere: AnyPath, error: type[BaseException]) -> None:
    def fail_halfway(at: AnyPath) -> None:
        with atomic_write(at) as file:
            file.write(b"half")
            raise error

    write_json(somewhere / "known.json", {"a": 1})
    for name in ("known.json", "new.json"):
        with pytest.raises(error):
            fail_halfway(somewhere / name)
    assert paths.names_in(somewhere) == ["known.json"]
    assert read_json(somewhere / "known.json", "") == {"a": 1}


@pytest.mark.parametrize("function", [paths.read_bytes, paths.size_of, sha256_of, paths.stamp])
def test_a_missing_file_is_file_not_found(somewhere: AnyPath, function: Callable[[AnyPath], Any]) -> None:
    with pytest.raises(FileNotFoundError):
        function(somewhere / "none")
    with pytest.raises(MissingError, match=r"none\.json"):
        read_json(somewhere / "none.json", "")


def test_an_object_can_be_put_only_where_there_is_none(bucket: UPath) -> None:
    at = bucket / "x"
    paths.put(at, b"first", new=True)
    with pytest.raises(FileExistsError):
        paths.put(at, b"second", new=True)
    assert paths.read_bytes(at) == b"first"
    paths.put(at, b"third")
    assert paths.read_bytes(at) == b"third"


def test_the_last_object_of_a_folder_is_put_last(
    tmp_path: Path, bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zarr.json", "a/zarr.json", "z/c/0"):
        write_whole(tmp_path / "x" / name, name.encode())
    order, put = [], paths.put

    def note(at: UPath, data: bytes, *, new: bool = False) -> str | None:
        order.append(str(at).removeprefix(str(bucket)))
        return put(at, data, new=new)

    monkeypatch.setattr("wmcache.common.paths.put", note)
    assert paths.upload(tmp_path / "x", bucket / "x", last="zarr.json")
    assert order[-1] == "/x/zarr.json"
    assert sorted(order) == ["/x/a/zarr.json", "/x/z/c/0", "/x/zarr.json"]
    (tmp_path / "x" / "zarr.json").write_text("another")
    assert not paths.upload(tmp_path / "x", bucket / "x", last="zarr.json")
    assert paths.read_bytes(bucket / "x" / "zarr.json") == b"zarr.json"


class FailedError(Exception):
    """What a remote file system may raise."""


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (FailedError("Access\nDenied  here."), errno.EIO, "Access Denied here"),
        (FailedError(), errno.EIO, "FailedError"),
        (FailedError("x" * 1000), errno.EIO, "x" * 160),
        (FileNotFoundError("bucket/x"), errno.ENOENT, "it does not exist"),
        (FileNotFoundError("no such bucket"), errno.ENOENT, "no such bucket"),
    ],
)
def test_whatever_is_raised_is_an_os_error_of_one_line(error: Exception, number: int, text: str) -> None:
    with pytest.raises(OSError, match="bucket/x") as caught, paths.as_os_errors(Path("bucket/x")):
        raise error
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (number, text, "bucket/x")


def test_ctrl_c_is_not_an_os_error() -> None:
    with pytest.raises(KeyboardInterrupt), paths.as_os_errors(Path("x")):
        raise KeyboardInterrupt


FAILING: list[Callable[[AnyPath], Any]] = [
    paths.exists,
    paths.read_bytes,
    paths.size_of,
    paths.stamp,
    paths.remove,
    paths.names_in,
    paths.open_to_read,
]


@pytest.mark.parametrize("function", FAILING)
def test_a_server_that_fails_is_an_os_error(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch, function: Callable[[AnyPath], Any]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FailedError("503 Slow Down")

    paths.put(bucket / "x", b"x")
    with monkeypatch.context() as patch:
        for name in ("exists", "cat_file", "info", "find", "rm", "ls"):
            patch.setattr(type(bucket.fs), name, fail)
        with pytest.raises(OSError, match="503 Slow Down") as caught:
            function(bucket / "x")
    assert paths.cause_outside(caught.value) is caught.value


def test_a_server_that_refuses_a_write_is_one_line(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> Any:
        raise FailedError("AccessDenied")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.fs), "pipe_file", deny)
        with pytest.raises(UserError, match=r"memory://bucket/x: AccessDenied; .*credentials"):
            write_json(bucket / "x", {})
    assert "credentials" in str(paths.unreadable(bucket, OSError()))
    assert "credentials" not in str(paths.unreadable(Path("x"), OSError()))


def test_an_object_store_has_no_limit(bucket: UPath, tmp_path: Path) -> None:
    assert paths.free_space(bucket) is None
    require_space(bucket, 10**18, "the store")
    missing = tmp_path / "not" / "yet"
    require_space(missing, 1, "the store")
    with pytest.raises(UserError, match=rf"the store .*1000000\.0 TB.*{missing}"):
        require_space(missing, 10**18, "the store")
    assert list(tmp_path.iterdir()) == []
