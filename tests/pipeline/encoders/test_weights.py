"""Weights from a hub: pinned, checked, explained. The hub is a real one for its real client, if a small one: on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

from wmcache.common.errors import UnreadableError, UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import dinov3
from wmcache.pipeline.encoders.weights import (
    Pin,
    download_weights,
    find_weights,
    list_fitted,
    look_up,
    read_header,
    read_pins,
    read_tensors,
    require_weights,
)

AnotherUser = Callable[[], AbstractContextManager[None]]
REPOSITORY = "somebody/weights"
FIRST, SECOND = "1" * 40, "2" * 40
DATA = save({"weight": torch.arange(100.0)})
OTHER = save({"weight": torch.arange(100.0).flip(0)})


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Hub:
    """One repository: `commits` its files, the last of them the newest; `sent`, if not None, goes over the wire instead."""

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


def test_the_first_download_pins_its_commit_and_its_bytes(hub: Hub) -> None:
    path = download_weights(REPOSITORY, "dinov9")
    assert path.read_bytes() == DATA
    assert path.parent.name == FIRST
    assert read_pins() == {REPOSITORY: Pin(FIRST, digest(DATA), len(DATA))}
    assert hub.asked[0] == "HEAD main"
    assert f"GET {FIRST}" in hub.asked


def test_what_is_in_the_cache_is_not_asked_for_again(hub: Hub) -> None:
    first = download_weights(REPOSITORY, "dinov9")
    hub.asked.clear()
    assert download_weights(REPOSITORY, "dinov9") == first
    assert hub.asked == []


def test_weights_are_used_where_they_cannot_be_pinned(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("a file, where no folder can be made")
    path = download_weights(REPOSITORY, "dinov9")
    assert download_weights(REPOSITORY, "dinov9") == path
    assert path.read_bytes() == DATA
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith(f"{REPOSITORY} is not pinned: cannot write ") for line in said)


def test_a_pinned_commit_is_asked_for_when_the_hub_has_moved_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download_weights(REPOSITORY, "dinov9")
    hub.commits[SECOND] = OTHER
    empty_cache(tmp_path, monkeypatch)
    hub.asked.clear()
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == DATA
    assert {asked.split()[1] for asked in hub.asked} == {FIRST}


def test_a_specs_commit_is_asked_for_whatever_was_pinned(hub: Hub) -> None:
    hub.commits = {FIRST: DATA, SECOND: OTHER}
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == OTHER
    assert download_weights(REPOSITORY, "dinov9", revision=FIRST).read_bytes() == DATA
    assert read_pins()[REPOSITORY].revision == FIRST


def test_a_source_is_named_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    spec = encoders.get_spec("dinov3")
    hub.commits = {FIRST: OTHER, spec.revision: DATA, SECOND: OTHER}
    path, source = find_weights(spec, None)
    assert path.read_bytes() == DATA
    assert source == f"facebook/dinov3-vits16-pretrain-lvd1689m@{spec.revision}"
    assert find_weights(spec, tmp_path) == (tmp_path, "file")


def test_pins_of_several_repositories_are_kept(hub: Hub) -> None:
    download_weights(REPOSITORY, "dinov9")
    download_weights("somebody/else", "dinov9")
    assert set(read_pins()) == {REPOSITORY, "somebody/else"}


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("data", [DATA[:-9], b"x" + DATA[1:]], ids=["cut short", "changed"])
def test_a_damaged_file_in_the_cache_is_named_and_downloaded_again_when_it_is_deleted(
    hub: Hub, tmp_path: Path, data: bytes, pinned: bool
) -> None:
    blob = download_weights(REPOSITORY, "dinov9").resolve()
    if not pinned:
        (tmp_path / "home" / "encoders" / "pins.json").unlink()
    blob.write_bytes(data)
    with pytest.raises(UserError, match=r"is cut short or changed: .*; move that file away") as refused:
        download_weights(REPOSITORY, "dinov9")
    assert str(refused.value).startswith(str(blob))
    assert "\n" not in str(refused.value)
    blob.unlink()
    assert download_weights(REPOSITORY, "dinov9").read_bytes() == DATA


def test_bytes_that_are_not_the_published_ones_are_refused(hub: Hub) -> None:
    hub.sent = b"x" * len(DATA)
    with pytest.raises(UserError, match=r"is cut short or changed: .*; move that file away"):
        download_weights(REPOSITORY, "dinov9")
    assert read_pins() == {}


def test_a_commit_that_became_another_file_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download_weights(REPOSITORY, "dinov9")
    hub.commits[FIRST] = OTHER
    empty_cache(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=rf"its SHA-256 is {digest(OTHER)[:12]}\.\.\., not {digest(DATA)[:12]}"):
        download_weights(REPOSITORY, "dinov9")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_weights_name_the_licence_and_the_login(hub: Hub, status: int) -> None:
    hub.refusal = status
    with pytest.raises(UserError, match=r"gated: accept their licence at .*, log in with: hf auth login") as refused:
        encoders.create("dinov3-base-cls", device="cpu")
    assert "https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m" in str(refused.value)
    assert "--weights" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_hub_without_that_commit_gives_both_ways_out(hub: Hub) -> None:
    with pytest.raises(
        UserError, match=r"cannot be downloaded .*--weights FILE\.safetensors.*--encoder tcn"
    ) as refused:
        download_weights(REPOSITORY, "dinov9", revision=SECOND)
    assert "\n" not in str(refused.value)


def test_offline_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = download_weights(REPOSITORY, "dinov9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert download_weights(REPOSITORY, "dinov9") == first
    with pytest.raises(UserError, match=r"the weights of dinov9 .* cannot be downloaded"):
        download_weights("somebody/else", "dinov9")
    assert hub.asked == []


def test_the_environment_says_where_the_cache_is_and_that_there_is_no_network(hub: Hub, tmp_path: Path) -> None:
    download_weights(REPOSITORY, "dinov9")
    script = (
        "from wmcache.common.errors import UserError\n"
        "from wmcache.pipeline.encoders.weights import download_weights\n"
        f"print(download_weights({REPOSITORY!r}, 'dinov9'))\n"
        "try:\n    download_weights('somebody/else', 'dinov9')\nexcept UserError as error:\n    print(error)"
    )
    # $HF_HOME/hub is the cache that was filled above.
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found, refused = done.stdout.splitlines()
    assert Path(found).read_bytes() == DATA
    assert "--weights" in refused
    assert "--encoder tcn" in refused


def make_read_only(folder: Path) -> None:
    """For all that have not the rights of root."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


