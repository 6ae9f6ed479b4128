from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import EncoderSpec


def test_an_unknown_name_lists_those_that_exist() -> None:
    names = [spec.name for spec in encoders.specs()]
    assert {"dinov2", "tcn"} <= set(names)
    with pytest.raises(UserError) as refused:
        encoders.create("nothing-like-it")
    assert all(name in str(refused.value) for name in names)
    with pytest.raises(UserError, match="dinov2"):
        encoders.create("dinov9")


def test_an_encoder_that_is_not_fitted_lists_those_that_are() -> None:
    with pytest.raises(UserError, match=r"dinov2 .*tcn, vae"):
        encoders.fit_options("dinov2", {})


@pytest.mark.parametrize(("name", "size"), [("dinov2", 200), ("tcn", 65), ("tcn", 0), ("tcn", -32)])
def test_an_image_size_is_checked_before_weights_are_read(name: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UserError, match=rf"--image-size (is )?{size}\b"):
        encoders.create(name, weights=tmp_path / "empty.safetensors", image_size=size)


@pytest.mark.parametrize(("option", "value"), [("normalisation", "z-score"), ("dtype", "int4"), ("device", "abacus")])
def test_an_unknown_option_is_named(tcn_weights: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"'{value}'"):
        encoders.create("tcn", weights=tcn_weights, **{option: value})


def test_a_name_is_registered_once() -> None:
    spec = encoders.get_spec("dinov2")
    with pytest.raises(ValueError, match="dinov2"):
        encoders.register(spec)(encoders.get_entry("dinov2").load)


@pytest.mark.parametrize("spec", encoders.specs(), ids=lambda spec: spec.name)
def test_every_encoders_default_size_fits_it(spec: EncoderSpec) -> None:
    rows, columns = spec.patch_grid(spec.image_size)
    assert rows == columns == spec.image_size // spec.patch
    assert min(spec.token_grid) > 0
