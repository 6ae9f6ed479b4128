"""What the tests of damage do to files, the small store that they do it to, and what their child processes run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import psutil
import torch
import zarr
from click.testing import CliRunner
from fault_workers import extract_store

from wmcache.cache import StoreCard, TokenStore
from wmcache.cache.layout import read_attributes, read_card
from wmcache.cache.reader import ABSENT, ZarrReader
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.common.files import seal, sha256_of
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset, fingerprint
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train

FRAMES, PER_SHARD, SHARDS = 22, 4, 6
EVERY = np.arange(FRAMES)


@dataclass(frozen=True)
class Small:
    """22 frames in 6 tars, the last one short; weights of an encoder; and the undisturbed store made with both."""

    dataset: Path
    weights: Path
    store: Path

    def extract(self, store: Path, dtype: str = "float16") -> None:
        """The command that made the store, run again."""
        extract_store(store, self.dataset, self.weights, dtype)


def make_small(root: Path, weights: Path, dtype: str = "float16") -> Small:
    """Make it; the weights are copied, so that they can be deleted."""
    collect("UMaze", root / "small", episodes=1, length=FRAMES, image_size=16, frames_per_shard=PER_SHARD)
    small = Small(root / "small", Path(shutil.copy(weights, root / "tcn.safetensors")), root / "small.zarr")
    small.extract(small.store, dtype)
    return small


def replace(file: Path, data: bytes) -> None:
    """Other bytes under the same name, in a new file: whoever has the old one open or mapped keeps it."""
    other = file.with_name(f".{file.name}.other")
    other.write_bytes(data)
    other.replace(file)


def flip(file: Path, offset: int, mask: int = 1) -> None:
    """Change bits of a byte."""
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    replace(file, bytes(data))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what a JSON file says, and nothing else."""
    value = json.loads(file.read_bytes())
    edit(value)
    replace(file, (json.dumps(value, indent=2) + "\n").encode())


