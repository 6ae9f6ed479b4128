"""Several processes train what one does, under torchrun and by --devices; they end together, with one line, and any number resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.engine.ranks import SINGLE, Ranks

BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
SETTINGS = """--width 16 --depth 1 --heads 2 --dropout 0 --batch-size 8 --steps 200 --dtype float32 --device cpu
    --log-every 1 --validate-every 200 --checkpoint-every 40"""
STOPPED = "stopped; "
"""Start of the line that names the command to resume with."""


class Ended(NamedTuple):
    """How a job has ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float


def curve(run: Path, key: str = "loss") -> list[float]:
    """Values of the steps 1, 2, …; a step that is missing or logged twice fails."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def newest(run: Path) -> int:
    return int(last_checkpoint(run).name.removeprefix("step-"))


def ranks_of(job: psutil.Process) -> dict[int, psutil.Process]:
    return {int(child.environ()["RANK"]): child for child in job.children()}


def work(
    command: list[object], send: Callable[[psutil.Process], None] | None = None, after: Path | None = None
) -> Ended:
    """Run a job to its end; `send` acts on it when 35 more steps of the run `after` are logged."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = steps_done(after) if after else 0
    words = list(map(str, command))
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        start = time.monotonic()
        if send and after:
            while steps_done(after) < first + 35:
                assert job.poll() is None, job.communicate()
                assert time.monotonic() < start + 120
                time.sleep(0.02)
            start = time.monotonic()
            send(psutil.Process(job.pid))
        stdout, stderr = job.communicate(timeout=120)
        return Ended(job.returncode, stdout, stderr, time.monotonic() - start)


def lines_of(stderr: str) -> list[str]:
    """Lines without progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not re.match(r"(wmtrain|load): ", line)]


def wmtrain(store: Path, run: Path, *more: str) -> list[object]:
    return [BIN / "wmtrain", "--cache", store, "--out", run, *SETTINGS.split(), *more]


@pytest.fixture(scope="module")
def straight(planted_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert work(wmtrain(planted_path, run)).status == 0
    return run


class Story(NamedTuple):
    """A run of two ranks that was stopped, resumed, lost a rank, and was finished by one process."""

    run: Path
    stopped: Ended
    stopped_at: int
    killed: Ended
    killed_at: int


@pytest.fixture(scope="module")
def story(planted_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    run = tmp_path_factory.mktemp("story") / "run"
    command = wmtrain(planted_path, run, "--devices", "2")
    stopped = work(command, lambda job: job.send_signal(signal.SIGUSR1), run)
    stopped_at = newest(run)
    killed = work(command, lambda job: ranks_of(job)[1].kill(), run)
    killed_at = newest(run)
    assert work(wmtrain(planted_path, run)).status == 0
    return Story(run, stopped, stopped_at, killed, killed_at)


@pytest.mark.cluster
class TestStory:
    def test_a_signal_to_the_launcher_ends_all_in_one_line_and_saves_its_step(self, story: Story) -> None:
        assert story.stopped.status == 75
        (line,) = lines_of(story.stopped.stderr)
        assert line.startswith(STOPPED)
        assert "--devices 2" in line
        assert story.stopped_at >= 35
        assert story.stopped_at % 40

    def test_a_killed_rank_ends_all_in_seconds_and_one_line(self, story: Story) -> None:
        assert story.killed.status == 1
        assert story.killed.seconds < 20
        assert story.killed_at in (story.stopped_at, 40, 80)
        (line,) = lines_of(story.killed.stderr)
        assert line.startswith("Error: ")

    def test_one_process_finishes_it_on_the_curve_of_one_process(self, story: Story, straight: Path) -> None:
        assert newest(story.run) == 200
        assert json.loads((story.run / "config.json").read_text()) == json.loads((straight / "config.json").read_text())
        for key in ("loss", "gradient_norm"):
            assert len(curve(story.run, key)) == 200
            assert curve(story.run, key) == pytest.approx(curve(straight, key), abs=1e-4)


@pytest.mark.cluster
def test_torchrun_starts_ranks_and_a_signal_to_one_ends_all(planted_path: Path, tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    command = [*TORCHRUN, *wmtrain(planted_path, run)]
    ended = work(command, lambda job: ranks_of(job)[1].terminate(), run)
    assert ended.status == 1  # torchrun's own status
    assert ended.stderr.count(STOPPED) == 1
    losses = curve(run)
    assert len(losses) == newest(run) >= 35
    assert losses == pytest.approx(curve(straight)[: len(losses)], abs=1e-4)


@pytest.mark.sweep  # half a minute
def test_gradients_accumulate_as_in_one_process_and_rank_0_alone_prints(planted_path: Path, tmp_path: Path) -> None:
    more = "--steps", "30", "--accumulate", "3"
    run, single = tmp_path / "run", tmp_path / "single"
    command = wmtrain(planted_path, run, "--devices", "2", *more)
    ended = work(command)
    assert ended.status == 0, ended.stderr
    assert ended.stdout.count("2 x cpu float32") == 1
    assert lines_of(ended.stderr) == []
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert work(wmtrain(planted_path, single, *more)).status == 0
    for key in ("loss", "gradient_norm"):
        assert len(curve(run, key)) == 30
        assert curve(run, key) == pytest.approx(curve(single, key), abs=1e-4)
    refused = work([*command, "--seed", "3"])
    assert refused.status == 1
    (line,) = refused.stderr.splitlines()
    assert re.match(f"Error: {run} .*seed 0 != 3", line)


@pytest.mark.sweep
def test_threads_of_the_ranks_end_with_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, torch
from wmcache.engine.ranks import joined

with joined("cpu") as ranks:
    network = torch.nn.Linear(2, 2)
    ranks.share(network, lambda batch, step: {"loss": network(batch).sum()})(torch.ones(1, 2), 0)["loss"].backward()
print({open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")})
"""
    )
    ended = work([*TORCHRUN, sys.executable, "-P", script])
    assert ended.status == 0, ended.stderr
    # A thread that is left when the interpreter ends may abort the process.
    assert "gloo" not in ended.stdout


