"""Real servers and schedulers on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules cannot import each other; what they share lies in modules beside them.
sys.path.insert(0, str(Path(__file__).parent))

from s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An object store; a test uses `s3`."""
    with S3Server(tmp_path_factory.mktemp("s3") / "server") as server:
        server.bucket("bucket")
        yield server


@pytest.fixture
def s3(s3_server: S3Server) -> S3Server:
    """A server that runs, and has a bucket named `bucket`, whatever the test before has done to it."""
    s3_server.start()
    return s3_server
