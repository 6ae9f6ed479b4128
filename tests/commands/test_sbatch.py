"""`wmcache sbatch`: the resources of the script, its quoting, and how it handles signals and exit statuses."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cli import main
from wmcache.commands.command import Command
from wmcache.common.errors import STOPPED

PROFILE = """
partition = "gpu"
account = "lab"
gpus = 2
cores = 8
memory = "32GB"
walltime = "01:00:00"
modules = ["cuda/12.4"]
setup = ["export FROM_SETUP=$((1 + 1))"]
jobs = 16
extra = ["--qos=long"]
"""
PROGRAM = """#!/bin/bash
printf '%s\\0' "$@" > "$SEEN/words"
env -0 > "$SEEN/environment"
pwd > "$SEEN/folder"
case $MODE in
    die) ;;
    slow) trap 'trap "exit 75" TERM; touch "$SEEN/signalled"' TERM ;;
    *) trap 'exit 75' TERM ;;
esac
touch "$SEEN/ready"
case $MODE in
    die) exec sleep 60 ;;
    wait | slow) while :; do sleep 0.02; done ;;
    *) exit "$MODE" ;;
esac
"""
HOSTILE = """a b'"; touch x; $(touch x) `touch x` $HOME \\ *"""


class Site:
    """A login node: programs that note how they are called, profiles, and a `scontrol` that notes its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.programs = folder, folder / "ho me", folder / "bin"
        self.programs.mkdir()
        (self.home / "profiles").mkdir(parents=True)
        (self.home / "profiles" / "big.toml").write_text(PROFILE)
        (self.home / "profiles" / "slurm.toml").write_text('cores = 1\nmemory = "1GB"')
        for name in ("wmcache", "wmtrain"):
            self.add_program(name, PROGRAM)
        self.add_program("scontrol", '#!/bin/bash\nprintf "%s\\n" "$*" >> "$SEEN/requeued"\n')
        self.add_program("module", "#!/bin/bash\n")

    def add_program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def write(self, line: str) -> Path:
        result = sbatch(*line.split())
        assert result.exit_code == 0, result.output
        (line,) = result.stdout.splitlines()
        assert line.startswith("sbatch ")
        script = Path(shlex.split(line)[1])
        assert script.parent == self.home / "jobs"
        return script

    def start(self, script: Path, mode: str | int = 0) -> subprocess.Popen[bytes]:
        job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
        path = f"{self.programs}:{os.environ['PATH']}"
        settings = {"MODE": str(mode), "SEEN": str(self.folder), "PATH": path, **job}
        (self.folder / "ready").unlink(missing_ok=True)
        return subprocess.Popen(["/bin/bash", script], env={**os.environ, **settings}, cwd="/")

    def start_and_signal(self, script: Path, mode: str, *signals: signal.Signals) -> int:
        """Send signals, each after the program has received the one before, and wait for the end."""
        process = self.start(script, mode)
        for sent, file in zip(signals, ("ready", "signalled"), strict=False):
            end = time.monotonic() + 10
            while not (self.folder / file).exists():
                assert time.monotonic() < end, f"the program is not {file}"
                time.sleep(0.01)
            process.send_signal(sent)
        return process.wait(10)

    @property
    def seen(self) -> list[str]:
        return (self.folder / "words").read_text().split("\0")[:-1]

    @property
    def requeued(self) -> str:
        """The arguments of `scontrol`; empty where it was not called."""
        file = self.folder / "requeued"
        return file.read_text() if file.exists() else ""


def sbatch(*words: str) -> Result:
    return CliRunner().invoke(main, ["sbatch", *words])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_path: Path, store_path: Path) -> Site:
    site = Site(tmp_path)
    (site.home / "pointmaze-umaze").symlink_to(dataset_path)
    (tmp_path / "s.zarr").symlink_to(store_path)
    monkeypatch.setenv("WMCACHE_HOME", str(site.home))
    monkeypatch.setattr(sys, "argv", [str(site.programs / "wmcache")])
    monkeypatch.chdir(tmp_path)
    return site


class TestScript:
    def test_an_extraction_is_an_array_with_the_resources_of_the_profile(self, site: Site) -> None:
        text = site.write("--profile big extract --encoder pixels").read_text()
        asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
        assert asked == [
            "--job-name=wmcache-extract",
            f'--output="{site.home}/logs/%x-%A_%a.log"',
            "--open-mode=append",
            "--partition=gpu",
            "--account=lab",
            "--nodes=1",
            "--ntasks=1",
            "--gpus=1",
            "--cpus-per-task=8",
            "--mem=32G",
            "--time=01:00:00",
            "--array=0-15",
            "--signal=B:USR1@180",
            "--requeue",
            "--qos=long",
        ]
        assert text.startswith("#!/bin/bash\n#SBATCH")
        assert (site.home / "logs").is_dir()

    def test_a_training_is_one_job_on_all_its_devices(self, site: Site) -> None:
        text = site.write("--profile big wmtrain --cache s.zarr").read_text()
        assert "--array" not in text
        assert '--shard-slice "' not in text
        assert '/logs/%x-%j.log"\n' in text
        assert "#SBATCH --gpus=2\n" in text
        assert f"{site.programs}/wmtrain --cache s.zarr --devices 2 &\n" in text
        assert "--devices" not in site.write("wmtrain --cache s.zarr").read_text()

    def test_jobs_and_a_short_walltime(self, site: Site) -> None:
        (site.home / "profiles" / "short.toml").write_text('walltime = "00:02:00"')
        text = site.write("--profile short --jobs 3 extract --encoder pixels").read_text()
        assert "#SBATCH --array=0-2\n" in text
        assert "#SBATCH --signal=B:USR1@60\n" in text
        assert '--shard-slice "$SLURM_ARRAY_TASK_ID/3" &' in text

    def test_stdout_is_the_quoted_line_that_submits_the_script(self, site: Site) -> None:
        out = site.folder / "it's mine.sh"
        line = sbatch("--out", str(out), "extract", "--encoder", "pixels").stdout
        assert subprocess.check_output(["bash", "-c", f"printf '%s\\n' {line}"], text=True) == f"sbatch\n{out}\n"
        assert out.exists()

    @pytest.mark.parametrize(
        ("name", "logged"),
        [
            # Tried with slurm-wlm 22.05 by tests/cluster/slurm.sh.
            ("""100% "o'k" $(touch x)""", """100%% \\"o'k\\" $(touch x)"""),
            ("line\nbreak", None),
            ("back\\slash", None),
        ],
    )
    def test_the_folder_of_logs_is_quoted_for_slurm_or_refused(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, name: str, logged: str | None
    ) -> None:
        monkeypatch.setenv("WMCACHE_HOME", str(site.folder / name))
        frames, script = str(site.home / "pointmaze-umaze"), Path("script.sh")
        result = sbatch("--out", str(script), "extract", "--encoder", "pixels", "--dataset", frames)
        if logged is None:
            assert (result.exit_code, script.exists()) == (1, False)
            assert "WMCACHE_HOME" in result.stderr
        else:
            assert result.exit_code == 0, result.output
            assert f'--output="{site.folder}/{logged}/logs/%x-%A_%a.log"\n' in script.read_text()

    def test_another_script_is_not_overwritten(self, site: Site) -> None:
        first = site.write("wmtrain --cache s.zarr")
        text = first.read_text()
        second = site.write("wmtrain --cache s.zarr --seed 1")
        assert (first.name, second.name) == ("wmtrain.sh", "wmtrain-2.sh")
        assert first.read_text() == text
        assert "--seed 1" in second.read_text()
        assert site.write("wmtrain --cache s.zarr") == first
        assert site.write("wmtrain --cache s.zarr --seed 1") == second
        mine = site.folder / "mine.sh"
        mine.write_text("# an hour of work")
        result = sbatch("--out", str(mine), "wmtrain", "--cache", "s.zarr")
        assert result.exit_code == 1
        assert str(mine) in result.stderr
        assert mine.read_text() == "# an hour of work"

    def test_unfinished_inputs_are_noted(self, site: Site, store_path: Path) -> None:
        half = shutil.copytree(store_path, site.folder / "half.zarr")
        StoreWriter.resume(half, TokenStore.open(half).identity).reopen([1])
        (site.folder / "frames").mkdir()
        (site.folder / "frames" / "unfinished.json").touch()
        for line in (f"wmtrain --cache {half}", "extract --encoder pixels --dataset frames"):
            result = sbatch(*line.split())
            assert result.exit_code == 0
            assert f"{line.split()[-1]} " in result.stderr


class TestRun:
    def test_words_arrive_unchanged_and_none_becomes_shell(self, site: Site) -> None:
        folder = site.folder / HOSTILE
        folder.mkdir()
        os.chdir(folder)
        Path(HOSTILE).symlink_to(site.home / "pointmaze-umaze")
        words = ["extract", "--encoder", "pixels", "--dataset", HOSTILE, "--out", "line\nbreak"]
        script = Path(shlex.split(sbatch("--profile", "big", *words).stdout)[1])
        subprocess.run(["bash", "-n", script], check=True)
        assert site.start(script).wait(10) == 0
        assert site.seen[: len(words)] == words
        assert site.seen[-2:] == ["--shard-slice", "2/16"]
        assert Path((site.folder / "folder").read_text().removesuffix("\n")) == folder
        environment = (site.folder / "environment").read_text().split("\0")
        assert {f"WMCACHE_HOME={site.home}", "OMP_NUM_THREADS=8", "FROM_SETUP=2"} <= set(environment)
        assert not [*Path("/").glob("x"), *site.folder.rglob("x")]

    @pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (130, ""), (75, "requeue 7_2\n")])
    def test_an_exit_status_is_passed_on_and_75_requeues_the_job(self, site: Site, status: int, requeued: str) -> None:
        assert site.start(site.write("extract --encoder pixels"), status).wait(10) == status
        assert site.requeued == requeued

    @pytest.mark.parametrize(("mode", "times"), [("wait", 1), ("die", 1), ("slow", 2)])
    def test_the_walltimes_signal_stops_the_program_and_requeues_the_job(
        self, site: Site, mode: str, times: int
    ) -> None:
        script = site.write("wmtrain --cache s.zarr")
        assert site.start_and_signal(script, mode, *[signal.SIGUSR1] * times) == 75
        assert site.requeued == "requeue 9\n"

    def test_a_cancelled_job_is_stopped_and_stays_cancelled(self, site: Site) -> None:
        script = site.write("extract --encoder pixels")
        assert site.start_and_signal(script, "wait", signal.SIGTERM) == 75
        assert site.start_and_signal(script, "slow", signal.SIGUSR1, signal.SIGTERM) == 75
        assert site.requeued == ""

    def test_a_missing_module_ends_the_job(self, site: Site) -> None:
        site.add_program("module", "#!/bin/bash\nexit 3\n")
        assert site.start(site.write("--profile big extract --encoder pixels")).wait(10) == 3
        assert not (site.folder / "words").exists()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("extract --encoder pixel", "'pixel'"),
        ("extract --encoder pixels --dry-run", "--dry-run"),
        ("extract --shard-slice 0/2", "--shard-slice"),
        ("extract --cluster slurm", "--cluster slurm"),
        ("--profile big wmtrain --cache s.zarr --batch-size 3", "--batch-size 3"),
        ("wmtrain --cache ss.zarr", "s.zarr?"),
        ("extract --encoder pixels --dataset none", "none/dataset.json"),
        ("wmtrain --seed 1 decoder --cache s.zarr", "wmtrain decoder"),
        ("--jobs 2 wmtrain --cache s.zarr", "--jobs"),
        ("", "extract or wmtrain"),
        ("--profile gpu extract", "gpu.toml"),
    ],
)
def test_mistakes_are_reported_before_submission(site: Site, line: str, hint: str) -> None:
    result = sbatch(*line.split())
    assert result.exit_code in (1, 2)
    assert hint in result.stderr.splitlines()[-1]
    assert not (site.home / "jobs").exists()


def test_a_second_signal_does_not_interrupt_the_end() -> None:
    ended = []

    @click.command(cls=Command)
    def job() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            ended.append(True)

    assert CliRunner().invoke(job).exit_code == STOPPED
    assert ended == [True]
