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

from wmcache.cluster.profiles import Profile
from wmcache.cluster.slurm import import_slurm, slurm_options
from wmcache.cluster.tasks import AHEAD, WorkerTask, open_pool, parse_cluster, run_alone, run_tasks
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError


@pytest.mark.parametrize(
    ("text", "workers", "elsewhere"),
    [
        ("local", available_cpus(), False),
        ("local:1", 1, False),
        ("local:12", 12, False),
        ("tcp://10.0.0.1:8786", 0, True),
        ("tcp://[::1]:8786", 0, True),
        ("slurm:some.toml", 7, True),
    ],
)
def test_clusters_are_parsed(
    text: str, workers: int, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.toml").write_text('jobs = 7\npartition = "long"\n')
    monkeypatch.chdir(tmp_path)
    found = parse_cluster(text)
    assert (found.text, found.workers, found.elsewhere) == (text, workers, elsewhere)
    assert found.profile == (Profile(jobs=7, partition="long") if "slurm" in text else None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "local:0", "local:", "local:two", "local:-1", "http://h:1", "slurm:", "slurm:nowhere.toml"),
        *("tcp://", "tcp://host", "tcp://host:port", "tcp://h:1/x"),
    ],
)
def test_other_clusters_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml" if "toml" in text else "tcp://HOST:PORT"):
        parse_cluster(text)


@pytest.mark.parametrize("threads", [1, 2])
def test_failed_items_are_counted_and_the_others_done(threads: int) -> None:
    done: list[int] = []

    def task(item: int) -> int:
        if item in (3, 4):
            raise UserError(f"item {item}")
        done.append(item)
        return 1

    with pytest.raises(UserError, match=r"^2 of 20 shards .*item [34]$"):
        run_tasks(task, range(20), threads=threads, total=20, label="test")
    assert sorted(done) == [0, 1, 2, *range(5, 20)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("raised", "expected"), [(ZeroDivisionError(), "^$"), (UserError("bad"), r"^8 of 100 shards .* 92 ")]
)
def test_other_exceptions_and_many_consecutive_failures_abort(threads: int, raised: Exception, expected: str) -> None:
    def task(item: int) -> int:
        raise raised

    with pytest.raises(type(raised), match=expected):
        run_tasks(task, range(100), total=100, label="test", threads=threads)


def test_failures_between_successes_do_not_abort() -> None:
    done: list[int] = []

    def task(item: int) -> int:
        if item % 8:
            raise UserError("bad")
        done.append(item)
        return 1

    with pytest.raises(UserError, match=r"^79 of 91 shards "):
        run_tasks(task, range(91), total=91, label="test")
    assert len(done) == 12


def test_nothing_to_do_or_a_single_task_starts_no_process() -> None:
    run_tasks(len, [], cluster="tcp://127.0.0.1:9", total=0, label="test")
    assert run_alone(os.getpid, cluster="local:4", label="test") == os.getpid()


def test_too_many_workers_for_the_memory_are_not_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wmcache.cluster.tasks.available_ram", lambda: 300_000_000)
    processes: list[int] = []

    def task(item: int) -> int:
        processes.append(os.getpid())
        return 1

    run_tasks(task, range(4), cluster="local:4", total=4, label="test")
    assert set(processes) == {os.getpid()}
    assert "1 of 4 workers; 0.3 GB" in capsys.readouterr().err


def test_a_killed_worker_is_replaced_and_a_task_that_kills_every_worker_fails(tmp_path: Path) -> None:
    def task(item: int) -> int:
        if item == 3 or (item == 1 and not (tmp_path / "tried").exists()):
            (tmp_path / "tried").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(item)).touch()
        return 1

    with pytest.raises(UserError, match=r"^1 of 5 shards .*--batch-size"):
        run_tasks(task, range(5), cluster="local:2", total=5, label="test")
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2", "4", "tried"}


def test_the_scheduler_has_only_a_few_tasks_per_thread(tmp_path: Path) -> None:
    submitted: list[int] = []

    class Watched(list[int]):
        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                submitted.append(item)
                assert len(submitted) - len(list(tmp_path.iterdir())) <= 2 * AHEAD
                yield item

    def task(item: int) -> int:
        (tmp_path / str(item)).touch()
        return 1

    with open_pool("local:2", label="test") as pool:
        run_tasks(task, Watched(range(200)), cluster=pool, total=200, label="test")
    assert {int(file.name) for file in tmp_path.iterdir()} == set(range(200))


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


@pytest.mark.parametrize("cluster", ["local:1", "local:2"])
def test_each_task_is_set_up_once_per_process(tmp_path: Path, cluster: str) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        run_tasks(note_process(folder), range(12), cluster=cluster, threads=2, total=12, label="test")
        processes = [file.read_text() for file in folder.glob("*.item")]
        assert len(processes) == 12
        assert len(list(folder.glob("*.setup"))) == len(set(processes))


