"""Memory that was freed is used again without asking the system for it, unless the user has chosen otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

CHURN = """
import resource, sys
import numpy as np
from wmcache.common.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def churn():
    blocks = [np.ones(2**20) for _ in range(16)]  # 8 MB each
    blocks.clear()
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)


def page_faults(setting: str, **variables: str) -> int:
    """Minor page faults of a process that allocates and frees 128 MB three times."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", CHURN, setting]
    done = subprocess.run(words, env={**usual, **variables}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    assert page_faults("kept") < page_faults("default") / 4


def test_a_variable_of_the_user_stays() -> None:
    assert page_faults("kept", MALLOC_TRIM_THRESHOLD_="65536") > 4 * page_faults("kept")
