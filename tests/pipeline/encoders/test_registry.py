from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import EncoderSpec


@pytest.mark.parametrize("spec", encoders.specs(), ids=lambda spec: spec.name)
def test_every_encoder_has_a_source_a_licence_and_a_default_size_that_fits(spec: EncoderSpec) -> None:
    assert spec.source
    assert spec.licence
    assert len(spec.summary.splitlines()) == 1
    rows, columns = spec.patch_grid(spec.image_size)
    assert rows == columns == spec.image_size // spec.patch
    assert min(spec.token_grid) > 0


def test_every_size_of_a_family_has_every_selection() -> None:
    sizes = {"dinov2": 384, "dinov2-base": 768, "dinov2-large": 1024}
    sizes |= {name.replace("2", "3"): dim for name, dim in sizes.items()}
    expected = {f"{name}{selection}": dim for name, dim in sizes.items() for selection in ("", "-cls", "-pooled")}
    expected |= {f"{name}-layers": 3 * dim for name, dim in sizes.items()}
    expected |= {"siglip2": 768, "siglip2-pooled": 768, "siglip2-layers": 3 * 768}
    specs = [spec for spec in encoders.specs() if spec.name.partition("-")[0] in ("dinov2", "dinov3", "siglip2")]
    assert {spec.name: spec.token_dim for spec in specs} == expected
    assert all(len(spec.revision) == 40 for spec in specs)
    assert all(bool(spec.accept) == spec.name.startswith("dinov3") for spec in specs)


@pytest.mark.parametrize(("option", "value"), [("normalisation", "z-score"), ("dtype", "int4"), ("device", "abacus")])
def test_an_unknown_option_is_named(tcn_weights: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=value):
        encoders.create("tcn", weights=tcn_weights, **{option: value})
