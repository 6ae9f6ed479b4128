"""Files in which torch.save has pickled whole modules, read without a pickle being run.

A pickle is a program, and Python's own reader runs it. Here its instructions are carried out on values of ours: a name stays a name, a
call becomes a record of what would have been called, and numbers are read straight out of the zip. So nothing is imported and nothing is
called, whatever the file says; and a name that is not known is refused all the same, as nobody knows what it would have meant.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.paths import cause_outside, unreadable

AGAIN = "get the checkpoint again from where you trust it to come from"
RESAVE = "get it again; a file of PyTorch before 1.6 has to be saved again by a newer one"

MOST_PROGRAM_BYTES = 64_000_000
"""Of the pickle beside the numbers; a DINO-WM checkpoint has less than one million."""
MOST_DIMENSIONS = 64

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
DICTS = ("collections.OrderedDict", "collections.defaultdict")
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that the file names."""

    text: str


@dataclass(eq=False, repr=False)
class Record:
    """What an object was made of, instead of the object.

    Attributes:
        kind: name of its class, or of the function that would have made it.
        arguments: of that. state: what it would have been given then; a dict for modules.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers in the archive."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor lies in the archive; `Archive.read` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Archive:
    """A file of torch.save, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it is missing, or not a plain zip with a pickle and numbers in it.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; name the folder that holds hydra.yaml and checkpoints/") from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if outside := cause_outside(error):
                raise unreadable(path, outside) from error
            raise UserError(f"{path} is not a whole file of torch.save ({_reason(error)}); {RESAVE}") from error
        members = self._zip.infolist()
        self._sizes = {member.filename: member.file_size for member in members}
        programs = [name for name in self._sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(self._sizes) != len(members):
            raise UserError(f"{path} is a zip, but not one of torch.save; {AGAIN}")
        # Otherwise a small file could become a large one.
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise UserError(f"{path} is a compressed zip, which torch.save never writes; {AGAIN}")
        self._folder = programs[0].removesuffix("data.pkl")
        if self._sizes[programs[0]] > MOST_PROGRAM_BYTES:
            raise UserError(f"{path} describes more than any checkpoint of DINO-WM holds; {AGAIN}")
        if f"{self._folder}byteorder" in self._sizes and self._bytes("byteorder") != b"little":
            raise UserError(f"{path} holds numbers in another byte order; save it again on a common machine")

    def __enter__(self) -> Archive:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._zip.close()

    def load(self, known: Callable[[str], bool]) -> Any:
        """What was saved, with a `Record` for every object and a `StoredTensor` for every tensor.

        Args:
            known: which names of classes and functions the file may hold, beside those of tensors and dicts.

        Raises:
            UserError: the file holds another name, which the message tells, or is damaged.
        """
        try:
            return self._interpret(self._bytes("data.pkl"), known)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{self.path} is damaged ({_reason(error)}); {AGAIN}") from error

    def read(self, tensor: StoredTensor) -> Tensor:
        """A tensor's numbers.

        Raises:
            UserError: they are damaged.
        """
        storage = tensor.storage
        if not storage.count:
            return torch.empty(tensor.shape, dtype=storage.dtype)
        values = torch.frombuffer(bytearray(self._bytes(f"data/{storage.key}")), dtype=storage.dtype)
        return values.as_strided(tensor.shape, tensor.stride, tensor.offset).clone()

    def _bytes(self, name: str) -> bytes:
        try:
            found = self._zip.read(self._folder + name)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            if outside := cause_outside(error):
                raise unreadable(self.path, outside) from error
            raise UserError(f"{self.path} is damaged ({_reason(error)}); {AGAIN}") from error
        if len(found) != self._sizes[self._folder + name]:
            raise UserError(f"{self.path} is damaged ({name} is cut off); {AGAIN}")
        return found

    def _interpret(self, program: bytes, known: Callable[[str], bool]) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            place = marks.pop()
            values = stack[place:]
            del stack[place:]
            return values

        argument: Any
        for opcode, argument, _ in pickletools.genops(program):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case name if name in LITERALS:
                    stack.append(argument)
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    count = int(name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "APPEND":
                    value = stack.pop()
                    _expect(stack[-1], list).append(value)
                case "APPENDS":
                    values = since_mark()
                    _expect(stack[-1], list).extend(values)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set(_expect(stack[-1], dict), key, value)
                case "SETITEMS":
                    values = since_mark()
                    for key, value in zip(values[::2], values[1::2], strict=True):
                        _set(_expect(stack[-1], dict), key, value)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self._name(".".join(argument.split(" ", 1)), known))
                case "STACK_GLOBAL":
                    name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                    stack.append(self._name(f"{module}.{name}", known))
                case "REDUCE" | "NEWOBJ":
                    arguments = _expect(stack.pop(), tuple)
                    stack.append(_made(_expect(stack.pop(), Name).text, arguments))
                case "BUILD":
                    state = stack.pop()
                    record = _expect(stack[-1], Record)
                    if record.state is not None:
                        raise ValueError("an object is given its contents twice")
                    record.state = state
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "STOP":
                    (value,) = stack
                    return value
                case name:
                    raise UserError(
                        f"{self.path} holds {name} {argument or ''}, which torch.save does not write; "
                        f"nothing was run; {AGAIN}"
                    )
        raise ValueError("it has no end")

    def _name(self, text: str, known: Callable[[str], bool]) -> Name:
        if text not in DTYPES and text not in DICTS and text not in (TENSOR, PARAMETER) and not known(text):
            raise UserError(
                f"{self.path} asks for {text[:200]}, which no checkpoint of DINO-WM needs; nothing was run; {AGAIN}"
            )
        return Name(text)

    def _storage(self, identifier: object) -> Storage:
        """What torch.save writes of a storage: ("storage", its type, key, device, count)."""
        word, kind, key, _, count = _expect(identifier, tuple)
        dtype = DTYPES[_expect(kind, Name).text]
        if word != "storage" or type(count) is not int or not (isinstance(key, str) and key.isdecimal()):
            raise ValueError("a storage is not described as torch.save does")
        size = self._sizes[f"{self._folder}data/{key}"]
        if count < 0 or count * dtype.itemsize != size:
            raise ValueError(f"it claims {count} numbers where it holds {size} bytes")
        return Storage(key, dtype, count)


def _made(kind: str, arguments: tuple[Any, ...]) -> Any:
    """What an object is here, instead of what `kind(*arguments)` would be."""
    if kind == TENSOR:
        storage, offset, shape, stride, *_ = arguments
        return _tensor(_expect(storage, Storage), offset, _expect(shape, tuple), _expect(stride, tuple))
    if kind == PARAMETER:
        return _expect(arguments[0], StoredTensor)
    if kind in DICTS:
        return {}
    return Record(kind, arguments)


def _tensor(storage: Storage, offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor's shape is not one")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # As many numbers as are there, so that none is larger than the file; and no dimension too many for torch.
    if len(shape) > MOST_DIMENSIONS or math.prod(shape) > storage.count or (0 not in shape and last >= storage.count):
        raise ValueError(f"a tensor of {len(shape)} dimensions does not fit the {storage.count} numbers it is made of")
    return StoredTensor(storage, offset, shape, stride)


def _set(values: dict[Any, Any], key: object, value: object) -> None:
    # Tuples could be nested so deeply that hashing them ends the process.
    if not isinstance(key, str | int | float | StoredTensor | None):
        raise TypeError(f"a dict has a {type(key).__name__} as key")
    values[key] = value


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def shown(value: object) -> str:
    """A stranger's value in a message: whatever it is, it is short, and showing it takes no time."""
    plain = isinstance(value, str | float | bool | None) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
