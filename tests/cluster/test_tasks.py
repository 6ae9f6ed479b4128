from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dask
import pytest

from wmcache.cluster import tasks as cluster
from wmcache.cluster.profiles import Profile
from wmcache.cluster.tasks import (
    WorkerTask,
    import_slurm,
    open_pool,
    parse_cluster,
    run_alone,
    run_tasks,
    slurm_options,
)
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError


@pytest.mark.parametrize("threads", [1, 2])
def test_every_item_is_done_once(threads: int) -> None:
    done: list[int] = []

    def task(item: int) -> int:
        done.append(item)
        return 1

    run_tasks(task, range(20), cluster="local:1", threads=threads, total=20, label="test")
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("threads", [1, 2])
def test_items_that_fail_are_counted_and_the_others_done(threads: int) -> None:
    done: list[int] = []

    def task(item: int) -> int:
        if item in (3, 4):
            raise UserError(f"item {item} is bad")
        done.append(item)
        return 1

    with pytest.raises(UserError, match=r"2 of 10 shards failed, the others are done; the first: item [34] is bad"):
        run_tasks(task, range(10), cluster="local:1", threads=threads, total=10, label="test")
    assert sorted(done) == [0, 1, 2, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_ours_is_not_hidden(threads: int) -> None:
    def task(item: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tasks(task, range(3), cluster="local:1", threads=threads, total=3, label="test")


def test_nothing_to_do_starts_no_process() -> None:
    run_tasks(len, [], cluster="local:2", total=0, label="test")


def test_no_more_workers_are_started_than_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "available_ram", lambda: 300_000_000)
    processes: list[int] = []

    def task(item: int) -> int:
        processes.append(os.getpid())
        return 1

    run_tasks(task, range(4), cluster="local:4", total=4, label="test")
    assert set(processes) == {os.getpid()}
    assert "1 of 4 workers; 0.3 GB of memory" in capsys.readouterr().err


def test_a_worker_that_is_killed_is_replaced_and_what_kills_every_worker_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(item: int) -> int:
        if item == 3 or (item == 1 and not (tmp_path / "tried").exists()):
            (tmp_path / "tried").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(item)).touch()
        return 1

    with pytest.raises(UserError, match=r"1 of 5 shards failed, .* was killed, .*memory.*; lower --batch-size"):
        run_tasks(task, range(5), cluster="local:2", total=5, label="test")
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2", "4", "tried"}
    assert "memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "workers", "elsewhere"),
    [("local:1", 1, False), ("local:12", 12, False), ("tcp://10.0.0.1:8786", 0, True), ("tcp://[::1]:8786", 0, True)],
)
def test_a_cluster_is_written_in_one_word(text: str, workers: int, elsewhere: bool) -> None:
    found = parse_cluster(text)
    assert (found.text, found.workers, found.elsewhere) == (text, workers, elsewhere)


def test_local_is_as_many_processes_as_cores() -> None:
    assert parse_cluster("local").workers == available_cpus()


def test_slurm_has_the_jobs_of_its_profile(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text('jobs = 7\npartition = "long"\n')
    found = parse_cluster(f"slurm:{file}")
    assert (found.workers, found.elsewhere) == (7, True)
    assert found.profile is not None
    assert found.profile.partition == "long"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "local:0",
        "local:",
        "local:two",
        "local:-1",
        "tcp://",
        "tcp://host",
        "tcp://host:port",
        "tcp://h:1/x",
        "http://h:1",
        "slurm:",
    ],
)
def test_other_words_are_refused_and_the_right_ones_named(text: str) -> None:
    with pytest.raises(UserError, match=r"write local, local:N, tcp://HOST:PORT, slurm or slurm:PROFILE"):
        parse_cluster(text)


def test_a_profile_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml does not exist"):
        parse_cluster("slurm:nowhere.toml")


def test_a_scheduler_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    with pytest.raises(
        UserError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9 .*start one with: dask scheduler"
    ):
        run_tasks(len, ["a"], cluster="tcp://127.0.0.1:9", total=1, label="test")


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--cluster slurm: there is no sbatch on this machine"):
        run_tasks(len, ["a"], cluster="slurm", total=1, label="test")


