"""Hostile stores, weights and runs with matching checksums: one line of error, and no code run, file written or absurd memory taken."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import damage_tools as tools
import google_crc32c
import numpy as np
import pytest
import torch
from damage_tools import is_refusal

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import list_stores
from wmcache.cache.verify import verify
from wmcache.common.files import sha256_of
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline.repair import repair
from wmcache.trainer.runs import load_model

CPU = torch.device("cpu")
Edit = Callable[[dict[str, Any]], object]
Outcome = Callable[..., tuple[str, str]]
Refused = Callable[..., str]


class Hostile:
    """Make a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_a_hostile_pickle_runs_when_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


# Metadata of token stores.


DESCRIBED: dict[str, Any] = {"roles": ["action"], "dtype": "float32", "shape": [2]}
STATE: dict[str, Any] = {"roles": ["state"], "dtype": "float64", "shape": [4]}
ATTRIBUTES: dict[str, Edit] = {
    **{
        f"{key} {value!r}": lambda it, key=key, value=value: it["card"].update({key: value})
        for key, values in {
            "frames": [10**15, 2**39, 0, -22, "22", 22.0, True, None],
            "frames_per_shard": [0, -4, 2**64, [4]],
            "token_dim": [-32, 2**70, 1e3],
            "token_grid": [["2", "2"], 4, [2**39, 2**39], [[2], [2]]],
            "dtype": ["object", "float64", []],
            "dataset": [None],
            "_target_": ["os.system"],
        }.items()
        for value in values
    },
    **{
        f"described columns {name}": lambda it, columns=columns: it["card"].update(columns=columns)
        for name, columns in {
            "outside": {"action": DESCRIBED, "../../etc": DESCRIBED},
            "that are tokens": {"action": DESCRIBED, "tokens": DESCRIBED},
            "without an action": {"state": {**DESCRIBED, "roles": ["state"]}},
            "that are objects": {"action": {**DESCRIBED, "dtype": "object"}},
            "of another shape": {"action": {**DESCRIBED, "shape": [3]}, "state": STATE},
            "of a huge shape": {"action": {**DESCRIBED, "shape": [2**15] * 9}, "state": STATE},
            "of an unknown role": {"action": {**DESCRIBED, "roles": ["action", "os.system"]}, "state": STATE},
            "of infinite bounds": {"action": {**DESCRIBED, "low": [0, 0], "high": [0, float("inf")]}, "state": STATE},
            "that are not there": {"action": DESCRIBED, "state": STATE, "reward": {**STATE, "roles": ["extra"]}},
        }.items()
    },
    "no card": lambda it: it.pop("card"),
    "identity with another field": lambda it: it["identity"].update(_target_="os.system"),
    "columns none": lambda it: it.update(columns=None),
    "a column outside": lambda it: it["columns"].update({"../../etc": "0"}),
    "the tokens a column": lambda it: it["columns"].update(tokens="0"),
    "no state": lambda it: it["columns"].pop("state"),
    "mean too short": lambda it: it.update(mean=[0.0]),
    "std of infinity": lambda it: it.update(std=[float("inf")] * 32),
}


@pytest.mark.parametrize("edit", ATTRIBUTES)
def test_absurd_attributes_with_a_matching_seal_are_refused(copy: tools.Copy, refused: Refused, edit: str) -> None:
    tools.forge(copy.path, ATTRIBUTES[edit])
    assert is_refusal(refused(tools.open_and_gather, copy.path), copy.path)


@pytest.mark.parametrize("edit", ["frames 1000000000000000", "frames_per_shard 0", "columns none", "dtype []"])
@pytest.mark.parametrize("function", [verify, list_stores, repair])
def test_absurd_attributes_stop_no_other_command(
    copy: tools.Copy, outcome: Outcome, function: Callable[..., Any], edit: str
) -> None:
    # `wmcache ls` of a folder with such a store still lists the others.
    tools.forge(copy.path, ATTRIBUTES[edit])
    kind, _ = outcome(function, copy.path.parent if function is list_stores else copy.path)
    assert kind == "returned" or function is not list_stores


@pytest.mark.parametrize("huge", [False, True], ids=["nested", "huge"])
@pytest.mark.parametrize("where", ["zarr.json", "tokens/zarr.json", "tokens/commits/000002.json"])
def test_a_nested_or_huge_json_file_is_refused(copy: tools.Copy, refused: Refused, where: str, huge: bool) -> None:
    tools.replace(copy.path / where, b'{"attributes": ' + b"[" * 10**6 + b"]" * 10**6 + b"}")
    if huge:
        os.truncate(copy.path / where, 10**10)  # sparse: takes no room on the disk
    if where.startswith("tokens/commits"):
        assert [fault.shard for fault in verify(copy.path).faults] == [2]
    else:
        assert is_refusal(refused(tools.open_and_gather, copy.path), copy.path)


