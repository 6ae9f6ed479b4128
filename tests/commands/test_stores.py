"""wmcache ls, info, verify, repair, preview and rm: what is printed, what is found, and what changes on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from click.testing import CliRunner

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cli import main

from .conftest import STORE, contents, error_of, run, succeed


@pytest.fixture
def store(road: Path, tmp_path: Path) -> Path:
    """A copy of the store, of 4 shards, to be damaged."""
    return Path(copytree(road / "stores/pointmaze-umaze/tcn-64.zarr", tmp_path / "own stores" / "tcn-64.zarr"))


@pytest.fixture
def damaged(store: Path) -> Path:
    """Frame 66 has a flipped bit, and the last shard is gone."""
    shard = store / "tokens/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[2 * (4 * 32 * 2 + 4)] ^= 1
    shard.write_bytes(data)
    (store / "tokens/c.3.0.0").unlink()
    return store


def test_stores_of_every_state_are_listed(road: Path, store: Path) -> None:
    folder = store.parent
    copytree(store, folder / "b.zarr")
    (folder / "b.zarr" / "zarr.json").write_text("{")
    broken, whole = json.loads(succeed("wmcache ls {folder} --json", road, folder=folder).stdout)
    assert (whole["path"], whole["complete"], whole["fault"]) == (str(store), True, "")
    assert (whole["frames"], whole["tokens"], whole["token_dim"], whole["dtype"]) == (240, 4, 32, "float16")
    assert (whole["encoder"], whole["dataset"], whole["shards_done"]) == ("tcn", "pointmaze-umaze", 4)
    assert (broken["path"], broken["complete"]) == (str(folder / "b.zarr"), False)
    assert "zarr.json" in broken["fault"]
    header, *rows = run("wmcache ls {folder}", road, folder=folder).stdout.splitlines()
    assert header.split() == ["state", "size", "frames", "tokens", "dtype", "store"]
    assert [row.split()[0] for row in rows] == ["damaged", "complete"]
    assert all(part in rows[1] for part in (" 240 ", " 4 x 32 ", str(store)))


def test_info_shows_identity_card_and_versions(road: Path) -> None:
    values = json.loads(run(f"wmcache info {STORE} --json", road).stdout)
    store = TokenStore.open(road / "stores/pointmaze-umaze/tcn-64.zarr")
    assert values["identity"]["weights_sha256"] == store.identity.weights_sha256
    assert values["card"]["dataset"]["path"] == str(road / "pointmaze-umaze")
    assert values["versions"]["torch"] == version("torch")
    assert (values["frames"], values["complete"], values["fault"]) == (240, True, "")
    lines = succeed(f"wmcache info {STORE}", road).stdout.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
    assert rows["identity.weights_sha256"] == store.identity.weights_sha256
    assert rows["card.token_grid"] == "[2, 2]"
    assert rows["frames"] == "240"


def test_the_info_of_a_damaged_store_is_refused(refused: Callable[..., None], store: Path) -> None:
    (store / "zarr.json").write_text("{")
    for command in ("info", "info --json", "preview", "bench codecs"):
        refused(f"wmcache {command} {{store}}", "{store}/zarr.json", "run its wmcache extract again", store=store)


@pytest.mark.parametrize("options", ["", "--deep --device cpu"])
def test_a_sound_store_is_verified(road: Path, options: str) -> None:
    text = succeed(f"wmcache verify {STORE} {options}", road).stdout
    assert "4 of 4 shards as they were written, 240 frames" in text
    assert ("fault" in text, "cosine" in text) == (False, bool(options))
    found = json.loads(succeed(f"wmcache verify {STORE} {options} --json", road).stdout)
    assert (found["sound"], found["complete"], found["shards_done"], found["faults"]) == (True, True, 4, [])
    assert (found["drift"] is not None) == bool(options)


@pytest.mark.parametrize("options", ["", "--deep --device cpu"])
def test_damage_is_found_and_left_alone(road: Path, damaged: Path, options: str) -> None:
    before = contents(damaged)
    text, printed = (run(f"wmcache verify {{store}} {options} {flag}", road, store=damaged) for flag in ("", "--json"))
    for result in (text, printed):
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].endswith(f": wmcache repair {shlex.quote(str(damaged))}")
    first, last = (line for line in text.stdout.splitlines() if line.startswith("fault: "))
    assert "tokens/c.1.0.0: it differs from its checksum, in frames 66" in first
    assert "tokens/c.3.0.0" in last
    found = json.loads(printed.stdout)
    assert (found["sound"], [fault["shard"] for fault in found["faults"]]) == (False, [1, 3])
    assert contents(damaged) == before


def test_wrong_tokens_are_found_by_encoding_again(road: Path, store: Path) -> None:
    made_up = np.random.default_rng(0).normal(size=(64, 4, 32)).astype(np.float16)
    writer = StoreWriter.resume(store, TokenStore.open(store).identity)
    writer.write_shard(1, made_up)
    assert run("wmcache verify {store}", road, store=store).exit_code == 1
    writer.reopen([])
    writer.finish()
    succeed("wmcache verify {store}", road, store=store)
    result = run("wmcache verify {store} --deep --device cpu", road, store=store)
    assert result.exit_code == 1
    assert "gives other tokens" in result.stdout


def test_frames_and_weights_may_move(road: Path, tmp_path: Path) -> None:
    for line in (
        "wmcache collect --episodes 2 --length 8 --image-size 32 --frames-per-shard 8 --cluster local:1 --out {tmp}/a",
        "wmcache fit --dataset {tmp}/a --steps 1 --batch-size 4 --device cpu --out {tmp}/a.safetensors",
        "wmcache extract --dataset {tmp}/a --weights {tmp}/a.safetensors --device cpu --out {tmp}/a.zarr",
    ):
        succeed(line, road, tmp=tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "a.zarr/tokens/c.1.0.0").unlink()
    at = "--dataset {tmp}/b --weights {tmp}/b.safetensors --device cpu"
    succeed(f"wmcache repair {{tmp}}/a.zarr {at}", road, tmp=tmp_path)
    succeed(f"wmcache verify --deep {{tmp}}/a.zarr {at}", road, tmp=tmp_path)
    assert run("wmcache verify --deep {tmp}/a.zarr", road, tmp=tmp_path).exit_code == 1
    for line in ("wmcache preview {tmp}/a.zarr --dataset", "wmcache derive change-maps {tmp}/a.zarr --dataset"):
        assert run(f"{line} {{home}}/pointmaze-umaze", road, tmp=tmp_path).exit_code == 1
        succeed(f"{line} {{tmp}}/b", road, tmp=tmp_path)
    error_of(run("wmtrain decoder --cache {tmp}/a.zarr --frames {home}/pointmaze-umaze", road, tmp=tmp_path))


def test_a_picture_is_written_beside_its_store(road: Path, store: Path) -> None:
    result = succeed("wmcache preview {store} --count 3", road, store=store)
    assert result.stdout == f"{store.with_suffix('.png')}: frames 0, 119, 239\n"
    assert store.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = store.parent / "x.png"
    succeed("wmcache preview {store} --count 1 --out {out}", road, store=store, out=out)
    assert out.exists()


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "perhaps\n"])
def test_a_store_is_deleted_only_after_a_yes(road: Path, store: Path, answer: str) -> None:
    before = contents(store)
    result = CliRunner().invoke(main, ["rm", str(store)], input=answer)
    assert result.exit_code == 1
    assert f"delete {store}?" in result.stdout
    assert contents(store) == before


@pytest.mark.parametrize(("options", "answer"), [([], "y\n"), (["--yes"], "")])
@pytest.mark.parametrize("whole", [True, False])
def test_a_store_is_deleted_also_if_it_is_damaged(store: Path, options: list[str], answer: str, whole: bool) -> None:
    if not whole:
        (store / "zarr.json").write_text("{")
    result = CliRunner().invoke(main, ["rm", str(store), *options], input=answer)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(f"{store}: deleted, ")
    assert list(store.parent.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "verify", "repair", "preview --count 1"])
def test_a_link_to_a_store_works(road: Path, store: Path, tmp_path: Path, command: str) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(store)
    succeed(f"wmcache {command} {{link}}", road, link=link)
    assert {path.name for path in tmp_path.iterdir()} <= {"link.zarr", "link.png", "own stores"}
