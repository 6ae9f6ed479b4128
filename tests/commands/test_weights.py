"""wmcache weights: what it lists, for people and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors.torch import save_file

from wmcache.cli import main
from wmcache.pipeline import encoders

REPOSITORY = "google/siglip2-base-patch16-224"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and an empty cache of the hub."""
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def cache(machine: Path, repository: str, revision: str) -> Path:
    """Put a file where the hub's client keeps it."""
    folder = machine / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot, blob = folder / "snapshots" / revision, folder / "blobs" / "0123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    save_file({"weight": torch.zeros(100)}, blob)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / "model.safetensors"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["weights", *words], prog_name="wmcache")


def listed() -> dict[str, Any]:
    result = run("--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def test_encoders_of_one_source_share_a_row() -> None:
    rows = {row["source"]: row for row in listed()["sources"]}
    assert rows["timm/vit_small_patch14_dinov2.lvd142m"]["encoders"] == [
        "dinov2",
        "dinov2-cls",
        "dinov2-layers",
        "dinov2-pooled",
    ]
    assert rows[REPOSITORY]["state"] == "absent"
    assert rows[REPOSITORY]["revision"] == encoders.get_spec("siglip2").revision
    assert not any("wmcache fit" in source for source in rows)


def test_weights_are_listed_with_path_size_and_revision(machine: Path) -> None:
    path = cache(machine, REPOSITORY, encoders.get_spec("siglip2").revision)
    row = next(row for row in listed()["sources"] if row["source"] == REPOSITORY)
    assert (row["state"], row["path"], row["bytes"]) == ("present", str(path), path.stat().st_size)
    result = run()
    assert str(path) in result.output
    assert [line.split()[0] for line in result.output.splitlines() if line.endswith(REPOSITORY)] == ["present"]


def test_another_revision_than_the_encoders_does_not_count(machine: Path) -> None:
    cache(machine, REPOSITORY, "3" * 40)
    row = next(row for row in listed()["sources"] if row["source"] == REPOSITORY)
    assert row["state"] == "absent"


def test_a_file_of_another_length_than_was_downloaded_is_damaged(machine: Path) -> None:
    revision = encoders.get_spec("siglip2").revision
    cache(machine, REPOSITORY, revision)
    pin = {"revision": revision, "sha256": "0" * 64, "bytes": 1_500_800_904}
    (machine / "home" / "encoders").mkdir(parents=True)
    (machine / "home" / "encoders" / "pins.json").write_text(json.dumps({REPOSITORY: pin}))
    row = next(row for row in listed()["sources"] if row["source"] == REPOSITORY)
    assert (row["state"], row["fault"]) == ("damaged", "1.5 GB were downloaded")
    assert "1.5 GB were downloaded" in run().output


def test_fitted_files_are_listed_with_what_they_are_on(machine: Path) -> None:
    folder = machine / "home" / "encoders"
    folder.mkdir(parents=True)
    tensors = {"weight": torch.zeros(3)}
    save_file(tensors, folder / "a.safetensors", {"encoder": "tcn", "dataset": "f00d" * 16})
    recipe = json.dumps({"name": "dinov2-layers", "weights": "/somewhere/w.safetensors"})
    save_file(tensors, folder / "b.safetensors", {"encoder": "dino-tok", "dataset": "f00d" * 16, "base": recipe})
    (folder / "c.safetensors").write_bytes(b"<html>")
    fitted = listed()["fitted"]
    assert [row["encoder"] for row in fitted] == ["tcn", "dino-tok", ""]
    assert fitted[0]["path"] == str(folder / "a.safetensors")
    lines = run().output.splitlines()
    assert any(line.split()[:1] == ["tcn"] and "f00df00df00d" in line for line in lines)
    assert any("on dinov2-layers (/somewhere/w.safetensors)" in line for line in lines)
    assert any("cannot be read" in line for line in lines)


def test_damaged_pins_are_one_line(machine: Path) -> None:
    (machine / "home" / "encoders").mkdir(parents=True)
    (machine / "home" / "encoders" / "pins.json").write_text("{")
    result = run()
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "pins.json cannot be read" in result.output
