"""Resources of SLURM jobs, read from small TOML files and checked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from wmcache.common.errors import UserError, reason
from wmcache.common.folders import home
from wmcache.common.schema import Size, parse

DEFAULT = "slurm"
HINT = 'correct it; memory is written as "32GB", walltime as "04:00:00" or "2-00:00:00"'

Count = Annotated[int, Field(ge=0, le=2**16)]
# Words of a batch script contain no space, quote or newline, so a value cannot become more than one word.
Word = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:/+@-]*$")]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}[MGT]B$")]
Walltime = Annotated[str, Field(pattern=r"^([1-9][0-9]?-)?[0-9]{2}:[0-5][0-9]:[0-5][0-9]$")]
Option = Annotated[str, Field(max_length=200, pattern=r"^--[a-z][\x20-\x7e]*$")]
Line = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00\r\n]*$")]


@dataclass(frozen=True)
class Profile:
    """Resources of one job, and the number of jobs.

    Attributes:
        modules: names for `module load`.
        setup: shell lines to run before the program.
        jobs: jobs of an array, or Dask workers.
        interface: of the network, for Dask's workers and scheduler.
        extra: more options of `sbatch`.
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
        """The walltime in seconds."""
        days, _, clock = self.walltime.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def read_profile(name: str) -> Profile:
    """Read a profile: a path that ends in `.toml`, or a name in `$WMCACHE_HOME/profiles`. Without a file, `slurm` has the defaults."""
    folder = home() / "profiles"
    file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    try:
        profile = parse(Profile, tomllib.loads(file.read_text(encoding="utf-8")), file, HINT, fault="is not a profile")
    except FileNotFoundError:
        if name == DEFAULT:
            return Profile()
        known = ", ".join(sorted(path.stem for path in folder.glob("*.toml"))) or "none"
        raise UserError(f"{file} does not exist; write it, or take one of those in {folder}: {known}") from None
    except (OSError, ValueError, TypeError) as error:  # the last for a date, which JSON does not have
        raise UserError(f"{file} cannot be read ({reason(error)}); {HINT}") from error
    if profile.seconds < 60:
        raise UserError(f"{file} is not a profile ('walltime': {profile.walltime} is less than a minute); {HINT}")
    return profile