@pytest.fixture
def shared(hub: Hub, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the weights and a home with nothing; read-only, of another user's."""
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
    said = capsys.readouterr().err
    assert ("is not pinned" in said) == (not home_is_writable)
    assert (shared / "home/encoders/pins.json").exists() == home_is_writable


def test_a_read_only_cache_without_the_weights_is_said_to_be_so(
    hub: Hub, shared: Path, another_user: AnotherUser
) -> None:
    with another_user(), pytest.raises(UserError, match="HF_HOME") as refused:
        download_weights("somebody/others", "dinov9")
    assert str(shared / "hub") in str(refused.value)


def test_weights_in_a_cache_that_this_user_may_not_read_are_not_called_damaged(
    hub: Hub, shared: Path, another_user: AnotherUser
) -> None:
    (blob,) = (shared / "hub").glob("*/blobs/*")
    blob.chmod(0)
    with another_user(), pytest.raises(UnreadableError, match="make it readable") as refused:
        download_weights(REPOSITORY, "dinov9")
    assert "delete" not in str(refused.value)
    assert str(shared / "hub") in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"a/b": {"revision": 3}}', '{"a/b": {"sha256": "", "bytes": -1}}'])
def test_damaged_pins_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path))
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "pins.json").write_text(text)
    with pytest.raises(UserError, match=r"pins\.json .*; restore it, or move it away"):
        read_pins()


def test_a_look_into_the_cache_says_where_and_how_large(hub: Hub) -> None:
    assert look_up(REPOSITORY) is None
    path = download_weights(REPOSITORY, "dinov9")
    found = look_up(REPOSITORY)
    assert found is not None
    assert (found.path, found.revision, found.bytes, found.fault) == (path, FIRST, len(DATA), "")
    assert look_up(REPOSITORY, FIRST) == found
    assert look_up(REPOSITORY, SECOND) is None
    path.resolve().write_bytes(DATA[:10])
    assert "were downloaded" in getattr(look_up(REPOSITORY), "fault", "")


def test_fitted_files_say_what_they_are(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.safetensors", {"encoder": "tcn", "dataset": "f00d"})
    recipe = json.dumps({"name": "dinov2-layers", "weights": "/somewhere/w.safetensors"})
    save_file(tensors, tmp_path / "b.safetensors", {"encoder": "dino-tok", "dataset": "f00d", "base": recipe})
    save_file(tensors, tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"<html>")
    save_file(tensors, tmp_path / "e.safetensors", {"encoder": "tcn", "base": "{"})
    save_file(tensors, tmp_path / "f.safetensors", {"encoder": "tcn", "base": "3"})
    (tmp_path / "pins.json").write_text("{}")
    fitted = {file.path.stem: asdict(file) for file in list_fitted(tmp_path)}
    assert set(fitted) == set("abcdef")
    assert (fitted["a"]["encoder"], fitted["a"]["dataset"], fitted["a"]["base"]) == ("tcn", "f00d", "")
    assert fitted["a"]["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert (fitted["b"]["base"], fitted["b"]["base_weights"]) == ("dinov2-layers", "/somewhere/w.safetensors")
    assert fitted["c"]["fault"] == "not written by wmcache fit"
    assert all(fitted[name]["fault"].startswith("cannot be read") for name in "def")
    assert list_fitted(tmp_path / "nowhere") == []


def test_only_safetensors_and_folders_with_them_are_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"a pickle could hold code")
    (tmp_path / "empty").mkdir()
    for name in ("weights.pt", "empty", "nowhere.safetensors"):
        with pytest.raises(UserError, match=rf"--weights .*{name}: neither an existing"):
            require_weights(tmp_path / name)
    save_file({"weight": torch.zeros(3)}, tmp_path / "empty" / "model.safetensors")
    assert require_weights(tmp_path / "empty") == tmp_path / "empty"


def test_a_header_of_another_encoder_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", {"encoder": "tcn"})
    assert read_header(tmp_path / "a.safetensors", "tcn") == {"encoder": "tcn"}
    with pytest.raises(UserError, match=r"a\.safetensors holds tcn, not dino-tok"):
        read_header(tmp_path / "a.safetensors", "dino-tok")


def test_tensors_that_nobody_wants_are_not_read(tmp_path: Path) -> None:
    save_file({"text.a": torch.zeros(3), "image.a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert set(read_tensors(tmp_path / "a.safetensors", "clip", ("text.",))) == {"image.a"}
    assert set(read_tensors(tmp_path / "a.safetensors", "clip")) == {"text.a", "image.a"}


def test_a_licence_is_accepted_on_the_page_of_its_own_size() -> None:
    pages = {
        size.source: encoders.get_spec("-".join(filter(None, ["dinov3", size.suffix]))).accept for size in dinov3.SIZES
    }
    assert all(page == f"https://huggingface.co/{source}" for source, page in pages.items())
