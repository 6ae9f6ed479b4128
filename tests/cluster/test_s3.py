"""The commands against an S3 server, which is killed while they work."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from s3_server import S3Server

from wmcache.cli import main, wmtrain
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset

from .conftest import Running, lines_of

EXTRACT = ["wmcache", "extract", "--encoder", "pixels", "--image-size", "16", "--device", "cpu"]
TRAIN = ["wmtrain", "--width", "16", "--depth", "1", "--heads", "2", "--dropout", "0.1", "--device", "cpu"]
TRAIN += ["--dtype", "float32", "--residence", "disk", "--batch-size", "2", "--log-every", "1"]
TRAIN += ["--validate-every", "24", "--checkpoint-every", "4"]
STEPS = 24
SHARDS = 30

pytestmark = pytest.mark.cluster

Launch = Callable[..., Running]
Start = Callable[..., Running]
Run = Callable[[list[str]], "Done"]


@dataclass(frozen=True)
class Done:
    """Exit status of a command, and its lines without progress bars."""

    status: int
    lines: list[str]

    def well(self) -> list[str]:
        """Require success; returns the lines."""
        assert self.status == 0, self
        return self.lines

    def error(self) -> str:
        """Require failure with one line of error, the last one."""
        assert self.status == 1, self
        assert [line for line in self.lines if re.match("Error: |Traceback", line)] == self.lines[-1:], self
        return self.lines[-1]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    """480 frames in 30 tars, on the local disk."""
    path = tmp_path_factory.mktemp("data") / "frames"
    collect("UMaze", path, episodes=8, length=60, image_size=32, frames_per_shard=16, cluster="local:1")
    return FrameDataset.open(path)


@pytest.fixture(scope="module")
def local(frames: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their store, on the local disk."""
    path = tmp_path_factory.mktemp("stores") / "pixels.zarr"
    extract(frames, encoders.create("pixels", image_size=16, device="cpu"), path)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """$WMCACHE_HOME of the commands."""
    return tmp_path / "home"


@pytest.fixture
def start(s3: S3Server, home: Path, launch: Launch) -> Start:
    """(words, identity=…, **environment) -> the running command; None removes a variable."""

    def begin(words: list[str], *, identity: str = "full", **variables: str | None) -> Running:
        known = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WMCACHE_"))}
        # Nothing of the user's own settings, and no search for the metadata service of a cloud.
        alone = {"HOME": str(home), "WMCACHE_HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true"}
        wanted = {**known, **alone, **s3.environment(identity), **variables}
        return launch(words, **{name: value for name, value in wanted.items() if value is not None})

    return begin


def wait(running: Running) -> Done:
    """Wait for the end of a command."""
    return Done(running.wait(), running.lines)


