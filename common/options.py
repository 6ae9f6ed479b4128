"""Options: a field of a dataclass is the only declaration of an option.

    depth: Annotated[int, Ge(1)] = option(6, "Transformer blocks.")

The field has the type, the range, the default and the help. The command line (`commands.options`), study files, presets, saved configs and
their validation read it. A `Literal` is a choice, a bool a pair of flags, `T | None` an option without a default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le, Lt

from wmcache.common.errors import UserError, suggest
from wmcache.common.jsonfiles import dump_json

T = TypeVar("T")

Natural = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]


def option(default: T, help: str | None = None, *, flag: str | None = None, group: str | None = None) -> T:
    """Declare an option as a field of a dataclass.

    Args:
        help: a sentence that reads on its own; without it, help, flag and group are those of the base class.
        flag: `--lr`, or a pair as `--decay-all/--decay-matrices`; by default the field's name. A bool with a single flag has no opposite.
            An empty text keeps the field off the command line.
        group: heading in the command's help; by default that of the field before.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "group": group})


@dataclass(frozen=True)
class Declared:
    """What a field declares.

    Attributes:
        kind: int, float, bool or str.
        choices: of a `Literal`.
        bounds: arguments of a click range: min, max, min_open, max_open.
    """

    name: str
    flag: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    group: str
    bounds: dict[str, Any]


@functools.cache
def declared(kind: type) -> tuple[Declared, ...]:
    """List the options of a dataclass; fields that are not numbers, bools, texts or choices are no options."""
    hints = get_type_hints(kind, include_extras=True)
    found: list[Declared] = []
    group = ""
    for item in fields(kind):
        base, choices, bounds = _unwrap(hints[item.name])
        known = _metadata(kind, item.name)
        group = known.get("group", group)
        word = item.name.replace("_", "-")
        flag = known.get("flag", f"--{word}/--no-{word}" if base is bool else f"--{word}")
        if base in (int, float, bool, str) and flag:
            found.append(Declared(item.name, flag, base, choices, item.default, known.get("help", ""), group, bounds))
    return tuple(found)


def options_in(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the entries of a preset that are options of a dataclass, by field; keys are flags without dashes, or fields."""
    fields_of: dict[str, str] = {}
    for known in declared(kind):
        fields_of |= {known.name: known.name, known.flag.partition("/")[0].lstrip("-").replace("-", "_"): known.name}
    named = {name.replace("-", "_"): value for name, value in values.items()}
    return {fields_of[name]: value for name, value in named.items() if name in fields_of}


def parse_options(kind: type[T], values: object, where: str, *, without: Collection[str] = ()) -> T:
    """Make an options dataclass of a table of TOML or JSON, without conversions; fields of `without` may not be given.

    Raises:
        UserError: with `where` the table is from; a key is unknown, or a value does not fit its declaration.
    """
    known = [item.name for item in fields(kind) if item.name not in without]  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a table")
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{where} has no option {', '.join(map(str, unknown))}; {suggest(str(unknown[0]), known)}")
    return _validate(kind, values, {name: f"{where}: {name}" for name in known}, where)


def check_options(options: Any) -> None:
    """Validate an options dataclass that was made in Python; raise UserError with the flag of a value that does not fit."""
    kind: Any = type(options)
    flags = {known.name: known.flag.partition("/")[0] for known in declared(kind)}
    _validate(kind, asdict(options), flags, kind.__name__)


def _validate(kind: type[T], values: Mapping[str, Any], labels: Mapping[str, str], where: str) -> T:
    from pydantic import ValidationError  # here, because every command imports this module

    from wmcache.common.schema import adapter_of

    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{labels.get(name, name)} is {value}; it must be a finite number")
    try:
        parsed: T = adapter_of(cast(Any, kind)).validate_json(dump_json(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, *inner = map(str, first["loc"] or (where,))
        label = ".".join([labels.get(name, name), *inner])
        wrong = first["msg"].replace("Input should", "it must")[:160]
        raise UserError(f"{label} is {repr(first['input'])[:80]}; {wrong}") from error
    except TypeError as error:  # TOML has dates
        raise UserError(f"{where} has a date; no option is one, write it as a string") from error
    return parsed


def _metadata(kind: type, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if name in (known := getattr(base, "__dataclass_fields__", {})):
            found |= {key: value for key, value in known[name].metadata.items() if value is not None}
    return found


def _unwrap(hint: Any) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """Return the type, the choices and the bounds of an annotation."""
    bounds: dict[str, Any] = {}
    while (origin := get_origin(hint)) is not None:
        args = get_args(hint)
        if origin is Literal:
            return str, args, bounds
        if origin is Annotated:
            hint = args[0]
            for marker in args[1:]:
                for part in getattr(marker, "metadata", [marker]):  # pydantic's Field has several
                    for key, end in {"ge": "min", "gt": "min", "le": "max", "lt": "max"}.items():
                        if (value := getattr(part, key, None)) is not None:
                            bounds |= {end: value, f"{end}_open": key in ("gt", "lt")}
        elif origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
            hint = args[args[0] is NoneType]
        else:
            break
    return hint, (), bounds
