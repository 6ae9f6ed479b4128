"""Files are complete or absent, JSON is strict, and hints name the folder that was meant."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError, one_line, reason
from wmcache.common.files import is_temporary, sweep, temporary_for
from wmcache.common.folders import home
from wmcache.common.jsonfiles import dump_json, nulls, read_json, write_json


def test_only_files_of_dead_processes_of_this_machine_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = temporary_for(tmp_path / "x")
    own.touch()
    (tmp_path / f".folder.{platform.node()}.{dead.pid}.tmp" / "deeper").mkdir(parents=True)
    (tmp_path / f".x.{platform.node()}.{dead.pid}.tmp").touch()
    elsewhere = tmp_path / f".x.another-machine.{dead.pid}.tmp"
    elsewhere.touch()
    assert sweep(tmp_path) == sorted([own, elsewhere])
    assert sorted(tmp_path.iterdir()) == sorted([own, elsewhere])
    assert is_temporary(own)
    assert str(os.getpid()) in own.name


def test_home_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMCACHE_HOME", "/some where")
    assert home() == Path("/some where")
    monkeypatch.setenv("WMCACHE_HOME", "s3://bucket")
    with pytest.raises(UserError, match="s3://bucket"):
        home()
    monkeypatch.delenv("WMCACHE_HOME")
    assert home() == Path("data")


def test_reasons_and_names_are_one_line() -> None:
    assert reason(OSError(5, "Input/output  error.")) == "Input/output error"
    assert reason(ValueError("two\nlines")) == "two lines"
    assert reason(ValueError()) == "ValueError"
    assert one_line("a\nb\x1b[0m\u202e") == r"a\nb\x1b[0m\u202e"


class TestStrictJson:
    def test_a_value_comes_back(self, tmp_path: Path) -> None:
        value = {"a": [1, 2.5, None], "ü": "Fahrvergnügen"}
        write_json(tmp_path / "value.json", value)
        assert read_json(tmp_path / "value.json", "HINT") == value

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
    def test_a_number_that_is_not_finite_is_refused_by_its_key(self, tmp_path: Path, value: float) -> None:
        write_json(tmp_path / "known.json", {"a": 1})
        with pytest.raises(UserError, match=r"known\.json.*rate"):
            write_json(tmp_path / "known.json", {"steps": [{"step": 1, "rate": 0.5}, {"step": 2, "rate": value}]})
        assert read_json(tmp_path / "known.json", "") == {"a": 1}

    def test_results_that_do_not_exist_are_null(self) -> None:
        value = {"a": math.nan, "b": [1, math.inf, (np.float64("nan"), "NaN")], "c": {"d": -math.inf, "e": 0.5}}
        expected = {"a": None, "b": [1, None, [None, "NaN"]], "c": {"d": None, "e": 0.5}}
        assert json.loads(dump_json(nulls(value))) == expected

    def test_files_of_earlier_versions_are_still_read(self, tmp_path: Path) -> None:
        (tmp_path / "old.json").write_text('{"skill": NaN}')
        assert math.isnan(read_json(tmp_path / "old.json", "")["skill"])
