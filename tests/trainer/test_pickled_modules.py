"""A checkpoint of whole modules is never unpickled: unknown names are refused by name, and damage is one line."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections import OrderedDict
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from reference_dino_wm import make_hydra, make_parts, refuse, write

from wmcache.common.errors import UserError
from wmcache.trainer.import_dino_wm import import_dino_wm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.pickled_modules import MAX_PROGRAM_BYTES

MODEL = Path("checkpoints", "model_latest.pth")


class Call:
    """Makes a pickle that calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {}", "posix.system"),
        (builtins.exec, "open({!r}, 'w')", ".exec"),
        (pickle.loads, b"", "pickle.loads"),
        (torch.load, "{}", "torch.serialization.load"),
        (getattr, "{}", ".getattr"),
        (io.FileIO, "{}", "_io.FileIO"),
    ],
)
def test_a_function_in_the_file_is_named_and_not_called(
    cache: Path, tmp_path: Path, function: Any, argument: Any, name: str, protocol: int
) -> None:
    call = Call(function, argument.format(str(tmp_path / "canary")) if isinstance(argument, str) else argument)
    parts = make_parts(1)
    # In the middle of a file that is good otherwise; a newer protocol has other instructions for a name.
    parts["predictor"].transformer.layers[1][0].to_out.extra = call
    value = parts if protocol == 2 else {"epoch": call}
    refuse(write(tmp_path / "theirs", value, make_hydra(), pickle_protocol=protocol), cache, tmp_path, name)


