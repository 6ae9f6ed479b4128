"""Runs under the preloaded `refuse.c`: what wmcache does where a file system refuses a system call. Prints JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from wmcache.cache import TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import seal, write_json
from wmcache.common.tensors import load_tensors, open_tensors
from wmcache.trainer import checkpoint


@contextmanager
def refused(call: str, number: int, path: Path) -> Iterator[None]:
    """A system call fails for all files whose path begins so."""
    os.environ.update(REFUSE_CALL=call, REFUSE_ERRNO=str(number), REFUSE_PATH=str(path))
    try:
        yield
    finally:
        os.environ["REFUSE_CALL"] = ""


def said(action: Callable[[], Any]) -> list[str]:
    """The kind of the error that came of it, and its message."""
    try:
        action()
    except (UserError, OSError) as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def command(*words: object) -> list[Any]:
    """Exit status and output of a command."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    return [result.exit_code, result.output]


def without_maps(store: Path, number: int) -> dict[str, Any]:
    """Reading a store that cannot be mapped, whole and with one bit flipped."""
    frames = np.random.default_rng(0).permutation(len(TokenStore.open(store)))
    expected = TokenStore.open(store).gather(frames)
    copy = Path(shutil.copytree(store, store.with_name(f"no-maps-{number}.zarr")))
    with refused("mmap", number, copy):
        found = TokenStore.open(copy)
        found.prefetch(frames)
        equal = bool(np.array_equal(found.gather(frames), expected))
        loaded = bool(np.array_equal(TokenStore.open(copy).load(quiet=True)[frames], expected))
        sound = command("verify", copy)
        file = Path(str(shard_file(copy, 1)))
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        first = found.card.frames_per_shard
        damaged = said(lambda: TokenStore.open(copy).gather(np.array([first])))
        others = bool(
            np.array_equal(TokenStore.open(copy).gather(np.arange(first)), expected[np.argsort(frames)][:first])
        )
        found_by_verify = command("verify", copy)
    shutil.rmtree(copy)
    return {
        "equal": equal and loaded,
        "sound": sound,
        "damaged": damaged,
        "others": others,
        "verify": found_by_verify,
        "first": first,
    }


def unreadable(store: Path, dataset: Path, weights: Path, number: int) -> dict[str, Any]:
    """What is said of a store, a dataset, weights and a checkpoint of which the system cannot read a file."""
    encoder = ["--encoder", "tcn", "--weights", weights, "--device", "cpu"]
    again = ["extract", "--dataset", dataset, *encoder, "--out", store]
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    found: dict[str, Any] = {}
    for name in ("tokens/c.1.0.0", "zarr.json", "tokens/zarr.json", "action/c", "tokens/commits/000001.json"):
        with refused("open", number, store / name):
            found[f"verify {name}"] = command("verify", store)
            if number == errno.EIO:
                found[f"repair {name}"] = command("repair", store)
                found[f"extract {name}"] = command(*again)
            if name == "tokens/c.1.0.0":
                found["gather"] = [1, said(lambda: TokenStore.open(store).load(quiet=True))[1]]
    found["changed"] = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} != before
    for name in ("dataset.json", "steps.parquet", "frames-000001.tar") if number == errno.EIO else ():
        with refused("open", number, dataset / name):
            other = store.with_name("other.zarr")
            found[f"extract {name}"] = command(*again[:-1], other)
            shutil.rmtree(other, ignore_errors=True)
    with refused("open", number, weights):
        found["extract weights"] = command(*again)
    return found


def tensors(folder: Path) -> dict[str, Any]:
    """A checkpoint and a file of weights, without maps and unreadable."""
    run = folder / "step-00000001"
    run.mkdir()
    values = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(())}
    file = run / "model.safetensors"
    save_file(values, file, {"encoder": "tcn"})
    write_json(run / "state.json", seal({"sha256": {file.name: sha256_of(file)}}))
    with refused("mmap", errno.ENODEV, run):
        loaded, read = load_tensors(file), checkpoint.load_tensors(run, file.name)
        with open_tensors(file) as opened:
            metadata = opened.metadata()
    same = all(torch.equal(there[name], value) for there in (loaded, read) for name, value in values.items())
    with refused("open", errno.EIO, file):
        failed = said(lambda: checkpoint.load_tensors(run, file.name))
    with refused("open", errno.ESTALE, run / "state.json"):
        stale = said(lambda: checkpoint.load_tensors(run, file.name))
    return {"same": same and loaded.keys() == values.keys(), "metadata": metadata, "failed": failed, "stale": stale}


def without_locks(folder: Path, store: Path, dataset: Path, weights: Path, number: int) -> dict[str, Any]:
    """Writing and reading where there are no file locks."""
    place = folder / f"no-locks-{number}"
    place.mkdir()
    encoder = ["--encoder", "tcn", "--weights", weights, "--device", "cpu"]
    with refused("flock", number, place):
        extracted = command("extract", "--dataset", dataset, *encoder, "--out", place / "new.zarr")
        left = sorted(path.name for path in place.iterdir())
        copy = Path(shutil.copytree(store, place / "tcn.zarr"))
        verified = command("verify", copy)
        finished = command("extract", "--dataset", dataset, *encoder, "--out", copy)
        read = len(TokenStore.open(copy).gather(np.arange(9)))
    return {
        "place": str(place / "new.zarr"),
        "extract": extracted,
        "left": left,
        "verify": verified,
        "finished": finished,
        "read": read,
    }


def work() -> None:
    """Args: a folder to work in, a store, its dataset, its encoder's weights."""
    folder, store, dataset, weights = (Path(word) for word in sys.argv[1:])
    results = {
        "maps": {number: without_maps(store, number) for number in (errno.ENODEV, errno.EACCES)},
        "unreadable": {number: unreadable(store, dataset, weights, number) for number in (errno.EIO, errno.ESTALE)},
        "tensors": tensors(folder),
        "locks": {
            number: without_locks(folder, store, dataset, weights, number) for number in (errno.ENOLCK, errno.ENOSYS)
        },
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    work()
