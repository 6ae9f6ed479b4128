"""Ranks of a program on one machine: a process for each device, with this process's signals and one line for a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from wmcache.common.cpus import limit_threads
from wmcache.common.errors import INTERRUPTED, STOPPED, Stopped, UserError

SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Stopped, signal.SIGUSR1: Stopped, signal.SIGHUP: Stopped}
HOST = "127.0.0.1"  # because the name of a machine, and even `localhost`, may not resolve
SECONDS_TO_END = 10.0  # for the other ranks, after one has failed
POLL_SECONDS = 0.1

Rank = subprocess.Popen[bytes]


def launch(words: Sequence[str], devices: int) -> NoReturn:
    """Start `devices` ranks of a program with its arguments, wait for them, and exit as they did.

    torchrun's agent is not used: it resolves the machine's name, and cannot be stopped while it does. SIGNALS go to all ranks, which
    finish their step and save it, however long that takes. A second SIGINT kills them.

    Raises:
        UserError: a rank was killed.
        KeyboardInterrupt: a signal arrived, and rank 0 has not reported it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit_threads(devices)
    # PyTorch would report a lost peer on many lines, before the one line of this process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(signal.Signals(number))

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    ranks: list[Rank] = []
    try:
        for rank in range(devices):
            numbers = {"MASTER_PORT": store.port, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": 0}
            numbers |= {"WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices}
            # As torchrun sets them; the store is in this process.
            texts = {"MASTER_ADDR": HOST, "TORCHELASTIC_RUN_ID": "wmcache", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environment = {**os.environ, **texts, **{name: str(value) for name, value in numbers.items()}}
            # In its own process group, so that Ctrl-C arrives from here alone, in a form that also ends a rank during its imports.
            ranks.append(subprocess.Popen(list(words), env=environment, process_group=0))
        ended = _wait(ranks, received)
    finally:
        for process in ranks:
            process.kill()
    _exit_as(ended, received)


def _wait(ranks: Sequence[Rank], received: Sequence[signal.Signals]) -> dict[int, int]:
    """Pass signals on, end the others once a rank has failed, and return rank -> status in the order in which they ended."""
    ended: dict[int, int] = {}
    passed_on = False
    deadline: float | None = None
    while True:
        ended |= {number: code for number, rank in enumerate(ranks) if (code := rank.poll()) is not None}
        running = [rank for number, rank in enumerate(ranks) if number not in ended]
        if not running:
            return ended
        if received and not passed_on:
            passed_on = True
            # During imports, SIGINT would print a traceback; SIGTERM ends the process.
            number = signal.SIGUSR1 if received[0] == signal.SIGUSR1 else signal.SIGTERM
            for rank in running:
                rank.send_signal(number)
        if deadline is None and any(ended.values()):
            deadline = time.monotonic() + SECONDS_TO_END
            for rank in running:
                rank.terminate()
        if (deadline is not None and time.monotonic() > deadline) or list(received).count(signal.SIGINT) > 1:
            for rank in running:
                rank.kill()
        time.sleep(POLL_SECONDS)


def _exit_as(ended: Mapping[int, int], received: Sequence[signal.Signals]) -> NoReturn:
    failed = {rank: code for rank, code in ended.items() if code}
    if not failed:
        sys.exit(0)
    if received:
        if failed.get(0) == STOPPED:  # rank 0 has printed that all stop
            sys.exit(INTERRUPTED if received[0] == signal.SIGINT else STOPPED)
        # Even where a rank that was still training reported that another one, which was starting, had gone.
        raise SIGNALS[received[0]]
    for code in failed.values():
        if code > 0:  # that rank has printed why
            sys.exit(code)
    killed, code = next(iter(failed.items()))
    why = f"process {killed} of {len(ended)} was ended by {signal.Signals(-code).name}"
    raise UserError(f"{why}; run the same command again to resume from the last checkpoint")
