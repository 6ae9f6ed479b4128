"""Profiles: what a file says is taken word for word, and what it cannot mean is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.cluster.profiles import Profile, read_profile
from wmcache.common.errors import UserError

WHOLE = """
partition = "gpu"
account = "lab-42"
gpus = 2
cores = 16
memory = "64GB"
walltime = "1-12:00:00"
modules = ["cuda/12.4", "gcc"]
setup = ["source ~/venv/bin/activate", "export HF_HOME=$SCRATCH/hub"]
jobs = 32
interface = "ib0"
extra = ["--constraint=a100", "--qos=long"]
"""


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    return tmp_path / "profiles"


def refusal(folder: Path, text: str) -> str:
    (folder / "bad.toml").write_text(text)
    with pytest.raises(UserError) as refused:
        read_profile("bad")
    assert str(refused.value).startswith(str(folder / "bad.toml"))
    return str(refused.value)


def test_a_file_says_all(profiles: Path) -> None:
    (profiles / "big.toml").write_text(WHOLE)
    expected = Profile(
        partition="gpu",
        account="lab-42",
        gpus=2,
        cores=16,
        memory="64GB",
        walltime="1-12:00:00",
        modules=["cuda/12.4", "gcc"],
        setup=["source ~/venv/bin/activate", "export HF_HOME=$SCRATCH/hub"],
        jobs=32,
        interface="ib0",
        extra=["--constraint=a100", "--qos=long"],
    )
    assert read_profile("big") == expected
    assert expected.seconds == 36 * 3600


def test_a_path_is_taken_from_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.toml").write_text("gpus = 1")
    assert read_profile(str(tmp_path / "elsewhere.toml")) == Profile(gpus=1)


def test_slurm_need_not_be_there_but_is_read_when_it_is(profiles: Path) -> None:
    assert read_profile("slurm") == Profile()
    (profiles / "slurm.toml").write_text("jobs = 7")
    assert read_profile("slurm") == Profile(jobs=7)


def test_a_missing_one_is_one_line_that_names_those_there_are(profiles: Path) -> None:
    (profiles / "a100.toml").touch()
    (profiles / "cpu.toml").touch()
    with pytest.raises(UserError, match=r"profiles/gpu\.toml does not exist; .*: a100, cpu$"):
        read_profile("gpu")
    with pytest.raises(UserError, match=r"nowhere/gpu\.toml does not exist"):
        read_profile("nowhere/gpu.toml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gpu = 1", "gpu"),
        ('gpus = "1"', "gpus"),
        ("cores = 0", "cores"),
        ("cores = 1.5", "cores"),
        ("jobs = true", "jobs"),
        ('memory = "32"', "memory"),
        ("memory = 32", "memory"),
        ('walltime = "4h"', "walltime"),
        ('walltime = "00:00:30"', "walltime"),
        ('modules = "cuda"', "modules"),
        ("walltime = 04:00:00", "time"),
        ("gpus = ", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(profiles: Path, text: str, reason: str) -> None:
    assert reason in refusal(profiles, text).removeprefix(str(profiles))


@pytest.mark.parametrize(
    "text",
    [
        r'partition = "gpu\ntouch x"',
        'partition = "gpu --wrap=x"',
        'partition = "-x"',
        'account = "$(touch x)"',
        'modules = ["cuda; touch x"]',
        r'setup = ["a\nb"]',
        r'extra = ["--qos=x\ntouch x"]',
        'extra = ["touch x"]',
        'interface = "lo; touch x"',
    ],
)
def test_no_setting_but_setup_can_be_shell(profiles: Path, text: str) -> None:
    assert "is no profile" in refusal(profiles, text)
