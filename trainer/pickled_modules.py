"""Reads files in which torch.save has pickled state dicts or whole modules, without importing or calling anything that they name.

Python's own unpickler is limited to the instructions that torch.save writes; a call makes a `Record` of what would have been called.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from wmcache.common.errors import UserError, reason
from wmcache.common.paths import cause_outside, unreadable

AGAIN = "get the checkpoint again from a source that you trust"
MAX_PROGRAM_BYTES = 64_000_000  # the pickle without the numbers; a DINO-WM checkpoint has less than one million
MAX_DIMENSIONS = 64
INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)
DAMAGE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
)


class Record:
    """An object of the file: `kind` names its class or the function that makes it, `state` is a dict for modules."""

    def __init__(self, kind: str, *_: object) -> None:
        """Ignore the arguments of the call."""
        self.kind = kind
        self.state: Any = None


def load_modules(path: Path, known: Callable[[str], bool]) -> Any:
    """Load what was saved, with a `Record` for every object; raises UserError with a name of a class or function that is not `known`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _Unpickler(path, archive, known).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a checkpoint that does") from None
    except DAMAGE as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} is damaged, or not of PyTorch 1.6 or newer ({reason(error)}); {AGAIN}") from error


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, path: Path, archive: zipfile.ZipFile, known: Callable[[str], bool]) -> None:
        members = {member.filename: member for member in archive.infolist()}
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(members) != len(archive.infolist()):
            raise UserError(f"{path} is a zip, but not one of torch.save; {AGAIN}")
        # Otherwise a small file could become a large one.
        size = sum(member.file_size for member in members.values())
        compressed = any(member.compress_type or member.flag_bits & 1 for member in members.values())
        if compressed or size > path.stat().st_size:
            raise UserError(f"{path} is a compressed zip, which torch.save never writes; {AGAIN}")
        if members[programs[0]].file_size > MAX_PROGRAM_BYTES:
            raise UserError(f"{path} has a larger pickle than any such checkpoint; {AGAIN}")
        self._folder = programs[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"
        if order in members and archive.read(order) != b"little":
            raise UserError(f"{path} has numbers in another byte order; save it again on a little-endian machine")
        super().__init__(io.BytesIO(archive.read(programs[0])))
        self._path, self._archive, self._known = path, archive, known
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        text = f"{module}.{name}"
        if text in REBUILT:
            return REBUILT[text]
        if not self._known(text):
            raise UserError(f"{self._path} names {text[:200]}, which no such checkpoint needs; {AGAIN}")
        return functools.partial(Record, text)

    def persistent_load(self, pid: Any) -> Tensor:
        """Read a storage: ("storage", its type, key, device, count)."""
        word, dtype, key, _, count = _require_tuple(pid)
        if word != "storage" or type(count) is not int or not (isinstance(key, str) and key.isdecimal()):
            raise ValueError("a storage is not described as by torch.save")
        if key not in self._storages:
            values = self._archive.read(f"{self._folder}data/{key}")
            if count * dtype.itemsize != len(values):
                raise ValueError(f"a storage of {count} numbers has {len(values)} bytes")
            tensor = torch.frombuffer(bytearray(values), dtype=dtype) if count else torch.empty(0, dtype=dtype)
            self._storages[key] = tensor
        return self._storages[key]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(function(*_require_tuple(arguments)))

    def load_build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is dict:  # attributes of an OrderedDict, such as versions of a state dict
            return
        if type(record) is not Record or record.state is not None:
            raise ValueError("it sets the state of no object, or twice")
        record.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        # Tuples could be nested so deeply that hashing them ends the process.
        plain = all(isinstance(key, str | int | float | Tensor | None) for key in keys)
        if type(self.stack[-1]) is not dict or not plain:
            raise TypeError("a key of a dict is not a plain value")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def load_other(self) -> None:
        raise ValueError("an instruction that torch.save does not write")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(range(256), load_other),
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in INSTRUCTIONS},
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _require_tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise TypeError(f"tuple expected, {type(value).__name__} found")
    return value


def _tensor(storage: Tensor, offset: int, shape: Any, stride: Any, *_: object) -> Tensor:
    numbers = (offset, *_require_tuple(shape), *_require_tuple(stride))
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor has an impossible shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # Not more numbers than the storage has, so that a tensor is never larger than the file.
    count = storage.numel()
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) > count or (0 not in shape and last >= count):
        raise ValueError(f"a tensor of {len(shape)} dimensions does not fit its storage of {count} numbers")
    return storage.as_strided(shape, stride, offset)


REBUILT: dict[str, Any] = {
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
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict"), lambda *_: {}),
}


def shown(value: object) -> str:
    """Format a value from a file for a message; short and fast for any value."""
    plain = isinstance(value, str | float | bool | None) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"