def forge(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a store's attributes and seal them again, as an enemy would."""

    def reseal(metadata: dict[str, Any]) -> None:
        metadata["attributes"].pop("checksum")
        edit(metadata["attributes"])
        metadata["attributes"] = seal(metadata["attributes"])

    edit_json(path / "zarr.json", reseal)


def forge_record(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a shard and seal it again."""
    values = json.loads(file.read_bytes())
    values.pop("checksum", None)
    edit(values)
    replace(file, json.dumps(seal(values)).encode())


def agree(dataset: Path, shard: int) -> None:
    """Make dataset.json agree with a tar, so that only what stands behind the checksums is left."""
    tar = dataset / f"frames-{shard:06d}.tar"

    def edit(card: dict[str, Any]) -> None:
        card["shards"][shard].update(sha256=sha256_of(tar), bytes=tar.stat().st_size)
        card["fingerprint"] = fingerprint(card["steps_sha256"], card["shards"])

    edit_json(dataset / "dataset.json", edit)


def index_bytes(card: StoreCard) -> int:
    """The length of a shard's index with its checksum."""
    return 16 * card.frames_per_shard + 4


def rewrite_index(file: Path, card: StoreCard, entries: dict[int, tuple[int, int]]) -> None:
    """Other places for some of a shard's frames, under a checksum that agrees."""
    data = file.read_bytes()
    index = bytearray(data[-index_bytes(card) : -4])
    for row, (offset, size) in entries.items():
        struct.pack_into("<QQ", index, 16 * row, offset, size)
    crc = struct.pack("<I", google_crc32c.value(bytes(index)))
    replace(file, data[: -index_bytes(card)] + bytes(index) + crc)


def lose_chunk(file: Path, card: StoreCard, row: int) -> None:
    """Make a shard say that it never had one of its frames."""
    rewrite_index(file, card, {row: (int(ABSENT), int(ABSENT))})


def stamps(*folders: Path) -> dict[Path, tuple[int, int]]:
    """What changes when a file is written anew."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def work_stamps(path: Path) -> dict[Path, tuple[int, int]]:
    """Of a store's shards and their records."""
    return shard_stamps(path) | stamps(path / "tokens" / "commits")


def shard_stamps(path: Path) -> dict[Path, tuple[int, int]]:
    """Of a store's shards."""
    return {file: stamp for file, stamp in stamps(path / "tokens").items() if file.name.startswith("c.")}


def zarr_reader(path: Path) -> ZarrReader:
    """The reader for stores that are far away, on one that is here."""
    return ZarrReader(zarr.open_group(path, mode="r")["tokens"], read_card(read_attributes(path)), path)


def vouch(path: Path) -> None:
    """Let a store's attributes agree with the description of its tokens."""
    forge(path, lambda attributes: attributes.update(layout=sha256_of(path / "tokens" / "zarr.json")))


def vouch_for(checkpoint: Path) -> None:
    """Let a checkpoint's state agree with its files."""

    def edit(state: dict[str, Any]) -> None:
        for name in state.get("sha256", {}):
            state["sha256"][name] = sha256_of(checkpoint / name)

    forge_record(checkpoint / "state.json", edit)


def is_refusal(error: UserError | str, *words: object) -> bool:
    """Whether a refusal is one line for people that holds all of these words."""
    line = str(error)
    return (
        line.isprintable() and "Traceback" not in line and len(line) < 1200 and all(str(word) in line for word in words)
    )


# What child processes run.


def serve(calls: Connection) -> None:
    """Run one function after another, each with so much more memory than was in use before it, and answer what became of it."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    while True:
        memory, function, arguments = calls.recv()
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, hard))
        try:
            function(*arguments)
            found = ("returned", "")
        except UserError as error:
            found = ("refused", str(error))
        except BaseException:  # noqa: BLE001 (the test is told)
            found = ("crashed", traceback.format_exc())
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        calls.send(found)


class Warden:
    """Keeps a process in which hostile inputs are read, and another one when that has died of them."""

    def __init__(self, processes: ForkServerContext) -> None:
        self._processes = processes
        self._start()

    def _start(self) -> None:
        self._calls, theirs = self._processes.Pipe()
        self._process = self._processes.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def ask(self, memory: int, patience: float, function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
        """What becomes of a call: ("returned" or "refused" or "crashed" or "died" or "hangs", and the message)."""
        self._calls.send((memory, function, arguments))
        kind, message = "hangs", f"nothing after {patience} s"
        if self._calls.poll(patience):
            try:
                return self._calls.recv()
            except EOFError:
                kind, message = "died", ""
        self.close()
        self._start()
        return kind, message

    def close(self) -> None:
        """Kill it."""
        self._calls.close()
        self._process.kill()
        self._process.join()


def peak(function: Callable[..., Any], *arguments: Any) -> tuple[str, int]:
    """What a function is refused with, and the memory in bytes that it took meanwhile."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        function(*arguments)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    return refusal, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def command(*words: str) -> tuple[int, str, str]:
    """Run a wmcache command; returns its exit status, all that it printed, and an exception that it let through."""
    torch.set_num_threads(1)
    found = CliRunner().invoke(main, words)
    expected = found.exception is None or isinstance(found.exception, SystemExit)
    return found.exit_code, found.output, "" if expected else repr(found.exception)


def open_and_gather(path: str | Path) -> None:
    """Read all of a store."""
    store = TokenStore.open(path)
    for shard in range(store.card.num_shards):
        store.gather(np.asarray(store.card.shard_frames(shard)))


def read_shard(dataset: Path, shard: int) -> None:
    """Read one tar."""
    FrameDataset.open(dataset).read_shard(shard)


def create_encoder(weights: Path) -> None:
    """Load weights, as `--weights` does."""
    encoders.create("tcn", weights=weights, device="cpu")


def resume_run(store: Path, run: Path) -> None:
    """Go on with a run, with the settings that it was begun with."""
    config = json.loads((run / "config.json").read_bytes())
    train(store, run, TrainOptions(**{key: config[key] for key in config if key not in ("cache", "shape")}))


def load_model_on_cpu(run: Path) -> None:
    """Load a model, as wmplan does."""
    load_model(run, torch.device("cpu"))


def gather_around_a_cut(path: Path, shard: int, size: int) -> None:
    """Read everything, cut a file that is mapped now, and read everything again."""
    store = TokenStore.open(path)
    everything = np.arange(len(store))
    store.gather(everything)
    os.truncate(path / "tokens" / f"c.{shard}.0.0", size)
    store.gather(everything)
