"""Options of click's, made of the fields of options dataclasses (`common.options`)."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Protocol, TypeVar

import click

from wmcache.common.errors import UserError
from wmcache.common.options import Declared, declared

F = TypeVar("F", bound=Callable[..., Any])
Names = Callable[[], Iterable[str]]


class Option(click.Option):
    """An option under a heading of the help.

    Attributes:
        group: the heading. field: of the dataclass that declares it.
        names: fill `{names}` in the help, when it is shown.
    """

    def __init__(
        self, *args: Any, group: str = "Options", field: str = "", names: Names | None = None, **settings: Any
    ) -> None:
        """Take click's arguments."""
        super().__init__(*args, **settings)
        self.group, self.field, self.names = group or "Options", field, names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The flag and its help, with the names filled in."""
        if self.names is not None:
            self.help = (self.help or "").replace("{names}", ", ".join(self.names()))
        return super().get_help_record(ctx)


class Finite(click.FloatRange):
    """A finite number, in a range if there is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert; nan and inf fail."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()


class Presets(Protocol):
    """Presets by name, each {flag without dashes, or field: value}: a dict or a registry."""

    def __iter__(self) -> Iterator[str]:
        """The names."""
        ...

    def get(self, name: str, /) -> Mapping[str, Any] | None:
        """The preset of a name."""
        ...


class Preset(Option):
    """An option whose value gives other options their defaults."""

    def __init__(self, *args: Any, presets: Presets, **settings: Any) -> None:
        """Take click's arguments, and the presets."""
        super().__init__(*args, type=Name(presets), **settings)
        self.presets = presets

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """The defaults that a command line asks for, by flag without dashes."""
        name = _value_of(self.opts, words)
        known = self.presets.get(name) if name in set(self.presets) and name else None
        return {flag.replace("_", "-"): value for flag, value in (known or {}).items()}


class Name(click.ParamType[str]):
    """One of some names."""

    name = "name"

    def __init__(self, names: Iterable[str]) -> None:
        """Args: `names`, iterated when they are needed."""
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return a known name; others fail with the nearest."""
        known = list(self.names)
        if value not in known:
            close = difflib.get_close_matches(value, known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
            self.fail(f"{value!r} is unknown; {hint}", param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        """The names, as those of a `Choice`."""
        return f"[{'|'.join(self.names)}]"


@dataclass(frozen=True)
class ByName:
    """An option that names a registered thing, such as `--model`; the command has the options of that thing too.

    Attributes:
        param: parameter of the option. default: its value where the command has no such option.
        noun: what is named, for errors and headings.
        names: all of them. options: name -> the dataclass of its options.
        every: value of the option that stands for all names.
    """

    param: str
    noun: str
    names: Names
    options: Callable[[str], type]
    default: str = ""
    every: str = ""

    def name(self, command: click.Command, words: Sequence[str], preset: Mapping[str, Any]) -> str:
        """The name on a command line, before that is parsed."""
        param = next((known for known in command.params if known.name == self.param), None)
        if param is None:
            return self.default
        return _value_of(param.opts, words) or preset.get(param.opts[0].lstrip("-")) or str(param.default)

    def params(self, name: str, taken: Collection[str]) -> list[Option]:
        """The options of a name, or of all where it is `every`; of several with one flag the first.

        Raises:
            UserError: unknown name, or one of its flags is taken by the command itself.
        """
        found: dict[str, Option] = {}
        for each in self.names() if self.every and name == self.every else [name]:
            heading = f"Options of {self.noun} {each}"
            for known in declared(self.options(each)):
                option = to_option(known, prefix=f"{self.param}_", group=heading)
                if clash := set(option.opts) & set(taken):
                    raise UserError(f"{self.noun} {each} declares {', '.join(clash)}, a flag of the command; rename it")
                found.setdefault(known.flag, option)
        return list(found.values())

    def refuse(self, flag: str, name: str) -> None:
        """Raise a UserError where the flag is one of another name's."""
        owners = [
            other
            for other in self.names()
            if any(flag in known.flag.split("/") for known in declared(self.options(other)))
        ]
        if owners:
            raise UserError(f"{self.noun} {name} has no option {flag}; it is one of {', '.join(owners)}; leave it out")


def to_option(known: Declared, *, prefix: str = "", **changes: Any) -> Option:
    """An option of a command as a field declares it; `changes` are arguments of `Option` that win."""
    kind: Any = known.kind
    bounds: dict[str, Any] = {"min": known.least, "max": known.most, "min_open": known.above, "max_open": known.below}
    if known.choices:
        kind = click.Choice(known.choices)
    elif kind is float:
        kind = Finite(**bounds)
    elif kind is int and (known.least, known.most) != (None, None):
        kind = click.IntRange(**bounds)
    settings: dict[str, Any] = {"type": kind, "help": known.help or None, "group": known.group, "field": known.name}
    if kind is bool:
        settings |= {"is_flag": True, "type": None}
    if known.default is MISSING:
        settings["required"] = True
    elif known.default is not None:
        settings["default"] = known.default
    return Option([known.flag, prefix + known.name], **(settings | changes))


def make_options(
    kind: type, *, only: Collection[str] | None = None, without: Collection[str] = (), **changes: Mapping[str, Any]
) -> list[Option]:
    """The options that a dataclass declares.

    Args:
        kind: the dataclass.
        only, without: fields that are options of this command, or are not.
        changes: field -> arguments of `Option` that win over its declaration.
    """
    wanted = [known for known in declared(kind) if known.name not in without and (only is None or known.name in only)]
    return [to_option(known, **changes.get(known.name, {})) for known in wanted]


def options_of(kind: type, **settings: Any) -> Callable[[F], F]:
    """Decorate a command with the options of a dataclass; `settings` are those of `make_options`."""

    def apply(function: F) -> F:
        params: list[click.Parameter] = function.__dict__.setdefault("__click_params__", [])
        params += reversed(make_options(kind, **settings))
        return function

    return apply


def _value_of(flags: Sequence[str], words: Sequence[str]) -> str | None:
    """The last value of an option among words that are not parsed yet."""
    found = None
    for word, following in itertools.pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found = value if equals else following
    return found
