from __future__ import annotations

import tomllib
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


def test_all_settings_are_read(profiles: Path) -> None:
    (profiles / "big.toml").write_text(WHOLE)
    expected = Profile(**tomllib.loads(WHOLE))
    assert read_profile("big") == expected
    assert expected.seconds == 36 * 3600


def test_a_path_may_be_outside_the_home_and_slurm_has_defaults_until_it_has_a_file(profiles: Path) -> None:
    elsewhere = profiles.parent / "elsewhere.toml"
    elsewhere.write_text("gpus = 1")
    assert read_profile(str(elsewhere)) == Profile(gpus=1)
    assert read_profile("slurm") == Profile()
    (profiles / "slurm.toml").write_text("jobs = 7")
    assert read_profile("slurm") == Profile(jobs=7)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gpu = 1", "gpu"),
        ('gpus = "1"', "gpus"),
        ("cores = 0", "cores"),
        ('memory = "32"', "memory"),
        ('walltime = "4h"', "walltime"),
        ('modules = "cuda"', "modules"),
        ("walltime = 04:00:00", "time"),
        ("gpus = ", "cannot be read"),
        # No setting but `setup` can become shell, or a second option of sbatch.
        (r'partition = "gpu\ntouch x"', "partition"),
        ('partition = "gpu --wrap=x"', "partition"),
        ('account = "$(touch x)"', "account"),
        ('modules = ["cuda; touch x"]', "modules"),
        (r'setup = ["a\nb"]', "setup"),
        (r'extra = ["--qos=x\ntouch x"]', "extra"),
        ('extra = ["touch x"]', "extra"),
        ('interface = "lo; touch x"', "interface"),
    ],
)
def test_invalid_settings_are_named(profiles: Path, text: str, named: str) -> None:
    (profiles / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=rf"^{profiles / 'bad.toml'} .*{named}"):
        read_profile("bad")