@pytest.mark.parametrize(("cluster", "used"), [("local:1", True), ("local:2", False)])
def test_a_loaded_state_is_used_in_this_process_only(tmp_path: Path, cluster: str, used: bool) -> None:
    run_tasks(note_process(tmp_path).with_state("loaded"), range(4), cluster=cluster, total=4, label="test")
    assert {file.read_text() == "loaded" for file in tmp_path.glob("*.item")} == {used}


def test_each_process_has_its_own_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_gpu(item: int) -> int:
        time.sleep(0.2)  # so that each process gets one
        (tmp_path / f"{item}.gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
        return 1

    pytest.importorskip("torch")  # whose import makes workers need GPUs
    monkeypatch.setattr("wmcache.common.device.visible_gpus", lambda: ["4", "GPU-6"])
    run_tasks(write_gpu, range(8), total=8, label="test", cluster="local:2")
    assert {file.read_text() for file in tmp_path.glob("*.gpu")} == {"4", "GPU-6"}


def test_a_users_settings_of_dask_do_not_reach_local_workers() -> None:
    settings = {
        "distributed.comm.default-scheme": "tls",
        "distributed.comm.require-encryption": True,
        "distributed.nanny.pre-spawn-environ": ["nonsense"],
        "distributed.scheduler.idle-timeout": "1ms",
        "distributed.worker.lifetime.duration": "1ms",
    }
    with dask.config.set(settings):
        run_tasks(len, ["a", "b"], cluster="local:2", total=2, label="test")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"DASK_CONFIG": "{folder}"}, "{folder}/mine.yaml"),
        ({"DASK_TEMPORARY_DIRECTORY": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_broken_settings_of_dask_are_one_line(tmp_path: Path, variables: dict[str, str], named: str) -> None:
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


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmcache.cluster.dask.SECONDS_TO_CONNECT", 1)
    with pytest.raises(UserError, match=r"tcp://127\.0\.0\.1:9 "):
        run_tasks(len, ["a"], cluster="tcp://127.0.0.1:9", total=1, label="test")


def test_a_worker_of_another_version_is_refused_by_name() -> None:
    from wmcache.cluster.dask import require_same_versions

    mine = {"packages": {"python": "3.11.7.final.0", "dask": "2026.8.0", "distributed": "2026.8.0", "wmcache": "0.1.0"}}
    patched = {"packages": {**mine["packages"], "python": "3.11.9.final.0"}}
    other = {"packages": {**mine["packages"], "wmcache": None}}
    where = parse_cluster("tcp://host:1")
    require_same_versions({"client": mine, "scheduler": patched, "workers": {"tcp://w:2": mine}}, where)
    with pytest.raises(UserError, match=r"wmcache is 0\.1\.0 .* tcp://w:2"):
        require_same_versions({"client": mine, "scheduler": mine, "workers": {"tcp://w:2": other}}, where)


def test_a_machine_without_sbatch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--cluster slurm: sbatch"):
        run_tasks(len, ["a"], cluster="slurm", total=1, label="test")


def test_importing_dask_jobqueue_keeps_the_handler_of_ctrl_c() -> None:
    program = """
import os, signal
from wmcache.cluster.slurm import import_slurm
import_slurm()
os.kill(os.getpid(), signal.SIGINT)
"""
    found = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == -signal.SIGINT
    assert found.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_job_has_the_resources_of_its_profile_and_its_worker_ends_before_the_walltime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path))
    profile = Profile(
        partition="gpu", account="lab", gpus=1, cores=8, memory="32GB", walltime="02:00:00", modules=["cuda/12"],
        setup=["source env/bin/activate"], interface="lo", extra=["--constraint=a100"],
    )  # fmt: skip
    options = slurm_options(profile, threads=2)
    del options["scheduler_options"]  # SLURMCluster takes them, a job does not
    script = import_slurm().SLURMJob("tcp://1.2.3.4:5", name="one", **options).job_script().splitlines()
    for line in (
        *("#SBATCH -p gpu", "#SBATCH -A lab", "#SBATCH --cpus-per-task=8", "#SBATCH -t 02:00:00", "#SBATCH --gpus=1"),
        *("#SBATCH --requeue", "#SBATCH --constraint=a100", "module load cuda/12 || exit", "source env/bin/activate"),
    ):
        assert line in script
    words = script[-1].split()
    values = {word: words[index + 1] for index, word in enumerate(words[:-1])}  # the last of a repeated option
    assert (values["--nthreads"], values["--interface"]) == ("2", "lo")
    assert (values["--lifetime"], values["--lifetime-stagger"]) == ("6660s", "240s")
    assert profile.seconds > 6660 + 240
