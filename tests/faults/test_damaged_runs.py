"""Damaged checkpoints, logs and settings of a run: the file is named, and the newest whole checkpoint is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace as with_other
from pathlib import Path

import pytest
from damage_tools import flip, is_refusal, replace
from fault_workers import content

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Damage = Callable[[Path], object]


def resume_from(run: Path, store: Path, tiny: TrainOptions, first: int) -> None:
    """Resume, and check that it continued from the checkpoint of step `first`."""
    before = (run / "metrics.jsonl").read_text().splitlines()
    train(store, run, with_other(tiny, steps=12), resume=True)
    after = (run / "metrics.jsonl").read_text().splitlines()
    kept = sum(json.loads(line)["step"] <= first for line in before)
    # Steps that are trained again log other times.
    assert after[:kept] == before[:kept]
    assert kept == len(before) or after[kept] != before[kept]
    assert last_checkpoint(run).name == "step-00000012"


TENSORS: dict[str, Damage] = {
    "missing": lambda file: file.unlink(),
    "cut in the header": lambda file: replace(file, file.read_bytes()[:500]),
    "cut in half": lambda file: replace(file, file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: replace(file, bytes(file.stat().st_size)),
    "header's length absurd": lambda file: flip(file, 7, 0x40),
    "a shape flipped": lambda file: flip(file, file.read_bytes().index(b"16]")),
    "a name flipped": lambda file: flip(file, file.read_bytes().index(b"blocks.0.mlp.0.bias")),
    "a value flipped": lambda file: flip(file, file.stat().st_size - 6),
}
STATES = ("", "[]", "{}", '{"step": null}', '{"step": 9}')
CHECKPOINTS: dict[tuple[str, str], Damage] = {
    **{(f"{name}.safetensors", how): damage for name in ("model", "optimizer") for how, damage in TENSORS.items()},
    **{("state.json", text or "empty"): lambda file, text=text: file.write_text(text) for text in STATES},
    ("state.json", "missing"): lambda file: file.unlink(),
}


@pytest.mark.parametrize(("name", "damage"), CHECKPOINTS)
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_used(
    run: Path, store_path: Path, tiny: TrainOptions, name: str, damage: str
) -> None:
    newest = last_checkpoint(run)
    CHECKPOINTS[name, damage](newest / name)
    with pytest.raises(UserError) as refusal:
        train(store_path, run, with_other(tiny, steps=12), resume=True)
    assert is_refusal(refusal.value, newest / name, "; ")
    shutil.rmtree(newest)
    resume_from(run, store_path, tiny, 4)


def as_text(last: Path) -> None:
    name = last.readlink()
    last.unlink()
    last.write_text(str(name))


def as_folder(last: Path) -> None:
    folder = last.resolve()
    last.unlink()
    shutil.copytree(folder, last)


LINKS: dict[str, Damage] = {
    "missing": lambda last: last.unlink(),
    "dangling": lambda last: (last.unlink(), last.symlink_to("step-00000099")),
    "to itself": lambda last: (last.unlink(), last.symlink_to("last")),
    "copied as a text": as_text,
    "copied as a folder": as_folder,
}


@pytest.mark.parametrize("damage", LINKS)
def test_the_newest_checkpoint_is_found_without_its_link(
    run: Path, store_path: Path, tiny: TrainOptions, damage: str
) -> None:
    LINKS[damage](run / "checkpoints" / "last")
    resume_from(run, store_path, tiny, 8)
    assert (run / "checkpoints" / "last").is_symlink()


@pytest.mark.parametrize(
    "tail",
    [b"garbage}\n", b'{"step": 9, "lo', b"\xff\xfe}\n", b"[]}\n", bytes(100), b"[" * 10**6 + b"]" * 10**6 + b"\n"],
    ids=["garbled", "torn", "not text", "a list", "zeros", "nested"],
)
def test_a_damaged_end_of_the_log_does_not_stop_a_run(
    run: Path, store_path: Path, tiny: TrainOptions, tail: bytes
) -> None:
    log = run / "metrics.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + tail)
    train(store_path, run, with_other(tiny, steps=12), resume=True)
    lines = log.read_bytes()
    assert lines.startswith(before)
    assert [json.loads(line)["step"] for line in lines.splitlines()][-1] == 12


@pytest.mark.parametrize("name", ["config.json", "identity.json"])
@pytest.mark.parametrize("text", ["{", "[]", "{}"], ids=["cut", "list", "other"])
def test_a_run_with_damaged_settings_is_refused(
    run: Path, store_path: Path, tiny: TrainOptions, name: str, text: str
) -> None:
    (run / name).write_text(text)
    before = content(run / "checkpoints")
    with pytest.raises(UserError) as refusal:
        train(store_path, run, with_other(tiny, steps=12), resume=True)
    assert is_refusal(refusal.value, run / name)
    assert content(run / "checkpoints") == before