def test_ctrl_c_stays_what_it_was_though_dask_jobqueue_would_end_with_status_0() -> None:
    program = """
import os, signal
from wmcache.cluster.tasks import import_slurm
import_slurm()
os.kill(os.getpid(), signal.SIGINT)
"""
    found = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == -signal.SIGINT
    assert found.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_slurm_is_asked_for_what_the_profile_says_and_workers_end_before_the_walltime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path))
    profile = Profile(
        partition="gpu", account="lab", gpus=1, cores=8, memory="32GB", walltime="02:00:00", modules=["cuda/12"],
        setup=["source env/bin/activate"], interface="lo", extra=["--constraint=a100"],
    )  # fmt: skip
    options = slurm_options(profile, threads=2)
    del options["scheduler_options"]  # of the other side
    script = import_slurm().SLURMJob("tcp://1.2.3.4:5", name="one", **options).job_script().splitlines()
    for line in (
        *("#SBATCH -p gpu", "#SBATCH -A lab", "#SBATCH --cpus-per-task=8", "#SBATCH -t 02:00:00", "#SBATCH --gpus=1"),
        *("#SBATCH --requeue", "#SBATCH --constraint=a100", "module load cuda/12 || exit", "source env/bin/activate"),
    ):
        assert line in script
    words = script[-1].split()
    assert words[words.index("--lifetime") + 1] == "6660s"
    assert words[words.index("--lifetime-stagger") + 1] == "240s"
    assert [words[place + 1] for place, word in enumerate(words) if word == "--nthreads"][-1] == "2"
    assert words[words.index("--interface") + 1] == "lo"
    assert profile.seconds > 6660 + 240


def test_the_scheduler_holds_a_few_tasks_for_each_thread_and_the_results_are_all_there(tmp_path: Path) -> None:
    given: list[int] = []

    class Counted(list[int]):
        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                given.append(item)
                yield item

    def task(item: int) -> int:
        (tmp_path / str(item)).touch()
        return item

    with open_pool("local:2", label="test") as pool:
        found = []
        for outcome in cluster._outcomes(task, Counted(range(200)), pool):
            assert len(given) - len(list(tmp_path.iterdir())) <= 2 * cluster.AHEAD
            found.append(outcome)
    assert sorted(found) == list(range(200))


def test_more_workers_than_tasks_are_told_how_to_get_more(capsys: pytest.CaptureFixture[str]) -> None:
    run_tasks(len, ["a"], cluster="local:3", total=1, label="test", what="batches", more="lower --batch-size")
    assert "test: 1 batches for 3 workers; lower --batch-size" in capsys.readouterr().err.splitlines()


def test_a_single_task_of_this_machine_runs_in_this_process() -> None:
    assert run_alone(os.getpid, cluster="local:4", label="test") == os.getpid()


def test_others_with_another_version_are_refused_by_name() -> None:
    mine = {"packages": {"python": "3.11.7.final.0", "dask": "2026.8.0", "distributed": "2026.8.0", "wmcache": "0.1.0"}}
    patched = {"packages": {**mine["packages"], "python": "3.11.9.final.0"}}
    other = {"packages": {**mine["packages"], "wmcache": None}}
    where = parse_cluster("tcp://host:1")
    cluster._require_same({"client": mine, "scheduler": patched, "workers": {"tcp://w:2": mine}}, where)
    with pytest.raises(UserError, match=r"wmcache is 0\.1\.0 here and missing at worker tcp://w:2; install the same"):
        cluster._require_same({"client": mine, "scheduler": mine, "workers": {"tcp://w:2": other}}, where)


def _never(item: int) -> int:
    raise UserError(f"there is no place for {item}")


@pytest.mark.parametrize("threads", [1, 2])
def test_when_nothing_works_any_more_the_rest_is_not_tried(threads: int) -> None:
    with pytest.raises(
        UserError, match=r"^8 shards failed one after another, so \d+ of 100 were not tried; the first: .* for \d$"
    ):
        run_tasks(_never, range(100), total=100, label="try", threads=threads)


