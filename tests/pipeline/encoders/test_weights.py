"""Weights from a hub: a small server on this machine for the real client."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from wmcache.common.errors import UnreadableError, UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders.hub import Pin, download_weights, find_weights, read_pins
from wmcache.pipeline.encoders.weights import read_tensors

AnotherUser = Callable[[], AbstractContextManager[None]]
REPOSITORY = "some/weights"
FIRST, SECOND = "1" * 40, "2" * 40
DATA = save({"weight": torch.arange(100.0)})
OTHER = save({"weight": torch.arange(100.0).flip(0)})


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Hub:
    """One repository: the last of `commits` is the newest; `sent`, if not None, is sent instead of the file."""

    commits: dict[str, bytes] = field(default_factory=lambda: {FIRST: DATA})
    sent: bytes | None = None
    refusal: int = 0
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(hub.sent)

        def answer(self, body: bytes | None) -> None:
            revision = self.path.partition("/resolve/")[2].split("/")[0]
            if revision:
                hub.asked.append(f"{self.command} {revision}")
            commit = list(hub.commits)[-1] if revision == "main" else revision
            if hub.refusal or commit not in hub.commits:
                self.send_response(hub.refusal or 404)
                self.send_header("X-Error-Code", "GatedRepo" if hub.refusal else "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = hub.commits[commit]
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{digest(data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("ETag", f'"{digest(data)}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if body is None else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another-hub"))


def test_the_first_download_pins_its_commit_and_its_bytes_and_the_next_needs_no_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = download_weights(REPOSITORY, "dinov9")
    assert path.read_bytes() == DATA
    assert path.parent.name == FIRST
    assert read_pins() == {REPOSITORY: Pin(FIRST, digest(DATA), len(DATA))}
    assert hub.asked[0] == "HEAD main"
    assert f"GET {FIRST}" in hub.asked
    download_weights("some/other", "dinov9")
    assert set(read_pins()) == {REPOSITORY, "some/other"}
    hub.asked.clear()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert download_weights(REPOSITORY, "dinov9") == path
    assert hub.asked == []


def test_a_pinned_commit_is_requested_after_the_hub_has_changed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download_weights(REPOSITORY, "dinov9")
    hub.commits[SECOND] = OTHER
    empty_cache(tmp_path, monkeypatch)
    hub.asked.clear()
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == DATA
    assert {asked.split()[1] for asked in hub.asked} == {FIRST}


def test_the_commit_of_a_spec_overrides_the_pin(hub: Hub, tmp_path: Path) -> None:
    spec = encoders.get_spec("dinov3")
    hub.commits = {FIRST: DATA, spec.revision: DATA, SECOND: OTHER}
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == OTHER
    assert download_weights(REPOSITORY, "dinov9", revision=FIRST).read_bytes() == DATA
    assert read_pins()[REPOSITORY].revision == FIRST
    path, source = find_weights(spec, None)
    assert path.read_bytes() == DATA
    assert source == f"facebook/dinov3-vits16-pretrain-lvd1689m@{spec.revision}"
    assert find_weights(spec, tmp_path) == (tmp_path, "file")


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("data", [DATA[:-9], b"x" + DATA[1:]], ids=["cut short", "changed"])
def test_a_damaged_file_in_the_cache_is_named_and_downloaded_again_after_it_is_deleted(
    hub: Hub, tmp_path: Path, data: bytes, pinned: bool
) -> None:
    blob = download_weights(REPOSITORY, "dinov9").resolve()
    if not pinned:
        (tmp_path / "home" / "encoders" / "pins.json").unlink()
    blob.write_bytes(data)
    with pytest.raises(UserError, match=digest(data)[:12]) as refused:
        download_weights(REPOSITORY, "dinov9")
    assert str(refused.value).startswith(str(blob))
    blob.unlink()
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == DATA


def test_bytes_that_are_not_the_published_or_pinned_ones_are_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.sent = b"x" * len(DATA)
    with pytest.raises(UserError, match=digest(hub.sent)[:12]):
        download_weights(REPOSITORY, "dinov9")
    assert read_pins() == {}
    hub.sent = None
    empty_cache(tmp_path, monkeypatch)
    download_weights(REPOSITORY, "dinov9")
    hub.commits[FIRST] = OTHER
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "third-hub"))
    with pytest.raises(UserError, match=digest(OTHER)[:12]):
        download_weights(REPOSITORY, "dinov9")


def test_gated_weights_name_the_licence_and_the_login(hub: Hub) -> None:
    hub.refusal = 401
    with pytest.raises(UserError, match=r"hf auth login.*--weights") as refused:
        encoders.create("dinov3-base-cls", device="cpu")
    assert "https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m" in str(refused.value)


def test_without_that_commit_or_network_two_alternatives_are_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dinov9.*--weights.*--encoder tcn"):
        download_weights(REPOSITORY, "dinov9", revision=SECOND)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    with pytest.raises(UserError, match=r"dinov9.*--weights.*--encoder tcn"):
        download_weights("some/other", "dinov9")
    assert hub.asked == []


def make_read_only(folder: Path) -> None:
    """For any user but root."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


@pytest.fixture
def shared(hub: Hub, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A read-only cache of another user with the weights, and an empty home."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(open_folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(open_folder / "token"))
    monkeypatch.setenv("WMCACHE_HOME", str(open_folder / "first"))
    download_weights(REPOSITORY, "dinov9")
    monkeypatch.setenv("WMCACHE_HOME", str(open_folder / "home"))
    (open_folder / "home").mkdir(mode=0o777)
    (open_folder / "home").chmod(0o777)
    make_read_only(open_folder / "hub")
    hub.asked.clear()
    return open_folder


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("home_is_writable", [True, False])
def test_weights_in_a_read_only_cache_are_used(
    hub: Hub,
    shared: Path,
    another_user: AnotherUser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offline: bool,
    home_is_writable: bool,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not home_is_writable:
        make_read_only(shared / "home")
    with another_user():
        first = download_weights(REPOSITORY, "dinov9")
        assert download_weights(REPOSITORY, "dinov9") == first
        assert read_tensors(first, "dinov9")["weight"].tolist() == list(range(100))
    assert hub.asked == []
    assert (REPOSITORY in capsys.readouterr().err) == (not home_is_writable)
    assert (shared / "home/encoders/pins.json").exists() == home_is_writable


def test_a_cache_that_cannot_be_written_or_read_is_named(hub: Hub, shared: Path, another_user: AnotherUser) -> None:
    with another_user(), pytest.raises(UserError, match=rf"{shared / 'hub'}.*HF_HOME"):
        download_weights("some/other", "dinov9")
    (blob,) = (shared / "hub").glob("*/blobs/*")
    blob.chmod(0)
    with another_user(), pytest.raises(UnreadableError, match=str(shared / "hub")):
        download_weights(REPOSITORY, "dinov9")