@contextmanager
def start(store: Path, run: Path) -> Iterator[psutil.Popen]:
    """A training of two ranks that takes longer than the test; what still runs at the end is killed."""
    words = wmtrain(store, run, "--devices", "2", "--steps", "100000")
    with psutil.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True) as job:
        children: list[psutil.Process] = []
        try:
            yield job
        finally:
            with suppress(psutil.NoSuchProcess):
                children = job.children()
            for process in (job, *children):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def children_of(job: psutil.Process) -> list[psutil.Process]:
    """Ranks, also those that have not started Python yet."""
    return [child for child in job.children() if child.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def reach_imports(job: psutil.Process) -> None:
    """The launcher imports torch."""
    time.sleep(1.5)


def reach_start(job: psutil.Process) -> None:
    """Ranks have just been started."""
    wait_until(lambda: len(children_of(job)) == 2)


def reach_rendezvous(job: psutil.Process) -> None:
    """One rank waits for the other, which is stopped."""
    reach_start(job)
    waiting, stopped = children_of(job)
    stopped.suspend()
    wait_until(lambda: len(waiting.net_connections("tcp")) > 0)


def reach_work(job: psutil.Process) -> None:
    """Both ranks have joined."""
    reach_start(job)
    wait_until(lambda: all(len(rank.net_connections("tcp")) > 1 for rank in children_of(job)))


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        (reach_imports, signal.SIGTERM, 75),
        (reach_start, signal.SIGINT, 130),
        (reach_rendezvous, signal.SIGTERM, 75),
        (reach_rendezvous, signal.SIGINT, 130),
        (reach_work, signal.SIGINT, 130),
    ],
)
def test_a_launcher_ends_when_it_gets_a_signal_and_so_do_its_ranks(
    planted_path: Path, tmp_path: Path, moment: Callable[[psutil.Process], None], number: signal.Signals, status: int
) -> None:
    with start(planted_path, tmp_path / "run") as job:
        moment(job)
        ranks = children_of(job)
        begin = time.monotonic()
        job.send_signal(number)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == status
    assert time.monotonic() - begin < 30
    assert not any(rank.is_running() for rank in ranks)
    assert lines_of(stderr)[-1].startswith(STOPPED)
    assert "Traceback" not in stderr


@pytest.mark.cluster
def test_a_second_ctrl_c_kills_ranks_that_do_not_end(planted_path: Path, tmp_path: Path) -> None:
    with start(planted_path, tmp_path / "run") as job:
        reach_start(job)
        ranks = children_of(job)
        for rank in ranks:
            rank.suspend()
        job.send_signal(signal.SIGINT)
        time.sleep(1)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=60)
    assert job.returncode == 130
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the host's name, in a namespace")
def test_the_name_of_the_machine_need_not_resolve(planted_path: Path, tmp_path: Path) -> None:
    program = 'hostname no-such-host-x; exec "$@"'
    words = wmtrain(planted_path, tmp_path / "run", "--devices", "2", "--steps", "5")
    ended = work(["unshare", "-u", "sh", "-c", program, "sh", *words])
    assert ended.status == 0, ended.stderr


@pytest.mark.cluster
def test_an_error_of_another_rank_is_reported_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys
from wmcache.common.errors import UserError
from wmcache.engine.ranks import ReportedError, joined
try:
    with joined("cpu") as ranks:
        ranks.wait()
        if ranks.rank == 1:
            raise UserError("a damaged shard")
        ranks.wait()
except (UserError, ReportedError) as error:
    print(f"{type(error).__name__} on {ranks.rank}: {error}")
    sys.exit(1)
"""
    )
    ended = work([*TORCHRUN, sys.executable, program])
    assert sorted(ended.stdout.splitlines()) == ["ReportedError on 0: ", "UserError on 1: a damaged shard"]


def test_draws_depend_on_seed_rank_and_step() -> None:
    def draw(rank: int, seed: int, step: int) -> float:
        Ranks(rank, 2).seed(seed, step)
        return torch.rand(()).item()

    with torch.random.fork_rng():
        assert draw(1, 0, 7) == draw(1, 0, 7)
        assert len({draw(rank, seed, step) for rank in range(2) for seed in range(2) for step in range(2)}) == 8
        torch.manual_seed(0)
        expected = torch.rand(()).item()
        torch.manual_seed(0)
        SINGLE.seed(5, 5)
        assert torch.rand(()).item() == expected


def test_each_rank_needs_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("cuda:1", "mps", "cuda"):
        with pytest.raises(UserError, match="--device"):
            Ranks(0, 2, 0, 2).device(name)
    assert Ranks(0, 2, 0, 2).device("cpu").type == "cpu"
