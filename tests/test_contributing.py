"""What CONTRIBUTING.md tells people to write works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
USE = """
import numpy as np
from wmcache.cli import main
from wmcache.pipeline import encoders

main(["encoders"], standalone_mode=False)
encoder = encoders.create("convnext", weights="weights.safetensors", dtype="float32", device="cpu")
frames = np.zeros((2, 224, 224, 3), np.uint8)
frames[1, 96:128, 160:192] = 255
black, moved = encoder(frames).float()
print((moved - black).norm(dim=1).argmax().item(), encoder.token_grid, encoder.frame_shape)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package of somebody's own, which brings the encoder of CONTRIBUTING.md, and its weights."""
    folder = tmp_path_factory.mktemp("stranger")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an encoder") :], re.DOTALL)[:1]
    (point,) = re.findall(r'entry-points."(.*?)"\]\nconvnext = "my_package.convnext"', TEXT)
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/convnext.py").write_text(code)
    (folder / "my_package-1.dist-info").mkdir()
    (folder / "my_package-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (folder / "my_package-1.dist-info/entry_points.txt").write_text(f"[{point}]\nconvnext = my_package.convnext\n")
    torch.manual_seed(0)
    save_file(timm.create_model("convnext_atto").state_dict(), folder / "weights.safetensors")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_example_of_an_encoder_is_a_short_one() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an encoder") :], re.DOTALL)[:1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_an_encoder_of_another_package_is_listed_and_encodes(stranger: Path) -> None:
    used = run(stranger, "-c", USE)
    *listed, found = used.stdout.splitlines() or [used.stderr]
    assert any(line.startswith("convnext ") for line in listed), used.stderr
    assert found == "26 (7, 7) (49, 320)", used.stderr


def test_a_package_that_cannot_be_imported_is_one_line(stranger: Path) -> None:
    (stranger / "broken").mkdir()
    (stranger / "broken/bad-1.dist-info").mkdir()
    (stranger / "broken/bad-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    (stranger / "broken/bad-1.dist-info/entry_points.txt").write_text("[wmcache.encoders]\nbad = bad_package.nowhere\n")
    found = run(stranger / "broken", "-c", "from wmcache.cli import main; main(['encoders'])")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "the encoders of bad_package.nowhere cannot be imported" in found.stderr
