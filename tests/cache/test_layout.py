"""Seals, cards and identities: how a change of them is detected and named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wmcache.cache import Identity
from wmcache.cache.layout import read_card
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import require_seal, seal

from ..conftest import CARD, IDENTITY

WHERE = Path("some/file.json")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text().filter(lambda name: name != "checksum"), json_values, max_size=5)


@given(value=json_objects)
@example(value={"tuple": (1, 2), "exact": 0.1, "small": -0.0, "name": "Läufe"})
def test_a_sealed_object_passes_through_json(value: dict[str, Any]) -> None:
    sealed = json.loads(json.dumps(seal(value), indent=2))
    assert require_seal(sealed, WHERE, "HINT") is sealed
    assert {name: item for name, item in sealed.items() if name != "checksum"} == json.loads(json.dumps(value))


@given(value=json_objects, name=st.text(), other=json_values)
@example(value={"bytes": 100, "sum": [0.5, 1.0]}, name="bytes", other=101)
@example(value={"frames": [0, 16]}, name="frames", other=[0, 17])
@example(value={"complete": False}, name="complete", other=True)
def test_a_changed_or_added_value_is_detected(value: dict[str, Any], name: str, other: Any) -> None:
    sealed = seal(value)
    if name in sealed and json.dumps(sealed[name]) == json.dumps(other):
        return
    with pytest.raises(UserError, match=r"some/file\.json.*; HINT") as caught:
        require_seal({**sealed, name: other}, WHERE, "HINT")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["frames", "sum", "checksum"])
def test_a_lost_value_is_detected(lost: str) -> None:
    sealed = seal({"frames": [0, 16], "sum": [0.5, 1.0]})
    del sealed[lost]
    with pytest.raises(UserError, match=r"some/file\.json"):
        require_seal(sealed, WHERE, "HINT")


def test_a_card_needs_all_fields_but_dtype_columns_and_licence() -> None:
    values = dataclasses.asdict(CARD)
    for name in values:
        rest = {"card": {field: value for field, value in values.items() if field != name}}
        if name in ("dtype", "columns", "licence"):
            assert read_card(rest) == CARD
        else:
            with pytest.raises(UserError, match=name):
                read_card(rest)


def test_shards_cover_every_frame_once() -> None:
    for frames in (1, 15, 16, 17, 32, 50):
        some = dataclasses.replace(CARD, frames=frames)
        assert [frame for shard in range(some.num_shards) for frame in some.shard_frames(shard)] == [*range(frames)]


# Identities.

FIELDS = [field.name for field in dataclasses.fields(Identity)]


def changed(identity: Identity, field: str) -> Identity:
    value = getattr(identity, field)
    other = {int: -1, str: "another", tuple: ((0.0,), (1.0,))}[type(value)]
    return dataclasses.replace(identity, **{field: other})


@pytest.mark.parametrize("field", FIELDS)
def test_a_different_field_is_named(field: str) -> None:
    other = changed(IDENTITY, field)
    assert IDENTITY.differences(other) == [f"{field}: {getattr(IDENTITY, field)} != {getattr(other, field)}"]


def test_all_differences_are_named() -> None:
    other = changed(changed(IDENTITY, "layer"), "image_size")
    assert [text.split(":")[0] for text in IDENTITY.differences(other)] == ["layer", "image_size"]
    assert IDENTITY.differences(IDENTITY) == []