@pytest.mark.parametrize("frames", [10**9, 2**39])
def test_an_absurd_number_of_frames_is_refused_though_all_descriptions_agree(
    copy: tools.Copy, refused: Refused, frames: int
) -> None:
    tools.forge(copy.path, lambda it: it["card"].update(frames=frames, frames_per_shard=1))

    def lengthen(metadata: dict[str, Any], chunk: int) -> None:
        metadata["shape"][0] = frames
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = chunk

    tools.edit_json(copy.path / "tokens" / "zarr.json", lambda it: lengthen(it, 1))
    for name in ("action", "state", "episode", "step"):
        tools.edit_json(copy.path / name / "zarr.json", lambda it: lengthen(it, frames))
    tools.vouch(copy.path)
    for function in (tools.open_and_gather, repair):
        assert is_refusal(refused(function, copy.path), copy.path)


ARRAYS: dict[str, Edit] = {
    "10**15 rows": lambda it: it["shape"].__setitem__(0, 10**15),
    "codecs by the thousand": lambda it: it.update(codecs=it["codecs"] + [{"name": "crc32c"}] * 5000),
    "an import path for a codec": lambda it: it.update(codecs=[{"name": "os.system", "configuration": {"command": "x"}}]),
    "chunks of 10**15": lambda it: it["chunk_grid"]["configuration"].update(chunk_shape=[10**15] * len(it["shape"])),
    "chunks elsewhere": lambda it: it.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "/../"}}),
}  # fmt: skip


@pytest.mark.parametrize("edit", ARRAYS)
@pytest.mark.parametrize("name", ["tokens", "state"])
def test_an_absurd_array_is_refused(copy: tools.Copy, refused: Refused, name: str, edit: str) -> None:
    tools.edit_json(copy.path / name / "zarr.json", ARRAYS[edit])
    tools.vouch(copy.path)
    assert is_refusal(refused(tools.open_and_gather, copy.path), copy.path)


# Zarr format 2 had codecs that run code.
PICKLED = {
    "zarr_format": 2,
    "shape": [tools.FRAMES, 4],
    "chunks": [tools.FRAMES, 4],
    "dtype": "|O",
    "fill_value": 0,
    "order": "C",
}
PICKLED |= {"filters": [{"id": "pickle", "protocol": 5}], "compressor": None, "attributes": {}}


@pytest.mark.parametrize("where", ["consolidated", "beside"])
def test_pickles_in_a_column_are_refused(copy: tools.Copy, refused: Refused, canary: Path, where: str) -> None:
    store, names = copy.path, ("tokens", "action", "episode", "step")
    (store / "state" / "0.0").write_bytes(pickle.dumps(Hostile(canary)))
    if where == "consolidated":
        arrays = {name: json.loads((store / name / "zarr.json").read_bytes()) for name in names}
        inline = {"kind": "inline", "must_understand": False, "metadata": {**arrays, "state": PICKLED}}
        tools.edit_json(store / "zarr.json", lambda it: it.update(consolidated_metadata=inline))
    else:
        (store / "state" / ".zarray").write_text(json.dumps(PICKLED))
        (store / "state" / "zarr.json").unlink()
    assert is_refusal(refused(tools.open_and_gather, store))


# Shards, records, and what a repair reads.


@pytest.mark.parametrize("first", [2**64 - 2, 2**63, 2**63 - 1, 2**32])
@pytest.mark.parametrize("length", [1, 0, 2**62 + 1])
def test_an_index_that_points_beyond_its_file_is_refused(
    copy: tools.Copy, refused: Refused, first: int, length: int
) -> None:
    # From 2**64 - 2 on, the next offsets at the right distance overflow to small numbers.
    card = TokenStore.open(copy.path).card
    stride = card.frame_bytes + 4
    entries = {row: ((first + stride * row) % 2**64, stride * length % 2**64) for row in range(tools.PER_SHARD)}
    tools.rewrite_index(copy.shard(2), card, entries)
    assert is_refusal(refused(tools.open_and_gather, copy.path), copy.shard(2))
    copy.check_repair(2)


