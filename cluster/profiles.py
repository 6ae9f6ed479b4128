"""What a cluster's batch system is asked for: small TOML files, every word of which is looked at."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from wmcache.common.errors import UserError
from wmcache.common.folders import home
from wmcache.common.schema import Size, parse

DEFAULT = "slurm"
HINT = 'hint it; memory is written as "32GB", walltime as "04:00:00" or "2-00:00:00"'

Count = Annotated[int, Field(ge=0, le=2**16)]
# What becomes a word of a batch script has no space, quote or newline, so it cannot become more than that word.
Word = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:/+@-]*$")]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}[MGT]B$")]
Walltime = Annotated[str, Field(pattern=r"^([1-9][0-9]?-)?[0-9]{2}:[0-5][0-9]:[0-5][0-9]$")]
Option = Annotated[str, Field(max_length=200, pattern=r"^--[a-z][\x20-\x7e]*$")]
Line = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00\r\n]*$")]


@dataclass(frozen=True)
class Profile:
    """What one job is given, and how many jobs there are.

    Attributes:
        partition, account: of the batch system; None takes its own default.
        gpus: of each job that trains; one that encodes has one of them. cores: CPUs of each job. memory: of each job, as `32GB`.
        walltime: of each job, as `HH:MM:SS` or `D-HH:MM:SS`.
        modules: names for `module load`. setup: lines of the user's own shell, run before the program, as in activating an environment.
        jobs: tasks of an array, or jobs that Dask asks for.
        interface: of the network, through which Dask's workers and scheduler meet.
        extra: more options of `sbatch`, as `--constraint=a100`.
    """

    partition: Word | None = None
    account: Word | None = None
    gpus: Count = 0
    cores: Size = 4
    memory: Memory = "16GB"
    walltime: Walltime = "04:00:00"
    modules: list[Word] = field(default_factory=list)
    setup: list[Line] = field(default_factory=list)
    jobs: Size = 4
    interface: Word | None = None
    extra: list[Option] = field(default_factory=list)

    @property
    def seconds(self) -> int:
        """The walltime."""
        days, _, clock = self.walltime.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def read_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: a path that ends in `.toml`, or a name in `$WMCACHE_HOME/profiles`. `slurm` need not be there: then it is the defaults.

    Raises:
        UserError: there is no such file, it is no TOML, or it has a setting that is unknown or does not fit.
    """
    folder = home() / "profiles"
    file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if name == DEFAULT:
            return Profile()
        known = ", ".join(sorted(path.stem for path in folder.glob("*.toml"))) or "none"
        raise UserError(f"{file} does not exist; write it, or take one of those in {folder}: {known}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:160]}); hint it") from error
    try:
        profile = parse(Profile, values, file, HINT, fault="is no profile")
    except TypeError as error:  # of json: TOML has dates
        raise UserError(f"{file} has a date or a time, which no setting is; write it as a string") from error
    if profile.seconds < 60:
        raise UserError(f"{file} is no profile ('walltime': {profile.walltime} is less than a minute); {HINT}")
    return profile


def log_pattern(folder: Path, pattern: str) -> str:
    """The value of `#SBATCH --output=`, which SLURM reads and no shell: the folder as it is called, SLURM's own pattern in it.

    Raises:
        UserError: SLURM cannot be told of a folder of that name.
    """
    text = str(folder)
    if not text.isprintable() or "\\" in text:
        raise UserError(f"{text}: SLURM cannot write its logs there; set WMCACHE_HOME to another folder")
    name = text.replace("%", "%%").replace('"', '\\"')
    return f'"{name}/{pattern}"'
