"""scripts/gpu-report: every part is tried, one that fails is a row, and its command lines exist."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .test_docs import PROGRAMS, unknown_flags

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu-report"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_loader("gpu_report", SourceFileLoader("gpu_report", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def report(folder: Path, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the script; returns its exit status, the rows of report.json, and report.md."""
    call = [sys.executable, "-P", str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(folder), *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    rows = json.loads((folder / "report.json").read_text())["parts"]
    return done.returncode, rows, (folder / "report.md").read_text()


def test_the_command_lines_of_all_parts_exist(script: ModuleType) -> None:
    lines = [shlex.join(words) for _, words, _ in script.parts_of("cuda", tiny=False) if words[0] in PROGRAMS]
    assert len(lines) >= 9
    assert [flag for line in lines for flag in unknown_flags(line)] == []


def test_parts_without_time_are_rows_that_failed(tmp_path: Path, script: ModuleType) -> None:
    status, rows, text = report(tmp_path, "--minutes", "0")
    assert status == 1
    assert [row["part"] for row in rows] == [name for name, *_ in script.parts_of("cpu", tiny=True)]
    assert all("--minutes" in row["error"] for row in rows)
    assert sum(line.startswith("| ") and "**failed**" in line for line in text.splitlines()) == len(rows)


def test_a_command_that_fails_or_is_stopped_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    failed = script.measure("x", ["wmcache", "info", "none.zarr", "--json"], ("frames",), "cpu", tmp_path, 60.0)
    assert "none.zarr" in failed.error
    assert failed.figures == {}
    assert failed.peak_bytes > 0
    stopped = script.measure("x", ["wmcache", "info", "none.zarr"], (), "cpu", tmp_path, 0.01)
    assert "--minutes" in stopped.error


@pytest.mark.sweep  # a dozen processes, a minute
@pytest.mark.timeout(900)
def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    status, rows, _ = report(tmp_path, "--minutes", "14")
    assert [row["error"] for row in rows if row["error"]] == []
    assert status == 0
    figures = {row["part"]: row["figures"] for row in rows}
    assert figures["extraction, ViT-small"]["share_of_limit"] > 0
    assert figures["tests"]["passed"] > 20
    assert all(row["peak_bytes"] > 0 for row in rows)
