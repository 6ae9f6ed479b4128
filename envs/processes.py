"""Copies of a slow world, each in one of a few worker processes. A worker ends with the process that started it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.envs.base import Frames, Start, States, Steps
from wmcache.envs.distract.looks import Look

PROGRAM = "import sys; from wmcache.envs.processes import serve; serve(int(sys.argv[1]))"
PATIENCE = 5.0
"""Seconds after which a worker that does not end is killed."""


class Processes:
    """Copies of a world, as `envs.gym.Copies`, in worker processes."""

    def __init__(self, name: str, count: int, image_size: int, workers: int) -> None:
        """Start workers; raises UserError or OSError where the world cannot be opened there."""
        self.name = name
        self._sizes = [len(part) for part in np.array_split(np.arange(count), workers)]
        self._workers: list[Worker] = []
        self._end = weakref.finalize(self, end_all, self._workers)
        try:
            self._workers += (Worker() for _ in self._sizes)
            self._call("open", [(name, size, image_size) for size in self._sizes])
        except (OSError, UserError):
            self.close()
            raise

    def reset(self, starts: Sequence[Start]) -> Steps:
        """See `Copies`."""
        return joined(self._call("reset", [(part,) for part in self._split(starts)]))

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """See `Copies`."""
        return joined(self._call("step", [(part,) for part in self._split(actions)]))

    def draw(self, looks: Sequence[Look] | None = None) -> Frames:
        """See `Copies`."""
        parts = [None] * len(self._workers) if looks is None else self._split(looks)
        return np.concatenate(self._call("draw", [(part,) for part in parts]))

    def paint(self, states: States, looks: Sequence[Look] | None = None) -> Frames:
        """See `Copies`."""
        numbers = np.array_split(np.arange(len(states)), min(len(states), len(self._workers)))
        parts = [slice(part[0], part[-1] + 1) for part in numbers]
        return np.concatenate(self._call("paint", [(states[part], looks and looks[part]) for part in parts]))

    def close(self) -> None:
        """End the workers."""
        self._end()

    def _split(self, values: Any) -> list[Any]:
        ends = np.cumsum([0, *self._sizes]).tolist()
        return [values[first:end] for first, end in itertools.pairwise(ends)]

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method in as many workers as there are arguments, at once; returns what they return, or raises the first UserError."""
        workers = self._workers[: len(arguments)]
        try:
            for worker, given in zip(workers, arguments, strict=True):
                worker.connection.send((method, given))
            found = [worker.connection.recv() for worker in workers]
        except (OSError, EOFError) as error:
            self.close()
            status = next((worker.process.returncode for worker in workers if worker.process.returncode), 0)
            raise UserError(
                f"a process of environment {self.name} died with exit status {status}; run the command again"
            ) from error
        for result in found:
            if isinstance(result, UserError):
                raise result
        return found


class Worker:
    """A process and the connection to it."""

    def __init__(self) -> None:
        """Start it. It shares no memory, thread or GL context with this process, and is not started by `fork`."""
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(number)],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(number,),
            process_group=0,  # Ctrl-C is for the process that started this one
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a world prints must not be in a command's output
        )
        theirs.close()


def end_all(workers: Sequence[Worker]) -> None:
    """Close the connections, so that the workers end, and wait for them."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def joined(parts: Sequence[Steps]) -> Steps:
    """Join the copies of several workers."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def serve(number: int) -> None:
    """Do in a worker what its connection, a file descriptor, asks for, until the other end is closed."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the process that started this one ends it
        signal.signal(ignored, signal.SIG_IGN)
    from wmcache.envs.gym import Copies

    connection, copies = Connection(number), None
    try:
        while True:
            method, given = connection.recv()
            try:
                if copies is None:
                    copies, result = Copies(*given), None
                else:
                    result = getattr(copies, method)(*given)
            except UserError as error:
                result = error
            connection.send(result)
    except (EOFError, OSError):
        if copies is not None:
            copies.close()
        os._exit(0)  # libraries for drawing take a second to be unloaded
