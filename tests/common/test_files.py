from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, sha256_of
from wmcache.common.folders import home
from wmcache.common.jsonfiles import dump_json, nulls, read_json, write_json
from wmcache.common.space import human_bytes, require_space


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_changes_nothing(tmp_path: Path, error: type[BaseException], before: bytes | None) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)

    def fail_halfway() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"file.bin": before} if before else {})


def test_a_write_appears_whole_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]
    assert path.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*file/deeper"), atomic_write(tmp_path / "file" / "deeper"):
        pass


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ü": "Fahrvergnügen"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "hint it") == value


@pytest.mark.parametrize("text", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_unreadable_json_says_which_and_how_to_mend_it(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / "value.json").write_bytes(text)
    with pytest.raises(UserError, match=r"value\.json.*; hint it so$"):
        read_json(tmp_path / "value.json", "hint it so")


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"x" * 100_000).hexdigest()


def test_work_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet" / "there"
    require_space(place, 1, "a byte")
    with pytest.raises(UserError, match=r"^a store of everything needs 1000000\.0 TB at .*there, but .* free"):
        require_space(place, 10**18, "a store of everything")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (30_100_000_000, "30.1 GB"), (2e15, "2000.0 TB")]
)
def test_sizes_are_written_in_decimal_units(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_home_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMCACHE_HOME", "/some where")
    assert home() == Path("/some where")
    monkeypatch.delenv("WMCACHE_HOME")
    assert home() == Path("data")


class TestStrictJson:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
    def test_what_is_not_finite_is_refused_by_its_name_and_costs_no_file(self, tmp_path: Path, value: float) -> None:
        write_json(tmp_path / "known.json", {"a": 1})
        with pytest.raises(UserError, match=r"known\.json: rate is (nan|inf|-inf)"):
            write_json(tmp_path / "known.json", {"steps": [{"step": 1, "rate": 0.5}, {"step": 2, "rate": value}]})
        assert read_json(tmp_path / "known.json", "") == {"a": 1}

    def test_figures_that_do_not_exist_are_null(self) -> None:
        value = {"a": math.nan, "b": [1, math.inf, (np.float64("nan"), "NaN")], "c": {"d": -math.inf, "e": 0.5}}
        assert json.loads(dump_json(nulls(value))) == {
            "a": None,
            "b": [1, None, [None, "NaN"]],
            "c": {"d": None, "e": 0.5},
        }

    def test_files_of_earlier_versions_are_still_read(self, tmp_path: Path) -> None:
        (tmp_path / "old.json").write_text('{"skill": NaN}')
        assert math.isnan(read_json(tmp_path / "old.json", "")["skill"])
