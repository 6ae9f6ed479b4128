"""Several processes of this program, one for each device: torchrun in this process, with our signals and one line for a failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import psutil
from wmcache.cache.cpus import limit_threads
from wmcache.cache.errors import UserError
from wmcache.commands.shared import Stopped, program_path

SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Stopped, signal.SIGUSR1: Stopped, signal.SIGHUP: Stopped}


def launch(program: str, devices: int) -> NoReturn:
    """Start `devices` ranks of a program with our own words, wait for them, and exit as they did; they know of each other by torchrun.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP go to all ranks, which then finish their step and save it, however long that takes.

    Args:
        program: that stands beside this interpreter.
        devices: how many.

    Raises:
        UserError: a rank was killed.
        KeyboardInterrupt: a signal came before the ranks could act on it.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own choice is 1 thread, and a page about it.
    limit_threads(devices)
    # After a rank has failed; those that are told to stop take their time.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # It tells of peers that have gone by pages, before we have a word.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    words = ["--no-python", "--standalone", "--nproc-per-node", str(devices)]
    words += [program_path(program), *sys.argv[1:]]
    failed: list[BaseException] = []

    def start() -> None:
        try:
            run.run(run.parse_args(words))  # type: ignore[no-untyped-call]
        except BaseException as error:  # noqa: BLE001 (raised again, in the main thread)
            failed.append(error)

    wanted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        wanted.append(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    # Beside the main thread, where torchrun leaves signals to us: it would end ranks that take half a minute to save.
    agent = threading.Thread(target=start, daemon=True)
    agent.start()
    told: set[int] = set()
    while agent.is_alive():
        agent.join(0.2)
        for rank in psutil.Process().children() if wanted else ():
            if rank.pid not in told:
                told.add(rank.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM if wanted[0] == signal.SIGHUP else wanted[0])
    if not failed:
        sys.exit(0)
    if not isinstance(failed[0], ChildFailedError):
        raise failed[0]
    failures = sorted(failed[0].failures.items(), key=lambda item: item[1].timestamp)
    for _, failure in failures:
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
    if wanted:
        raise SIGNALS[signal.Signals(wanted[0])]
    killed, first = failures[0]
    raise UserError(
        f"process {killed} of {devices} was ended by {signal.Signals(-first.exitcode).name}; "
        "run the same command again, it goes on from the last checkpoint"
    )