def test_failures_between_successes_do_not_stop_the_others() -> None:
    seen: list[int] = []

    def mostly(item: int) -> int:
        if item % 8:
            raise UserError("bad")
        seen.append(item)
        return 1

    with pytest.raises(UserError, match=r"^79 of 91 shards failed, the others are done; the first: bad$"):
        run_tasks(mostly, range(91), total=91, label="try")
    assert len(seen) == 12


def test_each_process_of_this_machine_has_its_own_of_several_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_gpu(item: int) -> int:
        time.sleep(0.2)  # so that each process gets one
        (tmp_path / f"{item}.gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
        return 1

    monkeypatch.setattr("wmcache.common.device.visible_gpus", lambda: ["4", "GPU-6"])
    run_tasks(write_gpu, range(8), total=8, label="try", cluster="local:2")
    assert {file.read_text() for file in tmp_path.glob("*.gpu")} == {"4", "GPU-6"}


def test_settings_of_dask_for_other_clusters_do_not_concern_this_machine() -> None:
    theirs = {
        "distributed.comm.default-scheme": "tls",
        "distributed.comm.require-encryption": True,
        "distributed.nanny.pre-spawn-environ": ["nonsense"],
        "distributed.scheduler.idle-timeout": "1ms",
        "distributed.worker.lifetime.duration": "1ms",
    }
    with dask.config.set(theirs):
        run_tasks(len, ["a", "b"], cluster="local:2", total=2, label="test")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"DASK_CONFIG": "{folder}"}, "{folder}/mine.yaml"),
        ({"DASK_TEMPORARY_DIRECTORY": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_settings_of_dask_that_do_not_work_are_one_line(tmp_path: Path, variables: dict[str, str], named: str) -> None:
    (tmp_path / "mine.yaml").write_text("distributed: {worker: [\n")
    program = """
from wmcache.common.errors import UserError
from wmcache.cluster.tasks import run_tasks
run_tasks(len, ["a"], cluster="local:1", total=1, label="test")
try:
    run_tasks(len, ["a", "b"], cluster="local:2", total=2, label="test")
except UserError as error:
    print(error)
"""
    settings = {name: value.format(folder=tmp_path) for name, value in variables.items()}
    # A process of its own, since Dask reads its settings when it is imported.
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
    )
    (line,) = found.stdout.splitlines()
    assert named.format(folder=tmp_path) in line


def note_process(folder: Path) -> WorkerTask[int, str]:
    """A task that notes its set-ups and its items as files."""

    # Workers cannot import a test module; a local class is pickled with its code.
    @dataclass(frozen=True)
    class NoteProcess(WorkerTask[int, str]):
        folder: Path

        def setup(self) -> str:
            time.sleep(0.2)  # long enough for a second thread to ask for it too
            (self.folder / f"{uuid.uuid4().hex}.setup").touch()
            return f"{os.getpid()}"

        def run(self, state: str, item: int) -> int:
            (self.folder / f"{item}.item").write_text(state)
            return 1

    return NoteProcess(folder)


@pytest.mark.parametrize(("cluster", "threads"), [("local:1", 2), ("local:2", 2)])
def test_a_task_is_set_up_once_per_process(tmp_path: Path, cluster: str, threads: int) -> None:
    run_tasks(note_process(tmp_path), range(12), cluster=cluster, threads=threads, total=12, label="test")
    processes = {file.read_text() for file in tmp_path.glob("*.item")}
    assert len(list(tmp_path.glob("*.item"))) == 12
    assert len(list(tmp_path.glob("*.setup"))) == len(processes)


@pytest.mark.parametrize(("cluster", "given"), [("local:1", True), ("local:2", False)])
def test_a_loaded_state_is_used_in_this_process_only(tmp_path: Path, cluster: str, given: bool) -> None:
    run_tasks(note_process(tmp_path).with_state("loaded"), range(4), cluster=cluster, total=4, label="test")
    assert {file.read_text() == "loaded" for file in tmp_path.glob("*.item")} == {given}


def test_tasks_of_other_values_have_other_states(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        run_tasks(note_process(folder), range(2), total=2, label="test")
        assert len(list(folder.glob("*.setup"))) == 1
