"""A store that is extracted, killed, damaged, verified, repaired, read and deleted in any order, beside a model of what must come."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random

import numpy as np
import pytest
from damage_tools import EVERY, SHARDS, Small, index_bytes, make_small, replace
from fault_workers import Child, die_changing, extract_store, repair_store
from hypothesis import HealthCheck, Phase, event, settings
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

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair
from wmcache.pipeline.stores import store_card

Content = Callable[[Path], dict[str, bytes]]

HEX = re.compile(rb'"[0-9a-f]{64}"')
DESCRIPTION = "zarr.json"
SHARD = [str(shard_file(Path(), shard)) for shard in range(SHARDS)]
RECORD = [str(record_file(Path(), shard)) for shard in range(SHARDS)]
PERISHABLE = [DESCRIPTION, *SHARD, *RECORD]
"""The files that are damaged here; the others must stay as they are."""

CHANCE = st.randoms(use_true_random=True)
"""A generator with a seed of its own, which is printed with the step that drew from it."""


@dataclass(frozen=True)
class World:
    """What does not change.

    Attributes:
        small: frames, weights, and the undisturbed store.
        good: the bytes of each of its files.
        begun, reopened: its description before any shard, and after it was declared incomplete again.
        tokens: of every frame.
        changes: of files, that a whole extraction makes.
        root: for stores.
    """

    small: Small
    good: dict[str, bytes]
    begun: bytes
    reopened: bytes
    card: StoreCard
    tokens: NDArray[np.float16]
    changes: int
    root: Path
    content: Content
    processes: ForkServerContext


@pytest.fixture(scope="module")
def world(
    tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory, content: Content, processes: ForkServerContext
) -> World:
    root = tmp_path_factory.mktemp("machine")
    small = make_small(root, tcn_weights)
    store, dataset = TokenStore.open(small.store), FrameDataset.open(small.dataset)
    card = store_card(dataset, encoders.create("tcn", weights=small.weights, device="cpu"), "float16")
    assert card == store.card
    identity: Identity = store.identity
    begun = StoreWriter.create(root / "begun.zarr", card, identity, dataset.steps.columns()).path
    reopened = Path(shutil.copytree(small.store, root / "reopened.zarr"))
    StoreWriter.resume(reopened, identity).reopen([])
    counted = root / "counted" / "some.zarr"
    changes = Child(
        processes, die_changing, (0, counted.parent, extract_store, counted, small.dataset, small.weights)
    ).returned()
    good = content(small.store)
    assert content(counted) == good
    descriptions = [(path / DESCRIPTION).read_bytes() for path in (begun, reopened)]
    return World(small, good, *descriptions, card, store.gather(EVERY), changes, root / "stores", content, processes)


def flipped(chance: Random, data: bytes, *, in_json: bool) -> bytes:
    """The data with a byte changed."""
    places, mask = [chance.randrange(len(data)), len(data) - 1], chance.randrange(1, 256)
    if in_json:
        # A bit in a blank, or in the last digit of a number, may mean nothing there; so in a checksum, if one is left.
        places = [at for word in HEX.finditer(data) for at in range(word.start() + 1, word.end() - 1)]
        mask = 1
    if not places:
        return data
    at = chance.choice(places)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


class StoreMachine(RuleBasedStateMachine):
    """The store on the disk, and what is known of it: the bytes of each perishable file, or that there is no store."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.root.mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=self.world.root))
        self.path = self.folder / "some.zarr"
        self.files: dict[str, bytes] | None = None
        self.held: TokenStore | None = None

    # What the model knows.

    @property
    def described(self) -> bool:
        """Whether there is a description, and it is one that an extraction wrote."""
        known = (self.world.good[DESCRIPTION], self.world.begun, self.world.reopened)
        return self.files is not None and self.files.get(DESCRIPTION) in known

    @property
    def complete(self) -> bool:
        return self.described and self.has(DESCRIPTION)

    def has(self, name: str) -> bool:
        """Whether a file is as it should be in the end."""
        return self.files is not None and self.files.get(name) == self.world.good[name]

    def has_size(self, shard: int) -> bool:
        assert self.files is not None
        return len(self.files.get(SHARD[shard], b"")) == len(self.world.good[SHARD[shard]])

    def pending(self) -> list[int]:
        """What an extraction takes to be not done: it looks at records and sizes."""
        return [shard for shard in range(SHARDS) if not (self.has(RECORD[shard]) and self.has_size(shard))]

    def bad_frames(self) -> set[int]:
        """The frames that cannot be read."""
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
        """What is really there, of the perishable files."""
        if not self.path.exists():
            return None
        return {name: (self.path / name).read_bytes() for name in PERISHABLE if (self.path / name).is_file()}

    def check_others(self) -> None:
        """A described store has all that never perishes, and nothing more."""
        if self.described:
            found = self.world.content(self.path)
            for name in {*found, *self.world.good} - set(PERISHABLE):
                if name.startswith("sha256/") and not self.complete:
                    continue  # it is what comes last
                assert found.get(name) == self.world.good.get(name), name

    # What is done to it.

    @initialize(there=st.sampled_from([True, True, True, False]))
    def begin(self, there: bool) -> None:
        if there:
            shutil.copytree(self.world.small.store, self.path)
            self.files = self.on_disk()

    def extracted(self) -> None:
        """An extraction has come to its end: what was pending is done, what looked done is as it was."""
        files = self.files or {}
        redone = range(SHARDS) if self.files is None else self.pending()
        for name in [DESCRIPTION, *(name for shard in redone for name in (SHARD[shard], RECORD[shard]))]:
            files[name] = self.world.good[name]
        self.files = files
        assert self.on_disk() == self.files
        self.check_others()

    @property
    def recognised(self) -> bool:
        """Whether the store says, somewhere, whose tokens it holds; nobody writes into it otherwise."""
        return self.files is None or self.described or any(self.has(name) for name in RECORD)

    @rule()
    def extract(self) -> None:
        if self.recognised:
            self.world.small.extract(self.path)
            self.extracted()
        else:
            with pytest.raises(UserError, match="choose another --out"):
                self.world.small.extract(self.path)

    def moment(self, chance: Random, shards: list[int]) -> int:
        """A change of a file to die before: of a whole extraction's, as many as there are shards to do, and some around them."""
        return chance.randint(1, int(self.world.changes * (len(shards) + 1) / (SHARDS + 1)) + 1)

    @precondition(lambda self: not self.described or self.pending())
    @rule(chance=CHANCE)
    def extract_and_be_killed(self, chance: Random) -> None:
        small, number = self.world.small, self.moment(chance, self.pending() if self.files else list(range(SHARDS)))
        arguments = (number, self.folder, extract_store, self.path, small.dataset, small.weights)
        kind, value = Child(self.world.processes, die_changing, arguments).outcome()
        event(f"the extraction {kind}")
        if kind == "returned":
            self.extracted()
        elif kind == "refused":
            assert not self.recognised, value
        else:
            assert (kind, value) == ("died", -9), value
            self.killed(self.pending() if self.files else [*range(SHARDS)])

    @precondition(lambda self: self.described and not all(map(self.has, PERISHABLE)))
    @rule(chance=CHANCE)
    def repair_and_be_killed(self, chance: Random) -> None:
        bad = [shard for shard in range(SHARDS) if not (self.has(RECORD[shard]) and self.has(SHARD[shard]))]
        number = self.moment(chance, bad)
        kind, value = Child(
            self.world.processes, die_changing, (number, self.folder, repair_store, self.path)
        ).outcome()
        event(f"the repair {kind}")
        if kind == "returned":
            self.files = {name: self.world.good[name] for name in PERISHABLE}
            assert self.world.content(self.path) == self.world.good
        else:
            assert (kind, value) == ("died", -9), value
            self.killed(bad)

    def killed(self, worked_at: list[int]) -> None:
        """Somebody has died: whatever was done is as it was, and what has been given a sound record is done."""
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
                assert now[1] == good[1], f"shard {shard} has a record, and is not done"
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
        """Other bytes in the place of a file, or none."""
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
        """Flip bits of a file, cut it, or delete it; then somebody reads the store."""
        assert self.files is not None
        kind, names = chance.choice([*[("shard", SHARD)] * 4, *[("record", RECORD)] * 2, ("zarr.json", [DESCRIPTION])])
        how, name = chance.choice(["flip", "flip", "cut", "delete"]), chance.choice(names)
        if data := self.files.get(name):
            event(f"{how} {kind}")
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
            with pytest.raises(UserError, match="does not exist"):
                remove(self.path)
            return
        remove(self.path)
        self.files = None
        assert not self.path.exists()

    @rule()
    def verify(self) -> None:
        if self.files is None:
            with pytest.raises(UserError, match="does not exist"):
                verify(self.path)
            return
        found = verify(self.path)
        faults = [(fault.shard, fault.file) for fault in found.faults]
        assert found.complete == self.complete
        assert found.sound == (found.complete and not faults)
        if not self.described:
            assert faults == [(None, str(self.path / DESCRIPTION))]
            return
        # What is not done in a store that is not complete is no fault, and what has a record is said to be done.
        checked = [shard for shard in range(SHARDS) if self.complete or RECORD[shard] in self.files]
        expected = [
            (shard, str(self.path / next(name for name in (RECORD[shard], SHARD[shard]) if not self.has(name))))
            for shard in checked
            if not (self.has(RECORD[shard]) and self.has(SHARD[shard]))
        ]
        assert faults == expected
        assert found.shards_done == len(checked) - len(expected)

    @precondition(lambda self: not all(map(self.has, PERISHABLE)))
    @rule()
    def repair(self) -> None:
        if not self.described:
            with pytest.raises(UserError, match="wmcache extract"):
                repair(self.path, device="cpu")
            return
        event("repair")
        repair(self.path, device="cpu")
        self.files = {name: self.world.good[name] for name in PERISHABLE}
        assert self.world.content(self.path) == self.world.good

    @rule(chance=CHANCE)
    def read(self, chance: Random) -> None:
        frames, loaded, allow_incomplete = self.some_frames(chance), chance.random() < 0.2, chance.random() < 0.7
        opens = self.described and (
            all(self.has_size(shard) for shard in range(SHARDS)) if self.complete else allow_incomplete
        )
        if not opens:
            with pytest.raises(UserError):
                TokenStore.open(self.path, allow_incomplete=allow_incomplete)
            return
        store, bad = TokenStore.open(self.path, allow_incomplete=allow_incomplete), self.bad_frames()
        if bad.intersection(EVERY if loaded else frames):
            event("a damaged frame is asked for")
            with pytest.raises(UserError, match="wmcache repair"):
                store.load() if loaded else store.gather(np.array(frames, dtype=np.int64))
            return
        if loaded:
            store.load()
        found = store.gather(np.array(frames, dtype=np.int64))
        np.testing.assert_array_equal(found, self.world.tokens[frames])

    @rule()
    def hold(self) -> None:
        """Open the store, and read it later."""
        with contextlib.suppress(UserError):
            self.held = TokenStore.open(self.path)

    @precondition(lambda self: self.held)
    @rule(chance=CHANCE)
    def read_what_is_held(self, chance: Random) -> None:
        self.read_held(self.some_frames(chance))

    def some_frames(self, chance: Random) -> list[int]:
        """All of them, or some in any order."""
        return EVERY.tolist() if chance.random() < 0.3 else chance.choices(EVERY.tolist(), k=chance.randrange(9))

    def read_held(self, frames: list[int]) -> None:
        """The right tokens, or a refusal; whatever has become of the store since it was opened."""
        assert self.held is not None
        try:
            found = self.held.gather(np.array(frames, dtype=np.int64))
        except UserError:
            event("a reader is told")
            return
        assert self.files is not None, "the store is gone"
        np.testing.assert_array_equal(found, self.world.tokens[frames])

    @invariant()
    def nothing_else_has_changed(self) -> None:
        assert self.on_disk() == self.files

    def teardown(self) -> None:
        """From wherever it has come, what the messages say leads to the undisturbed store."""
        try:
            if not self.recognised:
                remove(self.path)
                self.files = None
            if not self.described:
                self.extract()
            repair(self.path, device="cpu")
            assert self.world.content(self.path) == self.world.good
            np.testing.assert_array_equal(TokenStore.open(self.path).gather(EVERY), self.world.tokens)
            if self.held:
                self.read_held(EVERY.tolist())
        finally:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("histories", [6, pytest.param(40, marks=pytest.mark.sweep)])
def test_whatever_happens_to_a_store_no_number_is_wrong_and_all_can_be_mended(world: World, histories: int) -> None:
    machine = type("Machine", (StoreMachine,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=30,
            # A step takes milliseconds, so shrinking would take minutes; the steps that failed are printed as they were.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