@pytest.mark.parametrize("key", ["epoch", "predictor", "encoder", "predictor_optimizer", "unknown"])
def test_no_part_of_the_file_is_exempt(cache: Path, tmp_path: Path, key: str) -> None:
    call = Call(os.system, f"touch {tmp_path / 'canary'}")
    refuse(write(tmp_path / "theirs", {**make_parts(1), key: call}, make_hydra()), cache, tmp_path, "posix.system")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1), "multiarray.scalar"),
        (Call(vars(sys.modules["copyreg"])["_reconstructor"], OrderedDict, dict, {}), "_reconstructor"),
        (Path("x"), "PosixPath"),
        (TrainOptions(), "wmcache.trainer.options.TrainOptions"),
        (torch.zeros(2).to_sparse(), "_rebuild_sparse_tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_class_is_named(cache: Path, tmp_path: Path, value: Any, name: str) -> None:
    refuse(write(tmp_path / "theirs", {**make_parts(1), "epoch": value}, make_hydra()), cache, tmp_path, name)


def test_no_class_of_the_file_is_imported(folder: Path, cache: Path, tmp_path: Path) -> None:
    package = tmp_path / "path" / "models"
    package.mkdir(parents=True)
    (package / "vit.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        import_dino_wm(folder, cache, tmp_path / "run")
    assert not (tmp_path / "canary").exists()
    assert "models.vit" not in sys.modules


def write_program(theirs: Path, program: bytes, storage: bytes = b"", **settings: Any) -> Path:
    """A checkpoint whose pickle is just this, beside one storage."""
    file = theirs / MODEL
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", **settings) as archive:
        archive.writestr("model/data.pkl", program)
        archive.writestr("model/data/0", storage)
    (theirs / "hydra.yaml").write_text(yaml.safe_dump(make_hydra()))
    return theirs


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def tensor(count: int, offset: int, shape: int, stride: int, key: str = "0") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    layout = number(offset) + number(shape) + b"\x85" + number(stride) + b"\x85"
    return b"\x80\x02}" + text("epoch") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + b"\x89}tRs."


@pytest.mark.parametrize(
    "program",
    [
        tensor(4, 0, 2**60, 0),  # more numbers than the storage has
        tensor(4, 1, 4, 1),
        tensor(4, 0, 2, 4),
        tensor(4, -1, 2, 1),
        tensor(4, 0, 2, -1),
        tensor(2**40, 0, 4, 1),
        tensor(4, 0, 4, 1, "../0"),
        tensor(4, 0, 4, 1, "7"),
        b"\x80\x02}(K\x01r\xff\xff\xff\x7fK\x02u.",  # a memo of two thousand million entries
        b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",  # tuples nested so deeply that hashing them ends the process
        b"\x80\x02}" + text("epoch") + b"N" + b"\x85" * 100_000 + b"s.",
        b"\x80\x02ctorch\nFloatStorage\n)R}b.",
        b"\x80\x02ctorch.nn.modules.container\noperator.attrgetter\n)\x81}(" + text("x") + b"NuR.",
        b"\x80\x02cmodels.vit\nX\n)\x81}b}b.",  # a state that is set twice
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86b.",  # of a function
        tensor(4, 0, 4, 1)[:-3] + b"N)s.",  # an item of a tensor
        b"\x80\x02cmodels.vit\nX\n" + tensor(4, 0, 4, 1)[2:-2] + b"R.",  # arguments that are a tensor
        b"(iposix\nsystem\n.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02}",
        b"\x80\x02t.",
        b"",
        b"\x80\x02cos",
        b"\x80\x04\x8c\x01xK\x01\x93.",
    ],
)
def test_a_handmade_pickle_is_refused(cache: Path, tmp_path: Path, program: bytes) -> None:
    refuse(write_program(tmp_path / "theirs", program, b"\0" * 16), cache, tmp_path, "model_latest.pth")


def test_sizes_are_limited(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, program = tmp_path / "theirs", b"\x80\x02" + b"N0" * 10_000_000 + b"}."
    refuse(write_program(theirs, program, compression=zipfile.ZIP_DEFLATED), cache, tmp_path, "compressed")
    assert MAX_PROGRAM_BYTES > 1_000_000
    monkeypatch.setattr("wmcache.trainer.pickled_modules.MAX_PROGRAM_BYTES", 99)
    refuse(write_program(theirs, program[:200] + b"}."), cache, tmp_path, "larger pickle")
    monkeypatch.undo()
    with zipfile.ZipFile(write_program(theirs, b"\x80\x02}.", b"\0" * 1000) / MODEL, "a") as archive:
        again = copy(archive.getinfo("model/data/0"))
        again.filename = "model/data/1"
        archive.filelist.append(again)  # the same bytes by another name
        archive.writestr("model/version", "3")
    refuse(theirs, cache, tmp_path, "compressed")
    parts = make_parts(1)
    parts["predictor"].transformer._modules["again"] = parts["predictor"]
    refuse(write(theirs, parts, make_hydra()), cache, tmp_path, "2000 modules")


def test_damage_anywhere_in_the_pickle_is_one_line_or_harmless(folder: Path, cache: Path, tmp_path: Path) -> None:
    file = folder / MODEL
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    generator = random.Random(0)
    for _ in range(60):
        program = bytearray(members[name])
        for _ in range(generator.choice([1, 3])):
            program[generator.randrange(len(program))] = generator.randrange(256)
        with zipfile.ZipFile(file, "w") as archive:
            for member, value in {**members, name: bytes(program)}.items():
                archive.writestr(member, value)
        with contextlib.suppress(UserError):  # any other error fails the test
            import_dino_wm(folder, cache, tmp_path / "run")
            shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder: Path, cache: Path, tmp_path: Path, share: float) -> None:
    file = folder / MODEL
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refuse(folder, cache, tmp_path, "model_latest.pth")


def test_a_flipped_bit_of_a_weight_is_noticed(folder: Path, cache: Path, tmp_path: Path) -> None:
    file = folder / MODEL
    content = bytearray(file.read_bytes())
    weight = make_parts(1)["predictor"].transformer.norm.weight.detach().numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    refuse(folder, cache, tmp_path, "Bad CRC-32")


def test_a_file_from_before_zips_is_refused(cache: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", {"epoch": 1}, make_hydra(), _use_new_zipfile_serialization=False)
    refuse(theirs, cache, tmp_path, "1.6")
