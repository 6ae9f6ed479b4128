"""A store is extracted, killed, damaged, verified, repaired, read and deleted in any order, and compared with a model of it."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random

import numpy as np
import pytest
from damage_tools import EVERY, SHARDS, index_bytes, replace
from fault_workers import Child, Sample, content, die_changing, repair_store
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from wmcache.cache import StoreCard, StoreWriter, TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline.repair import repair

HEX = re.compile(rb'"[0-9a-f]{64}"')
DESCRIPTION = "zarr.json"
SHARD = [str(shard_file(Path(), shard)) for shard in range(SHARDS)]
RECORD = [str(record_file(Path(), shard)) for shard in range(SHARDS)]
PERISHABLE = [DESCRIPTION, *SHARD, *RECORD]
"""The files that are damaged here; the others must not change."""

CHANCE = st.randoms(use_true_random=True)
"""A generator whose seed is printed with the step that drew from it."""


@dataclass(frozen=True)
class World:
    """Constants of the machine."""

    sample: Sample
    good: dict[str, bytes]  # name -> content of each file of the undisturbed store
    begun: bytes  # its description before the first shard
    reopened: bytes  # and after it was declared incomplete again
    card: StoreCard
    tokens: NDArray[np.float16]
    changes: int  # of files, by a whole extraction
    root: Path
    processes: ForkServerContext


@pytest.fixture(scope="module")
def world(small: Sample, tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext) -> World:
    root, store = tmp_path_factory.mktemp("machine"), TokenStore.open(small.store)
    begun = StoreWriter.create(root / "begun.zarr", store.card, store.identity, small.frames.steps.store_columns()).path
    reopened = Path(shutil.copytree(small.store, root / "reopened.zarr"))
    StoreWriter.resume(reopened, store.identity).reopen([])
    counted, good = root / "counted" / "some.zarr", content(small.store)
    changes = Child(processes, die_changing, (0, counted.parent, small.extract, counted)).returned()
    assert content(counted) == good
    descriptions = [(path / DESCRIPTION).read_bytes() for path in (begun, reopened)]
    return World(small, good, *descriptions, store.card, store.gather(EVERY), changes, root / "stores", processes)


def flipped(chance: Random, data: bytes, *, in_json: bool) -> bytes:
    offsets, mask = [chance.randrange(len(data)), len(data) - 1], chance.randrange(1, 256)
    if in_json:
        # A bit in a blank or in the last digit of a number may mean nothing, so change a checksum if one is left.
        offsets = [at for word in HEX.finditer(data) for at in range(word.start() + 1, word.end() - 1)]
        mask = 1
    if not offsets:
        return data
    at = chance.choice(offsets)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


class StoreMachine(RuleBasedStateMachine):
    """A store on disk, and a model of it: the bytes of each perishable file, or None for no store."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.root.mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=self.world.root))
        self.path = self.folder / "some.zarr"
        self.files: dict[str, bytes] | None = None
        self.held: TokenStore | None = None

    # The model.

    @property
    def described(self) -> bool:
        """Whether the description is one that an extraction wrote."""
        known = (self.world.good[DESCRIPTION], self.world.begun, self.world.reopened)
        return self.files is not None and self.files.get(DESCRIPTION) in known

    @property
    def complete(self) -> bool:
        return self.described and self.has(DESCRIPTION)

    @property
    def recognised(self) -> bool:
        """Whether anything in the store identifies it; extractions refuse to write into it otherwise."""
        return self.files is None or self.described or any(map(self.has, RECORD))

    @property
    def intact(self) -> bool:
        return all(map(self.has, PERISHABLE))

    def has(self, name: str) -> bool:
        """Whether a file has its final bytes."""
        return self.files is not None and self.files.get(name) == self.world.good[name]

    def has_size(self, shard: int) -> bool:
        assert self.files is not None
        return len(self.files.get(SHARD[shard], b"")) == len(self.world.good[SHARD[shard]])

    def pending(self) -> list[int]:
        """The shards that an extraction does: it checks records and sizes."""
        if self.files is None:
            return [*range(SHARDS)]
        return [shard for shard in range(SHARDS) if not (self.has(RECORD[shard]) and self.has_size(shard))]

    def bad_frames(self) -> set[int]:
        assert self.files is not None
        bad: set[int] = set()
        stride, index = self.world.card.frame_bytes + 4, index_bytes(self.world.card)
        for shard in range(SHARDS):
            frames = self.world.card.shard_frames(shard)
            found, good = self.files.get(SHARD[shard], b""), self.world.good[SHARD[shard]]
            if len(found) != len(good) or found[-index:] != good[-index:]:
                bad.update(frames)
            else:
                parts = [slice(row * stride, (row + 1) * stride) for row in range(len(frames))]
                bad.update(frame for frame, part in zip(frames, parts, strict=True) if found[part] != good[part])
        return bad

    def on_disk(self) -> dict[str, bytes] | None:
        if not self.path.exists():
            return None
        return {name: (self.path / name).read_bytes() for name in PERISHABLE if (self.path / name).is_file()}

    def check_others(self) -> None:
        """A described store has all other files, and no more."""
        if self.described:
            found = content(self.path)
            for name in {*found, *self.world.good} - set(PERISHABLE):
                if self.complete or not name.startswith(("sha256/", "README.md")):  # written last
                    assert found.get(name) == self.world.good.get(name), name

    # Rules.

    @initialize(there=st.sampled_from([True, True, True, False]))
    def begin(self, there: bool) -> None:
        if there:
            shutil.copytree(self.world.sample.store, self.path)
            self.files = self.on_disk()

    def extracted(self) -> None:
        """An extraction has ended: pending shards are done, all others are unchanged."""
        redone, files = self.pending(), self.files or {}
        for name in [DESCRIPTION, *(name for shard in redone for name in (SHARD[shard], RECORD[shard]))]:
            files[name] = self.world.good[name]
        self.files = files
        assert self.on_disk() == self.files
        self.check_others()

    def repaired(self) -> None:
        self.files = {name: self.world.good[name] for name in PERISHABLE}
        assert content(self.path) == self.world.good

    @rule()
    def extract(self) -> None:
        if self.recognised:
            self.world.sample.extract(self.path)
            self.extracted()
        else:
            with pytest.raises(UserError, match="--out"):
                self.world.sample.extract(self.path)

    def run_and_kill(self, chance: Random, shards: list[int], function: object) -> str:
        """Kill a process before some change of a file, if it makes so many; returns its outcome."""
        most = int(self.world.changes * (len(shards) + 1) / (SHARDS + 1)) + 1
        words = (chance.randint(1, most), self.folder, function, self.path)
        kind, value = Child(self.world.processes, die_changing, words).outcome()
        assert kind != "died" or value == -9
        assert kind != "crashed", value
        return kind

    @precondition(lambda self: not self.described or self.pending())
    @rule(chance=CHANCE)
    def extract_and_be_killed(self, chance: Random) -> None:
        shards = self.pending()
        kind = self.run_and_kill(chance, shards, self.world.sample.extract)
        if kind == "returned":
            self.extracted()
        elif kind == "refused":
            assert not self.recognised
        else:
            self.killed(shards)

    @precondition(lambda self: self.described and not self.intact)
    @rule(chance=CHANCE)
    def repair_and_be_killed(self, chance: Random) -> None:
        bad = [shard for shard in range(SHARDS) if not (self.has(RECORD[shard]) and self.has(SHARD[shard]))]
        if self.run_and_kill(chance, bad, repair_store) == "died":
            self.killed(bad)
        else:
            self.repaired()

    def killed(self, worked_at: list[int]) -> None:
        """A process has died: finished shards are unchanged, and a shard with a new sound record is done."""
        old, found = self.files or {}, self.on_disk()
        if found is None:
            assert self.files is None
            return
        for shard in range(SHARDS):
            now, before = ((files.get(RECORD[shard]), files.get(SHARD[shard])) for files in (found, old))
            good = self.world.good[RECORD[shard]], self.world.good[SHARD[shard]]
            if shard not in worked_at:
                assert now == before, f"shard {shard} was done"
            elif now != before and now[0] == good[0]:
                assert now[1] == good[1], f"shard {shard} has a record and is not done"
            else:
                assert now[0] in (None, before[0]), f"shard {shard} has half a record"
        description = found.get(DESCRIPTION)
        known = (old.get(DESCRIPTION), self.world.begun, self.world.reopened, self.world.good[DESCRIPTION])
        assert description in known, "half a description"
        self.files = found
        if description == self.world.good[DESCRIPTION] != old.get(DESCRIPTION):
            assert not self.pending(), "declared complete, and is not"
        self.check_others()

    def put(self, name: str, data: bytes | None) -> None:
        assert self.files is not None
        if data is None:
            (self.path / name).unlink()
            del self.files[name]
        else:
            replace(self.path / name, data)
            self.files[name] = data

    @precondition(lambda self: self.files)
    @rule(chance=CHANCE)
    def damage(self, chance: Random) -> None:
        """Flip bits of a file, cut it, or delete it; then read the store."""
        assert self.files is not None
        kind, names = chance.choice([*[("shard", SHARD)] * 4, *[("record", RECORD)] * 2, ("zarr.json", [DESCRIPTION])])
        how, name = chance.choice(["flip", "flip", "cut", "delete"]), chance.choice(names)
        if data := self.files.get(name):
            if how == "flip":
                self.put(name, flipped(chance, data, in_json=kind != "shard"))
            else:
                self.put(name, data[: chance.randrange(len(data))] if how == "cut" else None)
        self.read(chance)

    @rule(chance=CHANCE)
    def delete(self, chance: Random) -> None:
        if chance.random() < 0.7:
            return
        if self.files is None:
            with pytest.raises(UserError):
                remove(self.path)
            return
        remove(self.path)
        self.files = None
        assert not self.path.exists()

    @rule()
    def verify(self) -> None:
        if self.files is None:
            with pytest.raises(UserError):
                verify(self.path)
            return
        found = verify(self.path)
        faults = [(fault.shard, fault.file) for fault in found.faults]
        assert found.complete == self.complete
        assert found.sound == (found.complete and not faults)
        if not self.described:
            assert faults == [(None, str(self.path / DESCRIPTION))]
            return
        # In an incomplete store only shards with a record are checked.
        checked = [shard for shard in range(SHARDS) if self.complete or RECORD[shard] in self.files]
        bad = [(shard, name) for shard in checked for name in (RECORD[shard], SHARD[shard]) if not self.has(name)]
        first = dict(reversed(bad))
        assert faults == [(shard, str(self.path / first[shard])) for shard in checked if shard in first]
        assert found.shards_done == len(checked) - len(first)

    @precondition(lambda self: not self.intact)
    @rule()
    def repair(self) -> None:
        if self.described:
            repair(self.path, device="cpu")
            self.repaired()
        else:
            with pytest.raises(UserError, match="wmcache extract"):
                repair(self.path, device="cpu")

    @rule(chance=CHANCE)
    def read(self, chance: Random) -> None:
        frames, loaded, allow_incomplete = self.some_frames(chance), chance.random() < 0.2, chance.random() < 0.7
        opens = all(map(self.has_size, range(SHARDS))) if self.complete else self.described and allow_incomplete
        if not opens:
            with pytest.raises(UserError):
                TokenStore.open(self.path, allow_incomplete=allow_incomplete)
            return
        store, bad = TokenStore.open(self.path, allow_incomplete=allow_incomplete), self.bad_frames()
        if bad.intersection(EVERY if loaded else frames):
            with pytest.raises(UserError, match="wmcache repair"):
                store.load() if loaded else store.gather(np.array(frames, dtype=np.int64))
            return
        if loaded:
            store.load()
        np.testing.assert_array_equal(store.gather(np.array(frames, dtype=np.int64)), self.world.tokens[frames])

    @rule()
    def hold(self) -> None:
        with contextlib.suppress(UserError):
            self.held = TokenStore.open(self.path)

    @precondition(lambda self: self.held)
    @rule(chance=CHANCE)
    def read_what_is_held(self, chance: Random) -> None:
        self.read_held(self.some_frames(chance))

    def some_frames(self, chance: Random) -> list[int]:
        return EVERY.tolist() if chance.random() < 0.3 else chance.choices(EVERY.tolist(), k=chance.randrange(9))

    def read_held(self, frames: list[int]) -> None:
        """The right tokens or an error, whatever happened to the store since it was opened."""
        assert self.held is not None
        try:
            found = self.held.gather(np.array(frames, dtype=np.int64))
        except UserError:
            return
        assert self.files is not None, "the store is gone"
        np.testing.assert_array_equal(found, self.world.tokens[frames])

    @invariant()
    def nothing_else_has_changed(self) -> None:
        assert self.on_disk() == self.files

    def teardown(self) -> None:
        """From every state, the commands in the errors lead to the undisturbed store."""
        try:
            if not self.recognised:
                remove(self.path)
                self.files = None
            if not self.described:
                self.extract()
            repair(self.path, device="cpu")
            assert content(self.path) == self.world.good
            np.testing.assert_array_equal(TokenStore.open(self.path).gather(EVERY), self.world.tokens)
            if self.held:
                self.read_held(EVERY.tolist())
        finally:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("histories", [6, pytest.param(40, marks=pytest.mark.sweep)])
def test_after_any_history_no_number_is_wrong_and_every_store_can_be_repaired(world: World, histories: int) -> None:
    machine = type("Machine", (StoreMachine,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=30,
            # Shrinking would take minutes; the steps that failed are printed as they were.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
