from __future__ import annotations

import re
from pathlib import Path

import pytest

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import EncoderSpec, dinov2


def test_an_unknown_name_lists_those_that_exist() -> None:
    names = [spec.name for spec in encoders.specs()]
    assert {"dinov2", "tcn"} <= set(names)
    with pytest.raises(UserError, match=re.escape(f"'nothing-like-it'; known are {', '.join(names)}")):
        encoders.create("nothing-like-it")
    with pytest.raises(UserError, match=r"did you mean .*dinov2"):
        encoders.create("dinov9")


@pytest.mark.parametrize(("name", "size"), [("dinov2", 200), ("tcn", 65), ("tcn", 0), ("tcn", -32)])
def test_an_image_size_that_does_not_fit_is_refused(name: str, size: int, tmp_path: Path) -> None:
    # The file is empty: the size is judged before any weights are read.
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UserError, match=f"--image-size {size} does not fit encoder {name}; choose a multiple of"):
        encoders.create(name, weights=tmp_path / "empty.safetensors", image_size=size)


@pytest.mark.parametrize("name", ["weights.pt", "nowhere.safetensors", "folder.safetensors"])
def test_only_existing_safetensors_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"a pickle could hold code")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=f"{name}: neither an existing .safetensors file"):
        encoders.create("tcn", weights=tmp_path / name)


@pytest.mark.parametrize(("option", "value"), [("normalisation", "z-score"), ("dtype", "int4"), ("device", "abacus")])
def test_an_option_that_does_not_exist_is_named(tcn_weights: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"'{value}'"):
        encoders.create("tcn", weights=tcn_weights, **{option: value})


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="dinov2 is registered already"):
        encoders.register(encoders.get_spec("dinov2"))(dinov2.load)


@pytest.mark.parametrize("spec", encoders.specs(), ids=lambda spec: spec.name)
def test_every_encoders_default_size_fits_it(spec: EncoderSpec) -> None:
    rows, columns = spec.patch_grid(spec.image_size)
    assert rows == columns == spec.image_size // spec.patch
    assert min(spec.token_grid) > 0