def put_nan(copy: tools.Copy) -> None:
    # No extraction writes NaN, because missing frames are read as NaN.
    size, file = TokenStore.open(copy.path).card.frame_bytes, copy.shard(2)
    frame = np.full(size // 2, np.nan, np.float16).tobytes()
    tools.replace(file, frame + struct.pack("<I", google_crc32c.value(frame)) + file.read_bytes()[size + 4 :])


def replace_with_record(copy: tools.Copy) -> None:
    tools.replace(copy.shard(2), copy.shard(1).read_bytes())
    tools.forge_record(copy.record(2), lambda it: it.update(sha256=sha256_of(copy.shard(2))))


def forge_values(**values: Any) -> Callable[[tools.Copy], None]:
    return lambda copy: tools.forge_record(copy.record(2), lambda it: it.update(values))


FORGED: dict[str, Callable[[tools.Copy], None]] = {
    "NaN": put_nan,
    "another shard": replace_with_record,
    "bytes absurd": forge_values(bytes=10**18),
    "sum a text": forge_values(sum="x"),
    "sum of NaN": forge_values(sum=[float("nan")] * 32),
    "sha256 a number": forge_values(sha256=5),
}


@pytest.mark.parametrize("damage", FORGED)
def test_absurd_shards_and_records_with_matching_checksums_are_found_and_made_again(
    copy: tools.Copy, outcome: Outcome, damage: str
) -> None:
    FORGED[damage](copy)
    assert [fault.shard for fault in verify(copy.path).faults] == [2]
    assert outcome(repair, copy.path)[0] == "returned"
    assert copy.restored


CARDS: dict[str, dict[str, Any]] = {
    "unknown encoder": {"encoder": {"name": "os.system"}},
    "image size absurd": {"encoder": {"name": "tcn", "image_size": 32 * 10**6}},
    "dtype": {"encoder": {"name": "tcn", "dtype": "object"}},
    **{
        f"frames at {path!r}": {"dataset": {"name": "small", "path": path}}
        for path in (None, "", "/dev/null", "a\0b", "pipe:touch canary", "http://localhost:1/")
    },
}


@pytest.mark.parametrize("card", CARDS)
def test_a_repair_with_an_absurd_encoder_or_absurd_frames_is_refused(
    copy: tools.Copy, refused: Refused, card: str
) -> None:
    tools.forge(copy.path, lambda it: [it["card"][key].update(value) for key, value in CARDS[card].items()])
    tools.flip(copy.shard(2), 300)
    assert is_refusal(refused(repair, copy.path), "--dataset" if "dataset" in CARDS[card] else "")


def test_hostile_names_stay_on_one_line(copy: tools.Copy, refused: Refused) -> None:
    # A terminal would execute these characters.
    tools.forge(copy.path, lambda it: it["identity"].update(layer="head\n\x1b[2JAll is well."))
    assert is_refusal(refused(copy.sample.extract, copy.path), copy.path, "layer")


# Weights, checkpoints and settings of runs.


def saved_by_torch(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"stem.0.weight": Hostile(canary)}, buffer)
    return buffer.getvalue()


def header(value: Any, data: bytes = b"") -> Callable[[Path], bytes]:
    """A safetensors file with any header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda canary: struct.pack("<Q", len(text)) + text + data


WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda canary: pickle.dumps(Hostile(canary)),
    "saved by torch": saved_by_torch,
    "a header of 2**62 bytes": lambda canary: struct.pack("<Q", 2**62) + b"{}",
    "a nested header": header(b"[" * 10**5 + b"]" * 10**5),
    "an absurd shape": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"abcd"),
    "data elsewhere": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**12, 10**12 + 4]}}, b"abcd"),
    "no tensors": header({}),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_other_files_than_weights_are_refused(tmp_path: Path, refused: Refused, canary: Path, weights: str) -> None:
    file = tmp_path / "evil.safetensors"
    file.write_bytes(WEIGHTS[weights](canary))
    assert is_refusal(refused(partial(encoders.create, "tcn", weights=file, device="cpu")), file)


@pytest.mark.parametrize("weights", [kind for kind in WEIGHTS if kind != "no tensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_another_file_than_a_checkpoint_is_refused(
    run: Path, store_path: Path, refused: Refused, canary: Path, name: str, weights: str
) -> None:
    file = last_checkpoint(run) / name
    file.write_bytes(WEIGHTS[weights](canary))
    tools.vouch_for(file.parent)
    assert is_refusal(refused(tools.resume_run, store_path, run), file.parent)
    if name == "model.safetensors":
        assert is_refusal(refused(load_model, run, CPU), file.parent)


SETTINGS: dict[str, Edit] = {
    "a class for a model": lambda it: it.update(model="os.system"),
    "a class in the options": lambda it: it["model_options"].update(_target_="os.system"),
    "width 10**9": lambda it: it["model_options"].update(width=10**9),
    "no heads": lambda it: it["model_options"].update(heads=0),
    "depth 10**8": lambda it: it["model_options"].update(depth=10**8),
    "mlp of 10**12": lambda it: it["model_options"].update(mlp_ratio=1e12),
    "shape with another field": lambda it: it["shape"].update(_target_="os.system"),
    "10**9 tokens": lambda it: it["shape"].update(tokens=10**9),
}


@pytest.mark.parametrize("edit", SETTINGS)
def test_absurd_settings_of_a_run_are_refused(run: Path, refused: Refused, edit: str) -> None:
    tools.edit_json(run / "config.json", SETTINGS[edit])
    assert is_refusal(refused(load_model, run, CPU, room=2 * tools.ROOM), run)
