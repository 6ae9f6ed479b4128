"""Options declared by the fields of a dataclass, and values that are read by these declarations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Lt
from pydantic import Field

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, check_options, declared, option, parse_options


@dataclass(frozen=True)
class Base:
    """Options of every kind."""

    depth: Positive = option(6, "Number of blocks.", group="Model")
    rate: Annotated[float, Gt(0), Lt(1)] = option(0.1, "Learning rate.", flag="--lr")
    kind: Literal["small", "large"] = option("small", "Size of the model.")
    limit: Annotated[int, Ge(0)] | None = option(None, "Most frames.", group="Data")
    shuffle: bool = option(True, "Shuffle the frames.")
    plain: int = 3
    hidden: int = option(4, flag="")
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Deep(Base):
    """Another default, and a range as pydantic declares it."""

    depth: Annotated[int, Field(gt=1, le=99)] = option(12)


def test_a_subclass_inherits_help_and_group() -> None:
    depth = declared(Deep)[0]
    assert (depth.help, depth.group, depth.default) == ("Number of blocks.", "Model", 12)
    assert depth.bounds == {"min": 1, "min_open": True, "max": 99, "max_open": False}


class TestValues:
    def test_missing_values_are_the_defaults(self) -> None:
        assert parse_options(Base, {"depth": 2, "rate": 0.5}, "file") == Base(depth=2, rate=0.5)

    @pytest.mark.parametrize(
        "values",
        [
            {"depth": 0},
            {"depth": "6"},
            {"depth": 6.5},
            {"rate": 1.0},
            {"rate": float("nan")},
            {"kind": "huge"},
            {"limit": -1},
            {"shuffle": 1},
            {"more": []},
        ],
        ids=str,
    )
    def test_a_value_that_does_not_fit_is_refused_with_its_key(self, values: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=rf"file.*{next(iter(values))}"):
            parse_options(Base, values, "file")

    @pytest.mark.parametrize("value", [float("inf"), [1], {"a": float("nan")}])
    def test_no_value_arrives_that_json_does_not_have(self, value: object) -> None:
        with pytest.raises(UserError):
            parse_options(Base, {"depth": value}, "file")

    def test_an_unknown_key_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"dept.*depth"):
            parse_options(Base, {"dept": 1}, "file")

    def test_a_key_can_be_kept_from_users(self) -> None:
        with pytest.raises(UserError, match="hidden"):
            parse_options(Base, {"hidden": 1}, "file", without=("hidden",))

    @pytest.mark.parametrize("values", [None, [], "depth"])
    def test_only_a_table_is_read(self, values: object) -> None:
        with pytest.raises(UserError, match="file"):
            parse_options(Base, values, "file")

    def test_options_made_in_python_are_validated_with_their_flags(self) -> None:
        check_options(Base())
        for changed, flag in (({"rate": 2.0}, "--lr"), ({"rate": float("inf")}, "--lr"), ({"depth": 0}, "--depth")):
            with pytest.raises(UserError, match=flag):
                check_options(replace(Base(), **changed))
