"""Real servers and schedulers on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules cannot import each other; they share modules beside them.
sys.path.insert(0, str(Path(__file__).parent))

from s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An object store; tests use `s3`."""
    with S3Server(tmp_path_factory.mktemp("s3") / "server") as server:
        with server.client() as client:
            client.create_bucket(Bucket="bucket")
        yield server


@pytest.fixture
def s3(s3_server: S3Server) -> S3Server:
    """A running server with a bucket named `bucket`, started again if a test has killed it."""
    s3_server.start()
    return s3_server
