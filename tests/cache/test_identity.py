"""Identities name every field that differs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from wmcache.cache import Identity
from wmcache.common.errors import UserError

FIELDS = [field.name for field in dataclasses.fields(Identity)]


def changed(identity: Identity, field: str) -> Identity:
    value = getattr(identity, field)
    other = {int: -1, str: "another", tuple: ((0.0,), (1.0,))}[type(value)]
    return dataclasses.replace(identity, **{field: other})


def test_an_identity_survives_json(identity: Identity) -> None:
    assert Identity.from_json(json.loads(json.dumps(identity.to_json())), "here") == identity


@pytest.mark.parametrize("field", FIELDS)
def test_a_different_field_is_named(identity: Identity, field: str) -> None:
    other = changed(identity, field)
    assert identity.differences(other) == [f"{field}: {getattr(identity, field)} != {getattr(other, field)}"]


def test_all_differences_are_named(identity: Identity) -> None:
    other = changed(changed(identity, "layer"), "image_size")
    assert [text.split(":")[0] for text in identity.differences(other)] == ["layer", "image_size"]
    assert identity.differences(identity) == []


@pytest.mark.parametrize(
    ("change", "named"), [({"colour": "blue"}, "colour"), ({"normalisation": [0.5]}, "normalisation"), ({}, "layer")]
)
def test_wrong_fields_are_named(identity: Identity, change: dict[str, Any], named: str) -> None:
    value = {**identity.to_json(), **change}
    if not change:
        del value["layer"]
    with pytest.raises(UserError, match=rf"some\.zarr .*{named}"):
        Identity.from_json(value, "some.zarr")
