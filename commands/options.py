"""Options of click's, made of the fields of options dataclasses (`common.options`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

import click

from wmcache.common.errors import UserError, suggest
from wmcache.common.options import Declared, declared
from wmcache.common.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])
Names = Callable[[], Iterable[str]]


class Option(click.Option):
    """An option under the heading `group` of the help; `field` of a dataclass declares it, `names` fill `{names}` in the help."""

    def __init__(
        self, *args: Any, group: str = "Options", field: str = "", names: Names | None = None, **settings: Any
    ) -> None:
        """Take click's arguments."""
        super().__init__(*args, **settings)
        self.group, self.field, self.names = group or "Options", field, names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Fill the names in."""
        if self.names is not None:
            self.help = (self.help or "").replace("{names}", ", ".join(self.names()))
        return super().get_help_record(ctx)


class Finite(click.FloatRange):
    """A finite number, in a range if there is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse nan and inf."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()


class Preset(Option):
    """An option whose value gives other options their defaults; each preset is {flag without dashes, or field: value}."""

    def __init__(self, *args: Any, presets: Mapping[str, Any] | Registry[Any], **settings: Any) -> None:
        """Take click's arguments, and the presets."""
        super().__init__(*args, type=Name(presets), **settings)
        self.presets = presets

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the defaults that a command line asks for, by flag without dashes."""
        name = _value_of(self.opts, words)
        known = (self.presets.get(name) if name and name in self.presets else None) or {}
        return {flag.replace("_", "-"): value for flag, value in known.items()}


class Name(click.ParamType[str]):
    """One of some names, which are iterated when they are needed."""

    name = "name"

    def __init__(self, names: Iterable[str]) -> None:
        """Import nothing yet."""
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse an unknown name, with the nearest."""
        if value not in (known := list(self.names)):
            self.fail(f"{value!r} is unknown; {suggest(value, known)}", param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        """Show the names as those of a `Choice`."""
        return f"[{'|'.join(self.names)}]"


@dataclass(frozen=True)
class ByName:
    """An option that names a registered thing, such as `--model`; the command has the options of that thing too.

    Attributes:
        options: name -> the dataclass of its options.
        default: the name where the command has no parameter `param`.
        every: value of the option that means all names.
    """

    param: str
    noun: str
    names: Names
    options: Callable[[str], type]
    default: str = ""
    every: str = ""

    def name(self, command: click.Command, words: Sequence[str], preset: Mapping[str, Any]) -> str:
        """Return the name on a command line, before that is parsed."""
        param = next((known for known in command.params if known.name == self.param), None)
        if param is None:
            return self.default
        return _value_of(param.opts, words) or preset.get(param.opts[0].lstrip("-")) or str(param.default)

    def params(self, name: str, taken: Collection[str]) -> list[Option]:
        """Make the options of a name, or of all where it is `every`; raise UserError where a flag is one of the command's own."""
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
        flags = {
            other: {part for known in declared(self.options(other)) for part in known.flag.split("/")}
            for other in self.names()
        }
        if owners := [other for other in flags if flag in flags[other]]:
            raise UserError(f"{self.noun} {name} has no option {flag}; it is one of {', '.join(owners)}; leave it out")


def to_option(known: Declared, *, prefix: str = "", **changes: Any) -> Option:
    """Make an option as a field declares it; `changes` are arguments of `Option` that win."""
    kind: Any = known.kind
    if known.choices:
        kind = click.Choice(known.choices)
    elif kind is float:
        kind = Finite(**known.bounds)
    elif kind is int and known.bounds:
        kind = click.IntRange(**known.bounds)
    settings: dict[str, Any] = {"type": kind, "help": known.help or None, "group": known.group, "field": known.name}
    if kind is bool:
        settings |= {"is_flag": True, "type": None}
    if known.default is not None:
        settings |= {"required": True} if known.default is MISSING else {"default": known.default}
    if known.default == "":
        settings["show_default"] = False  # the help says what none means
    return Option([known.flag, prefix + known.name], **(settings | changes))


def make_options(kind: type, *, only: Collection[str] = (), **changes: Mapping[str, Any]) -> list[Option]:
    """Make the options that a dataclass declares, or `only` some; `changes` are field -> arguments of `Option` that win."""
    wanted = [known for known in declared(kind) if not only or known.name in only]
    return [to_option(known, **changes.get(known.name, {})) for known in wanted]


def options_of(kind: type, **settings: Any) -> Callable[[F], F]:
    """Decorate a command with the options of a dataclass; `settings` are those of `make_options`."""

    def apply(function: F) -> F:
        params: list[click.Parameter] = function.__dict__.setdefault("__click_params__", [])
        params += reversed(make_options(kind, **settings))
        return function

    return apply


def _value_of(flags: Sequence[str], words: Sequence[str]) -> str | None:
    """Return the last value of an option among words that are not parsed yet."""
    found = None
    for word, following in itertools.pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found = value if equals else following
    return found
