"""The processes that train one run together, started by torchrun or `--devices`. Rank 0 is the main process: it alone writes and prints."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmcache.common.device import choose_device
from wmcache.common.errors import UserError, one_line, reason
from wmcache.engine.signals import STOPPING, handled

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

B = TypeVar("B")
Loss = Callable[[B, int], dict[str, Tensor]]
"""(batch, step) -> `loss` to minimise, and parts of it to log; scalars."""

TIMEOUT = timedelta(minutes=30)  # for the other ranks: rank 0 validates and saves alone
EXIT_TIMEOUT = timedelta(seconds=20)
# Words in PyTorch's errors about another rank that is gone; they have no type of their own in all versions.
NETWORK_ERRORS = ("gloo", "NCCL", "TCPStore", "Connection", "Broken pipe")


class ReportedError(Exception):
    """This rank ends by its cause, and another rank has already reported why the run ends."""


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes that train together. The local numbers are those of this machine; `parent` is the starting process's id."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    parent: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether the process that started the ranks is gone, so that nothing else would end them."""
        return self.world > 1 and os.getppid() != self.parent

    def log(self, line: str) -> None:
        """Print a line, on rank 0 only."""
        if self.is_main:
            tqdm.write(one_line(line))

    def device(self, name: str) -> torch.device:
        """Return the device of a name; each rank has its own, except on the CPU."""
        if self.world == 1:
            return choose_device(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        available = torch.cuda.device_count()
        if name not in ("cpu", "cuda") or (name == "cuda" and self.local_world > available):
            found = f"{self.local_world} processes and {available} CUDA devices"
            raise UserError(f"--device {name} does not suit {found}; start fewer, or choose --device cuda or cpu")
        return choose_device(f"cuda:{self.local_rank}" if name == "cuda" else name)

    def share(self, network: nn.Module, loss: Loss[B]) -> Loss[B]:
        """Wrap the loss of a network so that its gradients are averaged over the ranks. All ranks call this, with equal parameters."""
        if self.world == 1:
            return loss
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(_LossModule(network, loss))

    def seed(self, seed: int, step: int) -> None:
        """Seed what dropout and noise draw by rank and step; a single process continues with its generator."""
        if self.world > 1:
            state = np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))

    def all_reduce(self, values: dict[str, Tensor], number: int = 0) -> tuple[dict[str, Tensor], int]:
        """Return the means of scalars over the ranks and the largest of their numbers, bit-identical on all ranks."""
        if self.world == 1:
            return values, number
        import torch.distributed as dist

        own = torch.stack([*(value.detach().float() for value in values.values())])
        own = torch.cat([own, own.new_tensor([number])])
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        table = torch.stack(parts)
        return dict(zip(values, table[:, :-1].mean(0), strict=True)), int(table[:, -1].max())

    def broadcast(self, number: int) -> int:
        """Return rank 0's number."""
        if self.world == 1:
            return number
        import torch.distributed as dist

        # Always over the CPU's network, which notices when a rank dies.
        sent = torch.tensor([int(number) if self.is_main else 0])
        dist.all_reduce(sent)
        return int(sent)

    def wait(self) -> None:
        """Wait until all ranks call this."""
        self.broadcast(0)


SINGLE = Ranks()


class _LossModule(nn.Module):
    """A loss as a module's `forward`, for DistributedDataParallel. Buffers are not registered: they are equal on all ranks."""

    def __init__(self, network: nn.Module, loss: Loss[Any]) -> None:
        super().__init__()
        self.trained, self._loss = nn.ParameterList(network.parameters()), loss

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        return self._loss(batch, step)


def without_reduction(loss: Loss[Any]) -> AbstractContextManager[Any]:
    """Keep gradients of passes in this block on their rank; the first pass outside averages them all."""
    found: AbstractContextManager[Any] = getattr(loss, "no_sync", nullcontext)()
    return found


def is_distributed() -> bool:
    """Whether torchrun or `--devices` started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the ranks that torchrun started, by NCCL between CUDA devices and gloo between CPUs; else yield a single process.

    The first rank that ends by an exception raises it. All others raise `ReportedError`, so that the user reads one line. Raises UserError
    where a device is not available, or another rank does not come or dies.
    """
    if not is_distributed():
        yield SINGLE
        return
    import torch.distributed as dist

    # Before there is a group: arguments of its functions default to the group of this moment, and would keep it and its threads past the
    # end of the interpreter, which then aborts now and then.
    import torch.distributed.nn.functional
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world, local_rank, local_world = (int(os.environ[name]) for name in names)
    ranks = Ranks(rank, world, local_rank, local_world, os.getppid())
    store: Store | None = None
    try:
        try:
            # Handlers in Python do not run while PyTorch waits for the other ranks.
            with handled(STOPPING, signal.SIG_DFL):
                store = PrefixStore("wmtrain", next(rendezvous("env://"))[0])
                if (own := ranks.device(device)).type == "cuda":
                    torch.cuda.set_device(own)
                backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=TIMEOUT)
            yield ranks
        except RuntimeError as error:
            if not any(word in str(error) for word in NETWORK_ERRORS):
                raise
            why = f"a process of this training has died, or cannot be reached ({reason(error)})"
            raise UserError(f"{why}; run the same command again to resume from the last checkpoint") from error
        dist.destroy_process_group()
    except BaseException as error:
        # A second signal must not interrupt the exit.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
        if store and not _reports(store, ranks.rank, stopped=isinstance(error, KeyboardInterrupt)):
            raise ReportedError from error
        raise


def _reports(store: Store, rank: int, *, stopped: bool) -> bool:
    """Whether this rank reports why the run ends: the first one that asks, and rank 0 where all are stopped."""
    try:
        if stopped and rank > 0:
            store.wait(["reported"], EXIT_TIMEOUT)
        first = bool(store.compare_set("reporter", "", str(rank)) == str(rank).encode())
        if first:
            store.set("reported", "")
    except RuntimeError:  # the store's process is gone; reporting twice is better than not at all
        return True
    return first
