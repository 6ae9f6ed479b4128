"""Reads files in which torch.save has pickled whole modules, without running the pickle.

A pickle is a program, and Python's own reader runs it. Here its instructions build inert values: a name stays a name, a call becomes a
record of what would have been called, and numbers are read straight from the zip. So nothing is imported and nothing is called, whatever
the file contains. A name that is not known is refused as well, because its meaning would be lost.
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

from wmcache.common.errors import UserError, reason
from wmcache.common.paths import cause_outside, unreadable

AGAIN = "get the checkpoint again from a source that you trust"

MAX_PROGRAM_BYTES = 64_000_000
"""Size of the pickle without the numbers; that of a DINO-WM checkpoint is below one million."""
MAX_DIMENSIONS = 64

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
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that the file names."""

    text: str


@dataclass(eq=False, repr=False)
class Record:
    """How an object would have been made, in place of the object.

    Attributes:
        kind: name of its class, or of the function that would have made it.
        arguments: of that call.
        state: what would have been set afterwards; a dict for modules.
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
    """A view of a storage; `Archive.read` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Archive:
    """A file of torch.save, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it is missing, or not a plain zip with a pickle and numbers.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; name the folder with hydra.yaml and checkpoints/") from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if outside := cause_outside(error):
                raise unreadable(path, outside) from error
            raise UserError(
                f"{path} is not a complete file of torch.save ({reason(error)}); get it again; "
                "a file of PyTorch before 1.6 has to be saved again by a newer one"
            ) from error
        members = self._zip.infolist()
        self._sizes = {member.filename: member.file_size for member in members}
        programs = [name for name in self._sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(self._sizes) != len(members):
            raise UserError(f"{path} is a zip, but not one of torch.save; {AGAIN}")
        # Otherwise a small file could become a large one.
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise UserError(f"{path} is a compressed zip, which torch.save never writes; {AGAIN}")
        self._folder = programs[0].removesuffix("data.pkl")
        if self._sizes[programs[0]] > MAX_PROGRAM_BYTES:
            raise UserError(f"{path} has a larger pickle than any checkpoint of DINO-WM; {AGAIN}")
        if f"{self._folder}byteorder" in self._sizes and self._bytes("byteorder") != b"little":
            raise UserError(f"{path} has numbers in another byte order; save it again on a little-endian machine")

    def __enter__(self) -> Archive:
        """Return the archive."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._zip.close()

    def load(self, known: Callable[[str], bool]) -> Any:
        """Load what was saved, with a `Record` for every object and a `StoredTensor` for every tensor.

        Args:
            known: which names of classes and functions the file may contain, beside those of tensors and dicts.

        Raises:
            UserError: the file contains another name, which the message repeats, or is damaged.
        """
        try:
            return self._interpret(self._bytes("data.pkl"), known)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{self.path} is damaged ({reason(error)}); {AGAIN}") from error

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read the numbers of a tensor; raises UserError where they are damaged."""
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
            raise UserError(f"{self.path} is damaged ({reason(error)}); {AGAIN}") from error
        if len(found) != self._sizes[self._folder + name]:
            raise UserError(f"{self.path} is damaged ({name} is truncated); {AGAIN}")
        return found

    def _interpret(self, program: bytes, known: Callable[[str], bool]) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(program):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case name if name in EMPTY:
                    stack.append(EMPTY[name]())
                case name if name in LITERALS:
                    stack.append(argument)
                case "MARK":
                    marks.append(len(stack))
                case name if name.startswith(("TUPLE", "APPEND", "SETITEM")):
                    _collect(name, stack, marks)
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
                    stack.append(_make(_expect(stack.pop(), Name).text, arguments))
                case "BUILD":
                    state = stack.pop()
                    record = _expect(stack[-1], Record)
                    if record.state is not None:
                        raise ValueError("the state of an object is set twice")
                    record.state = state
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "STOP":
                    (value,) = stack
                    return value
                case name:
                    raise UserError(
                        f"{self.path} has {name} {argument or ''}, which torch.save does not write; "
                        f"nothing was run; {AGAIN}"
                    )
        raise ValueError("it has no end")

    def _name(self, text: str, known: Callable[[str], bool]) -> Name:
        if text not in DTYPES and text not in DICTS and text not in (TENSOR, PARAMETER) and not known(text):
            raise UserError(
                f"{self.path} names {text[:200]}, which no checkpoint of DINO-WM needs; nothing was run; {AGAIN}"
            )
        return Name(text)

    def _storage(self, identifier: object) -> Storage:
        """Parse what torch.save writes for a storage: ("storage", its type, key, device, count)."""
        word, kind, key, _, count = _expect(identifier, tuple)
        dtype = DTYPES[_expect(kind, Name).text]
        if word != "storage" or type(count) is not int or not (isinstance(key, str) and key.isdecimal()):
            raise ValueError("a storage is not described as by torch.save")
        size = self._sizes[f"{self._folder}data/{key}"]
        if count < 0 or count * dtype.itemsize != size:
            raise ValueError(f"a storage of {count} numbers has {size} bytes")
        return Storage(key, dtype, count)


def _collect(name: str, stack: list[Any], marks: list[int]) -> None:
    """Put the values on top of the stack into a tuple, a list or a dict."""
    counts = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
    start = len(stack) - counts[name] if name in counts else marks.pop()
    if start < 0:
        raise ValueError("its stack is empty")
    values = stack[start:]
    del stack[start:]
    if name.startswith("TUPLE"):
        stack.append(tuple(values))
    elif name.startswith("APPEND"):
        _expect(stack[-1], list).extend(values)
    else:
        target = _expect(stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Tuples could be nested so deeply that hashing them ends the process.
            if not isinstance(key, str | int | float | StoredTensor | None):
                raise TypeError(f"a dict has a {type(key).__name__} as key")
            target[key] = value


def _make(kind: str, arguments: tuple[Any, ...]) -> Any:
    """Return the inert value for `kind(*arguments)`."""
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
        raise ValueError("a tensor has an impossible shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # Not more numbers than the storage has, so that a tensor is never larger than the file.
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) > storage.count or (0 not in shape and last >= storage.count):
        raise ValueError(f"a tensor of {len(shape)} dimensions does not fit its storage of {storage.count} numbers")
    return StoredTensor(storage, offset, shape, stride)


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def shown(value: object) -> str:
    """Format a value from a file for a message: short, and in no time, whatever it is."""
    plain = isinstance(value, str | float | bool | None) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"