@pytest.fixture
def run(s3: S3Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """(words) -> the command, run in this process, where its libraries are loaded already."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "WMCACHE_"))]:
        monkeypatch.delenv(name)
    for name, value in {**s3.environment("full"), "WMCACHE_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)

    def invoke(words: list[str]) -> Done:
        result = CliRunner().invoke({"wmcache": main, "wmtrain": wmtrain}[words[0]], words[1:])
        return Done(result.exit_code, lines_of(result.stdout) + lines_of(result.stderr))

    return invoke


def train(cache: str | Path, out: Path) -> list[str]:
    """The words of a training."""
    return [*TRAIN, "--steps", str(STEPS), "--cache", str(cache), "--out", str(out)]


def losses(out: Path) -> dict[int, float]:
    """Step -> loss of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def shards_in(store: Path) -> dict[str, bytes]:
    """Name -> content of a local store's shards."""
    return {f"tokens/{path.name}": path.read_bytes() for path in (store / "tokens").glob("c.*")}


def upload(s3: S3Server, folder: Path, name: str) -> str:
    """Copy a folder to the bucket; returns its URL."""
    with s3.client() as client:
        for path in sorted(found for found in folder.rglob("*") if found.is_file()):
            client.put_object(Bucket="bucket", Key=f"{name}/{path.relative_to(folder)}", Body=path.read_bytes())
    return f"s3://bucket/{name}"


def download(s3: S3Server, url: str, prefix: str = "") -> dict[str, bytes]:
    """Key below a URL -> content."""
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    names = [name for name in s3.objects(url) if name.startswith(prefix)]
    with s3.client() as client:
        return {name: client.get_object(Bucket=bucket, Key=f"{folder}/{name}")["Body"].read() for name in names}


def kill_after(s3: S3Server, happened: Callable[[], bool], running: Running) -> None:
    """Kill the server when `happened` is true, while the command runs."""
    running.wait_for(happened)
    s3.kill()
    assert running.process.poll() is None, "it ended before the server was killed: give it more to do"


@pytest.fixture(scope="module")
def curve(local: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a training on the local store."""
    out = tmp_path_factory.mktemp("runs") / "local"
    done = CliRunner().invoke(wmtrain, train(local, out)[1:])
    assert done.exit_code == 0, done.output
    found = losses(out)
    assert len(found) == STEPS
    return found


def test_an_extraction_resumes_after_the_server_was_killed(
    s3: S3Server, start: Start, run: Run, frames: FrameDataset, local: Path
) -> None:
    dataset, store = upload(s3, frames.path, "frames"), "s3://bucket/killed.zarr"
    words = [*EXTRACT, "--dataset", dataset, "--out", store]
    with s3.client() as client:

        def some_are_done() -> bool:
            listed = client.list_objects_v2(Bucket="bucket", Prefix="killed.zarr/tokens/commits/0")
            return int(listed["KeyCount"]) >= 5

        extraction = start(words, AWS_MAX_ATTEMPTS="1")
        kill_after(s3, some_are_done, extraction)
    assert "s3://bucket/" in wait(extraction).error()
    s3.start()
    done = len([name for name in s3.objects(store) if name.startswith("tokens/commits/0")])
    assert 5 <= done < SHARDS
    run(words).well()
    assert download(s3, store, "tokens/c.") == shards_in(local)
    sound = f"{store}: {SHARDS} of {SHARDS} shards as they were written, 480 frames"
    assert run(["wmcache", "verify", store]).well() == [sound]


def test_two_extractions_into_one_store_both_succeed(
    s3: S3Server, start: Start, run: Run, frames: FrameDataset, local: Path
) -> None:
    store = "s3://bucket/shared.zarr"
    both = [start([*EXTRACT, "--dataset", str(frames.path), "--out", store]) for _ in range(2)]
    for process in both:
        wait(process).well()
    assert download(s3, store, "tokens/c.") == shards_in(local)
    run(["wmcache", "verify", store]).well()


def test_a_damaged_shard_on_the_server_is_repaired(s3: S3Server, run: Run, frames: FrameDataset, local: Path) -> None:
    store, name = upload(s3, local, "damaged.zarr"), "tokens/c.7.0.0"
    whole = shards_in(local)[name]
    with s3.client() as client:
        client.put_object(
            Bucket="bucket", Key=f"damaged.zarr/{name}", Body=whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        )
    found = run(["wmcache", "verify", store])
    assert found.status == 1
    assert any("c.7.0.0" in line for line in found.lines), found
    run(["wmcache", "repair", store, "--dataset", str(frames.path), "--device", "cpu"]).well()
    assert download(s3, store, name) == {name: whole}


def test_a_training_resumes_after_the_server_was_killed(
    s3: S3Server, start: Start, run: Run, home: Path, local: Path, curve: dict[int, float]
) -> None:
    store, out = upload(s3, local, "trained.zarr"), home / "run"
    training = start(train(store, out))

    def has_begun() -> bool:
        return len(list((home / "mirror").glob("*.shard"))) >= 14 and any(out.glob("checkpoints/step-*"))

    kill_after(s3, has_begun, training)
    assert "s3://bucket/trained.zarr" in wait(training).error()
    reached = max(losses(out))
    assert 0 < reached < STEPS
    assert len(list((home / "mirror").glob("*.shard"))) < SHARDS
    s3.start()
    run(train(store, out)).well()
    assert losses(out) == pytest.approx(curve)


EXTRACT_THERE = [*EXTRACT, "--dataset", "DATASET", "--out", "s3://bucket/refused.zarr"]
COLLECT_THERE = ["wmcache", "collect", "--episodes", "1", "--image-size", "32", "--cluster", "local:1", "--out"]
INFO = ["wmcache", "info", "s3://bucket/x.zarr"]
NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "extract without credentials": (EXTRACT_THERE, NO_KEYS, "credentials"),
    "extract with a read-only key": (EXTRACT_THERE, {"identity": "reader"}, "Access Denied"),
    "collect into a missing bucket": ([*COLLECT_THERE, "s3://no-such/refused"], {}, "bucket does not exist"),
    "train without credentials": (["wmtrain", "--cache", "s3://bucket/x.zarr"], NO_KEYS, "credentials"),
    "info with a wrong secret": (INFO, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "Forbidden"),
    "info with an unknown key": (INFO, {"AWS_ACCESS_KEY_ID": "unknown"}, "Forbidden"),
    "info of a server that is down": (INFO, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
    "info of a missing store": (INFO, {}, "make a store with: wmcache extract"),
}


def test_refusals_of_the_server_are_one_line_with_the_url_and_a_hint(
    s3: S3Server, start: Start, frames: FrameDataset
) -> None:
    # All at once, since most of their time is imports.
    running = {
        name: start([str(frames.path) if word == "DATASET" else word for word in words], **settings)
        for name, (words, settings, _) in REFUSED.items()
    }
    ends = {name: wait(process) for name, process in running.items()}
    for name, (_, _, reason) in REFUSED.items():
        error = ends[name].error()
        assert ends[name].lines == [error], name
        assert re.search(rf"s3://.*{reason}.*; |s3://.*; {reason}", error), f"{name}: {error}"
        assert "free space" not in error, f"{name}: {error}"
